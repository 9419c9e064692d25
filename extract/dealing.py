"""Blocks for one worker, one after the other, until every block of the plan is committed. What is left decides.

Nothing is remembered between runs: what is pending is the plan minus its markers. A worker first computes its share,
then what nobody has taken, then what others have had for too long.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from actstore.claims import Claims
from actstore.errors import ActstoreError
from actstore.kvstore import Root
from actstore.ledger import committed_blocks, has_marker, is_sealed, seal
from actstore.schema import Plan
from extract.division import rest, share
from extract.ranks import Rank

PATIENCE_SECONDS = 60.0
LONGEST_BLOCKS = 4  # others may take this many times as long as the longest block here
POLL_SECONDS = (0.2, 5.0)  # the first and the longest wait for others
REFRESH_SECONDS = 10.0
REFRESH_SHARE = 0.02  # most of the time that may go into listing markers for progress


class Dealer:
    """Deals the blocks of a plan to this worker. Costs one listing at first, and 5 small requests for each block.

    Args:
        root: place of the store.
        plan: what is to be written; its nodes are there.
        rank: of this worker.
        patience: seconds that another worker may take for a block before this one takes it over.
    """

    def __init__(self, root: Root, plan: Plan, *, rank: Rank, patience: float = PATIENCE_SECONDS) -> None:
        self._root, self._plan, self._rank = root, plan, rank
        self._claims = Claims(root, plan, rank=rank.rank)
        self._least_patience = patience
        self._longest = 0.0
        self._given: dict[int, float] = {}  # blocks in hand, and since when
        self._listed = self._listing = 0.0
        self.committed: set[int] = set()
        """Blocks that are known to be committed."""
        self._list()

    def __iter__(self) -> Iterator[int | None]:
        """Yields blocks to compute; None where nothing can be taken now, before it waits. Ends when nothing is left."""
        for block in share(self._plan.blocks, self._rank.rank, self._rank.workers):
            if self._take(block):
                yield block
        turn, wait = 0, POLL_SECONDS[0]
        while pending := self._pending():
            taken = self._claims.taken(patience=self._patience)
            free = [block for block in pending if block not in taken]
            most = max(1, len(free) // (2 * self._rank.workers))
            for block in rest(free, self._rank.rank, turn)[:most]:
                if self._take(block):
                    wait = POLL_SECONDS[0]
                    yield block
            turn += 1
            if not free:
                yield None
                time.sleep(wait)
                wait = min(2 * wait, POLL_SECONDS[1])

    def wanted(self, block: int) -> bool:
        """Whether a block that was dealt still has to be written: not if another worker took it over and did it."""
        if has_marker(self._root, self._plan, block):
            self.release(block, committed=True)
            return False
        return True

    def release(self, block: int, *, committed: bool) -> None:
        """Says that a block is committed, or will not be. Never raises: a claim that stays is taken over."""
        since = self._given.pop(block, None)
        if committed:
            self.committed.add(block)
            if since is not None:
                self._longest = max(self._longest, time.monotonic() - since)
        with contextlib.suppress(ActstoreError):
            self._claims.release(block)

    def give_back(self) -> None:
        """Gives back every block in hand, of a run that ends before its time."""
        for block in list(self._given):
            self.release(block, committed=False)

    def refresh(self) -> None:
        """Looks what others have committed, now and then."""
        pause = max(REFRESH_SECONDS, self._listing / REFRESH_SHARE)
        if time.monotonic() - self._listed > pause:
            self._list()

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
            waiting: called while another worker seals.
        """
        wait = POLL_SECONDS[0]
        while not is_sealed(self._root, self._plan):
            if not self._pending_of_all() and self._claims.take("seal", patience=self._patience):
                complete()
                seal(self._root, self._plan)
                self._claims.clear()
                return
            waiting()
            time.sleep(wait)
            wait = min(2 * wait, POLL_SECONDS[1])

    @property
    def _patience(self) -> float:
        return max(self._least_patience, LONGEST_BLOCKS * self._longest)

    def _take(self, block: int) -> bool:
        """Whether this worker computes the block now. The marker is looked at last: its worker may just have ended."""
        if block in self.committed or not self._claims.take(block, patience=self._patience):
            return False
        self._given[block] = time.monotonic()
        return self.wanted(block)

    def _pending(self) -> list[int]:
        """Blocks that are neither committed nor in hand."""
        self._list()
        return [block for block in self._plan.blocks if block not in self.committed and block not in self._given]

    def _pending_of_all(self) -> bool:
        """Whether a block is not committed, be it in hand of another member of this worker's group."""
        self._list()
        return len(self.committed) < len(self._plan.blocks)

    def _list(self) -> None:
        started = time.monotonic()
        self.committed.update(committed_blocks(self._root, self._plan))
        self._listed = time.monotonic()
        self._listing = self._listed - started
