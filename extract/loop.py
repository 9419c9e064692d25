"""The loop: plan in, store out. Reads like the picture: contexts -> forward -> block -> writer."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Self

import numpy as np
from jaxtyping import Shaped

from actstore.commits import Marker
from actstore.errors import StoppedError
from actstore.generations import added_sites
from actstore.kvstore import Root
from actstore.markers import has_table
from actstore.moments import as_stored
from actstore.sealing import is_sealed
from actstore.table import write_table
from actstore.writer import BLOCKS_IN_FLIGHT, Writer
from extract.dealing import PATIENCE_SECONDS, Dealer
from extract.mesh import Group, device_errors
from extract.packing import Contexts
from extract.plan import ExtractPlan
from extract.ranks import Rank
from extract.stages import Stages
from extract.steps import Rows, agreed_blocks, forward_steps

STORAGE_SECONDS = 5.0  # of waiting for it, between two signs of life


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Blocks and `samples_left` are of the whole store, as far as this process knows: what other workers commit is looked
    up every 10 seconds by worker 0. Samples, bytes and seconds are those of this process.
    """

    blocks: int
    blocks_before: int
    blocks_computed: int
    samples_left: int
    samples_computed: int
    bytes_written: int
    seconds: float
    blocks_committed: int = 0
    """Of the whole store."""
    tokens_computed: int = 0
    """That the model saw; rows are those of them that are kept."""
    rank: int = 0
    workers: int = 1
    seconds_for_storage: float = 0.0
    """Of waiting until the storage has taken what was computed before: the device has nothing to do meanwhile."""
    seconds_for_device: float = 0.0
    """Of handing passes to the device, the first of which is compiled, and of waiting for rows."""
    seconds_for_host: float = 0.0
    """Of making inputs and copying rows into blocks, while the device computes."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens computed by this process per second, compilation included."""
        return self.tokens_computed / max(self.seconds, 1e-9)

    @property
    def bytes_per_second(self) -> float:
        """Bytes of rows handed to the storage by this process per second."""
        return self.bytes_written / max(self.seconds, 1e-9)

    @property
    def share_for_storage(self) -> float:
        """Part of the time that went into waiting for the storage."""
        return self.seconds_for_storage / max(self.seconds, 1e-9)

    @property
    def limit(self) -> str:
        """What the run waits for most: `storage`, `device` or `host`."""
        return max(("storage", "device", "host"), key=lambda stage: getattr(self, f"seconds_for_{stage}"))


def run(
    plan: ExtractPlan,
    url: str,
    *,
    progress: Callable[[Progress], None] | None = None,
    rank: Rank | None = None,
    patience: float = PATIENCE_SECONDS,
    stopping: Callable[[], str | None] = lambda: None,
) -> Progress:
    """Computes and writes every block of `plan` that the store at `url` lacks, then seals it.

    Any number of processes may do so at once, on any hosts that see the store: they share the blocks out among them and
    all return when the store is complete. Stopping them in any way and calling it again, with any number, continues:
    committed blocks are never computed again, and the finished store has the same bytes. A finished store is left
    alone.

    Args:
        plan: from `make_plan`; the same in every process.
        url: a path that ends in `.acts.zarr`.
        progress: called after every step and block.
        rank: which worker this is; None is worker 0 of 1, or what `jax.distributed` says where processes joined.
        patience: seconds that another worker may say nothing before this one computes its block too.
        stopping: says why to stop, asked at every step: what was handed to the writer is committed, then `StoppedError`
            is raised, in all processes that compute one model together.

    Returns:
        The last progress.

    Raises:
        PlanMismatchError: `url` holds another run; the differing fields are named.
        StorageFullError: there is not enough space for what is missing; checked before anything is written.
        StoppedError: `stopping` said so.
        WorkerLostError: another process that computes the same copy of the model ended.
    """
    root, group = Root.of(url), Group.of(plan.model.mesh)
    if is_sealed(root, plan.store):
        blocks = len(plan.store.blocks)
        return _report(progress, Progress(blocks, blocks, 0, 0, 0, 0, 0.0, blocks_committed=blocks))
    if group.groups * group.members > 1 or rank is None:
        rank = Rank(group.number, group.groups, "jax.distributed")
    with Writer(root, plan.store, seal=False, assets=plan.assets) as writer:
        first = rank.rank == 0 and group.member == 0
        if plan.documents is not None and first:
            write_table(root, plan.store, plan.documents)
        dealer = Dealer(root, plan.store, rank=rank, patience=patience)
        try:
            with device_errors(group):
                state = _Run(plan, writer, dealer, rank, group, progress, stopping).compute()
        except BaseException:
            dealer.give_back()
            raise

    def complete() -> None:
        if plan.documents is not None and not has_table(root, plan.store):
            write_table(root, plan.store, plan.documents)

    def waiting() -> None:
        _report(progress, state)
        if reason := stopping():
            raise StoppedError(reason)

    dealer.finish(complete, waiting)
    return _report(progress, dataclasses.replace(state, samples_left=0, blocks_committed=state.blocks))


