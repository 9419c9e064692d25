"""Shuffled minibatches of a finished store: seeded, endless or for some epochs, and resumable from a few numbers.

The order is `actstore.shuffle`'s: a pure function of seed, epoch and position. Reading goes window by window: all rows
of a window are read into one buffer and compared with their commit markers, while the window before is handed out.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar, cast

import numpy as np
from jaxtyping import Int64, Shaped, UInt

from actstore.errors import InputError
from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.layout import Layout, Site, whole_number
from actstore.mapped import MappedRows, can_map
from actstore.moments import as_integers
from actstore.schema import Plan
from actstore.shuffle import BlockOrder, ExactOrder
from actstore.vouchers import Vouchers

Order: TypeAlias = Literal["block", "exact"]
Array: TypeAlias = Shaped[np.ndarray, "..."]
Rows = TypeVar("Rows", bound=Array | dict[str, Array])
WINDOW_BYTES = 256 << 20  # 512 chunks of 512 KiB


@dataclasses.dataclass(frozen=True)
class Batch(Generic[Rows]):
    """Rows, and the samples they are.

    `rows` is a fresh, writable array [batch, width] in the stored dtype: a trainer may change it in place. A loader of
    several layers or sites has a dictionary by site, [batch, layer, width] each, [batch, width] without layers.
    """

    rows: Rows
    samples: Int64[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """One site and the indices of some of its layers; `[0]` where it has none."""

    site: Site
    layers: tuple[int, ...]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all its layers."""
        return self.site.row_bytes * len(self.layers)


@dataclasses.dataclass(frozen=True)
class _Window:
    """Rows as they were read, by site and layer, and the shuffled order in which they are handed out."""

    pools: tuple[tuple[UInt[np.ndarray, "..."], ...], ...]
    places: Int64[np.ndarray, " samples"]
    samples: Int64[np.ndarray, " samples"]


