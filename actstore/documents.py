"""The documents of a store, read as they are asked for: ids, texts, columns, tokens. `actstore.table` stores them."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped, UInt32

from actstore.commits import TableMarker
from actstore.errors import CorruptStoreError, InputError, UnknownNameError
from actstore.kvstore import Root
from actstore.markers import TABLE_KEY, checksum, key_in
from actstore.metadata import table_group, table_groups, table_metadata
from actstore.objects import Objects
from actstore.schema import DocumentTableLayout, Plan
from actstore.table import MAX_READ_BYTES, TOKEN_BYTES, DocumentTable

IDS_AT_ONCE = 10_000
EDGES = 1 << 19  # offsets or numbers that are read together: one chunk
GAP_BYTES = 256  # between two texts that are read together: less than what another read costs
EDGE_BLOCKS = 32  # kept: 128 MiB, of 16 million documents


def refuse_known_ids(root: Root, base: Plan, table: DocumentTable) -> None:
    """Refuses to append documents under ids that the store holds. Costs reading all its ids.

    Raises:
        InputError: names one of them.
    """
    there, given = StoredDocuments(root, base), set(table.ids)
    twice: list[str] = []
    for first in range(0, len(there), IDS_AT_ONCE):
        twice += given.intersection(there.strings("id", np.arange(first, min(first + IDS_AT_ONCE, len(there)))))
    twice.sort()
    if twice:
        raise InputError(
            f"{len(twice)} of the documents to append are in the store, first {twice[0]!r}; append only others"
        )


def stored_tokens(
    root: Root, plan: Plan
) -> tuple[Int64[np.ndarray, " document_edge"], Int32[np.ndarray, " token"], UInt32[np.ndarray, " token"]]:
    """Offsets, ids and first bytes of all tokens of the documents of one plan, compared with their marker.

    Costs 8 bytes per document and per token.

    Raises:
        CorruptStoreError: they are missing or damaged.
    """
    key, group = key_in(plan.generation, TABLE_KEY), table_group(plan.generation)
    data = root.read(key)
    if data is None or plan.documents is None:
        raise CorruptStoreError(f"{root.url}/{key} is missing; run `actstore verify`")
    marker = TableMarker.from_json(data, where=f"{root.url}/{key}")
    metadata, found = table_metadata(plan.documents), []
    for name in ("token_offsets", "token_id", "token_start"):
        objects = Objects.of(root, f"{group}/{name}", metadata[name])
        values = np.asarray(objects.begin(f"read {group}/{name} of {root.url}").result())
        if checksum(values) != marker.checksums.get(name):
            raise CorruptStoreError(
                f"{group}/{name} of {root.url} differs from the checksum of its marker; run `actstore verify`"
            )
        found.append(values)
    return found[0], found[1], found[2]


class StoredDocuments:
    """The documents of a store, read as they are asked for. Offsets (16 bytes per document) are kept once read.

    Appended documents follow those that were there: their numbers go on.
    """

    def __init__(self, root: Root, plan: Plan) -> None:
        self._parts = [_Part(root, group, layout) for group, layout in table_groups(plan).items()]
        self._edges = np.cumsum([0, *map(len, self._parts)])

    def __len__(self) -> int:
        """Number of documents."""
        return int(self._edges[-1])

    def __repr__(self) -> str:
        tokens = sum(part.tokens_stored for part in self._parts)
        return f"{len(self):,} documents of {tokens:,} tokens, with the columns {', '.join(self.columns)}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, `id` and `text` among them."""
        return self._parts[0].columns

    def strings(self, column: str, documents: Sequence[int] | Int[np.ndarray, " n"] | None = None) -> list[str]:
        """Values of a text column of some documents, or of all.

        Costs one range read per document, or per run of neighbours.

        Raises:
            UnknownNameError: no such text column.
            InputError: a document does not exist.
            CorruptStoreError: the offsets or the bytes are damaged.
        """
        wanted = self._wanted(documents)
        found = [""] * len(wanted)
        for part, places, local in self._by_part(wanted):
            for place, value in zip(places, part.strings(column, local), strict=True):
                found[place] = value
        return found

    def numbers(self, column: str, documents: Sequence[int] | Int[np.ndarray, " n"] | None = None) -> np.ndarray:
        """Values of a number column of some documents, or of all.

        Raises:
            UnknownNameError: no such number column.
            InputError: a document does not exist.
        """
        parts = list(self._by_part(self._wanted(documents)))
        values = [part.numbers(column, local) for part, _, local in parts]
        order = np.argsort(np.concatenate([places for _, places, _ in parts]))
        return np.concatenate(values)[order]

    def tokens(self, document: int) -> tuple[Int32[np.ndarray, " token"], UInt32[np.ndarray, "token edge"]]:
        """Token ids of a document, and the [start, end) bytes of each in its text.

        Raises:
            InputError: the document does not exist.
        """
        ((part, _, local),) = self._by_part(np.array([document]))
        return part.tokens(int(local[0]))

    def _wanted(self, documents: Sequence[int] | Int[np.ndarray, " n"] | None) -> Shaped[np.ndarray, " n"]:
        if documents is None:
            return np.arange(len(self))
        found = np.asarray(documents)
        return np.arange(0) if isinstance(documents, Sequence) and not found.size else found

    def _by_part(
        self, documents: Int[np.ndarray, " n"]
    ) -> Iterator[tuple["_Part", Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]]:
        """Each part that is asked for, with the places in `documents` and the numbers inside the part."""
        if documents.dtype.kind not in "iu":
            raise InputError(f"documents are numbers of type {documents.dtype}; expected whole numbers")
        if len(documents) and not (documents.min() >= 0 and documents.max() < len(self)):
            raise InputError(
                f"documents {documents.min()} to {documents.max()} asked for; this store has 0 to {len(self) - 1}"
            )
        owner = np.searchsorted(self._edges, documents, side="right") - 1
        for number in np.unique(owner) if len(documents) else [0]:  # none asked for: names are checked all the same
            places = np.flatnonzero(owner == number)
            yield self._parts[number], places, documents[places].astype(np.int64) - self._edges[number]


