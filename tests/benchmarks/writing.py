"""Writing beside np.tofile with fsync, TensorStore, zarr-python, datasets' ArrowWriter and pickled dictionaries.

Every way writes the same rows, by as many processes, and ends when they are on the disk. The processes live through all
turns, so that no way pays for its imports. Rows are in memory before; an actstore store is created, checked for NaN,
summed and sealed within its time.
"""

import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import actstore
from actstore import Layout, Plan, Site
from actstore.metadata import array_metadata
from tests.benchmarks.timing import median_seconds, remove

WIDTHS, PROCESSES, LAYERS = (896, 4096), (1, 2), (6, 12, 18, 23)
SHARD_BYTES, CHUNK_BYTES, BLOCKS = 64 << 20, 512 << 10, 4  # 1.1 GB in all
PICKLED_SHARE = 1 / 16  # of each block; the seconds are scaled
LIMIT = "np.tofile + fsync"  # what every way is compared with


class Rows:
    """The rows that are written, and who writes which blocks of them."""

    def __init__(self, width: int, index: int = 0, processes: int = 1) -> None:
        chunk = 1 << (CHUNK_BYTES // 2 // width).bit_length() - 1
        block = SHARD_BYTES // (2 * width) // chunk * chunk
        self.layout = Layout((Site("resid_post", width, LAYERS),), block * BLOCKS, block, chunk, ())
        self.index, self.numbers = index, range(index, BLOCKS, processes)
        self._processes = processes

    @functools.cached_property
    def block(self) -> np.ndarray:
        """[layer, sample, width] of every block: the same values each time."""
        shape = (len(LAYERS), self.layout.block_samples, self.layout.sites[0].width)
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    def shards(self) -> Iterator[tuple[int, int]]:
        """Block and layer index of every shard of this process."""
        return itertools.product(self.numbers, range(len(LAYERS)))


def with_actstore(rows: Rows, folder: Path) -> None:
    with actstore.create(folder / "x.acts.zarr", rows.layout, {}, seal=False) as writer:
        for number in rows.numbers:
            writer.write(number, {"resid_post": rows.block})


def with_tofile(rows: Rows, folder: Path, *, threads: int = 1) -> None:
    """A plain copy of each shard to the disk."""
    folder.mkdir(exist_ok=True)

    def write(shard: tuple[int, int]) -> None:
        number, layer = shard
        with (folder / f"{number}-{layer}.bin").open("wb") as file:
            rows.block[layer].tofile(file)
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, rows.shards()))


def with_tensorstore(rows: Rows, folder: Path) -> None:
    """The same array and codecs, shard by shard, several at once; no norms, no checksum of the shard."""
    import tensorstore as ts

    metadata = array_metadata(Plan.make(rows.layout, {}), complete=True)["resid_post"]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata}
    array = ts.open(spec, open=True, assume_metadata=True).result()
    pending, samples = [], rows.layout.block_samples
    for number, layer in rows.shards():
        target = array[layer, number * samples : (number + 1) * samples]
        pending.append(target.write(rows.block[layer], can_reference_source_data_indefinitely=True))
        if len(pending) == 2 * len(LAYERS):
            pending.pop(0).result()
    for write in pending:
        write.result()


def with_zarr(rows: Rows, folder: Path) -> None:
    """The same shards and chunks with crc32c, as 16-bit integers; zarr-python does not sync, so we do."""
    import zarr

    layout, width = rows.layout, rows.layout.sites[0].width
    array = zarr.create_array(
        folder / f"{rows.index}.zarr", shape=(len(LAYERS), layout.samples, width), dtype="uint16", filters=None,
        chunks=(1, layout.chunk_samples, width), shards=(1, layout.block_samples, width),
        serializer=zarr.codecs.BytesCodec(), compressors=[zarr.codecs.Crc32cCodec()],
    )  # fmt: skip
    for number, layer in rows.shards():
        start = number * layout.block_samples
        array[layer, start : start + layout.block_samples] = rows.block[layer].view(np.uint16)
    for path in (folder / f"{rows.index}.zarr").rglob("*"):
        if path.is_file():
            sync(path)


def with_arrow(rows: Rows, folder: Path) -> None:
    """A column for each layer, as 16-bit floats: Arrow has no bfloat16."""
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir(exist_ok=True)
    count, width = rows.layout.block_samples, rows.layout.sites[0].width
    columns = {f"layer_{layer}": Sequence(Value("float16"), length=width) for layer in LAYERS}
    for number in rows.numbers:
        path = folder / f"{number}.arrow"
        with ArrowWriter(path=str(path), features=Features(columns)) as writer:
            for start in range(0, count, 1000):
                part = rows.block[:, start : min(start + 1000, count)].view(np.float16)
                writer.write_batch(dict(zip(columns, part, strict=True)))
            writer.finalize()
        sync(path)


