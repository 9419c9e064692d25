"""Loaders in threads, in other processes, after a fork, and beside training that leaves no core idle."""

import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import LAYOUT, Contents

import actstore

SETTINGS = [
    {"site": "resid_post", "layer": 5, "order": "block", "seed": 0},
    {"site": "resid_post", "layer": 5, "order": "block", "seed": 1},
    {"site": "resid_post", "layer": 5, "order": "exact", "seed": 0},
    {"site": "mlp_out", "layer": 11, "order": "exact", "seed": 3},
    {"site": "final_norm", "layer": None, "order": "block", "seed": 3},
    {"sites": ["resid_post", "final_norm"], "order": "block", "seed": 2},
]
SMALL = {"batch_size": 6, "window_bytes": 200}  # a few chunks: a window is read every other batch
Drawn = list[tuple[int, ...]]


def draw(store: actstore.Store, count: int, **settings: Any) -> Drawn:
    with store.batches(**SMALL, **settings) as loader:
        return [tuple(loader.next_batch().samples.tolist()) for _ in range(count)]


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("actstore-batches")]


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# Threads


def test_loaders_in_threads_give_their_own_sequences(finished: Path) -> None:
    """Two threads for each of six loaders, of one store that all share, beside what each gives alone."""
    store = actstore.open(finished)
    alone = [draw(store, 25, **settings) for settings in SETTINGS]
    together = threading.Barrier(2 * len(SETTINGS))

    def work(settings: dict[str, Any]) -> Drawn:
        together.wait()
        return draw(store, 25, **settings)

    with ThreadPoolExecutor(2 * len(SETTINGS)) as pool:
        found = list(pool.map(work, 2 * SETTINGS))
    assert found == 2 * alone


