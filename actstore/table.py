"""The documents a store's rows come from: ids, texts, user columns, and all tokens with their places in the text.

Stored as flat arrays with offsets, because TensorStore cannot read Zarr strings. The token stream is kept whole, even
when few of its tokens are stored as rows, so that every row can be shown in its context without a tokenizer.
"""

import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64, Shaped, UInt32

from actstore.errors import CorruptStoreError, InputError, PlanMismatchError, UnknownNameError
from actstore.kvstore import Root
from actstore.layout import check_name
from actstore.markers import TABLE_KEY, checksum, key_in, write_table_marker
from actstore.metadata import TABLE_CHUNK_BYTES, table_group, table_groups, table_metadata
from actstore.objects import Objects
from actstore.schema import FORMAT, DocumentTableLayout, Plan, TableMarker
from actstore.strings import Strings

MAX_READ_BYTES = 64 << 20  # of texts or tokens at once; as Python's strings they may take four times as much
TOKEN_BYTES = 12  # id, start and end
IDS_AT_ONCE = 10_000
TOKENS_AT_ONCE = 1 << 22  # looked at together
WRITTEN_AT_ONCE = 32  # chunks
EDGES = 1 << 19  # offsets or numbers that are read together: one chunk
GAP_BYTES = 256  # between two texts that are read together: less than what another read costs
EDGE_BLOCKS = 32  # kept: 128 MiB, of 16 million documents
ColumnValues = (
    Sequence[int] | Sequence[float] | Sequence[str] | Int64[np.ndarray, " document"] | Float64[np.ndarray, " document"]
)
TAKEN = frozenset({"id", "text", "token_id", "token_start", "token_end", "token_offsets"})