def with_pickle(rows: Rows, folder: Path) -> None:
    """A list of dictionaries, one for each sample: what this store was made to replace."""
    folder.mkdir(exist_ok=True)
    for number in rows.numbers:
        samples = [
            {
                "sample_idx": sample,
                "activations": {f"layer_{layer}": row for layer, row in zip(LAYERS, of, strict=True)},
            }
            for sample, of in enumerate(rows.block[:, : int(rows.layout.block_samples * PICKLED_SHARE)].swapaxes(0, 1))
        ]
        path = folder / f"{number}.pkl"
        with path.open("wb") as file:
            pickle.dump(samples, file, protocol=pickle.HIGHEST_PROTOCOL)
        sync(path)


def sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


WAYS: dict[str, tuple[Callable[[Rows, Path], None], str, float]] = {
    "actstore": (with_actstore, "actstore", 1),
    LIMIT: (with_tofile, "numpy", 1),
    "the same, 4 threads": (functools.partial(with_tofile, threads=4), "numpy", 1),
    "TensorStore": (with_tensorstore, "tensorstore", 1),
    "zarr-python": (with_zarr, "zarr", 1),
    "datasets ArrowWriter": (with_arrow, "datasets", 1),
    "pickled dictionaries": (with_pickle, "pickle", PICKLED_SHARE),
}


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """MB/s of activations of every way, width and number of processes, and the ratio to a plain copy to the disk."""
    missing = [name for name, (_, package, _) in WAYS.items() if importlib.util.find_spec(package) is None]
    for name in missing:
        print(f"write          NOT MEASURED: {name} is not installed; pip install '.[bench]'")
    found: dict[str, object] = {"not measured": missing} if missing else {}
    for width, processes in itertools.product(WIDTHS, PROCESSES):
        rates = _measure(folder, width, processes, [name for name in WAYS if name not in missing], repeats)
        found[f"{width} wide, {processes} process{'es' * (processes > 1)}"] = rates
        for name, rate in rates.items():
            against = rate / rates[LIMIT]
            print(f"write {width:>5} x {processes}  {name:<22} {rate:>9,.1f} MB/s  {against:>5.2f} of a plain copy")
    return {"write": found, "write_memory": memory(folder)}


def _measure(folder: Path, width: int, processes: int, names: list[str], repeats: int) -> dict[str, float]:
    rows, target = Rows(width), folder / "write"
    with workers(width, processes) as crew:

        def run(name: str) -> None:
            for worker in crew:
                worker.send((name, target))
            for worker in crew:
                if error := worker.recv():
                    raise RuntimeError(f"{name}: {error}")
            if name == "actstore":
                actstore.create(target / "x.acts.zarr", rows.layout, {}).__exit__(None, None, None)  # seals

        ways = {name: functools.partial(run, name) for name in names}
        seconds = median_seconds(ways, repeats=repeats, after=lambda _: remove(target))
    return {name: round(rows.layout.data_bytes * WAYS[name][2] / seconds[name] / 1e6, 1) for name in names}


@contextmanager
def workers(width: int, processes: int) -> Iterator[list[Connection]]:
    """Processes that have the rows in memory and write them as they are told."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(processes)]
    crew = [
        context.Process(target=serve, args=(theirs, width, index, processes), daemon=True)
        for index, (_, theirs) in enumerate(pairs)
    ]
    for process in crew:
        process.start()
    try:
        yield [ours for ours, _ in pairs]
    finally:
        for ours, _ in pairs:
            ours.send(None)
        for process in crew:
            process.join()


def serve(connection: Connection, width: int, index: int, processes: int) -> None:
    """A worker: takes the name of a way and a folder, answers with an error or nothing when it is done."""
    rows = Rows(width, index, processes)
    rows.block  # noqa: B018  made before anything is timed
    while (order := connection.recv()) is not None:
        name, folder = order
        try:
            WAYS[name][0](rows, folder)
            connection.send("")
        except Exception as error:  # noqa: BLE001  told to whoever asked
            connection.send(f"{type(error).__name__}: {error}")


def memory(folder: Path) -> dict[str, Any]:
    """Peak of a process that makes block after block, above what it had before, beside what the writer announces."""
    from tests.test_memory import WRITE

    command = [sys.executable, "-c", WRITE, str(folder / "memory.acts.zarr"), "crc32c", "bfloat16", "drop"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    remove(folder / "memory.acts.zarr")
    found["share"] = round(found["peak"] / found["announced"], 3)
    print(f"write memory   peak {found['peak'] / 1e6:,.1f} MB, announced {found['announced'] / 1e6:,.1f} MB")
    return found
