"""What a whole run holds in memory, as the system counts it, beside what it announces."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, re, sys, time
from pathlib import Path

import extract
from extract.named import model_folder

folder, keep = Path(sys.argv[1]), sys.argv[2] == "keep"


def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


def plan_of(limit):
    documents = extract.open_documents("python-docs", limit=limit)
    settings = dict(context=128, batch=8, dtype="float32", block_samples=4096, model=model, layers=[0, 1, 2, 3])
    sites = ["resid_post", "resid_mid", "attn_out", "mlp_out"]
    return extract.make_plan(model_folder("tiny-qwen2"), documents, sites=sites, **settings)


model = extract.load_model(model_folder("tiny-qwen2"))
extract.run(plan_of(8), str(folder / "first.acts.zarr"))  # compiled, all libraries are in memory
plan = plan_of(100)
layout = plan.store.layout
kept = []
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
before = status("VmRSS")


def show(state):
    if keep:
        kept.append(bytearray(b"x") * (layout.block_bytes // 16))


state = extract.run(plan, str(folder / "x.acts.zarr"), progress=show)
edges = plan.step_edges()
rows = int((edges[1:] - edges[:-1]).max()) * sum(site.sample_bytes for site in layout.sites)
print(json.dumps({"announced": layout.memory_bytes, "peak": status("VmHWM") - before, "block": layout.block_bytes,
                  "pass": rows, "written": state.bytes_written}))
"""


def measured(folder: Path, keep: str) -> dict[str, int]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("NOT MEASURED: no /proc/self/clear_refs here, which starts the peak of memory anew")
    found = subprocess.run([sys.executable, "-c", RUN, str(folder), keep], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def bound(found: dict[str, int]) -> float:
    """Three blocks, and rows of two passes on their way: on the device and on the host. A tenth for allocators."""
    return 1.1 * (found["announced"] + 4 * found["pass"])


def test_a_run_holds_what_it_announces(tmp_path: Path) -> None:
    found = measured(tmp_path, "drop")
    assert found["announced"] == 3 * found["block"]
    assert found["written"] > 2 * found["announced"]
    assert found["peak"] <= bound(found), found


def test_meta_blocks_that_are_kept_would_be_found(tmp_path: Path) -> None:
    found = measured(tmp_path, "keep")
    assert found["peak"] > bound(found)
