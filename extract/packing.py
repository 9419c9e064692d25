"""Packs documents into contexts of one fixed length, so that one compiled program serves all and little is padding.

`best-fit`: pieces are placed into the context whose free space they fill most nearly, and attention sees one piece at a
time, by its segment id. A document that fits is never cut; a longer one is cut into pieces of `context` tokens.
`best-fit-decreasing`: the same, the longest pieces first: less padding where documents are about as long as contexts,
and documents that follow each other lie apart.
`auto`: `best-fit`, or where more than 2 % would be padding, the one of both that needs fewer contexts.
`single`: every piece has a context of its own.
`concatenated`: the documents follow each other in one stream that is cut into contexts; attention sees all of a
context, as libraries that train SAEs on the fly have it.

Where only some tokens are kept as rows, nothing is computed that no kept row depends on: pieces without rows are left
out, and a piece ends with its last row. Attention looks back only.
"""

import dataclasses
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from extract.bits import Bits

Kind = Literal["best-fit", "best-fit-decreasing", "single", "concatenated"]
Choice = Kind | Literal["auto"]
USEFUL = 0.98  # share of places that hold a token: with less, `auto` tries the longest pieces first
_TOKENS_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Some consecutive contexts, ready for the model. Segment 0 is padding; positions start at 0 in each segment."""

    token_ids: Int32[np.ndarray, "batch context"]
    segment_ids: Int32[np.ndarray, "batch context"]
    positions: Int32[np.ndarray, "batch context"]
    kept: Bool[np.ndarray, "batch context"]
    documents: Int32[np.ndarray, " row"]
    document_positions: Int32[np.ndarray, " row"]

    @property
    def filled(self) -> Bool[np.ndarray, "batch context"]:
        """Where there is a token. Rows are those places of them that are kept, context by context."""
        return self.segment_ids > 0


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where every piece of every document lies. Pieces are sorted by context and by place in it.

    Rows (samples) are numbered in that order. Costs 16 bytes per piece.

    Attributes:
        context: Tokens of a context.
        piece_document: Document of each piece.
        piece_position: Its first token in the document.
        piece_tokens: How many tokens it has.
        piece_rows: How many of them are kept.
        first_piece: First piece of each context, and the number of pieces.
        kind: How pieces were placed.
        begin: A token that stands at the beginning of every context and is no row; None for none.
    """

    context: int
    piece_document: Int32[np.ndarray, " piece"]
    piece_position: Int32[np.ndarray, " piece"]
    piece_tokens: Int32[np.ndarray, " piece"]
    piece_rows: Int32[np.ndarray, " piece"]
    first_piece: Int64[np.ndarray, " context_edge"]
    kind: Kind
    begin: int | None = None

    @property
    def joined(self) -> bool:
        """Whether attention sees the whole context, and not one piece at a time."""
        return self.kind == "concatenated"

    @property
    def contexts(self) -> int:
        """Number of contexts."""
        return len(self.first_piece) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens in all contexts."""
        return int(self.piece_tokens.sum(dtype=np.int64))

    @property
    def rows(self) -> int:
        """Number of tokens that are kept."""
        return int(self.piece_rows.sum(dtype=np.int64))

    @property
    def useful_share(self) -> float:
        """Share of computed places that hold a token."""
        return self.tokens / (self.contexts * self.context)

    def row_edges(self) -> Int64[np.ndarray, " context_edge"]:
        """First row of each context, and the number of rows at the end."""
        ends = np.concatenate([[0], np.cumsum(self.piece_rows, dtype=np.int64)])
        return ends[self.first_piece]

    def take(
        self,
        first: int,
        batch: int,
        *,
        token_offsets: Int64[np.ndarray, " edge"],
        token_id: Int32[np.ndarray, " token"],
        kept: Bits | None = None,
    ) -> Contexts:
        """Contexts first..first+batch-1; those past the last one are all padding."""
        shape = (batch, self.context)
        ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        rows = np.zeros(shape, bool)
        documents, places = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for row in range(min(batch, self.contexts - first)):
            offset = 0
            if self.begin is not None:
                ids[row, 0], segments[row, 0], offset = self.begin, 1, 1
            pieces = range(int(self.first_piece[first + row]), int(self.first_piece[first + row + 1]))
            for segment, piece in enumerate(pieces, start=1):
                document, start = int(self.piece_document[piece]), int(self.piece_position[piece])
                tokens = int(self.piece_tokens[piece])
                where = (row, slice(offset, offset + tokens))
                source = int(token_offsets[document]) + start
                ids[where] = token_id[source : source + tokens]
                segments[where] = 1 if self.joined else segment
                positions[where] = np.arange(tokens) + (offset if self.joined else 0)
                mask = np.ones(tokens, bool) if kept is None else kept.take(source, source + tokens)
                rows[where] = mask
                documents.append(np.full(np.count_nonzero(mask), document, np.int32))
                places.append((start + np.flatnonzero(mask)).astype(np.int32))
                offset += tokens
        return Contexts(ids, segments, positions, rows, np.concatenate(documents), np.concatenate(places))


def pack(
    lengths: Sequence[int] | Int[np.ndarray, " document"],
    context: int,
    *,
    kind: Choice = "auto",
    kept: Bits | None = None,
    begin: int | None = None,
) -> Packing:
    """Places documents of the given lengths (in tokens, each at least 1) into contexts of `context` tokens.

    Args:
        lengths: of the documents.
        context: tokens of a context.
        kind: see the module.
        kept: which tokens of all documents become rows; None keeps all.
        begin: a token to begin every context with; of `concatenated` alone.

    Deterministic. Costs about a microsecond and 30 bytes per piece; `auto` twice that where it tries both ways.
    """
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
    if kind == "concatenated":
        return _concatenated(offsets, context, kept, begin)
    documents, positions, tokens = _pieces(offsets, context)
    rows = tokens
    if kept is not None:
        starts = offsets[documents] + positions
        rows, tokens = _rows_of(starts, tokens, kept)
        there = rows > 0
        documents, positions, tokens, rows = documents[there], positions[there], tokens[there], rows[there]
    if kind == "single":
        return Packing(context, documents, positions, tokens, rows, np.arange(len(tokens) + 1), kind)
    targets, count, chosen = _placed(tokens, context, kind)
    order = np.argsort(targets, kind="stable")
    first_piece = np.concatenate([[0], np.cumsum(np.bincount(targets, minlength=count))]).astype(np.int64)
    return Packing(context, documents[order], positions[order], tokens[order], rows[order], first_piece, chosen)


Pieces = tuple[Int32[np.ndarray, " piece"], Int32[np.ndarray, " piece"], Int32[np.ndarray, " piece"]]


def _pieces(offsets: Int64[np.ndarray, " edge"], context: int) -> Pieces:
    """Document, position and tokens of every piece, document by document."""
    lengths = np.diff(offsets)
    counts = -(-lengths // context)
    documents = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    firsts = np.cumsum(counts) - counts
    positions = ((np.arange(len(documents)) - firsts[documents]) * context).astype(np.int32)
    return documents, positions, np.minimum(lengths[documents] - positions, context).astype(np.int32)


def _rows_of(
    starts: Int64[np.ndarray, " piece"], tokens: Int32[np.ndarray, " piece"], kept: Bits
) -> tuple[Int32[np.ndarray, " piece"], Int32[np.ndarray, " piece"]]:
    """Number of kept tokens of each piece, and how many tokens it has up to the last of them."""
    rows, needed = np.zeros(len(starts), np.int32), np.zeros(len(starts), np.int32)
    for first, last in _stretches(starts):
        begin, end = int(starts[first]), int(starts[last - 1] + tokens[last - 1])
        mask = kept.take(begin, end)
        local = starts[first:last] - begin
        rows[first:last] = np.add.reduceat(mask, local, dtype=np.int32)
        places = np.where(mask, np.arange(1, len(mask) + 1), 0)
        needed[first:last] = np.maximum(np.maximum.reduceat(places, local) - local, 0)
    return rows, needed


def _stretches(starts: Int64[np.ndarray, " piece"]) -> Iterator[tuple[int, int]]:
    """(first, one past last) pieces that begin within so many tokens."""
    first = 0
    while first < len(starts):
        last = max(int(np.searchsorted(starts, starts[first] + _TOKENS_AT_ONCE)), first + 1)
        yield first, last
        first = last


def _placed(
    tokens: Int32[np.ndarray, " piece"], context: int, kind: Choice
) -> tuple[Int32[np.ndarray, " piece"], int, Kind]:
    """The context of each piece, how many contexts there are, and in which of the two orders pieces were placed."""
    if kind != "best-fit-decreasing":
        targets, count = _best_fit(tokens, context)
        if kind == "best-fit" or tokens.sum(dtype=np.int64) >= USEFUL * count * context:
            return targets, count, "best-fit"
    longest_first = np.argsort(-tokens, kind="stable")
    others, fewer = _best_fit(tokens[longest_first], context)
    if kind == "auto" and fewer >= count:
        return targets, count, "best-fit"
    spread = np.empty_like(others)
    spread[longest_first] = others
    return spread, fewer, "best-fit-decreasing"


def _best_fit(tokens: Int32[np.ndarray, " piece"], context: int) -> tuple[Int32[np.ndarray, " piece"], int]:
    """The context of each piece, and how many contexts there are."""
    targets = array("i")
    open_contexts: list[list[int]] = [[] for _ in range(context + 1)]  # by free space
    spaces = 0  # bit s is set where a context with s free places is open
    count = 0
    for needed in memoryview(tokens.data):
        fitting = spaces >> needed
        if fitting:
            space = needed + ((fitting & -fitting).bit_length() - 1)
            target = open_contexts[space].pop()
            if not open_contexts[space]:
                spaces ^= 1 << space
        else:
            space, target = context, count
            count += 1
        left = space - needed
        if left:
            open_contexts[left].append(target)
            spaces |= 1 << left
        targets.append(target)
    return np.frombuffer(targets, np.int32) if count else np.zeros(0, np.int32), count


def _concatenated(offsets: Int64[np.ndarray, " edge"], context: int, kept: Bits | None, begin: int | None) -> Packing:
    """Windows of one stream. Of those without rows nothing is computed."""
    size, total = context - (begin is not None), int(offsets[-1])
    windows = np.arange(0, total, size)
    starts = np.union1d(offsets[:-1], windows)
    documents = (np.searchsorted(offsets, starts, side="right") - 1).astype(np.int32)
    tokens = np.diff(np.append(starts, total)).astype(np.int32)
    first_piece = np.append(np.searchsorted(starts, windows), len(starts))
    rows = tokens if kept is None else _rows_of(starts, tokens, kept)[0]
    positions = (starts - offsets[documents]).astype(np.int32)
    if kept is not None:
        there = np.add.reduceat(rows, first_piece[:-1]) > 0
        pieces = np.repeat(there, np.diff(first_piece))
        documents, positions, tokens, rows = documents[pieces], positions[pieces], tokens[pieces], rows[pieces]
        first_piece = np.concatenate([[0], np.cumsum(np.diff(first_piece)[there])])
    return Packing(context, documents, positions, tokens, rows, first_piece, "concatenated", begin)
