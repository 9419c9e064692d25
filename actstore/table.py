"""The documents a store's rows come from: ids, texts, user columns, and all tokens with their places in the text.

Stored as flat arrays with offsets, because TensorStore cannot read Zarr strings. The token stream is kept whole, even
when few of its tokens are stored as rows, so that every row can be shown in its context without a tokenizer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt32

from actstore.errors import CorruptStoreError, InputError, PlanMismatchError, UnknownNameError
from actstore.kvstore import Root, storage_errors
from actstore.layout import check_name
from actstore.ledger import TABLE_KEY, checksum, write_table_marker
from actstore.metadata import table_metadata
from actstore.schema import FORMAT, DocumentTableLayout, Plan, TableMarker

TAKEN = frozenset({"id", "text", "token_id", "token_start", "token_end", "token_offsets"})


@dataclasses.dataclass(frozen=True)
class DocumentTable:
    """Documents in memory, ready to be stored. Costs about the size of the texts plus 12 bytes per token.

    `token_start` and `token_end` are byte positions of each token in the UTF-8 of its document's text.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    token_offsets: Int64[np.ndarray, " document_edge"]
    token_id: Int32[np.ndarray, " token"]
    token_start: UInt32[np.ndarray, " token"]
    token_end: UInt32[np.ndarray, " token"]
    columns: Mapping[str, Sequence[int] | Sequence[float] | Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that all lengths fit together and names are free."""
        count, tokens = len(self.ids), len(self.token_id)
        if not count:
            raise InputError("documents: found none, expected at least one; give some, or no table at all")
        for name, values in {"texts": self.texts, **self.columns}.items():
            if len(values) != count:
                raise InputError(f"documents: {name} has {len(values)} values, expected {count}, one per document")
        if len(set(self.ids)) != count:
            raise InputError("documents: ids are not unique; give every document an id of its own")
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
        for name in self.columns:
            check_name(name, "document column")
            if name in TAKEN:
                raise InputError(f"documents: column name {name!r} is used by the format itself ({sorted(TAKEN)})")

    @property
    def layout(self) -> DocumentTableLayout:
        """The sizes that go into the plan."""
        strings = {"id": self.ids, "text": self.texts}
        numbers: dict[str, Any] = {}
        for name, values in self.columns.items():
            if all(isinstance(value, str) for value in values):
                strings[name] = values  # type: ignore[assignment]  # checked in the line above
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
        sizes = {name: sum(map(len, map(_encoded, values))) for name, values in strings.items()}
        return DocumentTableLayout(
            documents=len(self.ids), tokens=len(self.token_id), numbers=numbers, strings=sizes
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the `documents` group by its name."""
        layout = self.layout
        arrays: dict[str, np.ndarray] = {}
        for name in layout.strings:
            values: Any = {"id": self.ids, "text": self.texts}.get(name) or self.columns[name]
            encoded = [_encoded(value) for value in values]
            arrays[f"{name}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
            arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
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
    metadata = table_metadata(table.layout)
    arrays = table.arrays()
    checksums = {name: checksum(values) for name, values in arrays.items()}
    stored = root.read(TABLE_KEY)
    if stored is not None:
        if TableMarker.from_json(stored, where=f"{root.url}/{TABLE_KEY}").checksums != checksums:
            raise PlanMismatchError(
                f"{root.url} holds other documents of the same sizes; choose another target, or give those it holds"
            )
        return
    with storage_errors(f"write documents of {root.url}"):
        opened = {name: root.open_array(f"documents/{name}", metadata[name]) for name in arrays}
        for future in [opened[name].write(values) for name, values in arrays.items()]:
            future.result()
    write_table_marker(root, TableMarker(format=FORMAT, fingerprint=plan.fingerprint, checksums=checksums))


class StoredDocuments:
    """The documents of a store, read as they are asked for. Offsets (16 bytes per document) are kept once read."""

    def __init__(self, root: Root, layout: DocumentTableLayout) -> None:
        self._root = root
        self._layout = layout
        self._metadata = table_metadata(layout)
        self._offsets: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of documents."""
        return self._layout.documents

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, `id` and `text` among them."""
        return (*self._layout.strings, *self._layout.numbers)

    def strings(self, column: str, documents: Int[np.ndarray, " n"]) -> list[str]:
        """Values of a text column of some documents. Costs one range read per document.

        Raises:
            UnknownNameError: no such text column.
            InputError: a document does not exist.
            CorruptStoreError: the offsets or the bytes are damaged.
        """
        _check_name(column, "text", self._layout.strings)
        self._check(documents)
        edges = self._edges(column)
        data = self._open(f"{column}_bytes")
        with storage_errors(f"read documents of {self._root.url}"):
            reads = [data[int(edges[document]) : int(edges[document + 1])].read() for document in documents]
            raw = [bytes(np.asarray(future.result())) for future in reads]
        try:
            return [value.decode() for value in raw]
        except UnicodeDecodeError:
            raise CorruptStoreError(
                f"documents/{column}_bytes of {self._root.url} is not UTF-8; run `actstore verify`"
            ) from None

    def numbers(self, column: str, documents: Int[np.ndarray, " n"]) -> np.ndarray:
        """Values of a number column of some documents."""
        _check_name(column, "number", self._layout.numbers)
        self._check(documents)
        return self._read(column)[documents]

    def tokens(self, document: int) -> tuple[Int32[np.ndarray, " token"], UInt32[np.ndarray, "token edge"]]:
        """Token ids of a document, and the [start, end) bytes of each in its text."""
        self._check(np.array([document]))
        edges = self._edges("token")
        span = slice(int(edges[document]), int(edges[document + 1]))
        with storage_errors(f"read documents of {self._root.url}"):
            pending = [self._open(name)[span].read() for name in ("token_id", "token_start", "token_end")]
            ids, start, end = (future.result() for future in pending)
        return np.asarray(ids), np.stack([start, end], axis=1)

    def _check(self, documents: Int[np.ndarray, " n"]) -> None:
        if len(documents) and not (documents.min() >= 0 and documents.max() < len(self)):
            raise InputError(
                f"documents {documents.min()} to {documents.max()} asked for; this store has 0 to {len(self) - 1}"
            )

    def _edges(self, column: str) -> Int64[np.ndarray, " document_edge"]:
        if column not in self._offsets:
            edges = self._read(f"{column}_offsets")
            if edges[0] != 0 or (np.diff(edges) < 0).any():
                raise CorruptStoreError(
                    f"documents/{column}_offsets of {self._root.url} does not ascend from 0; run `actstore verify`"
                )
            self._offsets[column] = edges
        return self._offsets[column]

    def _read(self, name: str) -> np.ndarray:
        with storage_errors(f"read documents of {self._root.url}"):
            return np.asarray(self._open(name).read().result())

    def _open(self, name: str) -> Any:
        return self._root.open_array(f"documents/{name}", self._metadata[name])


def _check_name(column: str, kind: str, known: Mapping[str, object]) -> None:
    if column not in known:
        raise UnknownNameError(
            f"{kind} column {column!r} is not in the documents; there are {', '.join(known) or 'none'}"
        )


def _encoded(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"documents: {value[:40]!r} holds half of a surrogate pair; expected whole characters"
        ) from None
