"""Results that come in any order, on the disk as soon as they are there, and one JSONL file in order at the end.

Beside the file `answers.jsonl` lie `answers.jsonl.settings.json`, which says what it is made with, and, until it is
done, `answers.jsonl.partial`: one line for each result, appended and synced. A kill leaves at most a torn last line.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from actstore.durable import write_durably
from actstore.errors import InputError
from actstore.kvstore import storage_errors
from extract.lines import JSONL_ENDINGS
from extract.settings import refuse_other, settle, stored_settings

SETTINGS, PARTIAL = ".settings.json", ".partial"
FOUND = "found"  # in the settings of a file that is written whole: what its making counted


def check_target(target: Path) -> None:
    """Refuses what could not be written or not be read again, before any work.

    Raises:
        InputError: the name does not say JSONL, or something else is in the way.
        StorageError: its folder cannot be written.
    """
    if target.suffix not in JSONL_ENDINGS:
        raise InputError(
            f"{target} ends in {target.suffix!r}; expected .jsonl, so that `extract` can read it; rename it"
        )
    check_place(target)


def check_place(target: Path) -> None:
    """Refuses a file that could not be written or is something else, whatever its ending.

    Raises:
        InputError: something else is in the way.
        StorageError: its folder cannot be written.
    """
    if target.is_dir():
        raise InputError(f"{target} is a folder; expected a file or nothing there; choose another name")
    if (target.exists() or _beside(target, PARTIAL).exists()) and not _beside(target, SETTINGS).exists():
        raise InputError(
            f"{target} is there, without {target.name}{SETTINGS} that would say what it was made with; expected "
            "nothing or a file of this command; choose another name, or move the file away"
        )
    with storage_errors(f"write to {target.parent}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")


def made_before(target: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found when a file was made that `write_whole` writes; None where it is still to be made.

    Raises:
        PlanMismatchError: what is there was made with other settings; the differing fields are named.
    """
    check_place(target)
    if not target.exists():
        return None
    stored = stored_settings(_beside(target, SETTINGS))
    found = stored.pop(FOUND, None)
    refuse_other(target, stored, settings)
    return found if isinstance(found, dict) else {}


def write_whole(
    target: Path, settings: Mapping[str, Any], pieces: Iterator[bytes], found: Callable[[], Mapping[str, Any]]
) -> None:
    """Writes a file that takes one pass to make, whole or not at all. Killed, the next call begins again.

    The settings are written when all pieces are there and before the file is: settings without a file bind nobody.

    Args:
        target: The file to make; one that is there is replaced.
        settings: Everything that decides its content.
        pieces: Its bytes, made on the way. What they raise comes out as it is.
        found: Asked after the last piece: what the pass has counted, kept beside the settings.

    Raises:
        StorageError: It could not be written.
    """

    def checked() -> Iterator[memoryview]:
        try:
            for piece in pieces:
                yield memoryview(piece)
        except Exception as error:
            raise _NotWritten from error  # `storage_errors` would take an OSError of the source for one of the target
        text = json.dumps({**settings, FOUND: found()}, indent=2).encode() + b"\n"
        write_durably(_beside(target, SETTINGS), [memoryview(text)])

    try:
        with storage_errors(f"write {target}"):
            write_durably(target, checked())
    except _NotWritten as stopped:
        raise stopped.__cause__ or stopped from None


class _NotWritten(Exception):  # noqa: N818  it carries an error and is none
    """Carries what the pieces of a file raised past the translation of storage errors."""


class Gathering:
    """The results of one run. Use it in a `with` statement.

    Args:
        target: The JSONL file to make.
        settings: Everything that decides its content; a JSON object of JSON objects and values.
        count: How many results there will be, numbered from 0.

    Attributes:
        complete: The file is there already, made with the same settings.
        known: The numbers of the results that are on the disk.

    Raises:
        PlanMismatchError: What is there was made with other settings; the differing fields are named.
        InputError: Another process is writing it.
        StorageError: It cannot be read or written.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], *, count: int) -> None:
        check_target(target)
        self._target, self._partial, self._count = target, _beside(target, PARTIAL), count
        self._offsets: dict[int, int] = {}
        self._stack = ExitStack()
        self._file: BinaryIO
        settle(_beside(target, SETTINGS), settings, of=target)
        self.complete = target.exists()

    @property
    def known(self) -> frozenset[int]:
        """Numbers of the results that are on the disk."""
        return frozenset(range(self._count)) if self.complete else frozenset(self._offsets)

    def __enter__(self) -> Self:
        if not self.complete:
            with storage_errors(f"write {self._partial}"), ExitStack() as opened:
                self._file = opened.enter_context(self._partial.open("a+b"))
                self._lock(self._file)
                self.complete = self._target.exists()  # another process may have finished it before it let go
                if self.complete:
                    self._partial.unlink(missing_ok=True)  # opening it made a new one
                else:
                    self._read(self._file)
                    self._stack = opened.pop_all()  # to be closed at the end, or at once where anything fails
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Appends some results and waits until they are on the disk."""
        lines = {number: json.dumps({"row": number, **result}).encode() + b"\n" for number, result in results.items()}
        with storage_errors(f"write {self._partial}"):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(lines.values()))
            self._file.flush()
            os.fsync(self._file.fileno())
        for number, line in lines.items():
            self._offsets[number] = offset
            offset += len(line)

    def finish(self, line: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
        """Makes the file, whole or not at all, and removes the partial one. One result is in memory at a time.

        Args:
            line: Makes the object of a line from the number of a result and the result.
        """
        with storage_errors(f"write {self._target}"):
            write_durably(self._target, self._lines(self._file, line))
            self._partial.unlink()
        self.complete = True

    def _lines(self, file: BinaryIO, line: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Iterator[memoryview]:
        for number in range(self._count):
            file.seek(self._offsets[number])
            made = line(number, json.loads(file.readline()))
            yield memoryview(json.dumps(made, ensure_ascii=False).encode() + b"\n")

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self._target} is being written by another process; expected one at a time; wait for it to end, or "
                "choose another name"
            ) from None

    def _read(self, file: BinaryIO) -> None:
        """Learns where every result lies. From the first line on that is not whole, nothing is kept."""
        file.seek(0)
        end = 0
        for line in file:
            number = _number(line)
            if number is None or number >= self._count or number in self._offsets:
                break
            self._offsets[number] = end
            end += len(line)
        file.truncate(end)


def _number(line: bytes) -> int | None:
    """The number of a result, if its line is whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        number = json.loads(line)["row"]
    except (ValueError, TypeError, KeyError):
        return None
    return number if isinstance(number, int) and number >= 0 else None


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)
