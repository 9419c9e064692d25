"""The JSON documents of a store, as pydantic models: what they have in common, the plan, and group attributes.

What is written when blocks are committed is in `actstore.commits`.

Every document carries `format`, the version of the on-disk format. A document is written once, as canonical JSON, so
that equal content is equal bytes. Unknown fields are refused: a later version that adds some counts `format` up.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import pydantic

from actstore.errors import CorruptStoreError, InputError, PlanMismatchError
from actstore.layout import MAX_COLUMNS, Layout
from actstore.untrusted import canonical_json, excess_of, leaves, parse_json, printable

FORMAT: Literal[1] = 1
CONVENTION = {
    "name": "actstore",
    "uuid": "6f1c8a52-7a41-4a55-9c0d-0d2f3a7e5b10",
    "description": "Activation dataset: arrays [layer, sample, hidden] with integer coordinates on sample",
}
MAX_ASSETS = 256
MAX_GENERATIONS = 1000  # each costs one small read when the store is opened

Document = TypeVar("Document", bound="StoredDocument")
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
            first = error.errors(include_input=False, include_url=False)[0]
            field = printable(".".join(str(part) for part in first["loc"]), most=100)
            raise CorruptStoreError(
                f"{where} is not a {cls.kind} of format {FORMAT}: {field}: {printable(first['msg'], most=200)}; the "
                "store is damaged, or was written by a newer actstore"
            ) from None


class DocumentTableLayout(pydantic.BaseModel):
    """Sizes of the `documents` group: everything needed to know its arrays' shapes."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    documents: Annotated[int, pydantic.Field(ge=1, le=1 << 40)]
    tokens: Annotated[int, pydantic.Field(ge=0, le=1 << 44)]
    numbers: Annotated[dict[TableColumn, Literal["int64", "float64"]], pydantic.Field(max_length=MAX_COLUMNS)] = {}
    strings: Annotated[
        dict[TableColumn, Annotated[int, pydantic.Field(ge=0, le=1 << 44)]], pydantic.Field(max_length=MAX_COLUMNS)
    ]
    """Bytes in all, of each string column; `id` and `text` are always there."""
    codec: Literal["crc32c", "zstd"] = "crc32c"
    """Left out where it is `crc32c`, as in stores from before there was another."""

    @pydantic.model_serializer(mode="wrap")
    def _without_first_codec(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without(fields(self), "codec", empty="crc32c")

    @pydantic.model_validator(mode="after")
    def _names_fit(self) -> Self:
        """Refuses columns of which two would be the same array, and tables without ids or texts."""
        names = [*self.numbers, "token_id", "token_start", "token_end", "token_offsets"]
        names += [f"{name}_{part}" for name in self.strings for part in ("bytes", "offsets")]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or not {"id", "text"} <= set(self.strings):
            raise ValueError(f"found the columns {[*self.strings, *self.numbers]}, expected id, text and names of own")
        return self


class Base(pydantic.BaseModel):
    """What the generations before hold: an appended plan is understood without reading theirs."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    generation: Annotated[int, pydantic.Field(ge=1, le=MAX_GENERATIONS - 1)]
    fingerprint: Fingerprint
    samples: Annotated[int, pydantic.Field(ge=1)]
    layers: dict[str, Annotated[int, pydantic.Field(ge=0)]]
    """Layers of each site that is there, in stored order; 0 for a layerless site."""
    labels: dict[str, Annotated[int, pydantic.Field(ge=1)]]
    """Chunk length of each label array that is there."""
    tables: tuple[DocumentTableLayout | None, ...]
    """The document table of each generation, oldest first."""


class Plan(StoredDocument):
    """What a store will hold. Immutable; `fingerprint` covers everything that decides the stored bytes.

    A plan with a `base` is a later generation: it describes the whole store as it will be, and adds either samples or
    layers and sites to what the base holds (`actstore.generations`). `documents` are then the added documents.
    """

    kind = "plan"

    layout: Layout
    documents: DocumentTableLayout | None = None
    base: Base | None = None
    assets: Annotated[dict[AssetName, Fingerprint], pydantic.Field(max_length=MAX_ASSETS)] = {}
    provenance: dict[str, pydantic.JsonValue]
    fingerprint: Fingerprint

    @classmethod
    def make(
        cls,
        layout: Layout,
        provenance: dict[str, Any],
        documents: DocumentTableLayout | None = None,
        assets: Mapping[str, bytes] | None = None,
        base: Base | None = None,
    ) -> "Plan":
        """The plan of a layout and its provenance, with its fingerprint.

        Args:
            layout: shapes of the store.
            provenance: what produced the rows; any JSON.
            documents: sizes of the document table, if the store keeps one.
            assets: small files kept with the store, by name: their digests become part of the plan.
            base: what is there already, for a plan that appends; `generations.extend` makes it.

        Raises:
            InputError: the provenance is not JSON, or an asset's name is not a plain file name.
        """
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in (assets or {}).items()}
        fields = {
            "format": FORMAT,
            "layout": layout,
            "documents": documents,
            "base": base,
            "assets": digests,
            "provenance": provenance,
        }
        try:
            blank = cls.model_validate({**fields, "fingerprint": "0" * 64})
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InputError(f"cannot plan this store: {field} is {first['input']!r}: {first['msg']}") from None
        excess = excess_of(blank.to_json())
        if excess:
            remedy = "flatten it" if "nested" in excess else "keep less in it"
            raise InputError(f"cannot plan this store: provenance {excess}; {remedy}")
        return blank.model_copy(update={"fingerprint": blank.compute_fingerprint()})

    @pydantic.model_serializer(mode="wrap")
    def _without_empty_base(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A first generation has no field `base`: its bytes are those of stores from before there were others."""
        return without(fields(self), "base", empty=None)

    @pydantic.model_validator(mode="after")
    def _base_fits(self) -> Self:
        """Refuses a base that the layout does not extend, before any arithmetic relies on it."""
        if self.base is None:
            return self
        before, sites = self.base, self.layout.sites
        known = sites[: len(before.layers)]
        if {site.name for site in known} != set(before.layers):  # stored JSON has its keys sorted
            raise ValueError(f"base holds the sites {list(before.layers)}, which do not come first in the layout")
        for site in known:
            here, there = len(site.layers or ()), before.layers[site.name]
            if here < there or (here == 0) != (there == 0):
                raise ValueError(f"base holds {there} layers of site {site.name!r}, the layout {here}")
        grown = len(sites) > len(known) or any(len(site.layers or ()) > before.layers[site.name] for site in known)
        if not known or (self.layout.samples > before.samples) == grown or self.layout.samples < before.samples:
            raise ValueError("a plan with a base adds either samples, or layers and sites")
        with_documents = any(before.tables)
        if (self.documents is not None) != (with_documents and self.layout.samples > before.samples) or self.assets:
            raise ValueError("documents come with added samples if the base has some, and assets never")
        if len(before.tables) != before.generation:
            raise ValueError(f"base has {len(before.tables)} document tables of {before.generation} generations")
        return self

    @property
    def generation(self) -> int:
        """1 for the plan that a store begins with, one more for each plan appended to it."""
        return 1 if self.base is None else self.base.generation + 1

    @property
    def appends_samples(self) -> bool:
        """Whether the plan adds samples to a base; one with a base that does not adds layers."""
        return self.base is not None and self.layout.samples > self.base.samples

    @property
    def adds_samples(self) -> bool:
        """Whether the plan writes samples that no plan before it has, with their columns."""
        return self.base is None or self.appends_samples

    @property
    def blocks(self) -> range:
        """The blocks that this plan writes: all, or those that hold added samples."""
        first = self.base.samples // self.layout.block_samples if self.base and self.appends_samples else 0
        return range(first, self.layout.blocks)

    def block_range(self, block: int) -> tuple[int, int]:
        """First and one-past-last sample that this plan writes of a block.

        Raises:
            InputError: the plan does not write this block.
        """
        if block not in self.blocks:
            raise InputError(
                f"block {block} does not exist; this plan writes blocks {self.blocks.start} to {self.blocks.stop - 1}"
            )
        start, stop = self.layout.block_range(block)
        return (max(start, self.base.samples) if self.base and self.appends_samples else start), stop

    @property
    def tables(self) -> tuple[DocumentTableLayout | None, ...]:
        """The document tables of all generations up to this one, oldest first."""
        return (*(self.base.tables if self.base else ()), self.documents)

    @property
    def first_document(self) -> int:
        """Number of this plan's first document: those of earlier generations come before."""
        return sum(table.documents for table in self.tables[:-1] if table)

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
        ours, theirs = (dict(leaves(plan.model_dump(mode="json", exclude={"fingerprint"}))) for plan in (self, stored))
        names = sorted({*ours, *theirs}, key=lambda name: (name.startswith("documents."), name))  # sizes come last
        fields = [name for name in names if ours.get(name) != theirs.get(name)]
        shown = "; ".join(
            f"{printable(name, most=60)}: there {_short(theirs.get(name))}, here {_short(ours.get(name))}"
            for name in fields[:8]
        )
        more = f"; and {len(fields) - 8} more" if len(fields) > 8 else ""
        raise PlanMismatchError(
            f"{url} holds another run, with {len(fields)} differing fields ({shown}{more}); "
            "choose another target, or give the same settings to continue that run"
        )


class RootAttributes(pydantic.BaseModel):
    """The attribute `actstore` of the root group."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    status: Literal["writing", "complete"]
    fingerprint: Fingerprint
    generation: Annotated[int, pydantic.Field(ge=1, le=MAX_GENERATIONS)] = 1
    """Of the newest complete plan; left out while it is 1."""

    @pydantic.model_serializer(mode="wrap")
    def _without_first(self, fields: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without(fields(self), "generation", empty=1)


def without(shown: dict[str, Any], field: str, *, empty: object) -> dict[str, Any]:
    """The fields of a document without one that says nothing: documents from before it was there had none."""
    return {name: value for name, value in shown.items() if name != field or value != empty}


def _short(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
