"""Which tokens become rows, decided before anything is computed."""

import ast
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt32, UInt64

from actstore.errors import InputError
from actstore.shuffle import mix
from extract.bits import Bits
from extract.conditions import ALL, KINDS, kind_of, parsed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd: positions of a document fall far apart (Knuth, vol. 3, 6.4)

Mask = Bool[np.ndarray, " token"]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What conditions on tokens need of a tokenizer."""

    pieces: Sequence[bytes]
    special: frozenset[int]
    encode: Callable[[str], list[int]]

    def kinds(self) -> Int[np.ndarray, " vocabulary"]:
        """The kind of each token, by its place in `KINDS`."""
        return np.array(
            [
                KINDS.index("special" if number in self.special else kind_of(piece))
                for number, piece in enumerate(self.pieces)
            ]
        )


@dataclasses.dataclass(frozen=True)
class Stream:
    """The tokens of documents, as conditions see them. Arrays may be maps of files."""

    token_offsets: Int64[np.ndarray, " document_edge"]
    token_id: Int32[np.ndarray, " token"]
    token_start: UInt32[np.ndarray, " token"]
    completion_start: Int64[np.ndarray, " document"] | None
    document_id: Callable[[int], str]
    document_hashes: Callable[[], UInt64[np.ndarray, " document"]]
    longest: int | None = None
    """Documents end after so many tokens; None for never."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Some documents of a stream, token by token."""

    document: Int64[np.ndarray, " token"]
    position: Int64[np.ndarray, " token"]
    length: Int64[np.ndarray, " token"]
    token_id: Int32[np.ndarray, " token"]
    token_start: UInt32[np.ndarray, " token"]
    completion_start: Int64[np.ndarray, " token"]
    document_hash: UInt64[np.ndarray, " token"]

    def hashes(self, seed: int) -> UInt64[np.ndarray, " token"]:
        """A hash of document id, position and seed."""
        with np.errstate(over="ignore"):
            places = self.position.astype(np.uint64) * _GOLDEN
            return mix(mix(self.document_hash + np.uint64(seed)) + places)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which tokens are kept as rows.

    Attributes:
        rows: A condition, in its canonical spelling.
        per_document: At most so many rows of each document, a random choice by a hash; None for no limit.
    """

    rows: str = ALL
    per_document: int | None = None

    def __post_init__(self) -> None:
        """Checks it, and spells it as everybody does."""
        object.__setattr__(self, "rows", ast.unparse(parsed(self.rows)))
        if self.per_document is not None and self.per_document < 1:
            raise InputError(
                f"rows per document are {self.per_document}; expected at least 1; leave it out to keep all"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept."""
        return self.rows == ALL and self.per_document is None

    def as_json(self) -> Any:
        """What a plan says of it."""
        if self.keeps_all:
            return "all tokens"
        return {"rows": self.rows} | ({} if self.per_document is None else {"per_document": self.per_document})

    @classmethod
    def of_json(cls, value: Any) -> "Selection":
        """The selection that a plan says.

        Raises:
            InputError: it is none.
        """
        if value == "all tokens":
            return cls()
        if isinstance(value, dict) and isinstance(value.get("rows"), str):
            return cls(value["rows"], value.get("per_document"))
        raise InputError(f"the selection of rows is {value!r}; expected one of this version of actstore")

    def bits(self, stream: Stream, vocabulary: Vocabulary, *, at_once: int = 1 << 20) -> Bits | None:
        """Which tokens of a stream are kept; None for all.

        Costs a bit per token, and about 100 bytes for each of the `at_once` tokens, or of the longest document.

        Raises:
            InputError: a condition on completions of documents that have none, or on a token that does not exist.
        """
        if self.keeps_all and stream.longest is None:
            return None
        tree = parsed(self.rows)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if names & {"prompt", "completion"} and stream.completion_start is None:
            raise InputError(
                f"rows {self.rows!r} ask for prompts or completions, and no document says where its completion begins; "
                "expected fields prompt and completion, or messages; leave the condition out, or give such documents"
            )
        hashed = "fraction" in names or self.per_document is not None
        hashes = stream.document_hashes() if hashed else np.zeros(len(stream.token_offsets) - 1, np.uint64)
        condition = _Condition(vocabulary, kinds=vocabulary.kinds() if "kind" in names else np.zeros(0, np.int64))
        bits = Bits(len(stream.token_id))
        for part, first in _parts(stream, hashes, at_once):
            mask = condition.mask(tree, part)
            if stream.longest is not None:
                mask &= part.position < stream.longest
            if self.per_document is not None:
                mask = _some(part, mask, self.per_document)
            bits.put(first, mask)
        return bits


