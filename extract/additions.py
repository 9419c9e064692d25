"""What to compute for a store that is appended to: more documents with its settings, or more layers for its own."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt64

from actstore.documents import IDS_AT_ONCE, StoredDocuments, refuse_known_ids, stored_tokens
from actstore.errors import InputError
from actstore.generations import added_sites, extend
from actstore.kvstore import Root
from actstore.layout import Layout, Site
from actstore.ledger import appended_plan, lineage, read_plan
from actstore.schema import Plan
from actstore.strings import Strings
from extract import tokens
from extract.alike import COMPLETION
from extract.arrangement import Arrangement, Part
from extract.documents import Document
from extract.loaded import check_batch, loaded_for
from extract.models.sites import LAYERLESS_SITES, Tap, site_widths
from extract.plan import ExtractPlan
from extract.planning import check_tokenizer, check_tokens, checked_taps, provenance_of, sites_of, stream_of
from extract.selection import Stream
from extract.tokenising import Progress, tokenise

if TYPE_CHECKING:
    from extract.models import Model


def append_documents(
    url: str,
    folder: str | Path,
    documents: Iterable[Document],
    *,
    mesh: tuple[int, int] | None = None,
    model: "Model | None" = None,
    progress: Progress | None = None,
) -> ExtractPlan:
    """The plan that adds documents to the finished store at `url`, with the sites, layers and packing that it has.

    Args:
        url: of a store that `extract` wrote.
        folder: of the model that it was written with.
        documents: with ids that the store does not hold, and the same columns.
        mesh: devices as (data, model), as in `make_plan`; the batch is that of the store.
        model: of `folder`, if it is loaded already; None loads it.
        progress: called with (documents tokenised, documents in all).

    Raises:
        InputError: another model or tokenizer, documents that are there, or a store that `extract` did not write.
        UnfinishedStoreError: the store is not finished.
    """
    root, loaded, first, arrangement = _opened(url, folder, mesh, model)
    encoder = _tokenizer_of(folder, first)
    check_tokenizer(loaded, encoder)
    like = StoredDocuments(root, read_plan(root)).columns
    table = tokenise(documents, encoder, like=like, progress=progress)
    check_tokens(loaded, table)
    part = arrangement.part(stream_of(table), encoder.words)
    provenance = provenance_of(loaded, encoder, table, arrangement)
    _refuse_others(first, provenance, ("model", "tokenizer"))
    store = appended_plan(
        root, lambda before: extend(before, provenance, samples=part.packing.rows, documents=table.layout)
    )  # fmt: skip
    refuse_known_ids(root, lineage(root, store)[-2], table)
    before = store.layout.samples - part.packing.rows
    part = dataclasses.replace(part, first_sample=before, first_document=store.first_document)
    return ExtractPlan(store, loaded, _taps(store), (part,), arrangement.batch, table, {})


def append_layers(
    url: str,
    folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    mesh: tuple[int, int] | None = None,
    model: "Model | None" = None,
) -> ExtractPlan:
    """The plan that adds layers or sites to the finished store at `url`, for the documents that it keeps.

    Args:
        url: of a store that `extract` wrote.
        folder: of the model that it was written with.
        layers: layers to add; None takes those of the store's first site with layers, for new sites.
        sites: their sites, or patterns of these; None takes all sites of the store that have layers.
        mesh: devices as (data, model), as in `make_plan`; the batch is that of the store.
        model: of `folder`, if it is loaded already; None loads it.

    Raises:
        InputError: another model, layers that are there or that the model lacks, a store that `extract` did not write.
        UnfinishedStoreError: the store is not finished.
        CorruptStoreError: the store's documents are damaged.
    """
    if layers is None and sites is None:
        raise InputError("there is nothing to append; expected documents, layers or sites")
    root, loaded, first, arrangement = _opened(url, folder, mesh, model)
    encoder = _tokenizer_of(folder, first)
    provenance = {**first, **provenance_of(loaded, encoder)}
    _refuse_others(first, provenance, ("model", "tokenizer"))
    store = appended_plan(
        root, lambda before: extend(before, provenance, sites=_sites(loaded, before.layout, sites, layers))
    )  # fmt: skip
    parts: list[Part] = []
    samples = documents = 0
    for plan in lineage(root, store):
        if plan.documents is None:
            continue
        stream = _stored_stream(root, plan, first_document=documents)
        part = arrangement.part(stream, encoder.words, first_sample=samples, first_document=documents)
        parts.append(part)  # documents are appended with the arrangement of the first ones
        samples, documents = samples + part.packing.rows, documents + plan.documents.documents
    if samples != store.layout.samples:
        raise InputError(f"{url} holds {store.layout.samples} samples, its documents give {samples}; {_FOREIGN}")
    return ExtractPlan(store, loaded, _taps(store), tuple(parts), arrangement.batch, None, {})


_FOREIGN = "only stores that `actstore extract` wrote can be appended to with a model: use actstore.append for others"


def _opened(
    url: str, folder: str | Path, mesh: tuple[int, int] | None, model: "Model | None"
) -> tuple[Root, "Model", dict[str, Any], Arrangement]:
    """The store's root, the model as it was used then, and the provenance and arrangement that the store began with."""
    root = Root.of(url)
    root.check_writable()
    first: dict[str, Any] = lineage(root, read_plan(root))[0].provenance
    try:
        compute, arrangement = first["model"]["compute_dtype"], Arrangement.of_json(first)
    except (KeyError, TypeError, InputError):
        raise InputError(f"{url} does not say which model and packing it was written with; {_FOREIGN}") from None
    attention = first["model"].get("attention", "chunked")
    loaded = loaded_for(arrangement.batch, folder, mesh=mesh, model=model, dtype=compute, attention=attention)
    check_batch(loaded, arrangement.batch)
    return root, loaded, first, arrangement


