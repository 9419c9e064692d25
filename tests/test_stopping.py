"""Programs that are told to stop while nobody reads what they say, and those whose terminal goes."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import actstore

SAID = "error: stopped by x; run the same command again to continue\n"
WAITS = """
import signal, sys, time
from actstore.stopping import install

install()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)
time.sleep(60)
"""
TAKES_TERMINAL = """
import fcntl, os, sys, termios

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "actstore", *sys.argv[1:]])
"""


@pytest.fixture(autouse=True)
def terminal_that_ends() -> Iterator[None]:
    """Programs inherit what becomes of SIGHUP, and under nohup it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def end(said: str, *, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -c "{said}" {redirection}'
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("redirection", "said"), [("", SAID), ("2>&-", ""), ("2>/dev/full", ""), ("2< /dev/null", "")],
    ids=["read", "closed", "full", "not to be written"],
)  # fmt: skip
def test_ending_at_once_ends_with_75_whoever_reads(redirection: str, said: str) -> None:
    done = end("from actstore.stopping import _end; _end('x')", redirection=redirection)
    assert (done.returncode, done.stderr) == (75, said)


def test_nothing_is_said_into_a_file_that_got_the_number_of_standard_error(tmp_path: Path) -> None:
    opened = f"file = open('{tmp_path}/rows', 'w'); assert file.fileno() == 2"
    assert end(f"from actstore.stopping import _end; {opened}; _end('x')", redirection="2>&-").returncode == 75
    assert (tmp_path / "rows").read_text() == ""


@pytest.mark.parametrize("ignored", [False, True], ids=["plain", "as under nohup"])
def test_the_end_of_a_terminal_stops_unless_it_is_ignored(ignored: bool) -> None:
    trap = "trap '' HUP; " if ignored else ""
    command = ["bash", "-c", f'{trap}exec "$0" -c "$1"', sys.executable, WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == f"{ignored}\n"
        program.send_signal(signal.SIGHUP)
        if ignored:
            time.sleep(0.2)
            assert program.poll() is None
            program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=30)
    assert program.returncode == 75
    assert errors.startswith(f"error: stopped by {'SIGTERM' if ignored else 'SIGHUP'}; ")


@pytest.mark.parametrize("bar", [True, False], ids=["a bar", "lines"])
def test_a_run_whose_terminal_closes_commits_and_ends_with_75(tmp_path: Path, bar: bool) -> None:
    """As an ssh session with a terminal whose connection breaks."""
    url = tmp_path / "x.acts.zarr"
    options = [
        "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "40", "--layers", "1,3", "--context", "128",
        "--batch", "2", "--block-samples", "512", *([] if bar else ["--log", "json"]),
    ]  # fmt: skip
    terminal, its_end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TAKES_TERMINAL, "extract", url, *options], stdin=its_end, stdout=its_end, stderr=its_end,
        start_new_session=True,
    ) as program:  # fmt: skip
        os.close(its_end)
        os.set_blocking(terminal, False)
        deadline = time.monotonic() + 120
        while len(list((url / ".act/commits").glob("*.json"))) < 2:
            with contextlib.suppress(BlockingIOError):
                os.read(terminal, 1 << 16)
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.close(terminal)
        assert program.wait(60) == 75
    assert actstore.open(url, partial=True).committed >= 2
    assert not list((url / ".act/claims").glob("*.json"))
