"""Decides which samples of a store a filter keeps: block by block, when a block is needed."""

import functools
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Bool, Float32, Int, Int64, Shaped

from actstore.documents import StoredDocuments
from actstore.errors import InputError, UnknownNameError
from actstore.filters import Condition, Filter
from actstore.gather import Source, gather, tiles
from actstore.kvstore import Root
from actstore.layout import Site, norm_name
from actstore.norms import NormStatistics, stored_norms, summarize
from actstore.schema import Plan
from actstore.vouchers import Vouchers

MASK_BYTES = 128 << 20  # one bit per sample: 10^9 samples are decided once, of larger stores those asked for last


class Kept:
    """Decides which samples of one store a filter keeps, and remembers a bit for each. Threads may share it."""

    def __init__(
        self, root: Root, plan: Plan, where: Filter, places: Iterable[tuple[Site, int]], *, check: bool
    ) -> None:
        """Reads nothing. `places`: site and layer index of all rows that `max_norm` is asked of.

        Raises:
            UnknownNameError: no such column, or documents are asked of a store without them.
            InputError: something is wanted of a column that it cannot be.
        """
        if not isinstance(where, Filter):
            raise InputError(f"where is {reprlib.repr(where)}; expected an actstore.Filter")
        self._root, self._plan, self._where, self._check = root, plan, where, check
        self._places = [(site.name, layer) for site, layer in places] if where.max_norm is not None else []
        table = next((table for table in plan.tables if table is not None), None)
        of_samples = {column.name for column in plan.layout.columns}
        of_documents = {} if table is None else dict.fromkeys(table.strings, False) | dict.fromkeys(table.numbers, True)
        of_documents.pop("text", None)  # a document is named by its id
        self._of_samples, self._of_documents = list[Condition](), list[tuple[Condition, bool]]()
        said = [(where.keep, False), (where.drop, True)]
        for condition in (Condition(name, columns[name], drop) for columns, drop in said for name in columns):
            name = condition.name
            if name in of_samples and name in of_documents:
                raise InputError(
                    f"column {name!r} of {root.url} is one of samples and one of documents; it cannot be filtered by"
                )
            if name not in of_samples and name not in of_documents:
                there = ", ".join(sorted(of_samples | of_documents.keys())) or "none"
                raise UnknownNameError(f"column {name!r} is not in {root.url}; it holds {there}")
            condition.refuse_kind(number=of_documents.get(name, True))
            if name in of_samples:
                self._of_samples.append(condition)
            else:
                self._of_documents.append((condition, of_documents[name]))
        self._by_document = bool(self._of_documents) or tuple(where.split) != (0, 1)
        if self._by_document and (table is None or "document" not in of_samples):
            raise UnknownNameError(
                f"{root.url} holds no documents, or no column 'document'; a split, or columns of documents, need both"
            )
        self._masks_kept = max(MASK_BYTES * 8 // plan.layout.block_samples, 1)
        self._forget()

    def _forget(self) -> None:
        self._masks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._documents = StoredDocuments(self._root, self._plan) if self._by_document else None
        self._vouchers = Vouchers(self._root, self._plan) if self._check else None

    def __getstate__(self) -> dict[str, Any]:
        """A copy decides for itself."""
        made = ("_masks", "_lock", "_documents", "_vouchers", "_sources", "_limits")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def mask(self, samples: Int64[np.ndarray, " n"] | range) -> Bool[np.ndarray, " n"]:
        """Whether each of some samples, ascending, is kept.

        A block is decided when it is first asked for, which reads its columns and norms: 4 bytes per sample for each.
        `max_norm` reads all norms of its layers once.

        Raises:
            CorruptStoreError: what it needs is missing, damaged, swapped or stale.
        """
        kept = np.empty(len(samples), bool)
        for block, first, last in tiles(samples, self._plan.layout.block_samples):
            start, stop = self._plan.layout.block_range(block)
            chosen = np.asarray(samples[first:last]) - start
            with self._lock:
                kept[first:last] = self._mask_of(block, stop - start)[chosen]
        return kept

    def mask_unordered(self, samples: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """The same for samples in any order, and repeated."""
        order = np.argsort(samples)
        kept = np.empty(len(samples), bool)
        kept[order] = self.mask(samples[order])
        return kept

    def _mask_of(self, block: int, samples: int) -> Bool[np.ndarray, " sample"]:
        if block not in self._masks:
            while len(self._masks) >= self._masks_kept:
                self._masks.popitem(last=False)
            self._masks[block] = np.packbits(self._decide(block)).tobytes()
        self._masks.move_to_end(block)
        return np.unpackbits(np.frombuffer(self._masks[block], np.uint8), count=samples).view(bool)

    def _decide(self, block: int) -> Bool[np.ndarray, " sample"]:
        span = range(*self._plan.layout.block_range(block))
        kept = np.ones(len(span), bool)
        for condition in self._of_samples:
            kept &= condition.holds(self._values(condition.name, 0, span))
        if self._documents is not None:
            documents, places = np.unique(self._values("document", 0, span), return_inverse=True)
            kept &= self._documents_kept(self._documents, documents)[places]
        for site, layer, limit in self._limits:
            kept &= self._values(norm_name(site), layer, span) <= np.float64(limit)
        return kept

    def _values(self, name: str, layer: int, span: range) -> Shaped[np.ndarray, " sample"]:
        source = self._sources[name]
        out = np.empty((1, len(span)), source.array.dtype.numpy_dtype)
        gather(source, [layer], span, out)
        return out[0]

    def _documents_kept(self, stored: StoredDocuments, documents: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Whether the rows of each document may be kept, as far as documents decide it."""
        kept = np.ones(len(documents), bool)
        if len(documents) and not (documents[0] >= 0 and documents[-1] < len(stored)):
            raise InputError(
                f"samples of {self._root.url} name the documents {documents[0]} to {documents[-1]}, it holds 0 to "
                f"{len(stored) - 1}; a split, or columns of documents, need a document for every sample"
            )
        start, stop = self._where.split
        if (start, stop) != (0, 1):
            places = np.array([place_in_split(name) for name in stored.strings("id", documents)])
            kept &= (places >= start) & (places < stop)
        for condition, number in self._of_documents:
            read = stored.numbers if number else stored.strings
            kept &= condition.holds(read(condition.name, documents))
        return kept

    @functools.cached_property
    def _sources(self) -> dict[str, Source]:
        names = {condition.name for condition in self._of_samples} | {norm_name(site) for site, _ in self._places}
        names |= {"document"} if self._by_document else set()
        return {name: Source.open(self._root, self._plan, name, vouchers=self._vouchers) for name in names}

    @functools.cached_property
    def _limits(self) -> list[tuple[str, int, float]]:
        """The largest norm of each site and layer."""
        limits = []
        for site, layer in self._places:
            median = _statistics(self._sources[norm_name(site)], layer, None).median
            limits.append((site, layer, median * (self._where.max_norm or 0)))
        return limits


def norm_statistics(
    root: Root, plan: Plan, site: Site, layer: int, *, kept: Kept | None = None, check: bool = True
) -> NormStatistics:
    """Statistics of the norms of one site and layer index, of all rows or those that are kept.

    Reads 4 bytes per sample, twice.

    Raises:
        InputError: the filter keeps nothing.
        CorruptStoreError: norms are missing, damaged, swapped or stale.
    """
    vouchers = Vouchers(root, plan) if check else None
    found = _statistics(Source.open(root, plan, norm_name(site.name), vouchers=vouchers), layer, kept)
    if not found.samples:
        raise InputError(
            f"the filter keeps none of the {plan.layout.samples:,} samples of {root.url}; use one that keeps some"
        )
    return found


def _statistics(source: Source, layer: int, kept: Kept | None) -> NormStatistics:
    def stretches() -> Iterator[Float32[np.ndarray, " n"]]:
        for start, norms in stored_norms(source, layer):
            yield norms if kept is None else norms[kept.mask(range(start, start + len(norms)))]

    return summarize(stretches)


def place_in_split(document: str) -> float:
    """Where a document falls in 0 to 1, by the XXH3 of its id alone."""
    return (xxhash.xxh3_64_intdigest(document.encode()) >> 11) / (1 << 53)  # as many bits as a float has
