"""Which samples are of which document: runs of neighbours, found once by reading a column."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.schema import Plan
from actstore.vouchers import Vouchers

SAMPLES_AT_ONCE = 1 << 22  # 16 MiB of the column


@dataclasses.dataclass(frozen=True)
class DocumentRuns:
    """Runs of samples of one document each, by document. Costs 16 bytes per run: memory in the number of documents."""

    starts: Int64[np.ndarray, " run"]
    stops: Int64[np.ndarray, " run"]
    documents: Int64[np.ndarray, " run"]
    """Ascending; runs of the same document in the order of their samples."""

    @classmethod
    def read(cls, root: Root, plan: Plan) -> "DocumentRuns":
        """The runs of a finished store. Costs reading its column `document`, 4 bytes per sample, once.

        Raises:
            CorruptStoreError: the column is damaged.
        """
        source = Source.open(root, plan, "document", vouchers=Vouchers(root, plan))
        step = max(SAMPLES_AT_ONCE // plan.layout.block_samples, 1) * plan.layout.block_samples
        values = np.empty((1, min(step, plan.layout.samples)), source.array.dtype.numpy_dtype)
        starts, found, before = list[Int64[np.ndarray, " edge"]](), list[Int64[np.ndarray, " edge"]](), None
        for first in range(0, plan.layout.samples, step):
            span = range(first, min(first + step, plan.layout.samples))
            part = values[:, : len(span)]
            gather(source, [0], span, part)
            edges = np.flatnonzero(part[0, 1:] != part[0, :-1]) + 1
            edges = edges if before is not None and part[0, 0] == before else np.append(0, edges)
            starts.append(first + edges)
            found.append(part[0, edges].astype(np.int64))
            before = part[0, -1]
        return cls.of(np.concatenate(starts), np.concatenate(found), plan.layout.samples)

    @classmethod
    def of(
        cls, starts: Int64[np.ndarray, " run"], documents: Int64[np.ndarray, " run"], samples: int
    ) -> "DocumentRuns":
        """Runs by their first samples, which ascend, and documents."""
        order = np.argsort(documents, kind="stable")
        return cls(starts[order], np.append(starts[1:], samples)[order], documents[order])

    def samples(self, documents: Sequence[int] | Int[np.ndarray, " n"]) -> Int64[np.ndarray, " sample"]:
        """The samples of some documents, ascending, each once; none of a document without samples."""
        wanted = np.unique(np.asarray(documents, np.int64))
        first, last = (np.searchsorted(self.documents, wanted, side=side) for side in ("left", "right"))
        runs = _ranges(first, last)
        return np.sort(_ranges(self.starts[runs], self.stops[runs]))


def _ranges(starts: Int64[np.ndarray, " n"], stops: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """All numbers of some ranges, one range after the other."""
    lengths = stops - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
