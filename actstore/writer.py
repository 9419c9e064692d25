"""Writes blocks: whole shards, then the `valid` chunk, then the marker, each durable before the next begins.

Several processes may write one store; a block may be written in any order and more than once. Bytes in flight are
bounded: `write` waits until fewer than `blocks_in_flight` blocks are being written.
"""

import functools
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float32, Shaped
from numpy.typing import ArrayLike

from actstore.commits import MAX_CHUNK_DIGESTS, Marker
from actstore.errors import InputError
from actstore.gather import Source, gather
from actstore.generations import added_sites, first_layer
from actstore.kvstore import Operation, Root
from actstore.layout import BLOCKS_IN_MEMORY, Column, Layout, Site, norm_name
from actstore.ledger import create_plan, lineage, write_assets
from actstore.markers import checksum, missing_blocks, vouched_arrays, write_marker
from actstore.metadata import array_metadata, label_chunks, shard_key
from actstore.moments import as_stored, to_float32
from actstore.schema import FORMAT, Plan
from actstore.sealing import create_nodes, seal, take_back_longer
from actstore.shards import RowSums, encode, with_checksum
from actstore.vouchers import Vouchers

Array = Shaped[np.ndarray, "..."]
Norms = Float32[np.ndarray, " sample"]
BLOCKS_IN_FLIGHT = BLOCKS_IN_MEMORY - 1  # one is being written while the next is handed over
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
        root.check_writable()  # before a listing, which would say less about what is wrong
        self._sites = {site.name: site for site in added_sites(plan)}
        sample_bytes = sum(site.sample_bytes for site in self._sites.values())
        root.check_space(len(missing_blocks(root, plan)) * plan.layout.block_samples * sample_bytes)
        create_plan(root, plan)
        write_assets(root, plan, assets or {})
        create_nodes(root, plan)
        metadata = array_metadata(plan, complete=False)
        self.root, self.plan = root, plan
        self._arrays = {name: root.open_array(name, spec) for name, spec in metadata.items() if "/" not in name}
        self._seal, self._closed, self._blocks_in_flight = seal, False, blocks_in_flight
        self._pool = ThreadPoolExecutor(blocks_in_flight, thread_name_prefix="actstore-writer")
        self._shard_pool = ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="actstore-shards")
        self._free = threading.BoundedSemaphore(blocks_in_flight)
        self._pending: list[Future[Marker]] = []
        self._write_labels()

    @property
    def layout(self) -> Layout:
        """Shapes of the store."""
        return self.plan.layout

    @property
    def memory_bytes(self) -> int:
        """The most that the writer holds: the blocks being written, and the next one while `write` waits.

        Arrays handed over in the stored dtype, each layer in C order, are not copied: they are these blocks. Others are
        copied, and the caller's own come on top until `write` returns. Shards that are compressed, or that go to a
        bucket, are held once more while they are written.
        """
        shard_bytes = max(site.row_bytes for site in self.layout.sites) * self.layout.block_samples
        encoded = 2 * SHARDS_AT_ONCE * shard_bytes if self._encodes else 0
        return (self._blocks_in_flight + 1) * self.layout.block_bytes + encoded

    def write(
        self, block: int, activations: Mapping[str, ArrayLike], *, samples: Mapping[str, ArrayLike] | None = None
    ) -> Future[Marker]:
        """Writes one block in the background; the future is done when the block is committed.

        Args:
            block: number of the block; `block_range(block)` says which samples to give.
            activations: per site, an array [layer, sample, width] ([sample, width] for a layerless site) with exactly
                these samples, in the site's dtype (not copied) or in float32 or float64 (rounded to it). A writer that
                appends layers takes only those.
            samples: per column of the layout, an integer array [sample]; none where layers are appended.

        The arrays must not change until the future is done. Waits while `blocks_in_flight` blocks are being written:
        `memory_bytes` says what that costs.

        Raises:
            InputError: a site or column is missing, unknown, of another shape or dtype, or holds NaN or infinity.
            StoreError: an earlier block could not be written.
        """
        self.raise_failures()
        if self._closed:
            raise InputError("this writer is closed; make another with actstore.create to continue the store")
        start, stop = self.block_range(block)
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

    def block_range(self, block: int) -> tuple[int, int]:
        """First and one-past-last sample to give for a block; appended samples may begin inside one.

        Raises:
            InputError: there is no such block to write.
        """
        return self.plan.block_range(block)

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
        expected = self.layout.columns if self.plan.adds_samples else ()
        _same_names("sites", activations, list(self._sites))
        _same_names("columns", samples, [column.name for column in expected])
        data = {name: _site_rows(site, activations[name], count) for name, site in self._sites.items()}
        return data, {column.name: _column_values(column, samples[column.name], count) for column in expected}

    def _commit(self, block: int, data: dict[str, Array], columns: dict[str, Array]) -> Marker:
        """All shards, then `valid`, then the marker. Runs in a thread of the writer."""
        start, stop = self.block_range(block)
        first = self.layout.block_range(block)[0]  # before `start` where samples are appended to a short block
        take_back_longer(self.root, self.plan, block)
        before = self._rows_before(first, start)
        submit = self._shard_pool.submit
        shards = {
            name: [
                submit(self._write_shard, name, index, start, rows, before.get((name, index)))
                for index, rows in enumerate(layers, start=first_layer(self.plan, name))
            ]
            for name, layers in data.items()
        }
        written = {name: [future.result() for future in futures] for name, futures in shards.items()}
        checksums = {name: tuple(layer.digest for layer in layers) for name, layers in written.items()}
        chunks = {name: tuple(layer.chunks for layer in layers) for name, layers in written.items()}
        if sum(len(digests) for layers in chunks.values() for digests in layers) > 8 * MAX_CHUNK_DIGESTS:
            chunks = {}
        pending: list[Operation[Any]] = []
        for name, layers in written.items():
            norms = [layer.norms for layer in layers]
            for index, row in enumerate(norms, start=first_layer(self.plan, name)):
                whole = _joined(before.get((norm_name(name), index)), row)
                pending.append(self._start(norm_name(name), first, whole, layer=index))
            checksums[norm_name(name)] = tuple(map(checksum, norms))
        for name, values in columns.items():
            pending.append(self._start(name, first, _joined(before.get((name, 0)), values)))
            checksums[name] = (checksum(values),)
        for writing in pending:
            writing.result()
        self._start("valid", first, np.ones(stop - first, np.uint8)).result()
        marker = Marker(
            format=FORMAT,
            block=block,
            samples=(start, stop),
            fingerprint=self.plan.fingerprint,
            checksums=checksums,
            chunks=chunks,
            ranges={name: _range(values) for name, values in columns.items() if values.dtype.kind != "f"},
        )
        write_marker(self.root, self.plan, marker)
        return marker

    def _rows_before(self, first: int, start: int) -> dict[tuple[str, int], Array]:
        """Stored values of samples `first` to `start - 1` by array and layer: a short block is written again whole.

        Raises:
            CorruptStoreError: they are not what their markers vouch for.
        """
        if first == start:
            return {}
        base = lineage(self.root, self.plan)[-2]
        vouchers = Vouchers(self.root, base)
        found: dict[tuple[str, int], Array] = {}
        for name, count in vouched_arrays(self.plan).items():
            source = Source.open(self.root, base, name, vouchers=vouchers)
            shape = (start - first, *source.array.shape[2 if source.layers is not None else 1 :])
            rows = np.empty((count, *shape), source.array.dtype.numpy_dtype)
            gather(source, range(count), range(first, start), rows)
            found |= {(name, index): values for index, values in enumerate(rows)}
        return found

    def _write_shard(self, name: str, layer: int, start: int, rows: Array, before: Array | None) -> RowSums:
        """Writes the shard of one layer; what the marker says about `rows`. Durable when it returns."""
        site, layout = self.layout.site(name), self.layout
        refuse = functools.partial(_refuse_non_finite, site, layer)
        sums = RowSums(len(rows), start=start, chunk_samples=layout.chunk_samples, refuse=refuse)
        block = start // layout.block_samples
        if self._encodes:
            sums.add_all(rows)
            self._start(name, block * layout.block_samples, _joined(before, rows), layer=layer).result()
        else:
            pieces = encode(
                rows, sums=sums, before=before, fill=np.asarray(self._arrays[name].fill_value), codec=layout.codec,
                block_samples=layout.block_samples, chunk_samples=layout.chunk_samples,
            )  # fmt: skip
            self.root.write_pieces(shard_key(site, layer, block), pieces)
        return sums

    @property
    def _encodes(self) -> bool:
        """Whether TensorStore makes the bytes of a shard: compressed ones, and those that are sent whole."""
        return self.layout.codec == "zstd" or not self.root.streams

    def _start(self, name: str, start: int, rows: Array, *, layer: int = 0) -> Operation[Any]:
        """Starts writing a whole shard or chunk through TensorStore."""
        array, rows = self._arrays[name], self._padded(name, rows)
        block = start // self.layout.block_samples
        key = f"{name}/c/{layer}/{block}" if array.rank > rows.ndim else f"{name}/c/{block}"
        self.root.refuse_link(key)
        span = slice(start, start + len(rows))
        target = array[layer, span] if array.rank > rows.ndim else array[span]
        begin = functools.partial(target.write, rows, can_reference_source_data_indefinitely=not self.root.keeps_memory)
        return self.root.begin(f"write {key} of {self.root.url}", begin, size=rows.nbytes)

    def _padded(self, name: str, rows: Array) -> Array:
        """Rows of a whole block: a short last block is filled up with the fill value."""
        missing = self.layout.block_samples - len(rows)
        if not missing:
            return rows
        fill = np.zeros((), np.uint8) if name == "valid" else self._arrays[name].fill_value
        return np.concatenate([rows, np.full((missing, *rows.shape[1:]), fill, rows.dtype)])

    def _write_labels(self) -> None:
        """The `layer` coordinates, unless they are there: buckets refuse many writes of one object within a second."""
        wanted = _label_objects(self.plan)
        found = dict(zip(wanted, self.root.read_all(wanted), strict=True))
        self.root.write_all({key: data for key, data in wanted.items() if found[key] != data})


