"""Whole objects of a store, compared with what vouches for them: their block's markers, or their own checksum."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from crc32c import crc32c
from jaxtyping import Shaped, UInt8

from actstore.errors import CorruptStoreError
from actstore.gather import Source, compare, gather
from actstore.kvstore import Root
from actstore.metadata import shard_key
from actstore.objects import Objects
from actstore.shards import CHECKSUM_BYTES, packed_index
from actstore.vouchers import Vouchers

PIECE_SAMPLES = 1 << 14  # of a compressed shard, decoded at once


def check_object(
    source: Source, vouchers: Vouchers, metadata: dict[str, Any], data: bytes, *, layer: int, block: int
) -> None:
    """Compares an object of a block with what the markers of the block say.

    Args:
        source: The array.
        vouchers: What the markers say; those of `source` are not asked.
        metadata: Of the array.
        data: All bytes of the object.
        layer: Place on the axis of layers.
        block: The block that it holds.

    Raises:
        CorruptStoreError: it differs.
    """
    layout = source.layout
    start, stop = layout.block_range(block)
    if is_compressed(metadata):
        _decode(dataclasses.replace(source, vouchers=vouchers), metadata, data, layer, start, stop)
        return
    where = source.shard(layer, start)
    chunk = source.chunk_samples * source.sample_bytes
    checksum = 0 if source.is_site and layout.codec == "none" else CHECKSUM_BYTES
    whole: UInt8[np.ndarray, " byte"] = np.frombuffer(data, np.uint8)
    count = layout.block_samples // source.chunk_samples
    if len(whole) < count * (chunk + checksum):
        raise CorruptStoreError(f"{where} has {len(whole):,} bytes, too few for its rows; run `actstore verify`")
    for number in range(count):
        first = start + number * source.chunk_samples
        part = whole[number * (chunk + checksum) : (number + 1) * (chunk + checksum)]
        if checksum:
            check_own(part.data, where)
        if first < stop and source.name != "valid":
            rows: Shaped[np.ndarray, "_"] = part[:chunk].view(source.array.dtype.numpy_dtype)
            rows = rows.reshape(source.chunk_samples, *source.array.shape[-1:] * source.is_site)
            compare(source, vouchers, layer, first, rows[: stop - first])
    if not source.is_site:
        return
    length = chunk + checksum
    index = packed_index([number for place in range(count) for number in (place * length, length)])
    if whole[count * length :].tobytes() != index:
        raise CorruptStoreError(f"{where} has an index that is not that of its chunks; run `actstore verify`")


def _decode(source: Source, metadata: dict[str, Any], data: bytes, layer: int, start: int, stop: int) -> None:
    """Decodes a compressed shard out of memory, some chunks at a time, and compares them."""
    name, layout = source.name, source.layout
    site = layout.site(name)
    step = max(PIECE_SAMPLES // layout.chunk_samples, 1) * layout.chunk_samples
    with _in_memory(name, metadata, shard_key(site, layer, start // layout.block_samples), data) as objects:
        held = dataclasses.replace(source, objects=objects)
        for first in range(start, stop, step):
            samples = range(first, min(first + step, stop))
            gather(held, [layer], samples, np.empty((1, len(samples), site.width), site.dtype))


def decoded_values(name: str, metadata: dict[str, Any], key: str, data: bytes, *, where: str) -> memoryview:
    """The values of a compressed object of documents, decoded out of memory.

    Raises:
        CorruptStoreError: it is damaged.
    """
    try:
        with _in_memory(name, metadata, key, data) as objects:
            values = objects.begin(f"decode {key}", span_of(metadata, key)).result()
    except CorruptStoreError:
        raise CorruptStoreError(f"{where} is damaged: its values cannot be decoded; run `actstore verify`") from None
    return np.ascontiguousarray(values).view(np.uint8).data


@contextlib.contextmanager
def _in_memory(name: str, metadata: dict[str, Any], key: str, data: bytes) -> Iterator[Objects]:
    """An array of which one object is there, in memory, for as long as it is decoded."""
    memory = Root.of(f"memory://copies/{id(data)}.acts.zarr")  # no other object has this number while it is there
    memory.write(key, data)
    try:
        yield Objects.of(memory, name, metadata)
    finally:
        memory.delete(key)


def span_of(metadata: dict[str, Any], key: str) -> slice:
    """The values of a flat array that one of its objects holds."""
    (size,), (chunk,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    first = int(key.rpartition("/")[2]) * chunk
    return slice(first, min(first + chunk, size))


def is_compressed(metadata: dict[str, Any]) -> bool:
    """Whether the bytes of an array's objects are not those of its values."""
    inner = metadata["codecs"][0].get("configuration", {}).get("codecs", [])
    return any(codec["name"] == "zstd" for codec in inner)


def check_own(data: Any, where: str) -> None:
    """Compares bytes with the CRC-32C that follows them.

    Raises:
        CorruptStoreError: they differ.
    """
    view = memoryview(data)
    if crc32c(view[:-CHECKSUM_BYTES]) != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
        raise CorruptStoreError(f"{where} differs from its own checksum; run `actstore verify`")


def item_bytes(metadata: dict[str, Any]) -> int:
    """Bytes of one value of an array."""
    return 2 if metadata["data_type"] == "bfloat16" else int(np.dtype(metadata["data_type"]).itemsize)
