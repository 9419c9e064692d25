"""Local files that are there whole or not at all, and on the disk when the call returns.

The steps and the lock are those of TensorStore's file driver, so that its lock files and ours are taken over alike:
write to `<name>.__lock` under a lock, sync it, rename it, sync the folder. A killed writer leaves at most a lock file,
which the next writer of this name takes over.
"""

import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LOCK_SUFFIX = ".__lock"
_FLAGS = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a link would write elsewhere, a pipe would wait
_PIECES_AT_ONCE = 1024  # the least IOV_MAX of the systems we know
_BYTES_AT_ONCE = 512 << 10  # pieces are still in the core's cache when the system copies them
_AHEAD_BYTES = 8 << 20  # the disk begins with these while the next pieces are made: a quarter faster (docs/log.md)


def write_durably(path: Path, pieces: Iterable[memoryview]) -> None:
    """Writes one file from pieces that lie apart in memory, without joining them.

    Pieces are taken one after the other while the file is written; they may be made on the way. If one cannot be made,
    there is no file.

    Raises:
        OSError: as the system gave it; the file that was at `path` before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(path.name + LOCK_SUFFIX)
    with _locked(lock) as file:
        try:
            begun = written = 0
            for group in _groups(pieces):
                _write_all(file, group)
                written += sum(map(len, group))
                if written - begun >= _AHEAD_BYTES:
                    _begin_sync(file, begun, written)
                    begun = written
            os.fsync(file)
            lock.replace(path)
        except BaseException:
            lock.unlink(missing_ok=True)  # ours while we hold it; a full disk gets its space back
            raise
    _sync_folder(path.parent)


def lock_files(folder: Path) -> list[tuple[Path, bool]]:
    """Every lock file below `folder`, and whether a living writer holds it."""
    found = []
    for path in sorted(_below(folder)):
        try:
            file = os.open(path, _FLAGS)
        except FileNotFoundError:
            continue  # renamed meanwhile: its writer is done
        try:
            found.append((path, not _lock(file, wait=False)))
        finally:
            os.close(file)
    return found


def _below(folder: Path) -> Iterator[Path]:
    """The lock files below a folder. Links are not followed, and there may be more levels than Python can recurse."""
    places = [os.fspath(folder)]
    while places:
        try:
            entries = list(os.scandir(places.pop()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.ENAMETOOLONG):
                raise
            continue
        places += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        locks = [entry for entry in entries if entry.name.endswith(LOCK_SUFFIX)]
        yield from (Path(entry.path) for entry in locks if entry.is_file(follow_symlinks=False))


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of the empty file at `path`, which no other writer has open meanwhile."""
    while True:
        file = os.open(path, _FLAGS | os.O_CREAT, 0o666)
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


def _groups(pieces: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The pieces in order, as many together as one system call should take."""
    group: list[memoryview] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _BYTES_AT_ONCE or len(group) == _PIECES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _begin_sync(file: int, start: int, stop: int) -> None:
    """Lets the disk begin with a part of a file, without waiting; the part stays in the page cache while it does."""
    if sys.platform == "linux":
        os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_DONTNEED)


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
