"""Which worker computes which block now, so that several do not compute the same one. Hints: nothing depends on them.

A worker takes a block by creating an object that names it, renews that while it computes, and removes it once the block
is committed. Claims of workers that died, that are silent or slow, are taken over. Two workers that compute one block
write the same bytes.
"""

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from actstore.errors import CorruptStoreError, StoragePermissionError
from actstore.kvstore import Root
from actstore.markers import key_in, numbered, window_folder
from actstore.schema import FORMAT, Plan, StoredDocument

CLAIM_FOLDER = ".act/claims/"


class Claim(StoredDocument):
    """A block that a worker computes, or the sealing that it does."""

    kind = "claim"

    worker: str
    """Random, of one process."""
    host: str
    """Its name, and a digest that tells it from hosts and containers of the same name."""
    process: int
    """Number of the process on its host."""
    rank: int
    """Of the worker among those that were started with it, from 0."""
    since: Annotated[float, pydantic.Field(ge=0)]
    """Seconds since 1970 by the clock of the host."""
    seen: Annotated[float, pydantic.Field(ge=0)] | None = None
    """When its worker last said that it lives, by the same clock; None where that was at the beginning."""
    samples_per_second: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Of the worker since it began; None before its first block is done."""


class Claims:
    """The claims of one worker on the blocks of one plan. Every method costs up to 3 small requests."""

    def __init__(self, root: Root, plan: Plan, *, rank: int = 0) -> None:
        self._root, self._folder, self._rank = root, key_in(plan.generation, CLAIM_FOLDER), rank
        self.worker, self._host = secrets.token_hex(8), _this_host()
        self._ahead: dict[tuple[str, float], float] = {}  # signs of life by clocks that are ahead, and when seen here
        self._since: dict[int | Literal["seal"], float] = {}
        self._lock = threading.Lock()
        self.samples_per_second: float | None = None
        """What the next claims say of this worker's speed."""

    def take(self, work: int | Literal["seal"], *, patience: float, most: float | None = None) -> bool:
        """Whether this worker has the block now: nobody else had it, or its worker is dead, silent or slow.

        A claim of its own is made anew, and is young again.

        Args:
            work: number of a block, or the sealing of the store.
            patience: seconds that another worker may be silent.
            most: seconds that it may take in all; None for any number.
        """
        key, mine = self._key(work), self._mine()
        data = mine.to_json()
        stored = self._root.create(key, data)
        if stored != data:
            found = self._parsed(stored)
            if found is not None and found.worker != self.worker and not self._over(found, patience, most):
                return False
            if self._root.replace(key, stored, data) != data:
                return False  # to another that was as quick
        self._since[work] = mine.since
        return True

    def renew(self, block: int) -> None:
        """Says that this worker lives and computes the block still, unless another took it over. Two requests."""
        with self._lock:  # a claim that was released must not come back
            since = self._since.get(block)
            if since is None:
                return
            found = self._parsed(self._root.read(self._key(block)))
            if found is None or found.worker != self.worker:
                self._since.pop(block, None)
                return
            self._root.write(self._key(block), self._mine(since).to_json())

    def release(self, work: int | Literal["seal"]) -> None:
        """Gives a block back, or says that it is committed."""
        with self._lock:
            self._since.pop(work, None)
            self._root.delete(self._key(work))

    def claimed(self, window: int) -> set[int]:
        """The blocks of a window of `markers` that somebody has claimed, for long or not. One small listing."""
        return numbered(self._root.keys(window_folder(self._folder, window)), self._folder)

    def over(self, blocks: Iterable[int], *, patience: float, most: float | None = None) -> list[int]:
        """Those of some claimed blocks that this worker may take over, or whose claim is gone. One read for each.

        Args:
            blocks: that others have claimed.
            patience: as in `take`.
            most: as in `take`.
        """
        found = self._read(list(blocks))
        return [block for block, claim in found.items() if claim is None or self._over(claim, patience, most)]

    def read(self) -> dict[int, Claim]:
        """All claims on blocks that can be read. One listing, and one read for each."""
        found = self._read(sorted(numbered(self._root.keys(self._folder), self._folder)))
        return {block: claim for block, claim in found.items() if claim is not None}

    def clear(self) -> None:
        """Removes all claims, of a store that is complete, and what workers left that died while they took one.

        Where this worker may not delete, they stay: nobody asks for them any more.
        """
        with contextlib.suppress(StoragePermissionError):
            for key in self._root.keys(self._folder):
                self._root.delete(key)
        for key, held in self._root.lock_files(self._folder):
            if not held:
                self._root.remove_lock_file(key)

    def _read(self, blocks: list[int]) -> dict[int, Claim | None]:
        found = map(self._parsed, self._root.read_all(map(self._key, blocks)))
        return dict(zip(blocks, found, strict=True))

    def _key(self, work: int | Literal["seal"]) -> str:
        return f"{self._folder}{work if work == 'seal' else format(work, '08d')}.json"

    def _mine(self, since: float | None = None) -> Claim:
        now = time.time()
        return Claim(
            format=FORMAT, worker=self.worker, host=self._host, process=os.getpid(), rank=self._rank,
            since=now if since is None else since, seen=None if since is None else now,
            samples_per_second=self.samples_per_second,
        )  # fmt: skip

    def _over(self, claim: Claim, patience: float, most: float | None) -> bool:
        """Whether a claim of another worker counts no more."""
        if claim.worker == self.worker:
            return False
        if claim.host == self._host and not _lives(claim.process):
            return True
        now = time.time()
        slow, latest = most is not None and now - claim.since > most, max(claim.since, claim.seen or 0.0)
        if latest <= now:
            return slow or now - latest > patience
        first = self._ahead.setdefault((claim.worker, latest), time.monotonic())
        return time.monotonic() - first > patience

    def _parsed(self, data: bytes | None) -> Claim | None:
        """A claim; None for one that is gone or cannot be read."""
        with contextlib.suppress(CorruptStoreError):
            return None if not data else Claim.from_json(data, where=self._folder)
        return None


def _this_host() -> str:
    """Name of this host, with a digest of its start and of its process numbers.

    Containers on one machine, and machines that were cloned, may have one name, and processes of the same numbers.
    """
    known = []
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        known.append(os.readlink("/proc/self/ns/pid"))  # noqa: PTH115  no path
    digest = hashlib.sha256(" ".join(known).encode()).hexdigest()[:8]
    return f"{socket.gethostname()}/{digest}" if known else socket.gethostname()


def _lives(process: int) -> bool:
    """Whether a process of this host is there. One with this process' own number is not another worker's any more."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
