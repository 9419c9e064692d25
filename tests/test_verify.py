"""Verify and repair: every damage is found and named, a sound store raises no alarm, and a repair loses nothing."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parts import part_and_all_of
from stores import Contents, tree

from actstore import cli
from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.repair import repair
from actstore.untrusted import canonical_json
from actstore.verify import Depth, Report, verify

Damage = Callable[[Path], None]


def report_of(url: Path, depth: Depth = "full", **settings: float) -> Report:
    root = Root.of(url)
    return verify(root, read_plan(root), depth=depth, **settings)


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A sealed store that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run.acts.zarr"))


def flip(name: str, *, at: int) -> Damage:
    """One bit of a file."""

    def damage(url: Path) -> None:
        data = bytearray((url / name).read_bytes())
        data[at] ^= 1
        (url / name).write_bytes(data)

    return damage


def cut(name: str, *, keep: int) -> Damage:
    """The end of a file is lost."""
    return lambda url: (url / name).write_bytes((url / name).read_bytes()[:keep])


def lose(name: str) -> Damage:
    return lambda url: (url / name).unlink()


def swap(one: str, other: str) -> Damage:
    """Two sound files in each other's place."""

    def damage(url: Path) -> None:
        first, second = (url / one).read_bytes(), (url / other).read_bytes()
        assert first != second
        (url / one).write_bytes(second)
        (url / other).write_bytes(first)

    return damage


def edit_marker(field: str, value: object) -> Damage:
    """A marker that says something else."""

    def damage(url: Path) -> None:
        path = url / ".act/commits/00000002.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    return damage


def extra(name: str) -> Damage:
    """A file that does not belong there."""
    return lambda url: (url / name).write_text("{}")


def edit_group(content: object) -> Damage:
    return lambda url: (url / "zarr.json").write_text(json.dumps(content))


NEEDS_FULL = {
    "a swapped shard", "a swapped column", "a bit of the first chunk", "a swapped document array",
}  # fmt: skip
DAMAGES: dict[str, tuple[Damage, str, str, list[int]]] = {
    "a bit of the first chunk": (flip("resid_post/c/1/2/0", at=3), "resid_post, layer 5, block 2", "Digest", [2]),
    "a bit of the index": (flip("resid_post/c/0/1/0", at=-8), "resid_post, layer 2, block 1", "Digest mismatch", [1]),
    "a cut shard": (cut("attn_out/c/0/0/0", keep=50), "attn_out, layer 5, block 0", "has size of 50 bytes", [0]),
    "an empty shard": (cut("final_norm/c/3/0", keep=0), "final_norm, block 3", "not valid for value of size 0", [3]),
    "a missing shard": (lose("mlp_out/c/2/1/0"), "mlp_out, layer 11, block 1", "missing object at", [1]),
    "a missing norm": (lose("final_norm_norm/c/1"), "final_norm_norm, block 1", "missing object at", [1]),
    "a missing column": (lose("token_id/c/0"), "token_id, block 0", "missing object at", [0]),
    "a missing valid chunk": (lose("valid/c/3"), "valid, block 3", "missing object at", [3]),
    "missing layer labels": (lose("layer/c/0"), "layer", "missing object at", []),
    "a bit of the layer labels": (flip("layer/c/0", at=1), "layer", "Digest mismatch", []),
    "a swapped column": (swap("score/c/1", "score/c/2"), "score, block 1", "differ from the commit marker", [1, 2]),
    "a swapped shard": (
        swap("resid_post/c/0/0/0", "resid_post/c/2/0/0"), "resid_post, layer 2, block 0", "swapped", [0],
    ),
    "a missing marker": (lose(".act/commits/00000002.json"), "marker of block 2", "is missing", [2]),
    "a broken marker": (cut(".act/commits/00000002.json", keep=40), "marker of block 2", "not valid JSON", [2]),
    "a marker of another block": (edit_marker("block", 1), "marker of block 2", "is of block 1", [2]),
    "a marker of other samples": (edit_marker("samples", [32, 47]), "marker of block 2", "the plan has", [2]),
    "a marker of another plan": (edit_marker("fingerprint", "0" * 64), "marker of block 2", "of plan 000", [2]),
    "edited metadata": (flip("resid_post/zarr.json", at=30), "resid_post/zarr.json", "differs from what the plan", []),
    "missing metadata": (lose("valid/zarr.json"), "valid/zarr.json", "is missing", []),
    "a marker too many": (extra(".act/commits/00000099.json"), ".act/commits/00000099.json", "no such block", []),
    "a broken group": (cut("zarr.json", keep=20), "zarr.json", "differs from what the plan", []),
    "an empty group": (edit_group({}), "zarr.json", "differs from what the plan", []),
    "a missing seal": (lose(".act/SEALED.json"), ".act/SEALED.json", "was not sealed to the end", []),
    "a broken seal": (cut(".act/SEALED.json", keep=9), ".act/SEALED.json", "not valid JSON", []),
    "wrong ranges in a marker": (
        edit_marker("ranges", {"document": [0, 1], "position": [0, 1], "token_id": [0, 1], "flag": [0, 1]}),
        "marker of block 2", "differs from the manifest", [2],
    ),
    "a marker without a range": (edit_marker("ranges", {"document": [0, 1]}), "marker of block 2", "the columns", [2]),
    "edited ranges": (flip(".act/ranges.json", at=60), ".act/ranges.json", "differs from its digest in the seal", []),
    "missing ranges": (lose(".act/ranges.json"), ".act/ranges.json", "or is missing", []),
    "an edited manifest": (flip(".act/manifest.json", at=90), ".act/manifest.json", "differs from its digest", []),
    "a bit of the texts": (flip("documents/text_bytes/c/0", at=9), "documents/text_bytes", "could not read it", []),
    "a bit of the checksum of the texts": (  # before the 20 bytes of the index
        flip("documents/text_bytes/c/0", at=-21), "documents/text_bytes", "Digest mismatch", [],
    ),
    "a swapped document array": (
        swap("documents/token_start/c/0", "documents/token_end/c/0"), "documents/token_start", "differ from", [],
    ),
    "a missing documents marker": (lose(".act/documents.json"), ".act/documents.json", "is missing", []),
}  # fmt: skip


