"""Some seconds of `python -m tests.bucket_soak`; that it would see what is lost; and a writer that is cut off."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bucket_processes import LAYOUT, QUICK, Processes
from bucket_soak import RULES, SERVERS, BucketSoak
from fault_proxy import FaultProxy, Rule
from kill_points import unchecked
from servers.everywhere import Reached
from servers.server import Server

pytestmark = pytest.mark.slow  # of the protocol and not of the Python


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, reached: Reached) -> Iterator[Server]:
    with reached(request.param) as found, unchecked():
        yield found


@pytest.mark.sampled(2)
def test_nothing_is_lost_in_a_few_seconds(server: Server, processes: Processes, tmp_path: Path) -> None:
    figures = BucketSoak(server, processes, tmp_path, seed=2, rules=RULES[::2]).run(1)
    print(figures)
    assert figures.stores >= 1
    assert figures.faulted >= 0.08 * figures.requests > 10
    assert figures.runs >= 3 * figures.stores


def test_meta_what_is_torn_would_be_seen(server: Server, processes: Processes, tmp_path: Path) -> None:
    """A server that keeps another bit than it was sent, in a chunk that no writer reads again."""
    torn = [Rule("bit flip", frozenset({"write"}), key="norm.*/c/")]
    with pytest.raises(AssertionError, match=r"lost or torn: .*norm"):
        BucketSoak(server, processes, tmp_path, seed=2, rules=torn).run(1)


# A writer that is cut off


@pytest.mark.sampled(2)
def test_the_others_finish_while_one_is_cut_off_and_a_rerun_completes(server: Server, processes: Processes) -> None:
    key, environ = "cut-off/run.acts.zarr", QUICK | {"ACTSTORE_DEADLINE_SECONDS": "4"}
    with ExitStack() as stack:
        proxies = [stack.enter_context(FaultProxy(server.endpoint)) for _ in range(LAYOUT.blocks)]
        proxies[1].rules = [Rule("hang", key="/c/")]  # it has seen the plan, and no shard of it arrives
        started = [
            processes.start(server.through(proxy.endpoint), "write", key, environ=environ, blocks=[block], seal=False)
            for block, proxy in enumerate(proxies)
        ]
        outcomes = [processes.wait(process) for process in started]
    assert [outcome.value for outcome in outcomes] == [[0], None, [2], [3]], outcomes
    assert outcomes[1].error == "StorageError"
    assert outcomes[1].exit_code == 3
    assert processes.value(server, "committed", key) == [0, 2, 3]
    assert processes.value(server, "write", key) == [1]
    assert processes.value(server, "check", key) == "complete"
    assert processes.value(server, "read", key) == "right"


@pytest.mark.sampled(2)
def test_one_that_was_cut_off_goes_on_when_it_heals(server: Server, processes: Processes) -> None:
    key = "healed/run.acts.zarr"
    with FaultProxy(server.endpoint, [Rule("hang", key="/c/")]) as proxy:
        environ = QUICK | {"ACTSTORE_DEADLINE_SECONDS": "60"}
        process = processes.start(server.through(proxy.endpoint), "write", key, environ=environ)
        deadline = time.monotonic() + 30
        while not proxy.faulted and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)
        proxy.rules = []
        assert processes.wait(process).value == [0, 1, 2, 3]
        assert proxy.faulted
    assert processes.value(server, "check", key) == "complete"
