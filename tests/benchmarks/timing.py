"""Timing shared by the benchmarks."""

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def median_seconds(
    ways: dict[str, Callable[[], None]], *, repeats: int, after: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Median seconds of each way, taken turn by turn. One round before is not counted, nor is `after(name)`."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            if after:
                after(name)
    return {name: statistics.median(values) for name, values in seconds.items()}


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
