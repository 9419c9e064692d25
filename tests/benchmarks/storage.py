"""Shuffled reading beside np.memmap and np.take."""

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np

import actstore
from tests.benchmarks.timing import median_seconds, remove

WIDTH, BLOCK_SAMPLES, BLOCKS = 896, 65_536, 4  # 117 MB a shard
BATCH = 4096


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """All figures of the store without a model: MB/s of activations, in decimal megabytes."""
    rng = np.random.default_rng(0)
    layer = rng.standard_normal((BLOCK_SAMPLES, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
    return {"read": read(folder, layer, repeats)}


def read(folder: Path, layer: np.ndarray, repeats: int) -> dict[str, object]:
    """Shuffled batches of one layer from the warm page cache; every way gives fresh arrays of 4,096 rows."""
    samples = BLOCK_SAMPLES * BLOCKS
    layout = actstore.Layout.fit([actstore.Site("resid_post", WIDTH, (0,))], samples=samples, columns=())
    url, flat = folder / "read.acts.zarr", folder / "read.bin"
    with actstore.create(url, layout, {}) as writer, flat.open("wb") as file:
        for number in range(layout.blocks):
            start, stop = layout.block_range(number)
            writer.write(number, {"resid_post": layer[None, : stop - start]}).result()
            layer[: stop - start].tofile(file)
    memory = np.fromfile(flat, np.uint16).reshape(samples, WIDTH)
    mapped = np.memmap(flat, np.uint16, "r", shape=memory.shape)
    batches = samples // BATCH
    endless = actstore.open(url).batches(batch_size=BATCH, seed=0)
    random = np.random.default_rng(0)

    def with_actstore() -> None:
        for _ in itertools.islice(endless, batches):
            pass

    def with_memmap() -> None:
        for _ in range(batches):
            mapped[random.integers(0, samples, BATCH)]

    def with_take() -> None:
        for _ in range(batches):
            np.take(memory, random.integers(0, samples, BATCH), axis=0)

    ways = {"actstore": with_actstore, "np.memmap random rows": with_memmap, "np.take in RAM": with_take}
    seconds = median_seconds(ways, repeats=repeats)
    endless.close()
    remove(url)
    return rates("shuffled read", memory.nbytes, seconds)


def rates(what: str, count: int, seconds: dict[str, float]) -> dict[str, object]:
    """MB/s of each way, printed and returned."""
    found: dict[str, object] = {}
    for name, value in seconds.items():
        found[name] = round(count / value / 1e6, 1)
        print(f"{what:<14} {name:<22} {found[name]:>9,.1f} MB/s")
    return found
