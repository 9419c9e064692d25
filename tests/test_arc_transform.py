"""Rows of examples to ARC tasks: what is written, what is refused, ids, bounded memory, and real kills."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from parts import part_and_all_of

from actstore.errors import InputError, PlanMismatchError, StorageError
from extract import arc

GOOD = [[[[0, 1]], [[1, 0]]], [[[2.0, 3]], [[3, 2]]], [[[4, 5.0]], [[5, 4]]]]
TASK = {
    "train": [{"input": [[0, 1]], "output": [[1, 0]]}, {"input": [[2, 3]], "output": [[3, 2]]}],
    "test": [{"input": [[4, 5]], "output": [[5, 4]]}],
}


def written(path: Path, *rows: object) -> Path:
    """A JSONL file; strings are lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def identifier(row: int, task: object) -> str:
    """What an id is, said again: row and hash of the grids alone."""
    return f"{row:06d}-{hashlib.sha256(json.dumps(task, separators=(',', ':')).encode()).hexdigest()[:8]}"


# --- what is written ---


def test_a_row_becomes_a_task_with_its_columns(tmp_path: Path) -> None:
    columns = {"source": "def main():\n\tpass", "seeds": 3, "score": 0.5, "solved": True}
    dropped = {"list": [1], "none": None, "nan": float("nan"), "object": {}}
    source = written(tmp_path / "rows.jsonl", {"examples": GOOD, **columns, **dropped})
    made = arc.transform_files([source], tmp_path / "tasks.jsonl")
    (line,) = lines_of(tmp_path / "tasks.jsonl")
    assert line == {"id": identifier(0, TASK), "row": 0, **TASK, "columns": columns}
    cells = [cell for pair in line["train"] + line["test"] for grid in pair.values() for row in grid for cell in row]
    assert {type(cell) for cell in cells} == {int}, "2.0 is equal to 2, but is not written as 2"
    assert (made.rows, made.tasks, made.faults, made.before) == (1, 1, {}, False)


def test_several_files_packed_or_not_are_one_source(tmp_path: Path) -> None:
    rows = [{"examples": [*GOOD[: number % 2 + 1], *GOOD]} for number in range(7)]
    whole = written(tmp_path / "whole.jsonl", *rows)
    parts = [written(tmp_path / "a.jsonl.gz", *rows[:3]), written(tmp_path / "b.ndjson", "", *rows[3:], " ")]
    arc.transform_files([whole], tmp_path / "one.jsonl")
    arc.transform_files(parts, tmp_path / "two.jsonl")
    arc.transform_rows(rows, tmp_path / "three.jsonl")
    arc.transform_files([whole], tmp_path / "kaggle.json")
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()
    single = json.loads((tmp_path / "kaggle.json").read_bytes())
    assert single == {it["id"]: {"train": it["train"], "test": it["test"]} for it in lines_of(tmp_path / "one.jsonl")}
    assert list(arc.read_tasks(tmp_path / "one.jsonl")) == list(arc.read_tasks(tmp_path / "kaggle.json"))


