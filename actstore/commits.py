"""The JSON documents that say what is committed: markers of blocks and documents, and those that seal a store."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pydantic
from jaxtyping import Int64

from actstore.errors import CorruptStoreError
from actstore.schema import FORMAT, Fingerprint, Plan, StoredDocument, without
from actstore.untrusted import MAX_DOCUMENT_BYTES, canonical_json

MAX_CHUNK_DIGESTS = 1 << 20  # of one block: 8 MiB of its marker

Digest = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{32}$")]
ChunkDigests = Annotated[str, pydantic.StringConstraints(pattern=r"^([0-9a-f]{8})+$")]


class Marker(StoredDocument):
    """Written last for a block: its presence, with the plan's fingerprint, is what makes the block committed.

    `checksums` has, per array, the xxh3-128 of the decoded shard of each layer: rows of this block only, little-endian.
    `chunks` has, per site, one string for each layer: the CRC-32C of this block's rows of each chunk, eight hexadecimal
    digits each. A reader compares every chunk it reads with them. Empty in the oldest stores, and where they would be
    more than `MAX_CHUNK_DIGESTS`.
    `ranges` has the lowest and the highest value of each column of integers. Empty in older stores.

    A marker says nothing about when or where it was written, so that the same block always has the same marker.
    """

    kind = "commit marker"

    block: Annotated[int, pydantic.Field(ge=0)]
    samples: tuple[int, int]
    fingerprint: Fingerprint
    checksums: dict[str, tuple[Digest, ...]]
    chunks: dict[str, tuple[ChunkDigests, ...]] = pydantic.Field(default={})
    ranges: dict[str, tuple[int, int]] = pydantic.Field(default={})

    @pydantic.model_serializer(mode="wrap")
    def _as_it_was_read(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A marker from before there were chunks or ranges stays without them: the manifest has it as it is."""
        return {name: value for name, value in fields(self).items() if name in self.model_fields_set}


class TableMarker(StoredDocument):
    """Written after the `documents` group: the xxh3-128 of each of its arrays."""

    kind = "documents marker"

    fingerprint: Fingerprint
    checksums: dict[str, Digest]


class Manifest(StoredDocument):
    """All markers in one document, written when the store is sealed."""

    kind = "manifest"

    fingerprint: Fingerprint
    blocks: tuple[Marker, ...]

    @classmethod
    def pieces(cls, fingerprint: str, markers: Iterable[bytes]) -> Iterator[bytes]:
        """The bytes of a manifest, made of those of its markers: all of them may be more than fit into memory."""
        before, after = canonical_json({"blocks": [], "fingerprint": fingerprint, "format": FORMAT}).split(b"[]")
        yield before + b"["
        for number, marker in enumerate(markers):
            yield (b"," if number else b"") + marker
        yield b"]" + after


class Ranges(StoredDocument):
    """The ranges of all markers, written when the store is sealed: which blocks can hold a value, in one small read.

    Per column, the lowest value of each block, ascending, then the highest of each: int64, little-endian, in base64.
    """

    kind = "ranges"

    fingerprint: Fingerprint
    columns: dict[str, Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]]

    @classmethod
    def of(cls, plan: Plan, ranges: Sequence[Mapping[str, tuple[int, int]]]) -> "Ranges | None":
        """The ranges of a generation, from those of each marker.

        None where a marker is from before there were any, or they would be too large.
        """
        names = plan.layout.integer_columns
        if not names or not plan.adds_samples or not all(ranges):
            return None
        if 24 * len(names) * len(ranges) > MAX_DOCUMENT_BYTES:
            return None
        bounds = {name: np.array([each[name] for each in ranges], "<i8").T for name in names}
        columns = {name: base64.b64encode(values.tobytes()).decode() for name, values in bounds.items()}
        return cls(format=FORMAT, fingerprint=plan.fingerprint, columns=columns)

    def bounds(self, column: str, *, blocks: int) -> Int64[np.ndarray, "2 block"]:
        """The lowest and highest values of a column of integers in each of the generation's blocks.

        Raises:
            CorruptStoreError: they are not there, or of another number of blocks.
        """
        data = base64.b64decode(self.columns.get(column, ""))
        if len(data) != 16 * blocks:
            raise CorruptStoreError(
                f"the ranges of column {column!r} have {len(data)} bytes, expected {16 * blocks} for {blocks} blocks; "
                "run `actstore verify`"
            )
        return np.frombuffer(data, "<i8").astype(np.int64, copy=False).reshape(2, blocks)


class Seal(StoredDocument):
    """The last document of a store: it is complete and will not change."""

    kind = "seal"

    fingerprint: Fingerprint
    manifest_sha256: Fingerprint
    ranges_sha256: Fingerprint | None = None
    """Left out where there are no ranges."""

    @pydantic.model_serializer(mode="wrap")
    def _without_no_ranges(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without(fields(self), "ranges_sha256", empty=None)
