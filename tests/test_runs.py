"""Runs of samples of one document, beside a plain search in the column."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import Contents

import actstore
from actstore import Column, Layout, Site, runs
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
    """However much of the column is read at once: runs go on from one piece into the next."""
    monkeypatch.setattr(runs, "SAMPLES_AT_ONCE", at_once)
    store = written(tmp_path, documents)
    found = DocumentRuns.read(store._root, store.plan)
    assert len(found.starts) == 1 + np.count_nonzero(np.diff(documents))
    for wanted in ([0], [3], [0, 3], [5, 0, 0], [], [7], list(range(9))):
        np.testing.assert_array_equal(found.samples(wanted), np.flatnonzero(np.isin(documents, wanted)))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=12), st.lists(st.integers(-1, 8)))
def test_any_runs(lengths: list[tuple[int, int]], wanted: list[int]) -> None:
    column = np.repeat([document for document, _ in lengths], [length for _, length in lengths])
    starts = np.cumsum([0, *(length for _, length in lengths)])[:-1]
    found = DocumentRuns.of(starts, np.array([document for document, _ in lengths]), len(column))
    np.testing.assert_array_equal(found.samples(wanted), np.flatnonzero(np.isin(column, wanted)))
