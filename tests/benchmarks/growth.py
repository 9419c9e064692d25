"""Time per batch, and of the first one, as a store grows: 10^6, 10^8 and 10^10 samples.

The stores have real metadata, and one shard of holes under the name of each of theirs: rows come from the page cache at
any size, and what is measured is what the loader itself does.
"""

import os
import statistics
import time
from pathlib import Path
from random import Random

import actstore
from actstore import Layout, Site
from actstore.shards import packed_index
from tests.benchmarks.scale import sealed

SIZES = {"10^6": 10**6, "10^8": 10**8, "10^10": 10**10}
SITE, BLOCK_SAMPLES, CHUNK_SAMPLES = Site("resid_post", 896, (0,)), 65_536, 256  # 117 MB a shard
BATCH = 4096
WINDOWS = {"block": 512 << 20, "exact": 64 << 20}  # exact order opens a shard for nearly each row of the largest store
LINKS = 50_000  # to one file; ext4 allows 65,000


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """Milliseconds per batch and seconds to the first one, by order and size; medians, and the ratio to 10^6."""
    urls = {
        name: sparse_store(folder / f"growth-{name}.acts.zarr", Layout((SITE,), samples, BLOCK_SAMPLES, CHUNK_SAMPLES))
        for name, samples in SIZES.items()
    }
    found: dict[str, dict[str, float]] = {}
    for order, window_bytes in WINDOWS.items():
        turns = [
            {
                name: batches(urls[name], order, window_bytes, seed=seed)
                for name in Random(seed).sample(list(urls), len(urls))
            }
            for seed in range(repeats + 1)
        ][1:]  # the first turn loads libraries, and fills the page cache
        for name in SIZES:
            found[f"{order} {name}"] = {
                key: statistics.median(turn[name][place] for turn in turns)
                for place, key in enumerate(["first batch s", "ms per batch"])
            }
        for name in SIZES:
            figures = found[f"{order} {name}"]
            figures["ratio"] = figures["ms per batch"] / found[f"{order} 10^6"]["ms per batch"]
            found[f"{order} {name}"] = {key: round(value, 3) for key, value in figures.items()}
            print(f"{'growth':<14} {order + ' ' + name:<22} {found[f'{order} {name}']}", flush=True)
    return {"growth": found}


def batches(url: Path, order: str, window_bytes: int, *, seed: int) -> tuple[float, float]:
    """Seconds from opening a store to its first batch; milliseconds of each batch of the next two windows."""
    started = time.perf_counter()
    store = actstore.open(url)
    settings = {"batch_size": BATCH, "order": order, "seed": seed, "window_bytes": window_bytes, "check": False}
    with store.batches(**settings) as loader:  # nothing vouches for holes
        next(loader)
        first = time.perf_counter() - started
        count = 2 * (window_bytes // 2) // (SITE.row_bytes * BATCH)  # half of it is read while half is used
        started = time.perf_counter()
        for _ in range(count):
            next(loader)
        return first, (time.perf_counter() - started) / count * 1e3


def sparse_store(url: Path, layout: Layout) -> Path:
    """A finished store of one site without markers, whose shards are all names of the same holes."""
    sealed(url, layout)
    folder, holes = url / layout.sites[0].name / "c/0", url / "holes"
    folder.mkdir(parents=True)
    for block in range(layout.blocks):
        if block % LINKS == 0:
            _write_holes(url / f"holes-{block}", layout)
            holes = url / f"holes-{block}"
        (folder / f"{block}").mkdir()
        os.link(holes, folder / f"{block}/0")
    return url


def _write_holes(path: Path, layout: Layout) -> None:
    """A shard of zeros that takes no room: chunk after chunk, each with four bytes of checksum, and a true index."""
    length = layout.chunk_samples * layout.sites[0].row_bytes + 4
    count = layout.block_samples // layout.chunk_samples
    with path.open("wb") as file:
        file.truncate(length * count)
        file.seek(length * count)
        file.write(packed_index([value for chunk in range(count) for value in (chunk * length, length)]))
