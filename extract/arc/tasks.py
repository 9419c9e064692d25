"""ARC tasks: pairs of grids to learn from, and test inputs with their outputs where these are known."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from extract.arc.faults import Fault
from extract.arc.grids import Grid, grid_of

LEAST_PAIRS = 2  # one to learn from and one to test


@dataclasses.dataclass(frozen=True)
class Pair:
    """An input grid and its output; None where a test output is not known."""

    input: Grid
    output: Grid | None

    def as_json(self) -> dict[str, Grid]:
        """As it stands in ARC JSON."""
        return {"input": self.input} | ({} if self.output is None else {"output": self.output})


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. All train outputs are known.

    Attributes:
        id: Unique among the tasks of a source.
        train: At least one pair.
        test: At least one pair.
    """

    id: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def as_json(self) -> dict[str, list[dict[str, Grid]]]:
        """ARC JSON: the object that stands in a file of its own in the official layout."""
        return {"train": [pair.as_json() for pair in self.train], "test": [pair.as_json() for pair in self.test]}


def task_of_examples(row: int, examples: object) -> Task:
    """A task out of a list of [input grid, output grid]; the last pair becomes the test, with its output.

    The id is the row's number in its source, from 0, and 8 hexadecimal digits of the SHA-256 of the grids: the same
    whatever other rows there are, and whether cells are written as 3 or 3.0.

    Raises:
        Fault: They are no such list, or fewer than two pairs.
    """
    if not isinstance(examples, list | tuple):
        raise Fault("wrong type", f"examples is a {type(examples).__name__}", "a list of [input grid, output grid]")
    if len(examples) < LEAST_PAIRS:
        raise Fault("too few pairs", f"examples has {len(examples)} pairs", "at least 2: the last one is the test")
    pairs = []
    for pair in examples:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            size = f" of {len(pair)}" if isinstance(pair, list | tuple) else ""
            raise Fault("wrong type", f"a pair is a {type(pair).__name__}{size}", "[input grid, output grid]")
        pairs.append(Pair(grid_of(pair[0]), grid_of(pair[1])))
    task = Task("", tuple(pairs[:-1]), tuple(pairs[-1:]))
    digest = hashlib.sha256(json.dumps(task.as_json(), separators=(",", ":")).encode()).hexdigest()
    return dataclasses.replace(task, id=f"{row:06d}-{digest[:8]}")


def task_of_json(identifier: object, value: object) -> Task:
    """A task out of ARC JSON: an object with `train` and `test`, lists of objects with `input` and `output`.

    A test may lack its output. Other fields are passed over.

    Raises:
        Fault: It is no such object, or the id is no text.
    """
    if not isinstance(identifier, str) or not identifier.strip() or not identifier.isprintable():
        raise Fault("wrong type", f"the id is {str(identifier)[:40]!r}", "a string of visible characters")
    if not isinstance(value, Mapping) or not {"train", "test"} <= value.keys():
        found = f"fields {sorted(map(str, value))[:6]}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise Fault("wrong type", f"a task is {found}", "an object with train and test")
    return Task(identifier, _pairs(value, "train"), _pairs(value, "test"))


def _pairs(task: Mapping[str, Any], part: str) -> tuple[Pair, ...]:
    pairs = task[part]
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, Mapping) for pair in pairs):
        raise Fault("wrong type", f"{part} is no list of objects", "a list of objects with input and output")
    if not pairs:
        raise Fault("too few pairs", f"{part} is empty", "at least one pair")
    for pair in pairs:
        if "input" not in pair or (part == "train" and pair.get("output") is None):
            raise Fault("wrong type", f"a pair of {part} has fields {sorted(map(str, pair))}", "input and output")
    return tuple(
        Pair(grid_of(pair["input"]), None if pair.get("output") is None else grid_of(pair["output"])) for pair in pairs
    )
