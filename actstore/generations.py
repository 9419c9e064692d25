"""What a later plan adds to what a store holds: samples, or layers and sites. Pure: no input, no output.

A finished store never loses a row. Added samples follow the last one; if that one's block was short, the block is
written again with the old rows first, so that one array still holds them all. Added layers follow the last layer of
their site, added sites are new arrays: nothing that is there is touched.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from actstore.errors import InputError
from actstore.layout import Layout, Site, whole_number
from actstore.metadata import label_chunks
from actstore.schema import MAX_GENERATIONS, Base, DocumentTableLayout, Plan


def extend(
    before: Plan,
    provenance: Mapping[str, Any],
    *,
    samples: int = 0,
    sites: Sequence[Site] = (),
    documents: DocumentTableLayout | None = None,
) -> Plan:
    """The plan that adds samples, or layers and sites, to what `before` holds.

    Args:
        before: newest plan of a finished store.
        provenance: what produces the added rows; any JSON.
        samples: number of samples to add.
        sites: sites to add; one of a known name holds only the layers to add.
        documents: sizes of the table of the added documents, for added samples.

    Raises:
        InputError: nothing or both is added, or it does not fit to what is there.
    """
    samples = whole_number(samples, "samples")
    if isinstance(sites, Site) or not all(isinstance(site, Site) for site in sites):
        raise InputError(f"sites is {str(sites)[:80]!r}; expected a list of actstore.Site")
    if samples < 0 or (samples > 0) == bool(sites):
        raise InputError(
            f"{samples} samples and {len(sites)} sites are to be added; expected a number of samples, or sites with "
            "their added layers: add one, seal, then add the other"
        )
    if documents is not None and not samples:
        raise InputError("documents come with added samples, found them with added layers; leave documents out")
    there = next((table for table in before.tables if table is not None), None)
    if samples and (documents is None) != (there is None):
        has, gives = ("a", "without") if documents is None else ("no", "with")
        raise InputError(f"the store has {has} document table, the samples to add come {gives} one; give the same kind")
    if documents is not None and there is not None:
        _same_columns(there, documents)
    if before.generation >= MAX_GENERATIONS:
        raise InputError(f"the store has {before.generation:,} generations, the most there can be; make another store")
    layout = dataclasses.replace(
        before.layout, samples=before.layout.samples + samples, sites=_merged(before.layout, sites)
    )
    return Plan.make(layout, dict(provenance), documents, base=base_of(before))


def base_of(plan: Plan) -> Base:
    """What a plan that comes after `plan` says about it."""
    return Base(
        generation=plan.generation,
        fingerprint=plan.fingerprint,
        samples=plan.layout.samples,
        layers={site.name: len(site.layers or ()) for site in plan.layout.sites},
        labels=label_chunks(plan),
        tables=plan.tables,
    )


def leads_to(before: Plan, later: Plan) -> bool:
    """Whether `later` was appended to `before`, and keeps all that is there as it is."""
    if later.base is None or later.base != base_of(before):
        return False
    kept = [
        dataclasses.replace(site, layers=None if site.layers is None else site.layers[: later.base.layers[site.name]])
        for site in later.layout.sites[: len(before.layout.sites)]
        if site.name in later.base.layers
    ]
    layout = dataclasses.replace(later.layout, samples=before.layout.samples, sites=tuple(kept)) if kept else None
    return layout == before.layout


def added_sites(plan: Plan) -> tuple[Site, ...]:
    """The sites that a plan writes, each with only the layers that it writes."""
    if plan.base is None or plan.appends_samples:
        return plan.layout.sites
    new = []
    for site in plan.layout.sites:
        layers = None if site.layers is None else site.layers[first_layer(plan, site.name) :]
        if site.name not in plan.base.layers or layers:
            new.append(dataclasses.replace(site, layers=layers))
    return tuple(new)


def first_layer(plan: Plan, site: str) -> int:
    """Index along a site's layer axis of the first layer that a plan writes."""
    return 0 if plan.base is None or plan.appends_samples else plan.base.layers.get(site, 0)


def _merged(layout: Layout, added: Sequence[Site]) -> tuple[Site, ...]:
    """All sites: those that are there with their added layers, then those that are new."""
    given = {site.name: site for site in added}
    if len(given) != len(added):
        raise InputError(f"the sites {[site.name for site in added]} name one twice; name each once, with all layers")
    merged = []
    for site in layout.sites:
        more = given.pop(site.name, None)
        merged.append(site if more is None else _with_layers(site, more))
    return (*merged, *given.values())


def _with_layers(site: Site, more: Site) -> Site:
    if (more.width, more.dtype) != (site.width, site.dtype):
        raise InputError(
            f"site {site.name!r} is {site.dtype} x {site.width} in the store, to be added is {more.dtype} x "
            f"{more.width}; give it the same dtype and width, or another name"
        )
    if site.layers is None or more.layers is None:
        raise InputError(f"site {site.name!r} is in the store and has no layers to add; leave it out")
    twice = sorted(set(site.layers) & set(more.layers))
    if twice:
        raise InputError(f"layers {twice} of site {site.name!r} are in the store; name only those to add")
    return dataclasses.replace(site, layers=(*site.layers, *more.layers))


def _same_columns(there: DocumentTableLayout, here: DocumentTableLayout) -> None:
    found, expected = ({**dict.fromkeys(table.strings, "text"), **table.numbers} for table in (here, there))
    if found != expected:
        raise InputError(
            f"the documents to add have the columns {dict(sorted(found.items()))}, the store has "
            f"{dict(sorted(expected.items()))}; give the same columns of the same kinds"
        )
