"""Ways to read shuffled minibatches of the same rows, each as its own documentation says. A process runs one of them.

`python -m tests.benchmarks.loaders WAY FOLDER WIDTH` takes `write`, `warm` and `cold`, a line each, and answers each
with a line of JSON. It also runs where a peer's environment has NumPy and no actstore. Rows are 16-bit words, the bits
of bfloat16: a peer without that type holds them as float16, and never computes with them. The first words of a row are
its number, so that what was read can be compared with what was written.
"""

import dataclasses
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, CONTEXT = 4096, 128
SMALL_WINDOW_BYTES = 512 << 20  # both halves
STORE_BYTES = 940_000_000  # one window as it is by default in block order, three and a half small ones
PEER_BYTES = 470_000_000  # of the same rows, the first ones: less disk
SECONDS = 4.0  # a slow way reads no longer in one turn, but two batches
HOOK = "blocks.0.hook_resid_post"


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the rows are: `rows.bin`, flat, and `run.acts.zarr`; each peer adds its own folder."""

    folder: Path
    width: int

    def samples(self, total_bytes: int) -> int:
        """Rows of so many bytes, in whole batches."""
        return total_bytes // (2 * self.width) // BATCH * BATCH

    @property
    def flat(self) -> Path:
        return self.folder / "rows.bin"

    @property
    def store(self) -> Path:
        return self.folder / "run.acts.zarr"

    def mapped(self, total_bytes: int = STORE_BYTES) -> np.memmap:
        return np.memmap(self.flat, np.uint16, "r", shape=(self.samples(total_bytes), self.width))


def numbered(rows: np.ndarray, start: int) -> np.ndarray:
    """Writes the number of each row into its first three words, seven bits each: values between 1 and 2."""
    numbers = np.arange(start, start + len(rows))
    for word in range(3):
        rows[:, word] = 0x3F80 | (numbers >> 7 * word & 127)
    return rows


def numbers_of(rows: np.ndarray) -> np.ndarray:
    """The numbers of rows."""
    return sum((rows[:, word].astype(np.int64) & 127) << 7 * word for word in range(3))


def with_actstore(data: Data, place: Path, *, order: str, window_bytes: int | None = None) -> Iterator[np.ndarray]:
    import actstore

    settings: dict[str, Any] = {"batch_size": BATCH, "seed": 0, "order": order, "window_bytes": window_bytes}
    with actstore.open(data.store).batches(**settings) as batches:
        for rows in batches:
            yield rows.view(np.uint16)


def with_memmap(data: Data, place: Path) -> Iterator[np.ndarray]:
    """A shuffled index of all rows, batch after batch."""
    rows, random = data.mapped(), np.random.default_rng(0)
    while True:
        for chosen in random.permutation(len(rows)).reshape(-1, BATCH):
            yield np.asarray(rows[chosen])


def with_take(data: Data, place: Path) -> Iterator[np.ndarray]:
    """All rows in memory."""
    rows, random = in_memory(data), np.random.default_rng(0)
    while True:
        for chosen in random.permutation(len(rows)).reshape(-1, BATCH):
            yield np.take(rows, chosen, axis=0)


_MEMORY: dict[Data, np.ndarray] = {}


def in_memory(data: Data) -> np.ndarray:
    """The rows, read once in this process."""
    if data not in _MEMORY:
        _MEMORY[data] = np.array(data.mapped())
    return _MEMORY[data]


def with_tensorstore(data: Data, place: Path) -> Iterator[np.ndarray]:
    """The store's own chunks by TensorStore alone, a window shuffled in memory while the next one is read."""
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{data.store}/resid_post/"}}
    array, random = ts.open(spec, open=True).result()[0], np.random.default_rng(0)
    size = array.chunk_layout.read_chunk.shape[0]
    chunks = array.shape[0] // size
    window = SMALL_WINDOW_BYTES // 2 // (2 * data.width * size)

    def start(chosen: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        pool = np.empty((len(chosen) * size, data.width), array.dtype.numpy_dtype)
        return pool, [
            ts.array(pool[place * size : (place + 1) * size]).write(array[chunk * size : (chunk + 1) * size])
            for place, chunk in enumerate(chosen)
        ]

    order = itertools.chain.from_iterable(iter(lambda: random.permutation(chunks).tolist(), None))
    following = start(list(itertools.islice(order, window)))
    while True:
        (pool, reading), following = following, start(list(itertools.islice(order, window)))
        for future in reading:
            future.result()
        places = random.permutation(len(pool))
        for first in range(0, len(pool) - BATCH + 1, BATCH):
            yield pool.view(np.uint16)[places[first : first + BATCH]]


def write_datasets(data: Data, place: Path) -> None:
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"x": Sequence(Value("float16"), length=data.width)})
    with ArrowWriter(path=str(place / "rows.arrow"), features=features) as writer:
        for part in np.split(data.mapped(PEER_BYTES), data.samples(PEER_BYTES) // BATCH):
            writer.write_batch({"x": np.asarray(part).view(np.float16)})
        writer.finalize()


def with_datasets(data: Data, place: Path) -> Iterator[np.ndarray]:
    from datasets import Dataset

    rows = Dataset.from_file(str(place / "rows.arrow")).with_format("numpy", dtype=np.float16)
    for seed in itertools.count():
        shuffled = rows.shuffle(seed=seed, keep_in_memory=True)
        for batch in shuffled.iter(BATCH, drop_last_batch=True):
            yield batch["x"].view(np.uint16)


def write_array_record(data: Data, place: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(place / "rows.array_record"), "group_size:1,uncompressed")
    for row in data.mapped(PEER_BYTES):
        writer.write(row.tobytes())
    writer.close()


def with_grain(data: Data, place: Path) -> Iterator[np.ndarray]:
    """Rows as elements, as grain means it; one thread: its threads share Python's lock."""
    import grain

    source = grain.sources.ArrayRecordDataSource([str(place / "rows.array_record")])
    rows = grain.MapDataset.source(source).shuffle(seed=0).map(lambda record: np.frombuffer(record, np.uint16))
    batches = rows.repeat().batch(BATCH, drop_remainder=True)
    yield from batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))


