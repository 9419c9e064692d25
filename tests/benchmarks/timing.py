"""Timing shared by the benchmarks."""

import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def median_seconds(
    ways: dict[str, Callable[[], None]], *, repeats: int, after: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Median seconds of each way, taken turn by turn. One round before is not counted, nor is `after(name)`.

    The order differs from turn to turn: what a way leaves behind, such as memory given back, comes after each other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name in random.Random(turn).sample(list(ways), len(ways)):
            started = time.perf_counter()
            ways[name]()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            if after:
                after(name)
    return {name: statistics.median(values) for name, values in seconds.items()}


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
