"""Rows where they lie in local, uncompressed shards: such a shard is its rows, one after the other, and then an index.

A shard is mapped when it is first touched, if its length and its index are those that actstore writes; others are read
as in every store, and what is wrong with them is said there. Chunks that are wanted whole are compared with their
commit markers, each time: a swapped or stale shard is an error. For single rows one chunk of their shard is compared.
They are not themselves, because that would read a chunk for each: a flipped bit is then found by `verify` alone. Nobody
may cut a mapped file short: the system would end the process.

What is to be read is announced to the system some megabytes ahead, and nothing else is: a disk is then kept busy by one
thread, and is not asked for what the system guesses. Why, with figures: docs/decisions/0011-announced-reads.md. Nothing
is copied here: docs/decisions/0012-rows-are-taken-where-they-lie.md.
"""

import contextlib
import ctypes
import dataclasses
import functools
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
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

from actstore.errors import CorruptStoreError
from actstore.gather import Source, compare, gather
from actstore.kvstore import Root
from actstore.layout import Layout, Site
from actstore.metadata import shard_key
from actstore.rows import Memory, RowView
from actstore.shards import CHECKSUM_BYTES, packed_index

SHARDS_KEPT = 4096  # open at once, of each layer
ROW_BYTES = 1 << 16  # larger rows are read as in every store: NumPy's arrays end at 2^63 bytes, addresses at 2^47
MAPPINGS = 1 << 15  # of all windows: the system allows some 65,000
AHEAD_BYTES = 8 << 20  # announced before they are read: 16 chunks of 512 KiB; more is not faster
REQUEST_BYTES = 512 << 10  # in one announcement; the system cuts longer ones off, most disks at 1 MiB or more
GAP_BYTES = 32 << 10  # between rows, read rather than skipped: about what a disk reads in the time of a request
PIECE_ROWS = 4096  # announced together
PROBES = 16  # rows of a piece that are looked for in memory before it is announced
Item = TypeVar("Item")


