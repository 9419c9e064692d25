"""Chosen rows of one layer of a local, uncompressed store, copied from where they lie into an array; for any thread.

Nothing is copied from a chunk before it was compared with its commit marker. Where half of a chunk or more is wanted,
it is compared each time, just before it is copied: it is then in the core's cache. Where few of its rows are wanted it
is compared once for as long as its file stays the same, unchanged: docs/decisions/0013-chunks-are-compared-once.md.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from actstore.errors import CorruptStoreError
from actstore.gather import Source, put
from actstore.kvstore import Root
from actstore.layout import Site
from actstore.mapped import MappedRows, Piece, Shard, identity, read_ahead, runs
from actstore.metadata import shard_key
from actstore.rows import Memory

DENSE = 2  # a chunk is wanted whole where one row of so many is wanted: comparing costs a third of copying
PART_BYTES = 8 << 20  # of rows, copied by one thread: 2 ms
THREADS = 4  # more do not copy faster: they share the memory
PIECE_BYTES = 512 << 10  # of rows, copied twice, the second time out of the core's cache


class PickedRows(MappedRows):
    """The rows of one site and layer of a local store without compression."""

    def __init__(self, root: Root, source: Source, site: Site, layer: int) -> None:
        """Nothing is read. `source` is the site's array, `layer` an index along its layer axis."""
        super().__init__(root, source, site, layer)
        self._open = threading.Lock()
        self._sound: dict[int, tuple[int, Bool[np.ndarray, " chunk"]]] = {}  # by block, of which file; a byte a chunk

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in another process too, opens its own files and has compared nothing."""
        return type(self), (self._root, self._source, self._site, self._layer)

    def fill(
        self,
        samples: Int64[np.ndarray, " row"],
        out: Shaped[np.ndarray, "row chosen"],
        *,
        width: slice | Int64[np.ndarray, " chosen"] = slice(None),
    ) -> None:
        """Copies the rows of some samples.

        Args:
            samples: in any order, repeated or not, all of them there.
            out: in the site's dtype, or float32 for bfloat16, which is then widened.
            width: which values of each row.

        Memory beside `out`: 50 bytes for each of a million rows at most, and 2 MiB for each thread; where `samples` do
        not ascend and are few of each chunk, 50 bytes for every one.

        Raises:
            CorruptStoreError: a shard is missing, cut, swapped or stale, or a chunk is not the one that was committed;
                names site, layer and block.
            StorageError: the storage failed.
        """
        order = None if (np.diff(samples) >= 0).all() else np.argsort(samples, kind="stable")
        wanted = samples if order is None else samples[order]
        chunk = self._source.layout.chunk_samples
        rows = max(PART_BYTES // (chunk * self._site.row_bytes), 1) * chunk
        parts = [slice(first, first + rows) for first in range(0, len(wanted), rows)]
        self._forget_changed(wanted)
        if self._is_dense(wanted):
            with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "actstore-picked") as pool:
                start = map if len(parts) == 1 else pool.map
                for _ in start(lambda part: self._copy_chunks(wanted, order, part, out, width), parts):
                    pass
        elif order is None:
            for part in parts:
                self._copy_rows(wanted[part], np.arange(len(wanted[part])), out[part], width)
        else:
            places = np.empty(len(order), np.int64)
            places[order] = np.arange(len(order))
            self._copy_rows(wanted, places, out, width)

    def _is_dense(self, samples: Int64[np.ndarray, " row"]) -> bool:
        """Whether much of the chunks that hold these rows is wanted, on average. Looks at a million rows at most."""
        some = samples[: 1 << 20]
        size = self._source.layout.chunk_samples
        return len(some) * DENSE >= len(_distinct(some // size)) * size

    def _copy_chunks(
        self,
        samples: Int64[np.ndarray, " row"],
        order: Int64[np.ndarray, " row"] | None,
        part: slice,
        out: Shaped[np.ndarray, "row chosen"],
        width: slice | Int64[np.ndarray, " chosen"],
    ) -> None:
        """Compares the chunks of a part of the rows, which ascend, and copies from each while it is in the cache."""
        site, samples = self._site, samples[part]
        for piece in read_ahead(self._pieces(samples, whole=True), self._announce_chunk, most=self._most):
            shard = self._shard(piece.block)
            count = piece.last - piece.first
            within: slice | Int64[np.ndarray, " row"]
            try:
                if shard is not None and self._source.vouchers is not None:
                    self._compare(shard.mapping, piece.block, piece.chunk)
            except CorruptStoreError:  # the way of every other store says what is wrong, or reads what was repaired
                self._forget(piece.block)
                shard = None
            if shard is None:
                bytes_ = np.empty((count, site.row_bytes), np.uint8)
                self._gather(samples[piece.first : piece.last], bytes_)
                rows, within = bytes_.view(site.dtype), slice(None)
            else:
                start = piece.chunk * self._stride
                rows = shard.mapping.bytes[start : start + self._chunk_bytes].view(site.dtype).reshape(-1, site.width)
                numbers = (piece.starts - start) // site.row_bytes
                first = int(numbers[0])
                is_run = bool((np.diff(numbers) == 1).all())
                within = slice(first, first + count) if is_run else numbers
            target = slice(part.start + piece.first, part.start + piece.last)
            if order is None:
                put(rows[within], out[target], width)
            else:
                ready = np.empty((count, out.shape[1]), out.dtype)
                put(rows[within], ready, width)
                out[order[target]] = ready

    def _announce_chunk(self, piece: Piece) -> int:
        return self._announce(piece, whole=True)

    def _copy_rows(
        self,
        samples: Int64[np.ndarray, " row"],
        places: Int64[np.ndarray, " wanted"],
        out: Shaped[np.ndarray, "row chosen"],
        width: slice | Int64[np.ndarray, " chosen"],
    ) -> None:
        """Copies rows of which each chunk has few. Samples ascend, and `places` are those of the result among them."""
        if self._source.vouchers is not None:
            self._compare_new(samples)
        view = self.rows(samples, places, Memory())
        if out.dtype == np.dtype(self._site.dtype) and isinstance(width, slice) and width == slice(None):
            view.copy(slice(None), out)
            return
        step = max(PIECE_BYTES // self._site.row_bytes, 1)
        for first in range(0, len(places), step):
            part = slice(first, first + step)
            put(view.taken(part, self._site.dtype), out[part], width)

    def _compare_new(self, samples: Int64[np.ndarray, " row"]) -> None:
        """Compares the chunks of these rows that were not compared since their files were written."""
        layout = self._source.layout
        chunks = _distinct(samples // layout.chunk_samples)
        in_block = layout.block_samples // layout.chunk_samples
        for start, stop in runs(chunks // in_block):
            block = int(chunks[start]) // in_block
            shard = self._shard(block)
            if shard is None:  # read otherwise, and compared there
                continue
            known, sound = self._sound.get(block, (None, None))
            if sound is None or known != shard.identity:
                sound = np.zeros(self._chunks, bool)
                self._sound[block] = shard.identity, sound
            numbers = chunks[start:stop] - block * in_block
            self._compare_chunks(block, numbers[~sound[numbers]].tolist(), sound)

    def _compare_chunks(self, block: int, numbers: list[int], sound: Bool[np.ndarray, " chunk"]) -> None:
        shard = self._shard(block)
        if shard is None:
            return

        def announce(number: int) -> int:
            shard.announce(number * self._stride, number * self._stride + self._chunk_bytes)
            return self._chunk_bytes

        for number in read_ahead(numbers, announce, most=self._most):
            try:
                self._compare(shard.mapping, block, number)
            except CorruptStoreError:
                self._forget(block)
                first = block * self._source.layout.block_samples + number * self._source.layout.chunk_samples
                self._gather(np.array([first]), np.empty((1, self._site.row_bytes), np.uint8))  # says what is wrong
                raise
            sound[number] = True

    def _compared_shard(self, block: int) -> Shard | None:
        """A shard for single rows, whose chunks were compared."""
        shard = self._shard(block)
        if shard is not None:
            shard.expect_single_rows()
        return shard

    def _forget_changed(self, samples: Int64[np.ndarray, " row"]) -> None:
        """Opens no longer what is another file now, or another's content. Costs 10 us for each block."""
        for block in _distinct(samples // self._source.layout.block_samples).tolist():
            with self._open:
                found = self._shards.get(block)
            if found is not None and found.identity != _identity_of(
                self._root.path / shard_key(self._site, self._layer, block)
            ):
                self._forget(block)

    def _forget(self, block: int) -> None:
        with self._open:
            self._shards.pop(block, None)

    def _shard(self, block: int) -> Shard | None:
        """A shard; None where it is not there, or not as actstore writes it."""
        with self._open:
            return super()._shard(block)


def _distinct(values: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " distinct"]:
    """Each value once, of values that ascend and are not negative."""
    return values[np.diff(values, prepend=-1) > 0]


def _identity_of(path: Path) -> int | None:
    """What tells a file from another, and from itself before it was written; None where there is none."""
    try:
        return identity(path.stat())
    except OSError:
        return None
