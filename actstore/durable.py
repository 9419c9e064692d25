"""Local files that are there whole or not at all, and on the disk when the call returns.

The steps and the lock are those of TensorStore's file driver, so that its lock files and ours are taken over alike:
write to `<name>.__lock` under a lock, sync it, rename it, sync the folder. A killed writer leaves at most a lock file,
which the next writer of this name takes over.
"""

import fcntl
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK_SUFFIX = ".__lock"
_PIECES_AT_ONCE = 1024  # the least IOV_MAX of the systems we know


def write_durably(path: Path, pieces: Sequence[memoryview]) -> None:
    """Writes one file from pieces that lie apart in memory, without joining them.

    Raises:
        OSError: as the system gave it; the file that was at `path` before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + LOCK_SUFFIX)
    with _locked(lock) as file:
        for start in range(0, len(pieces), _PIECES_AT_ONCE):
            _write_all(file, pieces[start : start + _PIECES_AT_ONCE])
        os.fsync(file)
        lock.replace(path)
    _sync_folder(path.parent)


def lock_files(folder: Path) -> list[tuple[Path, bool]]:
    """Every lock file below `folder`, and whether a living writer holds it."""
    found = []
    for path in sorted(folder.rglob(f"*{LOCK_SUFFIX}")):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # renamed meanwhile: its writer is done
        try:
            found.append((path, not _lock(file, wait=False)))
        finally:
            os.close(file)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the empty file at `path`, which no other writer has open meanwhile."""
    while True:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(file, wait=True)
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


def _lock(file: int, *, wait: bool) -> bool:
    """Takes the lock that TensorStore takes too, until the descriptor is closed; False if another has it."""
    try:
        if sys.platform == "linux":
            command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
            fcntl.fcntl(file, command, struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        else:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        if wait:
            raise  # the system refuses to lock: writing without would not be safe
        return False
    return True


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
