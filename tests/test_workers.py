"""Several real processes write one store: alone, through jax.distributed, or as groups that compute one model."""

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import tree

import actstore
from actstore.claims import CLAIM_FOLDER, Claims
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.markers import marker_key
from actstore.untrusted import canonical_json
from extract.dealing import Dealer
from extract.division import rest, share
from extract.ranks import Rank

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

OPTIONS = [
    "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "30", "--layers", "1,3", "--context", "128",
    "--batch", "4", "--block-samples", "1024",
]  # fmt: skip
FLOAT32 = ["--dtype", "float32"]
ALONE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
TWO_DEVICES = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
ENDED_IN_SECONDS = 45  # heartbeats take 20


def start(url: Path, *more: str, environ: dict[str, str] = ALONE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "actstore", "extract", str(url), *OPTIONS, "--json", *more], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environ,
    )  # fmt: skip


def start_all(url: Path, count: int, *more: str, environ: dict[str, str] = ALONE) -> list[subprocess.Popen[str]]:
    ranks = [["--num-processes", str(count), "--process-id", str(number)] for number in range(count)]
    return [start(url, *rank, *more, environ=environ) for rank in ranks]


def finished(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What each printed; all must end well."""
    said = [(process.communicate(timeout=300), process.returncode) for process in processes]
    assert [code for _, code in said] == [0] * len(processes), [errors for (_, errors), _ in said]
    return [json.loads(out.splitlines()[-1]) for (out, _), _ in said]  # Gloo prints before


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def committed(url: Path) -> int:
    return len(list((url / ".act/commits").glob("*.json"))) if (url / ".act/commits").is_dir() else 0


def wait_for_blocks(processes: list[subprocess.Popen[str]], url: Path, blocks: int) -> None:
    deadline = time.monotonic() + 120
    while committed(url) < blocks:
        codes = [process.poll() for process in processes]
        if any(code is not None for code in codes) or time.monotonic() > deadline:
            pytest.fail(f"ended with {codes} before {blocks} blocks")
        time.sleep(0.002)


@pytest.fixture(scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.long)])
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, bytes]]:
    """Options, and the files that one worker writes with them."""
    url = tmp_path_factory.mktemp(request.param) / "x.acts.zarr"
    options = ["--dtype", request.param]
    finished([start(url, *options)])
    return options, tree(url)


@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_any_number_of_workers_writes_the_same_bytes(
    tmp_path: Path, one: tuple[list[str], dict[str, bytes]], count: int
) -> None:
    url = tmp_path / "x.acts.zarr"
    said = finished(start_all(url, count, *one[0]))
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"] > 4 * count  # none twice
    assert [each["rank"] for each in said] == list(range(count))
    assert tree(url) == one[1]


def test_workers_that_know_nothing_of_each_other_share_the_blocks_too(
    tmp_path: Path, one: tuple[list[str], dict[str, bytes]]
) -> None:
    url = tmp_path / "x.acts.zarr"
    said = finished([start(url, *one[0]) for _ in range(3)])
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"]
    assert tree(url) == one[1]


@pytest.mark.long
def test_joined_workers_that_compute_alone_write_the_same_bytes(
    tmp_path: Path, one: tuple[list[str], dict[str, bytes]]
) -> None:
    url = tmp_path / "x.acts.zarr"
    more = [*one[0], "--coordinator", f"127.0.0.1:{port()}", "--mesh", "1,1"]
    said = finished(start_all(url, 2, *more, environ=TWO_DEVICES))
    assert [(each["rank"], each["workers"]) for each in said] == [(0, 2), (1, 2)]
    assert tree(url) == one[1]


def values(url: Path) -> np.ndarray:
    return actstore.open(url).dataset(raw=True).resid_post.values.astype(np.float32)


@pytest.mark.long  # test_worker_meshes.py has one across two processes
@pytest.mark.parametrize("mesh", ["2,2", "1,4", "4,1"], ids=["model inside", "model across", "data across"])
def test_two_processes_compute_one_model(tmp_path: Path, mesh: str) -> None:
    """The mesh of a group against the same mesh in one process, and against one device."""
    places = {name: tmp_path / f"{name}.acts.zarr" for name in ("group", "process", "device")}
    said = finished(start_all(
        places["group"], 2, *FLOAT32, "--mesh", mesh, "--coordinator", f"127.0.0.1:{port()}", environ=TWO_DEVICES
    ))  # fmt: skip
    finished([start(places["process"], *FLOAT32, "--mesh", mesh, environ={**ALONE, "JAX_NUM_CPU_DEVICES": "4"})])
    finished([start(places["device"], *FLOAT32)])
    assert [each["workers"] for each in said] == [1, 1]  # one copy of the model
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"]
    assert min(each["blocks_computed"] for each in said) >= said[0]["blocks"] // 2  # they take turns in writing
    found, whole, device = (values(place) for place in places.values())
    norms = np.linalg.norm(device, axis=-1)
    assert (np.linalg.norm(found - device, axis=-1) / norms).max() < 1e-5
    assert (np.linalg.norm(found - whole, axis=-1) / norms).max() < 1e-5
    subprocess.run([sys.executable, "-m", "actstore", "verify", str(places["group"])], check=True, capture_output=True)


@pytest.mark.long
def test_two_groups_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    urls = [tmp_path / f"{groups}.acts.zarr" for groups in (1, 2)]
    for groups, url in enumerate(urls, start=1):
        more = [*FLOAT32, "--mesh", "1,2", "--coordinator", f"127.0.0.1:{port()}"]
        said = finished(start_all(url, 2 * groups, *more))
        assert [each["rank"] for each in said] == [0, 0, 1, 1][: 2 * groups]
        assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"]
    assert tree(urls[0]) == tree(urls[1])


@pytest.mark.long
def test_a_group_that_was_stopped_is_continued_by_single_workers(tmp_path: Path) -> None:
    """SIGTERM comes to one member: both end with 75, at the same step."""
    url = tmp_path / "x.acts.zarr"
    more = [*FLOAT32, "--mesh", "1,4", "--coordinator", f"127.0.0.1:{port()}"]
    group = start_all(url, 2, *more, environ=TWO_DEVICES)
    wait_for_blocks(group, url, 3)
    group[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=ENDED_IN_SECONDS)[1] for process in group]
    assert [process.returncode for process in group] == [75, 75], errors
    assert "error: stopped by SIGTERM;" in errors[1]
    assert "error: another process that computes the same model was stopped; committed blocks stay" in errors[0]
    done = committed(url)
    said = finished(start_all(url, 3, *FLOAT32))
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"] - done
    subprocess.run([sys.executable, "-m", "actstore", "verify", str(url)], check=True, capture_output=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("killed", [0, 1], ids=["the coordinator", "another"])
def test_a_killed_member_is_reported_in_seconds(tmp_path: Path, killed: int) -> None:
    url = tmp_path / "x.acts.zarr"
    more = [*FLOAT32, "--mesh", "1,4", "--coordinator", f"127.0.0.1:{port()}"]
    group = start_all(url, 2, *more, environ=TWO_DEVICES)
    wait_for_blocks(group, url, 3)
    group[killed].kill()
    group[killed].communicate()
    _, errors = group[1 - killed].communicate(timeout=ENDED_IN_SECONDS)
    assert group[1 - killed].returncode == 75, errors
    assert "processes that compute this model ended or cannot be reached" in errors


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_others_do_what_a_stopped_worker_leaves(
    tmp_path: Path, one: tuple[list[str], dict[str, bytes]], how: signal.Signals
) -> None:
    url = tmp_path / "x.acts.zarr"
    workers = start_all(url, 3, *one[0])
    wait_for_blocks(workers, url, 4)
    workers[1].send_signal(how)
    workers[1].communicate(timeout=30)
    assert workers[1].returncode == (75 if how == signal.SIGTERM else -9)
    finished([workers[0], workers[2]])
    assert tree(url) == one[1]


@pytest.mark.long
def test_a_signal_to_all_and_another_number_of_workers(tmp_path: Path, one: tuple[list[str], dict[str, bytes]]) -> None:
    url = tmp_path / "x.acts.zarr"
    workers = start_all(url, 2, *one[0])
    wait_for_blocks(workers, url, 4)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    for worker in workers:
        worker.communicate(timeout=30)
    assert [worker.returncode for worker in workers] == [75, 75]
    assert not list((url / CLAIM_FOLDER).glob("*.json"))  # given back
    done = committed(url)
    said = finished(start_all(url, 4, *one[0]))
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"] - done
    assert tree(url) == one[1]


@pytest.mark.long
def test_a_storm_of_kills(tmp_path: Path, one: tuple[list[str], dict[str, bytes]]) -> None:
    """50 of three workers are killed at random moments and replaced by new ones, over as many stores as that takes."""
    if one[0][1] != "bfloat16":
        pytest.skip("NOT REPEATED: the storm is the same for every dtype")
    draw = random.Random(8)
    kills, stores = 0, itertools.count()
    while kills < 50:
        url = tmp_path / f"{next(stores)}.acts.zarr"
        fleet = start_all(url, 3, *one[0])
        while all(worker.poll() is None for worker in fleet) and kills < 50:
            time.sleep(draw.uniform(0.5, 4))
            number = draw.randrange(3)
            fleet[number].kill()
            fleet[number].communicate()
            if fleet[number].returncode == -signal.SIGKILL:
                kills += 1
                fleet[number] = start(url, *one[0], "--num-processes", "3", "--process-id", str(number))
        finished(fleet)
        assert tree(url) == one[1]


def test_shares_are_a_partition_of_neighbours() -> None:
    for count, workers in [(0, 3), (1, 4), (10, 3), (1000, 64)]:
        shares = [share(range(5, 5 + count), rank, workers) for rank in range(workers)]
        assert [block for each in shares for block in each] == list(range(5, 5 + count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_rest_is_tried_whole_from_a_place_of_ones_own_backwards() -> None:
    free = list(range(0, 200, 2))
    orders = [rest(free, rank, 0) for rank in range(20)]
    for order in orders:
        assert sorted(order) == free
        steps = np.diff(order)
        assert (steps[steps < 0] == -2).all()
        assert (steps > 0).sum() <= 1
    assert len({order[0] for order in orders}) > 12
    assert rest([], 0, 0) == []


@pytest.fixture
def begun(tmp_path: Path, one: tuple[list[str], dict[str, bytes]]) -> Root:
    """A store of which some blocks are missing."""
    url = tmp_path / "x.acts.zarr"
    for key, data in one[1].items():
        (url / key).parent.mkdir(parents=True, exist_ok=True)
        (url / key).write_bytes(data)
    for block in (3, 5, 6, 20):
        (url / f".act/commits/{block:08d}.json").unlink()
    (url / ".act/SEALED.json").unlink()
    return Root.of(url)


def test_a_block_that_another_has_is_left_until_patience_ends(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    other = Claims(begun, plan)
    claim = other._mine().model_copy(update={"host": "another-host", "since": time.time() - 50})
    begun.write(other._key(5), claim.to_json())
    dealt = iter(Dealer(begun, plan, rank=Rank(), patience=60.0))
    assert [next(dealt) for _ in range(4)] == [3, 6, 20, None]
    dealt = iter(Dealer(begun, plan, rank=Rank(), patience=40.0))
    assert next(dealt) == 3  # a claim of this very process: of a Dealer that is gone
    assert next(dealt) == 5


def test_claims_of_the_dead_and_broken_ones_do_not_count(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    claims = Claims(begun, plan)
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = claims._mine().model_copy(update={"worker": "f" * 16, "process": ended.pid})
    alive = dead.model_copy(update={"process": os.getppid()})
    for block, data in {3: dead.to_json(), 5: b"{", 6: b"", 20: alive.to_json()}.items():
        begun.write(claims._key(block), data)
    assert claims.claimed(0) == {3, 5, 6, 20}
    assert claims.over([3, 5, 6, 7, 20], patience=60.0) == [3, 5, 6, 7]
    assert [block for block in (3, 5, 6, 20) if claims.take(block, patience=60.0)] == [3, 5, 6]
    assert claims.take(20, patience=0.0)


def test_a_claim_by_a_clock_that_is_ahead_counts_until_it_was_silent_for_long_enough(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    claims = Claims(begun, plan)
    ahead = claims._mine().model_copy(update={"worker": "f" * 16, "host": "ahead", "since": time.time() + 86400})
    begun.write(claims._key(3), ahead.to_json())
    assert claims.over([3], patience=0.2) == []
    time.sleep(0.3)
    assert claims.over([3], patience=0.2) == [3]
    begun.write(claims._key(3), ahead.model_copy(update={"seen": time.time() + 86401}).to_json())
    assert claims.over([3], patience=0.2) == []  # it said something


def test_process_numbers_of_another_container_say_nothing(begun: Root) -> None:
    """Two containers may have one name, and both a process 1."""
    plan = read_plan(begun, unfinished=True)
    claims = Claims(begun, plan)
    name, digest = claims._host.split("/")
    assert (name, len(digest)) == (socket.gethostname(), 8)
    ended = subprocess.Popen(["true"])
    ended.wait()
    other = claims._mine().model_copy(update={"worker": "f" * 16, "process": ended.pid, "host": f"{name}/00000000"})
    begun.write(claims._key(3), other.to_json())
    assert claims.over([3], patience=60.0) == []


def test_blocks_that_others_of_a_group_have_committed_are_not_given_back(
    begun: Root, caplog: pytest.LogCaptureFixture
) -> None:
    plan = read_plan(begun, unfinished=True)
    dealer = Dealer(begun, plan, rank=Rank())
    dealt = iter(dealer)
    assert [next(dealt), next(dealt)] == [3, 5]
    marker = json.loads(begun.read(marker_key(4)) or b"")
    marker |= {"block": 3, "samples": list(plan.block_range(3))}
    begun.write(marker_key(3), canonical_json(marker))
    caplog.set_level("INFO", "extract.dealing")
    dealer.give_back()
    assert [line for line in caplog.messages if "gave back" in line] == ["gave back block 5"]


def test_a_claim_is_renewed_until_another_has_taken_over(begun: Root) -> None:
    """Clocks are moved by moving what claims say."""
    plan = read_plan(begun, unfinished=True)
    here, there = Claims(begun, plan), Claims(begun, plan)
    here._host = "here"
    assert here.take(3, patience=60.0)
    begun.write(here._key(3), here._mine().model_copy(update={"since": time.time() - 100}).to_json())
    here._since[3] -= 100
    here.renew(3)
    assert there.over([3], patience=60.0) == []
    assert there.over([3], patience=60.0, most=90.0) == [3]  # alive, but slow
    assert not there.take(3, patience=60.0)
    assert there.take(3, patience=60.0, most=90.0)
    here.renew(3)
    assert here.read()[3].worker == there.worker
    there.release(3)
    there.renew(3)
    assert begun.read(there._key(3)) is None


def test_of_many_that_take_over_one_claim_one_has_it(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    for turn in range(10):
        dead = Claims(begun, plan)._mine().model_copy(update={"host": "gone", "since": time.time() - 100 - turn})
        begun.write(f"{CLAIM_FOLDER}00000003.json", dead.to_json())
        several = [Claims(begun, plan) for _ in range(8)]
        for number, claims in enumerate(several):
            claims._host = f"host-{number}"  # else all are of this process, which is known not to be another
        with ThreadPoolExecutor(8) as pool:
            took = list(pool.map(lambda claims: claims.take(3, patience=60.0), several))
        assert sum(took) == 1


def test_a_block_that_is_being_written_is_not_given_back(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    dealer = Dealer(begun, plan, rank=Rank())
    dealt = iter(dealer)
    assert [next(dealt), next(dealt)] == [3, 5]
    assert dealer.wanted(3)
    dealer.give_back()
    assert Claims(begun, plan).claimed(0) == {3}
    dealer.release(3, committed=True)
    assert Claims(begun, plan).claimed(0) == set()


def test_a_block_that_was_committed_before_it_was_taken_is_not_dealt(begun: Root) -> None:
    plan = read_plan(begun, unfinished=True)
    dealer = Dealer(begun, plan, rank=Rank())
    begun.write(".act/commits/00000005.json", b"{}")  # by another worker, after the listing
    assert [block for block, _ in zip(dealer, range(3), strict=False)] == [3, 6, 20]
    assert dealer.samples_left == 3 * 1024


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coordinator", "host:1"], "--coordinator was given, and this is process 0 of 1"),
        (["--coordinator", "host", "--num-processes", "2", "--process-id", "0"], "expected HOST:PORT of process 0"),
        (["--mesh", "2,1"], "for a model that spans hosts, start the same command on each with --coordinator"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], said: str) -> None:
    process = start(tmp_path / "x.acts.zarr", *options)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in re.sub(r"\s+", " ", errors)
    assert not (tmp_path / "x.acts.zarr").exists()