class _Part:
    """The documents of one generation: one group of the store."""

    def __init__(self, root: Root, group: str, layout: DocumentTableLayout) -> None:
        self._root = root
        self._group = group
        self._layout = layout
        self._metadata = table_metadata(layout)
        self._offsets: dict[tuple[str, int], np.ndarray] = {}

    def __len__(self) -> int:
        """Number of documents."""
        return self._layout.documents

    @property
    def tokens_stored(self) -> int:
        """Number of tokens of all its documents."""
        return self._layout.tokens

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, `id` and `text` among them."""
        return (*self._layout.strings, *self._layout.numbers)

    def strings(self, column: str, documents: Int[np.ndarray, " n"]) -> list[str]:
        """Values of a text column of some documents that are there."""
        _check_name(column, "text", self._layout.strings)
        spans = self._spans(column, documents, self._layout.strings[column], item_bytes=1)
        data = self._open(f"{column}_bytes")
        try:
            reads = [(span, data.begin(self._doing, span)) for span in _joined(spans)]
            pieces = {span.start: bytes(np.asarray(reading.result())) for span, reading in reads}
            starts = sorted(pieces)
            held = [starts[bisect_right(starts, span.start) - 1] for span in spans]
            return [
                pieces[start][span.start - start : span.stop - start].decode()
                for start, span in zip(held, spans, strict=True)
            ]
        except UnicodeDecodeError:
            raise CorruptStoreError(
                f"{self._group}/{column}_bytes of {self._root.url} is not UTF-8; run `actstore verify`"
            ) from None

    def numbers(self, column: str, documents: Int[np.ndarray, " n"]) -> np.ndarray:
        """Values of a number column of some documents that are there."""
        _check_name(column, "number", self._layout.numbers)
        found = np.empty(len(documents), self._layout.numbers[column])
        for number in np.unique(documents // EDGES):
            here = documents // EDGES == number
            found[here] = self._read(column, int(number), len(self))[documents[here] % EDGES]
        return found

    def tokens(self, document: int) -> tuple[Int32[np.ndarray, " token"], UInt32[np.ndarray, "token edge"]]:
        """Token ids of a document that is there, and the [start, end) bytes of each in its text."""
        (span,) = self._spans("token", np.array([document]), self._layout.tokens, item_bytes=TOKEN_BYTES)
        pending = [self._open(name).begin(self._doing, span) for name in ("token_id", "token_start", "token_end")]
        ids, start, end = (reading.result() for reading in pending)
        return np.asarray(ids), np.stack([start, end], axis=1)

    def _spans(self, column: str, documents: Int[np.ndarray, " n"], size: int, *, item_bytes: int) -> list[slice]:
        """Where the values of some documents lie among the `size` values of a column.

        Raises:
            CorruptStoreError: the offsets do not ascend from 0 to the number of values.
            InputError: the documents have more bytes than are read at once.
        """
        edges = np.array([self._edge_pair(column, int(document)) for document in documents], np.int64).reshape(-1, 2)
        start, stop = edges.T
        if (start < 0).any() or (stop < start).any() or (stop > size).any():
            raise self._bad_offsets(column)
        found = sum(map(int, stop - start)) * item_bytes
        if found > MAX_READ_BYTES:
            raise InputError(
                f"{len(documents)} documents have {found:,} bytes in {self._group}/{column}_offsets of "
                f"{self._root.url}, at most {MAX_READ_BYTES:,} are read at once; ask for fewer documents"
            )
        return [slice(int(first), int(last)) for first, last in edges]

    def _edge_pair(self, column: str, document: int) -> tuple[int, int]:
        """First and one-past-last value of one document."""
        first, last = (self._edge_block(column, edge // EDGES)[edge % EDGES] for edge in (document, document + 1))
        return int(first), int(last)

    def _edge_block(self, column: str, number: int) -> Int64[np.ndarray, " document_edge"]:
        """Some neighbouring offsets, kept once read; those read first are dropped where there are many."""
        if (column, number) not in self._offsets:
            edges = self._read(f"{column}_offsets", number, len(self) + 1)
            if (number == 0 and edges[0] != 0) or (edges[1:] < edges[:-1]).any():
                raise self._bad_offsets(column)
            while len(self._offsets) >= EDGE_BLOCKS:
                self._offsets.pop(next(iter(self._offsets)))
            self._offsets[column, number] = edges
        return self._offsets[column, number]

    def _bad_offsets(self, column: str) -> CorruptStoreError:
        return CorruptStoreError(
            f"{self._group}/{column}_offsets of {self._root.url} does not ascend from 0 to the size of its column; "
            "run `actstore verify`"
        )

    def _read(self, name: str, number: int, size: int) -> np.ndarray:
        """One chunk of an array of `size` values of 8 bytes."""
        span = slice(number * EDGES, min((number + 1) * EDGES, size))
        return np.asarray(self._open(name).begin(self._doing, span).result())

    @property
    def _doing(self) -> str:
        return f"read documents of {self._root.url}"

    def _open(self, name: str) -> Objects:
        return Objects.of(self._root, f"{self._group}/{name}", self._metadata[name])


def _joined(spans: Iterable[slice]) -> list[slice]:
    """Stretches that hold all of some spans, ascending: near neighbours are read together."""
    joined: list[slice] = []
    for span in sorted(spans, key=lambda span: (span.start, span.stop)):
        if joined and span.start <= joined[-1].stop + GAP_BYTES:
            joined[-1] = slice(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def _check_name(column: str, kind: str, known: Mapping[str, object]) -> None:
    if column not in known:
        raise UnknownNameError(
            f"{kind} column {column!r} is not in the documents; there are {', '.join(known) or 'none'}"
        )
