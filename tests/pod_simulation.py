"""A run on up to 1,024 hosts that are preempted, over a fake clock and a bucket in memory.

    python -m tests.pod_simulation --hosts 1024 --samples 10000000000 --preemption-seconds 60

What plans, divides, claims, commits and seals is the code of actstore. What is made up: the time of a forward pass, of
a request and of a byte on its way to the bucket, and the deaths. A host dies at any moment and without notice; its
place is taken by another of another name, which knows nothing of it.
"""

import argparse
import bisect
import dataclasses
import heapq
import itertools
import json
import math
import random
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import greenlet

from actstore import claims
from actstore.claims import CLAIM_FOLDER
from actstore.commits import Marker
from actstore.kvstore import Limits, Root
from actstore.kvstore.addresses import Address
from actstore.kvstore.remote import RemotePlace
from actstore.layout import BLOCKS_IN_MEMORY, Layout, Site
from actstore.ledger import create_plan
from actstore.markers import MARKER_FOLDER, vouched_arrays, write_marker
from actstore.schema import FORMAT, Plan
from actstore.sealing import create_nodes, is_sealed
from extract import dealing
from extract.dealing import Dealer
from extract.division import share
from extract.ranks import Rank

PASS_SECONDS = 15.0  # of a forward pass at most: fewer events than the passes of a small batch
RATE_SECONDS = 10.0  # over which requests are counted, where it matters how many come at once
PAGE = 1000  # keys of one answer to a listing
SITE = Site("resid_post", 896, (6, 12, 18, 23))  # of Qwen2.5-0.5B


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is run, on what. Seconds are those of the fake clock."""

    hosts: int = 1024
    samples: int = 10**10
    samples_per_second: float = 400_000.0
    """Of one host, where nothing waits for the storage."""
    storage_bytes_per_second: float = 100e9
    """Of all hosts together."""
    host_bytes_per_second: float = 2e9
    preemption_seconds: float = 60.0
    """Between two deaths."""
    start_seconds: float = 180.0
    """Of a new host, until it has a model."""
    request_seconds: float = 0.05
    """Of a small request, and of a page of a listing."""
    block_samples: int | None = None
    seed: int = 0

    def plan(self) -> Plan:
        layout = Layout.fit([SITE], samples=self.samples, block_samples=self.block_samples)
        return Plan.make(layout, {"simulated": True})


@dataclasses.dataclass
class Outcome:
    """What came of it."""

    blocks: int
    seconds: float = 0.0
    """Until the store is sealed."""
    committed_seconds: float = 0.0
    """Until the last block is committed."""
    deaths: int = 0
    blocks_computed: float = 0.0
    """Those that were computed twice, and the parts of those that were not finished, included."""
    twice: int = 0
    """Blocks that were written again although they were committed."""
    longest_resume: float = 0.0
    """Seconds from a host's first request to when it knows what is left of its share."""
    requests: Counter[str] = dataclasses.field(default_factory=Counter)
    """By kind and folder, small objects alone: whole shards, norms and columns are `data`."""

    busiest: float = 0.0
    """Requests per second of small objects in the busiest ten seconds, those in which all hosts begin left out."""

    @property
    def lost_share(self) -> float:
        """Share of all computing that is in no committed block."""
        return 1 - self.blocks / self.blocks_computed


class Killed(BaseException):
    """The host dies here. Not an `Exception`: no code under test may catch it."""


