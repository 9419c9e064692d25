"""What reading costs does not grow with the store: 10^6, 10^8 and 10^10 samples. Counts; times are in the benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.growth import sparse_store

from actstore import Layout, Site

SITE, BLOCK_SAMPLES, CHUNK_SAMPLES = Site("resid_post", 16, (0,)), 1 << 20, 4096
CHUNK_BYTES = CHUNK_SAMPLES * SITE.row_bytes  # 128 KiB
TAIL_BYTES = 16 * BLOCK_SAMPLES // CHUNK_SAMPLES + 4  # the index of a shard
SIZES = (10**6, 10**8, 10**10)
MEMORY = 60 << 20  # of windows of 1 MiB, 4,096 mapped shards, and libraries
WINDOW, BATCH, BATCHES = 1 << 20, 1000, 64  # 16 chunks of 4,096 rows, or 2,048 rows, are read at once

COUNT = """
import gc, json, re, sys
from pathlib import Path

import actstore

opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and "/c/0/" in str(args[0]) else None)


def number(file, name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path(f"/proc/self/{file}").read_text())[1])


def count(url, batches, **settings):
    gc.collect()
    opened.clear()
    memory, read = number("status", "RssAnon"), number("io", "rchar")
    with actstore.open(url).batches(**settings, check=False) as loader:
        for _ in range(batches):
            next(loader)
        kept = KEPT
        return {
            "files": len(opened), "bytes": number("io", "rchar") - read,
            "memory": 1024 * (number("status", "RssAnon") - memory), "state": len(json.dumps(loader.state())),
        }


batches, *urls = json.loads(sys.argv[1])
settings = json.loads(sys.argv[2])
count(urls[0], batches, **settings)  # libraries, TensorStore's threads
print(json.dumps([count(url, batches, **settings) for url in urls]))
"""


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("growth")
    return [
        str(sparse_store(folder / f"{samples}.acts.zarr", Layout((SITE,), samples, BLOCK_SAMPLES, CHUNK_SAMPLES, ())))
        for samples in SIZES
    ]


def counted_of(urls: list[str], order: str, *, kept: str = "None") -> list[dict[str, int]]:
    """What reading some batches of each store costs, in one process."""
    if not Path("/proc/self/io").exists():
        pytest.skip("no /proc/self/io here: the bytes read are not counted")
    settings = {"batch_size": BATCH, "window_bytes": WINDOW, "order": order}
    command = [sys.executable, "-c", COUNT.replace("KEPT", kept), json.dumps([BATCHES, *urls]), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", ["block", "exact"])
def test_what_is_opened_and_read_does_not_grow_with_the_store(urls: list[str], order: str) -> None:
    """Files: no more than places that are read. Bytes: what is read, and the index of each file; memory: windows.

    Pages of mapped files are no bytes of `read`: of them, the number of files says enough.
    """
    found = counted_of(urls, order)
    at_once = WINDOW // 2 // (CHUNK_BYTES if order == "block" else 256)  # places: chunks, or rows
    rows = at_once * (CHUNK_SAMPLES if order == "block" else 1)
    places = at_once * (-(-BATCHES * BATCH // rows) + 2)  # a window read ahead, and one that was begun
    for samples, counted in zip(SIZES, found, strict=True):
        print(f"{order}, {samples:,} samples: {counted}")
        assert counted["files"] <= places
        assert counted["bytes"] <= places * (CHUNK_BYTES if order == "block" else SITE.row_bytes) + counted["files"] * (
            TAIL_BYTES + CHUNK_BYTES
        ) + (1 << 20)
        assert counted["memory"] <= MEMORY
        assert counted["state"] <= 200


def test_meta_a_permutation_in_memory_would_be_found(urls: list[str]) -> None:
    """Eight bytes per sample: 10^7 samples are more than what is allowed."""
    (found,) = counted_of(urls[:1], "block", kept="__import__('numpy').ones(10**7)")
    assert found["memory"] > MEMORY