def write_annbatch(data: Data, place: Path) -> None:
    import zarr

    rows = data.mapped(PEER_BYTES)
    shard = 8192 if data.width < 2048 else 2048
    array = zarr.create_array(
        place / "rows.zarr", shape=rows.shape, dtype="float16", chunks=(64, data.width), shards=(shard, data.width),
        compressors=None,
    )  # fmt: skip
    for start in range(0, len(rows), shard):
        array[start : start + shard] = np.asarray(rows[start : start + shard]).view(np.float16)


def with_annbatch(data: Data, place: Path) -> Iterator[np.ndarray]:
    """512 chunks of 64 rows in memory, its own example's setting."""
    import annbatch
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    for seed in itertools.count():
        loader = annbatch.Loader(
            batch_size=BATCH, chunk_size=64, preload_nchunks=512, shuffle=True, to=None, preload_to_gpu=False,
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        for batch in loader.add_dataset(zarr.open_array(place / "rows.zarr", mode="r")):
            if len(batch["X"]) == BATCH:
                yield batch["X"].view(np.uint16)


def saelens_model(data: Data) -> Any:
    """A model whose activations at token `i` are row `i`."""
    import torch
    from transformer_lens.hook_points import HookedRootModule, HookPoint

    class Stub(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer, self.hook, self.W_E = None, HookPoint(), torch.zeros(1, data.width)
            self.setup()

        def run_with_cache(self, tokens: torch.Tensor, **_: object) -> tuple[None, dict[str, torch.Tensor]]:
            rows = torch.from_numpy(data.mapped(PEER_BYTES)[tokens.numpy()].view(np.float16))
            return None, {HOOK: rows}

    return Stub()


def write_saelens(data: Data, place: Path) -> None:
    from unittest import mock

    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    samples = data.samples(PEER_BYTES)
    settings = CacheActivationsRunnerConfig(
        dataset_path="none", model_name="stub", model_batch_size=32, hook_name=HOOK, d_in=data.width,
        training_tokens=samples, context_size=CONTEXT, new_cached_activations_path=str(place / "cache"), shuffle=True,
        dtype="float16", device="cpu", buffer_size_gb=0.1, streaming=False, prepend_bos=False,
    )  # fmt: skip
    with mock.patch("sae_lens.cache_activations_runner.load_model", return_value=saelens_model(data)):
        CacheActivationsRunner(settings, override_dataset=saelens_tokens(data)).run()


def saelens_tokens(data: Data) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": np.arange(data.samples(PEER_BYTES)).reshape(-1, CONTEXT)})


def with_saelens(data: Data, place: Path) -> Iterator[np.ndarray]:
    """64 batches in the buffer; 2,048 would be 30 times as slow."""
    import torch
    from sae_lens import ActivationsStore

    store = ActivationsStore(
        saelens_model(data), saelens_tokens(data), streaming=False, hook_name=HOOK, hook_head_index=None,
        context_size=CONTEXT, d_in=data.width, n_batches_in_buffer=64, total_training_tokens=data.samples(PEER_BYTES),
        store_batch_size_prompts=32, train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none",
        device=torch.device("cpu"), dtype="float16", cached_activations_path=str(place / "cache"),
    )  # fmt: skip
    while True:
        yield next(store).numpy().view(np.uint16)


@dataclasses.dataclass(frozen=True)
class Way:
    """How to read, and what for it is written first.

    `cold_batches`: what is read in a cold turn, where more would come from memory after all: once rows here and there
    were read, so were their neighbours. None: an epoch. 0: there is no cold case.
    """

    package: str
    read: Callable[..., Iterator[np.ndarray]]
    write: Callable[[Data, Path], None] | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    cold_batches: Callable[[Data], int] | None = None


def one_window(data: Data) -> int:
    return SMALL_WINDOW_BYTES // 2 // (2 * data.width * BATCH)


WAYS = {
    "actstore, block order": Way("actstore", with_actstore, settings={"order": "block"}),
    "actstore, small windows": Way(
        "actstore", with_actstore, settings={"order": "block", "window_bytes": SMALL_WINDOW_BYTES}
    ),
    "actstore, exact order": Way("actstore", with_actstore, settings={"order": "exact"}, cold_batches=one_window),
    "np.take in RAM": Way("numpy", with_take, cold_batches=lambda _: 0),
    "np.memmap random rows": Way("numpy", with_memmap, cold_batches=lambda _: 1),
    "TensorStore chunks": Way("tensorstore", with_tensorstore),
    "SAELens": Way("sae_lens", with_saelens, write_saelens),
    "annbatch": Way("annbatch", with_annbatch, write_annbatch),
    "datasets": Way("datasets", with_datasets, write_datasets, cold_batches=lambda _: 1),
    "grain, ArrayRecord": Way("array_record", with_grain, write_array_record, cold_batches=lambda _: 1),
}


def turn(way: Way, data: Data, place: Path, *, cold: bool) -> dict[str, Any]:
    """Batches per second: warm, after a quarter of an epoch; cold, from opening on. And what the first of them held."""
    epoch = data.samples(PEER_BYTES if way.write else STORE_BYTES) // BATCH
    wanted = 2 * epoch if not cold else way.cold_batches(data) if way.cold_batches else epoch
    started = time.perf_counter()
    batches = way.read(data, place, **way.settings)
    if not cold:
        for count, _ in enumerate(batches, 1):
            if count >= epoch / 4 or time.perf_counter() > started + SECONDS / 2:
                break
        started = time.perf_counter()
    first, count = None, 0
    for rows in batches:
        first = rows if first is None else first
        count += 1
        seconds = time.perf_counter() - started
        if count >= wanted or (seconds > SECONDS and count >= 2):
            break
    batches.close()
    del batches, rows
    gc.collect()  # what is mapped cannot leave the page cache
    return {"rate": count * first.nbytes / seconds / 1e6, "batches": count, "contexts": check(first, data)}


def check(rows: np.ndarray, data: Data) -> int:
    """Compares a batch with what was written; the number of its contexts of 128 rows."""
    numbers = numbers_of(rows)
    assert rows.shape == (BATCH, data.width), f"a batch of shape {rows.shape}"
    assert len(np.unique(numbers)) == BATCH, "a row came twice"
    assert np.array_equal(data.mapped()[numbers], rows), "rows differ from what was written"
    return len(np.unique(numbers // CONTEXT))


def main() -> None:
    """Answers until the input ends."""
    name, folder, width = sys.argv[1:]
    way, data = WAYS[name], Data(Path(folder), int(width))
    place = data.folder / way.package
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        found: dict[str, Any] = {}
        try:
            if line.strip() == "write":
                place.mkdir(exist_ok=True)
                if way.write:
                    way.write(data, place)
            else:
                found = turn(way, data, place, cold=line.strip() == "cold")
        except Exception as error:  # noqa: BLE001  told to whoever asked
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
