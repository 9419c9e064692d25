"""A bad network between a writer or reader and its bucket: the right result, or a typed error within the deadline.

Each fault is met twice over: by a few requests, after which all is well, and by all of them. What a writer left behind
is then looked at without the proxy: never are other values read than those that were written.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from bucket_processes import QUICK, Outcome, Processes, check, read, small_contents, stored, write
from fault_proxy import FAULTS, OF_AN_ACCOUNT, FaultProxy, Kind, Rule
from kill_points import unchecked
from parts import part_and_all
from servers.everywhere import Reached
from servers.moto import NAME as MOTO
from servers.server import Server
from servers.strict_gcs import NAME as STRICT_GCS
from stores import tree

import actstore.errors
from actstore.errors import CorruptStoreError, StoreError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.repair import repair
from actstore.verify import verify

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

OF_A_NETWORK = [name for name in FAULTS if name not in OF_AN_ACCOUNT]
CHANGING = {"short body", "bit flip"}  # nothing about the message says that it is not what was sent
NO_ANSWER = {"412"}  # to what had no condition: TensorStore takes a chunk for missing, a new plan for another's
DEADLINES = {"few": 12.0, "all": 6.0}  # seconds; by how many requests meet the fault
MET = {("few", "slow drip"): 1, ("all", "slow drip"): 6}  # each answer comes in time: that may go on for ever
LATEST = 45.0  # a machine that does thirty of these at once is slow; alone each takes the deadline


class Operation(NamedTuple):
    """What is done, which requests of it meet the fault, and what it gives if all is well."""

    work: str
    kind: Kind
    keys: tuple[str, ...]
    right: object


OPERATIONS = {
    "read": Operation("read", "read", (r"plan\.json$", "/c/"), "right"),
    "write": Operation("write", "write", (r"plan\.json$", r"/zarr\.json$", "/c/"), [0, 1, 2, 3]),
    "list": Operation("committed", "list", ("",), [0, 1, 2, 3]),
    "commit": Operation("write", "write", (r"\.act/commits/",), [0, 1, 2, 3]),
}


class Case(NamedTuple):
    """One run, its proxy and its store."""

    many: str
    fault: str
    proxy: FaultProxy
    key: str
    process: int


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without disturbance leaves."""
    return tree(small_contents().write(tmp_path_factory.mktemp("whole") / "run.acts.zarr"))


@pytest.fixture(scope="module", params=[MOTO, STRICT_GCS])
def server(request: pytest.FixtureRequest, reached: Reached) -> Iterator[Server]:
    """A bucket with one whole store, `whole.acts.zarr`."""
    with reached(request.param) as found, unchecked():
        write(found.url("whole.acts.zarr"))
        yield found


def test_there_are_fourteen_faults() -> None:
    assert len(OF_A_NETWORK) >= 14


@part_and_all(len(OPERATIONS))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_faults(server: Server, processes: Processes, operation: str, whole: dict[str, bytes], stride: int) -> None:
    """Faults at once, each with a proxy of its own: those that a few requests meet, then those that all do.

    The parts of the four operations are all faults together.
    """
    faults = sorted(OF_A_NETWORK)[list(OPERATIONS).index(operation) % stride :: stride]
    failures, found = [], {}
    ended: list[tuple[Case, Outcome]] = []
    for many in DEADLINES:
        with ExitStack() as stack:
            cases = [start(server, processes, operation, many, fault, stack) for fault in faults]
            ended += [(case, processes.wait(case.process)) for case in cases]
    for case, outcome in ended:
        found[f"{case.fault}, {case.many}"] = (outcome.error or "right", round(outcome.seconds, 1))
        try:
            assert case.proxy.faulted, "no request met the fault"
            check_outcome(server, OPERATIONS[operation], case, outcome)
            if OPERATIONS[operation].work == "write":
                check_store(server, case, whole)
        except AssertionError as error:
            failures.append(f"{case.fault}, {case.many}: {error}; {outcome}")
    print(found)
    assert not failures, "\n".join(failures)


