"""Some nine hundred damages: every one is found and named, none is read as data, and sound stores are silent.

`tests/damages.py` makes them. One damage at a time is done to a store and undone again.
"""

import collections
import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from damages import KINDS, SUBJECTS, Damage, Subject, damaged, damages_of, harmless, make_subject
from hypothesis import given, settings
from hypothesis import strategies as st
from kill_points import unchecked, without_sync
from parts import part_and_all_of
from stores import COLUMNS, make_contents, raw_tensorstore, tree

import actstore
from actstore import Layout, Site
from actstore.errors import ActstoreError
from actstore.kvstore import Root
from actstore.layout import norm_name
from actstore.ledger import read_plan
from actstore.markers import MANIFEST_KEY, PLAN_KEY, SEAL_KEY, TABLE_KEY
from actstore.verify import Depth, Finding, verify

pytestmark = pytest.mark.slow

STOPPED = "verify stopped"
DEPTHS: tuple[Depth, ...] = ("fast", "sample", "full")
SEEN_FAST = {"cut", "empty", "missing", "a folder", "a loop of links"}  # as the documentation says


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    with unchecked(), without_sync():
        yield


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """Makes a subject when it is first asked for."""
    made: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in made:
            made[name] = make_subject(name, tmp_path_factory.mktemp("subject"))
        return made[name]

    return subject


# What verify says


def look(url: Path, depth: Depth = "full") -> list[Finding]:
    """The findings; what cannot even be looked at is a finding that says so."""
    try:
        root = Root.of(url)
        return list(verify(root, read_plan(root), depth=depth, share=0.3).findings)
    except ActstoreError as error:
        return [Finding(STOPPED, str(error))]


def place_of(key: str, layout: Layout) -> tuple[str, int | None]:
    """How a person calls an object, and the block it belongs to."""
    if marker := re.fullmatch(r"\.act/commits/(\d{8})\.json", key):
        return f"marker of block {int(marker[1])}", int(marker[1])
    array, _, place = key.partition("/c/")
    if not place or array.startswith("documents/") or array in map(layout.layer_dimension, layout.sites):
        return array, None
    site = next((site for site in layout.sites if array in (site.name, f"{site.name}_norm")), None)
    numbers = [int(number) for number in place.split("/")]
    if site is None or site.layers is None:
        return f"{array}, block {numbers[0]}", numbers[0]
    return f"{array}, layer {site.layers[numbers[0]]}, block {numbers[1]}", numbers[1]


def is_named(key: str, findings: list[Finding], layout: Layout) -> bool:
    """Whether a damaged object is named, or the document that vouches for it, or that it vouches for."""
    whats = {finding.what for finding in findings}
    if whats == {STOPPED}:
        return key in findings[0].problem
    name, block = place_of(key, layout)
    names = {name}
    if block is not None:
        names |= {f"marker of block {block}"}
    if key.startswith(".act/commits/"):
        names |= {finding.what for finding in findings if finding.block == block}
    if key in (SEAL_KEY, MANIFEST_KEY):
        names |= {SEAL_KEY, MANIFEST_KEY}
    if key == TABLE_KEY:
        names |= {what for what in whats if what.startswith("documents/")}
    if key == PLAN_KEY:
        names |= {"zarr.json"}  # a sound plan, of another store
    return bool(names & whats)


def complaints(subject: Subject, damage: Damage, findings: list[Finding]) -> list[str]:
    """What is wrong with what verify found, in the place where `damage` was done."""
    layout = subject.contents.layout
    unnamed = [key for key in damage.changes if not is_named(key, findings, layout)]
    shown = [f"{finding.what}: {finding.problem}" for finding in findings[:3]]
    if not findings:
        return ["not found"]
    if unnamed:
        return [f"{unnamed} is not named, but {shown}"]
    if findings[0].what == STOPPED or PLAN_KEY in damage.changes:
        return []
    blocks = {finding.block for finding in findings} - {None}
    expected = {place_of(key, layout)[1] for key in damage.changes} - {None}
    return [] if blocks == expected else [f"blocks {blocks} are blamed, expected {expected}: {shown}"]


# What is read


def read(subject: Subject, arrays: Iterable[str]) -> dict[str, bytes]:
    """The values of arrays, or of the documents, by every way to read them. What cannot be read is not there."""
    found: dict[str, bytes] = {}
    with suppress(ActstoreError):
        store = actstore.open(subject.url, partial=not subject.sealed)
        dataset = store.dataset(raw=True, partial=not subject.sealed)
        for array in arrays:
            for way, values in _ways(subject, store, dataset, array):
                with suppress(ActstoreError):
                    found[way] = values()
    return found


