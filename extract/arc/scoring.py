"""Answers to scores: exact match of tasks, accuracy of cells, and the file that Kaggle takes."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from actstore.durable import write_durably
from actstore.errors import InputError
from actstore.kvstore import storage_errors
from extract.arc import files
from extract.arc.faults import Fault
from extract.arc.grids import Grid
from extract.arc.parsing import parse_grid
from extract.arc.tasks import Task

ATTEMPTS = 2  # for each test, as ARC allows
NO_GRID: Grid = ((0, 0), (0, 0))  # what Kaggle's sample submission has: a file without a grid would be refused

Predictions: TypeAlias = Mapping[tuple[str, int], Sequence[Grid | None]]
"""Per task and test input up to two attempts in their order; None where an answer gave no grid."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """How well answers fit tasks. A test that was not answered is wrong, and so is its task.

    Attributes:
        tasks: Tasks whose test outputs are all known; all figures but `predictions` and `unparsed` are of these.
        tasks_right: Tasks all of whose tests are right.
        tests: Their tests.
        tests_right: Tests of which an attempt equals the output.
        tests_unanswered: Tests without an attempt.
        pixel_accuracy: Mean over tests of the share of equal cells of the better attempt; 0 where shapes differ.
        predictions: Attempts.
        unparsed: Attempts that gave no grid.
        tasks_unknown: Tasks that are not scored, since an output is not known.
        right: Ids of the tasks that are right.
    """

    tasks: int
    tasks_right: int
    tests: int
    tests_right: int
    tests_unanswered: int
    pixel_accuracy: float
    predictions: int
    unparsed: int
    tasks_unknown: int
    right: tuple[str, ...]


def read_predictions(paths: Sequence[str | Path]) -> dict[tuple[str, int], list[Grid | None]]:
    """Attempts out of files that `actstore generate` wrote from prompts of `write_prompts`.

    Of several files, and of several lines for one test, the first is the first attempt.

    Raises:
        InputError: A line lacks `task_id`, `sample_idx` or `completion`, or a test has more than two attempts.
    """
    found: dict[tuple[str, int], list[Grid | None]] = {}
    files.check_sources(paths)
    for where, value in files.read_rows(paths):
        if isinstance(value, Fault):
            raise InputError(f"{where}: {value}; expected a file of actstore generate; make it again")
        task, sample, text = value.get("task_id"), value.get("sample_idx"), value.get("completion")
        if not isinstance(task, str) or type(sample) is not int or not isinstance(text, str):
            raise InputError(
                f"{where} has fields {sorted(value)}; expected task_id, sample_idx and completion; make prompts with "
                "actstore arc prompts, and answers of these with actstore generate"
            )
        attempts = found.setdefault((task, sample), [])
        if len(attempts) == ATTEMPTS:
            raise InputError(
                f"{where} is one more answer to test {sample} of task {task!r}; expected at most {ATTEMPTS} attempts; "
                "give fewer files"
            )
        attempts.append(parse_grid(text))
    return found


def score(predictions: Predictions, tasks: Iterable[Task], *, submission: str | Path | None = None) -> Scored:
    """Compares attempts with the test outputs of tasks.

    Args:
        predictions: From `read_predictions`.
        tasks: Taken one at a time.
        submission: A `.json` file to write, as Kaggle takes it: for each test of each task `attempt_1` and
            `attempt_2`. A missing second attempt repeats the first; no grid becomes 2 by 2 zeros.

    Raises:
        InputError: Predictions are of other tasks, or something else is at `submission`.
        StorageError: It cannot be written.
    """
    target = None if submission is None else Path(submission)
    if target and target.suffix != ".json":
        raise InputError(f"{target} ends in {target.suffix!r}; expected .json, as Kaggle takes it; rename it")
    left, entries = dict(predictions), list[str]()
    tests: list[tuple[bool, float]] = []
    right: list[str] = []
    known = unknown = unanswered = 0
    for task in tasks:
        attempts = [left.pop((task.id, sample), []) for sample in range(len(task.test))]
        if target:
            entries.append(f"{json.dumps(task.id)}: {json.dumps([_entry(grids) for grids in attempts])}")
        outputs = [pair.output for pair in task.test]
        if None in outputs:
            unknown += 1
            continue
        known += 1
        scores = [_of_test(grids, output or ()) for grids, output in zip(attempts, outputs, strict=True)]
        tests += scores
        unanswered += attempts.count([])
        if all(exact for exact, _ in scores):
            right.append(task.id)
    _refuse_others(left)
    if target:
        _write_submission(target, ("{" + ",\n".join(entries) + "}\n").encode())
    grids = [grid for attempts in predictions.values() for grid in attempts]
    return Scored(
        tasks=known, tasks_right=len(right), tests=len(tests), tests_right=sum(exact for exact, _ in tests),
        tests_unanswered=unanswered, pixel_accuracy=sum(share for _, share in tests) / max(len(tests), 1),
        predictions=len(grids), unparsed=grids.count(None), tasks_unknown=unknown, right=tuple(right),
    )  # fmt: skip


def _of_test(attempts: Sequence[Grid | None], output: Grid) -> tuple[bool, float]:
    """Whether an attempt equals the output, and the share of cells that the better one has right."""
    shares = [_equal_cells(grid, output) for grid in attempts if grid is not None]
    return output in attempts, max(shares, default=0.0)


def _equal_cells(grid: Grid, output: Grid) -> float:
    if (len(grid), len(grid[0])) != (len(output), len(output[0])):
        return 0.0
    rows = zip(grid, output, strict=True)
    return sum(one == other for row, target in rows for one, other in zip(row, target, strict=True)) / (
        len(output) * len(output[0])
    )


def _refuse_others(left: Mapping[tuple[str, int], object]) -> None:
    if left:
        task, sample = next(iter(left))
        raise InputError(
            f"{len(left)} tests that were answered are not among the tasks, the first is test {sample} of {task!r}; "
            "expected the tasks that the prompts were made of; name these"
        )


def _write_submission(path: Path, data: bytes) -> None:
    """Writes the file; what is there stays if it is the same, and is an error if it is not."""
    with storage_errors(f"write {path}"):
        if not path.exists():
            write_durably(path, [memoryview(data)])
        elif path.is_dir() or path.read_bytes() != data:
            raise InputError(f"{path} is there and is something else; expected nothing; choose another name")


def _entry(attempts: Sequence[Grid | None]) -> dict[str, Any]:
    first, second = [*attempts, None, None][:2] if len(attempts) != 1 else [attempts[0]] * 2
    return {"attempt_1": first or NO_GRID, "attempt_2": second or NO_GRID}
