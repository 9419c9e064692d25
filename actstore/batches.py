"""Shuffled minibatches of a finished store: seeded, endless or for some epochs, and resumable from a few numbers.

The order is `actstore.shuffle`'s: a pure function of seed, epoch and position. A position counts all samples, also
those that a filter leaves out, so that a state stays small. Rows come from `actstore.windows`, window after window.
"""

import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Self, TypeAlias, TypeVar, cast

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from actstore.errors import InputError
from actstore.filters import Filter
from actstore.kept import Kept, norm_statistics
from actstore.kvstore import Root, forked, refuse_fork
from actstore.layout import Layout, whole_number
from actstore.moments import to_float32
from actstore.scaling import Normalization, by_statistics, check_normalization, normalize_rows, scale_of
from actstore.schema import Plan
from actstore.shuffle import BlockOrder, ExactOrder
from actstore.windows import Selection, Window, Windows

Order: TypeAlias = Literal["block", "exact"]
Array: TypeAlias = Shaped[np.ndarray, "..."]
Rows = TypeVar("Rows", bound=Array | dict[str, Array])
Place: TypeAlias = tuple[str, int | None]
WINDOW_BYTES: dict[Order, int] = {"block": 2 << 30, "exact": 512 << 20}
"""By default: in block order 2,048 chunks of 512 KiB that are used, and as many that are read meanwhile."""


@dataclasses.dataclass(frozen=True)
class Batch(Generic[Rows]):
    """Rows, and the samples they are.

    `rows` is a fresh, writable array [batch, width] in the stored dtype, or float32 where it is normalised: a trainer
    may change it in place. A loader of several layers or sites has a dictionary by site, [batch, layer, width] each,
    [batch, width] without layers.
    """

    rows: Rows
    samples: Int64[np.ndarray, " batch"]


class _Piece(NamedTuple):
    """A stretch of kept samples of one window: numbers `start` to `stop - 1`."""

    window: Window
    start: int
    stop: int


