"""Runs of samples of one document, beside a plain search in the column."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from benchmarks.scale import sealed
from hypothesis import given
from hypothesis import strategies as st
from stores import Contents

import actstore
from actstore import Column, Layout, Site, runs
from actstore.commits import Marker, Ranges, Seal
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.markers import RANGES_KEY, SEAL_KEY, checksum, marker_key
from actstore.metadata import array_metadata
from actstore.runs import DocumentRuns

DOCUMENTS = {
    "one": [0] * 9,
    "each its own": list(range(9)),
    "ascending": [0, 0, 0, 1, 2, 2, 5, 5, 5],
    "in several runs": [3, 3, 0, 3, 0, 0, 3, 1, 1],
    "descending": [4, 4, 2, 2, 2, 1, 0, 0, 0],
}


def written(folder: Path, documents: list[int]) -> actstore.Store:
    layout = Layout((Site("x", 2, None, "float32"),), len(documents), 2, 1, (Column("document", "int32"),))
    rows = {"x": np.zeros((len(documents), 2), np.float32)}
    contents = Contents(layout, rows, {"document": np.array(documents, np.int32)})
    return actstore.open(contents.write(folder / "run.acts.zarr"))


@pytest.mark.parametrize("at_once", [1, 4, 1 << 22])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_samples_of_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[int], at_once: int
) -> None:
    """However much of the column is read at once, and whatever was asked for before."""
    monkeypatch.setattr(runs, "SAMPLES_AT_ONCE", at_once)
    store = written(tmp_path, documents)
    found = DocumentRuns(store._root, store.plan)
    for wanted in ([0], [3], [0, 3], [5, 0, 0], [], [7], list(range(9))):
        np.testing.assert_array_equal(found.samples(wanted), np.flatnonzero(np.isin(documents, wanted)))


@given(st.lists(st.integers(-3, 6), min_size=1, max_size=12), st.lists(st.lists(st.integers(-4, 7)), max_size=4))
def test_any_documents(tmp_path_factory: pytest.TempPathFactory, documents: list[int], asked: list[list[int]]) -> None:
    store = written(tmp_path_factory.mktemp("any"), documents)
    found = DocumentRuns(store._root, store.plan)
    for wanted in asked:
        np.testing.assert_array_equal(found.samples(wanted), np.flatnonzero(np.isin(documents, wanted)))


def without(folder: Path, name: str) -> None:
    (folder / "run.acts.zarr" / name).unlink()


def flipped(folder: Path, name: str) -> None:
    path = folder / "run.acts.zarr" / name
    path.write_bytes(path.read_bytes().replace(b"AAAA", b"BAAA", 1))


READ = {
    "as written": (lambda folder: None, [1]),
    "without ranges": (lambda folder: without(folder, RANGES_KEY), [0, 1, 2, 3, 4]),
    "without a seal": (lambda folder: without(folder, SEAL_KEY), [0, 1, 2, 3, 4]),
    "ranges that the seal does not know": (lambda folder: flipped(folder, RANGES_KEY), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("change", "read"), READ.values(), ids=READ)
def test_only_blocks_that_can_hold_a_document_are_read(
    tmp_path: Path, change: Callable[[Path], None], read: list[int]
) -> None:
    """And all of them, once, where nothing says which: what is found is the same."""
    documents = [0, 0, 1, 2, 3, 4, 4, 4, 4]
    store = written(tmp_path, documents)
    change(tmp_path)
    found = DocumentRuns(store._root, store.plan)
    assert found.samples([2]).tolist() == [3]
    assert list(found._runs) == read
    assert found.samples([4]).tolist() == [5, 6, 7, 8]
    assert list(found._runs) == (read if len(read) == 5 else [1, 2, 3, 4])


def test_a_block_of_two_generations_has_the_documents_of_both(tmp_path: Path) -> None:
    store = written(tmp_path, [0, 0, 1])
    more = {"x": np.zeros((4, 2), np.float32)}, {"document": np.array([2, 2, 0, 5])}
    with actstore.append(store.url, {"more": True}, samples=4) as writer:
        for block in writer.missing():
            start, stop = writer.block_range(block)
            part = slice(start - 3, stop - 3)
            writer.write(block, {"x": more[0]["x"][part]}, samples={"document": more[1]["document"][part]})
    store = actstore.open(store.url)
    documents = np.array([0, 0, 1, 2, 2, 0, 5])
    for wanted in range(6):
        found = DocumentRuns(store._root, store.plan)
        np.testing.assert_array_equal(found.samples([wanted]), np.flatnonzero(documents == wanted))
    assert list(found._runs) == [3]


HUGE_LAYOUT = Layout((Site("x", 8, (0,)),), 10**9, 1 << 16, 1 << 12, (Column("document", "int32"),))
OF_ONE = 500  # samples


def write_huge(url: Path, *, document: int) -> Path:
    """A finished store of 10^9 samples with true ranges, and the files of the blocks that hold one document."""
    root, plan = Root.of(sealed(url, HUGE_LAYOUT)), read_plan(Root.of(url))
    starts, stops = np.array([HUGE_LAYOUT.block_range(block) for block in plan.blocks]).T
    lowest, highest = starts // OF_ONE, (stops - 1) // OF_ONE
    fields = {"format": 1, "fingerprint": plan.fingerprint}
    markers = [
        Marker(**fields, block=block, samples=HUGE_LAYOUT.block_range(block), checksums={}, ranges={"document": bounds})
        for block, bounds in enumerate(zip(lowest.tolist(), highest.tolist(), strict=True))
    ]
    ranges = Ranges.of(plan, [marker.ranges for marker in markers])
    assert ranges is not None
    root.write(RANGES_KEY, ranges.to_json())
    digest = hashlib.sha256(ranges.to_json()).hexdigest()
    root.write(SEAL_KEY, Seal(**fields, manifest_sha256="0" * 64, ranges_sha256=digest).to_json())
    column = root.open_array("document", array_metadata(plan, complete=True)["document"])
    for block in np.flatnonzero((lowest <= document) & (document <= highest)).tolist():
        values = (np.arange(starts[block], stops[block]) // OF_ONE).astype(np.int32)
        column[starts[block] : stops[block]].write(values).result()
        digests = {"x": ("0" * 32,), "x_norm": ("0" * 32,), "document": (checksum(values),)}
        root.write(marker_key(block), markers[block].model_copy(update={"checksums": digests}).to_json())
    return url


HUGE = """
import re, sys, time
from pathlib import Path

import xarray as xr

started = time.perf_counter()
dataset = xr.open_dataset(sys.argv[1])
found = dataset.acts.sel(document=1_234_567)
seconds = time.perf_counter() - started
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(found.sizes["sample"], int(found.row[0]), peak)
print(f"{seconds:.3f} s", file=sys.stderr)
"""


def test_a_document_among_a_billion_samples(tmp_path: Path) -> None:
    """Two blocks of the column are read, as it lies in both; in a process of its own, with all libraries, 300 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("NOT CHECKED: this system does not say what memory a process had")
    url = write_huge(tmp_path / "huge.acts.zarr", document=1_234_567)
    outcome = subprocess.run([sys.executable, "-c", HUGE, str(url)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    count, first, peak = map(int, outcome.stdout.split())
    print(outcome.stderr, f"{peak:,} KB")
    assert (count, first) == (OF_ONE, OF_ONE * 1_234_567)
    assert peak < 300_000