class Batches(Generic[Rows]):
    """An iterator of minibatches over one site and layer, or several, aligned by sample. Made by `Store.batches`.

    Iterating gives the rows alone; `next_batch` gives them with their sample numbers. `state()` is a small dictionary;
    `restore(state)` continues exactly there. Memory: two windows and one batch. Use it from one thread, and `close()`
    it (or use `with`) when it is not used up. It can be copied to another process, which then reads for itself.
    """

    def __init__(
        self,
        root: Root,
        plan: Plan,
        selections: Sequence[Selection],
        *,
        batch_size: int,
        seed: int,
        stacked: bool = False,
        epochs: int | None = None,
        drop_remainder: bool = True,
        order: Order = "block",
        window_bytes: int = WINDOW_BYTES,
        part: tuple[int, int] = (0, 1),
        check: bool = True,
    ) -> None:
        layout = plan.layout
        _check(layout, batch_size, seed, epochs, window_bytes, part, drop_remainder=drop_remainder)
        self._selections, self._stacked, self._part = tuple(selections), stacked, part
        self._readers = [_Reader(root, plan, selection, check=check) for selection in selections]
        sample_bytes = sum(selection.sample_bytes for selection in selections)
        self._order: BlockOrder | ExactOrder
        if order == "block":
            window = _window_chunks(layout, window_bytes, sample_bytes)
            self._order = BlockOrder(layout.samples, seed, layout.chunk_samples, window)
        elif order == "exact":
            window = max(window_bytes // max(sample_bytes, 256), batch_size, 1)
            self._order = ExactOrder(layout.samples, seed, window)
        else:
            raise InputError(f"order is {order!r}; expected 'block' or 'exact'")
        self._batch_size, self._epochs, self._drop = batch_size, epochs, drop_remainder
        one = selections[0]
        settings = [one.site.name, one.layers[0], batch_size, seed, window, drop_remainder]
        if stacked or order == "exact":
            settings = [*((each.site.name, each.layers) for each in selections), *settings[2:], order, stacked]
        self._identity = _identity(plan, *settings)
        self._epoch, self._position = 0, 0
        self._reader: ThreadPoolExecutor | None = None
        self._ready: dict[tuple[int, int], Future[_Window]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands where this one does, and has read nothing."""
        return self.__dict__ | {"_reader": None, "_ready": {}}

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return self.next_batch().rows

    def next_batch(self) -> Batch[Rows]:
        """The next minibatch with its sample numbers.

        Raises:
            StopIteration: `epochs` epochs were given.
            StorageError: reading failed; the iterator stays where it was, calling again retries.
            CorruptStoreError: a shard is missing, damaged, swapped or stale; names site, layer and block.
        """
        samples = self._order.samples
        left = samples - self._position
        if left <= 0 or (self._drop and left < self._batch_size):
            self._epoch, self._position = self._epoch + 1, 0
            left = samples
        if self._epochs is not None and self._epoch >= self._epochs:
            self.close()
            raise StopIteration
        count = min(self._batch_size, left)
        number, parts = self._part
        first, last = (self._position + count * edge // parts for edge in (number, number + 1))
        batch = self._gather(first, last)
        self._position += count
        return batch

    def next_or_none(self) -> Batch[Rows] | None:
        """The next minibatch with its sample numbers, or None after the last epoch: for loops that need both."""
        try:
            return self.next_batch()
        except StopIteration:
            return None

    def state(self) -> dict[str, int | str]:
        """Where the iterator stands: JSON of less than 200 bytes, whatever the size of the store.

        It counts whole minibatches: a loader of any other part, of any other number of parts, takes it too.
        """
        return {"version": 1, "epoch": self._epoch, "position": self._position, "loader": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at `state`: the next batch is the one that followed it.

        Raises:
            InputError: the state is of another store, site, layer, seed, order, window or batch size.
        """
        numbers = [state.get("epoch"), state.get("position")]
        whole = all(isinstance(number, int) and number >= 0 for number in numbers)
        if set(state) != {"version", "epoch", "position", "loader"} or not whole:
            raise InputError(f"not a state of batches: {str(state)[:80]}; expected what state() returned")
        if state["loader"] != self._identity or state["version"] != 1:
            raise InputError(
                f"the state belongs to the loader {state['loader']}, this one is {self._identity}: another store, "
                "site, layer, seed, order, window or batch size; make the loader with the settings it had"
            )
        if state["position"] > self._order.samples:
            raise InputError(
                f"the state is at sample {state['position']}, the store has {self._order.samples}; not restored"
            )
        self._epoch, self._position = state["epoch"], state["position"]

    def close(self) -> None:
        """Stops reading ahead and frees the windows. Harmless when called again; the next minibatch starts anew."""
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
            self._reader = None
        self._ready.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, start: int, stop: int) -> Batch[Rows]:
        """Epoch positions start..stop-1, from one window or across several, copied into fresh arrays."""
        samples = np.empty(stop - start, np.int64)
        rows = [
            np.empty((stop - start, len(each.layers), each.site.width), each.site.dtype) for each in self._selections
        ]
        position = start
        while position < stop:
            first, last = self._order.window_at(self._epoch, position)
            window, end = self._window(first, last), min(stop, last)
            part, filled = slice(position - first, end - first), slice(position - start, end - start)
            samples[filled] = window.samples[part]
            for target, pools in zip(rows, window.pools, strict=True):
                for layer, pool in enumerate(pools):
                    out = as_integers(target[filled, layer])
                    if len(pools) == 1:
                        np.take(pool, window.places[part], axis=0, out=out, mode="clip")
                    else:  # NumPy cannot take into a part of each row
                        out[...] = pool[window.places[part]]
            position = end
        if not self._stacked:
            return Batch(cast(Rows, rows[0][:, 0]), samples)
        by_site = {
            each.site.name: values[:, 0] if each.site.layers is None else values
            for each, values in zip(self._selections, rows, strict=True)
        }
        return Batch(cast(Rows, by_site), samples)

    def _window(self, first: int, last: int) -> "_Window":
        """The window [first, last) of this epoch; the next one is read meanwhile."""
        self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="actstore-batches")
        wanted = [key for key in [(self._epoch, first), self._after(last)] if key is not None]
        self._ready = {key: window for key, window in self._ready.items() if key in wanted}
        for key in wanted:
            if key not in self._ready:
                self._ready[key] = self._reader.submit(self._load, *key)
        try:
            return self._ready[(self._epoch, first)].result()
        except BaseException:
            self._ready.pop((self._epoch, first), None)
            raise

    def _after(self, last: int) -> tuple[int, int] | None:
        """Epoch and first position of the window after the one that ends at `last`; None after the last epoch."""
        if last < self._order.samples:
            return self._epoch, last
        more = self._epochs is None or self._epoch + 1 < self._epochs
        return (self._epoch + 1, 0) if more else None

    def _load(self, epoch: int, first: int) -> "_Window":
        """Reads one window into buffers, and says where each of its samples lies."""
        _, last = self._order.window_at(epoch, first)
        samples = self._order.rows(epoch, first, last)
        if isinstance(self._order, ExactOrder):
            stored, places = np.unique(samples, return_inverse=True)
            return _Window(tuple(reader.rows(stored) for reader in self._readers), places, samples)
        size = self._order.chunk_samples
        chunks, member = np.unique(samples // size, return_inverse=True)
        return _Window(
            tuple(reader.chunks(chunks) for reader in self._readers), member * size + samples % size, samples
        )  # fmt: skip


class _Reader:
    """Reads rows of some layers of one site into fresh buffers: by mapping local files, else through TensorStore."""

    def __init__(self, root: Root, plan: Plan, selection: Selection, *, check: bool) -> None:
        self._site, self._layers = selection.site, selection.layers
        only = (selection.site.name, selection.layers[0]) if len(selection.layers) == 1 else None
        vouchers = Vouchers(root, plan, only=only) if check else None
        self._source = Source.open(root, plan, selection.site.name, vouchers=vouchers)
        mapped = can_map(root, self._source)
        self._mapped = [MappedRows(root, self._source, self._site, layer) for layer in self._layers if mapped]

    def rows(self, samples: Int64[np.ndarray, " row"]) -> tuple[UInt[np.ndarray, "rows width"], ...]:
        """Some samples, ascending, of every layer."""
        pools = [as_integers(np.empty((len(samples), self._site.width), self._site.dtype)) for _ in self._layers]
        for number, pool in enumerate(pools):
            if self._mapped:
                self._mapped[number].take(samples, pool)
            else:
                gather(self._source, [self._layers[number]], samples, pool.view(self._site.dtype)[None])
        return tuple(pools)

    def chunks(self, chunks: Int64[np.ndarray, " chunk"]) -> tuple[UInt[np.ndarray, "rows width"], ...]:
        """Whole chunks, ascending, of every layer; only the store's last chunk can be short."""
        size = self._source.layout.chunk_samples
        stored = (chunks[:, None] * size + np.arange(size)).reshape(-1)
        stored = stored[: np.searchsorted(stored, self._source.layout.samples)]
        if not self._mapped:
            return self.rows(stored)
        pools = [as_integers(np.empty((len(stored), self._site.width), self._site.dtype)) for _ in self._layers]
        for mapped, pool in zip(self._mapped, pools, strict=True):
            mapped.copy(chunks, pool)
        return tuple(pools)


def _check(
    layout: Layout,
    batch_size: int,
    seed: int,
    epochs: int | None,
    window_bytes: int,
    part: tuple[int, int],
    *,
    drop_remainder: bool,
) -> None:
    """Refuses settings that cannot give a batch."""
    for value, what in [(batch_size, "batch_size"), (window_bytes, "window_bytes"), (epochs or 1, "epochs")]:
        whole_number(value, what)
    if batch_size < 1 or window_bytes < 1:
        raise InputError(f"batch_size {batch_size} and window_bytes {window_bytes} must be positive")
    if seed < 0:
        raise InputError(f"seed is {seed}; expected a number >= 0")
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs is {epochs}; expected a positive number, or None for endless batches")
    if drop_remainder and batch_size > layout.samples:
        raise InputError(
            f"batch_size is {batch_size:,}, the store holds {layout.samples:,} samples: no batch would ever be full; "
            "use a smaller batch_size, or drop_remainder=False"
        )
    number, parts = part
    if not 0 <= number < parts:
        raise InputError(f"part is {part}; expected (number, parts) with 0 <= number < parts, such as (0, 4)")
    if batch_size % parts:
        raise InputError(
            f"batch_size {batch_size} cannot be divided into {parts} equal parts; use a multiple of {parts}, such as "
            f"{-(-batch_size // parts) * parts}"
        )


def _window_chunks(layout: Layout, window_bytes: int, sample_bytes: int) -> int:
    """Chunks of a window of about `window_bytes`: fewer where rows or chunks are so small that numbers outweigh them.

    Shuffling takes about 100 bytes per sample, reading some kilobytes per chunk. A store that is smaller than these
    bounds cannot exceed them.
    """
    wanted = max(window_bytes // (sample_bytes * layout.chunk_samples), 1)
    samples, chunks = max(window_bytes // 256, 1 << 16), max(window_bytes // (32 << 10), 1 << 10)
    if layout.samples <= min(samples, chunks * layout.chunk_samples):
        return wanted
    return max(min(wanted, samples // layout.chunk_samples, chunks), 1)


def _identity(plan: Plan, *settings: object) -> str:
    """Sixteen hex digits that differ when anything that decides the order differs."""
    return hashlib.sha256(json.dumps([plan.fingerprint, *map(str, settings)]).encode()).hexdigest()[:16]