class _Run:
    """One worker's part of a run."""

    def __init__(
        self,
        plan: ExtractPlan,
        writer: Writer,
        dealer: Dealer,
        rank: Rank,
        group: Group,
        progress: Callable[[Progress], None] | None,
        stopping: Callable[[], str | None],
    ) -> None:
        self._plan, self._writer, self._dealer, self._group = plan, writer, dealer, group
        self._progress, self._stopping = progress, stopping
        self._first = rank.rank == 0 and group.member == 0
        self._stages, self._started = Stages(), time.perf_counter()
        sites = added_sites(plan.store)
        self._sample_bytes = sum(site.sample_bytes for site in sites)
        self._buffers = [_Buffer(plan) for _ in range(min(BLOCKS_IN_FLIGHT + 1, len(plan.store.blocks)))]
        self._in_hand: dict[int, int] = {}  # samples that were computed, by block, until that is committed
        self._counted = -1  # first sample of the pass whose tokens were counted last: two blocks may share it
        self._state = Progress(
            blocks=len(plan.store.blocks), blocks_before=len(dealer.committed), blocks_computed=0,
            samples_left=0, samples_computed=0, bytes_written=0, seconds=0.0, rank=rank.rank, workers=rank.workers,
        )  # fmt: skip

    def compute(self) -> Progress:
        """Computes what the dealer deals. One buffer is filled while others are written."""
        plan, group = self._plan, self._group
        buffers = itertools.cycle(self._buffers)
        buffer = None
        blocks = agreed_blocks(self._dealer, group)
        with contextlib.closing(
            forward_steps(plan, blocks, group=group, keeps=self._keeps, stopping=self._stopping, stages=self._stages)
        ) as steps:
            for step in steps:
                if step is not None and step.rows is not None:
                    if buffer is None:
                        buffer = next(buffers)
                        self._wait_for_storage(buffer.is_free)
                        buffer.begin(*plan.store.block_range(step.block))
                    with self._stages.on("host"):
                        filled = buffer.fill(step.first, step.rows, step.contexts)
                    tokens = int(step.contexts.filled.sum()) if step.first != self._counted else 0
                    self._counted = step.first
                    self._add(samples_computed=filled, tokens_computed=tokens)
                    self._in_hand[step.block] = self._in_hand.get(step.block, 0) + filled
                    if buffer.full:
                        self._write(step.block, buffer)
                        buffer = None
                self._show()
        self._wait_for_storage(lambda: not self._commits)
        with self._stages.on("storage"):
            self._writer.close()
        self._show()
        return self._state

    def _keeps(self, block: int) -> bool:
        """Whether this member of the group writes a block: they take turns."""
        return block % self._group.members == self._group.member

    def _write(self, block: int, buffer: "_Buffer") -> None:
        """Hands a full block to the writer, as soon as that would not wait."""
        dealer = self._dealer
        self._wait_for_storage(lambda: len(self._commits) < BLOCKS_IN_FLIGHT)
        if not dealer.wanted(block):
            return
        with self._stages.on("storage"):
            commit = self._writer.write(block, buffer.activations(), samples=buffer.columns())
        commit.add_done_callback(
            lambda done: dealer.release(block, committed=not done.cancelled() and done.exception() is None)
        )
        buffer.commit = commit
        start, stop = self._plan.store.block_range(block)
        self._add(blocks_computed=1, bytes_written=(stop - start) * self._sample_bytes)

    def _wait_for_storage(self, ready: Callable[[], bool]) -> None:
        """Waits for blocks that are being written, and says meanwhile that this worker lives."""
        while not ready():
            with self._stages.on("storage"):
                wait(self._commits, timeout=STORAGE_SECONDS, return_when=FIRST_COMPLETED)
            self._show()

    @property
    def _commits(self) -> list[Future[Marker]]:
        """Of the blocks that are being written."""
        return [buffer.commit for buffer in self._buffers if buffer.commit and not buffer.commit.done()]

    def _add(self, **more: int) -> None:
        self._state = dataclasses.replace(
            self._state, **{name: getattr(self._state, name) + value for name, value in more.items()}
        )

    def _show(self) -> None:
        """Reports where the run stands."""
        self._dealer.keep()
        if self._first:
            self._dealer.refresh()
        seconds, committed = self._stages.seconds, self._dealer.committed
        self._in_hand = {block: count for block, count in self._in_hand.items() if block not in committed}
        left = self._dealer.samples_left - sum(self._in_hand.values())
        self._state = dataclasses.replace(
            self._state, seconds=time.perf_counter() - self._started, samples_left=left,
            blocks_committed=len(committed),
            seconds_for_storage=seconds["storage"], seconds_for_device=seconds["device"],
            seconds_for_host=seconds["host"],
        )  # fmt: skip
        _report(self._progress, self._state)


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

    def is_free(self) -> bool:
        """Whether the block that was in here is written, or could not be."""
        return self.commit is None or self.commit.done()

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
        tokens = contexts.token_ids[contexts.kept]
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