def start(server: Server, processes: Processes, operation: str, many: str, fault: str, stack: ExitStack) -> Case:
    work, kind, keys, _ = OPERATIONS[operation]
    most = MET.get((many, fault), {"few": 1, "all": None}[many])
    rules = [Rule(fault, frozenset({kind}), key=key, most=most) for key in keys]
    proxy = stack.enter_context(FaultProxy(server.endpoint, rules))
    new = f"{operation}-{fault.replace(' ', '-')}-{many}.acts.zarr"
    key = new if work == "write" else "whole.acts.zarr"
    environ = QUICK | {"ACTSTORE_DEADLINE_SECONDS": str(DEADLINES[many])}
    return Case(many, fault, proxy, key, processes.start(server.through(proxy.endpoint), work, key, environ=environ))


def check_outcome(server: Server, operation: Operation, case: Case, outcome: Outcome) -> None:
    """The right result, or a typed error of one line; in time."""
    assert outcome.seconds < LATEST
    if not outcome.error:
        assert outcome.value == operation.right
        return
    assert issubclass(getattr(actstore.errors, outcome.error), StoreError)
    assert "\n" not in outcome.message
    assert not any(word in outcome.message for word in ("tensorstore", "http_response", "127.0.0.1"))
    assert server.url(case.key) in outcome.message
    assert case.many == "all" or case.fault in CHANGING | NO_ANSWER, "a few faults must pass unseen"


def check_store(server: Server, case: Case, whole: dict[str, bytes]) -> None:
    """What was left, and finished without the proxy: every byte, or what was changed on its way is found."""
    url = server.url(case.key)
    try:
        write(url)
        if {name: data for name, data in stored(server, case.key).items() if "/probes/" not in name} == whole:
            return
        assert case.fault in CHANGING, "other bytes than those of an undisturbed run"
        assert check(url) != "complete"
        assert read(url) == "right"
    except CorruptStoreError:
        assert case.fault in CHANGING


def test_a_digest_that_changed_while_it_was_sealed_is_found_and_mended(
    server: Server, processes: Processes, whole: dict[str, bytes]
) -> None:
    """The manifest is made of the markers as they were read: another bit in a digest is sealed."""
    key, url = "sealed.acts.zarr", server.url("sealed.acts.zarr")
    write(url, seal=False)
    rules = [Rule("bit flip", frozenset({"read"}), key=r"commits/00000001")]
    with FaultProxy(server.endpoint, rules) as proxy:
        outcome = processes.run(server.through(proxy.endpoint), "write", key)
        assert proxy.faulted
    assert not outcome.error  # a digit of a digest
    root = Root.of(url)
    report = verify(root, read_plan(root))
    assert [finding.problem for finding in report.findings] == [
        "differs from the manifest: edited, or of another attempt"
    ]
    repair(root, read_plan(root), report)
    write(url)
    assert check(url) == "complete"
    assert {name: data for name, data in stored(server, key).items() if "/probes/" not in name} == whole


def test_meta_a_result_that_is_wrong_would_be_seen(server: Server) -> None:
    with FaultProxy(server.endpoint) as proxy:
        case = Case("all", "hang", proxy, "whole.acts.zarr", 0)
        url = server.url(case.key)
        for wrong in (
            Outcome(killed=False, value="wrong values of ['resid_post']"),
            Outcome(killed=False, value="right", seconds=900),
            Outcome(killed=False, error="ActstoreError", message=url),
            Outcome(killed=False, error="StorageError", message=f"{url} [http_response_code='503']"),
            Outcome(killed=False, error="StorageError", message=f"{url}\n"),
        ):
            with pytest.raises(AssertionError):
                check_outcome(server, OPERATIONS["read"], case, wrong)
        with pytest.raises(AssertionError, match="other bytes"):
            check_store(server, case, {})
