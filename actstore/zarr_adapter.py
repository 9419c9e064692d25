"""Stores for zarr-python and plain `xr.open_zarr`, from wherever actstore reads them: no s3fs, gcsfs or fsspec needed.

    xr.open_zarr(actstore.zarr_store("s3://bucket/run.acts.zarr"))

Read only. Nothing is compared with commit markers: that is what `xr.open_dataset` of the URL itself does.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from actstore import bfloat16  # noqa: F401  zarr knows the dtype then
from actstore.errors import InputError
from actstore.kvstore import Root


class ZarrStore(Store):
    """A read-only store of zarr-python over a place of actstore. Made by `actstore.zarr_store`."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: Root) -> None:
        super().__init__(read_only=True)
        self._root = root

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same place."""
        return isinstance(other, ZarrStore) and other._root == self._root

    def __hash__(self) -> int:
        """By its place."""
        return hash(self._root)

    def __repr__(self) -> str:
        """Its place."""
        return f"ZarrStore({self._root.url!r})"

    def with_read_only(self, read_only: bool = False) -> "ZarrStore":  # noqa: FBT001, FBT002  zarr's signature
        """Itself.

        Raises:
            InputError: asked to write.
        """
        if not read_only:
            raise InputError(f"{self._root.url}: found a request to write; expected only reading: write with actstore")
        return self

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes under a key, all or some; None where there are none. One request."""
        found = await asyncio.to_thread(self._read, key, byte_range)
        return None if found is None else prototype.buffer.from_bytes(found)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Some ranges at once."""
        return await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges))

    async def exists(self, key: str) -> bool:
        """Whether there is something under a key. One request."""
        return await asyncio.to_thread(self._root.exists, key)

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Keys that begin so. One listing."""
        for key in await asyncio.to_thread(self._root.keys, prefix):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below a prefix. Costs listing all that is below it."""
        start = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        keys = await asyncio.to_thread(self._root.keys, start)
        for name in dict.fromkeys(key.removeprefix(start).partition("/")[0] for key in keys):
            yield name

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002
        """Refused."""
        self.with_read_only()

    async def delete(self, key: str) -> None:  # noqa: ARG002
        """Refused."""
        self.with_read_only()

    def _read(self, key: str, span: ByteRequest | None) -> bytes | None:
        match span:
            case None:
                wanted: Any = slice(None)
            case RangeByteRequest(start, end):
                wanted = slice(start, end)
            case OffsetByteRequest(offset):
                wanted = slice(offset, None)
            case SuffixByteRequest(suffix):
                wanted = slice(-suffix, None)
        found = self._root.begin_range(f"read {key} of {self._root.url}", key, wanted).result()
        return bytes(found.value) if found.state == "value" else None


def zarr_store(url: str | os.PathLike[str]) -> ZarrStore:
    """A store at a path or URL as zarr-python and `xr.open_zarr` take it. Nothing is read now.

    Each chunk of a sharded array costs two requests, its place in the shard and itself; `xr.open_dataset(url)` costs
    one, and compares it with its commit marker.

    Example:
        >>> xr.open_zarr(actstore.zarr_store("gs://bucket/run.acts.zarr"))  # doctest: +SKIP
    """
    return ZarrStore(Root.of(url))
