"""Stores that are appended to: what there is first, what is added, and what is there in the end."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from stores import LAYOUT, Contents, make_contents

import actstore
from actstore import DocumentTable, Layout, Site, Writer

PROVENANCE = {"model": {"name": "made-up"}, "run": "the second"}


@dataclasses.dataclass(frozen=True, repr=False)
class Addition:
    """One generation after the first: `whole` is what the store holds once it is complete."""

    before: Contents
    whole: Contents
    sites: tuple[Site, ...] = ()
    documents: DocumentTable | None = None

    @property
    def samples(self) -> int:
        return self.whole.layout.samples - self.before.layout.samples

    def append(self, url: str | Path, *, seal: bool = False, **changes: Any) -> Writer:
        given = {"samples": self.samples, "sites": self.sites, "documents": self.documents, **changes}
        return actstore.append(url, PROVENANCE, seal=seal, **given)

    def block(self, writer: Writer, number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What `Writer.write` takes: for added layers only these, for added samples every column."""
        span = slice(*writer.block_range(number))
        if not self.sites:
            return {name: rows[..., span, :] for name, rows in self.whole.rows.items()}, {
                name: values[span] for name, values in self.whole.columns.items()
            }
        return {site.name: self._added(site)[..., span, :] for site in self.sites}, {}

    def _added(self, site: Site) -> np.ndarray:
        rows = self.whole.rows[site.name]
        return rows if site.layers is None else rows[-len(site.layers) :]

    def write(self, url: str | Path, *, blocks: Iterable[int] | None = None, seal: bool = True) -> Path:
        """Writes what is missing of some blocks, or of all; seals unless told otherwise."""
        with self.append(url, seal=seal) as writer:
            for number in writer.missing():
                if blocks is None or number in blocks:
                    activations, columns = self.block(writer, number)
                    writer.write(number, activations, samples=columns)
        return Path(url)


def first_documents(table: DocumentTable, start: int, stop: int) -> DocumentTable:
    """Documents `start` to `stop - 1` of a table."""
    first, last = table.token_offsets[start], table.token_offsets[stop]
    return DocumentTable(
        ids=table.ids[start:stop], texts=table.texts[start:stop],
        token_offsets=table.token_offsets[start : stop + 1] - first, token_id=table.token_id[first:last],
        token_start=table.token_start[first:last], token_end=table.token_end[first:last],
        columns={name: values[start:stop] for name, values in table.columns.items()},
    )  # fmt: skip


def cut(
    whole: Contents, *, samples: int | None = None, sites: tuple[Site, ...] | None = None, documents: int = 0
) -> Contents:
    """The first samples, layers and documents of `whole`."""
    sites = whole.layout.sites if sites is None else sites
    samples = whole.layout.samples if samples is None else samples
    layout = dataclasses.replace(whole.layout, samples=samples, sites=sites)
    rows = {
        site.name: whole.rows[site.name][:samples] if site.layers is None
        else whole.rows[site.name][: len(site.layers), :samples]
        for site in sites
    }  # fmt: skip
    columns = {name: values[:samples] for name, values in whole.columns.items()}
    table = first_documents(whole.documents, 0, documents) if whole.documents and documents else None
    return Contents(layout, rows, columns, table)


def added_samples(layout: Layout = LAYOUT, *, at: int | None = None, documents: int | None = None) -> Addition:
    """Samples after sample `at`, or the documents after the first few with their samples."""
    whole = make_contents(layout, documents=documents is not None)
    if documents is None:
        return Addition(cut(whole, samples=at), whole)
    assert whole.documents is not None
    before = cut(whole, samples=int((whole.columns["document"] < documents).sum()), documents=documents)
    return Addition(before, whole, documents=first_documents(whole.documents, documents, len(whole.documents.ids)))


def added_layers(layout: Layout = LAYOUT) -> Addition:
    """One layer of the first site, and all layers of the last two."""
    whole = make_contents(layout)
    first, second, *new = layout.sites
    sites = (dataclasses.replace(first, layers=first.layers[:2]), second)
    added = (dataclasses.replace(first, layers=first.layers[2:]), *new)
    assert whole.documents is not None
    return Addition(cut(whole, sites=sites, documents=len(whole.documents.ids)), whole, added)


ADDITIONS = {
    "samples, inside a chunk": lambda: added_samples(at=37),
    "samples, at a chunk": lambda: added_samples(at=36),
    "samples, at a block": lambda: added_samples(at=32),
    "samples, inside the last block": lambda: added_samples(at=50),
    "samples, the first block short": lambda: added_samples(at=1),
    "documents": lambda: added_samples(documents=3),
    "layers and sites": added_layers,
    "samples, zstd": lambda: added_samples(dataclasses.replace(LAYOUT, codec="zstd"), at=37),
    "samples, no checksums": lambda: added_samples(dataclasses.replace(LAYOUT, codec="none"), at=37),
    "layers, zstd": lambda: added_layers(dataclasses.replace(LAYOUT, codec="zstd")),
}
