"""JSON-lines files as objects: line by line, `.gz` too, in bounded memory, with what is wrong beside what is right."""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from actstore.errors import InputError
from extract.arc.faults import Fault
from extract.documents import JSONL_ENDINGS

ENDINGS = (*JSONL_ENDINGS, *(f"{ending}.gz" for ending in JSONL_ENDINGS))
LINE_BYTES = 16 << 20  # a thousand times the largest row of grids that we know; a longer line is not held
_LINES_BETWEEN = 256  # progress is told this often

Told = Callable[[int, int], None]


def is_lines(path: Path) -> bool:
    """Whether the name says JSON lines."""
    return path.name.endswith(ENDINGS)


def read_objects(
    paths: Sequence[Path], *, progress: Told | None = None
) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Yields (file:line, object) for each line of some files, or what is wrong with the line. Blank lines are no lines.

    Args:
        paths: The files, in UTF-8, one after the other.
        progress: Called with (bytes read, bytes in all), of compressed files compressed.

    Raises:
        InputError: While iterating: a file cannot be opened, or its compression is damaged, after which nothing of it
            can be read.
    """
    total, before = sum(_size(path) for path in paths), 0
    for path in paths:
        with opened(path) as raw:
            for number, line in enumerate(_lines(path, raw), start=1):
                if progress and number % _LINES_BETWEEN == 1:
                    progress(before + raw.tell(), total)
                if line is None or line.strip():
                    yield f"{path.name}:{number}", _object(line)
            before += raw.tell()
    if progress:
        progress(before, total)


def fingerprint(paths: Sequence[Path]) -> list[dict[str, object]]:
    """Name, size and SHA-256 of some files: what they were when something was made of them."""
    found = []
    for path in paths:
        with opened(path) as file:
            digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
        found.append({"name": path.name, "bytes": _size(path), "sha256": digest})
    return found


def opened(path: Path) -> BinaryIO:
    """An open file.

    Raises:
        InputError: It cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"{path} cannot be opened ({error.strerror}); expected a readable file; check the path and its permissions"
        ) from error


def _size(path: Path) -> int:
    with opened(path) as file:
        return file.seek(0, 2)


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long to be held."""
    file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
    try:
        while line := file.readline(LINE_BYTES + 1):
            whole = len(line) <= LINE_BYTES
            while len(line) > LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES + 1)
            yield line if whole else None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read to its end ({error}); expected a whole file; fetch or make it again"
        ) from error


def _object(line: bytes | None) -> dict[str, Any] | Fault:
    expected = "one JSON object on each line, in UTF-8"
    if line is None:
        return Fault("broken line", f"the line is longer than {LINE_BYTES:,} bytes", expected)
    try:
        value = json.loads(line.decode().removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return Fault("broken line", f"the line is not JSON ({str(error)[:80]})", expected)
    if not isinstance(value, dict):
        return Fault("broken line", f"the line holds a JSON {type(value).__name__}", expected)
    return value
