"""Appending: what is added is there, what was there stays, and readers never see anything between."""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from appending import ADDITIONS, PROVENANCE, Addition, added_layers, added_samples, cut, first_documents
from kill_points import Forks, unchecked, watched
from parts import part_and_all
from stores import LAYOUT, Contents, make_contents, raw_tensorstore, tree

import actstore
from actstore import Column, Plan, Site
from actstore.errors import (
    CorruptStoreError,
    InputError,
    PlanMismatchError,
    SealedStoreError,
    StoreNotFoundError,
    UnfinishedStoreError,
)
from actstore.generations import added_sites, base_of, extend
from actstore.kvstore import Root
from actstore.ledger import lineage, read_plan, read_status
from actstore.markers import marker_key
from actstore.metadata import array_metadata
from actstore.repair import repair
from actstore.sealing import abandon, seal
from actstore.verify import Report, verify


def check_holds(url: Path, contents: Contents) -> None:
    """The store gives `contents` and nothing else, by every way of reading."""
    samples = contents.layout.samples
    store = actstore.open(url)
    assert store.samples == samples
    ways = {
        "actstore": store.dataset(raw=True),
        "xarray": xr.open_dataset(url, raw=True),
        "open_zarr": xr.open_zarr(url, chunks=None, mask_and_scale=False),
    }
    for way, dataset in ways.items():
        for name, rows in {**contents.rows, **contents.columns}.items():
            assert dataset[name].dtype == rows.dtype, (way, name)
            assert dataset[name].values.tobytes() == rows.tobytes(), (way, name)
        for site in contents.layout.sites:
            norms = np.sqrt((contents.rows[site.name].astype(np.float64) ** 2).sum(-1))
            np.testing.assert_allclose(
                dataset[f"{site.name}_norm"], norms, rtol=1e-3 if site.dtype != "float32" else 1e-5
            )
            if site.layers is not None:
                labels = dataset[site.name].indexes[dataset[site.name].dims[0]]
                assert tuple(labels) == site.layers, (way, site.name)
    group = zarr.open_group(url, mode="r")
    assert group["valid"][:].tolist() == [1] * samples
    for name, rows in contents.rows.items():
        assert raw_tensorstore(url, name).read().result().tobytes() == rows.tobytes(), name
    for site in contents.layout.sites:
        for index, layer in enumerate(site.layers or [None]):
            batches = list_batches(store, site.name, layer)
            rows = contents.rows[site.name] if layer is None else contents.rows[site.name][index]
            assert sorted(sample for batch in batches for sample in batch.samples) == list(range(samples))
            for batch in batches:
                assert batch.rows.tobytes() == rows[batch.samples].tobytes()
    if contents.documents is not None:
        check_documents(store, contents)


def list_batches(store: actstore.Store, site: str, layer: int | None) -> list[actstore.Batch]:
    with store.batches(
        site=site, layer=layer, batch_size=7, epochs=1, drop_remainder=False, window_bytes=200
    ) as loader:
        return list(iter(loader.next_or_none, None))


def check_documents(store: actstore.Store, contents: Contents) -> None:
    table = contents.documents
    assert table is not None
    everything = np.arange(len(table.ids))[::-1]  # not in the stored order
    stored = store.documents
    assert len(stored) == len(table.ids)
    assert stored.strings("id", everything) == list(table.ids)[::-1]
    assert stored.strings("text", everything) == list(table.texts)[::-1]
    assert stored.numbers("pages", everything).tolist() == list(table.columns["pages"])[::-1]
    for document in everything:
        span = slice(*table.token_offsets[document : document + 2])
        ids, places = stored.tokens(int(document))
        assert ids.tolist() == table.token_id[span].tolist()
        assert places.tolist() == np.stack([table.token_start, table.token_end], 1)[span].tolist()
    for row, shown in enumerate(store.text(range(contents.layout.samples), window=1)):
        document, position = contents.columns["document"][row], contents.columns["position"][row]
        token = table.token_offsets[document] + position
        text = table.texts[document].encode()[table.token_start[token] : table.token_end[token]]
        assert shown.token.encode() == text


