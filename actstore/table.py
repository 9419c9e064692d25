"""The documents a store's rows come from: ids, texts, user columns, and all tokens with their places in the text.

Stored as flat arrays with offsets, because TensorStore cannot read Zarr strings. The token stream is kept whole, even
when few of its tokens are stored as rows, so that every row can be shown in its context without a tokenizer.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float64, Int32, Int64, UInt32

from actstore.commits import TableMarker
from actstore.errors import InputError, PlanMismatchError
from actstore.kvstore import Root
from actstore.layout import check_name
from actstore.markers import TABLE_KEY, checksum, key_in, write_table_marker
from actstore.metadata import TABLE_CHUNK_BYTES, table_group, table_metadata
from actstore.schema import FORMAT, DocumentTableLayout, Plan
from actstore.strings import Strings

MAX_READ_BYTES = 64 << 20  # of texts or tokens at once; as Python's strings they may take four times as much
TOKEN_BYTES = 12  # id, start and end
TOKENS_AT_ONCE = 1 << 22  # looked at together
WRITTEN_AT_ONCE = 32  # chunks
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
