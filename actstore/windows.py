"""Windows of an order: what is read at once of some layers, shuffled, one ahead in a thread of its own."""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Int64, UInt, UInt8

from actstore.gather import Source, gather
from actstore.kept import Kept
from actstore.kvstore import Root
from actstore.layout import Site
from actstore.mapped import MappedRows, can_map
from actstore.moments import as_integers
from actstore.schema import Plan
from actstore.shuffle import BlockOrder, ExactOrder
from actstore.vouchers import Vouchers

SCRATCH_BYTES = 16 << 20  # of chunks that are read before the rows of a filter are picked from them


class Selection(NamedTuple):
    """One site and the indices of some of its layers; `[0]` where it has none."""

    site: Site
    layers: tuple[int, ...]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all its layers."""
        return self.site.row_bytes * len(self.layers)


class Window(NamedTuple):
    """Epoch positions `first` to `last - 1`: rows as they were read, and the shuffled order to hand them out in."""

    first: int
    last: int
    pools: tuple[tuple[UInt[np.ndarray, "row width"], ...], ...]
    """By site and layer."""
    places: Int64[np.ndarray, " kept"]
    samples: Int64[np.ndarray, " kept"]
    positions: Int64[np.ndarray, " kept"] | None
    """Where each kept sample stands in the epoch; None where all are kept."""

    def index_at(self, position: int) -> int:
        """Number of the first kept sample at `position` of the epoch or after it."""
        return position - self.first if self.positions is None else int(np.searchsorted(self.positions, position))

    def position_after(self, index: int) -> int:
        """Position in the epoch that follows the kept sample `index`."""
        return (self.first + index if self.positions is None else int(self.positions[index])) + 1


class Windows:
    """The windows of one order. Holds the one that is used and the next, which is read meanwhile."""

    def __init__(
        self,
        root: Root,
        plan: Plan,
        selections: Sequence[Selection],
        order: BlockOrder | ExactOrder,
        *,
        kept: Kept | None,
        epochs: int | None,
        check: bool,
    ) -> None:
        """Reads nothing."""
        self._readers = [_Reader(root, plan, selection, check=check) for selection in selections]
        self._order, self._kept, self._epochs = order, kept, epochs
        self._thread: ThreadPoolExecutor | None = None
        self._ready: dict[tuple[int, int], Future[Window]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy has read nothing."""
        return self.__dict__ | {"_thread": None, "_ready": {}}

    def at(self, epoch: int, position: int, *, ahead: bool = True) -> Window:
        """The window around a position of an epoch; with `ahead` the one after it is read meanwhile.

        Raises:
            StorageError: reading failed; calling again retries.
            CorruptStoreError: a shard is missing, damaged, swapped or stale; names site, layer and block.
        """
        first, last = self._order.window_at(epoch, position)
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="actstore-batches")
        following = self._after(epoch, last) if ahead else None
        wanted = [key for key in [(epoch, first), following] if key is not None]
        self._ready = {key: window for key, window in self._ready.items() if key in wanted and not _failed(window)}
        for key in wanted:
            if key not in self._ready:
                self._ready[key] = self._thread.submit(self._read, *key)
        try:
            return self._ready[(epoch, first)].result()
        except BaseException:
            self._ready.pop((epoch, first), None)
            raise

    def close(self) -> None:
        """Stops reading ahead and frees the windows. Harmless when called again; `at` begins anew."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._ready.clear()
        for reader in self._readers:
            reader.spare.clear()

    def _after(self, epoch: int, last: int) -> tuple[int, int] | None:
        """Epoch and first position of the window after the one that ends at `last`; None after the last epoch."""
        if last < self._order.samples:
            return epoch, last
        more = self._epochs is None or epoch + 1 < self._epochs
        return (epoch + 1, 0) if more else None

    def _read(self, epoch: int, first: int) -> Window:
        """Reads one window into buffers, and says where each of its samples lies."""
        _, last = self._order.window_at(epoch, first)
        samples, positions = self._order.rows(epoch, first, last), None
        if self._kept is not None:
            kept = self._chosen(self._kept, samples)
            samples, positions = samples[kept], first + np.flatnonzero(kept)
        if self._kept is not None or isinstance(self._order, ExactOrder):
            stored, places = np.unique(samples, return_inverse=True)
            whole = isinstance(self._order, BlockOrder)
            pools = tuple(reader.rows(stored, whole=whole) for reader in self._readers)
            return Window(first, last, pools, places, samples, positions)
        size = self._order.chunk_samples
        chunks, member = np.unique(samples // size, return_inverse=True)
        pools = tuple(reader.chunks(chunks) for reader in self._readers)
        return Window(first, last, pools, member * size + samples % size, samples, None)

    @staticmethod
    def _chosen(kept: Kept, samples: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        order = np.argsort(samples)
        chosen = np.empty(len(samples), bool)
        chosen[order] = kept.mask(samples[order])
        return chosen


def _failed(window: Future[Window]) -> bool:
    """Whether reading ahead failed: it is tried again when the window is needed."""
    return window.done() and window.exception() is not None


class _Reader:
    """Reads rows of some layers of one site into fresh buffers: by mapping local files, else through TensorStore."""

    def __init__(self, root: Root, plan: Plan, selection: Selection, *, check: bool) -> None:
        self._site, self._layers = selection
        only = (selection.site.name, selection.layers[0]) if len(selection.layers) == 1 else None
        vouchers = Vouchers(root, plan, only=only) if check else None
        self._source = Source.open(root, plan, selection.site.name, vouchers=vouchers)
        mapped = can_map(root, self._source)
        self._mapped = [MappedRows(root, self._source, self._site, layer) for layer in self._layers if mapped]
        # Memory of windows that were used up: new memory costs as much as reading.
        self.spare = list[UInt8[np.ndarray, " byte"]]()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no memory to reuse."""
        return self.__dict__ | {"spare": []}

    def rows(
        self, samples: Int64[np.ndarray, " row"], *, whole: bool = False
    ) -> tuple[UInt[np.ndarray, "row width"], ...]:
        """Some samples, ascending, of every layer. With `whole` their chunks are read and compared whole."""
        pools = [self._buffer(len(samples)) for _ in self._layers]
        for number, pool in enumerate(pools):
            if not self._mapped:
                gather(self._source, [self._layers[number]], samples, pool.view(self._site.dtype)[None])
            elif whole:
                self._pick(self._mapped[number], samples, pool)
            else:
                self._mapped[number].take(samples, pool)
        return self._reused(pools)

    def chunks(self, chunks: Int64[np.ndarray, " chunk"]) -> tuple[UInt[np.ndarray, "row width"], ...]:
        """Whole chunks, ascending, of every layer; only the store's last chunk can be short."""
        if not self._mapped:
            return self.rows(self._samples_of(chunks))
        pools = [self._buffer(len(self._samples_of(chunks))) for _ in self._layers]
        for mapped, pool in zip(self._mapped, pools, strict=True):
            mapped.copy(chunks, pool)
        return self._reused(pools)

    def _pick(self, mapped: MappedRows, samples: Int64[np.ndarray, " row"], out: UInt[np.ndarray, "row width"]) -> None:
        """Copies chunks, some at a time, and keeps the wanted samples of them."""
        size = self._source.layout.chunk_samples
        chunks = np.unique(samples // size)
        step = max(SCRATCH_BYTES // (size * self._site.row_bytes), 1)
        scratch = self._buffer(min(step, len(chunks)) * size)
        for start in range(0, len(chunks), step):
            group = chunks[start : start + step]
            first, last = np.searchsorted(samples, [group[0] * size, (group[-1] + 1) * size])
            stored = self._samples_of(group)
            mapped.copy(group, scratch[: len(stored)])
            np.take(scratch, np.searchsorted(stored, samples[first:last]), axis=0, out=out[first:last], mode="clip")

    def _buffer(self, rows: int) -> UInt[np.ndarray, "row width"]:
        size = rows * self._site.row_bytes
        fitting = next((place for place, spare in enumerate(self.spare) if spare.nbytes >= size), None)
        if fitting is None:
            self.spare.clear()
        memory = np.empty(size, np.uint8) if fitting is None else self.spare.pop(fitting)
        return as_integers(memory[:size].view(self._site.dtype).reshape(rows, self._site.width))

    def _reused(self, pools: list[UInt[np.ndarray, "_ width"]]) -> tuple[UInt[np.ndarray, "_ width"], ...]:
        """The pools, whose memory comes back when nobody looks at them. That of a failed read does not."""
        for pool in pools:
            weakref.finalize(pool, self.spare.append, cast("UInt8[np.ndarray, ' byte']", pool.base))
        return tuple(pools)

    def _samples_of(self, chunks: Int64[np.ndarray, " chunk"]) -> Int64[np.ndarray, " row"]:
        """The samples of whole chunks, as far as the store goes."""
        size = self._source.layout.chunk_samples
        stored = (chunks[:, None] * size + np.arange(size)).reshape(-1)
        return stored[: np.searchsorted(stored, self._source.layout.samples)]