def _ways(
    subject: Subject, store: actstore.Store, dataset: xr.Dataset, array: str
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    layout = subject.contents.layout
    if array == "documents":
        yield "documents", lambda: _documents(store)
        return
    yield f"dataset()[{array!r}]", lambda: dataset[array].values.tobytes()  # noqa: PLW0108  reads when it is called
    if array in subject.contents.columns:
        yield f"column({array!r})", lambda: store.column(array, samples_of(subject)).tobytes()
    if array in subject.contents.rows and subject.sealed:
        for layer in layout.site(array).layers or [None]:
            yield f"batches of {array}, {layer}", partial(_batches, store, array, layer)


def samples_of(subject: Subject) -> np.ndarray:
    """The samples that are committed."""
    return np.concatenate([np.arange(*subject.contents.layout.block_range(block)) for block in subject.blocks])


def _batches(store: actstore.Store, site: str, layer: int | None) -> bytes:
    """All rows of a site and layer, put in order."""
    rows: dict[int, bytes] = {}
    with store.batches(site=site, layer=layer, batch_size=8, epochs=1, drop_remainder=False) as batches:
        while batch := batches.next_or_none():
            rows |= zip(batch.samples.tolist(), map(bytes, batch.rows.view(np.uint8)), strict=True)
    return b"".join(rows[sample] for sample in sorted(rows))


def _documents(store: actstore.Store) -> bytes:
    documents = store.documents
    everyone = np.arange(len(documents))
    found: list[Any] = [documents.strings("id", everyone), documents.strings("text", everyone)]
    found += [documents.numbers("pages", everyone).tolist()]
    found += [[part.tolist() for part in documents.tokens(number)] for number in range(len(documents))]
    return repr(found).encode()


def arrays_of(subject: Subject, damage: Damage) -> set[str]:
    """What is read after a damage: what lies in it, or something of everything."""
    hit = {key.split("/")[0] for key in damage.changes if "/c/" in key} - {"valid"}
    some = {subject.contents.layout.sites[0].name, subject.contents.layout.columns[0].name}
    documents = {"documents"} if subject.contents.documents else set()
    return hit or some | documents


def arrays_in(subject: Subject) -> list[str]:
    """Everything that can be read of a subject."""
    contents, layout = subject.contents, subject.contents.layout
    labels = [layout.layer_dimension(site) for site in layout.sites if site.layers]
    names = [*contents.rows, *contents.columns, *map(norm_name, contents.rows), *labels]
    return [*names, "documents"] if contents.documents else names


def check_truth(subject: Subject) -> dict[str, bytes]:
    """What is read of the sound subject, by way of reading; rows and columns are compared with those in memory."""
    contents, layout = subject.contents, subject.contents.layout
    found = read(subject, arrays_in(subject))
    samples = samples_of(subject)
    expected = {f"dataset()[{name!r}]": rows[..., samples, :].tobytes() for name, rows in contents.rows.items()}
    for name, values in contents.columns.items():
        expected |= dict.fromkeys([f"dataset()[{name!r}]", f"column({name!r})"], values[samples].tobytes())
    for site in layout.sites if subject.sealed else []:
        for index, layer in enumerate(site.layers or [None]):
            rows = contents.rows[site.name]
            expected[f"batches of {site.name}, {layer}"] = (rows if layer is None else rows[index]).tobytes()
    assert {way: found[way] for way in expected} == expected
    return found


def read_wrong(subject: Subject, truth: dict[str, bytes], damage: Damage) -> list[str]:
    """Ways of reading that gave other values than the truth, and no error."""
    return [way for way, values in read(subject, arrays_of(subject, damage)).items() if values != truth[way]]


SOUND_KINDS = {
    "swapped", "copied", "stale", "a mixture of chunks", "rewritten with its checksum", "a block in another's place",
}  # fmt: skip


def decodes(subject: Subject, damage: Damage) -> bool:
    """Whether every file is sound in itself: then only what stands elsewhere can tell that it is wrong."""
    bare = subject.contents.layout.codec == "none" and set(damage.changes) & set(subject.shards())
    return damage.kind in SOUND_KINDS or bool(bare)


# Every damage


@dataclasses.dataclass
class Row:
    """A row of the table that is printed."""

    damages: int = 0
    found: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


def check_damage(subject: Subject, truth: dict[str, bytes], damage: Damage, row: Row) -> list[str]:
    """Does one damage, looks at it in every depth, reads through it, undoes it; what is wrong.

    Files that are sound in themselves are read by a test of their own.
    """
    sound = decodes(subject, damage)
    with damaged(subject, damage):
        found = {depth: look(subject.url, depth) for depth in DEPTHS}
        wrong = [] if sound else read_wrong(subject, truth, damage)
    row.damages += 1
    row.found.update([*(depth for depth in DEPTHS if found[depth]), *["sound in itself"] * sound])
    problems = complaints(subject, damage, found["full"])
    if damage.kind in SEEN_FAST and not found["fast"]:
        problems.append("not found by fast, which says that it finds this")
    if wrong:
        problems.append(f"read without an error: {wrong}")
    return [f"{damage}: {problem}" for problem in problems]


@part_and_all_of("most", 2, None)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_damage_is_found_and_named_and_none_is_read(
    name: str, most: int | None, subjects: Callable[[str], Subject]
) -> None:
    subject = subjects(name)
    truth = check_truth(subject)
    rows: dict[str, Row] = collections.defaultdict(Row)
    problems: list[str] = []
    for damage in damages_of(subject, most_of_a_kind=most):
        problems += check_damage(subject, truth, damage, rows[damage.kind])
    show(name, rows)
    assert not problems, "\n".join([f"{len(problems)} problems", *problems[:40]])
    assert tree(subject.url) == subject.files
    assert [look(subject.url, depth) for depth in DEPTHS] == [[], [], []]


def show(name: str, rows: dict[str, Row]) -> None:
    """Prints what was found, by kind of damage."""
    columns = [*DEPTHS, "sound in itself"]
    total = Row(sum(row.damages for row in rows.values()))
    for row in rows.values():
        total.found.update(row.found)
    print(f"\n{name:28}{'damages':>8}" + "".join(f"{column:>16}" for column in columns))
    for kind, row in [*rows.items(), ("all", total)]:
        print(f"{kind:28}{row.damages:>8}" + "".join(f"{row.found[column]:>16}" for column in columns))


def test_there_are_many_damages_and_each_is_there_once(subjects: Callable[[str], Subject]) -> None:
    found = {
        (name, tuple(sorted(damage.changes.items()))): damage.kind
        for name in SUBJECTS
        for damage in damages_of(subjects(name))
    }
    kinds = collections.Counter(found.values())
    print(f"{len(found)} damages: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    assert kinds.keys() == KINDS.keys()
    assert len(found) >= 900


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_sound_file_in_the_wrong_place_is_never_read_as_data(name: str, subjects: Callable[[str], Subject]) -> None:
    """Swapped, stale, rewritten with its checksum, or without one: all but documents are right or an error."""
    subject = subjects(name)
    truth = check_truth(subject)
    vouched = {*arrays_in(subject)} - {"documents"}
    count, problems, elsewhere = 0, [], 0
    for damage in damages_of(subject):
        if not decodes(subject, damage):
            continue
        with damaged(subject, damage):
            wrong = read_wrong(subject, truth, damage)
        if arrays_of(subject, damage) <= vouched:
            count += 1
            problems += [f"{damage}: read without an error: {wrong}"] * bool(wrong)
        else:
            elsewhere += bool(wrong)
    print(
        f"{name}: {count} damages of rows, norms, columns or labels, none read as data; {elsewhere} of documents were"
    )
    assert not problems, "\n".join([f"{len(problems)} problems in {count}", *problems[:40]])


# No false alarm


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SUBJECTS)
def test_changes_that_harm_nothing_change_no_value(name: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(name)
    truth = check_truth(subject)
    reasons = harmless(subject)
    for reason, changes in reasons.items():
        with damaged(subject, Damage("harmless", reason, changes)):
            assert (reason, look(subject.url)) == (reason, [])
            assert (reason, read(subject, arrays_in(subject))) == (reason, truth)
    print(f"{name}: harmless, because: {'; '.join(reasons)}")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of every codec, with sites, layers and columns of all kinds."""
    layers = st.none() | st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(tuple)
    fields = st.tuples(st.integers(1, 9), layers, st.sampled_from(["bfloat16", "float16", "float32"]))
    sites = [
        Site(f"site{number}", *field) for number, field in enumerate(draw(st.lists(fields, min_size=1, max_size=3)))
    ]
    columns = draw(st.lists(st.sampled_from(COLUMNS), max_size=3, unique=True))
    chunk = draw(st.integers(1, 5))
    block = chunk * draw(st.integers(1, 4))
    samples = draw(st.integers(1, 3 * block))
    return Layout(
        tuple(sites), samples, block, chunk, tuple(columns), draw(st.sampled_from(["crc32c", "none", "zstd"]))
    )


CLEAN = collections.Counter[str]()


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    layout=layouts(), values=st.sampled_from(["normal", "zeros", "padding"]), documents=st.booleans(), data=st.data()
)
def check_a_clean_store(folder: Path, layout: Layout, values: str, documents: bool, data: st.DataObject) -> None:
    url = Path(tempfile.mkdtemp(dir=folder)) / "run.acts.zarr"
    contents = make_contents(layout, documents=documents)
    if values != "normal":  # of the fill value, where a column has one
        rows = {name: np.zeros_like(array) for name, array in contents.rows.items()}
        columns = {name: np.full_like(array, 0 if values == "zeros" or array.dtype == np.uint8 else -1)
                   for name, array in contents.columns.items()}  # fmt: skip
        contents = dataclasses.replace(contents, rows=rows, columns=columns)
    blocks = data.draw(st.permutations(range(layout.blocks)))
    blocks = blocks[: data.draw(st.integers(0, layout.blocks))] if (some := data.draw(st.booleans())) else blocks
    contents.write(url, blocks=blocks, seal=not some)
    assert [look(url, depth) for depth in DEPTHS] == [[], [], []]
    CLEAN.update(stores=1, blocks=len(blocks), sealed=(url / SEAL_KEY).exists())


def test_clean_stores_of_any_layout_raise_no_alarm(tmp_path: Path) -> None:
    CLEAN.clear()
    check_a_clean_store(tmp_path)
    assert min(CLEAN["sealed"], CLEAN["stores"] - CLEAN["sealed"]) >= 10
    print(
        f"{CLEAN['stores']} clean stores, {CLEAN['sealed']} sealed, {CLEAN['blocks']} blocks, three depths: no finding"
    )


# What the system refuses


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads what nobody may read: run the tests as a user for this one")
@pytest.mark.parametrize("key", ["resid_post/c/0/0/0", "valid/c/1", "layer/c/0", "documents/text_bytes/c/0", PLAN_KEY])
def test_a_file_that_may_not_be_read_is_named(key: str, subjects: Callable[[str], Subject]) -> None:
    subject = subjects("crc32c")
    damage = Damage("locked", key, {key: "locked"})
    with damaged(subject, damage):
        assert complaints(subject, damage, look(subject.url)) == []
        assert read_wrong(subject, {}, damage) == []


# The checks themselves


def of_kind(subject: Subject, kind: str) -> Damage:
    return next(damage for damage in damages_of(subject) if damage.kind == kind and decodes(subject, damage))


def test_a_verify_that_finds_nothing_would_be_seen(subjects: Callable[[str], Subject]) -> None:
    subject = subjects("crc32c")
    damage = of_kind(subject, "stale")
    assert complaints(subject, damage, []) == ["not found"]
    others = [Finding("final_norm, block 2", "made up", 2), Finding("layer", "made up")]
    assert "is not named" in complaints(subject, damage, others)[0]
    with damaged(subject, damage):
        found = look(subject.url)
    assert complaints(subject, damage, found) == []
    assert "are blamed" in complaints(subject, damage, [*found, Finding("x", "made up", 2)])[0]
    assert complaints(subject, damage, [Finding(STOPPED, "could not read words.txt")]) != []


def test_a_reader_that_compares_nothing_would_be_seen(subjects: Callable[[str], Subject]) -> None:
    """TensorStore alone reads a stale shard as data: what the tests above would report of a reader that trusts it."""
    subject = subjects("crc32c")
    key = "resid_post/c/0/0/0"
    with damaged(subject, Damage("stale", key, {key: subject.other_values[key]})):
        found = raw_tensorstore(subject.url, "resid_post")[..., :19, :].read().result()
    assert found.shape == subject.contents.rows["resid_post"].shape
    assert found.tobytes() != subject.contents.rows["resid_post"].tobytes()