@pytest.mark.parametrize("order", ["block", "exact"])
@pytest.mark.parametrize("threads", [2, 5])
def test_one_loader_gives_each_batch_to_one_thread(
    finished: Path, contents: Contents, order: Any, threads: int
) -> None:
    store, epochs = actstore.open(finished), 8
    settings = {**SETTINGS[0], "order": order, "epochs": epochs}
    expected = sorted(draw(store, epochs * (LAYOUT.samples // 6), **settings))
    rows = contents.rows["resid_post"][1]
    together = threading.Barrier(threads)

    def work(_: int) -> Drawn:
        together.wait()
        found = []
        while (batch := loader.next_or_none()) is not None:
            assert batch.rows.tobytes() == rows[batch.samples].tobytes()
            found.append(tuple(batch.samples.tolist()))
        return found

    with store.batches(**SMALL, **settings) as loader, ThreadPoolExecutor(threads) as pool:
        found = [samples for one in pool.map(work, range(threads)) for samples in one]
    assert sorted(found) == expected
    assert our_threads() == []


def test_states_taken_beside_another_thread_are_whole(finished: Path) -> None:
    """Whatever state is seen while another thread draws, it is one between two batches."""
    store, seen, done = actstore.open(finished), [], threading.Event()
    settings = {**SETTINGS[2], "epochs": 12}
    with store.batches(**SMALL, **settings) as loader:
        whole = {json.dumps(loader.state())}
        while loader.next_or_none() is not None:
            whole.add(json.dumps(loader.state()))
        whole.add(json.dumps(loader.state()))  # after the last epoch

    def watch() -> None:
        while not done.is_set():
            seen.append(json.dumps(loader.state()))

    with store.batches(**SMALL, **settings) as loader, ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        drawn = len(list(loader))
        done.set()
        watching.result()
    assert drawn == 12 * (LAYOUT.samples // 6)
    assert set(seen) <= whole


@pytest.mark.parametrize("order", ["block", "exact"])
def test_closing_while_another_thread_reads(finished: Path, order: Any) -> None:
    """Nothing hangs, no batch is lost or comes twice, no thread is left."""
    store, settings = actstore.open(finished), {**SETTINGS[0], "order": order}
    expected, found, done = draw(store, 100, **settings), [], threading.Event()
    loader = store.batches(**SMALL, **settings)

    def read() -> None:
        try:
            found.extend(tuple(loader.next_batch().samples.tolist()) for _ in range(100))
        finally:
            done.set()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        closed = 0
        while not done.is_set():
            loader.close()
            closed += 1
        reading.result(timeout=60)
    loader.close()
    assert closed > 10
    assert found == expected
    assert our_threads() == []


@pytest.mark.parametrize("cycle", [False, True], ids=["alone", "in a cycle"])
def test_a_forgotten_loader_ends_its_thread_while_it_reads(finished: Path, cycle: bool) -> None:
    for _ in range(10):
        loader = actstore.open(finished).batches(**SMALL, **SETTINGS[0])
        loader.next_batch()  # the next window is being read now
        if cycle:
            loader.itself = loader  # type: ignore[attr-defined]
        del loader
    gc.collect()
    assert wait_until(lambda: our_threads() == [])


# Other processes

CHILDREN = """
import json, multiprocessing, sys
import actstore

def draw(loader, pipe):
    pipe.send([loader.next_batch().samples.tolist() for _ in range(20)])
    loader.close()

if __name__ == "__main__":
    how, url, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    context = multiprocessing.get_context(how)
    with actstore.open(url).batches(**settings) as loader:
        for _ in range(7):
            loader.next_batch()
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=draw, args=(loader, there))
        process.start()
        ours = [loader.next_batch().samples.tolist() for _ in range(20)]
        theirs = here.recv()
        process.join()
        assert theirs == ours
        assert process.exitcode == 0
    print("equal")
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("order", ["block", "exact"])
@pytest.mark.parametrize("how", ["spawn", "forkserver"])
def test_a_loader_goes_on_in_a_child_as_in_its_parent(finished: Path, tmp_path: Path, how: str, order: str) -> None:
    program = tmp_path / "children.py"
    program.write_text(CHILDREN)
    settings = json.dumps({**SMALL, **SETTINGS[0], "order": order})
    done = subprocess.run(
        [sys.executable, program, how, finished, settings], capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.stderr) == ("equal\n", "")


FORK = """
import os, signal, sys
import actstore
from actstore.errors import InputError

url, settings = sys.argv[1], {"site": "resid_post", "layer": 5, "batch_size": 6, "window_bytes": 200}
store = dataset = loader = None
PARENT
child = os.fork()
if child == 0:
    signal.alarm(20)  # ends a child that hangs
    try:
        CHILD
    except InputError as error:
        print(error, flush=True)
        os._exit(3)
    os._exit(0)
_, status = os.waitpid(child, 0)
if loader is not None:
    print("parent", loader.next_batch().samples.tolist())
print(os.waitstatus_to_exitcode(status))
"""
NOTHING = "pass"
OPENED = "store = actstore.open(url); dataset = store.dataset()"
ITERATED = "store = actstore.open(url); loader = store.batches(**settings); loader.next_batch()"
CLOSED = f"{ITERATED}; loader.close(); loader = None"
OPENS = "print(len(next(actstore.open(url).batches(**settings))), flush=True)"
FORKS: dict[str, tuple[str, str, bool]] = {
    "the parent did nothing": (NOTHING, OPENS, True),
    "opened, the child opens": (OPENED, OPENS, False),
    "opened, the child makes a loader": (OPENED, "store.batches(**settings)", False),
    "opened, the child reads a column": (OPENED, "store.column('document', [1])", False),
    "opened, the child reads the dataset": (OPENED, "dataset.resid_post[0, 3:9].values", False),
    "opened, the child shows text": (OPENED, "store.text([1])", False),
    "iterated, the child opens": (ITERATED, OPENS, False),
    "iterated, the child goes on": (ITERATED, "[loader.next_batch() for _ in range(9)]", False),
    "iterated, the child closes": (ITERATED, "loader.close()", True),
    "iterated, the child forgets": (ITERATED, "import gc; loader = store = None; gc.collect()", True),
    "closed, the child opens": (CLOSED, OPENS, False),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("case", FORKS)
def test_after_a_fork_a_store_is_refused_and_nothing_hangs(finished: Path, case: str) -> None:
    parent, child, works = FORKS[case]
    program = FORK.replace("PARENT", parent).replace("CHILD", child)
    quiet = [sys.executable, "-W", "ignore::DeprecationWarning"]  # Python 3.12 warns of any fork beside threads
    done = subprocess.run([*quiet, "-c", program, finished], capture_output=True, text=True, timeout=60)
    *said, code = done.stdout.splitlines()
    if "loader.close()" not in parent and "loader = store.batches" in parent:
        assert said.pop().startswith("parent [")  # it goes on as if nothing had been
    assert done.stderr == ""
    assert code == ("0" if works else "3"), said
    if not works:
        assert said[0].startswith("this process (")
        assert "was forked from one that had used a store" in said[0]
        assert "expected a process that was spawned, or forked before any store was opened" in said[0]
        assert "multiprocessing.get_context('spawn')" in said[0]


# Beside training

BUSY = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def test_batches_are_right_while_no_core_is_idle(finished: Path, contents: Contents) -> None:
    """Two processes that only compute, and products of matrices between batches: slower, and the same."""
    store = actstore.open(finished)
    alone = draw(store, 60, **SETTINGS[0])
    rows, weights = contents.rows["resid_post"][1], np.eye(300, dtype=np.float32)
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        with store.batches(**SMALL, **SETTINGS[0]) as loader:
            found = []
            for _ in range(60):
                batch = loader.next_batch()
                assert batch.rows.tobytes() == rows[batch.samples].tobytes()
                found.append(tuple(batch.samples.tolist()))
                weights = weights @ weights
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert found == alone
    assert our_threads() == []
