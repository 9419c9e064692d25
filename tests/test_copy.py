"""`actstore copy`: the same bytes at another place, whatever the codec and history; stopped, damaged and refused."""

import json
import shutil
from pathlib import Path

import pytest
from appending import ADDITIONS
from stores import LAYOUT, make_contents, tree
from typer.testing import CliRunner

import actstore
from actstore import Layout
from actstore.cli import app
from actstore.errors import (
    CorruptStoreError,
    InputError,
    PlanMismatchError,
    StorageError,
    StoreNotFoundError,
    UnfinishedStoreError,
)
from actstore.kvstore import Root
from actstore.ledger import create_plan, read_plan
from actstore.repair import repair
from actstore.verify import verify

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.acts.zarr"))
ZSTD = Layout(LAYOUT.sites, samples=53, block_samples=16, chunk_samples=4, columns=LAYOUT.columns, codec="zstd")
PLAIN = Layout(LAYOUT.sites, samples=53, block_samples=16, chunk_samples=4, columns=LAYOUT.columns, codec="none")


OF_A_BLOCK = 2 * sum(site.rows_per_sample for site in LAYOUT.sites) + len(LAYOUT.columns) + 1


def objects(url) -> dict[str, bytes | None]:
    root = Root.of(url)
    return {key: root.read(key) for key in root.keys("")}


@pytest.mark.parametrize(
    "source", [path for path in GOLDEN if path.name != "unfinished.acts.zarr"], ids=lambda path: path.name
)
def test_stores_of_every_kind_arrive_byte_by_byte(source, tmp_path):
    """Through memory, which is as remote as a bucket, and back to files."""
    between, back = f"memory://copy/{source.name}", tmp_path / source.name
    done = actstore.copy(source, between)
    assert objects(between) == tree(source)
    assert (done.objects_before, done.source, done.target) == (0, str(source), between)
    actstore.copy(between, back)
    assert tree(back) == tree(source)


@pytest.mark.parametrize("layout", [ZSTD, PLAIN], ids=["zstd", "none"])
def test_other_codecs(layout, tmp_path):
    source = make_contents(layout).write(tmp_path / "run.acts.zarr")
    actstore.copy(source, f"memory://copy-{layout.codec}/run.acts.zarr")
    assert objects(f"memory://copy-{layout.codec}/run.acts.zarr") == tree(source)
    damage(source / "resid_post/c/1/2/0")
    with pytest.raises(CorruptStoreError, match="resid_post, layer 5, block 2 of "):
        actstore.copy(source, f"memory://copy-{layout.codec}/damaged.acts.zarr")


