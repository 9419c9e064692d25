"""Extraction with writing beside the same forward passes without it."""

import statistics
import time
from pathlib import Path

from extract.demo.path import choose_documents
from extract.loop import Progress, run
from extract.named import model_folder
from extract.plan import ExtractPlan
from extract.planning import make_plan
from extract.sources import open_documents
from extract.steps import forward_steps
from tests.benchmarks.timing import remove

TOKENS = 12_000
BLOCK_SAMPLES = 2048


def measure(folder: Path, *, model: str, repeats: int) -> dict[str, object]:
    """Tokens per second with and without writing, in turns; the first step of a turn, which compiles, is left out."""
    documents = choose_documents(open_documents("python-docs"), TOKENS)
    plan = make_plan(model_folder(model), documents, block_samples=BLOCK_SAMPLES)
    rates: dict[str, list[float]] = {"without writing": [], "with writing": []}
    for _ in range(repeats):
        rates["without writing"].append(forward_alone(plan))
        rates["with writing"].append(with_writing(plan, folder / "extract.acts.zarr"))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"extraction     {name:<22} {value:>9,.1f} tokens/s  ({plan.model.name})")
    cost = 1 - _quotient(rates)
    print(f"extraction     cost of writing        {cost:>9.1%}, at most 3 % is wanted")
    return {
        "extraction": {name: round(value, 1) for name, value in medians.items()}
        | {"model": plan.model.name, "tokens": plan.store.layout.samples, "cost_of_writing": round(cost, 4)}
    }  # fmt: skip


def _quotient(rates: dict[str, list[float]]) -> float:
    """With writing, as a part of without: the median over the turns."""
    pairs = zip(rates["with writing"], rates["without writing"], strict=True)
    return statistics.median(one / other for one, other in pairs)


def forward_alone(plan: ExtractPlan) -> float:
    """Tokens per second of the forward passes, rows brought to the host and dropped."""
    first, samples, passes = 0.0, 0, set[int]()
    for step in forward_steps(plan, plan.store.blocks):
        if step is None or step.first in passes:  # a pass that two blocks need is computed once, and comes twice
            continue
        if passes:
            samples += len(step.contexts.documents)
        else:
            first = time.perf_counter()
        passes.add(step.first)
    return samples / (time.perf_counter() - first)


def with_writing(plan: ExtractPlan, url: Path) -> float:
    """Tokens per second of a whole run, until the store is sealed and durable."""
    first: list[tuple[float, int]] = []

    def note(state: Progress) -> None:
        if not first:
            first.append((time.perf_counter(), state.samples_computed))

    state = run(plan, str(url), progress=note)
    (started, before) = first[0]
    rate = (state.samples_computed - before) / (time.perf_counter() - started)
    remove(url)
    return rate
