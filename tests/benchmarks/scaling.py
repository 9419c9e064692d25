"""Two workers, each on a core of its own, beside one worker on one core; and forward passes alone on the same cores.

Each worker is a process that is pinned before it imports anything. When its first pass is done, which was compiled, it
waits for the others: from there until all have ended is measured, sealing included. On a machine that others use the
seconds say little: the same quotient is also given by core-seconds, as if both had a core for themselves.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOKENS = 24576
CONTEXT, BATCH, BLOCK_SAMPLES = 128, 2, 1024  # 24 blocks: as many for each of two; small ones cost more than usual


def measure(folder: Path, *, model: str, repeats: int) -> dict[str, object]:
    """Tokens per second of one and of two pinned workers, in turns; the medians, and that of their quotient."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        print(f"scaling        NOT MEASURED: this process may use {len(cores)} cores that it can name, 2 are needed")
        return {}
    rates: dict[str, list[float]] = {f"{what}, {count}": [] for what in ("forward", "run") for count in (1, 2)}
    by_core: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(repeats):
        for what in ("forward", "run"):
            for count in (1, 2):
                found = _rates(folder, model, what, cores[:count])
                rates[f"{what}, {count}"].append(found[0])
                by_core[f"{what}, {count}"].append(found[1])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"scaling        {name + (' core' if name.endswith('1') else ' cores'):<22} {value:>9,.1f} tokens/s")
    gains = {what: _gain(rates, what) for what in ("forward", "run")}
    gain_by_core = {what: _gain(by_core, what) for what in ("forward", "run")}
    print(f"scaling        2 workers are {gains['run']:.2f} times as fast as 1, passes alone {gains['forward']:.2f}")
    print(f"scaling        by core-seconds {gain_by_core['run']:.2f}, passes alone {gain_by_core['forward']:.2f}")
    figures = {name: round(value, 1) for name, value in medians.items()}
    return {
        "scaling": figures | {
            "gain": round(gains["run"], 3), "gain_of_forward": round(gains["forward"], 3),
            "gain_by_core_seconds": round(gain_by_core["run"], 3),
            "gain_of_forward_by_core_seconds": round(gain_by_core["forward"], 3),
        }
    }  # fmt: skip


def _gain(rates: dict[str, list[float]], what: str) -> float:
    """How many times as fast two are as one: the median over the turns."""
    pairs = zip(rates[f"{what}, 1"], rates[f"{what}, 2"], strict=True)
    return statistics.median(two / one for one, two in pairs)


def _rates(folder: Path, model: str, what: str, cores: list[int]) -> tuple[float, float]:
    """Tokens per second of as many workers as cores, from when all have compiled until the last has ended.

    And what that would be if every core-second of theirs were a second, and all had as much to do.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", __spec__.name, what, place, model, str(rank), *map(str, cores)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(len(cores))
        ]  # fmt: skip
        said = [process.communicate() for process in started]
        for process, (_, errors) in zip(started, said, strict=True):
            if process.returncode:
                raise RuntimeError(errors)
    found: list[dict[str, float]] = [json.loads(out.splitlines()[-1]) for out, _ in said]
    samples = sum(each["samples"] for each in found)
    seconds = max(each["ended"] for each in found) - max(each["began"] for each in found)
    return samples / seconds, samples * len(cores) / sum(each["core_seconds"] for each in found)


def _work(what: str, place: Path, model: str, rank: int, cores: list[int]) -> dict[str, float]:
    """One worker's part, in its process."""
    os.sched_setaffinity(0, {cores[rank]})
    from extract.demo.path import choose_documents
    from extract.division import share
    from extract.loop import run
    from extract.named import model_folder
    from extract.planning import make_plan
    from extract.ranks import Rank
    from extract.sources import open_documents
    from extract.steps import forward_steps

    documents = choose_documents(open_documents("python-docs"), TOKENS)
    sizes: dict[str, Any] = {"context": CONTEXT, "batch": BATCH, "block_samples": BLOCK_SAMPLES}
    plan = make_plan(model_folder(model), documents, **sizes)
    begun: list[tuple[float, float, int]] = []

    def note(samples: int) -> None:
        if not begun and samples:
            (place / f"ready-{rank}").touch()
            while len(list(place.glob("ready-*"))) < len(cores):
                time.sleep(0.001)
            begun.append((time.monotonic(), time.process_time(), samples))

    samples = 0
    if what == "run":
        url = place / "x.acts.zarr"
        state = run(plan, str(url), rank=Rank(rank, len(cores)), progress=lambda state: note(state.samples_computed))
        samples = state.samples_computed
    else:
        passes = set[int]()  # one that two blocks need is computed once, and comes twice
        for step in forward_steps(plan, share(plan.store.blocks, rank, len(cores))):
            if step is not None and step.first not in passes:
                passes.add(step.first)
                samples += len(step.contexts.documents)
            note(samples)
    began, core_seconds, before = begun[0]
    return {
        "samples": samples - before, "began": began, "ended": time.monotonic(),
        "core_seconds": time.process_time() - core_seconds,
    }  # fmt: skip


if __name__ == "__main__":
    _what, _place, _model, _rank, *_cores = sys.argv[1:]
    print(json.dumps(_work(_what, Path(_place), _model, int(_rank), [int(core) for core in _cores])))
