"""Windows of an order: what is read at once of some layers, shuffled, one ahead in a thread of its own."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from actstore.gather import Source, gather
from actstore.kept import Kept
from actstore.kvstore import Root
from actstore.layout import Site
from actstore.mapped import MappedRows, can_map
from actstore.rows import Memory, RowView
from actstore.schema import Plan
from actstore.shuffle import BlockOrder, ExactOrder
from actstore.vouchers import Vouchers


class Selection(NamedTuple):
    """One site and the indices of some of its layers; `[0]` where it has none."""

    site: Site
    layers: tuple[int, ...]

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample of all its layers."""
        return self.site.row_bytes * len(self.layers)


class Window(NamedTuple):
    """Epoch positions `first` to `last - 1`: the rows of the samples that are kept, in shuffled order."""

    first: int
    last: int
    rows: tuple[tuple[RowView, ...], ...]
    """By site and layer."""
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
            reader.memory.clear()

    def _after(self, epoch: int, last: int) -> tuple[int, int] | None:
        """Epoch and first position of the window after the one that ends at `last`; None after the last epoch."""
        if last < self._order.samples:
            return epoch, last
        more = self._epochs is None or epoch + 1 < self._epochs
        return (epoch + 1, 0) if more else None

    def _read(self, epoch: int, first: int) -> Window:
        """Reads one window."""
        _, last = self._order.window_at(epoch, first)
        samples, positions = self._order.rows(epoch, first, last), None
        if self._kept is not None:
            kept = self._kept.mask_unordered(samples)
            samples, positions = samples[kept], first + np.flatnonzero(kept)
        stored, places = np.unique(samples, return_inverse=True)
        whole = isinstance(self._order, BlockOrder)
        return Window(
            first, last, tuple(reader.rows(stored, places, whole=whole) for reader in self._readers), samples, positions
        )


def _failed(window: Future[Window]) -> bool:
    """Whether reading ahead failed: it is tried again when the window is needed."""
    return window.done() and window.exception() is not None


class _Reader:
    """Rows of some layers of one site: where local files are mapped, else read into memory through TensorStore."""

    def __init__(self, root: Root, plan: Plan, selection: Selection, *, check: bool) -> None:
        self._site, self._layers = selection
        only = (selection.site.name, selection.layers[0]) if len(selection.layers) == 1 else None
        vouchers = Vouchers(root, plan, only=only) if check else None
        self._source = Source.open(root, plan, selection.site.name, vouchers=vouchers)
        mapped = can_map(root, self._source)
        self._mapped = [MappedRows(root, self._source, self._site, layer) for layer in self._layers if mapped]
        self.memory = Memory()

    def rows(
        self, samples: Int64[np.ndarray, " row"], places: Int64[np.ndarray, " wanted"], *, whole: bool
    ) -> tuple[RowView, ...]:
        """The rows of every layer at `places` among `samples`, which ascend. With `whole` chunks are compared."""
        if self._mapped:
            return tuple(mapped.rows(samples, places, self.memory, whole=whole) for mapped in self._mapped)
        return tuple(self._read(layer, samples, places) for layer in self._layers)

    def _read(self, layer: int, samples: Int64[np.ndarray, " row"], places: Int64[np.ndarray, " wanted"]) -> RowView:
        memory = self.memory.rows(len(samples), self._site.row_bytes)
        gather(self._source, [layer], samples, memory.view(self._site.dtype)[None])
        self.memory.take_back(memory)
        return RowView.of(memory, places)
