"""The shard encoder beside a decoder that follows the Zarr specification, and its sums beside sums over all rows."""

import struct

import numpy as np
import pytest
import xxhash
from google_crc32c import value as crc32c
from hypothesis import given
from hypothesis import strategies as st
from stores import make_rows

from actstore import Site, shards
from actstore.shards import RowSums, encode

FILL = np.array(np.nan, np.float16)
WIDTH = 3


def decode(data: bytes, chunks: int, codec: str) -> np.ndarray:
    """All rows of a shard: `sharding_indexed` with its index at the end, over `bytes` and perhaps `crc32c`."""
    index_bytes = 16 * chunks
    index, last = data[-4 - index_bytes : -4], data[-4:]
    assert struct.unpack("<I", last)[0] == crc32c(index)
    places = np.frombuffer(index, "<u8").reshape(chunks, 2)
    found = []
    for place, length in places.tolist():
        chunk = data[place : place + length]
        if codec == "crc32c":
            assert struct.unpack("<I", chunk[-4:])[0] == crc32c(chunk[:-4])
            chunk = chunk[:-4]
        found.append(np.frombuffer(chunk, np.float16).reshape(-1, WIDTH))
    assert places[-1].sum() == len(data) - index_bytes - 4
    return np.concatenate(found)


def accept(rows: np.ndarray, norms: np.ndarray, start: int) -> None:
    """Refuses nothing."""


@given(st.data())
def test_every_row_is_written_and_counted_once(data):
    """Whatever the sizes: rows of before, own rows that begin and end anywhere, padding, and spans of any size."""
    chunk = data.draw(st.integers(1, 5), "chunk")
    chunks = data.draw(st.integers(1, 6), "chunks")
    block = chunk * chunks
    offset = data.draw(st.integers(0, block - 1), "offset")
    count = data.draw(st.integers(1, block - offset), "count")
    first_block = data.draw(st.sampled_from([0, 7]), "block")
    codec = data.draw(st.sampled_from(["crc32c", "none"]), "codec")
    everything = make_rows(Site("a", WIDTH, None, "float16"), offset + count)
    before, rows = everything[:offset], everything[offset:]
    start = first_block * block + offset
    sums = RowSums(count, start=start, chunk_samples=chunk, refuse=accept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SPAN_BYTES", data.draw(st.integers(1, 200), "span"))
        pieces = encode(
            rows, sums=sums, before=before if offset else None, fill=FILL, block_samples=block, chunk_samples=chunk,
            codec=codec,
        )  # fmt: skip
        stored = decode(b"".join(pieces), chunks, codec)
        alone = RowSums(count, start=start, chunk_samples=chunk, refuse=accept)
        alone.add_all(rows)
    padded = np.full((block, WIDTH), FILL)
    padded[: offset + count] = everything
    np.testing.assert_array_equal(stored, padded)
    edges = [edge for edge in range(0, block, chunk) if edge < offset + count and edge + chunk > offset]
    own = [everything[max(edge, offset) : edge + chunk] for edge in edges]
    for found in (sums, alone):
        np.testing.assert_allclose(found.norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-6)
        assert found.digest == xxhash.xxh3_128_hexdigest(rows.tobytes())
        assert found.chunks == "".join(f"{crc32c(part.tobytes()):08x}" for part in own)


def test_a_piece_is_handed_out_after_its_rows_were_looked_at(monkeypatch):
    """So a shard with rows that are refused is never complete."""
    monkeypatch.setattr(shards, "SPAN_BYTES", 1)
    rows, seen = make_rows(Site("a", WIDTH, None, "float16"), 6), []

    def refuse(part, norms, start):
        seen.append((start, len(part)))
        if start == 104:
            raise ValueError("refused")

    sums = RowSums(6, start=100, chunk_samples=2, refuse=refuse)
    pieces = encode(rows, sums=sums, before=None, fill=FILL, block_samples=6, chunk_samples=2, codec="none")
    assert bytes(next(pieces)) == rows[:2].tobytes()
    assert seen == [(100, 2)]
    assert bytes(next(pieces)) == rows[2:4].tobytes()
    with pytest.raises(ValueError, match="refused"):
        next(pieces)


def test_whole_chunks_are_not_copied():
    rows = make_rows(Site("a", WIDTH, None, "float16"), 6)
    sums = RowSums(6, start=0, chunk_samples=2, refuse=accept)
    pieces = list(encode(rows, sums=sums, before=None, fill=FILL, block_samples=6, chunk_samples=2, codec="crc32c"))
    assert [np.shares_memory(np.frombuffer(piece, np.uint8), rows) for piece in pieces[:-2:2]] == [True] * 3