def damage(path, place=9):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("writes", [0, 1, 5, 20, 60, 110])
def test_a_copy_that_fails_is_unfinished_and_is_continued(finished, tmp_path, monkeypatch, writes):
    target, real, left = tmp_path / "run.acts.zarr", Root.write, iter(range(writes))

    def write(root, key, value):
        if next(left, None) is None:
            raise StorageError(f"could not write {key}: gone; try again")
        real(root, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Root, "write", write)
        with pytest.raises(StorageError, match="gone; try again"):
            actstore.copy(finished, target)
    if writes:
        with pytest.raises(UnfinishedStoreError):
            actstore.open(target)
    committed = len([key for key in tree(target) if key.startswith(".act/commits/")])
    tables = [key for key in tree(target) if key.startswith("documents/") and "/c/" in key]
    known = len(tables) if (target / ".act/documents.json").exists() else 0
    done = actstore.copy(finished, target)
    assert tree(target) == tree(finished)
    assert done.objects_before == known + committed * OF_A_BLOCK
    again = actstore.copy(finished, target)
    assert (again.objects, again.bytes_copied) == (0, 0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", ADDITIONS.values(), ids=ADDITIONS.keys())
def test_what_was_appended_is_copied_too(make, tmp_path):
    """A short last block is written again when samples are appended: the copy has its first marker alone."""
    addition = make()
    source, target = addition.before.write(tmp_path / "run.acts.zarr"), tmp_path / "copy.acts.zarr"
    actstore.copy(source, target)
    before = tree(target)
    addition.write(source)
    actstore.copy(source, target)
    assert tree(target) == tree(source) != before
    older = tmp_path / "older.acts.zarr"
    for key, data in before.items():
        (older / key).parent.mkdir(parents=True, exist_ok=True)
        (older / key).write_bytes(data)
    with pytest.raises(PlanMismatchError, match=r"has 2 generations, expected at most the 1 of "):
        actstore.copy(older, target)
    assert tree(target) == tree(source)


def test_a_copy_that_was_damaged_and_repaired_is_healed(finished, tmp_path):
    target = tmp_path / "run.acts.zarr"
    actstore.copy(finished, target)
    damage(target / "resid_post/c/1/2/0")
    root = Root.of(target)
    repair(root, read_plan(root), verify(root, read_plan(root)))
    assert actstore.copy(finished, target).objects > 0
    assert tree(target) == tree(finished)


@pytest.mark.parametrize("key", ["resid_post/c/1/2/0", "documents/text_bytes/c/0", ".act/commits/00000001.json"])
def test_what_is_there_without_a_marker_does_not_count(finished, tmp_path, key):
    target = tmp_path / "run.acts.zarr"
    create_plan(Root.of(target), read_plan(Root.of(finished)))
    (target / key).parent.mkdir(parents=True, exist_ok=True)
    (target / key).write_bytes(b"")
    actstore.copy(finished, target)
    assert tree(target) == tree(finished)


def test_rows_of_another_attempt_are_written_over_and_another_finished_run_is_refused(finished, tmp_path):
    other = make_contents(seed=5)
    target = other.write(tmp_path / "run.acts.zarr", blocks=[0, 2], seal=False)
    actstore.copy(finished, target)
    assert tree(target) == tree(finished)
    whole = other.write(tmp_path / "whole.acts.zarr")
    before = tree(whole)
    with pytest.raises(PlanMismatchError, match=r"is finished, and its .act/SEALED.json is not that of .* another run"):
        actstore.copy(finished, whole)
    assert tree(whole) == before


@pytest.mark.parametrize("layout", [LAYOUT, PLAIN], ids=["crc32c", "none"])
def test_a_damaged_index_is_not_copied(layout, tmp_path):
    source = make_contents(layout).write(tmp_path / "run.acts.zarr")
    damage(source / "resid_post/c/1/2/0", place=-30)
    with pytest.raises(CorruptStoreError, match=r"block 2 of .* has an index that is not that of its chunks"):
        actstore.copy(source, tmp_path / "copy.acts.zarr")


DAMAGED = {
    "row": ("resid_post/c/1/2/0", "resid_post, layer 5, block 2 of "),
    "layerless": ("final_norm/c/1/0", "final_norm, block 1 of "),
    "norm": ("mlp_out_norm/c/0/3", "mlp_out_norm, layer 2, block 3 of "),
    "column": ("document/c/0", "document, block 0 of "),
    "valid": ("valid/c/1", "valid, block 1 of "),
    "label": ("layer/c/0", "layer of .* differs from its own checksum"),
    "text": ("documents/text_bytes/c/0", "documents/text_bytes/c/0 of .* is damaged: its values cannot be decoded"),
}  # fmt: skip


@pytest.mark.parametrize(("key", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_not_copied(finished, tmp_path, key, message):
    source = shutil.copytree(finished, tmp_path / "damaged.acts.zarr")
    damage(source / key, place=1)
    with pytest.raises(CorruptStoreError, match=message):
        actstore.copy(source, tmp_path / "run.acts.zarr")
    with pytest.raises((UnfinishedStoreError, StoreNotFoundError)):
        actstore.open(tmp_path / "run.acts.zarr")
    (source / key).unlink()
    with pytest.raises(CorruptStoreError, match="is missing; run `actstore verify` there"):
        actstore.copy(source, tmp_path / "run.acts.zarr")


def test_swapped_objects_are_found(finished, tmp_path):
    source = shutil.copytree(finished, tmp_path / "swapped.acts.zarr")
    shutil.copy(source / "resid_post/c/0/1/0", source / "resid_post/c/0/2/0")
    with pytest.raises(CorruptStoreError, match=r"resid_post, layer 2, block 2 of .* swapped, stale or edited"):
        actstore.copy(source, tmp_path / "run.acts.zarr")
    texts = source / "documents/kind_bytes/c/0"
    shutil.rmtree(source)
    shutil.copytree(finished, source)
    shutil.copy(source / "documents/id_bytes/c/0", texts)
    with pytest.raises(CorruptStoreError, match="documents/kind_bytes"):
        actstore.copy(source, tmp_path / "other.acts.zarr")


def test_a_bit_that_flips_on_the_way_is_read_again(finished, tmp_path, monkeypatch):
    from actstore.copying import _Copy

    real, flipped = _Copy._object, set()

    def flip(self, key):
        data = bytearray(real(self, key))
        if key.startswith("resid_post/") and key not in flipped:
            flipped.add(key)
            data[3] ^= 4
        return bytes(data)

    monkeypatch.setattr(_Copy, "_object", flip)
    actstore.copy(finished, tmp_path / "run.acts.zarr")
    assert len(flipped) == 12
    assert tree(tmp_path / "run.acts.zarr") == tree(finished)


def test_what_is_refused(finished, unfinished, tmp_path):
    with pytest.raises(UnfinishedStoreError):
        actstore.copy(unfinished, tmp_path / "run.acts.zarr")
    with pytest.raises(StoreNotFoundError):
        actstore.copy(tmp_path / "no.acts.zarr", tmp_path / "run.acts.zarr")
    with pytest.raises(InputError, match="is source and target of a copy; name another target"):
        actstore.copy(finished, finished)
    with pytest.raises(InputError, match="expected one that ends in"):
        actstore.copy(finished, tmp_path / "run")
    other = make_contents(documents=False).write(tmp_path / "other.acts.zarr")
    before = tree(other)
    with pytest.raises(PlanMismatchError):
        actstore.copy(finished, other)
    assert tree(other) == before


def test_the_command(finished, tmp_path):
    def run(*arguments):
        answer = CliRunner().invoke(app, ["copy", *map(str, arguments)])
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    target = tmp_path / "run.acts.zarr"
    assert "100 objects copied, 0 were there; " in run(finished, target)
    report = json.loads(run(finished, target, "--json"))
    assert (report["objects"], report["objects_before"], report["target"]) == (0, 100, str(target))
    root = Root.of(target)
    assert verify(root, read_plan(root)).findings == ()
