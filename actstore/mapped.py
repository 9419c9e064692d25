"""Rows straight out of local, uncompressed shards: such a shard is its rows, one after the other, and then an index.

A shard is mapped when it is first touched, if its length and its index are those that actstore writes; others are read
as in every store, and what is wrong with them is said there. Chunks that are copied whole are compared with their
commit markers, each time: a swapped or stale shard is an error. For single rows one chunk of their shard is compared.
They are not themselves, because that would read a chunk for each: a flipped bit is then found by `verify` alone. Nobody
may cut a mapped file short: the system would end the process.

What is to be read is announced to the system some megabytes ahead, and nothing else is: a disk is then kept busy by one
thread, and is not asked for what the system guesses. Why, with figures: docs/decisions/0011-announced-reads.md.
"""

import contextlib
import itertools
import math
import mmap
import os
import resource
import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, UInt

from actstore.errors import CorruptStoreError
from actstore.gather import Source, compare, gather
from actstore.kvstore import Root
from actstore.layout import Layout, Site
from actstore.metadata import shard_key
from actstore.shards import CHECKSUM_BYTES, packed_index

SHARDS_KEPT = 4096  # open at once; the system allows some 65,000 mappings
AHEAD_BYTES = 8 << 20  # announced before they are read: 16 chunks of 512 KiB; more is not faster
REQUEST_BYTES = 512 << 10  # in one announcement; the system cuts longer ones off, most disks at 1 MiB or more
GAP_BYTES = 32 << 10  # between rows, read rather than skipped: about what a disk reads in the time of a request
PIECE_ROWS = 4096  # announced together
PROBES = 16  # rows of a piece that are looked for in memory before it is announced
RUN_BYTES = 64 << 10  # of rows of one chunk, from which on a call for each chunk is faster than a call for many
ROWS_AT_ONCE = 128  # of many chunks: NumPy copies them twice, the second time out of the core's cache
Item = TypeVar("Item")


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
        self._tail = packed_index(entries)
        self._length = self._stride * count + len(self._tail)
        self._shape = (count, layout.chunk_samples, site.width)
        self._most, self._shards = _most_open(layout), OrderedDict[int, _Shard]()
        self._compared: dict[int, int] = {}  # a number of the file by block: 100 bytes for each shard of 128 MiB

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process too, opens its own files."""
        return self.__dict__ | {"_shards": OrderedDict(), "_compared": {}}

    def take(self, samples: Int64[np.ndarray, " row"], out: UInt[np.ndarray, "row width"]) -> None:
        """Copies single rows, ascending, into `out`, the stored dtype as unsigned integers.

        Raises:
            CorruptStoreError: a shard is missing, cut, swapped or stale; names site, layer and block.
        """
        for piece in _ahead(self._pieces(samples), self._announce_rows, most=self._most):
            shard, target = self._compared_shard(piece.block), out[piece.first : piece.last]
            if shard is None:
                self._gather(samples[piece.first : piece.last], target)
            else:
                self._pick(shard.view, piece, target)

    def copy(self, chunks: Int64[np.ndarray, " chunk"], out: UInt[np.ndarray, "row width"]) -> None:
        """Copies whole chunks, ascending, one after the other into `out`, and compares each with its marker.

        Raises:
            CorruptStoreError: a chunk is not the one that was committed; names site, layer and block.
        """
        layout, place = self._source.layout, 0
        for number in _ahead(chunks.tolist(), self._announce_chunk, most=self._most):
            block, chunk = divmod(number, self._shape[0])
            start = number * layout.chunk_samples
            count = min(layout.chunk_samples, layout.samples - start)
            target, place = out[place : place + count], place + count
            shard = self._shard(block)
            if shard is not None:
                target[...] = self._chunks(shard.view)[chunk, :count]
                try:
                    self._compare(start, target)
                    continue
                except CorruptStoreError:  # or repaired since: then there is a new file in the place of the open one
                    self._shards.pop(block)
            self._gather(np.arange(start, start + count), target)

    def _announce_chunk(self, number: int) -> int:
        block, chunk = divmod(number, self._shape[0])
        shard, start = self._shard(block), chunk * self._stride
        if shard is not None:
            shard.announce(start, start + self._chunk_bytes)
        return self._chunk_bytes

    def _announce_rows(self, piece: "_Piece") -> int:
        """Announces the pages of the rows, unless all that are looked for are in memory."""
        shard, starts = self._compared_shard(piece.block), piece.starts
        if shard is not None and shard.lacks(starts[:: -(-len(starts) // PROBES)]):
            ends = starts + self._site.row_bytes
            edges = np.flatnonzero(starts[1:] - ends[:-1] > GAP_BYTES)
            spans = zip(starts[np.append(0, edges + 1)].tolist(), ends[np.append(edges, -1)].tolist(), strict=True)
            for start, stop in spans:
                shard.announce(start, stop)
        return len(starts) * self._site.row_bytes

    def _pieces(self, samples: Int64[np.ndarray, " row"]) -> Iterator["_Piece"]:
        """Neighbouring rows of one shard, some thousand at most."""
        layout, row_bytes = self._source.layout, self._site.row_bytes
        for start, stop in _runs(samples // layout.block_samples):
            block = int(samples[start]) // layout.block_samples
            for first in range(start, stop, PIECE_ROWS):
                last = min(first + PIECE_ROWS, stop)
                chunks, rows = np.divmod(samples[first:last] - block * layout.block_samples, layout.chunk_samples)
                yield _Piece(block, first, last, chunks, rows, chunks * self._stride + rows * row_bytes)

    def _pick(self, view: mmap.mmap, piece: "_Piece", out: UInt[np.ndarray, "row width"]) -> None:
        """Copies rows out of a mapped shard."""
        runs, row_bytes = list(_runs(piece.chunks)), self._site.row_bytes
        if out.nbytes >= RUN_BYTES * len(runs):
            chunks = self._chunks(view)
            for first, last in runs:
                chunk = chunks[int(piece.chunks[first])]
                np.take(chunk, piece.rows[first:last], axis=0, out=out[first:last], mode="clip")
            return
        step, row = math.gcd(self._stride, row_bytes), np.dtype(f"V{row_bytes}")
        count = (self._stride * self._shape[0] - row_bytes) // step + 1
        everywhere = np.ndarray((count,), row, buffer=view, strides=(step,))
        places, target = piece.starts // step, out.view(row)[:, 0]
        for first in range(0, len(out), ROWS_AT_ONCE):
            target[first : first + ROWS_AT_ONCE] = everywhere[places[first : first + ROWS_AT_ONCE]]

    def _gather(self, samples: Int64[np.ndarray, " row"], out: UInt[np.ndarray, "row width"]) -> None:
        """The way of every other store: it reads what is unusual, and its errors say what is wrong."""
        gather(self._source, [self._layer], samples, out.view(self._site.dtype)[None])

    def _shard(self, block: int) -> "_Shard | None":
        """A shard; None where it is not there, or not as actstore writes it."""
        found = self._shards.get(block)
        if found is not None:
            self._shards.move_to_end(block)
            return found
        path = self._root.path / shard_key(self._site, self._layer, block)
        found = _Shard.open(path, self._tail, length=self._length)
        if found is not None:
            while len(self._shards) >= self._most:
                self._shards.popitem(last=False)
            self._shards[block] = found
        return found

    def _compared_shard(self, block: int) -> "_Shard | None":
        """A shard for single rows, once its first chunk was compared."""
        shard = self._shard(block)
        if shard is None:
            return None
        shard.expect_single_rows()
        if self._source.vouchers is not None and self._compared.get(block) != shard.identity:
            self._announce_chunk(block * self._shape[0])
            start = block * self._source.layout.block_samples
            try:
                self._compare(start, self._chunks(shard.view)[0, : self._source.layout.samples - start].copy())
            except CorruptStoreError:
                self._shards.pop(block)
                raise
            self._compared[block] = shard.identity
        return shard

    def _chunks(self, view: mmap.mmap) -> UInt[np.ndarray, "chunk row width"]:
        item_bytes = self._site.row_bytes // self._site.width
        strides = (self._stride, self._site.row_bytes, item_bytes)
        return np.ndarray(self._shape, f"u{item_bytes}", buffer=view, strides=strides)

    def _compare(self, start: int, rows: UInt[np.ndarray, "row width"]) -> None:
        if self._source.vouchers is not None:
            compare(self._source, self._source.vouchers, self._layer, start, rows)


class _Piece(NamedTuple):
    """Wanted rows `first` to `last - 1`, of one shard: their chunks, rows in these, first bytes in the shard."""

    block: int
    first: int
    last: int
    chunks: Int64[np.ndarray, " row"]
    rows: Int64[np.ndarray, " row"]
    starts: Int64[np.ndarray, " row"]


class _Shard:
    """An open and mapped file that has the length and the index of a shard."""

    def __init__(self, file: int) -> None:
        """Raises OSError where it cannot be mapped."""
        self._file, self._byte, self._single = file, bytearray(1), False
        weakref.finalize(self, os.close, file)
        status = os.fstat(file)
        self.identity = hash((status.st_dev, status.st_ino, status.st_mtime_ns))
        self.view = mmap.mmap(file, status.st_size, prot=mmap.PROT_READ)

    @classmethod
    def open(cls, path: Path, tail: bytes, *, length: int) -> "_Shard | None":
        """The file, if it has this length and ends so."""
        with contextlib.suppress(OSError, ValueError):  # ValueError: an empty file cannot be mapped
            shard = cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            if len(shard.view) == length and os.pread(shard._file, len(tail), length - len(tail)) == tail:
                return shard
        return None

    def expect_single_rows(self) -> None:
        """Where one is missing in memory after all, its pages alone are to be read."""
        if sys.platform == "linux" and not self._single:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            self.view.madvise(mmap.MADV_RANDOM)
            self._single = True

    def announce(self, start: int, stop: int) -> None:
        """Has the system begin to read these bytes into its memory, if it likes."""
        if sys.platform == "linux":
            for first in range(start, stop, REQUEST_BYTES):
                os.posix_fadvise(self._file, first, min(REQUEST_BYTES, stop - first), os.POSIX_FADV_WILLNEED)

    def lacks(self, places: Int64[np.ndarray, " place"]) -> bool:
        """Whether any of these bytes is not in memory, or the system cannot say so. Costs 1 us each."""
        if sys.platform == "linux":
            try:
                for place in places.tolist():
                    os.preadv(self._file, [self._byte], place, os.RWF_NOWAIT)
            except OSError:  # it would have to wait for the disk
                return True
        return False


def _runs(values: Int64[np.ndarray, " row"]) -> Iterator[tuple[int, int]]:
    """First place of each run of equal values, which are not negative, and one past its last."""
    return itertools.pairwise([*np.flatnonzero(np.diff(values, prepend=-1)).tolist(), len(values)])


def _ahead(items: Iterable[Item], announce: Callable[[Item], int], *, most: int) -> Iterator[Item]:
    """The items in order, each after the next `AHEAD_BYTES`, or `most` items, were announced."""
    waiting: deque[tuple[Item, int]] = deque()
    announced = 0
    for item in items:
        size = announce(item)
        waiting.append((item, size))
        announced += size
        while waiting and (len(waiting) >= most or announced - waiting[0][1] >= AHEAD_BYTES):
            first, size = waiting.popleft()
            announced -= size
            yield first
    yield from (item for item, _ in waiting)


def _most_open(layout: Layout) -> int:
    """Shards of one layer that may be open at once: all layers together hold half of the files a process may open."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return SHARDS_KEPT
    layers = sum(site.rows_per_sample for site in layout.sites)
    return min(max(files // (4 * layers), 4), SHARDS_KEPT)  # a mapped shard is two open files


def can_map(root: Root, source: Source) -> bool:
    """Whether the shards of a store are local files without compression, in this machine's byte order."""
    return source.layout.codec != "zstd" and sys.byteorder == "little" and root.path.is_dir()