def report_of(url: Path) -> Report:
    root = Root.of(url)
    return verify(root, read_plan(root, unfinished=True))


@pytest.fixture(params=ADDITIONS)
def addition(request: pytest.FixtureRequest) -> Addition:
    return ADDITIONS[request.param]()


@pytest.fixture
def url(addition: Addition, tmp_path: Path) -> Path:
    """The store before anything is added."""
    return addition.before.write(tmp_path / "run.acts.zarr")


# What is added is there


@pytest.mark.sampled(3)
def test_the_store_holds_all(addition: Addition, url: Path, tmp_path: Path) -> None:
    check_holds(url, addition.before)
    addition.write(url)
    check_holds(url, addition.whole)
    assert report_of(url).findings == ()
    at_once = tree(addition.whole.write(tmp_path / "at-once.acts.zarr"))
    data = {key for key in at_once if "/c/" in key and not key.startswith(("documents", "layer/", "attn_out_layer/"))}
    assert len(data) > 20
    assert {key: tree(url)[key] for key in data} == {key: at_once[key] for key in data}


def test_nothing_that_was_there_is_changed(addition: Addition, url: Path) -> None:
    before = tree(url)
    addition.write(url)
    after = tree(url)
    changed = {key for key in before if after.get(key) != before[key]}
    first = addition.before.layout.samples // LAYOUT.block_samples
    short = addition.samples and addition.before.layout.samples % LAYOUT.block_samples
    again = {key for key in before if short and {f"/c/{first}", f"/{first}/0"} & {key[-4:], key[-3:], key[-5:]}}
    again |= {key for key in before if short and "/c/" in key and str(first) in key.split("/")[-2:]}
    assert {key for key in changed if not key.endswith("zarr.json")} <= again
    assert not {key for key in changed if key.startswith((".act/", "documents/", "assets/"))}


@pytest.mark.sampled(3)
def test_readers_see_the_store_as_it_was_until_the_seal(addition: Addition, url: Path) -> None:
    seen = actstore.open(url)
    root = Root.of(url)
    with addition.append(url) as writer:
        for number in writer.missing():
            activations, columns = addition.block(writer, number)
            writer.write(number, activations, samples=columns).result()
            check_holds(url, addition.before)
    assert read_status(root, writer.plan) == "writing"
    assert report_of(url).findings == ()
    check_holds(url, addition.before)
    addition.write(url)
    assert seen.samples == addition.before.layout.samples  # an open store stays what it was
    name = addition.before.layout.sites[0].name
    assert seen.dataset(raw=True)[name].values.tobytes() == addition.before.rows[name].tobytes()


def test_partial_shows_what_is_committed(tmp_path: Path) -> None:
    addition = added_samples(at=20)  # blocks of 16: the second is short
    url = addition.before.write(tmp_path / "run.acts.zarr")
    addition.write(url, blocks=[2], seal=False)
    rows = [*range(20), *range(32, 48)]
    store = actstore.open(url, partial=True)
    for dataset in (store.dataset(partial=True, raw=True), xr.open_dataset(url, partial=True, raw=True)):
        assert dataset["resid_post"].values.tobytes() == addition.whole.rows["resid_post"][:, rows].tobytes()
        assert dataset["position"].values.tolist() == addition.whole.columns["position"][rows].tolist()
    assert store.column("position", np.array([3, 40])).tolist() == addition.whole.columns["position"][[3, 40]].tolist()
    with pytest.raises(UnfinishedStoreError, match="block 1 of the rows asked for is not committed"):
        store.column("position", np.array([3, 21]))
    assert (store.complete, store.committed) == (False, 1)