@dataclasses.dataclass(frozen=True)
class DocumentTable:
    """Documents, ready to be stored. Costs about the size of the texts plus 12 bytes per token.

    That is in memory; the store takes a third to a sixth of it.

    `token_start` and `token_end` are byte positions of each token in the UTF-8 of its document's text. Texts may be
    `actstore.strings.Strings`, and arrays maps of files, of which no more than a part is in memory at once.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    token_offsets: Int64[np.ndarray, " document_edge"]
    token_id: Int32[np.ndarray, " token"]
    token_start: UInt32[np.ndarray, " token"]
    token_end: UInt32[np.ndarray, " token"]
    columns: Mapping[str, ColumnValues] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that all lengths fit together and names are free."""
        count, tokens = len(self.ids), len(self.token_id)
        if not count:
            raise InputError("documents: found none, expected at least one; give some, or no table at all")
        for name, values in {"texts": self.texts, **self.columns}.items():
            if len(values) != count:
                raise InputError(f"documents: {name} has {len(values)} values, expected {count}, one per document")
        if (twice := Strings.of(self.ids).twice()) is not None:
            raise InputError(
                f"documents: ids are not unique, {twice[:80]!r} is there twice; give every document an id of its own"
            )
        edges = self.token_offsets
        if len(edges) != count + 1 or edges[0] != 0 or edges[-1] != tokens or (np.diff(edges) < 0).any():
            raise InputError(
                f"documents: token_offsets has {len(edges)} values, {edges[:1]} to {edges[-1:]}, "
                f"expected {count + 1} that ascend from 0 to the number of tokens, {tokens}"
            )
        for name, dtype in [("token_id", "int32"), ("token_start", "uint32"), ("token_end", "uint32")]:
            found = getattr(self, name)
            if (found.shape, found.dtype) != ((tokens,), np.dtype(dtype)):
                raise InputError(f"documents: {name} is {found.dtype} {found.shape}, expected {dtype} ({tokens},)")
        self._refuse_spans()
        for name in self.columns:
            check_name(name, "document column")
            if name in TAKEN:
                raise InputError(f"documents: column name {name!r} is used by the format itself ({sorted(TAKEN)})")

    def _refuse_spans(self) -> None:
        """Refuses tokens outside their text, and documents that are longer than what is read at once."""
        sizes, counts = Strings.of(self.texts).sizes, np.diff(self.token_offsets)
        for first, last in stretches(self.token_offsets, most=TOKENS_AT_ONCE):
            here = slice(int(self.token_offsets[first]), int(self.token_offsets[last]))
            start, end = self.token_start[here], self.token_end[here]
            outside = (start > end) | (end > np.repeat(sizes[first:last], counts[first:last]))
            if outside.any():
                token = here.start + int(np.flatnonzero(outside)[0])
                document = int(np.searchsorted(self.token_offsets, token, side="right")) - 1
                raise InputError(
                    f"documents: token {token - int(self.token_offsets[document])} of document {self.ids[document]!r} "
                    f"has the bytes {int(self.token_start[token])} to {int(self.token_end[token])} of a text of "
                    f"{int(sizes[document])} bytes; give places in the UTF-8 of the text"
                )
        longest = int(max(sizes.max(), counts.max() * TOKEN_BYTES))
        if longest > MAX_READ_BYTES:
            raise InputError(
                f"documents: one has {longest:,} bytes of text or tokens, at most {MAX_READ_BYTES:,} can be read at "
                "once; cut it into several documents"
            )

    @property
    def layout(self) -> DocumentTableLayout:
        """The sizes that go into the plan."""
        strings = {"id": self.ids, "text": self.texts}
        numbers: dict[str, Any] = {}
        for name, values in self.columns.items():
            if isinstance(values, np.ndarray) and values.dtype in (np.int64, np.float64):
                numbers[name] = values.dtype.name
            elif isinstance(values, Strings) or all(isinstance(value, str) for value in values):
                strings[name] = cast("Sequence[str]", values)  # checked in the line above
            elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
                if np.asarray(values).dtype != np.int64:
                    raise InputError(f"documents: column {name!r} has numbers over 64 bits; give them as text")
                numbers[name] = "int64"
            elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                numbers[name] = "float64"
            else:
                kinds = sorted({type(value).__name__ for value in values})
                raise InputError(f"documents: column {name!r} holds {kinds}; expected only text or only numbers")
        names = [*numbers, *(f"{name}_{part}" for name in (*strings, "token") for part in ("bytes", "offsets"))]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f"documents: the arrays {twice} would be there twice; rename the column")
        sizes = {name: int(Strings.of(values).sizes.sum()) for name, values in strings.items()}
        return DocumentTableLayout(
            documents=len(self.ids), tokens=len(self.token_id), numbers=numbers, strings=sizes, codec="zstd"
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the `documents` group by its name."""
        layout = self.layout
        arrays: dict[str, np.ndarray] = {}
        for name in layout.strings:
            values: Any = {"id": self.ids, "text": self.texts}.get(name) or self.columns[name]
            encoded = Strings.of(values)
            arrays[f"{name}_bytes"], arrays[f"{name}_offsets"] = encoded.data, encoded.offsets
        for name, dtype in layout.numbers.items():
            arrays[name] = np.asarray(self.columns[name], dtype)
        return arrays | {
            "token_offsets": self.token_offsets,
            "token_id": self.token_id,
            "token_start": self.token_start,
            "token_end": self.token_end,
        }


def write_table(root: Root, plan: Plan, table: DocumentTable) -> None:
    """Stores the documents and then their marker, unless they are stored already.

    Raises:
        InputError: the table is not the one the plan was made for.
        PlanMismatchError: other documents of the same sizes are stored.
    """
    if table.layout != plan.documents:
        raise InputError(
            f"documents: found {table.layout}, the plan has {plan.documents}; make a plan of these documents"
        )
    metadata = {name: _in_whole_chunks(each) for name, each in table_metadata(table.layout).items()}
    arrays = table.arrays()
    checksums = {name: checksum(values) for name, values in arrays.items()}
    key, where = key_in(plan.generation, TABLE_KEY), table_group(plan.generation)
    stored = root.read(key)
    if stored is not None:
        if TableMarker.from_json(stored, where=f"{root.url}/{key}").checksums != checksums:
            raise PlanMismatchError(
                f"{root.url} holds other documents of the same sizes; choose another target, or give those it holds"
            )
        return
    for group in _groups(arrays):  # it may be larger than memory
        pending = []
        for name, first, part in group:
            (chunk,) = metadata[name]["chunk_grid"]["configuration"]["chunk_shape"]
            values = np.pad(part, (0, -len(part) % chunk))
            target = root.open_array(f"{where}/{name}", metadata[name])[first : first + len(values)]
            start = functools.partial(target.write, values)
            pending.append(root.begin(f"write documents of {root.url}", start, size=values.nbytes))
        for writing in pending:
            writing.result()
    write_table_marker(root, plan, TableMarker(format=FORMAT, fingerprint=plan.fingerprint, checksums=checksums))


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


def _in_whole_chunks(metadata: dict[str, Any]) -> dict[str, Any]:
    """An array that ends with its last object: of a part of one, TensorStore would read what is there before."""
    (size,), (chunk,) = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return metadata | {"shape": [-(-size // chunk) * chunk]}


def _groups(arrays: Mapping[str, np.ndarray]) -> Iterator[list[tuple[str, int, np.ndarray]]]:
    """(name, first item, items) of whole chunks of arrays, so many at once as are written together."""
    group: list[tuple[str, int, np.ndarray]] = []
    for name, values in arrays.items():
        step = TABLE_CHUNK_BYTES // values.itemsize
        for first in range(0, len(values), step):
            group.append((name, first, values[first : first + step]))
            if len(group) == WRITTEN_AT_ONCE:
                yield group
                group = []
    yield group


def stretches(token_offsets: Int64[np.ndarray, " document_edge"], *, most: int) -> Iterator[tuple[int, int]]:
    """(first, one past last) documents that have `most` tokens together or fewer, or are one document with more."""
    first, count = 0, len(token_offsets) - 1
    while first < count:
        last = int(np.searchsorted(token_offsets, int(token_offsets[first]) + most, side="right")) - 1
        last = min(max(last, first + 1), count)
        yield first, last
        first = last
