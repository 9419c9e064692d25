"""A folder of this machine that keeps what was read of remote stores: chunks that were compared with their markers.

One file for each chunk, under a name that is made of everything that tells its content from another's: plan, array,
layer, place and the digest that its commit marker has. So nothing in it is ever out of date, stores share it, and any
number of processes may use it at once. What comes out of it is compared again by whoever reads it; a file that differs
is dropped. A file is written under another name and renamed: it is there whole or not at all.

The bound holds to a sixteenth for each process that writes: each looks what is there when it has written so much, and
removes what was used longest ago, one process at a time.
"""

import contextlib
import dataclasses
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import UInt8

from actstore.errors import InputError, StorageError

LOGGER = logging.getLogger("actstore.storage")
PART = 16  # of the bound: what a process writes before it looks at the whole folder
FULL, AFTER = 1.0, 0.9  # of the bound: where removing begins and where it ends
FRESH_SECONDS = 60.0  # a file that was used since then need not be marked as used again
DEFAULT_BYTES = 64 << 30


@dataclasses.dataclass
class _State:
    """What this process knows of a folder."""

    written: int = 0
    """Bytes since it was looked at."""
    looked: bool = False
    broken: bool = False


class Cache:
    """A folder of chunks. Made by `actstore.open(url, cache=folder)`; several may share a folder."""

    def __init__(self, folder: str | os.PathLike[str], most_bytes: int = DEFAULT_BYTES) -> None:
        """Makes the folder.

        Args:
            folder: on a fast local disk.
            most_bytes: how much it may hold.

        Raises:
            InputError: not a positive number of bytes.
            StorageError: the folder cannot be made or written.
        """
        if most_bytes < 1:
            raise InputError(f"cache_bytes is {most_bytes}; expected a positive number of bytes, such as {64 << 30}")
        self.folder, self.most_bytes = Path(folder).expanduser().absolute(), most_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the cache folder {self.folder} cannot be made: {error.strerror}; name another, or none"
            ) from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise StorageError(f"the cache folder {self.folder} cannot be written; name another, or none")
        self._lock, self._state = threading.Lock(), _State()

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "Cache | None":
        """The cache that `ACTSTORE_CACHE` names, of at most `ACTSTORE_CACHE_BYTES`; None where none is named.

        Raises:
            InputError: the bytes are no number.
            StorageError: the folder cannot be made or written.
        """
        folder, size = environ.get("ACTSTORE_CACHE"), environ.get("ACTSTORE_CACHE_BYTES", str(DEFAULT_BYTES))
        if not folder:
            return None
        if not re.fullmatch("[0-9]{1,18}", size):
            raise InputError(f"ACTSTORE_CACHE_BYTES is {size!r}; expected a number of bytes, such as {DEFAULT_BYTES}")
        return cls(folder, int(size))

    @staticmethod
    def least_bytes(chunk_bytes: int) -> int:
        """How much a cache has to hold that keeps chunks of so many bytes: its bound holds to such a part."""
        return PART * chunk_bytes

    def settings(self) -> dict[str, tuple[str, str]]:
        """Where it is and how much it may hold."""
        return {
            "ACTSTORE_CACHE": (str(self.folder), "keeps chunks that were compared"),
            "ACTSTORE_CACHE_BYTES": (str(self.most_bytes), "that it may hold"),
        }

    def __getstate__(self) -> dict[str, object]:
        """A copy, in another process too, counts for itself."""
        return {"folder": self.folder, "most_bytes": self.most_bytes}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begins to count."""
        self.__dict__.update(state)
        self._lock, self._state = threading.Lock(), _State()

    def read(self, name: str, out: UInt8[np.ndarray, " byte"]) -> bool:
        """Fills `out` with what is kept under a name; False where nothing of this size is. Not compared here."""
        path = self._path(name)
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != len(out) or file.readinto(out.data) != len(out):
                    return False
        except OSError:
            return False
        if time.time() - status.st_mtime > FRESH_SECONDS:
            with contextlib.suppress(OSError):
                os.utime(path)
        return True

    def write(self, name: str, data: UInt8[np.ndarray, " byte"]) -> None:
        """Keeps what was read and compared. Where the folder cannot be written any more, says so once and stops."""
        if self._state.broken or self.least_bytes(len(data)) > self.most_bytes:
            return
        path = self._path(name)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
        try:
            try:
                partial.write_bytes(data.data)
            except FileNotFoundError:
                path.parent.mkdir(exist_ok=True)
                partial.write_bytes(data.data)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._state.broken = True
            LOGGER.warning("storage: the cache %s is not used any more: %s", self.folder, error.strerror)
            return
        with self._lock:
            self._state.written += len(data)
            due = not self._state.looked or self._state.written > self.most_bytes // PART
            if due:
                self._state.looked, self._state.written = True, 0
        if due:
            self.tidy()

    def drop(self, name: str) -> None:
        """Removes what turned out to be damaged."""
        with contextlib.suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def tidy(self) -> None:
        """Removes what was used longest ago until the bound holds. Costs a look at every file: 5 us each."""
        with contextlib.suppress(OSError), (self.folder / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # another process is at it
                return
            files = list(self._files())
            size = sum(found.st_size for _, found in files)
            if size <= FULL * (self.most_bytes - self.most_bytes // PART):
                return
            for path, found in sorted(files, key=lambda file: file[1].st_mtime):
                with contextlib.suppress(OSError):
                    os.unlink(path)  # noqa: PTH108  as it was listed
                size -= found.st_size
                if size <= AFTER * (self.most_bytes - self.most_bytes // PART):
                    return

    @property
    def size(self) -> int:
        """Bytes that are kept now. Costs a look at every file."""
        return sum(found.st_size for _, found in self._files())

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for number in range(256):
            with contextlib.suppress(OSError), os.scandir(self.folder / f"{number:02x}") as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        yield entry.path, entry.stat()

    def _path(self, name: str) -> Path:
        digest = xxhash.xxh3_128_hexdigest(name.encode())
        return self.folder / digest[:2] / digest[2:]