class Clock:
    """Time that passes when all wait. Of all hosts, each a greenlet, one runs at a time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.running: Host | None = None
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._main = greenlet.getcurrent()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def sleep(self, seconds: float) -> None:
        """Lets the running host wait. Where none runs, at the end of a write, nothing waits."""
        if (host := self.running) is not None:
            self.wake(host, after=seconds)
            self._pause(host)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Lets the running host wait until it is woken and finds that something holds."""
        host = self.running
        while host and not ready():
            host.waits = True
            self._pause(host)
            host.waits = False

    def wake(self, host: "Host", *, after: float = 0.0) -> None:
        """Its turn comes then, unless it had another one before."""
        turn = host.turn
        self.at(self.now + after, lambda: self._give_turn(host, turn))

    def run(self) -> None:
        """From the first event to the last."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def _give_turn(self, host: "Host", turn: int) -> None:
        if host.turn == turn and not host.ended:
            host.turn += 1
            self.running = host
            host.greenlet.switch()
            self.running = None

    def _pause(self, host: "Host") -> None:
        if not host.dead:
            self._main.switch()
        if host.dead:
            raise Killed


@dataclasses.dataclass(eq=False)
class Link:
    """What one host sends now."""

    left: dict[int, float] = dataclasses.field(default_factory=dict)
    """Bytes of each of its writes, when the pipe was at `at`."""
    at: float = 0.0
    version: int = 0
    """Of what the pipe has planned for it."""


class Pipe:
    """Storage that takes so many bytes in a second, dealt out evenly among hosts that write, a host's among its writes.

    Processor sharing in virtual time: all hosts that write send at one rate, so the bytes that one of them would have
    sent that has written for ever are a clock for all. By that clock the next write of a host ends at the same moment
    whatever other hosts begin or give up, and a heap has these moments: O(log hosts) for each.
    """

    def __init__(self, clock: Clock, total: float, each: float) -> None:
        self._clock, self._total, self._each = clock, total, each
        self._links: dict[Hashable, Link] = {}
        self._ends: list[tuple[float, int, int, Hashable, Link]] = []  # number of the write, version of its link
        self._done: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._sent = self._when = 0.0  # bytes that a host would have sent that has written for ever
        self._version = 0

    def begin(self, host: Hashable, size: float, done: Callable[[], None]) -> int:
        """Begins a write, at whose end `done` is called; gives its number."""
        self._advance()
        number = next(self._numbers)
        link = self._links.setdefault(host, Link(at=self._sent))
        self._settle(link)
        link.left[number], self._done[number] = size, done
        self._plan(host, link)
        return number

    def drop(self, host: Hashable, number: int) -> None:
        """Ends a write before its time, unless it has ended: it takes nothing from others any more."""
        if self._done.pop(number, None) is not None:
            self._advance()
            self._end(host, self._links[host], number)

    @property
    def writes(self) -> int:
        """How many are under way."""
        return len(self._done)

    def _advance(self) -> None:
        """To the present, at the rate that held since the last change."""
        self._sent += self._rate() * (self._clock.now - self._when)
        self._when = self._clock.now

    def _rate(self) -> float:
        """Bytes per second of each host that writes."""
        return min(self._each, self._total / max(len(self._links), 1))

    def _settle(self, link: Link) -> None:
        """Takes off what its writes have sent."""
        if link.left:
            sent = (self._sent - link.at) / len(link.left)
            link.left = {number: left - sent for number, left in link.left.items()}
        link.at = self._sent

    def _end(self, host: Hashable, link: Link, number: int) -> None:
        self._settle(link)
        del link.left[number]
        self._plan(host, link)

    def _plan(self, host: Hashable, link: Link) -> None:
        """Plans the next end of a host that has changed, and of all."""
        link.version += 1
        if link.left:
            left, number = min((left, number) for number, left in link.left.items())
            heapq.heappush(self._ends, (self._sent + left * len(link.left), number, link.version, host, link))
        else:
            del self._links[host]
        while self._ends and self._ends[0][2] != self._ends[0][4].version:
            heapq.heappop(self._ends)
        self._version += 1
        if self._ends:
            version, seconds = self._version, max(self._ends[0][0] - self._sent, 0.0) / self._rate()
            self._clock.at(self._clock.now + seconds, lambda: self._finish(version))

    def _finish(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        _, number, _, host, link = heapq.heappop(self._ends)
        done = self._done.pop(number)
        self._end(host, link, number)
        done()


class Bucket:
    """Small objects, as TensorStore's key-value store shows them; of shards only which are there."""

    def __init__(self, clock: Clock, plan: Plan, seconds: float) -> None:
        self.clock, self.plan, self.seconds = clock, plan, seconds
        self.objects: dict[str, bytes] = {}
        self.shards: set[int] = set()
        self.requests: Counter[str] = Counter()
        self.rates: Counter[int] = Counter()
        """Of small objects, in each `RATE_SECONDS`."""
        self._folders: dict[str, list[bytes]] = {}

    def read(self, key: str, byte_range: slice | None = None) -> Any:
        """A part is asked for to see whether there is an object, or one that is too large: none is."""
        self._count("read" if byte_range is None else "look at", key)
        large = byte_range is not None and byte_range.start > 0
        return self._answer(lambda: self._found("" if large else key))

    def write(self, key: str, value: bytes | None, if_equal: bytes | None = None) -> Any:
        self._count("delete" if value is None else "write", key)
        return self._answer(lambda: self._put(key, value, if_equal))

    def keys(self, span: Any) -> Any:
        found = self._listed(span)
        pages = max(math.ceil(len(found) / PAGE), 1)
        self._count("list", span.inclusive_min.decode(), pages)
        return self._answer(lambda: self._listed(span), pages)

    def _answer(self, work: Callable[[], Any], requests: int = 1) -> Any:
        when = self.clock.now + requests * self.seconds

        def result(timeout: float | None = None) -> Any:
            self.clock.sleep(max(when - self.clock.now, 0.0))
            return work()

        return SimpleNamespace(result=result)

    def _found(self, key: str) -> Any:
        value = self.objects.get(key)
        state = "missing" if value is None else "value"
        return SimpleNamespace(state=state, value=value, stamp=SimpleNamespace(generation=value or b""))

    def _put(self, key: str, value: bytes | None, if_equal: bytes | None) -> Any:
        folder = _folder(key)
        there = key in self.objects
        if value is None:
            self.objects.pop(key, None)
        elif if_equal is None or if_equal == self.objects.get(key, b""):
            self.objects[key] = value
        if there != (key in self.objects):
            names = self._folders.setdefault(folder, [])
            place = bisect.bisect_left(names, key.encode())
            names[place : place + there] = [] if there else [key.encode()]
        return SimpleNamespace(generation="some")

    def _listed(self, span: Any) -> list[bytes]:
        prefix = span.inclusive_min.decode()
        if prefix.endswith("/c/"):
            layers = range(SITE.rows_per_sample)
            return [f"{prefix}{layer}/{block}/0".encode() for layer in layers for block in sorted(self.shards)]
        if prefix in self._folders:
            return self._folders[prefix]
        folders = sorted(folder for folder in self._folders if folder.startswith(prefix))
        return [key for folder in folders for key in self._folders[folder]]

    def _count(self, kind: str, key: str, count: int = 1) -> None:
        folder = "claims" if key.startswith(CLAIM_FOLDER) else "markers" if key.startswith(MARKER_FOLDER) else "other"
        self.requests[f"{kind} {folder}"] += count
        self.rates[int(self.clock.now // RATE_SECONDS)] += count


def _folder(key: str) -> str:
    """A window of markers or claims, which is what is listed most, or a folder."""
    return key[: -len("000.json")] if key.startswith((CLAIM_FOLDER, MARKER_FOLDER)) else key[: key.rfind("/") + 1]


class BucketRoot(Root):
    """The real `Root`, whose key-value store is in memory."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__("memory://simulated/run.acts.zarr", BucketPlace(bucket))


class BucketPlace(RemotePlace):
    """A real place in memory, but for what answers."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(Address("memory", "simulated", "run.acts.zarr"), Limits(deadline_seconds=1e5))
        self.bucket = bucket
        self.kv = SimpleNamespace(read=bucket.read, write=bucket.write, list=bucket.keys)


class Host:
    """One host from its start to its death, or to the end of the run: the order of `extract.loop`, without a model."""

    def __init__(self, run: "Run", number: int, life: int) -> None:
        self.run, self.number, self.name = run, number, f"host-{number}-{life}"
        self.turn, self.dead, self.ended, self.waits = 0, False, False, False
        self.writes: dict[int, int] = {}
        """Number in the pipe, by block."""
        self.since: float | None = None
        self.greenlet = greenlet.greenlet(self._whole_life)
        run.clock.wake(self)

    def kill(self) -> None:
        """It does nothing more, wherever it is."""
        self.dead = True
        if self.since is not None:
            self.run.outcome.blocks_computed += (self.run.clock.now - self.since) / self.run.block_seconds
        for write in self.writes.values():
            self.run.pipe.drop(self.name, write)
        self.run.clock.wake(self)

    def _whole_life(self) -> None:
        with suppress(Killed):
            self._live()
        self.ended = True

    def _live(self) -> None:
        run, clock = self.run, self.run.clock
        if self.dead:
            return
        clock.sleep(run.scenario.start_seconds)
        began = clock.now
        if is_sealed(run.root, run.plan):
            return
        create_plan(run.root, run.plan)
        create_nodes(run.root, run.plan)
        dealer = Dealer(run.root, run.plan, rank=Rank(self.number, run.scenario.hosts, "simulated"))
        run.outcome.longest_resume = max(run.outcome.longest_resume, clock.now - began)
        for block in dealer:
            if block is None:
                dealer.keep()
                continue
            self.since = clock.now
            passes = math.ceil(run.block_seconds / PASS_SECONDS)
            for _ in range(passes):
                clock.sleep(run.block_seconds / passes)
                dealer.keep()
            self.since = None
            run.outcome.blocks_computed += 1
            clock.wait_until(lambda: len(self.writes) < BLOCKS_IN_MEMORY - 1)
            if dealer.wanted(block):
                self._write(block, dealer)
        clock.wait_until(lambda: not self.writes)
        dealer.finish(lambda: None, lambda: None)
        run.outcome.seconds = run.outcome.seconds or clock.now

    def _write(self, block: int, dealer: Dealer) -> None:
        """All objects of a block, then, three answers later, its marker: as `actstore.writer` in its threads."""
        run, clock = self.run, self.run.clock

        def commit() -> None:
            if self.dead:
                return
            run.commit(block)
            dealer.release(block, committed=True)
            del self.writes[block]
            if self.waits:
                clock.wake(self)

        def written() -> None:
            clock.at(clock.now + 3 * run.scenario.request_seconds, commit)

        self.writes[block] = run.pipe.begin(self.name, run.plan.layout.block_bytes, written)


class Run:
    """All hosts of a scenario, and what kills them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.plan = scenario, scenario.plan()
        self.clock = Clock()
        self.bucket = Bucket(self.clock, self.plan, scenario.request_seconds)
        self.root = BucketRoot(self.bucket)
        self.pipe = Pipe(self.clock, scenario.storage_bytes_per_second, scenario.host_bytes_per_second)
        self.outcome = Outcome(len(self.plan.blocks), requests=self.bucket.requests)
        self.block_seconds = self.plan.layout.block_samples / scenario.samples_per_second
        self._objects = sum(vouched_arrays(self.plan).values()) + 1  # and `valid`
        self._generator = random.Random(scenario.seed)
        self._digests = {name: ("0" * 32,) * count for name, count in vouched_arrays(self.plan).items()}
        self.hosts: list[Host] = []

    def simulate(self) -> Outcome:
        """From the first start to the seal.

        Raises:
            AssertionError: what is there at the end is not what was planned.
        """
        with self._fakes():
            self.hosts = [Host(self, number, 0) for number in range(self.scenario.hosts)]
            self.clock.at(self.scenario.preemption_seconds, self._preempt)
            self.clock.run()
            assert is_sealed(self.root, self.plan)
        assert self.bucket.shards == set(self.plan.blocks)
        begun = self.scenario.start_seconds // RATE_SECONDS + 1
        rates = [count for number, count in self.bucket.rates.items() if number > begun]
        self.outcome.busiest = max(rates, default=0) / RATE_SECONDS
        return self.outcome

    def commit(self, block: int) -> None:
        self.bucket.requests["data"] += self._objects
        self.outcome.twice += block in self.bucket.shards
        self.bucket.shards.add(block)
        marker = Marker(
            format=FORMAT, block=block, samples=self.plan.block_range(block), fingerprint=self.plan.fingerprint,
            checksums=self._digests,
        )  # fmt: skip
        write_marker(self.root, self.plan, marker)
        if len(self.bucket.shards) == self.outcome.blocks and not self.outcome.committed_seconds:
            self.outcome.committed_seconds = self.clock.now

    def _preempt(self) -> None:
        """One host dies, if one is left; another begins in its place."""
        alive = [host for host in self.hosts if not host.ended and not host.dead]
        if not alive or self.outcome.seconds:
            return
        victim = self._generator.choice(alive)
        victim.kill()
        self.outcome.deaths += 1
        self.hosts[victim.number] = Host(self, victim.number, self.outcome.deaths)
        self.clock.at(self.clock.now + self.scenario.preemption_seconds, self._preempt)

    @contextmanager
    def _fakes(self) -> Iterator[None]:
        clock = self.clock
        times = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now, sleep=clock.sleep)
        names = SimpleNamespace(gethostname=lambda: clock.running.name if clock.running else "nobody")
        with ExitStack() as stack:
            for place, name, value in [
                (dealing, "time", times), (claims, "time", times), (claims, "socket", names),
                (claims, "threading", SimpleNamespace(Lock=nullcontext)),  # greenlets do not wait for a real one
            ]:  # fmt: skip
                stack.enter_context(mock.patch.object(place, name, value))
            yield


def simulate(scenario: Scenario) -> Outcome:
    """A run from its first start to its seal."""
    return Run(scenario).simulate()


@dataclasses.dataclass
class Costs:
    """What planning and resuming take of a host itself: real seconds and bytes."""

    plan_seconds: float
    resume_seconds: float
    """Of worker 0, which lists all markers, half of all blocks."""
    share_seconds: float
    """Of another worker."""
    peak_bytes: int
    """Of everything, the markers in memory left out."""
    list_requests: int
    """Of worker 0."""


def costs(scenario: Scenario) -> Costs:
    """Plans a run and resumes it in the middle, in this process."""
    started = time.perf_counter()
    plan = scenario.plan()
    assert sum(len(share(plan.blocks, rank, scenario.hosts)) for rank in range(scenario.hosts)) == len(plan.blocks)
    plan.to_json()
    planned = time.perf_counter() - started
    bucket = Bucket(Clock(), plan, 0.0)
    for block in plan.blocks[::2]:
        bucket.write(f"{MARKER_FOLDER}{block:08d}.json", b"{}").result()
    bucket.requests.clear()
    seconds = []
    tracemalloc.start()
    for rank in (0, scenario.hosts - 1):
        started = time.perf_counter()
        dealer = Dealer(BucketRoot(bucket), plan, rank=Rank(rank, scenario.hosts, "simulated"))
        next(iter(dealer))
        seconds.append(time.perf_counter() - started)
        pages = bucket.requests["list markers"]
        if rank == 0:
            worker_0 = pages
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Costs(planned, seconds[0], seconds[1], peak, worker_0)


def main() -> None:
    """Prints a table, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Scenario):
        kind = int if field.name in ("hosts", "samples", "seed", "block_samples") else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    scenario = Scenario(**vars(parser.parse_args()))
    started = time.perf_counter()
    own, outcome = costs(scenario), simulate(scenario)
    real = time.perf_counter() - started
    plan = scenario.plan()
    data, small = outcome.requests["data"], sum(outcome.requests.values()) - outcome.requests["data"]
    compute = len(plan.blocks) * plan.layout.block_samples / scenario.samples_per_second / scenario.hosts
    storage = plan.layout.data_bytes / scenario.storage_bytes_per_second
    rows = {
        "hosts": f"{scenario.hosts:,}",
        "samples": f"{scenario.samples:,}, {plan.layout.data_bytes / 1e12:,.1f} TB",
        "blocks": f"{outcome.blocks:,}",
        "makespan": f"{outcome.seconds:,.0f} s; all committed after {outcome.committed_seconds:,.0f} s",
        "limits": f"{scenario.start_seconds:,.0f} s start + {max(compute, storage):,.0f} s "
        f"(compute {compute:,.0f} s, storage {storage:,.0f} s)",
        "deaths": f"{outcome.deaths:,}",
        "lost work": f"{outcome.lost_share:.2%}; {outcome.twice:,} blocks written twice",
        "requests": f"{data + small:,}; {data / outcome.blocks:.1f} data, {small / outcome.blocks:.1f} others a block",
        "requests/s": f"{(data + small) / outcome.seconds:,.0f}; {outcome.busiest:,.0f} of others in the busiest "
        f"{RATE_SECONDS:.0f} s",
        "resume": f"{outcome.longest_resume:.1f} s at most, {scenario.request_seconds} s a request",
        "own time": f"plan {own.plan_seconds:.2f} s, resume {own.resume_seconds:.2f} s ({own.list_requests} pages) for "
        f"worker 0, {own.share_seconds:.2f} s for others",
        "own memory": f"{own.peak_bytes / 1e6:,.0f} MB to resume",
        "simulated in": f"{real:,.0f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB",
    }
    for name, text in rows.items():
        print(f"{name:<14} {text}")
    for name, count in sorted(outcome.requests.items(), key=lambda item: -item[1]):
        print(f"  {name:<18} {count:>12,}")
    found = {
        "scenario": dataclasses.asdict(scenario), "blocks": outcome.blocks, "seconds": round(outcome.seconds, 1),
        "committed_seconds": round(outcome.committed_seconds, 1), "deaths": outcome.deaths,
        "lost_share": round(outcome.lost_share, 5), "twice": outcome.twice, "requests": dict(outcome.requests),
        "longest_resume": round(outcome.longest_resume, 2), "busiest": round(outcome.busiest, 1),
        "own": dataclasses.asdict(own),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
