"""Local files that are there whole or not at all, and on the disk when the call returns.

The steps are those of TensorStore's file driver, so that its lock files and ours are taken over alike: write to
`<name>.__lock` under a lock, sync it, rename it, sync the folder. A killed writer leaves at most a lock file, which the
next writer of this name takes over.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PIECES_AT_ONCE = 1024  # the least IOV_MAX of the systems we know


def write_durably(path: Path, pieces: Sequence[memoryview]) -> None:
    """Writes one file from pieces that lie apart in memory, without joining them.

    Raises:
        OSError: as the system gave it; the file that was at `path` before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.__lock")
    with _locked(lock) as file:
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            _write_all(file, pieces[start : start + _PIECES_AT_ONCE])
        os.fsync(file)
        lock.replace(path)
    _sync_folder(path.parent)


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the empty file at `path`, which no other process writes meanwhile."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                ours = path.stat().st_ino == os.fstat(file).st_ino
            except FileNotFoundError:
                ours = False
            if ours:  # else the writer before us renamed it while we waited
                os.ftruncate(file, 0)
                yield file
                return
        finally:
            os.close(file)


def _write_all(file: int, pieces: Sequence[memoryview]) -> None:
    """Writes all pieces, also where the system takes only a part at a time."""
    left = list(pieces)
    while left:
        written = os.writev(file, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
