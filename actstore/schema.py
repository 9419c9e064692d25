"""The JSON documents of a store, as pydantic models: plan, marker, manifest, seal, group attributes.

Every document carries `format`, the version of the on-disk format. A document is written once, as canonical JSON, so
that equal content is equal bytes. Unknown fields are refused: a later version that adds some counts `format` up.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import pydantic

from actstore.errors import CorruptStoreError, InputError, PlanMismatchError
from actstore.layout import Layout

FORMAT: Literal[1] = 1
CONVENTION = {
    "name": "actstore",
    "uuid": "6f1c8a52-7a41-4a55-9c0d-0d2f3a7e5b10",
    "description": "Activation dataset: arrays [layer, sample, hidden] with integer coordinates on sample",
}
MAX_DOCUMENT_BYTES = 16 << 20  # Python's objects take about 20 times as much; the manifest is compared, never parsed
MAX_DEPTH = 32

Document = TypeVar("Document", bound="StoredDocument")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
Digest = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{32}$")]
AssetName = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]
TableColumn = Annotated[str, pydantic.StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
Fingerprint = Annotated[str, pydantic.StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class StoredDocument(pydantic.BaseModel):
    """Base of everything that is stored as JSON."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]

    format: Literal[1]

    def to_json(self) -> bytes:
        """Canonical JSON: equal content gives equal bytes."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls: type[Document], data: bytes, *, where: str) -> Document:
        """Parses and checks a stored document; `where` names it in errors.

        Raises:
            CorruptStoreError: not JSON, too large, nested too deep, or not of this kind.
        """
        try:
            parse_json(data, where=where)  # bounds and duplicate keys; pydantic's own parser is then strict on types
            return cls.model_validate_json(data, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise CorruptStoreError(
                f"{where} is not a {cls.kind} of format {FORMAT}: {field}: {first['msg']}; the store is damaged, "
                "or was written by a newer actstore"
            ) from None


class DocumentTableLayout(pydantic.BaseModel):
    """Sizes of the `documents` group: everything needed to know its arrays' shapes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    documents: Annotated[int, pydantic.Field(ge=1, le=1 << 40)]
    tokens: Annotated[int, pydantic.Field(ge=0, le=1 << 44)]
    numbers: dict[TableColumn, Literal["int64", "float64"]] = {}
    strings: dict[TableColumn, Annotated[int, pydantic.Field(ge=0, le=1 << 44)]]
    """Bytes in all, of each string column; `id` and `text` are always there."""


class Plan(StoredDocument):
    """What a store will hold. Immutable; `fingerprint` covers everything that decides the stored bytes."""

    kind = "plan"

    layout: Layout
    documents: DocumentTableLayout | None = None
    assets: dict[AssetName, Fingerprint] = {}
    provenance: dict[str, pydantic.JsonValue]
    fingerprint: Fingerprint

    @classmethod
    def make(
        cls,
        layout: Layout,
        provenance: dict[str, Any],
        documents: DocumentTableLayout | None = None,
        assets: Mapping[str, bytes] | None = None,
    ) -> "Plan":
        """The plan of a layout and its provenance, with its fingerprint.

        Args:
            layout: shapes of the store.
            provenance: what produced the rows; any JSON.
            documents: sizes of the document table, if the store keeps one.
            assets: small files kept with the store, by name: their digests become part of the plan.

        Raises:
            InputError: the provenance is not JSON, or an asset's name is not a plain file name.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in (assets or {}).items()}
        fields = {
            "format": FORMAT,
            "layout": layout,
            "documents": documents,
            "assets": digests,
            "provenance": provenance,
        }
        try:
            blank = cls.model_validate({**fields, "fingerprint": "0" * 64})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(f"cannot plan this store: {field} is {first['input']!r}: {first['msg']}") from None
        if _depth(blank.to_json()) > MAX_DEPTH:
            raise InputError(f"cannot plan this store: provenance is nested deeper than {MAX_DEPTH} levels; flatten it")
        return blank.model_copy(update={"fingerprint": blank.compute_fingerprint()})

    def compute_fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of every other field."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json", exclude={"fingerprint"}))).hexdigest()

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> "Plan":
        """Parses a stored plan and checks its fingerprint.

        Raises:
            CorruptStoreError: damaged, or edited after it was written.
        """
        plan = super().from_json(data, where=where)
        if plan.compute_fingerprint() != plan.fingerprint:
            raise CorruptStoreError(
                f"{where} has the fingerprint {plan.fingerprint[:12]}, its content has "
                f"{plan.compute_fingerprint()[:12]}; it was changed after it was written: restore it from a copy"
            )
        return plan

    def refuse_other(self, stored: "Plan", *, url: str) -> None:
        """Raises when `stored`, the plan found at `url`, is not this one.

        Raises:
            PlanMismatchError: names every differing field with both values.
        """
        if stored.fingerprint == self.fingerprint:
            return
        ours, theirs = (dict(_leaves(plan.model_dump(mode="json", exclude={"fingerprint"}))) for plan in (self, stored))
        names = sorted({*ours, *theirs}, key=lambda name: (name.startswith("documents."), name))  # sizes come last
        fields = [name for name in names if ours.get(name) != theirs.get(name)]
        shown = "; ".join(
            f"{name}: there {_short(theirs.get(name))}, here {_short(ours.get(name))}" for name in fields[:8]
        )
        more = f"; and {len(fields) - 8} more" if len(fields) > 8 else ""
        raise PlanMismatchError(
            f"{url} holds another run, with {len(fields)} differing fields ({shown}{more}); "
            "choose another target, or give the same settings to continue that run"
        )


class Marker(StoredDocument):
    """Written last for a block: its presence, with the plan's fingerprint, is what makes the block committed.

    `checksums` has, per array, the xxh3-128 of the decoded shard of each layer: rows of this block only, little-endian.
    A marker says nothing about when or where it was written, so that the same block always has the same marker.
    """

    kind = "commit marker"

    block: Annotated[int, pydantic.Field(ge=0)]
    samples: tuple[int, int]
    fingerprint: Fingerprint
    checksums: dict[str, tuple[Digest, ...]]


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


class Seal(StoredDocument):
    """The last document of a store: it is complete and will not change."""

    kind = "seal"

    fingerprint: Fingerprint
    manifest_sha256: Fingerprint


class RootAttributes(pydantic.BaseModel):
    """The attribute `actstore` of the root group."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    status: Literal["writing", "complete"]
    fingerprint: Fingerprint


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, as UTF-8 bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses JSON from an untrusted store: bounded in size and depth, no duplicate keys, no NaN.

    Raises:
        CorruptStoreError: `where` names the document.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CorruptStoreError(f"{where} has {len(data):,} bytes, expected at most {MAX_DOCUMENT_BYTES:,}; not read")
    if _depth(data) > MAX_DEPTH:
        raise CorruptStoreError(f"{where} is nested deeper than {MAX_DEPTH} levels; not read")
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(
            f"{where} is not valid JSON ({str(error)[:80]}); restore it from a copy, or write the store again"
        ) from None


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, counted before any parser recurses: about 0.2 GB/s."""
    bare = np.frombuffer(_STRING.sub(b"", data), np.uint8)
    opened = (bare == ord("[")) | (bare == ord("{"))
    closed = (bare == ord("]")) | (bare == ord("}"))
    depths = np.cumsum(opened.astype(np.int32) - closed.astype(np.int32))
    return int(depths.max(initial=0))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def _leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar of nested dictionaries and lists with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{prefix}[{index}]")
    else:
        yield prefix, value


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
