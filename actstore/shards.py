"""The bytes of a shard: chunks one after the other, each with its checksum, and the index at the end. Pure.

This is the `sharding_indexed` codec of Zarr v3 over `bytes` or `bytes` + `crc32c`, for a shard that is written whole
and whose chunks are slices of its first axis: every piece is a view of the caller's array, nothing is copied.
TensorStore can write the same bytes, but copies each chunk: 0.4 to 0.7 of the speed (docs/log.md).

Memory is passed over once: norms and checksums of half a megabyte are taken, then it is handed to whoever writes it,
while it is in the cache of the core.
"""

import itertools
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import xxhash
from crc32c import crc32c
from jaxtyping import Float32, Shaped

from actstore.layout import Codec
from actstore.moments import row_norms

CHECKSUM_BYTES = 4
SPAN_BYTES = 512 << 10  # looked at in one go; with its values in float32 it stays in a cache of 2 MB

Rows = Shaped[np.ndarray, "sample width"]
Refuse = Callable[[Rows, Float32[np.ndarray, " sample"], int], None]


class RowSums:
    """What a marker says about the rows of one layer of a block, taken span by span, each row once and in order."""

    def __init__(self, samples: int, *, start: int, chunk_samples: int, refuse: Refuse) -> None:
        """Sums of no rows yet.

        Args:
            samples: how many rows will be added.
            start: sample of the first one; may lie inside a chunk.
            chunk_samples: of the store; chunks begin at its multiples.
            refuse: called with the rows, norms and first sample of every span before it counts; may raise.
        """
        self.norms = np.empty(samples, np.float32)
        self._start, self._chunk_samples, self._refuse = start, chunk_samples, refuse
        self._added, self._hash, self._chunks = 0, xxhash.xxh3_128(), list[str]()

    def add(self, rows: Rows) -> list[int]:
        """Counts the next rows, up to the end of a chunk or of all rows; the CRC-32C of each chunk's part of them."""
        norms, start = row_norms(rows), self._start + self._added
        self._refuse(rows, norms, start)
        self.norms[self._added : self._added + len(rows)] = norms
        self._added += len(rows)
        self._hash.update(_bytes(rows).data)
        found = _chunk_checksums(rows, start=start, chunk_samples=self._chunk_samples)
        self._chunks.append(_digits(found))
        return found

    def add_all(self, rows: Rows) -> None:
        """Counts all rows."""
        for first, last in _parts(len(rows), start=self._start, size=_span_samples(rows, self._chunk_samples)):
            self.add(rows[first:last])

    @property
    def digest(self) -> str:
        """xxh3-128 of all rows."""
        return self._hash.hexdigest()

    @property
    def chunks(self) -> str:
        """CRC-32C of the rows of each chunk, eight hexadecimal digits each."""
        return "".join(self._chunks)


def encode(
    rows: Rows,
    *,
    sums: RowSums,
    before: Shaped[np.ndarray, "earlier width"] | None,
    fill: Shaped[np.ndarray, ""],
    block_samples: int,
    chunk_samples: int,
    codec: Codec,
) -> Iterator[memoryview]:
    """The pieces of a shard in order. Rows are added to `sums` before the piece that holds them is handed out.

    Args:
        rows: C-contiguous, in the stored dtype, little-endian; not copied, but for those in a chunk with others.
        sums: of no rows yet, for these.
        before: rows that come before them in the shard.
        fill: value of the padding after them.
        block_samples: rows of the whole shard.
        chunk_samples: divides `block_samples`.
        codec: of the chunks, one that does not compress.
    """
    offset = 0 if before is None else len(before)
    span, index, place = _span_samples(rows, chunk_samples), list[int](), 0
    for first in range(0, block_samples, span):
        own = rows[max(first - offset, 0) : max(first + span - offset, 0)]
        found = iter(sums.add(own) if len(own) else [])
        for start in range(first, min(first + span, block_samples), chunk_samples):
            chunk = rows[max(start - offset, 0) : max(start + chunk_samples - offset, 0)]
            checksum = next(found) if len(chunk) else 0
            if len(chunk) < chunk_samples:
                head = chunk[:0] if before is None else before[start : start + chunk_samples]
                tail = np.full((chunk_samples - len(head) - len(chunk), rows.shape[1]), fill, rows.dtype)
                chunk = np.concatenate([head, chunk, tail])
                checksum = crc32c(_bytes(chunk).data)
            pieces = [_bytes(chunk).data, *([_stored(checksum)] if codec == "crc32c" else [])]
            length = sum(map(len, pieces))
            index += [place, length]
            place += length
            yield from pieces
    yield memoryview(packed_index(index))


def packed_index(numbers: Sequence[int]) -> bytes:
    """The end of a shard: place and length of each chunk, one after the other, and their CRC-32C."""
    packed = struct.pack(f"<{len(numbers)}Q", *numbers)
    return with_checksum(packed)


def with_checksum(data: bytes) -> bytes:
    """Bytes as the codec `crc32c` stores them."""
    return data + _stored(crc32c(data))


def chunk_digests(rows: Rows, *, start: int, chunk_samples: int) -> str:
    """CRC-32C of the rows of each chunk, in order, as a marker holds them: eight hexadecimal digits each.

    Args:
        rows: C-contiguous, in the stored dtype, little-endian; samples `start` and following, no padding.
        start: may lie inside a chunk, whose first piece is then short.
        chunk_samples: of the store; chunks begin at its multiples.
    """
    return _digits(_chunk_checksums(rows, start=start, chunk_samples=chunk_samples))


def _chunk_checksums(rows: Rows, *, start: int, chunk_samples: int) -> list[int]:
    """CRC-32C of each chunk's part of the rows: 27 GB/s on one core, other threads go on."""
    data, row_bytes = _bytes(rows), rows.shape[1] * rows.dtype.itemsize
    parts = _parts(len(rows), start=start, size=chunk_samples)
    return [crc32c(data[first * row_bytes : last * row_bytes].data) for first, last in parts]


def _parts(count: int, *, start: int, size: int) -> Iterator[tuple[int, int]]:
    """`count` samples from sample `start` on, cut at the multiples of `size`: first and one past the last of each."""
    return itertools.pairwise([0, *range(size - start % size, count, size), count])


def _span_samples(rows: Rows, chunk_samples: int) -> int:
    """As many whole chunks as `SPAN_BYTES` hold, at least one."""
    return chunk_samples * max(SPAN_BYTES // (chunk_samples * rows.shape[1] * rows.dtype.itemsize), 1)


def _bytes(rows: Rows) -> Shaped[np.ndarray, " byte"]:
    return rows.view(np.uint8).reshape(-1)


def _digits(checksums: list[int]) -> str:
    return "".join(f"{checksum:08x}" for checksum in checksums)


def _stored(checksum: int) -> memoryview:
    """CRC-32C, little-endian, as the codec `crc32c` appends it."""
    return memoryview(checksum.to_bytes(CHECKSUM_BYTES, "little"))
