"""The documents a store's rows come from: ids, texts, user columns, and all tokens with their places in the text.

Stored as flat arrays with offsets, because TensorStore cannot read Zarr strings. The token stream is kept whole, even
when few of its tokens are stored as rows, so that every row can be shown in its context without a tokenizer.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt32

from actstore.errors import CorruptStoreError, InputError
from actstore.kvstore import Root, storage_errors
from actstore.layout import check_name
from actstore.ledger import checksum, has_table, write_table_marker
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
        count = len(self.ids)
        for name, values in {"texts": self.texts, **self.columns}.items():
            if len(values) != count:
                raise InputError(f"documents: {name} has {len(values)} values, expected {count}, one per document")
        if len(set(self.ids)) != count:
            raise InputError("documents: ids are not unique; give every document an id of its own")
        if len(self.token_offsets) != count + 1 or self.token_offsets[-1] != len(self.token_id):
            raise InputError(
                f"documents: token_offsets has {len(self.token_offsets)} values ending in {self.token_offsets[-1]}, "
                f"expected {count + 1} ending in the number of tokens, {len(self.token_id)}"
            )
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
                numbers[name] = "int64"
            elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                numbers[name] = "float64"
            else:
                kinds = sorted({type(value).__name__ for value in values})
                raise InputError(f"documents: column {name!r} holds {kinds}; expected only text or only numbers")
        sizes = {name: sum(len(value.encode()) for value in values) for name, values in strings.items()}
        return DocumentTableLayout(
            documents=len(self.ids), tokens=len(self.token_id), numbers=numbers, strings=sizes
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the `documents` group by its name."""
        layout = self.layout
        arrays: dict[str, np.ndarray] = {}
        for name in layout.strings:
            values: Any = {"id": self.ids, "text": self.texts}.get(name) or self.columns[name]
            encoded = [value.encode() for value in values]
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
    """
    if has_table(root):
        return
    if table.layout != plan.documents:
        raise InputError(
            f"documents: found {table.layout}, the plan has {plan.documents}; make a plan of these documents"
        )
    metadata = table_metadata(table.layout)
    pending, checksums = [], {}
    for name, values in table.arrays().items():
        array = root.open_array(f"documents/{name}", metadata[name])
        pending.append(array.write(values))
        checksums[name] = checksum(values)
    with storage_errors(f"write documents of {root.url}"):
        for future in pending:
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
            CorruptStoreError: the offsets or the bytes are damaged.
        """
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
        return self._read(column)[documents]

    def tokens(self, document: int) -> tuple[Int32[np.ndarray, " token"], UInt32[np.ndarray, "token edge"]]:
        """Token ids of a document, and the [start, end) bytes of each in its text."""
        edges = self._edges("token")
        span = slice(int(edges[document]), int(edges[document + 1]))
        with storage_errors(f"read documents of {self._root.url}"):
            pending = [self._open(name)[span].read() for name in ("token_id", "token_start", "token_end")]
            ids, start, end = (future.result() for future in pending)
        return np.asarray(ids), np.stack([start, end], axis=1)

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
