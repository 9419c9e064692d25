"""Reads a store with xarray: lazy arrays over TensorStore, and the engine behind `xr.open_dataset("run.acts.zarr")`."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts
import xarray as xr
from jaxtyping import Shaped
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from actstore.errors import UnfinishedStoreError
from actstore.kvstore import SUFFIX, Root, storage_errors
from actstore.ledger import committed_blocks, read_plan, read_status
from actstore.metadata import array_metadata, group_metadata
from actstore.moments import to_float32
from actstore.schema import Plan


class LazyArray(BackendArray):
    """A stored array that xarray reads piece by piece. bfloat16 becomes float32 unless `raw`."""

    def __init__(self, store: ts.TensorStore, *, raw: bool, doing: str) -> None:
        self._store = store
        self._widen = not raw and store.dtype.name == "bfloat16"
        self._doing = doing
        self.shape = tuple(store.shape)
        self.dtype = np.dtype(np.float32) if self._widen else store.dtype.numpy_dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Shaped[np.ndarray, "..."]:
        """What xarray calls: slices and integer arrays per axis; the rest xarray does in memory."""
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Shaped[np.ndarray, "..."]:
        """One read of the selected box. Integer arrays are read as sorted, distinct values, then put in order."""
        selection: list[Any] = []
        after: list[Any] = []
        for index, size in zip(key, self.shape, strict=True):
            wanted, restore = _plain(index, size)
            selection.append(wanted)
            if not isinstance(wanted, int):
                after.append(restore)
        with storage_errors(self._doing):
            data = self._store.oindex[tuple(selection)].read().result()
        for axis, restore in enumerate(after):
            if restore is not None:
                data = np.take(data, restore, axis=axis) if isinstance(restore, np.ndarray) else np.flip(data, axis)
        return to_float32(data) if self._widen else np.asarray(data)


class ActstoreBackend(BackendEntrypoint):
    """The xarray engine `actstore`."""

    description = "Activation stores (*.acts.zarr), read through TensorStore"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "raw", "partial")

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether this looks like an activation store: a path that ends in `.acts.zarr`."""
        if not isinstance(filename_or_obj, str | os.PathLike):
            return False
        return os.fspath(filename_or_obj).rstrip("/").endswith(SUFFIX)

    def open_dataset(  # type: ignore[override]  # engines add their own keywords
        self,
        filename_or_obj: str | os.PathLike[str],
        *,
        drop_variables: str | Iterable[str] | None = None,
        raw: bool = False,
        partial: bool = False,
    ) -> xr.Dataset:
        """The store as a lazy Dataset; see `open_dataset` of this module."""
        root = Root.of(filename_or_obj)
        drop = {drop_variables} if isinstance(drop_variables, str) else set(drop_variables or ())
        return open_dataset(root, read_plan(root), raw=raw, partial=partial, drop=drop)


def check_complete(root: Root, plan: Plan) -> None:
    """Refuses a store that is still being written.

    Raises:
        UnfinishedStoreError: says how much of it is there.
    """
    if read_status(root, plan) != "complete":
        raise UnfinishedStoreError(
            f"{root.url} is unfinished: {len(committed_blocks(root))} of {plan.layout.blocks} blocks are committed; "
            "run the command that writes it again to finish it, or give partial=True to see the committed samples"
        )


def open_dataset(
    root: Root, plan: Plan, *, raw: bool = False, partial: bool = False, drop: Iterable[str] = ()
) -> xr.Dataset:
    """The store as a lazy xarray Dataset: one variable per site, coordinates on `sample` and `layer`.

    Args:
        root: place of the store.
        plan: of the store.
        raw: True keeps bfloat16; False gives float32, in which every reduction of NumPy and xarray is right.
        partial: True also opens an unfinished store, with the samples of its committed blocks only.
        drop: names of variables to leave out.

    Only layer labels are read now; everything else when it is asked for.

    Raises:
        UnfinishedStoreError: the store is not complete and `partial` is False.
    """
    complete = read_status(root, plan) == "complete"
    if not partial:
        check_complete(root, plan)
    metadata = array_metadata(plan, complete=complete)
    drop = set(drop)
    variables: dict[str, xr.Variable] = {}
    for name, spec in metadata.items():
        if "/" in name or name in drop or (name == "valid" and complete):
            continue
        array = root.open_array(name, spec)
        variables[name] = _variable(array, spec, name=name, raw=raw, doing=f"read {name} of {root.url}")
    dataset = xr.Dataset(
        variables, attrs=group_metadata(plan, status="complete" if complete else "writing")["attributes"]
    )
    dataset = dataset.set_coords([column.name for column in plan.layout.columns if column.name in variables])
    return dataset if complete else _only_committed(dataset, root, plan)


def _variable(array: ts.TensorStore, spec: dict[str, Any], *, name: str, raw: bool, doing: str) -> xr.Variable:
    """A variable over a stored array; index coordinates are read at once, because xarray needs them."""
    dimensions = spec["dimension_names"]
    attributes = {key: value for key, value in spec["attributes"].items() if key != "coordinates"}
    shard = spec["chunk_grid"]["configuration"]["chunk_shape"]
    encoding = {"preferred_chunks": dict(zip(dimensions, shard, strict=True))}
    lazy = LazyArray(array, raw=raw, doing=doing)
    if [name] == dimensions:
        return xr.Variable(dimensions, lazy[indexing.BasicIndexer((slice(None),))], attributes)
    return xr.Variable(dimensions, indexing.LazilyIndexedArray(lazy), attributes, encoding)


def _only_committed(dataset: xr.Dataset, root: Root, plan: Plan) -> xr.Dataset:
    """The samples of committed blocks: what is missing is left out, never shown as zeros."""
    ranges = [plan.layout.block_range(block) for block in sorted(committed_blocks(root)) if block < plan.layout.blocks]
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(*span, dtype=np.int64) for span in ranges)])
    return dataset.drop_vars("valid").isel(sample=rows)


def _plain(index: Any, size: int) -> tuple[Any, Any]:
    """An index that TensorStore takes, and what to do to the result: flip, reorder, or nothing."""
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step < 0:
            count = len(range(start, stop, step))
            return slice(start + (count - 1) * step, start + 1, -step) if count else slice(0, 0), "flip"
        return slice(start, max(stop, start), step), None
    wanted = np.asarray(index, np.int64)
    if wanted.size and not (-size <= wanted.min() and wanted.max() < size):
        worst = wanted.max() if wanted.max() >= size else wanted.min()
        raise IndexError(f"index {worst} is out of bounds for an axis of size {size}")
    if wanted.ndim == 0:
        return int(wanted) + (size if wanted < 0 else 0), None
    distinct, restore = np.unique(np.where(wanted < 0, wanted + size, wanted), return_inverse=True)
    return distinct, None if np.array_equal(distinct, wanted) else restore
