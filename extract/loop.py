"""The loop: plan in, store out. Reads like the picture: contexts -> forward -> block -> writer."""

import contextlib
import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

import numpy as np
from jaxtyping import Int64, Shaped

from actstore.generations import added_sites
from actstore.kvstore import Root
from actstore.ledger import is_sealed, seal
from actstore.moments import as_stored
from actstore.schema import Marker
from actstore.table import write_table
from actstore.writer import BLOCKS_IN_FLIGHT, Writer
from extract.packing import Contexts
from extract.plan import ExtractPlan

if TYPE_CHECKING:
    import jax

Rows = dict[str, Shaped[np.ndarray, "layer row width"]]


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands. Blocks are those of the whole store; samples, bytes and seconds those of this process."""

    blocks: int
    blocks_before: int
    blocks_computed: int
    samples_left: int
    samples_computed: int
    bytes_written: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Samples computed by this process per second, compilation included."""
        return self.samples_computed / max(self.seconds, 1e-9)


def run(plan: ExtractPlan, url: str, *, progress: Callable[[Progress], None] | None = None) -> Progress:
    """Computes and writes every block of `plan` that the store at `url` lacks, then seals it.

    Stopping it in any way and calling it again continues: committed blocks are never computed again, and the finished
    store has the same bytes. A finished store is left alone.

    Args:
        plan: from `make_plan`.
        url: a path that ends in `.acts.zarr`.
        progress: called after every step and block.

    Returns:
        The last progress.

    Raises:
        PlanMismatchError: `url` holds another run; the differing fields are named.
        StorageFullError: there is not enough space for what is missing; checked before anything is written.
    """
    root = Root.of(url)
    if is_sealed(root, plan.store):
        blocks = len(plan.store.blocks)
        return _report(progress, Progress(blocks, blocks, 0, 0, 0, 0, 0.0))
    with Writer(root, plan.store, seal=False, assets=plan.assets) as writer:
        if plan.documents is not None:
            write_table(root, plan.store, plan.documents)
        state = _compute(plan, writer, progress)
    seal(root, plan.store)
    return _report(progress, state)


def _compute(plan: ExtractPlan, writer: Writer, progress: Callable[[Progress], None] | None) -> Progress:
    """All missing blocks, in order. One buffer is filled while others are written."""
    missing = deque(writer.missing())
    ranges = {block: plan.store.block_range(block) for block in missing}
    sizes = {block: stop - start for block, (start, stop) in ranges.items()}
    sample_bytes = sum(site.sample_bytes for site in added_sites(plan.store))
    blocks = len(plan.store.blocks)
    state = Progress(
        blocks=blocks, blocks_before=blocks - len(missing), blocks_computed=0,
        samples_left=sum(sizes.values()), samples_computed=0, bytes_written=0, seconds=0.0,
    )  # fmt: skip
    started = time.perf_counter()
    buffers = itertools.cycle([_Buffer(plan) for _ in range(min(BLOCKS_IN_FLIGHT + 1, len(missing)))])
    buffer = None
    with contextlib.closing(forward_steps(plan, list(missing))) as steps:
        for first, rows, contexts in steps:
            while missing and ranges[missing[0]][0] < first + len(contexts.documents):
                block = missing[0]
                buffer = buffer or next(buffers).begin(*ranges[block])
                filled = buffer.fill(first, rows, contexts)
                state = dataclasses.replace(
                    state, samples_computed=state.samples_computed + filled, samples_left=state.samples_left - filled,
                    seconds=time.perf_counter() - started,
                )  # fmt: skip
                if not buffer.full:
                    break  # the rest of this block is in later steps
                buffer.commit = writer.write(missing.popleft(), buffer.activations(), samples=buffer.columns())
                buffer = None
                state = dataclasses.replace(
                    state, blocks_computed=state.blocks_computed + 1,
                    bytes_written=state.bytes_written + sizes[block] * sample_bytes,
                )  # fmt: skip
            _report(progress, state)
    writer.close()
    return dataclasses.replace(state, seconds=time.perf_counter() - started)


