"""Hostile stores cost at most 1 GB and 5 s a step, and give a clear error, whatever a user does with them.

The stores are those of `hostile.py`. Each is opened in a child of its own (`hostile_child.py`) whose memory is capped,
which then does all that a user would. A step ends with right values or with one of actstore's errors.
"""

import ast
import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hostile import CASES, Case, make_sound
from hostile_child import CAP_BYTES, UNGUARDED
from kill_points import QUIET

pytestmark = pytest.mark.slow

MOST_BYTES = 1_000_000_000  # resident, with Python and all libraries
MOST_SECONDS = 10.0  # of all processors together, which others may slow down
MOST_LETTERS = 600
PROCESSES = 2
HERE = Path(__file__).parent


class Children:
    """A process that forks a child for every store."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "hostile_child.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | QUIET | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"},
        )  # fmt: skip
        if "ready" not in self._line():
            raise RuntimeError("the children's parent did not start")

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read() if self._process.stderr else ""
        answer: dict[str, Any] = json.loads(line)
        return answer

    def take(self, url: Path, *, without: str | None = None, last: str | None = None) -> list[dict[str, Any]]:
        """All steps of a child with one store; the last one says how it ended, and in which step."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"url": str(url), "without": without, "last": last}) + "\n")
        self._process.stdin.flush()
        taken: list[dict[str, Any]] = []
        begun = "starting"
        while True:
            line = self._line()
            if "end" in line:
                return [*taken, {"end": line["end"], "in": begun}]
            if "begin" in line:
                begun = line["begin"]
            else:
                taken.append(line)

    def close(self) -> None:
        self._process.communicate("")


def problems(case: Case, url: Path, steps: list[dict[str, Any]]) -> list[str]:
    """What a store did that it must not do."""
    *taken, end = steps
    found = [] if end["end"] == "exit 0" else [f"{end['end']} in {end['in']!r}"]
    said = ""
    for step in taken:
        name, message = step["step"], step["message"] or ""
        findings = step["gave"] if isinstance(step["gave"], list) else []
        said += "\n".join([message, *findings, ""])
        if step["error"] and not step["ours"]:
            found.append(f"{name}: {step['error']} is none of ours: {message[:200]!r}")
        for text in [message, *findings]:
            most = MOST_LETTERS if step["error"] != "PlanMismatchError" else 2 * MOST_LETTERS  # shows eight fields
            if len(text) > most or not text.isprintable():
                found.append(f"{name}: not one short line: {len(text)} letters, {text[:200]!r}")
        if step["error"] not in (None, "InputError", "UnknownNameError") and url.name not in message:
            found.append(f"{name}: does not say which store: {message[:200]!r}")
        if step["cpu"] > MOST_SECONDS:
            found.append(f"{name}: took {step['cpu']:.1f} s")
        if step["peak"] > MOST_BYTES:
            found.append(f"{name}: took {step['peak']:,} bytes")
        if any("WRONG VALUES" in text for text in findings) and not case.silent:
            found.append(f"{name}: {findings}")
        if case.names is None and step["reads"] and step["error"] not in (None, "SealedStoreError"):
            found.append(f"{name}: nothing is wrong, but {message[:200]!r}")
    if case.names is not None and case.names not in said:
        found.append(f"nothing names {case.names}")
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def parents() -> Iterator["queue.Queue[Children]"]:
    """Idle parents of children: take one, put it back."""
    idle: queue.Queue[Children] = queue.Queue()
    everyone = [Children() for _ in range(PROCESSES)]
    for each in everyone:
        idle.put(each)
    yield idle
    for each in everyone:
        each.close()


