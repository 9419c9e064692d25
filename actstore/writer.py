"""Writes blocks: whole shards, then the `valid` chunk, then the marker, each durable before the next begins.

Several processes may write one store; a block may be written in any order and more than once. Bytes in flight are
bounded: `write` waits until fewer than `blocks_in_flight` blocks are being written.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import ArrayLike

from actstore.errors import InputError
from actstore.kvstore import Root, storage_errors
from actstore.layout import Column, Layout, Site, norm_name
from actstore.ledger import checksum, create_nodes, create_plan, missing_blocks, seal, write_assets, write_marker
from actstore.metadata import array_metadata
from actstore.moments import as_stored, row_norms, to_float32
from actstore.schema import FORMAT, Marker, Plan
from actstore.shards import encode

Array = Shaped[np.ndarray, "..."]
Norms = Float32[np.ndarray, " sample"]
BLOCKS_IN_FLIGHT = 2  # one is being written while the next is handed over
SHARDS_AT_ONCE = 4  # while some wait for the disk to sync, others use the cores


class Writer:
    """Writes the blocks of one store. Made by `actstore.create`; use it in a `with` statement.

    Leaving the `with` block waits for everything and raises the first error. The store is sealed there if every block
    is committed and no exception is under way, unless `seal=False`.
    """

    def __init__(
        self,
        root: Root,
        plan: Plan,
        *,
        seal: bool = True,
        assets: Mapping[str, bytes] | None = None,
        blocks_in_flight: int = BLOCKS_IN_FLIGHT,
    ) -> None:
        root.check_writable(0)  # before a listing, which would say less about what is wrong
        root.check_writable(len(missing_blocks(root, plan)) * plan.layout.block_bytes)
        create_plan(root, plan)
        write_assets(root, plan, assets or {})
        create_nodes(root, plan)
        metadata = array_metadata(plan, complete=False)
        self.root, self.plan = root, plan
        self._arrays = {
            name: root.open_array(name, spec) for name, spec in metadata.items() if not name.startswith("documents/")
        }
        self._seal, self._closed = seal, False
        self._pool = ThreadPoolExecutor(blocks_in_flight, thread_name_prefix="actstore-writer")
        self._shard_pool = ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="actstore-shards")
        self._free = threading.BoundedSemaphore(blocks_in_flight)
        self._pending: list[Future[Marker]] = []
        self._write_labels()

    @property
    def layout(self) -> Layout:
        """Shapes of the store."""
        return self.plan.layout

    def write(
        self, block: int, activations: Mapping[str, ArrayLike], *, samples: Mapping[str, ArrayLike] | None = None
    ) -> Future[Marker]:
        """Writes one block in the background; the future is done when the block is committed.

        Args:
            block: number of the block; `layout.block_range(block)` says which samples it holds.
            activations: per site, an array [layer, sample, width] ([sample, width] for a layerless site) with exactly
                the block's samples, in the site's dtype (not copied) or in float32 or float64 (rounded to it).
            samples: per column of the layout, an integer array [sample].

        The arrays must not change until the future is done. Waits while `blocks_in_flight` blocks are being written;
        memory is that many blocks.

        Raises:
            InputError: a site or column is missing, unknown, of another shape or dtype, or holds NaN or infinity.
            StoreError: an earlier block could not be written.
        """
        self.raise_failures()
        if self._closed:
            raise InputError("this writer is closed; make another with actstore.create to continue the store")
        start, stop = self.layout.block_range(block)
        rows = self._check(activations, samples or {}, stop - start)
        self._free.acquire()
        try:
            future = self._pool.submit(self._commit, block, *rows)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(lambda _: self._free.release())
        self._pending = [*(old for old in self._pending if not old.done() or old.exception()), future]
        return future

    def missing(self) -> list[int]:
        """Blocks that are not committed yet, ascending. Costs one listing."""
        return missing_blocks(self.root, self.plan)

    def raise_failures(self) -> None:
        """Raises the error of the first block that could not be written, if any."""
        for future in self._pending:
            if future.done():
                future.result()

    def close(self) -> None:
        """Waits until every block handed over is committed.

        Raises:
            StoreError: a block could not be written.
        """
        self._shut_down()
        self.raise_failures()

    def _shut_down(self) -> None:
        """Finishes what was handed over, then ends the threads."""
        self._closed = True
        self._pool.shutdown(wait=True)
        self._shard_pool.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._shut_down()
            return
        self.close()
        if self._seal:
            seal(self.root, self.plan)

    def _check(
        self, activations: Mapping[str, ArrayLike], samples: Mapping[str, ArrayLike], count: int
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The block's arrays by name, in their stored dtypes.

        Raises:
            InputError: they do not fit the layout.
        """
        _same_names("sites", activations, [site.name for site in self.layout.sites])
        _same_names("columns", samples, [column.name for column in self.layout.columns])
        data = {site.name: _site_rows(site, activations[site.name], count) for site in self.layout.sites}
        columns = {column.name: _column_values(column, samples[column.name], count) for column in self.layout.columns}
        return data, columns

    def _commit(self, block: int, data: dict[str, Array], columns: dict[str, Array]) -> Marker:
        """All shards, then `valid`, then the marker. Runs in a thread of the writer."""
        start, stop = self.layout.block_range(block)
        submit = self._shard_pool.submit
        shards = {
            name: [submit(self._write_shard, name, index, start, rows) for index, rows in enumerate(layers)]
            for name, layers in data.items()
        }
        written = {name: [future.result() for future in futures] for name, futures in shards.items()}
        checksums = {name: tuple(digest for digest, _ in results) for name, results in written.items()}
        pending: list[Any] = []
        with storage_errors(f"write block {block} of {self.root.url}"):
            for name, results in written.items():
                norms = [norm for _, norm in results]
                pending += [self._start(norm_name(name), start, row, layer=index) for index, row in enumerate(norms)]
                checksums[norm_name(name)] = tuple(map(checksum, norms))
            for name, values in columns.items():
                pending.append(self._start(name, start, values))
                checksums[name] = (checksum(values),)
            for future in pending:
                future.result()
            self._start("valid", start, np.ones(stop - start, np.uint8)).result()
        marker = Marker(
            format=FORMAT, block=block, samples=(start, stop), fingerprint=self.plan.fingerprint, checksums=checksums
        )
        write_marker(self.root, marker)
        return marker

    def _write_shard(self, name: str, layer: int, start: int, rows: Array) -> tuple[str, Norms]:
        """Writes the shard of one layer; its checksum and the norms of its rows. Durable when it returns."""
        site = self.layout.site(name)
        norms = row_norms(rows)
        _refuse_non_finite(site, layer, rows, norms, start)
        whole = self._padded(name, rows)
        pieces = encode(whole, chunk_samples=self.layout.chunk_samples, codec=self.layout.codec)
        if pieces is None:
            with storage_errors(f"write {name} of {self.root.url}"):
                self._start(name, start, rows, layer=layer).result()
        else:
            place = f"{start // self.layout.block_samples}/0"
            self.root.write_pieces(f"{name}/c/{place}" if site.layers is None else f"{name}/c/{layer}/{place}", pieces)
        return checksum(rows), norms

    def _start(self, name: str, start: int, rows: Array, *, layer: int = 0) -> Any:
        """Starts writing a whole shard or chunk through TensorStore."""
        array, rows = self._arrays[name], self._padded(name, rows)
        span = slice(start, start + len(rows))
        target = array[layer, span] if array.rank > rows.ndim else array[span]
        return target.write(rows, can_reference_source_data_indefinitely=True)

    def _padded(self, name: str, rows: Array) -> Array:
        """Rows of a whole block: a short last block is filled up with the fill value."""
        missing = self.layout.block_samples - len(rows)
        if not missing:
            return rows
        fill = np.zeros((), np.uint8) if name == "valid" else self._arrays[name].fill_value
        return np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])

    def _write_labels(self) -> None:
        """The `layer` coordinates: a few bytes, the same from every process."""
        for site in self.layout.sites:
            if site.layers is not None:
                name = self.layout.layer_dimension(site)
                with storage_errors(f"write {name} of {self.root.url}"):
                    self._arrays[name].write(np.asarray(site.layers, np.int32)).result()


