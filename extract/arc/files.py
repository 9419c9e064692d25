"""Files and datasets of rows for ARC: one at a time, what is wrong beside what is right; and what files were."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from extract import lines, records
from extract.arc.faults import Fault
from extract.lines import Broken, has_ending, opened
from extract.records import DATASETS, is_saved

ENDINGS = (*lines.LINES_ENDINGS, records.PARQUET_ENDING)
LINE_BYTES = 16 << 20  # a thousand times the largest row of grids that we know; a longer line is not held
_ROWS_BETWEEN = 256  # of a dataset: progress is told this often

Told = Callable[[int, int | None], None]
Row = tuple[str, Mapping[str, Any] | Fault]


def is_lines(path: Path) -> bool:
    """Whether the name says JSON lines."""
    return has_ending(path, *lines.LINES_ENDINGS)


def is_stream(source: str | Path) -> bool:
    """Whether a source is a dataset by its name, of which nobody knows the size."""
    return str(source).startswith(DATASETS)


def check_sources(sources: Sequence[str | Path]) -> None:
    """Refuses what is no source of rows by its name.

    Raises:
        InputError: names the first.
    """
    for source in sources:
        if not is_stream(source) and not has_ending(Path(source), *ENDINGS) and not is_saved(Path(source)):
            raise InputError(
                f"{source} is no source of rows by its name; expected {', '.join(ENDINGS)}, a folder that the datasets "
                f"library saved, or {DATASETS}NAME:SPLIT; name one of these"
            )


def read_rows(sources: Sequence[str | Path], *, progress: Told | None = None) -> Iterator[Row]:
    """Yields (where it stands, row) of some sources, one after the other, or what is wrong with the row.

    Args:
        sources: JSONL files, `.gz` and `.zst` too, parquet files, folders of the `datasets` library, or names of
            datasets, which that library streams.
        progress: Called with (bytes read, bytes in all), of compressed files compressed; with (rows, None) where one of
            the sources is a stream.

    Raises:
        InputError: While iterating: a source cannot be opened, or is damaged, after which nothing of it can be read.
    """
    sizes = [sum(map(_size, _files(source))) for source in sources]
    total = None if any(map(is_stream, sources)) else sum(sizes)
    done = count = 0

    def told(share: float) -> None:
        if progress and total is not None:
            progress(done + round(share * size), total)

    for source, size in zip(sources, sizes, strict=True):
        for where, record in _read(source, told):
            count += 1
            if progress and total is None and count % _ROWS_BETWEEN == 1:
                progress(count, None)
            yield where, _fault(record) if isinstance(record, Broken) else record
        done += size
    if progress:
        progress(count if total is None else done, total)


def fingerprint(sources: Sequence[str | Path]) -> list[dict[str, object]]:
    """Name, size and SHA-256 of some files: what they were when something was made of them.

    Of a dataset that is streamed there is only the name: another dataset of that name is not noticed.
    """
    found: list[dict[str, object]] = []
    for source in sources:
        if is_stream(source):
            found.append({"name": records.stream_name(str(source))})
        for path in _files(source):
            with opened(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found.append({"name": path.name, "bytes": _size(path), "sha256": digest})
    return found


def _files(source: str | Path) -> list[Path]:
    if is_stream(source):
        return []
    path = Path(source)
    return sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]


def _read(source: str | Path, told: lines.Share) -> Iterator[lines.Found]:
    path = Path(source)
    if is_stream(source):
        name, rows, count = records.stream_name(str(source)), records.open_stream(str(source)), 0
    elif path.is_dir():
        rows = records.open_saved(path)
        name, count = path.name, len(rows)
    elif is_lines(path):
        yield from lines.read_lines(path, progress=told, most_bytes=LINE_BYTES)
        return
    else:
        yield from records.read_parquet(path, progress=told)
        return
    for number, row in enumerate(rows):
        if count and number % _ROWS_BETWEEN == 0:
            told(number / count)
        yield f"{name}:{number}", row


def _size(path: Path) -> int:
    with opened(path) as file:
        return file.seek(0, 2)


def _fault(broken: Broken) -> Fault:
    return Fault("broken line", f"the line {broken.found}", "one JSON object on each line, in UTF-8")