def outcome(
    case: Case, folder: Path, sound: dict[str, Path], parents: "queue.Queue[Children]", **changes: str
) -> tuple[Path, list[dict[str, Any]]]:
    """Makes a hostile store, and what all steps with it came to. `changes` are those of `Children.take`."""
    url = folder / "run.acts.zarr"
    folder.mkdir(parents=True)
    shutil.copytree(sound[case.base], url)
    precious = folder / "precious"
    precious.write_text("the user's")
    case.make(url)
    parent = parents.get()
    try:
        steps = parent.take(url, **changes)
        if precious.read_text() != "the user's":
            steps[-1]["end"] = "wrote to a file outside the store"
        return url, steps
    finally:
        parents.put(parent)
        subprocess.run(["rm", "-rf", str(folder)], check=True)  # folders too deep for Python


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    sound: dict[str, Path],
    parents: "queue.Queue[Children]",
) -> Iterator[dict[str, tuple[Path, list[dict[str, Any]]]]]:
    """What every chosen case came to, two at a time; then the figures of the worst."""
    chosen = [item.callspec.params["name"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_a_hostile_store_is_cheap_and_refused"]  # fmt: skip
    folder = tmp_path_factory.mktemp("hostile")
    with ThreadPoolExecutor(PROCESSES) as pool:
        results = pool.map(
            lambda pair: outcome(CASES[pair[1]], folder / str(pair[0]), sound, parents), enumerate(chosen)
        )
        found = dict(zip(chosen, results, strict=True))
    yield found
    steps = [(name, step) for name, (_, taken) in found.items() for step in taken if "step" in step]
    print(f"\n{len(found)} hostile stores, {len(steps):,} steps")
    for what, unit, scale in [("peak", "MB", 1e6), ("cpu", "s", 1)]:
        for name, step in sorted(steps, key=lambda pair: -pair[1][what])[:5]:
            print(f"{step[what] / scale:8.2f} {unit} in {step['step']!r} of {name}")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_store_is_cheap_and_refused(
    name: str, outcomes: dict[str, tuple[Path, list[dict[str, Any]]]]
) -> None:
    url, steps = outcomes[name]
    assert not problems(CASES[name], url, steps), "\n".join(problems(CASES[name], url, steps))


def test_there_are_enough_hostile_stores() -> None:
    assert len(CASES) >= 50


def test_a_sound_store_passes(tmp_path: Path, sound: dict[str, Path], parents: "queue.Queue[Children]") -> None:
    """Every step of the children does something: none of them fails by itself."""
    for base in ("complete", "plain", "zstd"):
        case = Case(lambda url: None, None, base)
        url, steps = outcome(case, tmp_path / base, sound, parents)
        assert not problems(case, url, steps)
        assert {step["step"] for step in steps if step.get("error")} == {"continue", "repair", "continue the repaired"}
        print(f"{base}: {max(step['peak'] for step in steps[:-1]) / 1e6:.0f} MB with a sound store, cap {CAP_BYTES:,}")


# The guards are what makes the difference: without one, the same store does harm, and the judge sees it


HARM = {
    "size of documents": ("marker: 1 GiB sparse", "took", "verify fast"),
    "values of documents": ("plan: 16 MiB of tiny objects", "took", "open"),
    "length of messages": ("plan: site name, a megabyte", "not one short line", "open"),
    "size of objects": ("shard: a terabyte, sparse", "signal", "verify full"),
    "chunks of a window": ("huge: the largest blocks, one value wide", "MemoryError is none of ours", "batches 0"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("guard", UNGUARDED)
def test_without_a_guard_the_harm_would_be_seen(
    guard: str, tmp_path: Path, sound: dict[str, Path], parents: "queue.Queue[Children]"
) -> None:
    name, harm, last = HARM[guard]
    url, steps = outcome(CASES[name], tmp_path / "x", sound, parents, without=guard, last=last)
    assert harm in "\n".join(problems(CASES[name], url, steps))


# No pickle, and no code out of a store


RUNS_CODE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "pickletools", "shelve", "eval", "exec", "compile"}
SOURCES = [path for package in ("actstore", "extract") for path in sorted((HERE.parent / package).rglob("*.py"))]


def run_code(source: str) -> set[str]:
    """What a module uses that could run code out of a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {name.partition(".")[0] for name in names} & RUNS_CODE
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= {called} & (RUNS_CODE | {"torch.load"})
            found |= {word.arg for word in node.keywords if word.arg in ("allow_pickle", "trust_remote_code")}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_unpickles(path: Path) -> None:
    assert not run_code(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "def f():\n    import dill.source", "eval('1')", "torch.load(path)",
     "np.load(path, allow_pickle=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_unpickling_would_be_seen(source: str) -> None:
    assert run_code(source)