@pytest.mark.parametrize("depth", ["fast", "sample", "full"])
def test_a_sound_store_raises_no_alarm(finished: Path, unfinished: Path, depth: Depth) -> None:
    for url in (finished, unfinished):
        assert report_of(url, depth).findings == ()


def test_full_compares_every_byte_of_every_array(contents: Contents, finished: Path) -> None:
    norms = sum(site.rows_per_sample * 4 for site in contents.layout.sites)
    columns = sum(values.itemsize for values in contents.columns.values())
    expected = contents.layout.samples * (contents.layout.sample_bytes + norms + columns + 1)  # 1 is `valid`
    assert report_of(finished).bytes_compared == expected
    assert report_of(finished, "fast").bytes_compared == 0
    assert 0 < report_of(finished, "sample", share=0.3).bytes_compared < expected


@pytest.mark.parametrize(("damage", "what", "problem", "blocks"), DAMAGES.values(), ids=DAMAGES)
def test_every_damage_is_found_and_named(
    store: Path, damage: Damage, what: str, problem: str, blocks: list[int]
) -> None:
    damage(store)
    report = report_of(store)
    found = [finding for finding in report.findings if finding.what == what]
    assert found, report.findings
    assert problem in found[0].problem
    assert "\n" not in found[0].problem
    assert report.damaged_blocks == blocks


def test_ranges_are_compared_with_the_values(unfinished: Path, tmp_path: Path) -> None:
    """Without a manifest nothing else tells."""
    url = Path(shutil.copytree(unfinished, tmp_path / "run.acts.zarr"))
    path = min((url / ".act/commits").iterdir())
    marker = json.loads(path.read_bytes())
    marker["ranges"]["document"][1] += 1
    path.write_bytes(canonical_json(marker))
    (found,) = report_of(url).findings
    assert (found.what, found.problem) == (f"document, block {marker['block']}", "the commit marker has wrong ranges")


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in NEEDS_FULL])
def test_fast_finds_what_is_missing_or_cut(store: Path, name: str) -> None:
    damage, what, _, _ = DAMAGES[name]
    damage(store)
    assert what in [finding.what for finding in report_of(store, "fast").findings]


@pytest.mark.parametrize("name", sorted(NEEDS_FULL))
def test_fast_does_not_see_sound_files_in_the_wrong_place(store: Path, name: str) -> None:
    DAMAGES[name][0](store)
    assert report_of(store, "fast").findings == (), "then the documentation of --fast understates what it finds"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", DAMAGES)
def test_repair_and_writing_the_missing_blocks_restore_every_byte(
    store: Path, finished: Path, contents: Contents, name: str
) -> None:
    DAMAGES[name][0](store)
    root = Root.of(store)
    report = report_of(store)
    taken = repair(root, read_plan(root), report)
    assert list(taken.blocks) == DAMAGES[name][3]
    with contents.create(store, seal=True) as writer:
        assert writer.missing() == DAMAGES[name][3]
        for block in writer.missing():
            activations, columns = contents.block(block)
            writer.write(block, activations, samples=columns)
    assert report_of(store).findings == ()
    assert tree(store) == tree(finished)


def test_repairing_twice_is_harmless(store: Path, contents: Contents) -> None:
    DAMAGES["a swapped column"][0](store)
    root, report = Root.of(store), report_of(store)
    assert repair(root, read_plan(root), report) == repair(root, read_plan(root), report)
    assert report_of(store).status == "writing"
    with pytest.raises(InputError, match=r"is sound at depth 'full'; there is nothing to repair"):
        repair(root, read_plan(root), report_of(store))


@part_and_all_of("count", 30, 200)
def test_random_flips_anywhere_in_a_shard_are_found(finished: Path, tmp_path: Path, count: int) -> None:
    """Single bits of one shard: chunks, their checksums, the index and its checksum."""
    store = Path(shutil.copytree(finished, tmp_path / "run.acts.zarr"))
    shard = store / "resid_post/c/1/1/0"
    data = shard.read_bytes()
    for bit in np.random.default_rng(0).choice(len(data) * 8, count, replace=False).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        assert report_of(store).damaged_blocks == [1], bit


def call(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_commands(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("verify", store, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    assert call("repair", store, monkeypatch=monkeypatch) == 2
    assert "there is nothing to repair" in capsys.readouterr().err
    DAMAGES["a missing shard"][0](store)
    assert call("verify", store, "--fast", monkeypatch=monkeypatch) == 4
    assert "1 findings" in (out := capsys.readouterr().out)
    assert "mlp_out, layer 11, block 1: " in out
    assert call("verify", store, "--fast", "--sample", monkeypatch=monkeypatch) == 2
    assert "choose one" in capsys.readouterr().err
    assert call("repair", store, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == [1]
    assert call("info", store, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unfinished"