def _same_names(what: str, found: Mapping[str, ArrayLike], expected: list[str]) -> None:
    if sorted(found) != sorted(expected):
        remedy = "" if found else f", or make the layout with {what}=() to keep none" * (what == "columns")
        raise InputError(
            f"a block needs the {what} {sorted(expected)}, found {sorted(found)}; give each exactly once{remedy}"
        )


def _as_numpy(values: ArrayLike, what: str) -> Array:
    """NumPy arrays as they are; what NumPy can view (JAX arrays, CPU tensors of types it knows), lists copied.

    Raises:
        InputError: NumPy cannot read it.
    """
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{what} is a {type(values).__module__}.{type(values).__name__} that NumPy cannot read "
            f"({str(error)[:60]}); give a NumPy array, for a tensor tensor.detach().float().cpu().numpy()"
        ) from None


def _site_rows(site: Site, given: ArrayLike, count: int) -> Array:
    """Rows as [layer, sample, width], contiguous, in the stored dtype."""
    values = _as_numpy(given, f"site {site.name!r}")
    shape = (count, site.width) if site.layers is None else (len(site.layers), count, site.width)
    if values.shape != shape:
        axes = "sample, width" if site.layers is None else "layer, sample, width"
        raise InputError(f"site {site.name!r} has shape {values.shape}, expected {shape}: ({axes}) of this block")
    stored = as_stored(values, site.dtype, what=f"site {site.name!r}")
    return np.ascontiguousarray(stored).reshape(site.rows_per_sample, count, site.width)


def _column_values(column: Column, given: ArrayLike, count: int) -> Array:
    """Values of a column in its dtype, refused where they do not fit."""
    values = _as_numpy(given, f"column {column.name!r}")
    if values.shape != (count,):
        raise InputError(f"column {column.name!r} has shape {values.shape}, expected ({count},)")
    target = np.dtype(column.dtype)
    if values.dtype.kind not in "iuf" or (values.dtype.kind == "f") != (target.kind == "f"):
        raise InputError(f"column {column.name!r} has dtype {values.dtype}, expected {column.dtype}")
    stored = np.ascontiguousarray(values).astype(target)
    if stored.dtype.kind != "f" and not np.array_equal(stored, values):
        raise InputError(f"column {column.name!r} has values that {column.dtype} cannot hold; use a wider dtype")
    return stored


def _refuse_non_finite(site: Site, layer: int, rows: Array, norms: Norms, start: int) -> None:
    """NaN and infinity are never stored: they would spoil every statistic and every training step after."""
    for row in np.flatnonzero(~np.isfinite(norms)):
        if not np.isfinite(to_float32(rows[row])).all():
            label = "" if site.layers is None else f", layer {site.layers[layer]}"
            raise InputError(
                f"site {site.name!r}{label}, sample {start + row} holds NaN or infinity, expected finite activations; "
                "find out why the model produced it"
            )