def _label_objects(plan: Plan) -> dict[str, bytes]:
    """Key and bytes of every chunk of the `layer` coordinates, the last of each filled up."""
    objects: dict[str, bytes] = {}
    chunks = label_chunks(plan)
    for site in plan.layout.sites:
        if site.layers is None:
            continue
        name = plan.layout.layer_dimension(site)
        labels = np.pad(np.asarray(site.layers, "<i4"), (0, -len(site.layers) % chunks[name]), constant_values=-1)
        for number, part in enumerate(labels.reshape(-1, chunks[name])):
            objects[f"{name}/c/{number}"] = with_checksum(part.tobytes())
    return objects


def _joined(before: Array | None, rows: Array) -> Array:
    """The values of a block: those that were there, then those that are appended."""
    return rows if before is None else np.concatenate([before, rows])


def _range(values: Array) -> tuple[int, int]:
    """The lowest and the highest value of a column in a block."""
    return int(values.min()), int(values.max())


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
    """Rows as [layer, sample, width] in the stored dtype; those of each layer are contiguous."""
    values = _as_numpy(given, f"site {site.name!r}")
    shape = (count, site.width) if site.layers is None else (len(site.layers), count, site.width)
    if values.shape != shape:
        axes = "sample, width" if site.layers is None else "layer, sample, width"
        raise InputError(f"site {site.name!r} has shape {values.shape}, expected {shape}: ({axes}) of this block")
    stored = as_stored(values, site.dtype, what=f"site {site.name!r}").reshape(site.rows_per_sample, count, site.width)
    if all(rows.flags.c_contiguous for rows in stored):  # a part of a buffer is too, and is not copied
        return stored
    return np.ascontiguousarray(stored)


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
            raise InputError(
                f"site {site.name!r}{site.layer_text(layer)}, sample {start + row} holds NaN or infinity, expected "
                "finite activations; find out why the model produced it"
            )
