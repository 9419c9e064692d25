"""Small stores whose every value is known: what tests and their subprocesses write, and independent ways to look."""

import dataclasses
import itertools
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

import actstore
from actstore import Column, DocumentTable, Layout, Plan, Site, Writer
from actstore.layout import DEFAULT_COLUMNS

TEXTS = (
    "A plain sentence in ASCII, long enough for a window of tokens on both of its sides.",
    "Grüße aus Köln: Straße, Maß, Öl: „schön“.",
    "日本語のテキスト、そして漢字。",
    "family 👩‍👩‍👧 and flag 🇩🇪, e\u0301 combined, ﷽ wide",
    "x",
)
SITES = (
    Site("resid_post", 6, (2, 5, 11)),
    Site("mlp_out", 4, (2, 5, 11), "float16"),
    Site("attn_out", 6, (5,), "float32"),
    Site("final_norm", 3, None),
)
COLUMNS = (*DEFAULT_COLUMNS, Column("score", "float32"), Column("flag", "uint8"))
LAYOUT = Layout(SITES, samples=53, block_samples=16, chunk_samples=4, columns=COLUMNS)
PROVENANCE = {"model": {"name": "made-up"}, "numbers": [1, 2.5, None, True], "nested": {"a": {"b": "c"}}}


@dataclasses.dataclass(frozen=True, repr=False)
class Contents:
    """All values of a store, in memory."""

    layout: Layout
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    documents: DocumentTable | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PROVENANCE))

    def __repr__(self) -> str:
        return f"Contents({self.layout.samples} samples of {', '.join(self.rows)})"

    @property
    def plan(self) -> Plan:
        return Plan.make(self.layout, self.provenance, self.documents.layout if self.documents else None)

    def block(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Activations and columns of one block, as `Writer.write` takes them."""
        span = slice(*self.layout.block_range(number))
        return {name: rows[..., span, :] for name, rows in self.rows.items()}, {
            name: values[span] for name, values in self.columns.items()
        }

    def create(self, url: str | Path, *, seal: bool = False) -> Writer:
        return actstore.create(url, self.layout, self.provenance, documents=self.documents, seal=seal)

    def write(self, url: str | Path, *, blocks: Iterable[int] | None = None, seal: bool = True) -> Path:
        """Writes some blocks, or all; seals unless told otherwise."""
        with self.create(url, seal=seal) as writer:
            for number in range(self.layout.blocks) if blocks is None else blocks:
                activations, columns = self.block(number)
                writer.write(number, activations, samples=columns)
        return Path(url)


def make_rows(site: Site, samples: int, *, seed: int = 0) -> np.ndarray:
    """Normal rows of a site, in its dtype; the seed and the site's name decide them."""
    shape = (samples, site.width) if site.layers is None else (len(site.layers), samples, site.width)
    generator = np.random.default_rng([seed, zlib.crc32(site.name.encode())])
    return (generator.normal(size=shape) * 7).astype(site.dtype)


def make_documents() -> DocumentTable:
    """Documents with text of one to four bytes per character, cut into tokens of one or two characters.

    The last token of each document is empty: it stands for an end-of-text token.
    """
    spans, counts = [], [0]
    for text in TEXTS:
        edges, sizes = [0], itertools.cycle([1, 2])
        while edges[-1] < len(text):
            edges.append(min(edges[-1] + next(sizes), len(text)))
        edges.append(len(text))
        places = [len(text[:edge].encode()) for edge in edges]
        spans += itertools.pairwise(places)
        counts.append(len(spans))
    start, end = np.array(spans, np.uint32).T.copy()
    return DocumentTable(
        ids=[f"doc-ä{number}" for number in range(len(TEXTS))],
        texts=TEXTS,
        token_offsets=np.array(counts, np.int64),
        token_id=np.arange(1000, 1000 + len(spans), dtype=np.int32),
        token_start=start,
        token_end=end,
        columns={"kind": ["ascii", "deutsch", "日本語", "", "x"], "pages": [3, -1, 0, 2**62, 7],
                 "weight": [0.5, 1, -2.25, 1e300, 0]},
    )  # fmt: skip


def make_contents(layout: Layout = LAYOUT, *, documents: bool = True, seed: int = 0) -> Contents:
    """A store's contents: random rows; samples are some tokens of the documents, in order."""
    rows = {site.name: make_rows(site, layout.samples, seed=seed) for site in layout.sites}
    table = make_documents()
    generator = np.random.default_rng(seed)
    replace = layout.samples > len(table.token_id)
    tokens = np.sort(generator.choice(len(table.token_id), layout.samples, replace=replace))
    document = np.searchsorted(table.token_offsets, tokens, side="right") - 1
    known = {
        "document": document,
        "position": tokens - table.token_offsets[document],
        "token_id": table.token_id[tokens],
        "score": generator.normal(size=layout.samples),
        "flag": tokens % 2,
    }
    columns = {column.name: known[column.name].astype(column.dtype) for column in layout.columns}
    return Contents(layout, rows, columns, table if documents else None)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def raw_tensorstore(folder: Path, name: str) -> ts.TensorStore:
    """An array of a store as TensorStore itself opens it, from nothing but its `zarr.json`."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/{name}/"}}
    return ts.open(spec, open=True).result()