def test_partial_shows_samples_with_every_layer(tmp_path: Path) -> None:
    addition = added_layers()
    url = addition.before.write(tmp_path / "run.acts.zarr")
    addition.write(url, blocks=[1, 3], seal=False)
    rows = [*range(16, 32), *range(48, 53)]
    dataset = actstore.open(url, partial=True).dataset(partial=True, raw=True)
    assert dataset["resid_post"].layer.values.tolist() == [2, 5, 11]
    for name, values in addition.whole.rows.items():
        assert dataset[name].values.tobytes() == values[..., rows, :].tobytes()


def test_one_generation_after_the_other(tmp_path: Path) -> None:
    whole = make_contents(documents=False)
    first, second, *new = whole.layout.sites
    few = (dataclasses.replace(first, layers=first.layers[:1]), second)
    steps = [cut(whole, samples=10, sites=few), cut(whole, samples=21, sites=few)]
    more = (dataclasses.replace(first, layers=first.layers[:2]), second)
    steps += [cut(whole, samples=21, sites=more), cut(whole, samples=21), whole]
    added: list[tuple[Site, ...]] = [
        (), (dataclasses.replace(first, layers=first.layers[1:2]),),
        (dataclasses.replace(first, layers=first.layers[2:]), *new), (),
    ]  # fmt: skip
    url = steps[0].write(tmp_path / "run.acts.zarr")
    additions = [Addition(*pair) for pair in zip(steps[:-1], steps[1:], added, strict=True)]
    for addition in additions:
        addition.write(url)
        check_holds(url, addition.whole)
        assert report_of(url).findings == ()
    plans = lineage(Root.of(url), read_plan(Root.of(url)))
    assert [plan.generation for plan in plans] == [1, 2, 3, 4, 5]
    assert [plan.base and plan.base.fingerprint for plan in plans[1:]] == [plan.fingerprint for plan in plans[:-1]]
    for addition in additions:
        with pytest.raises(SealedStoreError, match="this was appended already, as generation"):
            addition.append(url)


@pytest.mark.parametrize("steps", ["layers, documents", "documents, layers, documents"])
def test_documents_after_layers(steps: str, tmp_path: Path) -> None:
    """The table that a store keeps is that of any generation, not of the last."""
    whole = make_contents()
    first, second, *new = whole.layout.sites
    few = (dataclasses.replace(first, layers=first.layers[:2]), second)
    cuts = [int((whole.columns["document"] < count).sum()) for count in (2, 3)]
    table = whole.documents
    assert table is not None
    url = cut(whole, samples=cuts[0], sites=few, documents=2).write(tmp_path / "run.acts.zarr")
    before = cut(whole, samples=cuts[0], sites=few, documents=2)
    if steps.startswith("documents"):
        after = cut(whole, samples=cuts[1], sites=few, documents=3)
        Addition(before, after, documents=first_documents(table, 2, 3)).write(url)
        before = after
    added = (dataclasses.replace(first, layers=first.layers[2:]), *new)
    after = cut(whole, samples=before.layout.samples, documents=3 if steps.startswith("documents") else 2)
    Addition(before, after, added).write(url)
    Addition(after, whole, documents=first_documents(table, len(after.documents.ids), 5)).write(url)  # type: ignore[union-attr]
    check_holds(url, whole)
    with pytest.raises(InputError, match="the store has a document table, the samples to add come without one"):
        actstore.append(url, {}, samples=3)


