"""`actstore.open` and `actstore.create`: the few calls most programs need, over the modules that do the work."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actstore.copying import Copied
from actstore.copying import copy as copy_store
from actstore.documents import refuse_known_ids
from actstore.errors import InputError
from actstore.generations import extend
from actstore.kvstore import DEFAULT_BYTES, Cache, Root
from actstore.layout import Layout, Site
from actstore.ledger import appended_plan, find_plan, lineage
from actstore.ranged import check_cache
from actstore.reader import check_complete
from actstore.schema import Plan
from actstore.store import Store
from actstore.table import DocumentTable, write_table
from actstore.writer import Writer


def open(  # noqa: A001  reads as `actstore.open`
    url: str | os.PathLike[str],
    *,
    partial: bool = False,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Opens the store at `url`: a path, `gs://`, `s3://`, `http://` or `https://`.

    Args:
        url: where it is.
        partial: True also opens a store that is still being written, or appended to.
        cache: a folder on a local disk that keeps chunks of remote stores once they were read and compared; any number
            of processes may share it. None is the one that `ACTSTORE_CACHE` names, or none.
        cache_bytes: that it may hold, at least sixteen of the largest chunk; what was used longest ago goes first. None
            is 64 GiB.

    Raises:
        InputError: `cache_bytes` without `cache`, or too few.
        StoreNotFoundError: there is no store at `url`.
        UnfinishedStoreError: it is not complete, and `partial` is False.
        CorruptStoreError: its metadata is damaged.

    Example:
        >>> store = actstore.open("run.acts.zarr")                                  # doctest: +SKIP
        >>> rows = next(store.batches(site="resid_post", layer=12, batch_size=4096))  # doctest: +SKIP
    """
    if cache is None and cache_bytes is not None:
        raise InputError(
            f"found cache_bytes {cache_bytes} without cache; expected the folder too: give cache=, or set "
            "ACTSTORE_CACHE and ACTSTORE_CACHE_BYTES"
        )
    most_bytes = DEFAULT_BYTES if cache_bytes is None else cache_bytes
    root = Root.of(url, cache=None if cache is None else Cache(cache, most_bytes))
    plan, complete = find_plan(root, unfinished=partial)
    check_cache(root, plan.layout)
    if not complete and not partial:
        check_complete(root, plan)
    return Store(root, plan, complete=bool(complete))


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Copied:
    """Copies a finished store, compared with its checksums on the way. Called again, it continues.

    Args:
        source: path or URL of a finished store.
        target: path, `gs://` or `s3://` URL that ends in `.acts.zarr`; empty, or with a part of the same store.
        progress: called with objects done, objects in all, and the rate.

    Costs one request to each side for each object, and 1 GiB of memory at most, or three times a shard.

    Raises:
        StoreNotFoundError: there is no store at `source`.
        UnfinishedStoreError: it is not complete.
        PlanMismatchError: another store is at `target`.
        CorruptStoreError: an object of the source is missing or damaged; names site, layer and block.
    """
    return copy_store(Root.of(source), Root.of(target), progress=progress)


def create(
    url: str | os.PathLike[str],
    layout: Layout,
    provenance: Mapping[str, Any],
    *,
    documents: DocumentTable | None = None,
    assets: Mapping[str, bytes] | None = None,
    seal: bool = True,
) -> Writer:
    """Creates a store, or continues one with the same plan, and returns its writer.

    Args:
        url: a path, `gs://` or `s3://` URL that ends in `.acts.zarr`.
        layout: shapes; `Layout.fit` chooses sizes.
        provenance: what produced the rows, as JSON: model, weights, data. A run that differs in it is refused.
        documents: what the rows come from; without it, rows cannot be shown as text.
        assets: small files to keep with the store, by name, such as `tokenizer.json`.
        seal: False leaves the store open for other writers when this one ends.

    Raises:
        PlanMismatchError: `url` holds another run; the differing fields are named.
        SealedStoreError: `url` holds this run, complete.
        StoragePermissionError: `url` cannot be written.
    """
    plan = Plan.make(layout, dict(provenance), documents.layout if documents else None, assets)
    writer = Writer(Root.of(url), plan, seal=seal, assets=assets)
    if documents is not None:
        write_table(writer.root, plan, documents)
    return writer


def append(
    url: str | os.PathLike[str],
    provenance: Mapping[str, Any],
    *,
    samples: int = 0,
    sites: Sequence[Site] = (),
    documents: DocumentTable | None = None,
    seal: bool = True,
) -> Writer:
    """Adds samples, or layers and sites, to a finished store, and returns the writer of what is added.

    Nothing that is there is lost or changed: readers see the store as it was until the addition is sealed, and then
    all of it. The blocks to write and their samples are `writer.missing()` and `writer.block_range(block)`. Calling it
    again with the same arguments continues, as with `create`.

    Args:
        url: of a finished store.
        provenance: what produced the added rows, as JSON.
        samples: number of samples to add, after those that are there. They have every site, layer and column of the
            store. If the last block was short, it is written again with the old rows first.
        sites: sites to add for all samples, or known sites with only the layers to add.
        documents: where the added samples come from, if the store keeps documents; their numbers in the column
            `document` begin with `writer.plan.first_document`.
        seal: False leaves the addition open for other writers when this one ends.

    Raises:
        StoreNotFoundError: there is no store at `url`.
        UnfinishedStoreError: it is not complete; what it lacks comes first.
        InputError: nothing or both kinds are added, or it does not fit what is there.
        PlanMismatchError: something else is being added already; the differing fields are named.
        SealedStoreError: this was added already.
    """
    root = Root.of(url)
    table = documents.layout if documents else None
    plan = appended_plan(
        root, lambda before: extend(before, provenance, samples=samples, sites=sites, documents=table)
    )  # fmt: skip
    if documents is not None:
        refuse_known_ids(root, lineage(root, plan)[-2], documents)
    writer = Writer(root, plan, seal=seal)
    if documents is not None:
        write_table(root, plan, documents)
    return writer
