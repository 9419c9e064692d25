"""Rows of examples to ARC tasks: one pass, in bounded memory, into a file that is there whole or not at all.

The file is JSON lines, one task per line, or a single JSON object {id: task}, by its ending. It is never a folder:
200,000 small files are slow to write, list and copy, and no folder is there whole or not at all.
"""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from extract.arc import files
from extract.arc.faults import Counts, Fault, OnError, check_choice
from extract.arc.tasks import Task, task_of_examples
from extract.gathering import check_place, made_before, write_whole

FIELD = "examples"
_ROWS_BETWEEN = 1000  # progress is told this often


@dataclasses.dataclass(frozen=True)
class Transformed:
    """What one pass over a source made.

    Attributes:
        rows: Rows read.
        tasks: Tasks written.
        faults: How many rows were left out, by kind.
        first_faults: The first few of them, with file and line.
        before: The file was there already; the figures are those of its making.
        seconds: Of this call.
    """

    rows: int
    tasks: int
    faults: Mapping[str, int]
    first_faults: tuple[str, ...]
    before: bool
    seconds: float


def transform_files(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    max_samples: int | None = None,
    on_error: OnError = "error",
    progress: files.Told | None = None,
) -> Transformed:
    """Makes ARC tasks of files or datasets whose rows have `examples`: a list of [input grid, output grid].

    The last pair of a row becomes the test of its task and keeps its output. Other fields that are numbers, strings or
    booleans are kept under `columns`. Run again, a finished file is left alone; killed, the same call begins again and
    makes the same bytes. One row is in memory at a time; the files are read twice, once for their SHA-256.

    Args:
        sources: JSONL files, `.gz` and `.zst` too, parquet files, folders that the `datasets` library saved, or
            `datasets:NAME:SPLIT`, which it streams. Rows are numbered over all of them in this order, which ids depend
            on.
        output: A `.jsonl` file, one task per line, or `.json`, one object {id: task} as Kaggle has it, without columns.
        max_samples: Write this many tasks and no more; what follows is neither read nor checked.
        on_error: "error" counts all rows that are no tasks and writes nothing; "skip" leaves them out. Ids of the
            others are the same.
        progress: Called with (bytes read, bytes in all); with (rows read, None) where a source is streamed.

    Raises:
        InputError: Rows are no tasks, or there is none, or a source cannot be read.
        PlanMismatchError: The output was made of other files or with other settings.
        StorageError: It cannot be written.
    """
    files.check_sources(sources)
    target = _target(output, max_samples, on_error)
    settings = {"files": files.fingerprint(sources), "max_samples": max_samples, "on_error": on_error}
    rows = files.read_rows(sources, progress=progress)
    return _transform(rows, target, settings, max_samples, on_error)


def transform_rows(
    rows: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    max_samples: int | None = None,
    on_error: OnError = "error",
    progress: files.Told | None = None,
) -> Transformed:
    """Makes ARC tasks of any rows, such as those of a `datasets` object: see `transform_files`.

    Rows cannot be compared with those that a file was made of. A file that is there is therefore refused.

    Args:
        rows: Mappings with `examples`, taken one at a time.
        output: As in `transform_files`.
        max_samples: As in `transform_files`.
        on_error: As in `transform_files`.
        progress: Called with (rows read, rows in all, or None where `rows` has no length).

    Raises:
        InputError: As in `transform_files`, and where `output` is there.
        StorageError: It cannot be written.
    """
    target = _target(output, max_samples, on_error)
    if target.exists():
        raise InputError(f"{target} is there; expected nothing; choose another name, or move the file away")
    count = len(rows) if isinstance(rows, Sized) else None

    def numbered() -> Iterator[tuple[str, object]]:
        for number, row in enumerate(rows):
            if progress and number % _ROWS_BETWEEN == 0:
                progress(number, count)
            yield f"row {number}", row

    settings = {"files": None, "max_samples": max_samples, "on_error": on_error}
    return _transform(numbered(), target, settings, max_samples, on_error)


def _target(output: str | Path, max_samples: int | None, on_error: OnError) -> Path:
    """The output, once everything that is asked for has been checked."""
    target = Path(output)
    if target.suffix not in (".jsonl", ".json"):
        raise InputError(
            f"{target} ends in {target.suffix!r}; expected .jsonl, one task per line, or .json, one object; rename it"
        )
    check_choice(max_samples, "max_samples", on_error)
    check_place(target)
    return target


def _transform(
    rows: Iterable[tuple[str, object]],
    target: Path,
    settings: Mapping[str, Any],
    max_samples: int | None,
    on_error: OnError,
) -> Transformed:
    started, counts = time.perf_counter(), Counts()
    found = made_before(target, settings)
    if found is None:
        write_whole(target, settings, _pieces(rows, target, counts, max_samples, on_error), counts.as_json)
    known = found or counts.as_json()
    return Transformed(
        known.get("rows", 0), known.get("tasks", 0), known.get("faults", {}), tuple(known.get("first_faults", ())),
        before=found is not None, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _pieces(
    rows: Iterable[tuple[str, object]], target: Path, counts: Counts, max_samples: int | None, on_error: OnError
) -> Iterator[bytes]:
    """The bytes of the file. After a fault that is not to be skipped, rows are only counted."""
    single = target.suffix == ".json"
    for row, (where, value) in enumerate(rows):
        counts.rows += 1
        try:
            task, columns = _task(row, value)
        except Fault as fault:
            counts.fault(where, fault)
            continue
        counts.tasks += 1
        if on_error == "skip" or not counts.faults:
            yield (b"{" if counts.tasks == 1 else b",\n") + _entry(task) if single else _line(task, row, columns)
        if counts.tasks == max_samples:
            break
    if counts.faults and on_error == "error":
        raise InputError(
            f"{counts.faults.total()} of {counts.rows} rows are no tasks ({counts.listed()}): "
            f"{counts.shown()}; nothing was written: mend these rows, or leave them out with --on-error skip"
        )
    if not counts.tasks:
        reason = f"all were left out ({counts.listed()}): {counts.shown()}" if counts.rows else "no rows"
        raise InputError(f"the source holds no tasks, {reason}; expected rows with {FIELD}; check the source")
    if single:
        yield b"}\n"


def _task(row: int, value: object) -> tuple[Task, dict[str, Any]]:
    """A task, and the columns of its row.

    Raises:
        Fault: the row is none.
    """
    if isinstance(value, Fault):
        raise value
    if not isinstance(value, Mapping):
        raise Fault("wrong type", f"the row is a {type(value).__name__}", f"an object with {FIELD}")
    if FIELD not in value:
        raise Fault("no examples", f"the row has only {sorted(map(str, value))[:6]}", f"a field {FIELD}")
    columns = {str(name): item for name, item in value.items() if name != FIELD and _is_scalar(item)}
    return task_of_examples(row, value[FIELD]), columns


def _is_scalar(value: object) -> bool:
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _line(task: Task, row: int, columns: Mapping[str, Any]) -> bytes:
    line = {"id": task.id, "row": row, **task.as_json()} | ({"columns": columns} if columns else {})
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _entry(task: Task) -> bytes:
    return f"{json.dumps(task.id)}:{json.dumps(task.as_json(), separators=(',', ':'))}".encode()
