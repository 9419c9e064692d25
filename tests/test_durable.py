"""Durable files and their lock files: whole or not at all, with several writers, and after one was killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorstore as ts

from actstore.durable import lock_files, write_durably
from actstore.garbage import Garbage, find_garbage, remove_garbage
from actstore.kvstore import Root

PIECE = 1000


def pieces(byte: int, count: int = 3000) -> list[memoryview]:
    """More pieces than one system call takes."""
    return [memoryview(bytes([byte]) * PIECE)] * count


def test_pieces_come_out_joined_and_in_order(tmp_path: Path) -> None:
    parts = [memoryview(os.urandom(size)) for size in (1, 0, 70_000, 3)] * 700
    write_durably(tmp_path / "deep/er/file", parts)
    assert (tmp_path / "deep/er/file").read_bytes() == b"".join(parts)
    assert [path.name for path in (tmp_path / "deep/er").iterdir()] == ["file"]


def test_a_shorter_file_replaces_a_longer_one(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", pieces(1))
    (tmp_path / "file.__lock").write_bytes(b"x" * 10_000_000)  # of a writer that was killed
    write_durably(tmp_path / "file", [memoryview(b"short")])
    assert (tmp_path / "file").read_bytes() == b"short"
    assert not (tmp_path / "file.__lock").exists()


def test_parts_of_a_write_that_the_system_takes_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def some(file: int, buffers: list[memoryview]) -> int:
        return real(file, [buffers[0][: max(len(buffers[0]) // 2, 1)]])

    monkeypatch.setattr(os, "writev", some)
    parts = [memoryview(os.urandom(37)) for _ in range(9)]
    write_durably(tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    threads = [threading.Thread(target=write_durably, args=(tmp_path / "file", pieces(byte))) for byte in range(8)]
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=write_durably, args=(tmp_path / "file", list(map(bytes, pieces(9))))
        )
    ]
    for writer in [*threads, *processes]:
        writer.start()
    for writer in [*threads, *processes]:
        writer.join(60)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == 3000 * PIECE
    assert len(set(data)) == 1
    assert lock_files(tmp_path) == []


def test_an_error_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durably(tmp_path / "file", [memoryview(b"old")])

    def fail(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "file", [memoryview(b"new")])
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pieces_are_taken_while_the_file_is_written(tmp_path: Path) -> None:
    """A shard is never in memory a second time: at most a megabyte was taken and is not written yet."""
    ahead = []

    def made() -> Iterator[memoryview]:
        for number in range(400):
            ahead.append(number * 100_000 - (tmp_path / "file.__lock").stat().st_size)
            yield memoryview(bytes([number % 256]) * 100_000)

    write_durably(tmp_path / "file", made())
    assert max(ahead) < 1 << 20
    assert (tmp_path / "file").read_bytes() == b"".join(bytes([number % 256]) * 100_000 for number in range(400))


def test_a_piece_that_cannot_be_made_leaves_nothing_and_lets_the_next_writer_in(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", [memoryview(b"old")])
    waiting = threading.Thread(target=write_durably, args=(tmp_path / "file", [memoryview(b"next")]))

    def broken() -> Iterator[memoryview]:
        yield from pieces(1)
        waiting.start()
        time.sleep(0.2)  # it waits for our lock
        assert (tmp_path / "file").read_bytes() == b"old"
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match="no more rows"):
        write_durably(tmp_path / "file", broken())
    waiting.join(60)
    assert (tmp_path / "file").read_bytes() == b"next"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOLD = """
import sys, time
from pathlib import Path
from actstore.durable import _locked
with _locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_garbage_is_what_a_killed_writer_left_and_nothing_that_is_held(tmp_path: Path) -> None:
    url = tmp_path / "x.acts.zarr"
    (url / "c/0").mkdir(parents=True)
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(url / name)], stdout=subprocess.PIPE)
        for name in ("c/0/0.__lock", "c/0/1.__lock")
    ]
    for holder in holders:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
    root = Root.of(url)
    assert find_garbage(root) == Garbage((), ("c/0/0.__lock", "c/0/1.__lock"))
    holders[0].send_signal(signal.SIGKILL)
    holders[0].communicate()
    found = find_garbage(root)
    assert found == Garbage(("c/0/0.__lock",), ("c/0/1.__lock",))
    remove_garbage(root, found)
    assert find_garbage(root) == Garbage((), ("c/0/1.__lock",))
    holders[1].kill()
    holders[1].communicate()


def test_the_lock_is_the_one_that_tensorstore_takes(tmp_path: Path) -> None:
    """While we hold a key's lock, TensorStore's write of that key waits."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "key.__lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    kv = ts.KvStore.open({"driver": "file", "path": f"{tmp_path}/"}).result()
    writing = kv.write("key", b"value")
    with pytest.raises(TimeoutError):
        writing.result(timeout=0.5)
    holder.kill()
    holder.communicate()
    writing.result(timeout=30)
    assert (tmp_path / "key").read_bytes() == b"value"
