"""Which samples are of which document: runs of neighbours, read in the blocks that can hold a document."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int, Int64, Shaped

from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.ledger import lineage
from actstore.mapped import runs
from actstore.schema import Plan
from actstore.sealing import read_ranges
from actstore.vouchers import Vouchers

SAMPLES_AT_ONCE = 1 << 22  # 16 MiB of the column
COLUMN = "document"


class DocumentRuns:
    """Runs of samples of one document each, of a finished store.

    A block is read when it can hold a document that is asked for, by the ranges that were stored at sealing, and its
    runs are kept: 24 bytes each, so that memory grows with the number of documents. A store from before there were
    ranges is read whole, once: 4 bytes per sample.
    """

    def __init__(self, root: Root, plan: Plan) -> None:
        """Reads the ranges: two small files for each generation."""
        self._root, self._plan = root, plan
        self._runs: dict[int, Shaped[np.ndarray, "3 run"]] = {}
        self._lowest, self._highest = _bounds(root, plan)
        self._known = np.zeros(plan.layout.blocks, bool)

    def samples(self, documents: Sequence[int] | Int[np.ndarray, " n"]) -> Int64[np.ndarray, " sample"]:
        """The samples of some documents, ascending, each once; none of a document without samples.

        Raises:
            CorruptStoreError: the column or a range is damaged.
        """
        wanted = np.unique(np.asarray(documents, np.int64))
        first, stop = np.searchsorted(wanted, self._lowest), np.searchsorted(wanted, self._highest, side="right")
        blocks = np.flatnonzero(first < stop)
        del first, stop  # a store may have 10^7 blocks
        self._read(blocks[~self._known[blocks]])
        found = [np.arange(0)]
        for block in map(int, blocks):
            starts, stops, here = self._runs[block]
            kept = np.isin(here, wanted)
            found.append(_ranges(starts[kept], stops[kept]))
        return np.concatenate(found)

    def _read(self, blocks: Int64[np.ndarray, " block"]) -> None:
        """The runs of some blocks, which ascend. A run ends where its block does."""
        layout = self._plan.layout
        for first, stop in _spans(blocks, most=max(SAMPLES_AT_ONCE // layout.block_samples, 1)):
            start, end = layout.block_range(first)[0], layout.block_range(stop - 1)[1]
            values = np.empty((1, end - start), self._source.array.dtype.numpy_dtype)
            gather(self._source, [0], range(start, end), values)
            for block in range(first, stop):
                begin, finish = layout.block_range(block)
                part = values[0, begin - start : finish - start].astype(np.int64)
                edges = np.append(0, np.flatnonzero(part[1:] != part[:-1]) + 1)
                self._runs[block] = np.stack([begin + edges, begin + np.append(edges[1:], len(part)), part[edges]])
                self._lowest[block], self._highest[block], self._known[block] = part.min(), part.max(), True

    @functools.cached_property
    def _source(self) -> Source:
        return Source.open(self._root, self._plan, COLUMN, vouchers=Vouchers(self._root, self._plan))


def _bounds(root: Root, plan: Plan) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " block"]]:
    """The lowest and the highest document of each block; all numbers where that is not known."""
    nothing, all_numbers = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    lowest, highest = np.full(plan.layout.blocks, nothing), np.full(plan.layout.blocks, all_numbers)
    for each in lineage(root, plan):
        if not each.adds_samples:
            continue
        here, ranges = slice(each.blocks.start, each.blocks.stop), read_ranges(root, each)
        if ranges is None:
            lowest[here], highest[here] = all_numbers, nothing
            continue
        bounds = ranges.bounds(COLUMN, blocks=len(each.blocks))
        lowest[here] = np.minimum(lowest[here], bounds[0])  # two generations may share a block
        highest[here] = np.maximum(highest[here], bounds[1])
    return lowest, highest


def _spans(blocks: Int64[np.ndarray, " block"], *, most: int) -> Iterator[tuple[int, int]]:
    """First and one past the last of neighbours among ascending numbers, at most so many at once."""
    for start, stop in runs(blocks - np.arange(len(blocks))):  # neighbours are equal then
        first, end = int(blocks[start]), int(blocks[stop - 1]) + 1
        for begin in range(first, end, most):
            yield begin, min(begin + most, end)


def _ranges(starts: Int64[np.ndarray, " n"], stops: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """All numbers of some ranges, one range after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
