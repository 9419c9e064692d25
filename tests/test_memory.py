"""What a writer holds in memory, as the system counts it, beside what it announces."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import json, re, sys
from pathlib import Path

import ml_dtypes
import numpy as np

import actstore

BLOCKS, SAMPLES, WIDTH, LAYERS = 10, 4096, 1024, (0, 1, 2, 3)
url, codec, given, keep = *sys.argv[1:4], sys.argv[4] == "keep"


def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


def block_of(start, stop):
    array = np.empty((len(LAYERS), stop - start, WIDTH), np.dtype(given))
    array[:] = rows[: stop - start]
    return {"resid_post": array}


layout = actstore.Layout((actstore.Site("resid_post", WIDTH, LAYERS),), SAMPLES * BLOCKS - 7, SAMPLES, 256, (), codec)
rows = np.random.default_rng(0).standard_normal((SAMPLES, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
kept = []
with actstore.create(url, layout, {}) as writer:
    last = layout.block_range(BLOCKS - 1)  # short, and written twice: all libraries are in memory before it counts
    writer.write(BLOCKS - 1, block_of(*last)).result()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
    before = status("VmRSS")
    for block in range(BLOCKS):
        array = block_of(*layout.block_range(block))
        kept += [array] if keep else []
        writer.write(block, array)
        del array
    writer.close()
    print(json.dumps({"announced": writer.memory_bytes, "peak": status("VmHWM") - before, "block": layout.block_bytes}))
"""


def measured(folder: Path, *settings: str) -> dict[str, int]:
    """Announced bytes, and the peak above what the process had before, of ten blocks made one after the other."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs here: the peak of memory is not measured")
    command = [sys.executable, "-c", WRITE, str(folder / "x.acts.zarr"), *settings]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("codec", ["crc32c", "none", "zstd"])
def test_a_writer_holds_what_it_announces(tmp_path, codec):
    found = measured(tmp_path, codec, "bfloat16", "drop")
    assert found["announced"] == 3 * found["block"] + (0 if codec != "zstd" else 2 * found["block"])
    assert found["peak"] <= 1.2 * found["announced"]


def test_of_rows_to_be_rounded_only_the_callers_own_come_on_top(tmp_path):
    found = measured(tmp_path, "crc32c", "float32", "drop")
    assert found["peak"] <= 1.2 * (found["announced"] + 2 * found["block"])


def test_meta_blocks_that_are_kept_would_be_found(tmp_path):
    found = measured(tmp_path, "crc32c", "bfloat16", "keep")
    assert found["peak"] > 1.2 * found["announced"]
