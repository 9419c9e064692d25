"""`actstore watch`: a run seen from another process, against the markers on the disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.claims import Claims
from actstore.errors import StoreNotFoundError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.watch import LATE_SECONDS, Watch, duration

LAYOUT = actstore.Layout((actstore.Site("resid_post", 8, (1,)),), 1000, 64, 16, ())


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A store of 16 blocks, the last one short, of which three are committed."""
    with actstore.create(tmp_path / "x.acts.zarr", LAYOUT, {}) as writer:
        pass_blocks(writer, [0, 1, 15])
        writer._seal = False
    return Root.of(tmp_path / "x.acts.zarr")


def pass_blocks(writer: actstore.Writer, blocks: list[int]) -> None:
    for block in blocks:
        start, stop = writer.block_range(block)
        writer.write(block, {"resid_post": np.ones((1, stop - start, 8), np.float32)}).result()


def claimed(root: Root, block: int, **more: Any) -> None:
    claims = Claims(root, read_plan(root, unfinished=True))
    root.write(claims._key(block), claims._mine().model_copy(update=more).to_json())


def test_a_look_counts_markers_and_names_workers(root: Root) -> None:
    now = time.time()
    claimed(root, 2, worker="a" * 16, rank=1, host="host-1", process=7, since=now - 5, samples_per_second=10.0)
    claimed(root, 3, worker="a" * 16, rank=1, host="host-1", process=7, since=now - 3, samples_per_second=12.0)
    claimed(root, 9, worker="b" * 16, rank=0, host="host-0\x1b[2J", process=8, since=now - 1)
    claimed(root, 4, worker="c" * 16, rank=2, host="gone", since=now - 1000, samples_per_second=100.0)
    claimed(root, 1, worker="d" * 16, rank=3, since=now)  # committed since
    look = Watch(root).look()
    assert (look.status, look.blocks, look.blocks_committed) == ("writing", 16, 3)
    assert (look.samples, look.samples_committed) == (1000, 64 + 64 + 40)
    assert [(worker.rank, worker.blocks, worker.late) for worker in look.workers] == [
        (0, (9,), False), (1, (2, 3), False), (2, (4,), True),
    ]  # fmt: skip
    assert [worker.samples_per_second for worker in look.workers] == [None, 12.0, 100.0]
    assert 3 <= look.workers[1].seconds < 4
    assert (look.samples_per_second, look.rate_of) == (12.0, "workers")  # one that is late does not count
    assert look.seconds_left == pytest.approx((1000 - 168) / 12)
    lines = look.text.splitlines()
    assert lines[0].endswith(": 3 of 16 blocks (18.8 %), 168 of 1,000 samples, 12 samples/s, 69 s left, 3 workers")
    assert lines[1] == r"  worker 0 on host-0\x1b[2J, process 8: block 9, for 1 s"
    assert lines[2] == "  worker 1 on host-1, process 7: block 2, 3, for 3 s, 12 samples/s"
    assert lines[3].endswith("100 samples/s, slow or gone")


def test_a_worker_is_late_when_it_is_silent_or_slow_by_its_own_measure(root: Root) -> None:
    now = time.time()
    since = now - LATE_SECONDS - 100
    cases = {
        "slow, and says so": {"seen": now - 20, "samples_per_second": 64 / 100},  # a block takes it 100 s
        "slower than it said": {"seen": now - 20, "samples_per_second": 64 / 10},
        "silent": {"samples_per_second": 64 / 100},
        "compiles": {"seen": now - 20},
    }
    for number, more in enumerate(cases.values()):
        claimed(root, 2 + number, worker=f"{number}" * 16, rank=number, since=since, **more)
    assert [worker.late for worker in Watch(root).look().workers] == [False, True, True, False]


def test_between_two_looks_markers_tell_the_rate(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("actstore.watch.time.monotonic", lambda: clock[0])
    watch = Watch(root)
    first = watch.look()
    assert (first.samples_per_second, first.rate_of, first.seconds_left) == (None, None, None)
    with actstore.create(root.url, LAYOUT, {}) as writer:
        pass_blocks(writer, [2, 3])
        clock[0] += 4
        look = watch.look()
        assert (look.samples_per_second, look.rate_of) == (128 / 4, "markers")
        assert look.seconds_left == (1000 - 168 - 128) / 32
        pass_blocks(writer, writer.missing())
    done = watch.look()
    assert (done.status, done.blocks_committed, done.workers, done.seconds_left) == ("complete", 16, (), None)
    assert done.text.endswith("16 of 16 blocks (100.0 %), 1,000 of 1,000 samples, complete")


def test_there_has_to_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="no activation store at"):
        Watch(Root.of(tmp_path / "x.acts.zarr"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99.0, "99 s"), (480.0, "8 min"), (11520.0, "3.2 h"), (216000.0, "2.5 days")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_it_watches_a_run_until_that_is_complete(tmp_path: Path) -> None:
    """The command, in a process that cannot import JAX, beside a run that is halted now and then."""
    url = tmp_path / "x.acts.zarr"
    options = ["--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "60", "--block-samples", "1024"]
    run = subprocess.Popen([sys.executable, "-m", "actstore", "extract", str(url), *options], stderr=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL)  # fmt: skip
    while not (url / ".act/commits").is_dir() or len(list((url / ".act/commits").glob("*.json"))) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGSTOP)
    (tmp_path / "jax.py").write_text("raise AssertionError('imported')")
    command = [sys.executable, "-m", "actstore", "watch", str(url)]
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    once = subprocess.run([*command, "--once", "--json"], capture_output=True, text=True, env=environ, timeout=60)
    markers = len(list((url / ".act/commits").glob("*.json")))
    look = json.loads(once.stdout)
    assert (look["status"], look["blocks_committed"], len(look["workers"])) == ("writing", markers, 1), once.stderr
    assert look["workers"][0]["process"] == run.pid
    assert look["seconds_left"] > 0
    os.kill(run.pid, signal.SIGCONT)
    whole = subprocess.run([*command, "--every", "0.2"], capture_output=True, text=True, env=environ, timeout=120)
    assert (whole.returncode, run.wait(timeout=60)) == (0, 0), whole.stderr
    firsts = [line for line in whole.stdout.splitlines() if line.startswith(str(url))]
    counts = [int(re.search(r": ([\d,]+) of", line)[1].replace(",", "")) for line in firsts]  # type: ignore[index]
    assert counts == sorted(counts)
    assert len(firsts) > 2
    assert firsts[-1].endswith("complete")
    shutil.rmtree(url)
    gone = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)
    wrong = subprocess.run([*command, "--every", "0"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, wrong.stderr) == (2, "error: --every is 0; expected at least 0.1 seconds\n")
