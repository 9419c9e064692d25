"""Rows straight out of local, uncompressed shards: such a shard is its rows, one after the other, and then an index.

A shard is mapped when it is first touched, if its length and its index are those that actstore writes; others are read
as in every store, and what is wrong with them is said there. One chunk of it is compared with its commit marker: a
swapped or stale shard is an error. Chunks that are copied whole are compared each time. Single rows are not, because
that would read a chunk for each: a flipped bit is then found by `verify` alone. Nobody may cut a mapped file short: the
system would end the process.
"""

import itertools
import mmap
import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt

from actstore.errors import CorruptStoreError
from actstore.gather import Source, compare, gather
from actstore.kvstore import Root
from actstore.layout import Site
from actstore.metadata import shard_key
from actstore.shards import CHECKSUM_BYTES

SHARDS_KEPT = 4096  # mapped at once; the system allows some 65,000 mappings
Chunks = UInt[np.ndarray, "chunk row width"]


class MappedRows:
    """The rows of one site and layer of a local store without compression. Use it from one thread."""

    def __init__(self, root: Root, source: Source, site: Site, layer: int) -> None:
        """Nothing is read. `source` is the site's array, `layer` an index along its layer axis."""
        self._root, self._source, self._site, self._layer = root, source, site, layer
        layout = source.layout
        self._chunk_bytes = layout.chunk_samples * site.row_bytes
        self._stride = self._chunk_bytes + (CHECKSUM_BYTES if layout.codec == "crc32c" else 0)
        count = layout.block_samples // layout.chunk_samples
        entries = [value for chunk in range(count) for value in (chunk * self._stride, self._stride)]
        index = struct.pack(f"<{len(entries)}Q", *entries)
        self._tail = index + google_crc32c.value(index).to_bytes(CHECKSUM_BYTES, "little")
        self._shape = (count, layout.chunk_samples, site.width)
        self._shards: OrderedDict[int, Chunks] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process too, maps its own files."""
        return self.__dict__ | {"_shards": OrderedDict()}

    def take(self, samples: Int64[np.ndarray, " row"], out: UInt[np.ndarray, "row width"]) -> None:
        """Copies single rows, ascending, into `out`, the stored dtype as unsigned integers.

        Raises:
            CorruptStoreError: a shard is missing, cut, swapped or stale; names site, layer and block.
        """
        size = self._source.layout.chunk_samples
        for first, last, block, chunk in self._runs(samples // size):
            shard, target = self._shard(block), out[first:last]
            if shard is None:
                self._gather(samples[first:last], target)
            else:
                np.take(shard[chunk], samples[first:last] % size, axis=0, out=target, mode="clip")

    def copy(self, chunks: Int64[np.ndarray, " chunk"], out: UInt[np.ndarray, "row width"]) -> None:
        """Copies whole chunks, ascending, one after the other into `out`, and compares each with its marker.

        Raises:
            CorruptStoreError: a chunk is not the one that was committed; names site, layer and block.
        """
        layout, place = self._source.layout, 0
        for first, _, block, chunk in self._runs(chunks):
            start = int(chunks[first]) * layout.chunk_samples
            count = min(layout.chunk_samples, layout.samples - start)
            target, place = out[place : place + count], place + count
            shard = self._shard(block)
            if shard is not None:
                target[...] = shard[chunk, :count]
                try:
                    self._compare(start, target)
                    continue
                except CorruptStoreError:  # or repaired since: then there is a new file in the place of the mapped one
                    self._shards.pop(block)
            self._gather(np.arange(start, start + count), target)

    def _runs(self, chunks: Int64[np.ndarray, " row"]) -> Iterator[tuple[int, int, int, int]]:
        """Places [first, last) of each run of equal chunks, its block, and its number in the block."""
        edges = [*np.flatnonzero(np.diff(chunks, prepend=-1)).tolist(), len(chunks)]
        for first, last in itertools.pairwise(edges):
            yield first, last, *divmod(int(chunks[first]), self._shape[0])

    def _gather(self, samples: Int64[np.ndarray, " row"], out: UInt[np.ndarray, "row width"]) -> None:
        """The way of every other store: it reads what is unusual, and its errors say what is wrong."""
        gather(self._source, [self._layer], samples, out.view(self._site.dtype)[None])

    def _shard(self, block: int) -> Chunks | None:
        """The chunks of a shard, mapped; None where it is not there, or not as actstore writes it."""
        found = self._shards.get(block)
        if found is not None:
            self._shards.move_to_end(block)
            return found
        found, layout = self._map(block), self._source.layout
        if found is not None:
            start = block * layout.block_samples
            self._compare(start, found[0, : min(layout.chunk_samples, layout.samples - start)].copy())
            while len(self._shards) >= SHARDS_KEPT:
                self._shards.popitem(last=False)
            self._shards[block] = found
        return found

    def _map(self, block: int) -> Chunks | None:
        path = self._root.path / shard_key(self._site, self._layer, block)
        expected = self._stride * self._shape[0] + len(self._tail)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            if os.fstat(file).st_size != expected:
                return None
            view = mmap.mmap(file, expected, prot=mmap.PROT_READ)
        except OSError:
            return None
        finally:
            os.close(file)
        if view[-len(self._tail) :] != self._tail:
            return None
        item_bytes = self._site.row_bytes // self._site.width
        strides = (self._stride, self._site.row_bytes, item_bytes)
        return np.ndarray(self._shape, f"u{item_bytes}", buffer=view, strides=strides)

    def _compare(self, start: int, rows: UInt[np.ndarray, "row width"]) -> None:
        if self._source.vouchers is not None:
            compare(self._source, self._source.vouchers, self._layer, start, rows)


def can_map(root: Root, source: Source) -> bool:
    """Whether the shards of a store are local files without compression, in this machine's byte order."""
    return source.layout.codec != "zstd" and sys.byteorder == "little" and root.path.is_dir()