def test_a_late_seal_of_what_was_there_takes_nothing_back(tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.before.write(tmp_path / "run.acts.zarr", seal=False)
    late = addition.before.create(url, seal=True)  # opened before the seal
    addition.before.write(url)
    sound = tree(addition.write(url))
    activations, columns = addition.before.block(2)  # the block that grew
    with pytest.raises(SealedStoreError, match="block 2 was written again when samples were appended to it"):
        late.write(2, activations, samples=columns).result()
    with pytest.raises(SealedStoreError), late:
        pass  # its failed block is raised again
    with addition.before.create(tmp_path / "other.acts.zarr"):
        pass
    seal(Root.of(url), addition.before.plan)
    assert tree(url) == sound
    check_holds(url, addition.whole)


@pytest.mark.parametrize("lost", ["zarr.json", ".act/SEALED.json"])
def test_what_a_seal_wrote_last_may_be_lost(lost: str, tmp_path: Path) -> None:
    """The commands that wrote the store, in their order, bring it back."""
    addition = added_samples(at=37)
    url = addition.before.write(tmp_path / "run.acts.zarr")
    sound = tree(addition.write(url))
    (url / lost).unlink()
    with contextlib.suppress(SealedStoreError):
        addition.before.write(url, blocks=[])
    with contextlib.suppress(SealedStoreError):
        addition.write(url)
    assert tree(url) == sound


def test_a_repair_that_was_stopped_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every deletion; then repaired again and written again, by the commands in their order."""
    addition = added_samples(at=37)
    start = addition.before.write(tmp_path / "start.acts.zarr")
    sound = tree(addition.write(start))
    real, url, stops = Root.delete, tmp_path / "run.acts.zarr", 0
    for stop in itertools.count():
        shutil.copytree(start, url)
        damage(url, "resid_post/c/1/2/0")
        left = [stop]

        def delete(root: Root, key: str, left: list[int] = left) -> None:
            if not left[0]:
                raise Stopped
            left[0] -= 1
            real(root, key)

        root = Root.of(url)
        monkeypatch.setattr(Root, "delete", delete)
        with contextlib.suppress(Stopped):
            repair(root, read_plan(root, unfinished=True), report_of(url))
            stops = stop
        monkeypatch.setattr(Root, "delete", real)
        report = report_of(url)
        if report.findings:
            repair(root, read_plan(root, unfinished=True), report)
        with contextlib.suppress(SealedStoreError), addition.before.create(url, seal=True) as writer:
            for number in writer.missing():
                activations, columns = addition.before.block(number)
                writer.write(number, activations, samples=columns)
        with contextlib.suppress(SealedStoreError):
            addition.write(url)
        assert tree(url) == sound, stop
        shutil.rmtree(url)
        if stops:
            break
    print(f"repair was stopped before each of its {stops} deletions")


def test_an_addition_can_be_given_up(tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.before.write(tmp_path / "run.acts.zarr")
    with pytest.raises(InputError, match="nothing is being appended; there is nothing to give up"):
        abandon(Root.of(url))
    actstore.append(url, {"run": "wrong"}, samples=3, seal=False).close()
    with pytest.raises(PlanMismatchError, match="or give up what is being appended with `actstore abandon"):
        addition.append(url)
    assert abandon(Root.of(url)).generation == 2
    check_holds(url, addition.before)
    addition.write(url)
    check_holds(url, addition.whole)
    assert report_of(url).findings == ()


@pytest.mark.parametrize("change", ["layers", "columns", "codec", "chunk_samples"])
def test_a_plan_that_changes_what_is_there_is_refused(change: str, tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.write(addition.before.write(tmp_path / "run.acts.zarr"))
    path = url / ".act/generations/2/plan.json"
    plan = Plan.from_json(path.read_bytes(), where="plan")
    sites = (dataclasses.replace(plan.layout.sites[0], layers=(5, 2, 11)), *plan.layout.sites[1:])
    changes = {"layers": {"sites": sites}, "columns": {"columns": plan.layout.columns[::-1]},
               "codec": {"codec": "none"}, "chunk_samples": {"chunk_samples": 8}}  # fmt: skip
    layout = dataclasses.replace(plan.layout, **changes[change])  # type: ignore[arg-type]
    path.write_bytes(Plan.make(layout, plan.provenance, base=plan.base).to_json())
    with pytest.raises(CorruptStoreError, match="was appended to another store"):
        actstore.open(url)


# Killed and run again


class Stopped(BaseException):
    """Stands for the end of a process: nothing catches it."""


def points_of(addition: Addition, url: Path) -> list[str]:
    passed: list[str] = []
    with watched(passed.append):
        addition.write(url)
    return list(dict.fromkeys(passed))


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.mark.slow
@part_and_all(8)
@pytest.mark.parametrize("name", ["samples, inside a chunk", "documents", "layers and sites"])
def test_killed_anywhere_it_continues(name: str, stride: int, tmp_path: Path, forks: Forks) -> None:
    """SIGKILL at every point of an addition: the store stays what it was, and the next run ends in the same bytes."""
    addition = ADDITIONS[name]()
    start = addition.before.write(tmp_path / "start.acts.zarr")
    whole = tmp_path / "whole.acts.zarr"
    shutil.copytree(start, whole)
    points = points_of(addition, whole)
    finished, url = tree(whole), tmp_path / "run.acts.zarr"
    every = max(len(points) // 24, 1)
    chosen = [*points[::every], *points[-12:]][::stride]  # the last are those of the seal
    for point in chosen:
        shutil.copytree(start, url)
        process = forks.append(url, name, kill_at=point)
        assert forks.wait(process), f"{point} was not passed"
        sealed = read_plan(Root.of(url)).generation == 2
        check_rows(url, addition.whole if sealed else addition.before)
        assert not forks.wait(forks.append(url, name))
        found = tree(url)
        assert found == finished, (point, sorted(key for key in finished if found.get(key) != finished[key]))
        shutil.rmtree(url)
    print(f"{name}: {len(chosen)} of {len(points)} points killed, every rerun ended in the same bytes")


def check_rows(url: Path, contents: Contents) -> None:
    dataset = xr.open_dataset(url, raw=True)
    for name, rows in contents.rows.items():
        assert dataset[name].values.tobytes() == rows.tobytes(), name


@pytest.mark.parametrize("name", ["samples, inside a chunk", "layers and sites"])
def test_two_processes_add_at_once(name: str, tmp_path: Path, forks: Forks) -> None:
    addition = ADDITIONS[name]()
    url = addition.before.write(tmp_path / "run.acts.zarr")
    with addition.append(url) as writer:
        missing = writer.missing()
    started = [forks.append(url, name, blocks=missing[rank::2], seal=False) for rank in range(2)]
    killed = [forks.wait(process) for process in started]
    assert not any(killed)
    assert not forks.wait(forks.append(url, name))
    check_holds(url, addition.whole)


# What is refused


def refused(**changes: Any) -> Callable[[Path], Any]:
    return lambda url: actstore.append(url, PROVENANCE, **changes)


BASE = make_contents()
SITE = BASE.layout.sites[0]
REFUSALS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (refused(), InputError, "0 samples and 0 sites are to be added; expected a number of samples, or sites"),
    "both": (refused(samples=3, sites=[Site("q", 4, (1,))]), InputError, "3 samples and 1 sites are to be added"),
    "fewer samples": (refused(samples=-3, sites=[Site("q", 4, (1,))]), InputError, "-3 samples and 1 sites are to be"),
    "a layer that is there": (
        refused(sites=[dataclasses.replace(SITE, layers=(5, 7))]), InputError,
        r"layers \[5\] of site 'resid_post' are in the store; name only those to add",
    ),
    "another width": (
        refused(sites=[dataclasses.replace(SITE, width=7, layers=(7,))]), InputError,
        "site 'resid_post' is bfloat16 x 6 in the store, to be added is bfloat16 x 7; give it the same dtype and width",
    ),
    "another dtype": (
        refused(sites=[dataclasses.replace(SITE, dtype="float16", layers=(7,))]), InputError, "added is float16 x 6",
    ),
    "a layerless site again": (
        refused(sites=[Site("final_norm", 3, None)]), InputError,
        "is in the store and has no layers to add; leave it out",
    ),
    "a site twice": (
        refused(sites=[Site("q", 4, (1,)), Site("q", 4, (2,))]), InputError, "name one twice; name each once",
    ),
    "a column's name": (refused(sites=[Site("score", 4, (1,))]), InputError, r"the names \['score'\] are used twice"),
    "no documents": (refused(samples=3), InputError, "the store has a document table, the samples to add come without"),
    "documents with layers": (
        refused(sites=[Site("q", 4, (1,))], documents=BASE.documents), InputError, "documents come with added samples",
    ),
    "documents that are there": (
        refused(samples=3, documents=BASE.documents), InputError,
        "5 of the documents to append are in the store, first 'doc-ä0'; append only others",
    ),
    "sites that are none": (
        lambda url: actstore.append(url, PROVENANCE, sites=Site("q", 4, (1,))), InputError,  # type: ignore[arg-type]
        "expected a list of actstore.Site",
    ),
    "other columns": (
        refused(samples=3, documents=dataclasses.replace(BASE.documents, columns={"pages": ["a"] * 5})), InputError,
        r"the documents to add have the columns .*'pages': 'text'.*, the store has .*'pages': 'int64'",
    ),
    "provenance that is no JSON": (
        lambda url: actstore.append(url, {"a": {1, 2}}, sites=[Site("q", 4, (1,))]), InputError,
        "cannot plan this store",
    ),
    "no store": (
        lambda url: actstore.append(url.with_name("other.acts.zarr"), {}, samples=1), StoreNotFoundError,
        "no activation store at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, tmp_path: Path) -> None:
    url = BASE.write(tmp_path / "run.acts.zarr")
    before = tree(url)
    call, kind, message = REFUSALS[case]
    with unchecked(), pytest.raises(kind, match=message):
        call(url)
    assert tree(url) == before


def test_an_unfinished_store_is_finished_first(tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.before.write(tmp_path / "run.acts.zarr", blocks=[0], seal=False)
    with pytest.raises(UnfinishedStoreError, match="is unfinished: 2 of 3 blocks are missing; run the command that"):
        addition.append(url)


def test_something_else_is_refused_while_one_thing_is_added(tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.before.write(tmp_path / "run.acts.zarr")
    addition.write(url, blocks=[2], seal=False)
    with pytest.raises(PlanMismatchError, match=r"layout\.samples: there 53, here 38"):
        actstore.append(url, PROVENANCE, samples=1)
    with pytest.raises(PlanMismatchError, match=r'provenance\.run: there "the second", here nothing'):
        actstore.append(url, {"model": {"name": "made-up"}}, samples=addition.samples)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("layers and sites", {"resid_post": (3, 16, 6)}, r"has shape \(3, 16, 6\), expected \(1, 16, 6\)"),
        ("samples, inside a chunk", {"resid_post": (3, 16, 6)}, r"has shape \(3, 16, 6\), expected \(3, 11, 6\)"),
    ],
)  # fmt: skip
def test_a_block_holds_only_what_is_added(name: str, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    addition = ADDITIONS[name]()
    url = addition.before.write(tmp_path / "run.acts.zarr")
    with addition.append(url) as writer:
        block = writer.missing()[0]
        activations, columns = addition.block(writer, block)
        with pytest.raises(InputError, match=message):
            writer.write(
                block, activations | {key: np.zeros(size, np.float32) for key, size in given.items()}, samples=columns
            )
        with pytest.raises(InputError, match="expected none|found" if addition.sites else "needs the columns"):
            writer.write(block, activations, samples={"position": np.zeros(3)} if addition.sites else {})
    if name.startswith("samples"):
        with pytest.raises(InputError, match="block 1 does not exist; this plan writes blocks 2 to 3"):
            writer.block_range(1)


# Damage


def damage(url: Path, key: str) -> None:
    """Turns one bit of an object: of its first values where it holds some."""
    data = bytearray((url / key).read_bytes())
    data[len(data) // 8] ^= 4
    (url / key).write_bytes(data)


DAMAGES = {
    "old rows of a block that grew": ("samples, inside a chunk", "resid_post/c/1/2/0", 1, {2}),
    "an added block": ("samples, inside a chunk", "resid_post/c/0/3/0", 2, {3}),
    "a block before": ("samples, inside a chunk", "resid_post/c/1/0/0", 1, {0}),
    "a layer before": ("layers and sites", "resid_post/c/1/1/0", 1, {1}),
    "an added layer": ("layers and sites", "resid_post/c/2/1/0", 2, {1}),
    "an added site": ("layers and sites", "final_norm/c/1/0", 2, {1}),
    "documents before": ("documents", "documents/text_bytes/c/0", 1, set()),
    "added documents": ("documents", "documents-2/text_bytes/c/0", 2, set()),
    "labels": ("layers and sites", "layer/c/1", 1, set()),
    "an added marker": ("layers and sites", marker_key(0, 2), 2, {0}),
    "added ranges": ("samples, inside a chunk", ".act/generations/2/ranges.json", 2, set()),
    "an added manifest": ("layers and sites", ".act/generations/2/manifest.json", 2, set()),
    "the root group": ("samples, inside a chunk", "zarr.json", 1, set()),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_repaired(case: str, tmp_path: Path) -> None:
    name, key, generation, blocks = DAMAGES[case]
    addition = ADDITIONS[name]()
    url = addition.before.write(tmp_path / "run.acts.zarr")
    sound = tree(addition.write(url))
    damage(url, key)
    report = report_of(url)
    assert report.findings
    assert min(finding.generation for finding in report.findings) == generation
    assert set(report.damaged_blocks) >= blocks
    root = Root.of(url)
    taken = repair(root, read_plan(root, unfinished=True), report)
    assert taken.generation == generation
    if generation == 2:
        check_rows(url, addition.before)
    else:
        with pytest.raises(UnfinishedStoreError, match="finish"):
            addition.append(url)
        with addition.before.create(url, seal=True) as writer:
            assert set(writer.missing()) <= blocks
            for number in writer.missing():
                activations, columns = addition.before.block(number)
                writer.write(number, activations, samples=columns)
    addition.write(url)
    assert tree(url) == sound
    assert report_of(url).findings == ()


@pytest.mark.parametrize("gone", ["plan.json", "plan.json of the first"])
def test_a_plan_that_is_gone_is_an_error(gone: str, tmp_path: Path) -> None:
    addition = added_samples(at=37)
    url = addition.write(addition.before.write(tmp_path / "run.acts.zarr"))
    (url / (".act/generations/2/plan.json" if gone == "plan.json" else ".act/plan.json")).unlink()
    with pytest.raises((CorruptStoreError, StoreNotFoundError), match=r"plan\.json"):
        actstore.open(url)


def test_a_plan_of_another_store_is_an_error(tmp_path: Path) -> None:
    stores = []
    for at in (37, 36):
        addition = added_samples(at=at)
        stores.append(addition.write(addition.before.write(tmp_path / f"{at}.acts.zarr")))
    shutil.copy(stores[0] / ".act/generations/2/plan.json", stores[1] / ".act/generations/2/plan.json")
    with pytest.raises(CorruptStoreError, match="was appended to another store"):
        actstore.open(stores[1])


# Plans


def test_a_first_generation_is_stored_as_before() -> None:
    assert b'"base"' not in BASE.plan.to_json()
    assert BASE.plan.generation == 1
    assert list(BASE.plan.blocks) == [0, 1, 2, 3]


def test_the_metadata_of_an_addition_is_that_of_the_whole_but_for_labels_and_documents() -> None:
    addition = added_layers()
    plan = extend(addition.before.plan, PROVENANCE, sites=addition.sites)
    found, expected = (array_metadata(each, complete=True) for each in (plan, addition.whole.plan))
    assert found["layer"]["chunk_grid"]["configuration"]["chunk_shape"] == [2]
    assert found["layer"]["shape"] == [3]
    assert {name for name in found if found[name] != expected.get(name)} == {"layer"}
    assert [(site.name, site.layers) for site in added_sites(plan)] == [
        ("resid_post", (11,)), ("attn_out", (5,)), ("final_norm", None),
    ]  # fmt: skip
    assert base_of(plan).labels == {"layer": 2, "attn_out_layer": 1}


def test_columns_stay() -> None:
    plan = extend(BASE.plan, {}, sites=[Site("q", 4, (1,))])
    assert plan.layout.columns == BASE.layout.columns
    assert Column("score", "float32") in plan.layout.columns
