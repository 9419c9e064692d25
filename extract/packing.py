"""Packs documents into contexts of one fixed length, so that one compiled program serves all and little is padding.

A document that fits is never cut; a longer one is cut into pieces of `context` tokens. Pieces are placed by best fit:
into the context whose free space they fill most nearly. Attention sees one piece at a time, by its segment id.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Some consecutive contexts, ready for the model. Segment 0 is padding; positions start at 0 in each piece."""

    token_ids: Int32[np.ndarray, "batch context"]
    segment_ids: Int32[np.ndarray, "batch context"]
    positions: Int32[np.ndarray, "batch context"]
    documents: Int32[np.ndarray, " row"]
    document_positions: Int32[np.ndarray, " row"]

    @property
    def filled(self) -> Bool[np.ndarray, "batch context"]:
        """Where there is a token. Rows are these places, context by context."""
        return self.segment_ids > 0


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where every piece of every document lies. Pieces are sorted by context and by place in it.

    Rows (samples) are numbered in that order. Costs 20 bytes per piece.
    """

    context: int
    piece_document: Int32[np.ndarray, " piece"]
    piece_position: Int32[np.ndarray, " piece"]
    piece_tokens: Int32[np.ndarray, " piece"]
    first_piece: Int64[np.ndarray, " context_edge"]

    @property
    def contexts(self) -> int:
        """Number of contexts."""
        return len(self.first_piece) - 1

    @property
    def rows(self) -> int:
        """Number of tokens in all contexts."""
        return int(self.piece_tokens.sum(dtype=np.int64))

    @property
    def useful_share(self) -> float:
        """Share of computed places that hold a token."""
        return self.rows / (self.contexts * self.context)

    def row_edges(self) -> Int64[np.ndarray, " context_edge"]:
        """First row of each context, and the number of rows at the end."""
        ends = np.concatenate([[0], np.cumsum(self.piece_tokens, dtype=np.int64)])
        return ends[self.first_piece]

    def take(
        self,
        first: int,
        batch: int,
        *,
        token_offsets: Int64[np.ndarray, " edge"],
        token_id: Int32[np.ndarray, " token"],
    ) -> Contexts:
        """Contexts first..first+batch-1; those past the last one are all padding."""
        shape = (batch, self.context)
        ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
        documents, places = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for row in range(min(batch, self.contexts - first)):
            offset = 0
            pieces = range(int(self.first_piece[first + row]), int(self.first_piece[first + row + 1]))
            for segment, piece in enumerate(pieces, start=1):
                document, start = int(self.piece_document[piece]), int(self.piece_position[piece])
                tokens = int(self.piece_tokens[piece])
                where = (row, slice(offset, offset + tokens))
                source = int(token_offsets[document]) + start
                ids[where] = token_id[source : source + tokens]
                segments[where] = segment
                positions[where] = np.arange(tokens)
                documents.append(np.full(tokens, document, np.int32))
                places.append(np.arange(start, start + tokens, dtype=np.int32))
                offset += tokens
        return Contexts(ids, segments, positions, np.concatenate(documents), np.concatenate(places))


def pack(lengths: Sequence[int] | Int[np.ndarray, " document"], context: int) -> Packing:
    """Places documents of the given lengths (in tokens, each at least 1) into contexts of `context` tokens.

    Deterministic. Costs O(1) time per piece and one list entry per context that is not full.
    """
    pieces: list[tuple[int, int, int, int]] = []  # context, document, position, tokens
    open_contexts: list[list[int]] = [[] for _ in range(context + 1)]  # by free space
    spaces = 0  # bit s is set where a context with s free places is open
    count = 0
    for document, length in enumerate(np.asarray(lengths).tolist()):
        for position in range(0, length, context):
            tokens = min(context, length - position)
            fitting = spaces >> tokens
            if fitting:
                space = tokens + ((fitting & -fitting).bit_length() - 1)
                target = open_contexts[space].pop()
                if not open_contexts[space]:
                    spaces ^= 1 << space
            else:
                space, target = context, count
                count += 1
            left = space - tokens
            if left:
                open_contexts[left].append(target)
                spaces |= 1 << left
            pieces.append((target, document, position, tokens))
    table = np.asarray(pieces, np.int64).reshape(-1, 4)
    table = table[np.argsort(table[:, 0], kind="stable")]
    first_piece = np.searchsorted(table[:, 0], np.arange(count + 1))
    documents, positions, sizes = (np.ascontiguousarray(table[:, column], np.int32) for column in (1, 2, 3))
    return Packing(context, documents, positions, sizes, first_piece.astype(np.int64))
