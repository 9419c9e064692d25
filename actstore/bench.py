"""What a store gives on this machine: speed, read amplification, shuffle quality, memory, and what limits them.

Everything is measured from outside, on the minibatches of `Store.batches`, beside what this machine does in the same
run: rows taken out of memory, and a plain read of the same files. Nothing is written and no cache is dropped.
"""

import dataclasses
import math
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64, Integer

from actstore.batches import Array, Batches, Order, window_size
from actstore.errors import InputError
from actstore.gather import Source
from actstore.kvstore import Root, storage_errors
from actstore.layout import Layout, Site
from actstore.machine import Growth, disk_bytes, plain_reading, take_rate
from actstore.mapped import can_map
from actstore.metadata import shard_key
from actstore.mixing import (
    expected_groups,
    expected_pairs,
    group_sizes,
    groups_per_batch,
    lag_correlation,
    neighbour_pairs,
)
from actstore.shards import CHECKSUM_BYTES
from actstore.store import Store

BATCH_SIZE = 4096
KEPT_SAMPLES = 1 << 20  # whose numbers are kept for the figures of the shuffle: 8 MiB
COUNTED_SAMPLES = 1 << 24  # whose documents are counted: a second or two; evenly spread blocks of a larger store
PIECE_SAMPLES = 1 << 18  # whose documents are read at once
TAKE_SECONDS = 1.0
WAITED, BUSY, FROM_DISK = 0.5, 0.5, 0.1  # these decide what limits: see `cause_of`

Progress: TypeAlias = Callable[[int, int, str], None]
Cause: TypeAlias = Literal["one window", "copying", "storage", "reading"]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Rates are of activations handed out, from the start to the end of the last window that was begun."""

    batches: int
    seconds: float
    bytes_per_second: float
    rows_per_second: float
    batch_seconds_median: float
    batch_seconds_slowest: float
    first_batch_seconds: float
    take_bytes_per_second: float
    plain_bytes_per_second: float | None
    plain_disk_share: float | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """Bytes read from the store for each byte handed out, counted in decoded chunks or in pages of mapped files.

    `disk_amplification` is what the system read from disks meanwhile, for each byte handed out: 0 is warm. Windows that
    were read ahead and whatever the system read around them are in it. None where the system does not count.
    """

    amplification: float
    unit: Literal["chunks", "pages"]
    disk_amplification: float | None = None


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """What batches mix, beside the expected values of a perfect shuffle. `unit` is what was counted."""

    unit: Literal["documents", "chunks"]
    batches: int
    units_per_batch: float
    units_per_batch_ideal: float
    neighbours: float
    neighbours_ideal: float
    ideal_from_samples: int
    lag_correlation: float
    lag_correlation_error: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Growth while batches were read. `own_bytes` is without pages of mapped files, which the system can take back.

    None where the system does not say.
    """

    before_bytes: int | None
    own_bytes: int | None
    peak_bytes: int | None
    promised_bytes: int


