"""What a whole run holds in memory, as the system counts it, beside what it announces."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, re, sys
from pathlib import Path

import extract
from extract.named import model_folder

folder, block_samples, keep = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "keep"
documents = extract.open_documents("python-docs", limit=100)
settings = dict(context=128, batch=8, dtype="float32", block_samples=block_samples, layers=[0, 1, 2, 3])
sites = ["resid_post", "resid_mid", "attn_out", "mlp_out"]
plan = extract.make_plan(model_folder("tiny-qwen2"), documents, sites=sites, **settings)
layout = plan.store.layout
kept = []


def show(state):
    if keep:
        kept.append(bytearray(b"x") * (layout.block_bytes // 64))


state = extract.run(plan, str(folder / f"{block_samples}.acts.zarr"), progress=show)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
found = {"announced": layout.memory_bytes, "peak": peak, "blocks": layout.blocks, "block": layout.block_bytes}
print(json.dumps(found))
"""


def measured(folder: Path, block_samples: int, keep: str = "drop") -> dict[str, int]:
    if not Path("/proc/self/status").exists():
        pytest.skip("NOT MEASURED: no /proc/self/status here, which knows the peak of memory")
    command = [sys.executable, "-c", RUN, str(folder), str(block_samples), keep]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def growth(smaller: dict[str, int], larger: dict[str, int]) -> float:
    """How much the peak grows for each announced byte. Libraries, programs and rows on their way are in both alike."""
    return (larger["peak"] - smaller["peak"]) / (larger["announced"] - smaller["announced"])


def test_a_run_holds_what_it_announces(tmp_path: Path) -> None:
    smaller, larger = measured(tmp_path, 8192), measured(tmp_path, 24576)
    for found in (smaller, larger):
        assert found["announced"] == 3 * found["block"]
        assert found["blocks"] > 6, "more than twice what may be held"
    assert 0.5 < growth(smaller, larger) < 1.25, (smaller, larger)


@pytest.mark.long
def test_meta_blocks_that_are_kept_would_be_found(tmp_path: Path) -> None:
    smaller, larger = measured(tmp_path, 8192, "keep"), measured(tmp_path, 24576, "keep")
    assert growth(smaller, larger) > 1.35, (smaller, larger)
