"""Runs on many hosts that die, over a fake clock: what is lost, how long it takes, and what the storage is asked."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kill_points import unchecked
from pod_simulation import Bucket, BucketRoot, Clock, Outcome, Pipe, Scenario, costs, simulate

from actstore.claims import CLAIM_FOLDER
from actstore.markers import MARKER_FOLDER
from extract import dealing
from extract.costs import requests
from extract.dealing import Dealer
from extract.ranks import Rank

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

SMALL = Scenario(
    hosts=32, samples=1_500 * 1024, block_samples=1024, samples_per_second=200.0, preemption_seconds=10.0,
    start_seconds=30.0,
)  # fmt: skip
QUIET = dataclasses.replace(SMALL, preemption_seconds=1e9)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with unchecked():
        yield


@pytest.fixture(scope="module")
def quiet(quick: None) -> Outcome:
    return simulate(QUIET)


def ideal(scenario: Scenario) -> float:
    """Seconds if nobody dies and nobody waits."""
    return scenario.start_seconds + scenario.samples / scenario.samples_per_second / scenario.hosts


def test_hosts_that_die_lose_little_and_the_store_is_sealed() -> None:
    outcome = simulate(SMALL)
    print(outcome)
    assert outcome.deaths > 20
    assert 0 < outcome.lost_share < 0.02
    assert outcome.twice <= outcome.deaths
    assert outcome.seconds < 2 * ideal(SMALL)  # the last blocks of the dead wait a minute
    assert outcome.longest_resume < 10


def test_hosts_that_live_compute_every_block_once(quiet: Outcome) -> None:
    assert (quiet.deaths, quiet.twice) == (0, 0)
    assert quiet.blocks_computed == quiet.blocks == 1500
    assert quiet.seconds < 1.1 * ideal(QUIET)


def test_requests_are_those_that_the_plan_says(quiet: Outcome) -> None:
    """Of blocks; those of beginning and ending grow with the hosts."""
    said = requests(QUIET.plan(), remote=False)
    found = sum(quiet.requests.values())
    assert quiet.requests["write markers"] == quiet.blocks
    assert said.block * quiet.blocks <= found < 1.2 * said.total(quiet.blocks, QUIET.hosts)


def test_hosts_without_blocks_ask_seldom(quiet: Outcome) -> None:
    """Two hosts in three have nothing to do, and wait for the others."""
    crowd = dataclasses.replace(QUIET, hosts=3 * 8, samples=8 * 1024, samples_per_second=4.0)
    outcome = simulate(crowd)
    waiting = 2 * 8 * outcome.seconds
    asked = sum(outcome.requests.values()) - outcome.blocks * requests(crowd.plan(), remote=False).block
    print(asked / waiting, outcome)
    assert outcome.blocks_computed == 8
    assert asked / waiting < 8  # a second and host; they look every 5 s
    with mock.patch.object(Dealer, "keep"):  # nobody says that it lives: a block takes longer than others are patient
        assert simulate(crowd).blocks_computed > 16


def test_storage_is_the_limit_where_it_is_slow() -> None:
    slow = dataclasses.replace(QUIET, samples_per_second=1e5, storage_bytes_per_second=100e6)
    outcome = simulate(slow)
    assert outcome.committed_seconds - slow.start_seconds == pytest.approx(
        slow.plan().layout.data_bytes / slow.storage_bytes_per_second, rel=0.05
    )  # fmt: skip
    assert outcome.blocks_computed == outcome.blocks


def test_hosts_that_die_before_a_slow_storage_cost_little_more_than_it_takes() -> None:
    """It takes half of what the hosts could send: each has two blocks under way, and waits with a third."""
    emitted = SMALL.hosts * SMALL.samples_per_second * SMALL.plan().layout.data_bytes / SMALL.samples
    slow = dataclasses.replace(SMALL, storage_bytes_per_second=emitted / 2, preemption_seconds=30.0)
    outcome = simulate(slow)
    bound = slow.start_seconds + slow.plan().layout.data_bytes / slow.storage_bytes_per_second
    print(bound, outcome)
    assert outcome.deaths > 15
    assert 0 < outcome.lost_share < 3 * outcome.deaths / outcome.blocks  # up to three blocks for a death
    assert outcome.twice <= outcome.deaths
    assert bound <= outcome.committed_seconds < 1.05 * bound + 120  # the last blocks of the dead wait a minute
    assert outcome.seconds < outcome.committed_seconds + 20


@pytest.mark.long
def test_many_hosts_that_run_out_at_once_do_not_ask_all_at_once() -> None:
    """They wait half a minute for their last blocks, and look for others meanwhile."""
    crowd = dataclasses.replace(
        QUIET, hosts=256, samples=256 * 1024, samples_per_second=1e4, storage_bytes_per_second=60e6,
    )  # fmt: skip
    outcome = simulate(crowd)
    print(outcome)
    assert outcome.committed_seconds > 60
    assert outcome.busiest < 600
    with mock.patch.multiple(dealing, LOOKS_A_SECOND=math.inf, SEAL_LOOKS_A_SECOND=math.inf, CLAIMS_OF_ALL=10**9):
        assert simulate(crowd).busiest > 2 * 600


def test_a_seed_decides_everything() -> None:
    scenario = dataclasses.replace(SMALL, samples=200 * 1024)
    assert simulate(scenario) == simulate(scenario)
    assert simulate(scenario) != simulate(dataclasses.replace(scenario, seed=1))


def test_meta_workers_without_patience_would_be_seen() -> None:
    scenario = dataclasses.replace(SMALL, samples=500 * 1024)
    with mock.patch.object(Dealer, "_patience", 0.0):
        outcome = simulate(scenario)
    assert outcome.lost_share > 0.05 > 3 * simulate(scenario).lost_share


def test_one_host_alone_takes_over_a_claim_that_many_wait_for() -> None:
    """They come in step: the claims of the dead are old for all of them at once."""
    scenario = dataclasses.replace(SMALL, samples=200 * 1024, preemption_seconds=13.0)
    outcome = simulate(scenario)
    assert (outcome.deaths > 8, outcome.twice) == (True, 0)


def test_planning_and_resuming_the_largest_run_is_quick() -> None:
    """10^10 samples on 1,024 hosts; the times are in docs/explanation/performance.md."""
    found = costs(Scenario())
    assert found.list_requests == 77  # 76,294 markers, in pages of 1,000
    assert found.peak_bytes < 200e6


# --- bandwidth ---


@dataclasses.dataclass(frozen=True)
class Write:
    """Bytes that a host begins to send at a time, and may give up."""

    host: int
    size: float
    begins: float
    drops: float = math.inf


def ends_of(writes: list[Write], total: float, each: float) -> dict[int, float]:
    """When each write ends. Each change is looked for among all writes, and all shares are worked out anew after it."""
    now, left, ends = 0.0, dict[int, float](), dict[int, float]()
    changes = sorted({time for write in writes for time in (write.begins, write.drops) if time < math.inf})
    while left or changes:
        busy = Counter(writes[number].host for number in left)
        rates = {number: min(each, total / len(busy)) / busy[writes[number].host] for number in left}
        end = min((now + left[number] / rates[number] for number in left), default=math.inf)
        then = min(end, changes[0] if changes else math.inf)
        left = {number: size - rates[number] * (then - now) for number, size in left.items()}
        now = then
        if changes and now == changes[0]:
            changes.pop(0)
            left |= {number: write.size for number, write in enumerate(writes) if write.begins == now}
            left = {number: size for number, size in left.items() if writes[number].drops != now}
        for number in [number for number, size in left.items() if size < 1e-9]:
            ends[number] = now
            del left[number]
    return ends


def piped(writes: list[Write], total: float, each: float) -> dict[int, float]:
    """The same by the pipe of the simulator."""
    clock, ends = Clock(), dict[int, float]()
    pipe = Pipe(clock, total, each)

    def begin(number: int, write: Write) -> None:
        begun = pipe.begin(write.host, write.size, lambda: ends.update({number: clock.now}))
        if write.drops < math.inf:
            clock.at(write.drops, lambda: pipe.drop(write.host, begun))

    for number, write in enumerate(writes):
        clock.at(write.begins, lambda number=number, write=write: begin(number, write))
    clock.run()
    assert pipe.writes == 0
    return ends


def certain(writes: list[Write], ends: dict[int, float]) -> dict[int, float]:
    """Those that do not end in the moment in which they are given up."""
    return {number: end for number, end in ends.items() if abs(end - writes[number].drops) > 1e-6}


some_writes = st.lists(
    st.builds(
        lambda host, size, begins, stays: Write(host, size, begins, begins + stays),
        st.integers(0, 4), st.floats(0.5, 60), st.floats(0, 20), st.floats(0.1, 20) | st.just(math.inf),
    ),
    max_size=14,
)  # fmt: skip


@given(some_writes, st.floats(1, 10), st.floats(1, 10))
def test_writes_end_as_in_a_model_that_goes_step_by_step(writes: list[Write], total: float, each: float) -> None:
    expected = certain(writes, ends_of(writes, total, each))
    assert certain(writes, piped(writes, total, each)) == pytest.approx(expected, rel=1e-7, abs=1e-6)


@pytest.mark.parametrize(
    ("writes", "expected"),
    [
        ([Write(0, 8, 0)], {0: 2.0}),  # no faster than its link
        ([Write(0, 8, 0), Write(0, 4, 0)], {0: 3.0, 1: 2.0}),  # two on one link
        ([Write(host, 8, 0) for host in range(4)], dict.fromkeys(range(4), 3.2)),  # all that the storage takes
        ([Write(0, 10, 0), Write(1, 10, 0), Write(2, 10, 0, drops=1.5)], {0: 2.75, 1: 2.75}),  # the others get its part
    ],
    ids=["one", "link", "storage", "dead"],
)
def test_bandwidth_is_shared(writes: list[Write], expected: dict[int, float]) -> None:
    """Of 10 bytes a second, 4 of one host. Worked out by hand."""
    assert piped(writes, 10, 4) == pytest.approx(expected)
    assert ends_of(writes, 10, 4) == pytest.approx(expected)


# --- windows ---


@pytest.fixture
def bucket() -> Bucket:
    """The markers of every block of 12,500 but 4,321 and 12,499."""
    plan = dataclasses.replace(SMALL, samples=12_500 * 1024).plan()
    made = Bucket(Clock(), plan, 0.0)
    for block in set(plan.blocks) - {4321, 12_499}:
        made.write(f"{MARKER_FOLDER}{block:08d}.json", b"{}").result()
    made.requests.clear()
    return made


def dealer(bucket: Bucket, rank: int) -> Dealer:
    return Dealer(BucketRoot(bucket), bucket.plan, rank=Rank(rank, 25, "test"))


def test_a_worker_lists_its_share_and_worker_0_all(bucket: Bucket) -> None:
    assert len(dealer(bucket, 3).committed) == 1000  # blocks 1,500 to 1,999, all in one window
    assert bucket.requests == {"list markers": 1}
    assert len(dealer(bucket, 0).committed) == 12_498
    assert bucket.requests == {"list markers": 1 + 13}


def test_a_worker_without_blocks_finds_those_that_are_left(bucket: Bucket) -> None:
    found: set[int] = set()
    with mock.patch.object(dealing, "time", mock.Mock(monotonic=lambda: 0.0)):
        for block in dealer(bucket, 3):
            if block is not None:
                found.add(block)
    assert found == {4321, 12_499}
    assert bucket.requests["list markers"] + bucket.requests["list claims"] < 50


def test_the_one_that_watches_gives_that_up_when_it_is_stopped(bucket: Bucket) -> None:
    one, other = dealer(bucket, 3), dealer(bucket, 4)
    bucket.write(f"{MARKER_FOLDER}{4321:08d}.json", b"{}").result()
    assert not one._sees_all_committed()
    assert one._watches
    claim = one._claims._mine().model_copy(update={"host": "another"})  # of a process that cannot be asked
    bucket.write(f"{CLAIM_FOLDER}seal.json", claim.to_json()).result()
    assert not other._sees_all_committed()
    assert not other._watches
    one.give_back()
    bucket.write(f"{MARKER_FOLDER}{12_499:08d}.json", b"{}").result()
    assert other._sees_all_committed()


def test_a_worker_among_many_looks_seldom_and_can_be_stopped_while_it_waits(bucket: Bucket) -> None:
    """Of 10,000 each looks every 400 s at most; between two pauses it yields, and its run may stop or say it lives."""
    one, other = dealer(bucket, 3), Dealer(BucketRoot(bucket), bucket.plan, rank=Rank(2, 10_000, "test"))
    for block in (4321, 12_499):
        claim = one._claims._mine().model_copy(update={"host": "another"})
        bucket.write(f"{CLAIM_FOLDER}{block:08d}.json", claim.to_json()).result()
    bucket.requests.clear()
    pauses: list[float] = []
    with mock.patch.object(dealing, "time", mock.Mock(monotonic=lambda: sum(pauses), sleep=pauses.append)):
        dealt = iter(other)
        assert [next(dealt) for _ in range(400)] == [None] * 400
    assert max(pauses) <= 5
    looks = bucket.requests["list claims"] / dealing.WINDOWS_AT_ONCE
    assert sum(pauses) > 1000
    assert 2 <= looks <= 1 + sum(pauses) / 200
