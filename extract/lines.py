"""JSON lines to objects: line by line, `.gz` and `.zst` too, with what is wrong beside what is right."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from actstore.errors import InputError

JSONL_ENDINGS = (".jsonl", ".ndjson")
LINES_ENDINGS = (*JSONL_ENDINGS, *(ending + packed for ending in JSONL_ENDINGS for packed in (".gz", ".zst")))
LINE_BYTES = 512 << 20  # a text of 64 MiB, every byte of it as an escape of six; a longer line is not held

_LINES_BETWEEN = 256  # how often progress is told

Share = Callable[[float], None]


@dataclasses.dataclass(frozen=True)
class Broken:
    """What stands where a record should be.

    Attributes:
        kind: `broken`, or `wrong type` where it is JSON and no object.
        found: What it is, to follow its place in a sentence.
        expected: What was expected.
        remedy: What to do.
    """

    kind: Literal["broken", "wrong type"]
    found: str
    expected: str
    remedy: str


Found = tuple[str, Mapping[str, Any] | Broken]


def has_ending(path: Path, *endings: str) -> bool:
    """Whether a file is of a kind, by the end of its name in letters of any case."""
    return path.name.lower().endswith(endings)


def read_lines(
    path: Path, *, name: str | None = None, progress: Share | None = None, most_bytes: int = LINE_BYTES
) -> Iterator[Found]:
    """Yields the object of each line of a JSONL file, plain, `.gz` or `.zst`. Blank lines are no records.

    Args:
        path: The file, in UTF-8.
        name: What places are named by, `name:line` from 1; None is the file's name.
        progress: Called now and then with the share of the file that was read.
        most_bytes: A longer line is not held.

    Raises:
        InputError: While iterating: the file cannot be opened or unpacked.
    """
    name = name or path.name
    with opened(path) as raw, _unpacked(path, raw) as file:
        size = max(os.fstat(raw.fileno()).st_size, 1)
        for number, line in enumerate(_bounded(file, path, most_bytes), start=1):
            if progress and number % _LINES_BETWEEN == 1:
                progress(raw.tell() / size)
            if line is None:
                found = f"is longer than {most_bytes:,} bytes"
                yield f"{name}:{number}", Broken("broken", found, "one JSON object on the line", "Cut the record.")
            elif line.removeprefix(codecs.BOM_UTF8).strip():
                yield f"{name}:{number}", _object(line)
    if progress:
        progress(1.0)


def opened(path: Path) -> io.BufferedReader:
    """An open file.

    Raises:
        InputError: It cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); expected a readable file. Check the path and its permissions."
        ) from error


def decoded(raw: bytes) -> str | Broken:
    """A text in UTF-8, without a byte order mark."""
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        found = f"has the byte 0x{raw[error.start]:02x} at offset {error.start}, which is not UTF-8"
        return Broken("broken", found, "UTF-8 text", "Convert the file, for example with iconv.")


def _object(line: bytes) -> dict[str, Any] | Broken:
    text = decoded(line)
    if isinstance(text, Broken):
        return text
    expected = "one JSON object on the line"
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        return Broken("broken", f"has the field {str(error)[:60]!r} twice", "every field once", "Drop one of them.")
    except (ValueError, RecursionError) as error:
        if "\0" in text:
            found = "has NUL bytes, as UTF-16 and torn files have"
            return Broken("broken", found, f"{expected}, in UTF-8", "Convert the file, for example with iconv.")
        remedy = "Correct the line; a text's line breaks must be written as \\n."
        return Broken("broken", f"is not JSON ({str(error)[:120]})", expected, remedy)
    if isinstance(value, dict):
        return value
    return Broken(
        "wrong type", f"holds a JSON {type(value).__name__}", 'an object such as {"id": "a", "text": "..."}',
        "Wrap the value in an object.",
    )  # fmt: skip


class _TwiceError(Exception):
    """A field that an object has twice: of two values Python would take the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in found if names.count(name) > 1))
    return found


def _bounded(file: io.BufferedIOBase, path: Path, most_bytes: int) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be held."""
    try:
        while line := file.readline(most_bytes + 1):
            whole = len(line) <= most_bytes
            while len(line) > most_bytes and not line.endswith(b"\n"):
                line = file.readline(most_bytes + 1)
            yield line if whole else None
    except (OSError, EOFError, zlib.error, _PackedError) as error:
        raise InputError(
            f"{path} cannot be unpacked to its end ({error}); expected a whole file. Copy it again."
        ) from None


@contextlib.contextmanager
def _unpacked(path: Path, raw: io.BufferedIOBase) -> Iterator[io.BufferedIOBase]:
    """A file, unpacked as it is read where its name says that it is packed."""
    if has_ending(path, ".gz"):
        with gzip.open(raw) as plain:
            yield plain
    elif has_ending(path, ".zst"):
        with io.BufferedReader(_Zstandard(raw), 1 << 20) as buffered:
            yield buffered
    else:
        yield raw


class _PackedError(Exception):
    """A packed file is damaged."""


class _Zstandard(io.RawIOBase):
    """A Zstandard file of one frame or several. The library's own stream ends quietly where a file is torn."""

    def __init__(self, raw: io.BufferedIOBase) -> None:
        import zstandard

        self._library, self._raw = zstandard, raw
        self._engine, self._begun, self._rest = zstandard.ZstdDecompressor().decompressobj(), False, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Unpacks as much as fits.

        Raises:
            _PackedError: the file is no such file, or its last frame is not whole.
        """
        while not self._rest:
            data = self._engine.unused_data if self._engine.eof else b""
            if self._engine.eof:
                self._engine, self._begun = self._library.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read(1 << 14)
            if not data:
                if self._begun:
                    raise _PackedError("the last frame is not whole")
                return 0
            self._begun = True
            try:
                self._rest = memoryview(self._engine.decompress(data))
            except self._library.ZstdError as error:
                raise _PackedError(str(error)) from None
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