class MappedRows:
    """The rows of one site and layer of a local store without compression. Use it from one thread."""

    def __init__(self, root: Root, source: Source, site: Site, layer: int) -> None:
        """Nothing is read. `source` is the site's array, `layer` an index along its layer axis."""
        self._root, self._source, self._site, self._layer = root, source, site, layer
        layout = source.layout
        self._chunk_bytes = layout.chunk_samples * site.row_bytes
        self._stride = self._chunk_bytes + (CHECKSUM_BYTES if layout.codec == "crc32c" else 0)
        self._chunks = layout.block_samples // layout.chunk_samples
        entries = [value for chunk in range(self._chunks) for value in (chunk * self._stride, self._stride)]
        self._tail = packed_index(entries)
        self._length = self._stride * self._chunks + len(self._tail)
        self._step = math.gcd(self._stride, site.row_bytes, mmap.PAGESIZE)  # of the addresses of mapped rows
        self._most, self._most_mapped = _most_open(layout), _most_mapped(layout)
        self._shards = OrderedDict[int, Shard]()
        self._compared: dict[int, int] = {}  # a number of the file by block: 100 bytes for each shard of 128 MiB

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in another process too, opens its own files."""
        return self.__dict__ | {"_shards": OrderedDict(), "_compared": {}}

    def rows(
        self,
        samples: Int64[np.ndarray, " row"],
        places: Int64[np.ndarray, " wanted"],
        memory: Memory,
        *,
        whole: bool = False,
    ) -> RowView:
        """Where some rows lie; they are in the system's memory now, and stay while there is room.

        Args:
            samples: ascending, each once.
            places: of the wanted rows among `samples`, in the order that the result has.
            memory: for rows that cannot stay mapped.
            whole: compare each chunk that holds a row with its marker.

        Raises:
            CorruptStoreError: a shard is missing, cut, swapped or stale, or a chunk is not the one that was committed;
                names site, layer and block.
        """
        addresses = np.empty(len(samples), np.int64)
        mapped: dict[int, _Mapping] = {}
        own: UInt8[np.ndarray, "row byte"] | None = None
        announce = functools.partial(self._announce, whole=whole)
        for piece in read_ahead(self._pieces(samples, whole=whole), announce, most=self._most):
            shard = self._ready(piece, whole=whole)
            if shard is not None and (piece.block in mapped or len(mapped) < self._most_mapped):
                mapped[piece.block] = shard.mapping
                addresses[piece.first : piece.last] = shard.mapping.address + piece.starts
                continue
            if own is None:
                own, begin = memory.rows(len(samples) - piece.first, self._site.row_bytes), piece.first
            target = own[piece.first - begin : piece.last - begin]
            if shard is None:
                self._gather(samples[piece.first : piece.last], target)
            else:
                lying = shard.mapping.address + piece.starts
                rows = RowView.at(lying, self._site.row_bytes, step=self._step, keep=shard.mapping)
                rows.copy(slice(None), target)
            addresses[piece.first : piece.last] = target.ctypes.data + np.arange(len(target)) * self._site.row_bytes
        step = self._step if own is None else math.gcd(self._step, own.ctypes.data)
        if own is not None:
            memory.take_back(own)
        return RowView.at(addresses[places], self._site.row_bytes, step=step, keep=(*mapped.values(), own))

    def _pieces(self, samples: Int64[np.ndarray, " row"], *, whole: bool) -> Iterator["Piece"]:
        """Rows of one chunk, where they are wanted whole; else of one shard, some thousand at most."""
        layout = self._source.layout
        blocks = samples // layout.block_samples
        chunks, rows = np.divmod(samples - blocks * layout.block_samples, layout.chunk_samples)
        starts = chunks * self._stride + rows * self._site.row_bytes
        most = layout.chunk_samples if whole else PIECE_ROWS
        for start, stop in runs(samples // layout.chunk_samples if whole else blocks):
            for first in range(start, stop, most):
                last = min(first + most, stop)
                yield Piece(int(blocks[first]), int(chunks[first]), first, last, starts[first:last])

    def _announce(self, piece: "Piece", *, whole: bool) -> int:
        """Announces chunks, and the pages of single rows unless all that are looked for are in memory."""
        shard = self._shard(piece.block) if whole else self._compared_shard(piece.block)
        if whole:
            start = piece.chunk * self._stride
            if shard is not None:
                shard.announce(start, start + self._chunk_bytes)
            return self._chunk_bytes
        starts = piece.starts
        if shard is not None and shard.lacks(starts[:: -(-len(starts) // PROBES)]):
            piece.lacking = True
            ends = starts + self._site.row_bytes
            edges = np.flatnonzero(starts[1:] - ends[:-1] > GAP_BYTES)
            spans = zip(starts[np.append(0, edges + 1)].tolist(), ends[np.append(edges, -1)].tolist(), strict=True)
            for start, stop in spans:
                shard.announce(start, stop)
        return len(starts) * self._site.row_bytes

    def _ready(self, piece: "Piece", *, whole: bool) -> "Shard | None":
        """The shard of a piece, once what is wanted of it was compared and is in memory; None: read it otherwise."""
        if not whole:
            shard = self._compared_shard(piece.block)
            if shard is not None and piece.lacking:
                shard.mapping.touch(piece.starts, self._site.row_bytes)
            return shard
        shard = self._shard(piece.block)
        if shard is not None:
            try:
                self._compare(shard.mapping, piece.block, piece.chunk)
            except CorruptStoreError:  # or repaired since: then there is a new file in the place of the open one
                self._shards.pop(piece.block)
                return None
        return shard

    def _gather(self, samples: Int64[np.ndarray, " row"], out: UInt8[np.ndarray, "row byte"]) -> None:
        """The way of every other store: it reads what is unusual, and its errors say what is wrong."""
        gather(self._source, [self._layer], samples, out.view(self._site.dtype)[None])

    def _shard(self, block: int) -> "Shard | None":
        """A shard; None where it is not there, or not as actstore writes it."""
        found = self._shards.get(block)
        if found is not None:
            self._shards.move_to_end(block)
            return found
        path = self._root.path / shard_key(self._site, self._layer, block)
        found = Shard.open(path, self._tail, length=self._length)
        if found is not None:
            while len(self._shards) >= self._most:
                self._shards.popitem(last=False)
            self._shards[block] = found
        return found

    def _compared_shard(self, block: int) -> "Shard | None":
        """A shard for single rows, once its first chunk was compared."""
        shard = self._shard(block)
        if shard is None:
            return None
        shard.expect_single_rows()
        if self._source.vouchers is not None and self._compared.get(block) != shard.identity:
            shard.announce(0, self._chunk_bytes)
            try:
                self._compare(shard.mapping, block, 0)
            except CorruptStoreError:
                self._shards.pop(block)
                raise
            self._compared[block] = shard.identity
        return shard

    def _compare(self, mapping: "_Mapping", block: int, chunk: int) -> None:
        """Compares a chunk with its marker; where there is none, it is read alone."""
        layout, site, place = self._source.layout, self._site, chunk * self._stride
        start = block * layout.block_samples + chunk * layout.chunk_samples
        count = min(layout.chunk_samples, layout.samples - start)
        if self._source.vouchers is None:
            mapping.touch(np.array([place]), count * site.row_bytes)
            return
        rows = mapping.bytes[place : place + count * site.row_bytes].view(site.dtype).reshape(count, site.width)
        compare(self._source, self._source.vouchers, self._layer, start, rows)


@dataclasses.dataclass
class Piece:
    """Wanted rows `first` to `last - 1`, of one shard, and their first bytes in it; `chunk` is the first row's."""

    block: int
    chunk: int
    first: int
    last: int
    starts: Int64[np.ndarray, " row"]
    lacking: bool = False
    """Whether some were not in memory when they were announced."""