def test_every_kind_of_source_gives_the_same_tasks(tmp_path: Path) -> None:
    rows = [{"examples": [*GOOD[: number % 2 + 1], *GOOD], "n": number} for number in range(7)]
    rows = json.loads(json.dumps(rows).replace(".0", ""))  # columns of parquet have one type
    whole = written(tmp_path / "whole.jsonl", *rows)
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(whole.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "a.parquet")
    written(tmp_path / "b.jsonl.gz", *rows[3:])
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    written(tmp_path / "named" / "train.jsonl", *rows)
    sources: dict[str, list[Path | str]] = {
        "lines": [whole], "zst": [tmp_path / "x.jsonl.zst"], "parquet": [tmp_path / "x.parquet"],
        "parts": [tmp_path / "a.parquet", tmp_path / "b.jsonl.gz"], "saved": [tmp_path / "saved"],
        "named": [f"datasets:{tmp_path / 'named'}:train"],
    }  # fmt: skip
    made = {}
    for name, source in sources.items():
        told: list[tuple[int, int | None]] = []
        arc.transform_files(source, tmp_path / f"{name}.out.jsonl", progress=lambda *it, told=told: told.append(it))
        made[name] = (tmp_path / f"{name}.out.jsonl").read_bytes()
        done = [count for count, _ in told]
        assert done == sorted(done)
        assert told[-1] == ((7, None) if name == "named" else (done[-1], done[-1]))
        assert arc.transform_files(source, tmp_path / f"{name}.out.jsonl").before
    arc.transform_rows(dataset, tmp_path / "open.out.jsonl")
    arc.transform_rows(dataset.to_iterable_dataset(), tmp_path / "streamed.out.jsonl")
    made |= {name: (tmp_path / f"{name}.out.jsonl").read_bytes() for name in ("open", "streamed")}
    assert len(lines_of(tmp_path / "lines.out.jsonl")) == 7
    assert {name for name, data in made.items() if data != made["lines"]} == set()
    with pytest.raises(PlanMismatchError, match="files"):
        arc.transform_files(sources["saved"], tmp_path / "parquet.out.jsonl")


def test_arrays_and_tuples_are_grids_too(tmp_path: Path) -> None:
    rows = [{"examples": tuple((np.array(one, np.float32), tuple(map(tuple, other))) for one, other in GOOD)}]
    arc.transform_rows(iter(rows), tmp_path / "tasks.jsonl")
    assert lines_of(tmp_path / "tasks.jsonl")[0] == {"id": identifier(0, TASK), "row": 0, **TASK}