def forward_steps(plan: ExtractPlan, blocks: list[int]) -> Generator[tuple[int, Rows, Contexts], None, None]:
    """(first sample, rows, contexts) of every step that holds samples of `blocks`, in order, each computed once.

    A step is a fixed set of contexts, so a row has the same bits whichever block asks for it. Each step is dispatched
    before the rows of the one before are copied, so that the device does not wait for the host.
    """
    import jax
    import jax.numpy as jnp

    from extract.forward import make_forward

    edges = plan.step_edges()
    dtype = plan.store.layout.sites[0].dtype
    forward = make_forward(plan.model, plan.taps, dtype="float32" if dtype == "float16" else dtype)
    places = int(np.diff(edges).max())

    def dispatch(step: int) -> "tuple[int, dict[str, jax.Array], Contexts]":
        contexts = plan.contexts(step)
        kept = np.zeros(places, np.int32)
        kept[: len(contexts.documents)] = np.flatnonzero(contexts.filled)
        inputs = map(jnp.asarray, (contexts.token_ids, contexts.segment_ids, contexts.positions, kept))
        return int(edges[step]), forward(plan.model.params, *inputs), contexts

    ahead: deque[tuple[int, dict[str, jax.Array], Contexts]] = deque()
    try:
        for step in _steps_of(plan, blocks, edges):
            ahead.append(dispatch(step))
            if len(ahead) > 1:
                yield _on_host(*ahead.popleft())
        while ahead:
            yield _on_host(*ahead.popleft())
    finally:  # of a run that is stopped: a process that ends while the device computes may crash
        for _, arrays, _ in ahead:
            jax.block_until_ready(arrays)  # type: ignore[no-untyped-call]


def _steps_of(plan: ExtractPlan, blocks: list[int], edges: Int64[np.ndarray, " step_edge"]) -> list[int]:
    """The steps that hold samples of the blocks, ascending."""
    ranges = [plan.store.block_range(block) for block in blocks]
    spans = [
        range(int(np.searchsorted(edges, start, side="right")) - 1, int(np.searchsorted(edges, stop, side="left")))
        for start, stop in ranges
    ]
    return sorted({step for span in spans for step in span})


def _on_host(first: int, arrays: "dict[str, jax.Array]", contexts: Contexts) -> tuple[int, Rows, Contexts]:
    """Waits for the rows of a step and drops the places that hold none."""
    count = len(contexts.documents)
    return first, {site: np.asarray(rows)[:, :count] for site, rows in arrays.items()}, contexts


class _Buffer:
    """The rows and columns of one block while it is filled and written. Reused, so that its pages stay warm."""

    def __init__(self, plan: ExtractPlan) -> None:
        layout, sites = plan.store.layout, added_sites(plan.store)
        self._sites = {
            site.name: np.empty((site.rows_per_sample, layout.block_samples, site.width), site.dtype) for site in sites
        }
        self._layerless = {site.name for site in sites if site.layers is None}
        columns = layout.columns if plan.store.adds_samples else ()
        self._columns = {column.name: np.empty(layout.block_samples, column.dtype) for column in columns}
        self._start = self._stop = self._next = 0
        self.commit: Future[Marker] | None = None

    def begin(self, start: int, stop: int) -> Self:
        """Takes the samples start..stop-1 next, once the block that was in here is committed."""
        if self.commit is not None:
            self.commit.result()
        self._start, self._stop, self._next = start, stop, start
        return self

    @property
    def full(self) -> bool:
        """Whether every sample of the block is in."""
        return self._next == self._stop

    def fill(self, first: int, rows: Rows, contexts: Contexts) -> int:
        """Copies those rows of a step, whose first sample is `first`, that lie in the block; returns how many."""
        begin, end = max(self._start, first), min(self._stop, first + len(contexts.documents))
        source, target = slice(begin - first, end - first), slice(begin - self._start, end - self._start)
        for site, values in rows.items():
            buffer = self._sites[site]
            buffer[:, target] = as_stored(values[:, source], buffer.dtype.name, what=f"site {site!r}")
        tokens = contexts.token_ids[contexts.filled]
        known = {"document": contexts.documents, "position": contexts.document_positions, "token_id": tokens}
        for name, column in self._columns.items():
            column[target] = known[name][source]
        self._next = end
        return end - begin

    def activations(self) -> Rows:
        """The rows of every site, as the writer takes them."""
        count = self._stop - self._start
        return {
            name: values[0, :count] if name in self._layerless else values[:, :count]
            for name, values in self._sites.items()
        }

    def columns(self) -> dict[str, Shaped[np.ndarray, " row"]]:
        """The values of every column."""
        return {name: values[: self._stop - self._start] for name, values in self._columns.items()}


def _report(progress: Callable[[Progress], None] | None, state: Progress) -> Progress:
    if progress:
        progress(state)
    return state