class _Mapping:
    """A file in this process's memory, for as long as this is there; the file need not stay open, as for `mmap`."""

    def __init__(self, file: int, length: int) -> None:
        """Raises OSError where it cannot be mapped."""
        address = _LIBC.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address, self._length = int(address), length
        weakref.finalize(self, _LIBC.munmap, address, length).atexit = False  # another thread may still look at it

    @property
    def __array_interface__(self) -> dict[str, object]:
        return {"version": 3, "data": (self.address, True), "shape": (self._length,), "typestr": "|u1"}

    @property
    def bytes(self) -> UInt8[np.ndarray, " byte"]:
        """All of the file."""
        return np.asarray(self)

    def touch(self, starts: Int64[np.ndarray, " place"], length: int) -> None:
        """Waits until the pages of `length` bytes from each of `starts` are in memory."""
        ahead = np.append(np.arange(0, length, mmap.PAGESIZE), length - 1)
        for offset in ahead.tolist():
            self.bytes[starts + offset].max()

    def expect_single_rows(self) -> None:
        """Where one is missing in memory after all, its pages alone are to be read."""
        _LIBC.madvise(self.address, self._length, mmap.MADV_RANDOM)


class Shard:
    """An open and mapped file that has the length and the index of a shard."""

    def __init__(self, file: int) -> None:
        """Raises OSError where it cannot be mapped."""
        self._file, self._byte, self._single = file, bytearray(1), False
        weakref.finalize(self, os.close, file)
        status = os.fstat(file)
        self.identity, self._length = identity(status), status.st_size
        self.mapping = _Mapping(file, status.st_size)

    @classmethod
    def open(cls, path: Path, tail: bytes, *, length: int) -> "Shard | None":
        """The file, if it has this length and ends so."""
        with contextlib.suppress(OSError):  # an empty file cannot be mapped either
            shard = cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            if shard._length == length and os.pread(shard._file, len(tail), length - len(tail)) == tail:
                return shard
        return None

    def expect_single_rows(self) -> None:
        """Where one is missing in memory after all, its pages alone are to be read."""
        if sys.platform == "linux" and not self._single:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            self.mapping.expect_single_rows()
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


def identity(status: os.stat_result) -> int:
    """What tells a file from another one, and from itself before it was last written."""
    return hash((status.st_dev, status.st_ino, status.st_mtime_ns))


def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    library.mmap.argtypes, library.mmap.restype = (address, size, number, number, number, ctypes.c_int64), address
    library.munmap.argtypes = (address, size)
    library.madvise.argtypes = (address, size, number)
    return library


_LIBC = _libc()  # Python's own mmap holds a file open for each mapping, and processes may not have many


def runs(values: Int64[np.ndarray, " row"]) -> Iterator[tuple[int, int]]:
    """First place of each run of equal values, which are not negative, and one past its last."""
    return itertools.pairwise([*np.flatnonzero(np.diff(values, prepend=-1)).tolist(), len(values)])


def read_ahead(items: Iterable[Item], announce: Callable[[Item], int], *, most: int) -> Iterator[Item]:
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
    return min(max(files // (2 * _layers(layout)), 4), SHARDS_KEPT)


def _most_mapped(layout: Layout) -> int:
    """Shards of one layer that the rows of one window may lie in; there are two windows."""
    return max(MAPPINGS // (2 * _layers(layout)), 1)


def _layers(layout: Layout) -> int:
    return sum(site.rows_per_sample for site in layout.sites)


def can_map(root: Root, source: Source) -> bool:
    """Whether the shards of a store are local files without compression, in this machine's byte order."""
    plain = source.layout.codec != "zstd" and source.sample_bytes <= ROW_BYTES
    return plain and sys.byteorder == "little" and root.is_local and root.path.is_dir()
