"""How a run stands, from anywhere that sees its store: blocks by markers, workers by claims, rates, time left."""

import dataclasses
import time
from collections import deque
from typing import Literal

from actstore.claims import Claim, Claims
from actstore.kvstore import Root
from actstore.ledger import read_plan, read_status
from actstore.markers import committed_blocks
from actstore.schema import Plan
from actstore.untrusted import printable

RATE_SECONDS = 300.0  # the rate is that of the last five minutes
LATE_SECONDS, LATE_BLOCKS = 60.0, 4  # of silence, of one block; as in `extract`: others then take it over


@dataclasses.dataclass(frozen=True)
class WorkerSeen:
    """A worker that has claimed blocks.

    Attributes:
        rank: Its number, from 0.
        host: Where it runs.
        process: Its number there.
        blocks: That it computes or writes now.
        seconds: Since it took the newest of them, by its clock and this one.
        silent_seconds: Since it last said that it lives.
        samples_per_second: Its own rate; None before its first block is done.
        late: Whether others take its blocks over: it says nothing, or is slow.
    """

    rank: int
    host: str
    process: int
    blocks: tuple[int, ...]
    seconds: float
    silent_seconds: float
    samples_per_second: float | None
    late: bool


@dataclasses.dataclass(frozen=True)
class Look:
    """How a run stands.

    Attributes:
        url: Of the store.
        status: `complete` once it is sealed.
        generation: 1, or of what is being appended.
        blocks: To be written.
        blocks_committed: That are.
        samples: In these blocks.
        samples_committed: In those.
        workers: That have claims, by number.
        samples_per_second: Of all workers; None where nothing tells.
        rate_of: `markers`, seen between two looks, or `workers`: what they say themselves.
        seconds_left: At this rate.
    """

    url: str
    status: Literal["writing", "complete"]
    generation: int
    blocks: int
    blocks_committed: int
    samples: int
    samples_committed: int
    workers: tuple[WorkerSeen, ...]
    samples_per_second: float | None
    rate_of: Literal["markers", "workers"] | None
    seconds_left: float | None

    @property
    def text(self) -> str:
        """A line for the run and one for each worker."""
        done = 100 * self.blocks_committed / self.blocks
        line = (
            f"{self.url}: {self.blocks_committed:,} of {self.blocks:,} blocks ({done:.1f} %), "
            f"{self.samples_committed:,} of {self.samples:,} samples"
        )
        if self.status == "complete":
            return f"{line}, complete"
        if self.samples_per_second is not None:
            line += f", {self.samples_per_second:,.0f} samples/s"
        if self.seconds_left is not None:
            line += f", {duration(self.seconds_left)} left"
        return "\n".join([f"{line}, {len(self.workers)} workers", *map(_worker_line, self.workers)])


class Watch:
    """Looks at the run that writes a store, again and again.

    Each look costs one listing of the markers (0.6 s for 100,000 on a local disk), one of the claims, and one small
    read for each claim. It writes nothing.

    Args:
        root: place of the store.

    Raises:
        StoreNotFoundError: there is no store, or the run has not begun to write.
    """

    def __init__(self, root: Root) -> None:
        self._root, self._plan = root, read_plan(root, unfinished=True)
        self._seen: deque[tuple[float, int]] = deque()

    def look(self) -> Look:
        """How the run stands now."""
        plan = self._plan
        status = read_status(self._root, plan)
        committed = set(plan.blocks) if status == "complete" else committed_blocks(self._root, plan) & set(plan.blocks)
        samples, done = _samples(plan, set(plan.blocks)), _samples(plan, committed)
        claims = {} if status == "complete" else Claims(self._root, plan).read()
        workers = _workers({block: claim for block, claim in claims.items() if block not in committed}, plan)
        rate, source = self._rate(done, workers)
        return Look(
            self._root.url, status, plan.generation, len(plan.blocks), len(committed), samples, done, workers, rate,
            source, (samples - done) / rate if rate and status == "writing" else None,
        )  # fmt: skip

    def _rate(
        self, done: int, workers: tuple[WorkerSeen, ...]
    ) -> tuple[float | None, Literal["markers", "workers"] | None]:
        now = time.monotonic()
        self._seen.append((now, done))
        while now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        if done > before:
            return (done - before) / (now - since), "markers"
        known = [worker.samples_per_second for worker in workers if worker.samples_per_second and not worker.late]
        return (sum(known), "workers") if known else (None, None)


def duration(seconds: float) -> str:
    """A time for a person: `45 s`, `8 min`, `3.2 h`, `2.5 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _samples(plan: Plan, blocks: set[int]) -> int:
    """Samples that the plan writes in some of its blocks; those at its ends may be shorter."""
    ends = {plan.blocks[0], plan.blocks[-1]} & blocks
    inside = (len(blocks) - len(ends)) * plan.layout.block_samples
    return inside + sum(stop - start for start, stop in map(plan.block_range, ends))


def _workers(claims: dict[int, Claim], plan: Plan) -> tuple[WorkerSeen, ...]:
    """The workers that have blocks in hand, by number. Claims are untrusted: a host may be any text."""
    by_worker: dict[str, list[tuple[int, Claim]]] = {}
    for block, claim in sorted(claims.items()):
        by_worker.setdefault(claim.worker, []).append((block, claim))
    found, now = [], time.time()
    for claimed in by_worker.values():
        newest = max((claim for _, claim in claimed), key=lambda claim: claim.since)
        seconds, rate = max(0.0, now - newest.since), newest.samples_per_second
        silent = max(0.0, now - max(max(claim.since, claim.seen or 0.0) for _, claim in claimed))
        slow = rate is not None and rate > 0 and seconds > LATE_BLOCKS * plan.layout.block_samples / rate
        late = silent > LATE_SECONDS or (slow and seconds > LATE_SECONDS)
        blocks = tuple(block for block, _ in claimed)
        host = printable(newest.host.partition("/")[0], most=100)
        found.append(WorkerSeen(newest.rank, host, newest.process, blocks, seconds, silent, rate, late))
    return tuple(sorted(found, key=lambda worker: (worker.rank, worker.host, worker.process)))


def _worker_line(worker: WorkerSeen) -> str:
    shown = ", ".join(map(str, worker.blocks[:4])) + ", ..." * (len(worker.blocks) > 4)
    rate = "" if worker.samples_per_second is None else f", {worker.samples_per_second:,.0f} samples/s"
    late = ", slow or gone" * worker.late
    return (
        f"  worker {worker.rank} on {worker.host}, process {worker.process}: block {shown}, for "
        f"{duration(worker.seconds)}{rate}{late}"
    )
