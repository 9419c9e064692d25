"""Workers of two devices each, joined or not, with the model cut inside a process and across: the same bytes."""

import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from fleet import OPTIONS, Worker, workers
from stores import tree

import actstore

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

FEW = ["--limit", "10", "--block-samples", "512", "--dtype", "float32"]
INSIDE, ACROSS = "1,2", "1,4"


def joined() -> list[str]:
    """The option by which processes find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}"]


def written(folder: Path, count: int, *more: str) -> dict[str, bytes]:
    """The files that some workers of two devices write."""
    url = folder / "x.acts.zarr"
    fleet = workers(folder / "fleet", url, count, *FEW, *more, devices=2)
    codes = [worker.wait() for worker in fleet]
    assert codes == [0] * count, [worker.errors for worker in fleet]
    said = [worker.summary for worker in fleet]
    assert sum(each["blocks_computed"] for each in said) == said[0]["blocks"] > 2 * count  # none twice
    return tree(url)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one worker with the model on its two devices."""
    return written(tmp_path_factory.mktemp("one"), 1, "--mesh", INSIDE)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "joined"])
def test_the_model_inside_each_process(tmp_path: Path, one: dict[str, bytes], count: int, together: bool) -> None:
    assert written(tmp_path, count, "--mesh", INSIDE, *(joined() if together else [])) == one


def test_the_model_across_two_processes(tmp_path: Path, one: dict[str, bytes]) -> None:
    """One group and two: the same bytes; the same values as on other meshes but for the last bits."""
    groups = [written(tmp_path / str(count), count, "--mesh", ACROSS, *joined()) for count in (2, 4)]
    assert groups[0] == groups[1]
    here = actstore.open(tmp_path / "4" / "x.acts.zarr").dataset(raw=True).resid_post.values
    there = tmp_path / "inside" / "x.acts.zarr"
    for key, data in one.items():
        (there / key).parent.mkdir(parents=True, exist_ok=True)
        (there / key).write_bytes(data)
    expected = actstore.open(there).dataset(raw=True).resid_post.values
    norms = np.linalg.norm(expected, axis=-1)
    assert (np.linalg.norm(here - expected, axis=-1) / norms).max() < 1e-5


def until_blocks(fleet: list[Worker], url: Path, count: int) -> None:
    folder = url / ".act/commits"
    while not folder.is_dir() or len(list(folder.glob("*.json"))) < count:
        assert all(worker.code is None for worker in fleet), [worker.errors for worker in fleet]
        time.sleep(0.005)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stopped", [[0], [0, 1, 2]], ids=["the coordinator", "all"])
def test_a_signal_to_joined_workers(tmp_path: Path, one: dict[str, bytes], stopped: list[int]) -> None:
    """Who is stopped ends with 75 in time; the others finish, or end with 75 too; then any number continues."""
    url = tmp_path / "x.acts.zarr"
    fleet = workers(tmp_path / "first", url, 3, *FEW, "--mesh", INSIDE, *joined(), devices=2)
    until_blocks(fleet, url, 3)
    began = time.monotonic()
    for number in stopped:
        fleet[number].signal(signal.SIGTERM)
    assert [fleet[number].wait(30) for number in stopped] == [75] * len(stopped), [worker.errors for worker in fleet]
    assert time.monotonic() - began < 30
    codes = [worker.wait(60) for worker in fleet]
    assert set(codes) <= {0, 75}, [worker.errors for worker in fleet]
    again = workers(tmp_path / "second", url, 2, *FEW, "--mesh", INSIDE, devices=2)
    assert [worker.wait() for worker in again] == [0, 0], [worker.errors for worker in again]
    assert tree(url) == one


@pytest.mark.long
def test_one_that_is_stopped_does_not_wait_for_those_that_go_on(tmp_path: Path) -> None:
    """The others have work for a minute; JAX ends them some seconds later, and they say that they can be continued."""
    url = tmp_path / "x.acts.zarr"
    much = ["--limit", "400", "--block-samples", "256", "--dtype", "float32", "--mesh", INSIDE]
    fleet = workers(tmp_path / "fleet", url, 2, *much, *joined(), devices=2)
    until_blocks(fleet, url, 3)
    fleet[1].signal(signal.SIGTERM)
    assert fleet[1].wait(30) == 75, fleet[1].errors
    assert fleet[1].errors.splitlines()[-1].startswith("error: stopped by SIGTERM; ")
    assert fleet[0].code is None  # it had work still
    assert fleet[0].wait(45) == 75, fleet[0].errors
    assert "ended or cannot be reached; committed blocks stay: run the same command again" in fleet[0].errors


def test_one_that_waits_for_the_others_can_be_stopped(tmp_path: Path) -> None:
    """They never come: JAX waits for five minutes."""
    address = joined()
    host, port = address[1].rsplit(":", 1)
    mesh = ["--mesh", ACROSS, "--num-processes", "2", "--process-id", "0"]
    waits = Worker(tmp_path / "w", "extract", tmp_path / "x.acts.zarr", *OPTIONS, *FEW, *mesh, *address, devices=2)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # until its coordinator listens
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                break
        time.sleep(0.1)
    time.sleep(1.0)
    assert waits.code is None, waits.errors
    waits.signal(signal.SIGTERM)
    assert waits.wait(20) == 75, waits.errors
    assert waits.errors.splitlines()[-1] == "error: stopped by SIGTERM; run the same command again to continue"
