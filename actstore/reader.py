"""Reads a store with xarray: lazy arrays over TensorStore, and over the rows of mapped shards."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int64, Shaped
from xarray.backends import BackendArray
from xarray.core import indexing

from actstore.errors import CorruptStoreError, UnfinishedStoreError
from actstore.gather import Samples, Source, gather
from actstore.kvstore import Root, refuse_fork
from actstore.ledger import read_status, refuse_lost_group
from actstore.mapped import can_map
from actstore.markers import committed_blocks, committed_ranges
from actstore.metadata import array_metadata, group_metadata
from actstore.objects import Objects
from actstore.picked import PickedRows
from actstore.schema import Plan
from actstore.vouchers import Vouchers

ROW = "row"  # the coordinate that says which sample of the store each is, unless the store has its own of this name
SOURCE, FINGERPRINT = "source", "actstore"  # its encoding says of which store: that survives what drops attributes


class Committed:
    """The samples of an unfinished store that are committed, numbered without the gaps. Costs 24 bytes per block."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        """`ranges` of samples [start, stop), ascending."""
        edges: Int64[np.ndarray, "range 2"] = np.array(ranges, np.int64).reshape(-1, 2)
        self._firsts = edges[:, 0]
        self._ends = np.cumsum(edges[:, 1] - edges[:, 0])

    def __len__(self) -> int:
        """Number of committed samples."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def stored(self, samples: Samples) -> Samples:
        """The numbers that samples have in the store. Costs 8 bytes for each."""
        wanted = np.asarray(samples, np.int64)
        number = np.searchsorted(self._ends, wanted, side="right")
        before = np.append(0, self._ends)[number]
        return self._firsts[number] + (wanted - before) if len(wanted) else wanted


