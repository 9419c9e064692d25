"""Arrays that grow at their ends: in memory, or in files of a folder that a killed process leaves to be continued."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from actstore.durable import write_durably
from actstore.errors import InputError
from actstore.kvstore import storage_errors
from extract.settings import settle

CHECKPOINT_BYTES = 64 << 20  # written since the last one: what a kill may cost, a few seconds of tokenising
SETTINGS, STATE, LOCK = "settings.json", "state.json", "lock"


class Spool:
    """Arrays by their names, to which parts are added in step.

    Args:
        folder: Where to keep them, each in a file of its own, `NAME.DTYPE`; None keeps them in memory.

    Attributes:
        count: Of the items that were added, as the caller counts them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: dict[str, list[np.ndarray]] = {}
        self._kinds: dict[str, np.dtype[Any]] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._added = 0
        self.count = 0

    def add(self, arrays: Mapping[str, Shaped[np.ndarray, " _"]], *, count: int) -> None:
        """Adds a part to each array. On a disk it is sure to stay from the next checkpoint on.

        Args:
            arrays: The same names each time, and the same types.
            count: How many items this is.
        """
        for name, values in arrays.items():
            self._kinds.setdefault(name, values.dtype)
            self._sizes[name] = self._sizes.get(name, 0) + len(values)
            if self._folder is None:
                self._parts.setdefault(name, []).append(values)
            else:
                self._file(name).write(np.ascontiguousarray(values).data)
                self._added += values.nbytes
        self.count += count
        if self._added >= CHECKPOINT_BYTES:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Waits until all is on the disk, and says so there."""
        if self._folder is None:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        kinds = {name: [self._kinds[name].str, size] for name, size in self._sizes.items()}
        state = json.dumps({"count": self.count, "arrays": kinds}).encode()
        write_durably(self._folder / STATE, [memoryview(state)])
        self._added = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays; those on a disk are maps of their files."""
        if self._folder is None:
            found = {name: np.concatenate(parts) for name, parts in self._parts.items()}
            self._parts = {name: [values] for name, values in found.items()}  # the parts are not kept twice
            return found
        self.checkpoint()
        return {
            name: np.memmap(self._path(name), self._kinds[name], "r", shape=(size,)) if size else np.zeros(0, kind)
            for (name, size), kind in zip(self._sizes.items(), self._kinds.values(), strict=True)
        }

    def _path(self, name: str) -> Path:
        return (self._folder or Path()) / f"{name}.{self._kinds[name].name}"

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self._path(name).open("ab")
        return self._files[name]

    def close(self) -> None:
        """Closes the files. What was read from them stays."""
        for file in self._files.values():
            file.close()

    def resume(self) -> None:
        """Takes up what the last checkpoint says; what came after it is cut off."""
        folder = self._folder or Path()
        state = folder / STATE
        if not state.exists():
            for path in folder.iterdir():
                if not path.name.startswith((LOCK, SETTINGS)):
                    path.unlink()  # begun, and killed before the first checkpoint
            return
        try:
            known = json.loads(state.read_bytes())
            self.count = known["count"]
            self._kinds = {name: np.dtype(kind) for name, (kind, _) in known["arrays"].items()}
            self._sizes = {name: size for name, (_, size) in known["arrays"].items()}
            sizes = {name: size * self._kinds[name].itemsize for name, size in self._sizes.items()}
            short = [name for name, size in sizes.items() if self._path(name).stat().st_size < size]
        except (ValueError, TypeError, KeyError, OSError):
            short = [STATE]
        if short:
            raise InputError(f"{self._folder} is damaged ({short[0]}); expected what a run left; remove the folder")
        for name, size in sizes.items():
            os.truncate(self._path(name), size)


@contextlib.contextmanager
def spool(folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Spool]:
    """A spool to add to, in memory or in a folder that is made or continued.

    Args:
        folder: As in `Spool`. Beside the arrays are `settings.json` and `state.json`.
        settings: Everything that decides what is added, besides the items themselves.

    Raises:
        PlanMismatchError: The folder was begun with other settings; they are named.
        InputError: It is damaged, in use, or holds something else.
        StorageError: It cannot be written.
    """
    if folder is None:
        yield Spool()
        return
    with contextlib.ExitStack() as stack:
        with storage_errors(f"write to {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_strange(folder)
            _lock(stack.enter_context((folder / LOCK).open("ab")), folder)
            settle(folder / SETTINGS, settings, of=folder)
        found = Spool(folder)
        found.resume()
        stack.callback(found.close)
        yield found


def _refuse_strange(folder: Path) -> None:
    if (folder / SETTINGS).exists():
        return
    for path in folder.iterdir():
        if not path.name.startswith((LOCK, SETTINGS)):
            raise InputError(
                f"{folder} holds {path.name} and no {SETTINGS}; expected nothing there, or what a run left; choose "
                "another folder"
            )


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder} is being written by another process; expected one at a time; wait for it to end"
        ) from None