@dataclasses.dataclass(frozen=True)
class Limit:
    """What bounds the speed. `waited_share` of the time the caller's thread had nothing to copy.

    `reader_share` is the processor time of all other threads, per second.
    """

    cause: Cause
    waited_share: float
    reader_share: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All figures of one measurement, and what was measured."""

    store: str
    site: str
    layer: int | None
    samples: int
    layer_bytes: int
    order: Order
    batch_size: int
    window_bytes: int
    window_samples: int
    seed: int
    check: bool
    notes: tuple[str, ...]
    speed: Speed
    reading: Reading
    shuffle: Shuffle
    memory: Memory
    limit: Limit


@dataclasses.dataclass(frozen=True)
class _Run:
    """What was seen while batches were read: samples in their order, seconds of each batch, processor time, disks."""

    order: Int64[np.ndarray, " n"]
    seconds: Float64[np.ndarray, " batch"]
    elapsed: float
    caller_cpu: float
    all_cpu: float
    disk_bytes: int | None
    memory: tuple[int | None, int | None, int | None]

    def limit(self, *, one_window: bool, disk: float | None) -> Limit:
        """The cause with the shares it was judged by."""
        waited = max(1 - self.caller_cpu / self.elapsed, 0.0)
        busy = max(self.all_cpu - self.caller_cpu, 0.0) / self.elapsed
        return Limit(cause_of(one_window=one_window, waited=waited, busy=busy, disk=disk), waited, busy)


def measure(
    store: Store,
    *,
    site: str = "resid_post",
    layer: int | None = None,
    batch_size: int | None = None,
    order: Order = "block",
    window_bytes: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    check: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measures reading shuffled batches of one site and layer.

    Args:
        store: a finished store.
        site: as in `Store.batches`, like `layer`, `order`, `window_bytes`, `seed` and `check`.
        layer: label of the layer; may be left out where the site has only one.
        batch_size: rows of a batch; None is 4,096, or an eighth of a store that holds fewer.
        order: `block` or `exact`.
        window_bytes: of rows that are held at once; None is as in `Store.batches`.
        seconds: of each measurement. Batches are read to the end of a window, so at least one.
        seed: of the order.
        check: False leaves out the comparison with commit markers.
        progress: called with measurements done, measurements in all, and what comes next.

    Beside what the loader holds, memory is 8 bytes for 2^20 samples or a window of them, and afterwards 256 MiB for the
    rows that are taken out of memory.

    Raises:
        UnfinishedStoreError: the store is not complete.
        UnknownNameError: no such site or layer.
        InputError: settings that cannot give a batch, or no time to measure.
        CorruptStoreError: what is read is damaged.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InputError(f"seconds is {seconds}; expected a positive number, such as 5")
    window_bytes = window_size(order, window_bytes)
    found, notes = store.plan.layout.site(site), []
    index, said = found.layer_index(layer), progress or _silent
    if batch_size is None:
        batch_size = BATCH_SIZE if store.samples >= BATCH_SIZE else max(store.samples // 8, 1)
        if batch_size != BATCH_SIZE:
            notes.append(f"batches of {batch_size:,} rows: the store has {store.samples:,} samples")
    said(0, 4, "batches")
    with store.batches(
        site=site, layer=layer, batch_size=batch_size, order=order, window_bytes=window_bytes, seed=seed, check=check
    ) as batches:
        window = batches.window_samples
        run = _read(batches, store.samples, batch_size, window, seconds)
    said(1, 4, "rows in memory")
    taken = take_rate(store.samples, found.row_bytes, batch_size, seconds=min(seconds, TAKE_SECONDS))
    said(2, 4, "plain reading")
    plain, plain_share = _plain(store, found, index, seconds)
    said(3, 4, "documents")
    shuffle = shuffle_of(store, run.order, batch_size)
    reading = reading_of(store, found, run.order[:window], exact=order == "exact")
    said(4, 4, "")

    given_bytes = len(run.seconds) * batch_size * found.row_bytes
    disk = None if run.disk_bytes is None else run.disk_bytes / given_bytes
    return Report(
        store=store.url, site=site, layer=found.layer_label(index), samples=store.samples,
        layer_bytes=store.samples * found.row_bytes, order=order, batch_size=batch_size, window_bytes=window_bytes,
        window_samples=window, seed=seed, check=check, notes=tuple(notes),
        speed=Speed(
            batches=len(run.seconds), seconds=run.elapsed, bytes_per_second=given_bytes / run.elapsed,
            rows_per_second=given_bytes / found.row_bytes / run.elapsed,
            batch_seconds_median=float(np.median(run.seconds)),
            batch_seconds_slowest=float(run.seconds[1:].max(initial=0.0)), first_batch_seconds=float(run.seconds[0]),
            take_bytes_per_second=taken, plain_bytes_per_second=plain, plain_disk_share=plain_share,
        ),
        reading=dataclasses.replace(reading, disk_amplification=disk),
        shuffle=shuffle,
        memory=Memory(*run.memory, promised_bytes=(2 * window + batch_size) * found.row_bytes),
        limit=run.limit(one_window=window >= store.samples, disk=disk),
    )  # fmt: skip


def cause_of(*, one_window: bool, waited: float, busy: float, disk: float | None) -> Cause:
    """What bounds the speed of a caller that does nothing with its batches.

    A caller that waits for less than half of the time copies rows: that is the limit. Otherwise it is the reader: its
    threads compute for at least half of the time (`busy`), or they wait for the storage. Where the system counts what
    comes from disks, less than a tenth of a byte for each byte handed out (`disk`) is not the storage's fault, whatever
    the threads wait for.
    """
    if one_window:
        return "one window"
    if waited < WAITED:
        return "copying"
    slow = busy < BUSY if disk is None else disk > FROM_DISK and busy < 2 * BUSY
    return "storage" if slow else "reading"


def verdict(report: Report) -> str:
    """What limits, and what can be done about it, in one sentence."""
    waited = f"the caller waits for {report.limit.waited_share:.0%} of the time"
    match report.limit.cause:
        case "one window":
            return "the layer fits one window: the shuffle is perfect, and a larger window or exact order gains nothing"
        case "copying":
            milliseconds = 1e3 * report.speed.batch_seconds_median
            return f"copying rows into batches: a trainer that takes over {milliseconds:.1f} ms for each does not wait"
        case "storage":
            other = ", or order block, which reads each chunk once" if report.order == "exact" else ""
            return f"the storage, {waited}: once in the page cache it is faster; else use a faster disk{other}"
        case "reading":
            compares = report.check and report.reading.unit == "chunks"  # of single rows, one chunk of each shard is
            less = ", and --no-check (check=False) where the store was just verified" if compares else ""
            return f"reading and comparing checksums, {waited}: faster or idle cores help{less}"


def shuffle_of(store: Store, order: Int64[np.ndarray, " n"], batch_size: int) -> Shuffle:
    """Figures of the shuffle, of samples in the order in which they are handed out, in batches of `batch_size`.

    Groups are documents, or chunks in a store without the column `document`. Reads that column: all of it, or, of a
    store with more than `COUNTED_SAMPLES` samples, evenly spread blocks for the ideal.
    """
    layout = store.plan.layout
    drawn = order[: max(min(len(order), KEPT_SAMPLES) // batch_size, 1) * batch_size]
    documents = any(column.name == "document" for column in layout.columns)
    labels = store.column("document", drawn) if documents else drawn // layout.chunk_samples
    sizes = group_sizes(_documents(store)) if documents else _chunk_sizes(layout)
    by_batch = labels.reshape(-1, batch_size)
    correlation, error = lag_correlation(drawn, samples=store.samples)
    return Shuffle(
        unit="documents" if documents else "chunks",
        batches=len(by_batch),
        units_per_batch=groups_per_batch(by_batch),
        units_per_batch_ideal=expected_groups(sizes, batch_size, samples=store.samples),
        neighbours=neighbour_pairs(by_batch),
        neighbours_ideal=expected_pairs(sizes, samples=store.samples),
        ideal_from_samples=int(sizes.sum()),
        lag_correlation=correlation,
        lag_correlation_error=error,
    )


def reading_of(store: Store, site: Site, window: Int64[np.ndarray, " n"], *, exact: bool) -> Reading:
    """Bytes read per byte handed out, from the samples of one window.

    What is read whole counts whole: chunks, or in exact order of mapped shards the pages of the system that hold a row.
    A disk reads more around each page; a chunk of each shard, read once to be compared, is left out.
    """
    layout, root = store.plan.layout, Root.of(store.url)
    given = len(window) * site.row_bytes
    if exact and can_map(root, Source.open(root, store.plan, site.name, vouchers=None)):
        return Reading(_pages(layout, site, np.sort(window)) * mmap.PAGESIZE / given, "pages")
    starts = np.unique(window // layout.chunk_samples) * layout.chunk_samples
    stops = np.minimum(starts + layout.chunk_samples, layout.samples)
    return Reading(int((stops - starts).sum()) * site.row_bytes / given, "chunks")


def _pages(layout: Layout, site: Site, samples: Int64[np.ndarray, " n"]) -> int:
    """Pages of shard files that hold a byte of any of these samples, ascending."""
    stride = layout.chunk_samples * site.row_bytes + (CHECKSUM_BYTES if layout.codec == "crc32c" else 0)
    block, within = np.divmod(samples, layout.block_samples)
    chunk, row = np.divmod(within, layout.chunk_samples)
    offset = chunk * stride + row * site.row_bytes
    first, last = offset // mmap.PAGESIZE, (offset + site.row_bytes - 1) // mmap.PAGESIZE
    shared = (block[1:] == block[:-1]) & (first[1:] == last[:-1])
    return int((last - first + 1).sum() - shared.sum())


def _read(batches: Batches[Array], samples: int, batch_size: int, window: int, seconds: float) -> _Run:
    """Reads batches for some seconds, and then to the end of a window, so that its reading and its rows both count."""
    turn = min(window, samples // batch_size * batch_size)
    kept = np.full(max(KEPT_SAMPLES, window) + batch_size, -1)  # filled, so that it is in memory before the loader is
    took, rows, filled, memory = [], 0, 0, Growth()
    disk, caller, everyone = disk_bytes(), time.thread_time(), time.process_time()
    started = now = time.perf_counter()
    while now - started < seconds or (rows % turn and rows % turn + batch_size <= turn):
        before = now
        numbers = batches.next_batch().samples
        now = time.perf_counter()
        took.append(now - before)
        rows += batch_size
        if filled + batch_size <= len(kept):
            kept[filled : filled + batch_size] = numbers
            filled += batch_size
        memory.look(now)
    used, everyone, after = time.thread_time() - caller, time.process_time() - everyone, disk_bytes()
    read = after - disk if after is not None and disk is not None else None
    if filled < window and filled + batch_size <= samples:  # the window ends inside the next batch, of the same epoch
        kept[filled : filled + batch_size] = batches.next_batch().samples
        filled += batch_size
    return _Run(kept[:filled], np.array(took), now - started, used, everyone, read, memory.grown())


def _plain(store: Store, site: Site, layer: int, seconds: float) -> tuple[float | None, float | None]:
    """Bytes per second of a plain read of the shards, and the share from disks; None where they are not files here."""
    root, layout = Root.of(store.url), store.plan.layout
    if not root.is_local or not root.path.is_dir():
        return None, None
    folder = root.path
    with storage_errors(f"read the shards of {store.url}"):
        return plain_reading(
            (folder / shard_key(site, layer, block) for block in range(layout.blocks)), seconds=seconds
        )


def _silent(done: int, total: int, note: str) -> None:
    """Progress that nobody looks at."""


def _documents(store: Store) -> Iterator[Integer[np.ndarray, " _"]]:
    """Documents of all samples, or of evenly spread blocks of a large store, some blocks at a time."""
    layout = store.plan.layout
    most = max(COUNTED_SAMPLES // layout.block_samples, 1)
    blocks = range(layout.blocks) if layout.blocks <= most else [n * layout.blocks // most for n in range(most)]
    together = max(PIECE_SAMPLES // layout.block_samples, 1)
    for first in range(0, len(blocks), together):
        spans = [np.arange(*layout.block_range(block)) for block in blocks[first : first + together]]
        yield store.column("document", np.concatenate(spans))


def _chunk_sizes(layout: Layout) -> Int64[np.ndarray, " group"]:
    """Samples of each chunk; the last one can be short."""
    starts = np.arange(0, layout.samples, layout.chunk_samples)
    return np.minimum(starts + layout.chunk_samples, layout.samples) - starts
