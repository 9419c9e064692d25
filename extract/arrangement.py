"""Documents to contexts and rows: how they are packed, and which of their tokens are kept. Part of every plan."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int32, Int64

from actstore.errors import InputError
from extract.bits import Bits
from extract.packing import Choice, Contexts, Kind, Packing, pack
from extract.selection import Selection, Stream, Vocabulary

TooLong = Literal["cut", "truncate", "error"]
CONTEXT, BATCH = 256, 8


@dataclasses.dataclass(frozen=True)
class Part:
    """Documents that were packed together. A run has one; added layers have one for each time documents came."""

    packing: Packing
    token_offsets: Int64[np.ndarray, " document_edge"]
    token_id: Int32[np.ndarray, " token"]
    kept: Bits | None = None
    first_sample: int = 0
    first_document: int = 0

    def contexts(self, first: int, batch: int) -> Contexts:
        """Some consecutive contexts, their documents numbered as in the store."""
        found = self.packing.take(
            first, batch, token_offsets=self.token_offsets, token_id=self.token_id, kept=self.kept
        )  # fmt: skip
        return dataclasses.replace(found, documents=found.documents + np.int32(self.first_document))


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How documents become contexts, and tokens rows.

    Attributes:
        context: Tokens the model sees at once.
        batch: Contexts per forward pass.
        packing: How documents share contexts; see `extract.packing`. A plan says what `auto` has come to.
        too_long: What becomes of a document that is longer than a context: it is cut into pieces that do not see each
            other, or only its first `context` tokens are read, or the plan is refused.
        selection: Which tokens are kept.
        begin: A token to begin every context with, of `concatenated`; None for none.
    """

    context: int = CONTEXT
    batch: int = BATCH
    packing: Choice = "auto"
    too_long: TooLong = "cut"
    selection: Selection = dataclasses.field(default_factory=Selection)
    begin: int | None = None

    def __post_init__(self) -> None:
        """Refuses what does not go together."""
        for value, what, known in [
            (self.packing, "packing", (*get_args(Kind), "auto")), (self.too_long, "too_long", get_args(TooLong)),
        ]:  # fmt: skip
            if value not in known:
                raise InputError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")
        if self.packing == "concatenated" and self.too_long != "cut":
            raise InputError(
                f"documents that are too long are to be {self.too_long!r}, and packing is 'concatenated', which cuts "
                "where a context ends; leave one of both out"
            )
        if self.begin is not None and self.context < 2:
            raise InputError("context is 1, and each begins with a token of its own; expected at least 2; give more")

    def as_json(self) -> dict[str, Any]:
        """The two entries of a plan's provenance."""
        packing: dict[str, Any] = {"kind": self.packing, "context": self.context, "batch": self.batch}
        if self.too_long != "cut":
            packing["too_long"] = self.too_long
        if self.begin is not None:
            packing["begin"] = self.begin
        return {"packing": packing, "selection": self.selection.as_json()}

    @classmethod
    def of_json(cls, known: dict[str, Any]) -> "Arrangement":
        """The arrangement that a provenance says.

        Raises:
            InputError, KeyError, TypeError: it says none.
        """
        packing = known["packing"]
        found = cls(
            context=packing["context"], batch=packing["batch"], packing=packing["kind"],
            too_long=packing.get("too_long", "cut"), selection=Selection.of_json(known["selection"]),
            begin=packing.get("begin"),
        )  # fmt: skip
        if not (found.context > 0 and found.batch > 0):
            raise InputError(f"the packing is {packing}; expected sizes from 1")
        return found

    def part(self, stream: Stream, vocabulary: Vocabulary, *, first_sample: int = 0, first_document: int = 0) -> Part:
        """Packs the documents of a stream and chooses their rows. Costs 20 bytes per document and a bit per token.

        Raises:
            InputError: a document is too long, no token is kept, or the selection does not fit the documents.
        """
        lengths = np.diff(stream.token_offsets)
        longest = int(lengths.max(initial=0))
        if self.too_long == "error" and longest > self.context:
            many, first = int((lengths > self.context).sum()), int(np.argmax(lengths > self.context))
            raise InputError(
                f"{many:,} documents are longer than the context of {self.context}, the first is "
                f"{stream.document_id(first)!r} with {lengths[first]} tokens; expected none; give a longer context, or "
                "let them be cut or truncated"
            )
        if self.too_long == "truncate" and longest > self.context:
            stream = dataclasses.replace(stream, longest=self.context)
        kept = self.selection.bits(stream, vocabulary)
        packing = pack(lengths, self.context, kind=self.packing, kept=kept, begin=self.begin)
        if not packing.rows:
            raise InputError(
                f"rows {self.selection.rows!r} keep none of {len(stream.token_id):,} tokens; expected at least one; "
                "choose others"
            )
        return Part(packing, stream.token_offsets, stream.token_id, kept, first_sample, first_document)