def test_max_samples_reads_no_further(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", *[{"examples": GOOD}] * 2, "broken")
    made = arc.transform_files([source], tmp_path / "tasks.jsonl", max_samples=2)
    assert (made.rows, made.tasks) == (2, 2)


# --- what is refused ---

LARGE = [[0] * 31]
BAD: dict[str, tuple[object, str, str]] = {
    "no examples": ({"example": GOOD, "id": 1}, "no examples", "the row has only ['example', 'id']"),
    "null": ({"examples": None}, "wrong type", "examples is a NoneType"),
    "text": ({"examples": "[]"}, "wrong type", "examples is a str"),
    "one pair": ({"examples": GOOD[:1]}, "too few pairs", "examples has 1 pairs; expected at least 2"),
    "no pairs": ({"examples": []}, "too few pairs", "examples has 0 pairs"),
    "three grids": ({"examples": [GOOD[0], [[[1]]] * 3]}, "wrong type", "a pair is a list of 3"),
    "object": ({"examples": [GOOD[0], {"input": [[1]]}]}, "wrong type", "a pair is a dict"),
    "number as grid": ({"examples": [GOOD[0], [[[1]], 5]]}, "wrong type", "a grid is a int"),
    "number as row": ({"examples": [GOOD[0], [[[1]], [5]]]}, "wrong type", "a row is a int"),
    "text as row": ({"examples": [GOOD[0], [[[1]], ["123"]]]}, "wrong type", "a row is a str"),
    "text cell": ({"examples": [GOOD[0], [[[1]], [["3"]]]]}, "wrong type", "a cell is '3' (str)"),
    "bool cell": ({"examples": [GOOD[0], [[[1]], [[True]]]]}, "wrong type", "a cell is 'True' (bool)"),
    "list cell": ({"examples": [GOOD[0], [[[1]], [[[1]]]]]}, "wrong type", "a cell is '[1]' (list)"),
    "no rows": ({"examples": [GOOD[0], [[[1]], []]]}, "empty grid", "a grid has no rows; expected 1 to 30"),
    "no cells": ({"examples": [GOOD[0], [[[1]], [[]]]]}, "empty grid", "a row has no cells"),
    "wide": ({"examples": [GOOD[0], [[[1]], LARGE]]}, "large grid", "a row has 31 cells; expected 1 to 30"),
    "high": ({"examples": [GOOD[0], [[[1]], [[1]] * 31]]}, "large grid", "a grid has 31 rows"),
    "ragged": ({"examples": [GOOD[0], [[[1]], [[1, 2], [1]]]]}, "ragged grid", "the rows of a grid have 2, 1 cells"),
    "fraction": (
        {"examples": [GOOD[0], [[[1]], [[3.5]]]]},
        "bad cell",
        "a cell is 3.5; expected a whole number 0 to 9",
    ),
    "twelve": ({"examples": [GOOD[0], [[[1]], [[12]]]]}, "bad cell", "a cell is 12"),
    "minus": ({"examples": [GOOD[0], [[[1]], [[-1]]]]}, "bad cell", "a cell is -1"),
    "not a number": ({"examples": [GOOD[0], [[[1]], [[float("nan")]]]]}, "bad cell", "a cell is nan"),
    "infinite": ({"examples": [GOOD[0], [[[1]], [[float("inf")]]]]}, "bad cell", "a cell is inf"),
    "half a line": ('{"examples": [[[[1]], [[', "broken line", "the line is not JSON (Expecting value"),
    "not an object": ("[1]", "broken line", "the line holds a JSON list"),
    "not UTF-8": ('{"examples": "\udcff"}', "broken line", "the line has the byte 0xff at offset 14, which"),
    "deep": ("[" * 100_000, "broken line", "the line is not JSON ("),
    "long": (" " * (16 << 20) + "[1, 2]", "broken line", "the line is longer than 16,777,216 bytes"),
}


@pytest.mark.parametrize(("row", "kind", "found"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_refused_or_left_out(tmp_path: Path, row: object, kind: str, found: str) -> None:
    source = written(tmp_path / "rows.jsonl", {"examples": GOOD}, "", row, {"examples": GOOD[1:]})
    with pytest.raises(InputError) as caught:
        arc.transform_files([source], tmp_path / "tasks.jsonl")
    text = str(caught.value)
    assert text.startswith(f"1 of 3 rows are no tasks (1 {kind}): rows.jsonl:3: {found}"), text
    assert text.endswith("; nothing was written: mend these rows, or leave them out with --on-error skip")
    assert "; expected " in text
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    made = arc.transform_files([source], tmp_path / "tasks.jsonl", on_error="skip")
    assert (made.rows, made.tasks, made.faults) == (3, 2, {kind: 1})
    assert made.first_faults[0].startswith(f"rows.jsonl:3: {found}")
    assert [line["row"] for line in lines_of(tmp_path / "tasks.jsonl")] == [0, 2]
    again = arc.transform_files([source], tmp_path / "tasks.jsonl", on_error="skip")
    assert (again.before, again.rows, again.faults, again.first_faults) == (True, 3, {kind: 1}, made.first_faults)


def test_all_bad_rows_are_counted_before_anything_is_refused(tmp_path: Path) -> None:
    rows = [row for row, _, _ in BAD.values() if not isinstance(row, str)]
    source = written(tmp_path / "rows.jsonl", *rows)
    kinds = r"5 bad cell, 2 empty grid, 2 large grid, 1 no examples, 1 ragged grid, 2 too few pairs, 10 wrong type"
    with pytest.raises(InputError, match=rf"^{len(rows)} of {len(rows)} rows are no tasks \({kinds}\): "):
        arc.transform_files([source], tmp_path / "tasks.jsonl")
    with pytest.raises(InputError, match=r"the source holds no tasks, all were left out \(5 bad cell, .*; \.\.\.; exp"):
        arc.transform_files([source], tmp_path / "tasks.jsonl", on_error="skip")


def damaged_gzip(tmp_path: Path) -> Path:
    path = written(tmp_path / "cut.jsonl.gz", *[{"examples": GOOD, "n": os.urandom(9).hex()} for _ in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    return path


SOURCES: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing": (lambda it: it / "no.jsonl", {}, r"no.jsonl cannot be opened \(No such file or directory\); expected"),
    "other ending": (lambda it: written(it / "x.csv"), {}, r"x.csv is no source of rows by its name; expected .jsonl,"),
    "empty": (lambda it: written(it / "x.jsonl"), {}, r"the source holds no tasks, no rows; expected rows with"),
    "cut": (damaged_gzip, {"on_error": "skip"}, r"cut.jsonl.gz cannot be unpacked to its end \(.*\); expected a"),
    "no gzip": (
        lambda it: written(it / "y.jsonl", {"examples": GOOD}).rename(it / "y.jsonl.gz"), {},
        r"y.jsonl.gz cannot be unpacked to its end \(Not a gzipped file",
    ),
    "no samples": (lambda it: written(it / "x.jsonl"), {"max_samples": 0}, "max_samples is 0; expected at least 1"),
    "policy": (lambda it: written(it / "x.jsonl"), {"on_error": "ignore"}, "on_error is 'ignore'; expected 'error' or"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "options", "message"), SOURCES.values(), ids=SOURCES)
def test_sources_and_options_that_are_refused(
    tmp_path: Path, source: Callable[[Path], Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        arc.transform_files([source(tmp_path)], tmp_path / "tasks.jsonl", **options)
    assert not (tmp_path / "tasks.jsonl").exists()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl", {"examples": GOOD})
    with pytest.raises(InputError, match=r"tasks ends in ''; expected .jsonl, one task per line, or .json"):
        arc.transform_files([source], tmp_path / "tasks")
    with pytest.raises(InputError, match=r"rows.jsonl is there, without rows.jsonl.settings.json"):
        arc.transform_files([source], source)
    arc.transform_files([source], tmp_path / "tasks.jsonl")
    with pytest.raises(InputError, match=r"tasks.jsonl is there; expected nothing; choose another name"):
        arc.transform_rows([{"examples": GOOD}], tmp_path / "tasks.jsonl")
    with pytest.raises(PlanMismatchError, match=r"1 differing fields \(max_samples: there None, here 1\)"):
        arc.transform_files([source], tmp_path / "tasks.jsonl", max_samples=1)
    before = (tmp_path / "tasks.jsonl").read_bytes()
    written(source, {"examples": GOOD[1:]})
    with pytest.raises(PlanMismatchError, match=r"2 differing fields \(files\[0\].bytes: there \d+, here"):
        arc.transform_files([source], tmp_path / "tasks.jsonl")
    assert (tmp_path / "tasks.jsonl").read_bytes() == before


def test_what_rows_raise_is_not_taken_for_an_error_of_the_target(tmp_path: Path) -> None:
    def rows() -> Any:
        yield {"examples": GOOD}
        raise OSError("the hub is away")

    with pytest.raises(OSError, match=r"^the hub is away$") as caught:
        arc.transform_rows(rows(), tmp_path / "tasks.jsonl")
    assert not isinstance(caught.value, StorageError)
    assert list(tmp_path.iterdir()) == []


# --- many rows ---

MOST_MEMORY = 30_000_000  # bytes beside what a file of ten rows takes: a hundredth of the rows as Python holds them
COMMAND = [sys.executable, "-m", "actstore", "arc", "transform"]
# Not `ru_maxrss`: a child begins with that of the process it was forked from.
PEAK = (
    'import re; found = re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read()); '
    "print(1024 * int(found[1]), file=sys.stderr)"
)
MEASURED = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module("actstore", run_name="__main__")
finally:
    {PEAK}
"""


def generate_rows(path: Path, count: int, *, spoiled: Callable[[int], bool] = lambda number: False) -> Path:
    """A file in the shape of the dataset: grids of floats, and text in other columns. Spoiled rows have a cell 12."""
    rng = np.random.default_rng(0)
    shapes, cells = rng.integers(1, 11, (64, 8, 2)), rng.integers(0, 10, (64, 8, 10, 10)).astype(float)
    grids = [[cells[n, k, : shapes[n, k, 0], : shapes[n, k, 1]].tolist() for k in range(8)] for n in range(64)]
    texts = [json.dumps([[it[0], it[1]], [it[2], it[3]], [it[4], it[5]], [it[6], it[7]]]) for it in grids]
    bad = json.dumps([[[[1.0]], [[12.0]]]] * 3)
    with path.open("w") as file:
        for number in range(count):
            examples = bad if spoiled(number) else texts[number % 64]
            note = json.dumps({"source": f"def main(grid): return grid + {number}", "description": "words " * 20})
            file.write(f'{{"examples": {examples}, {note[1:]}\n')
    return path


def measured(source: Path, target: Path) -> tuple[int, dict[str, Any]]:
    """Peak memory of the command in bytes, and what it says."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here: the peak of memory is not measured")
    command = [sys.executable, "-c", MEASURED, "actstore", "arc", "transform", str(source), str(target), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1]), json.loads(done.stdout)


@pytest.mark.slow
@part_and_all_of("count", 20_000, 200_000)
def test_many_rows_take_bounded_memory(tmp_path: Path, count: int) -> None:
    many = generate_rows(tmp_path / "rows.jsonl", count)
    target = tmp_path / "tasks.jsonl"
    few, _ = measured(generate_rows(tmp_path / "few.jsonl", 10), tmp_path / "few_tasks.jsonl")
    peak, summary = measured(many, target)
    size = many.stat().st_size / 1e6
    print(
        f"{count:,} rows, {size:.0f} MB in {summary['seconds']:.0f} s, peak {peak / 1e6:.0f} MB, of ten {few / 1e6:.0f}"
    )
    assert peak - few < MOST_MEMORY
    assert summary["tasks"] == count
    seen = set()
    with target.open() as lines, many.open() as rows:
        for number, (line, row) in enumerate(zip(lines, rows, strict=True)):
            task = json.loads(line)
            assert task["row"] == number
            seen.add(task["id"])
            if number % 1000 == 0:
                assert [[it["input"], it["output"]] for it in task["train"] + task["test"]] == json.loads(row)[
                    "examples"
                ]
    assert len(seen) == count


@pytest.mark.slow
def test_meta_rows_that_are_kept_would_be_found(tmp_path: Path) -> None:
    """The same measure of a program that holds the rows it reads."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here: the peak of memory is not measured")
    program = f"import json, sys\nkept = [json.loads(it) for it, _ in zip(open(sys.argv[1]), range(COUNT))]\n{PEAK}"
    many, peaks = generate_rows(tmp_path / "rows.jsonl", 10_000), []
    for count in (10, 10_000):
        command = [sys.executable, "-c", program.replace("COUNT", str(count)), str(many)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stderr))
    assert peaks[1] - peaks[0] > MOST_MEMORY


@pytest.mark.slow
@part_and_all_of("count", 5_000, 20_000)
def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path, count: int) -> None:
    source = generate_rows(tmp_path / "rows.jsonl", count)
    once, killed = tmp_path / "once.jsonl", tmp_path / "killed.jsonl"
    arc.transform_files([source], once)
    lock = killed.with_name(killed.name + ".__lock")
    for least in (1, 2_000_000):  # at the first bytes, and in the middle
        process = subprocess.Popen([*COMMAND, str(source), str(killed)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not (lock.exists() and lock.stat().st_size >= least):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        assert lock.stat().st_size >= least
        assert not killed.exists()
    subprocess.run([*COMMAND, str(source), str(killed)], check=True, capture_output=True)
    assert killed.read_bytes() == once.read_bytes()
    assert not lock.exists()


@pytest.mark.slow
@part_and_all_of("count", 5_000, 20_000)
def test_ids_stay_when_rows_are_skipped(tmp_path: Path, count: int) -> None:
    whole = generate_rows(tmp_path / "whole.jsonl", count)
    spoiled = generate_rows(tmp_path / "spoiled.jsonl", count, spoiled=lambda number: number % 7 == 3)
    arc.transform_files([whole], tmp_path / "a.jsonl")
    made = arc.transform_files([spoiled], tmp_path / "b.jsonl", on_error="skip")
    expected = [line for number, line in enumerate((tmp_path / "a.jsonl").read_bytes().splitlines()) if number % 7 != 3]
    assert (tmp_path / "b.jsonl").read_bytes().splitlines() == expected
    assert made.faults == {"bad cell": count - len(expected)}
    assert len(made.first_faults) == 5