class _Condition:
    """Evaluates the tree of a condition."""

    def __init__(self, vocabulary: Vocabulary, *, kinds: Int[np.ndarray, " vocabulary"]) -> None:
        self._vocabulary, self._kinds = vocabulary, kinds

    def mask(self, node: ast.expr, part: Part) -> Mask:
        """Where the condition holds."""
        if isinstance(node, ast.BoolOp):
            masks = [self.mask(value, part) for value in node.values]
            combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(combine.reduce(masks))
        if isinstance(node, ast.UnaryOp):
            return ~self.mask(node.operand, part)
        if isinstance(node, ast.Name):
            return self._named(node.id, part, [], 0)
        call = cast(ast.Call, node)  # nothing else is in a tree that is sound
        given = [ast.literal_eval(argument) for argument in call.args]
        seed = next((ast.literal_eval(keyword.value) for keyword in call.keywords), 0)
        return self._named(cast(ast.Name, call.func).id, part, given, seed)

    def _named(self, name: str, part: Part, given: list[Any], seed: int) -> Mask:
        position, length = part.position, part.length
        match name:
            case "first":
                return position < (given[0] if given else 1)
            case "last":
                return position >= length - (given[0] if given else 1)
            case "positions":
                return np.isin(position, given) | np.isin(position - length, given)
            case "every":
                return position % given[0] == 0
            case "fraction":
                return part.hashes(seed) >> np.uint64(11) < np.uint64(given[0] * (1 << 53))
            case "prompt" | "completion":
                after = part.token_start >= part.completion_start
                return after if name == "completion" else ~after
            case "tokens":
                return np.isin(part.token_id, [self._token(each) for each in given])
            case "kind":
                return np.isin(self._kinds[part.token_id], [KINDS.index(each) for each in given])
            case _:
                return np.ones(len(position), bool)

    def _token(self, given: int | str) -> int:
        """The id of a token."""
        count = len(self._vocabulary.pieces)
        found = self._vocabulary.encode(given) if isinstance(given, str) else [given]
        if len(found) != 1 or not 0 <= found[0] < count:
            what = f"{len(found)} tokens {found}" if isinstance(given, str) else f"token {given}"
            raise InputError(
                f"tokens({given!r}) is {what}; expected one token, an id of 0 to {count - 1} or its text; correct the "
                "rows"
            )
        return found[0]


def _parts(stream: Stream, hashes: UInt64[np.ndarray, " document"], at_once: int) -> Iterator[tuple[Part, int]]:
    """Whole documents with so many tokens together, and their first token."""
    offsets, first = stream.token_offsets, 0
    while first < len(offsets) - 1:
        last = max(int(np.searchsorted(offsets, offsets[first] + at_once, side="right")) - 1, first + 1)
        here = slice(int(offsets[first]), int(offsets[last]))
        counts = np.diff(offsets[first : last + 1])
        document = np.repeat(np.arange(first, last), counts)
        lengths = counts if stream.longest is None else np.minimum(counts, stream.longest)
        begins = np.zeros(len(offsets) - 1, np.int64) if stream.completion_start is None else stream.completion_start
        part = Part(
            document,
            np.arange(here.start, here.stop) - offsets[document],
            np.repeat(lengths, counts),
            stream.token_id[here],
            stream.token_start[here],
            begins[document],
            hashes[document],
        )
        yield part, here.start
        first = last


def _some(part: Part, mask: Mask, most: int) -> Mask:
    """At most so many tokens of each document: those with the lowest hashes."""
    places = np.flatnonzero(mask)
    documents = part.document[places]
    order = np.lexsort((part.hashes(0)[places], documents))
    sorted_documents = documents[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_documents, sorted_documents)
    kept = np.zeros(len(mask), bool)
    kept[places[order[rank < most]]] = True
    return kept
