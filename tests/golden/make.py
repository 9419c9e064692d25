"""Makes the golden stores of format 1, beside this file: `python tests/golden/make.py`.

They are committed once and never made anew for a format that was released: every later version must read them. All
values follow from `values`, so that a test needs nothing but NumPy to know what a store holds.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

import actstore
from actstore import DocumentTable, Layout, Site

SAMPLES, BLOCK, CHUNK = 10, 4, 2
STORES: dict[str, tuple[Site, ...]] = {
    "bfloat16": (Site("resid_post", 8, (1, 3)),),
    "float16": (Site("resid_post", 8, (1, 3), "float16"),),
    "float32": (Site("resid_post", 8, (1, 3), "float32"),),
    "several": (
        Site("resid_post", 8, (1, 3)),
        Site("mlp_out", 4, (3,), "float16"),
        Site("final_norm", 8, None, "float32"),
    ),
    "unfinished": (Site("resid_post", 8, (1, 3)),),
    "chunks": (Site("resid_post", 8, (1, 3)), Site("final_norm", 8, None, "float32")),
    "ranges": (Site("resid_post", 8, (1, 3)), Site("final_norm", 8, None, "float32")),
    "packed": (Site("resid_post", 8, (1, 3)),),
}
NOT_YET: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bfloat16", "float16", "float32", "several", "unfinished"), ("chunks", "ranges")),
    "chunks": ("ranges",),
    "ranges": (),
    "packed": (),
}
"""The fields that markers did not have when a store was made."""
BLOCKS = {name: [0, 2] if name == "unfinished" else [0, 1, 2] for name in STORES}
TEXTS = ("Grüße, Welt", "日本語 ok", "third")
TOKENS_PER_DOCUMENT = 4


def values(width: int, layers: tuple[int, ...] | None) -> np.ndarray:
    """[layer, sample, width], or [sample, width] for a layerless site: multiples of 1/4 that every dtype holds."""
    label = np.array([20] if layers is None else layers)[:, None, None]
    sample, channel = np.arange(SAMPLES)[:, None], np.arange(width)
    rows = ((label * 7 + sample * 3 + channel * 5) % 64 - 32) / 4
    return rows[0] if layers is None else rows


def columns() -> dict[str, np.ndarray]:
    """Four tokens per document, all stored; the last document has two."""
    sample = np.arange(SAMPLES, dtype=np.int32)
    document, position = np.divmod(sample, np.int32(TOKENS_PER_DOCUMENT))
    return {"document": document, "position": position, "token_id": sample + 100}


def documents() -> DocumentTable:
    """Every token is one character of its document's text, from its beginning."""
    edges = [
        [len(text[:character].encode()) for character in range(min(TOKENS_PER_DOCUMENT, SAMPLES - 4 * number) + 1)]
        for number, text in enumerate(TEXTS)
    ]
    return DocumentTable(
        ids=["a", "b", "c"],
        texts=TEXTS,
        token_offsets=np.cumsum([0, *(len(places) - 1 for places in edges)]),
        token_id=columns()["token_id"],
        token_start=np.array([place for places in edges for place in places[:-1]], np.uint32),
        token_end=np.array([place for places in edges for place in places[1:]], np.uint32),
        columns={"pages": [1, -2, 3], "weight": [0.5, 1.0, -0.25], "kind": ["de", "ja", ""]},
    )


def make(name: str, folder: Path, *, blocks: list[int] | None = None) -> Path:
    """Writes blocks of one store into `folder`, by default those of the golden store; seals it if all are there."""
    layout = Layout(STORES[name], SAMPLES, BLOCK, CHUNK)
    blocks = BLOCKS[name] if blocks is None else blocks
    target = folder / f"{name}.acts.zarr"
    table = documents() if name in ("several", "packed") else None
    provenance = {"model": {"name": "golden"}}
    before = contextlib.nullcontext() if name == "packed" else uncompressed_documents()
    with (
        before,
        actstore.create(target, layout, provenance, documents=table, seal=len(blocks) == layout.blocks) as writer,
    ):
        for block in blocks:
            span = slice(*layout.block_range(block))
            rows = {site.name: values(site.width, site.layers)[..., span, :] for site in layout.sites}
            writer.write(block, rows, samples={name: column[span] for name, column in columns().items()})
    return target


@contextlib.contextmanager
def uncompressed_documents() -> Iterator[None]:
    """New tables are as they were before they were compressed."""
    layout = DocumentTable.layout.fget
    assert layout is not None
    before = property(lambda table: layout(table).model_copy(update={"codec": "crc32c"}))
    with mock.patch.object(DocumentTable, "layout", before):
        yield


def some_documents(start: int, stop: int) -> DocumentTable:
    """Documents `start` to `stop - 1` of `documents()`."""
    table = documents()
    tokens = slice(*table.token_offsets[[start, stop]])
    return DocumentTable(
        ids=table.ids[start:stop],
        texts=table.texts[start:stop],
        token_offsets=table.token_offsets[start : stop + 1] - tokens.start,
        token_id=table.token_id[tokens],
        token_start=table.token_start[tokens],
        token_end=table.token_end[tokens],
        columns={name: column[start:stop] for name, column in table.columns.items()},
    )


@uncompressed_documents()
def make_appended(folder: Path) -> Path:
    """The rows of `several` in three generations: a document, the other two, then a layer and the other sites."""
    target = folder / "appended.acts.zarr"
    first, *sites = STORES["several"]
    base = Site(first.name, first.width, (1,))
    layout = Layout((base,), TOKENS_PER_DOCUMENT + 1, BLOCK, CHUNK)  # the last block is short
    provenance = {"model": {"name": "golden"}}

    def fill(writer: actstore.Writer, kept: tuple[Site, ...], *, with_columns: bool) -> None:
        for block in writer.missing():
            span = slice(*writer.block_range(block))
            rows = {site.name: values(site.width, site.layers)[..., span, :] for site in kept}
            samples = {name: column[span] for name, column in columns().items()} if with_columns else {}
            writer.write(block, rows, samples=samples)

    with actstore.create(target, layout, provenance, documents=some_documents(0, 2)) as writer:
        fill(writer, (base,), with_columns=True)
    more = {"samples": SAMPLES - layout.samples, "documents": some_documents(2, 3)}
    with actstore.append(target, provenance | {"run": 2}, **more) as writer:
        fill(writer, (base,), with_columns=True)
    added = (Site(first.name, first.width, (3,)), *sites)
    with actstore.append(target, provenance | {"run": 3}, sites=added) as writer:
        fill(writer, added, with_columns=False)
    return target


if __name__ == "__main__":
    here = Path(__file__).parent
    for store in STORES:
        if not (here / f"{store}.acts.zarr").exists():
            print(make(store, here).name)
    if not (here / "appended.acts.zarr").exists():
        print(make_appended(here).name)
