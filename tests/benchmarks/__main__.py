"""`make bench`: every figure beside a physical limit, measured in the same run. One JSON line comes last.

Everything is repeated, turn by turn so that a noisy moment hits both sides, and the median is reported.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

from tests.benchmarks import (
    accelerator,
    buckets,
    capture,
    extraction,
    growth,
    loading,
    notebooks,
    reading,
    scale,
    scaling,
    slow_storage,
    writing,
)


def main() -> None:
    """Runs the benchmarks and prints their figures."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement; the median is reported")
    parser.add_argument(
        "--model", default="smollm2", help="as in `actstore extract`; smollm2 or tiny-qwen2 or a folder"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default a temporary folder")
    options = parser.parse_args()
    figures: dict[str, object] = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "repeats": options.repeats,
    }
    with tempfile.TemporaryDirectory(prefix="actstore-bench-", dir=options.folder) as name:
        figures |= writing.measure(Path(name), repeats=options.repeats)
        figures |= loading.measure(Path(name), repeats=options.repeats)
        figures |= notebooks.measure(Path(name), repeats=options.repeats)
        figures |= buckets.measure(repeats=options.repeats)
        figures |= scale.measure(Path(name), repeats=options.repeats)
        figures |= growth.measure(Path(name), repeats=options.repeats)
        figures |= reading.measure(Path(name), repeats=options.repeats, documents=10_000_000)
        figures |= capture.measure(Path(name), model=options.model, repeats=options.repeats)
        figures |= accelerator.measure(Path(name), repeats=options.repeats)
        figures |= extraction.measure(Path(name), model=options.model, repeats=options.repeats)
        figures |= scaling.measure(Path(name), model=options.model, repeats=options.repeats)
        figures |= slow_storage.measure(Path(name))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