def _tokenizer_of(folder: str | Path, first: dict[str, Any]) -> tokens.Tokenizer:
    """The tokenizer, with the tokens around every text that the store began with."""
    special = first["tokenizer"].get("special_tokens")
    if not isinstance(special, dict):
        return tokens.load_tokenizer(folder, bos="never")
    return tokens.load_tokenizer(folder, bos=special["bos"], eos=special["eos"])


def _stored_stream(root: Root, plan: Plan, *, first_document: int) -> Stream:
    """The tokens of the documents that one plan wrote, as a selection sees them."""
    stored, offsets, ids, start = StoredDocuments(root, plan), *stored_tokens(root, plan)
    here = np.arange(first_document, first_document + len(offsets) - 1)

    def names() -> UInt64[np.ndarray, " document"]:
        parts = [here[place : place + IDS_AT_ONCE] for place in range(0, len(here), IDS_AT_ONCE)]
        return np.concatenate([Strings.of(stored.strings("id", part)).hashes() for part in parts])

    begins = stored.numbers(COMPLETION, here) if COMPLETION in stored.columns else None
    return Stream(offsets, ids, start, begins, lambda place: stored.strings("id", here[place : place + 1])[0], names)


def _refuse_others(first: dict[str, Any], here: dict[str, Any], fields: tuple[str, ...]) -> None:
    """Raises where what is added would not be what is there: another model, or another tokenizer."""
    for field in fields:
        keys = sorted({*first[field], *here[field]} - {"name", "revision"})  # the same weights may lie elsewhere
        shown = [
            f"{field}.{key}: there {first[field].get(key)!r}, here {here[field].get(key)!r}"
            for key in keys
            if first[field].get(key) != here[field].get(key)
        ]
        if shown:
            raise InputError(
                f"the store was written with another {field} ({'; '.join(shown)}); give the {field} it was written with"
            )


def _sites(
    model: "Model", layout: Layout, names: Sequence[str] | None, layers: Sequence[int] | None
) -> tuple[Site, ...]:
    """The sites to add, each with its added layers."""
    there = {site.name: site for site in layout.sites}
    layered = [site for site in layout.sites if site.layers is not None]
    names = [site.name for site in layered] if names is None else sites_of(model, names)
    if layers and names and all(name in LAYERLESS_SITES for name in names):
        raise InputError(f"the sites {list(names)} have no layers, asked for {list(layers)}; leave the layers out")
    if layers is None:
        layers = layered[0].layers or () if layered else ()
    checked_taps(model, names, layers or None)
    widths, dtype = site_widths(model.config), layout.sites[0].dtype
    return tuple(
        Site(
            name, widths[name], None if name in LAYERLESS_SITES else tuple(layers),
            there[name].dtype if name in there else dtype,
        )
        for name in names
    )  # fmt: skip


def _taps(store: Plan) -> tuple[Tap, ...]:
    """What to capture for a plan, in the order in which it is stored."""
    sites = [(site.name, site.layers or [None]) for site in added_sites(store)]
    return tuple(Tap(name, layer) for name, layers in sites for layer in layers)
