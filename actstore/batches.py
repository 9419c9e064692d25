"""Shuffled minibatches of a finished store: seeded, endless or for some epochs, and resumable from a few numbers.

The order is `actstore.shuffle`'s: a pure function of seed, epoch and position. Reading goes window by window: all
chunks of a window are read into one buffer by many concurrent reads and compared with their commit markers, while the
window before is handed out.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from jaxtyping import Int64, Shaped

from actstore.errors import InputError
from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.layout import Layout, whole_number
from actstore.schema import Plan
from actstore.shuffle import BlockOrder
from actstore.vouchers import Vouchers

WINDOW_BYTES = 256 << 20  # 512 chunks of 512 KiB


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one site and layer, and the samples they are.

    `rows` is a fresh, writable array in the stored dtype: a trainer may change it in place.
    """

    rows: Shaped[np.ndarray, "batch width"]
    samples: Int64[np.ndarray, " batch"]


@dataclasses.dataclass(frozen=True)
class _Window:
    """The rows of some chunks as they lie on disk, and the shuffled order in which they are handed out."""

    pool: Shaped[np.ndarray, "rows width"]
    places: Int64[np.ndarray, " samples"]
    samples: Int64[np.ndarray, " samples"]


class Batches:
    """An iterator of minibatches [batch, width] over one site and layer. Made by `Store.batches`.

    Iterating gives the rows alone; `next_batch` gives them with their sample numbers. `state()` is a small dictionary;
    `restore(state)` continues exactly there. Memory: two windows and one batch. Use it from one thread, and `close()`
    it (or use `with`) when it is not used up.
    """

    def __init__(
        self,
        root: Root,
        plan: Plan,
        *,
        site: str,
        layer: int | None,
        batch_size: int,
        seed: int,
        epochs: int | None = None,
        drop_remainder: bool = True,
        window_bytes: int = WINDOW_BYTES,
        check: bool = True,
    ) -> None:
        where = plan.layout.site(site)
        index = where.layer_index(layer)
        _check(plan.layout, batch_size, seed, epochs, window_bytes, drop_remainder=drop_remainder)
        vouchers = Vouchers(root, plan, only=(site, index)) if check else None
        self._source, self._layer = Source.open(root, plan, site, vouchers=vouchers), index
        self._dtype = self._source.array.dtype.numpy_dtype
        self._width, self._chunk = where.width, plan.layout.chunk_samples
        window_chunks = _window_chunks(plan.layout, window_bytes, where.row_bytes)
        self._order = BlockOrder(plan.layout.samples, seed, self._chunk, window_chunks)
        self._batch_size, self._epochs, self._drop = batch_size, epochs, drop_remainder
        self._identity = _identity(plan, site, index, batch_size, seed, window_chunks, drop_remainder)
        self._epoch, self._position = 0, 0
        self._reader: ThreadPoolExecutor | None = None
        self._ready: dict[tuple[int, int], Future[_Window]] = {}

    def __iter__(self) -> Iterator[Shaped[np.ndarray, "batch width"]]:
        return self

    def __next__(self) -> Shaped[np.ndarray, "batch width"]:
        return self.next_batch().rows

    def next_batch(self) -> Batch:
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
        stop = self._position + min(self._batch_size, left)
        batch = self._gather(self._position, stop)
        self._position = stop
        return batch

    def next_or_none(self) -> Batch | None:
        """The next minibatch with its sample numbers, or None after the last epoch: for loops that need both."""
        try:
            return self.next_batch()
        except StopIteration:
            return None

    def state(self) -> dict[str, int | str]:
        """Where the iterator stands: JSON of less than 200 bytes, whatever the size of the store."""
        return {"version": 1, "epoch": self._epoch, "position": self._position, "loader": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at `state`: the next batch is the one that followed it.

        Raises:
            InputError: the state is of another store, site, layer, seed, window or batch size.
        """
        numbers = [state.get("epoch"), state.get("position")]
        whole = all(isinstance(number, int) and number >= 0 for number in numbers)
        if set(state) != {"version", "epoch", "position", "loader"} or not whole:
            raise InputError(f"not a state of batches: {str(state)[:80]}; expected what state() returned")
        if state["loader"] != self._identity or state["version"] != 1:
            raise InputError(
                f"the state belongs to the loader {state['loader']}, this one is {self._identity}: another store, "
                "site, layer, seed, window or batch size; make the loader with the settings it had"
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

    def _gather(self, start: int, stop: int) -> Batch:
        """Epoch positions start..stop-1, from one window or across several, copied into a fresh array."""
        rows = np.empty((stop - start, self._width), self._dtype)
        samples = np.empty(stop - start, np.int64)
        position = start
        while position < stop:
            first, last = self._order.window_at(self._epoch, position)
            window, end = self._window(first, last), min(stop, last)
            part = slice(position - first, end - first)
            filled = slice(position - start, end - start)
            samples[filled] = window.samples[part]
            np.take(window.pool, window.places[part], axis=0, out=_as_integers(rows[filled]), mode="clip")
            position = end
        return Batch(rows, samples)

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
        """Reads one window, chunk by chunk into one buffer, and says where each of its samples lies."""
        _, last = self._order.window_at(epoch, first)
        samples = self._order.rows(epoch, first, last)
        chunks, member = np.unique(samples // self._chunk, return_inverse=True)
        stored = (chunks[:, None] * self._chunk + np.arange(self._chunk)).reshape(-1)
        stored = stored[: np.searchsorted(stored, self._order.samples)]  # only the store's last chunk can be short
        pool = np.empty((len(stored), self._width), self._dtype)
        gather(self._source, [self._layer], stored, pool[None])
        return _Window(_as_integers(pool), member * self._chunk + samples % self._chunk, samples)


def _check(
    layout: Layout, batch_size: int, seed: int, epochs: int | None, window_bytes: int, *, drop_remainder: bool
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


def _window_chunks(layout: Layout, window_bytes: int, row_bytes: int) -> int:
    """Chunks of a window of about `window_bytes`: fewer where rows or chunks are so small that numbers outweigh them.

    Shuffling takes about 100 bytes per sample, reading some kilobytes per chunk. A store that is smaller than these
    bounds cannot exceed them.
    """
    wanted = max(window_bytes // (row_bytes * layout.chunk_samples), 1)
    samples, chunks = max(window_bytes // 256, 1 << 16), max(window_bytes // (32 << 10), 1 << 10)
    if layout.samples <= min(samples, chunks * layout.chunk_samples):
        return wanted
    return max(min(wanted, samples // layout.chunk_samples, chunks), 1)


def _as_integers(rows: Shaped[np.ndarray, "rows width"]) -> Shaped[np.ndarray, "rows width"]:
    """The same memory as unsigned integers, which NumPy copies faster than types it does not know."""
    return rows.view(f"u{rows.dtype.itemsize}")


def _identity(plan: Plan, *settings: object) -> str:
    """Sixteen hex digits that differ when anything that decides the order differs."""
    return hashlib.sha256(json.dumps([plan.fingerprint, *map(str, settings)]).encode()).hexdigest()[:16]