class LazyArray(BackendArray):
    """A stored array that xarray reads piece by piece. bfloat16 becomes float32 unless `raw`.

    With `committed` it shows only these samples. Any thread may read, and a copy may be made by pickling.

    With `rows`, of a site's layers in a local store without compression, rows are copied from where they lie: any order
    and any repetition costs nothing but the result. Their chunks are compared with the commit markers: those of which
    half or more is wanted each time, the others once until their file changes. Other arrays are read and compared chunk
    by chunk, each time; for an order that does not ascend, xarray copies the result once more.
    """

    def __init__(
        self, source: Source, *, raw: bool, committed: Committed | None = None, rows: Sequence[PickedRows] = ()
    ) -> None:
        stored = source.array.dtype
        self._source, self._committed, self._rows = source, committed, tuple(rows)
        shape = list(source.array.shape)
        if committed is not None:
            shape[0 if source.layers is None else 1] = len(committed)
        self.shape = tuple(shape)
        self.dtype = np.dtype(np.float32) if not raw and stored.name == "bfloat16" else stored.numpy_dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """What xarray calls: slices and integer arrays per axis; pointwise indexing xarray finishes in memory."""
        if self._rows and isinstance(key, indexing.BasicIndexer | indexing.OuterIndexer):
            return self._read(key.tuple)
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    async def async_getitem(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """The same in a thread of the event loop: what `load_async` calls for all variables at once."""
        return await asyncio.to_thread(self.__getitem__, key)

    def _read(self, key: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        """The selected box. Of arrays without `rows`, xarray has made steps positive and arrays ascending."""
        refuse_fork()
        axes = [_chosen(index, size) for index, size in zip(key, self.shape, strict=True)]
        layered = self._source.layers is not None
        layers = [int(layer) for layer in axes[0]] if layered else [0]
        samples, *rest = axes[1:] if layered else axes
        samples = samples if self._committed is None else self._committed.stored(samples)
        width = _as_index(rest[0], self.shape[-1]) if rest else slice(None)
        out = np.empty((len(layers), len(samples), *map(len, rest)), self.dtype)
        if self._rows:
            numbers = np.asarray(samples, np.int64)
            for place, layer in enumerate(layers):
                self._rows[layer].fill(numbers, out[place], width=width)
        else:
            gather(self._source, layers, samples, out, width=width)
        kept = [len(axis) for index, axis in zip(key, axes, strict=True) if not isinstance(index, int | np.integer)]
        return out.reshape(kept)


class RowNumbers(BackendArray):
    """Which sample of the store each of a dataset's is, without memory for it."""

    def __init__(self, samples: int, committed: Committed | None) -> None:
        self.shape, self.dtype = (samples if committed is None else len(committed),), np.dtype(np.int64)
        self._committed = committed

    @property
    def all_samples(self) -> bool:
        """Whether each place is its own number."""
        return self._committed is None

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """What xarray calls."""
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    async def async_getitem(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """What `load_async` calls."""
        return self[key]

    def _read(self, key: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        (index,) = key
        samples = _chosen(index, self.shape[0])
        numbers = np.asarray(samples if self._committed is None else self._committed.stored(samples), np.int64)
        return numbers.reshape(()) if isinstance(index, int | np.integer) else numbers


def check_complete(root: Root, plan: Plan) -> None:
    """Refuses a store that is still being written.

    Raises:
        UnfinishedStoreError: says how much of it is there.
    """
    if read_status(root, plan) != "complete":
        raise UnfinishedStoreError(f"{unfinished(root, plan)}, or give partial=True to see the committed samples")


def unfinished(root: Root, plan: Plan) -> str:
    """How much of a store that is being written is there, and what to do.

    Raises:
        CorruptStoreError: it was finished, and its root group is gone.
    """
    refuse_lost_group(root, plan)
    return (
        f"{root.url} is unfinished: {len(committed_blocks(root, plan))} of {len(plan.blocks)} blocks are committed; "
        "run the command that writes it again to finish it"
    )


def open_dataset(
    root: Root,
    plan: Plan,
    *,
    raw: bool = False,
    partial: bool = False,
    check: bool = True,
    drop: Iterable[str] = (),
    complete: bool | None = None,
) -> xr.Dataset:
    """The store as a lazy xarray Dataset: one variable per site, coordinates on `sample` and `layer`.

    Args:
        root: place of the store.
        plan: of the store.
        raw: True keeps bfloat16; False gives float32, in which every reduction of NumPy and xarray is right.
        partial: True also opens an unfinished store, with the samples of its committed blocks only.
        check: False reads without comparing chunks with their commit markers: for stores that were just verified.
        drop: names of variables to leave out.
        complete: whether the store is complete, where that was just read; None reads it.

    Only layer labels are read now, and of remote storage not even these; everything else when it is asked for.

    Raises:
        UnfinishedStoreError: the store is not complete and `partial` is False.
        CorruptStoreError: the layer labels are damaged. What is read later raises it for what it finds then.
    """
    if complete is None:
        complete = read_status(root, plan) == "complete"
    if not complete and not partial:
        check_complete(root, plan)
    metadata = array_metadata(plan, complete=complete)
    drop = set(drop)
    vouchers = Vouchers(root, plan) if check else None
    committed = None if complete else Committed(committed_ranges(root, plan))
    variables: dict[str, xr.Variable] = {}
    for name, spec in metadata.items():
        if "/" in name or name in drop or name == "valid":
            continue
        if [name] == spec["dimension_names"]:
            variables[name] = _labels(root, plan, name, spec, complete=complete)
        else:
            source = Source(Objects.of(root, name, spec), name, plan.layout, root.url, vouchers)
            variables[name] = _variable(root, source, spec, raw=raw, committed=committed)
    if ROW not in metadata and ROW not in drop:
        numbers = indexing.LazilyIndexedArray(RowNumbers(plan.layout.samples, committed))
        store = {SOURCE: root.url, FINGERPRINT: plan.fingerprint}
        variables[ROW] = xr.Variable(["sample"], numbers, {"long_name": "sample of the store"}, store)
    dataset = xr.Dataset(
        variables, attrs=group_metadata(plan, status="complete" if complete else "writing")["attributes"]
    )
    dataset.encoding[SOURCE] = root.url
    names = [column.name for column in plan.layout.columns if column.name in variables]
    return dataset.set_coords([*names, *({ROW} & variables.keys())])


def read_column(root: Root, plan: Plan, name: str, samples: Int64[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
    """Values of a column for some samples, in any order."""
    source = Source.open(root, plan, name, vouchers=Vouchers(root, plan))
    distinct, places = np.unique(samples, return_inverse=True)
    out = np.empty((1, len(distinct)), source.array.dtype.numpy_dtype)
    gather(source, [0], distinct, out)
    return out[0, places]


def _variable(
    root: Root, source: Source, spec: dict[str, Any], *, raw: bool, committed: Committed | None
) -> xr.Variable:
    """A lazy variable over a stored array. What is not committed is left out, never shown as zeros."""
    dimensions = spec["dimension_names"]
    attributes = {key: value for key, value in spec["attributes"].items() if key != "coordinates"}
    shard = spec["chunk_grid"]["configuration"]["chunk_shape"]
    encoding = {"preferred_chunks": dict(zip(dimensions, shard, strict=True))}
    site = source.layout.site_of(source.name) if source.is_site and can_map(root, source) else None
    rows = [PickedRows(root, source, site, layer) for layer in range(site.rows_per_sample)] if site else []
    lazy = LazyArray(source, raw=raw, committed=committed, rows=rows)
    return xr.Variable(dimensions, indexing.LazilyIndexedArray(lazy), attributes, encoding)


def _labels(root: Root, plan: Plan, name: str, spec: dict[str, Any], *, complete: bool) -> xr.Variable:
    """A layer coordinate: read at once, because xarray indexes it, and compared with the plan.

    Of an unfinished store it is taken from the plan: its writer may have been stopped before it wrote any. Of remote
    storage too: opening would cost two requests more for each, and the plan decides them.

    Raises:
        CorruptStoreError: it is damaged, or has other labels than the plan.
    """
    layered = [site for site in plan.layout.sites if site.layers is not None]
    expected = next(site.layers for site in layered if plan.layout.layer_dimension(site) == name)
    if not complete or not root.is_local:
        return xr.Variable([name], np.asarray(expected or (), np.int32), spec["attributes"])
    labels = np.asarray(Objects.of(root, name, spec).begin(f"read {name} of {root.url}").result())
    if not np.array_equal(labels, expected or ()):
        raise CorruptStoreError(
            f"{name} of {root.url} has the labels {labels.tolist()[:20]}, the plan has {list(expected or ())[:20]}; "
            "run `actstore verify`, then `actstore repair`"
        )
    return xr.Variable([name], labels, spec["attributes"])


def _chosen(index: Any, size: int) -> Samples:
    """What an index takes of an axis; numbers below zero count from its end.

    Raises:
        IndexError: it is out of bounds.
    """
    if isinstance(index, slice):
        return range(*index.indices(size))
    wanted = np.atleast_1d(np.asarray(index, np.int64))
    if wanted.size and not (wanted.min() >= -size and wanted.max() < size):
        worst = wanted.max() if wanted.max() >= size else wanted.min()
        raise IndexError(f"index {worst} is out of bounds for an axis of size {size}")
    wanted = np.where(wanted < 0, wanted + size, wanted)
    return range(int(wanted[0]), int(wanted[0]) + 1) if isinstance(index, int | np.integer) else wanted


def _as_index(axis: Samples, size: int) -> slice | Int64[np.ndarray, " chosen"]:
    """What `_chosen` gave, as an index of NumPy; a whole axis is `slice(None)`."""
    if not isinstance(axis, range):
        return axis
    if axis == range(size):
        return slice(None)
    return slice(axis.start, axis.stop if axis.stop >= 0 else None, axis.step)