class Batches(Generic[Rows]):
    """An iterator of minibatches over one site and layer, or several, aligned by sample. Made by `Store.batches`.

    Iterating gives the rows alone; `next_batch` gives them with their sample numbers. `state()` is a small dictionary;
    `restore(state)` continues exactly there. Memory: `window_bytes`, three batches and 100 MB for reading, and with a
    filter a bit per sample, at most 128 MiB. Several threads may share it: each minibatch goes to one of them.
    Of a remote store reading takes up to 600 MB. `close()` it (or use `with`) when it is not used up. It can be copied
    to another process, which reads for itself.
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
        window_bytes: int | None = None,
        part: tuple[int, int] = (0, 1),
        where: Filter | None = None,
        normalize: Normalization | None = None,
        check: bool = True,
    ) -> None:
        layout = plan.layout
        batch_size, seed = whole_number(batch_size, "batch_size"), whole_number(seed, "seed")
        window_bytes = window_size(order, window_bytes)
        epochs, part = None if epochs is None else whole_number(epochs, "epochs"), _pair(part)
        drop_remainder = bool(drop_remainder)
        _check(layout, batch_size, seed, epochs, window_bytes, part, drop_remainder=drop_remainder)
        if normalize is not None:
            check_normalization(normalize)
        self._selections, self._stacked, self._part = tuple(selections), stacked, part
        sample_bytes = sum(selection.sample_bytes for selection in selections)
        half = max(window_bytes // 2, 1)  # the other half is read meanwhile
        self._order: BlockOrder | ExactOrder
        if order == "block":
            window = _window_chunks(layout, half, sample_bytes)
            self._order = BlockOrder(layout.samples, seed, layout.chunk_samples, window)
        else:
            window = max(half // max(sample_bytes, 256), batch_size, 1)
            self._order = ExactOrder(layout.samples, seed, window)
        self._batch_size, self._epochs, self._drop = batch_size, epochs, drop_remainder
        self._normalize, self._root, self._plan, self._check = normalize, root, plan, check
        places = [(each.site, layer) for each in selections for layer in each.layers]
        self._kept = Kept(root, plan, where, places, check=check) if where is not None else None
        self._windows = Windows(root, plan, selections, self._order, kept=self._kept, epochs=epochs, check=check)
        one = selections[0]
        settings: list[object] = [one.site.name, one.layers[0], batch_size, seed, window, drop_remainder]
        if stacked or order == "exact":
            settings = [*((each.site.name, each.layers) for each in selections), *settings[2:], order, stacked]
        if where is not None or normalize is not None:
            settings += [json.dumps(where and where.as_json()), normalize]
        self._identity = _identity(plan, *settings)
        self._reached = (0, 0)  # epoch and position
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A copy stands where this one does, and has read nothing."""
        refuse_fork()
        with self._lock:
            return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return self.next_batch().rows

    @functools.cached_property
    def scales(self) -> dict[Place, float]:
        """What the rows of each (site, layer) are multiplied by: empty unless all are by one number.

        It is exact, over all rows that the filter keeps. Costs reading their norms, 4 bytes per sample, twice.

        Raises:
            InputError: the filter keeps nothing, or all rows are zero.
            CorruptStoreError: norms are missing or damaged.
        """
        if self._normalize is None or not by_statistics(self._normalize):
            return {}
        found: dict[Place, float] = {}
        for site, layers in self._selections:
            for layer in layers:
                statistics = norm_statistics(
                    self._root, self._plan, site, layer, kept=self._kept, check=self._check
                )  # fmt: skip
                what = f"{site.name}{site.layer_text(layer)} of {self._root.url}"
                found[site.name, site.layer_label(layer)] = scale_of(self._normalize, statistics, site.width, what=what)
        return found

    @property
    def window_samples(self) -> int:
        """Samples that are shuffled together in block order, read together in exact order, where there are enough."""
        first, last = self._order.window_at(0, 0)
        return last - first

    def next_batch(self) -> Batch[Rows]:
        """The next minibatch with its sample numbers.

        Raises:
            StopIteration: `epochs` epochs were given.
            StorageError: reading failed; the iterator stays where it was, calling again retries.
            CorruptStoreError: a shard is missing, damaged, swapped or stale; names site, layer and block.
            InputError: a filter keeps too few samples for a minibatch.
        """
        refuse_fork()  # before the lock: a thread that is not in this process may hold it
        with self._lock:
            pieces, place = self._next()
            if not pieces:
                self._reached = place
                self.close()
                raise StopIteration
            batch = self._gather(_part(pieces, *self._part))
            self._reached = place
            return batch

    def next_or_none(self) -> Batch[Rows] | None:
        """The next minibatch with its sample numbers, or None after the last epoch: for loops that need both."""
        try:
            return self.next_batch()
        except StopIteration:
            return None

    def skip(self, batches: int) -> None:
        """Passes over some minibatches, at most to the end. Without a filter it reads nothing.

        Raises:
            StoreError: reading for the filter failed; the iterator stays where it was.
        """
        if whole_number(batches, "batches") < 0:
            raise InputError(f"batches is {batches}; expected 0 or more")
        refuse_fork()
        with self._lock:
            before = self._reached
            try:
                for _ in range(batches):
                    if self._kept is None:
                        epoch, start, stop = self._step()
                        self._reached, ended = (epoch, stop), start == stop
                    else:
                        pieces, self._reached = self._next()
                        ended = not pieces
                    if ended:
                        return
            except BaseException:
                self._reached = before
                raise

    def state(self) -> dict[str, int | str]:
        """Where the iterator stands: JSON of less than 200 bytes, whatever the size of the store.

        It counts whole minibatches: a loader of any other part, of any other number of parts, takes it too.
        """
        epoch, position = self._reached
        return {"version": 1, "epoch": epoch, "position": position, "loader": self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at `state`: the next batch is the one that followed it.

        Raises:
            InputError: the state is of another store, site, layer, seed, order, window, batch size or filter.
        """
        if not _is_state(state):
            raise InputError(f"not a state of batches: {str(state)[:80]}; expected what state() returned")
        if state["loader"] != self._identity or state["version"] != 1:
            raise InputError(
                f"the state belongs to the loader {state['loader']}, this one is {self._identity}: another store, "
                "site, layer, seed, order, window, batch size, filter or normalisation; make the loader with the "
                "settings it had"
            )
        if state["position"] > self._order.samples:
            raise InputError(
                f"the state is at sample {state['position']}, the store has {self._order.samples}; not restored"
            )
        refuse_fork()
        with self._lock:
            self._reached = state["epoch"], state["position"]

    def close(self) -> None:
        """Stops reading ahead and frees the windows. Harmless when called again; the next minibatch starts anew."""
        if forked():  # its thread is not here, and its lock may be held by one that is not here either
            return
        with self._lock:
            self._windows.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> tuple[list[_Piece], tuple[int, int]]:
        """The pieces of the next minibatch, and the epoch and position after it; no pieces after the last epoch."""
        if self._kept is None:
            epoch, start, stop = self._step()
            return self._collect(epoch, start, stop)[0], (epoch, stop)
        epoch, position = self._reached
        while self._epochs is None or epoch < self._epochs:
            pieces, after = self._collect(epoch, position, self._order.samples)
            count = sum(piece.stop - piece.start for piece in pieces)
            if count == self._batch_size or (count and not self._drop):
                return pieces, (epoch, after)
            if position == 0:
                raise InputError(_too_few(count, self._order.samples, self._batch_size))
            epoch, position = epoch + 1, 0
        return [], (epoch, position)

    def _step(self) -> tuple[int, int, int]:
        """Epoch and positions [start, stop) of the next minibatch where nothing is filtered; none after the end."""
        epoch, position = self._reached
        left = self._order.samples - position
        if left <= 0 or (self._drop and left < self._batch_size):
            epoch, position, left = epoch + 1, 0, self._order.samples
        if self._epochs is not None and epoch >= self._epochs:
            return epoch, position, position
        return epoch, position, position + min(self._batch_size, left)

    def _collect(self, epoch: int, position: int, stop: int) -> tuple[list[_Piece], int]:
        """At most a minibatch of kept samples from a position on, and the position after the last of them."""
        pieces, wanted = list[_Piece](), self._batch_size
        while wanted and position < stop:
            window = self._windows.at(epoch, position, ahead=not pieces)  # never three windows at once
            first = window.index_at(position)
            last = min(first + wanted, window.index_at(min(stop, window.last)))
            if first < last:
                pieces.append(_Piece(window, first, last))
            wanted -= last - first
            position = window.last if wanted else window.position_after(last - 1)
        return pieces, position

    def _gather(self, pieces: list[_Piece]) -> Batch[Rows]:
        """The samples of some pieces, copied into fresh arrays."""
        found = [window.samples[start:stop] for window, start, stop in pieces]
        samples = np.concatenate(found) if found else np.empty(0, np.int64)
        rows = [self._rows(number, pieces, len(samples)) for number in range(len(self._selections))]
        if not self._stacked:
            return Batch(cast(Rows, rows[0][:, 0]), samples)
        by_site = {
            each.site.name: values[:, 0] if each.site.layers is None else values
            for each, values in zip(self._selections, rows, strict=True)
        }
        return Batch(cast(Rows, by_site), samples)

    def _rows(self, number: int, pieces: list[_Piece], count: int) -> Shaped[np.ndarray, "row layer width"]:
        """The rows of one selection."""
        site, layers = self._selections[number]
        if self._normalize is None and len(layers) == len(pieces) == 1:
            window, start, stop = pieces[0]
            return window.rows[number][0].taken(slice(start, stop), site.dtype)[:, None]
        out = np.empty((count, len(layers), site.width), np.float32 if self._normalize else site.dtype)
        filled = 0
        for window, start, stop in pieces:
            part, span = slice(start, stop), slice(filled, filled + stop - start)
            for place, rows in enumerate(window.rows[number]):
                if self._normalize is None:
                    rows.copy(part, out[span, place])
                else:
                    taken, label = rows.taken(part, site.dtype), site.layer_label(layers[place])
                    out[span, place] = self._normalized(self._normalize, taken, (site.name, label))
            filled = span.stop
        return out

    def _normalized(
        self, how: Normalization, rows: Shaped[np.ndarray, "row width"], place: Place
    ) -> Float32[np.ndarray, "row width"]:
        """Rows of one site and layer in float32, normalised."""
        wide = to_float32(rows)
        normalize_rows(how, wide, self.scales[place] if by_statistics(how) else 1.0)
        return wide


def _part(pieces: list[_Piece], number: int, parts: int) -> list[_Piece]:
    """The share of one of `parts` processes in a minibatch."""
    count = sum(piece.stop - piece.start for piece in pieces)
    first, last = (count * edge // parts for edge in (number, number + 1))
    found, before = [], 0
    for window, start, stop in pieces:
        cut = _Piece(window, start + max(first - before, 0), min(stop, start + last - before))
        if cut.start < cut.stop:
            found.append(cut)
        before += stop - start
    return found


def _is_state(state: object) -> bool:
    """Whether it has what `Batches.state` gives."""
    if not isinstance(state, Mapping) or set(state) != {"version", "epoch", "position", "loader"}:
        return False
    return all(isinstance(state[name], int) and state[name] >= 0 for name in ("epoch", "position"))


def _too_few(kept: int, samples: int, batch_size: int) -> str:
    if not kept:
        return f"the filter keeps none of {samples:,} samples; use one that keeps some"
    return (
        f"the filter keeps {kept:,} of {samples:,} samples, batch_size is {batch_size:,}: no batch would ever be full; "
        "use a smaller batch_size, drop_remainder=False, or a filter that keeps more"
    )


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
    _, parts = part
    if batch_size % parts:
        raise InputError(
            f"batch_size {batch_size} cannot be divided into {parts} equal parts; use a multiple of {parts}, such as "
            f"{-(-batch_size // parts) * parts}"
        )


def _pair(part: object) -> tuple[int, int]:
    """Number and count of the processes that share minibatches."""
    pair = [whole_number(value, "part") for value in part] if isinstance(part, Sequence) else []
    if len(pair) != 2 or not 0 <= pair[0] < pair[1]:
        raise InputError(f"part is {part!r}; expected (number, parts) with 0 <= number < parts, such as (0, 4)")
    return pair[0], pair[1]


def window_size(order: Order, given: int | None) -> int:
    """What the caller gave, or what is usual for an order, if there is such an order."""
    if order not in WINDOW_BYTES:
        raise InputError(f"order is {order!r}; expected {' or '.join(map(repr, WINDOW_BYTES))}")
    return WINDOW_BYTES[order] if given is None else whole_number(given, "window_bytes")


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
