"""Blocks for one worker, one after the other, until every block of the plan is committed. What is left decides.

Nothing is remembered between runs: what is pending is the plan minus its markers. A worker first computes its share,
then what nobody has taken, then what others have had for too long.

No worker needs to see all markers: it looks at windows of 1,000 blocks, of its share, and of a few more where it has
run out. Of those that wait for others, one claims the sealing and looks at everything; the others wait for the seal.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from actstore.claims import Claims
from actstore.errors import ActstoreError
from actstore.kvstore import Root
from actstore.layout import BLOCKS_IN_MEMORY
from actstore.markers import WINDOW_BLOCKS, committed_blocks, has_marker
from actstore.schema import Plan
from actstore.sealing import is_sealed, seal
from extract.division import rest, share
from extract.ranks import Rank

PATIENCE_SECONDS = 60.0
RENEW_SECONDS = 15.0  # of claims: four times within the patience of others
RENEWED_BLOCKS = BLOCKS_IN_MEMORY + 1  # those that a worker may have in hand: one is dealt ahead
LONGEST_BLOCKS = 4  # others may take this many times as long as the longest block here
POLL_SECONDS = (0.2, 5.0)  # the first and the longest wait for others
LOOKS_A_SECOND = 25  # for blocks, of all workers, a dozen requests each: of more, each waits longer from the first on
SEAL_LOOKS_A_SECOND = 100  # for the seal, a few requests each
WINDOWS_AT_ONCE = 4  # that a worker without blocks looks into before it waits
CLAIMS_AT_ONCE = (2, 16)  # of others that it reads then, at least and at most
CLAIMS_OF_ALL = 1024  # that all workers read if all look once
SEAL_SECONDS = 0.004  # for a block, of sealing: 64 markers are read at a time, each in two answers within 0.1 s
REFRESH_SECONDS = 10.0
REFRESH_SHARE = 0.02  # most of the time that may go into listing markers for progress


class Dealer:
    """Deals the blocks of a plan to this worker. Costs one listing of its share at first, 6 small requests for a block.

    Worker 0 lists all markers instead, for the progress of the whole run.

    Args:
        root: place of the store.
        plan: what is to be written; its nodes are there.
        rank: of this worker.
        patience: seconds that another worker may say nothing before this one takes its block over.
    """

    def __init__(self, root: Root, plan: Plan, *, rank: Rank, patience: float = PATIENCE_SECONDS) -> None:
        self._root, self._plan, self._rank = root, plan, rank
        self._claims = Claims(root, plan, rank=rank.rank)
        self._least_patience = patience
        self._longest = 0.0
        self._given: dict[int, float] = {}  # blocks in hand, and since when
        self._handed_over: set[int] = set()  # those of them that are being written
        self._dealt, self._began = 0, time.monotonic()
        self._listed = self._listing = 0.0
        self._renewed, self._jitter = time.monotonic(), np.random.default_rng(rank.rank)
        self._watches = False
        self.committed: set[int] = set()
        """Blocks that are known to be committed."""
        self._share = share(plan.blocks, rank.rank, rank.workers)
        self._open = set(_windows(plan.blocks))  # windows with blocks that are not known to be committed
        self._look(self._open if rank.rank == 0 else _windows(self._share))

    def __iter__(self) -> Iterator[int | None]:
        """Yields blocks to compute; None before each pause where nothing can be taken. Ends when nothing is left."""
        for block in self._share:
            if self._take(block):
                yield block
        turn, first = 0, self._first_wait(LOOKS_A_SECOND)
        wait = first
        while self._pending_elsewhere():
            dealt = False
            for block in self._free(turn):
                if self._take(block):
                    dealt = True
                    yield block
            turn += 1
            if dealt:
                wait = first
                continue
            for _ in self._pauses(wait):
                yield None
            wait = _longer(wait)
            self._watch()

    def wanted(self, block: int) -> bool:
        """Whether a block that was dealt still has to be written: not if another worker took it over and did it.

        One that has counts as handed over to the writer, which finishes it whatever comes: it is not given back.
        """
        if self._is_committed(block):
            _say("dropped", block)
            return False
        self._handed_over.add(block)
        return True

    def release(self, block: int, *, committed: bool) -> None:
        """Says that a block is committed, or will not be. Never raises: a claim that stays is taken over."""
        _say("committed" if committed else "gave back", block)
        self._release(block, committed=committed)

    def _is_committed(self, block: int) -> bool:
        """Whether a block that was taken has a marker; it is then out of hand."""
        if not has_marker(self._root, self._plan, block):
            return False
        self._release(block, committed=True)
        return True

    def _release(self, block: int, *, committed: bool) -> None:
        since = self._given.pop(block, None)
        self._handed_over.discard(block)
        if committed:
            self.committed.add(block)
            if since is not None:
                self._longest = max(self._longest, time.monotonic() - since)
        with contextlib.suppress(ActstoreError):
            self._claims.release(block)

    def give_back(self) -> None:
        """Gives back every block in hand that is not being written, of a run that ends before its time.

        Where several processes compute one model, the others have written most of what was given to this one: one
        listing for each 1,000 blocks says which.
        """
        if self._given.keys() - self._handed_over:
            with contextlib.suppress(ActstoreError):
                self._look(_windows(sorted(self._given)))
        for block in self._given.keys() - self._handed_over - self.committed:
            self.release(block, committed=False)
        if self._watches:
            with contextlib.suppress(ActstoreError):
                self._claims.release("seal")

    def keep(self) -> None:
        """Says now and then that this worker lives, of blocks that take long. Two small requests for each."""
        now = time.monotonic()
        if now - self._renewed < RENEW_SECONDS:
            return
        self._renewed = now
        for block, since in list(self._given.items())[-RENEWED_BLOCKS:]:
            if now - since >= RENEW_SECONDS:
                with contextlib.suppress(ActstoreError):
                    self._claims.renew(block)

    def refresh(self) -> None:
        """Looks what others have committed, now and then."""
        pause = max(REFRESH_SECONDS, self._listing / REFRESH_SHARE)
        if time.monotonic() - self._listed > pause:
            self._look(self._open)

    @property
    def samples_left(self) -> int:
        """Samples of blocks that are not known to be committed."""
        plan = self._plan
        ends = {plan.blocks[0], plan.blocks[-1]}  # which may be shorter
        done = self.committed & ends
        whole = (len(self.committed) - len(done)) * plan.layout.block_samples
        there = whole + sum(stop - start for start, stop in map(plan.block_range, done))
        return plan.block_range(plan.blocks[-1])[1] - plan.block_range(plan.blocks[0])[0] - there

    def finish(self, complete: Callable[[], None], waiting: Callable[[], None]) -> None:
        """Completes and seals the store, or waits until another worker has.

        Args:
            complete: writes what else is missing; safe to repeat.
            waiting: called while another worker seals, every 5 s or more often.
        """
        wait = self._first_wait(SEAL_LOOKS_A_SECOND)
        try:
            while not is_sealed(self._root, self._plan):
                if self._sees_all_committed():
                    complete()
                    seal(self._root, self._plan)
                    self._watches = False
                    self._claims.clear()
                    return
                for _ in self._pauses(wait):
                    waiting()
                wait = _longer(wait)
        except BaseException:
            self.give_back()
            raise

    @property
    def _patience(self) -> float:
        """Where the storage is slow, signs of life are too."""
        return max(self._least_patience, self._longest)

    @property
    def _most(self) -> float | None:
        """Seconds that another may take for a block; None before this worker knows what one takes."""
        return max(self._least_patience, LONGEST_BLOCKS * self._longest) if self._longest else None

    def _take(self, block: int) -> bool:
        """Whether this worker computes the block now. The marker is looked at last: its worker may just have ended."""
        if block in self.committed:
            return False
        self._claims.samples_per_second = self._rate
        if not self._claims.take(block, patience=self._patience, most=self._most):
            return False
        self._given[block] = time.monotonic()
        if self._is_committed(block):
            return False
        _say("took", block)
        self._dealt += 1
        return True

    @property
    def _rate(self) -> float | None:
        """Samples of blocks that were dealt before the last one, per second; that one is being computed."""
        done = (self._dealt - 1) * self._plan.layout.block_samples
        return done / max(time.monotonic() - self._began, 1e-9) if done > 0 else None

    def _pauses(self, seconds: float) -> Iterator[None]:
        """Waits for others, not in step with them. Before each pause the caller may stop, or say that it lives."""
        left = seconds * self._jitter.uniform(0.5, 1.0)
        while left > 0:
            yield
            time.sleep(min(left, POLL_SECONDS[1]))
            left -= POLL_SECONDS[1]

    def _first_wait(self, looks: int) -> float:
        """Of all workers, so many look within a second. Where the storage is the limit, all run out at once."""
        return max(POLL_SECONDS[0], self._rank.workers / looks)

    def _pending_elsewhere(self) -> bool:
        """Whether a block is neither committed nor in hand, as far as this worker knows."""
        in_hand = sum(block not in self.committed for block in list(self._given))
        return len(self.committed) + in_hand < len(self._plan.blocks)

    def _free(self, turn: int) -> list[int]:
        """What to try next: blocks of one window that nobody has, or else some that others have had for too long."""
        others: list[int] = []
        for window in rest(sorted(self._open), self._rank.rank, turn)[:WINDOWS_AT_ONCE]:
            claimed, pending = self._claims.claimed(window), self._pending(window)
            if pending and claimed.issuperset(pending):  # then markers, up to 1,000 names, would say little
                others += pending
                continue
            self._look([window])
            pending = self._pending(window)
            if free := [block for block in pending if block not in claimed]:
                rivals = math.ceil(self._rank.workers / len(self._open))
                return rest(free, self._rank.rank, turn)[: max(1, len(free) // (2 * rivals))]
            others += pending
        least, most = CLAIMS_AT_ONCE
        some = rest(sorted(others), self._rank.rank, turn)[: min(max(least, CLAIMS_OF_ALL // self._rank.workers), most)]
        over = self._claims.over(some, patience=self._patience, most=self._most)
        self.committed.update(block for block in over if has_marker(self._root, self._plan, block))
        return [block for block in over if block not in self.committed]  # a claim that is gone mostly means committed

    def _pending(self, window: int) -> list[int]:
        """Blocks of a window that are neither in hand nor known to be committed."""
        return [
            block for block in _inside(self._plan.blocks, window)
            if block not in self.committed and block not in self._given
        ]  # fmt: skip

    def _watch(self) -> None:
        """Looks whether all is done, where there is more than a turn looks at."""
        if len(self._open) <= WINDOWS_AT_ONCE:
            return
        if is_sealed(self._root, self._plan):
            self.committed.update(self._plan.blocks)
        else:
            self._sees_all_committed()

    def _sees_all_committed(self) -> bool:
        """Whether this worker watches over the end, and all blocks are committed, also those of its group's others."""
        patience = max(self._patience, SEAL_SECONDS * len(self._plan.blocks))
        self._watches = self._claims.take("seal", patience=patience)
        if self._watches:
            self._look(self._open)
        return self._watches and not self._open

    def _look(self, windows: Iterable[int]) -> None:
        """Lists the markers of some windows."""
        windows, blocks, started = sorted(windows), self._plan.blocks, time.monotonic()
        whole = windows == list(_windows(blocks))
        found = committed_blocks(self._root, self._plan, windows=None if whole else windows)
        self.committed.update(block for block in found if block in blocks)
        self._open.difference_update(
            window for window in windows if self.committed.issuperset(_inside(blocks, window))
        )  # fmt: skip
        self._listed = time.monotonic()
        self._listing = self._listed - started


def _say(did: str, block: int) -> None:
    """A line of the log; nothing where nobody reads it."""
    logging.getLogger(__name__).info("%s block %d", did, block, extra={"fields": {"did": did, "block": block}})


def _longer(wait: float) -> float:
    """The next wait, in seconds."""
    return max(wait, min(2 * wait, POLL_SECONDS[1]))


def _windows(blocks: Sequence[int]) -> range:
    """The windows in which neighbouring blocks lie."""
    return range(blocks[0] // WINDOW_BLOCKS, blocks[-1] // WINDOW_BLOCKS + 1) if blocks else range(0)


def _inside(blocks: range, window: int) -> range:
    """Those of the blocks that lie in a window."""
    first = window * WINDOW_BLOCKS
    return range(max(blocks.start, first), min(blocks.stop, first + WINDOW_BLOCKS))
