"""Chunks of remote stores by ranges of their objects: one request, where TensorStore asks for a shard's index before.

Where a chunk lies is known from the plan, if nothing is compressed: so only as many bytes are asked for as are wanted,
however large the object or whatever its index claims. What comes is right if it is what the commit marker vouches for.
If it is not, and where no marker vouches for it, it is read in the usual way, whose errors say what is wrong.

What was compared is kept in the cache folder of the root, if it has one.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped, UInt8

from actstore.errors import CorruptStoreError, InputError
from actstore.kvstore import Operation, Root
from actstore.layout import Layout
from actstore.metadata import shard_key
from actstore.shards import CHECKSUM_BYTES
from actstore.vouchers import Vouchers


def check_cache(root: Root, layout: Layout) -> None:
    """Refuses a cache that is too small for the chunks of a store, before it keeps nothing in silence.

    Raises:
        InputError: it may hold less than sixteen of the largest.
    """
    chunks = [site.row_bytes * layout.chunk_samples for site in layout.sites]
    chunks += [np.dtype(column.dtype).itemsize * layout.block_samples for column in layout.columns]
    if root.cache is not None and root.cache.most_bytes < (least := root.cache.least_bytes(max(chunks))):
        raise InputError(
            f"the cache {root.cache.folder} may hold {root.cache.most_bytes:,} bytes; expected at least {least:,} "
            f"for the chunks of {root.url}: give more with cache_bytes or ACTSTORE_CACHE_BYTES, or use no cache"
        )


class RangedRows:
    """The rows of one array of a remote store. Any thread may read."""

    def __init__(self, root: Root, layout: Layout, name: str, vouchers: Vouchers, *, item_bytes: int) -> None:
        """Reads nothing. `item_bytes` are those of a value."""
        self.root, self._layout, self._name, self._vouchers = root, layout, name, vouchers
        self._site = next((site for site in layout.sites if site.name == name), None)
        self._layered = (of := layout.site_of(name)) is not None and of.layers is not None
        self.row_bytes = item_bytes if self._site is None else self._site.row_bytes
        self.chunk_samples = layout.block_samples if self._site is None else layout.chunk_samples
        self.checksum_bytes = 0 if self._site is not None and layout.codec == "none" else CHECKSUM_BYTES

    @property
    def chunk_bytes(self) -> int:
        """Of the rows of a whole chunk."""
        return self.chunk_samples * self.row_bytes

    def begin(
        self, doing: str, layer: int, start: int, stop: int, values: Shaped[np.ndarray, "sample *stored"]
    ) -> "Reading | None":
        """Begins to read whole chunks of one block into `values`.

        None where TensorStore is to do it: no marker vouches for all of them; they are compressed, so that where they
        lie is not known; or they are a whole shard that no cache is to keep, which is one request for TensorStore too,
        and one copy less in memory.
        """
        whole = stop - start == self._layout.block_samples and self.root.cache is None
        if self._site is not None and (whole or self._layout.codec == "zstd"):
            return None
        digests = [self._digest(layer, first, min(first + self.chunk_samples, stop))
                   for first in range(start, stop, self.chunk_samples)]  # fmt: skip
        if not all(digests):
            return None
        return Reading(self, doing, layer, start, values, digests)

    def _digest(self, layer: int, start: int, stop: int) -> str:
        """What tells a chunk from every other; empty where no marker vouches for all of its rows."""
        pieces = self._vouchers.pieces(self._name, layer, start, stop)
        if sum(piece.stop - piece.start for piece in pieces) != stop - start:
            return ""
        return " ".join(piece.digest for piece in pieces)

    def name_in_cache(self, layer: int, start: int, digest: str) -> str:
        """What tells the content of a chunk from that of all others."""
        return f"{self._vouchers.origin} {self._name} {layer} {start} {digest}"

    def key(self, layer: int, block: int) -> str:
        """Key of the object that holds a block."""
        if self._site is not None:
            return shard_key(self._site, layer, block)
        return f"{self._name}/c/{layer}/{block}" if self._layered else f"{self._name}/c/{block}"

    def place(self, start: int, samples: int) -> tuple[int, int, int]:
        """Block, first and one past the last byte of the rows of some samples, which begin a chunk."""
        block, within = divmod(start, self._layout.block_samples)
        stride = self.chunk_samples * self.row_bytes + self.checksum_bytes
        whole, rest = divmod(samples, self.chunk_samples)
        first = within // self.chunk_samples * stride
        length = whole * stride - self.checksum_bytes if not rest else whole * stride + rest * self.row_bytes
        return block, first, first + length


class _Run(NamedTuple):
    """Neighbouring chunks that are not in the cache, and the bytes that hold them."""

    first: int
    stop: int
    fetching: Operation[Any]


class Reading:
    """Rows on their way; `result` waits for them. They are not compared: `keep` them once they are, or `drop` them."""

    def __init__(
        self,
        rows: RangedRows,
        doing: str,
        layer: int,
        start: int,
        values: Shaped[np.ndarray, "sample *stored"],
        digests: list[str],
    ) -> None:
        self._rows, self._doing, self._layer, self._start = rows, doing, layer, start
        self._bytes: UInt8[np.ndarray, " byte"] = values.view(np.uint8).reshape(-1)
        self._digests = digests
        cache, size = rows.root.cache, rows.chunk_bytes
        self._names = [
            rows.name_in_cache(layer, start + i * rows.chunk_samples, each) for i, each in enumerate(digests)
        ]
        parts = [self._bytes[i * size : (i + 1) * size] for i in range(len(digests))]
        self._here = [cache is not None and cache.read(name, part)
                      for name, part in zip(self._names, parts, strict=True)]  # fmt: skip
        self._runs = [self._fetch(doing, first, stop) for first, stop in _gaps(self._here)]

    def result(self) -> None:
        """Waits until all rows are in the array.

        Raises:
            CorruptStoreError: the object is missing or too short.
            StorageError: the storage failed.
        """
        rows = self._rows
        for run in self._runs:
            found = run.fetching.result()
            if found.state != "value":
                raise CorruptStoreError(f"{self._doing}: missing object")
            data: UInt8[np.ndarray, " byte"] = np.frombuffer(found.value, np.uint8)
            stride = rows.chunk_bytes + rows.checksum_bytes
            for number in range(run.first, run.stop):
                target = self._bytes[number * rows.chunk_bytes : (number + 1) * rows.chunk_bytes]
                begin = (number - run.first) * stride
                target[:] = data[begin : begin + len(target)]

    def keep(self) -> None:
        """Puts what was fetched into the cache, if there is one: it was compared, and is right."""
        cache, size = self._rows.root.cache, self._rows.chunk_bytes
        if cache is not None:
            for number, (name, here) in enumerate(zip(self._names, self._here, strict=True)):
                if not here:
                    cache.write(name, self._bytes[number * size : (number + 1) * size])

    def drop(self) -> None:
        """Takes what differed out of the cache."""
        cache = self._rows.root.cache
        if cache is not None:
            for name in self._names:
                cache.drop(name)

    def _fetch(self, doing: str, first: int, stop: int) -> _Run:
        rows, size = self._rows, self._rows.chunk_bytes
        samples = len(self._bytes[first * size : stop * size]) // rows.row_bytes
        block, begin, end = rows.place(self._start + first * rows.chunk_samples, samples)
        return _Run(first, stop, rows.root.begin_range(doing, rows.key(self._layer, block), slice(begin, end)))


def _gaps(here: list[bool]) -> list[tuple[int, int]]:
    """First and one past the last of each run of what is not here."""
    found, first = [], 0
    for is_here, group in itertools.groupby(here):
        count = len(list(group))
        found += [] if is_here else [(first, first + count)]
        first += count
    return found
