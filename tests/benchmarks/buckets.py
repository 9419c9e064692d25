"""A bucket: writing and reading beside TensorStore itself on the same server, and how many requests are made.

The servers run on this machine, so figures say what the client costs, not what a network does: `fake-gcs`, a program in
Go, holds objects in memory; `localbucket`, in Python, keeps them as files and takes 40 ms for a small answer after a
write. Both ways send the same shards of the same array; actstore also computes norms and digests, writes columns and
markers, seals, and compares what it reads with its digests. Requests are counted by a proxy before `moto`, untimed.
"""

import collections
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import tensorstore as ts
import xarray as xr

import actstore
from actstore import Layout, Plan, Site
from actstore.metadata import array_metadata
from tests.benchmarks.timing import median_seconds

sys.path.insert(0, str(Path(__file__).parents[1]))  # as the tests name their helpers

from fault_proxy import FaultProxy
from servers.everywhere import started
from servers.fake_gcs import NAME as FAKE_GCS
from servers.localbucket import NAME as LOCALBUCKET
from servers.moto import NAME as MOTO
from servers.server import Missing, Server

WIDTH, LAYERS, BATCH = 896, (6, 12, 18, 23), 4096
SITE = Site("resid_post", WIDTH, LAYERS)
LAYOUT = Layout((SITE,), 128 << 10, 32 << 10, 256)  # four blocks, shards of 59 MB, 940 MB in all
COUNTED = Layout((SITE,), 32 << 10, 8 << 10, 256)  # four blocks: requests do not depend on the size of a shard
READ, READ_RAW = "read/run.acts.zarr", "read/raw"
WRITTEN, WRITTEN_RAW = "written/run.acts.zarr", "written/raw"


@functools.cache
def _block(layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows [layer, sample, width] and columns of every block: the same each time."""
    shape = (len(LAYERS), layout.block_samples, WIDTH)
    rows = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.dtype(SITE.dtype))
    return rows, {column.name: np.zeros(layout.block_samples, column.dtype) for column in layout.columns}


def _write(server: Server, key: str, layout: Layout, *, blocks: Iterable[int], seal: bool) -> None:
    rows, columns = _block(layout)
    with actstore.create(server.url(key), layout, {}, seal=seal) as writer:
        for number in blocks:
            writer.write(number, {SITE.name: rows}, samples=columns)


def _write_raw(server: Server, key: str) -> None:
    """The same shards by TensorStore alone, as many of them at once as the writer has blocks in flight."""
    metadata = array_metadata(Plan.make(LAYOUT, {}), complete=True)[SITE.name]
    spec = {"driver": "zarr3", "kvstore": server.spec(f"{key}/"), "metadata": metadata}
    array = ts.open(spec, create=True).result()
    rows, size, pending = _block(LAYOUT)[0], LAYOUT.block_samples, []
    for number in range(LAYOUT.blocks):
        for index in range(len(LAYERS)):
            target = array[index, number * size : (number + 1) * size]
            pending.append(target.write(rows[index], can_reference_source_data_indefinitely=True))
    for write in pending:
        write.result()


def _read(server: Server) -> None:
    rows = actstore.open(server.url(READ)).dataset(raw=True)[SITE.name]
    for index in range(len(LAYERS)):
        rows.isel(layer=index).values  # noqa: B018  reads


def _read_raw(server: Server) -> None:
    array = ts.open({"driver": "zarr3", "kvstore": server.spec(f"{READ_RAW}/")}, open=True).result()
    for index in range(len(LAYERS)):
        array[index].read().result()


def _train(server: Server, key: str) -> int:
    """An epoch of shuffled minibatches of every layer; how many there were."""
    count = 0
    for layer in LAYERS:
        with actstore.open(server.url(key)).batches(layer=layer, batch_size=BATCH, epochs=1) as batches:
            count += sum(1 for _ in batches)
    return count


def measure(*, repeats: int) -> dict[str, object]:
    """MB/s of activations, of actstore and of TensorStore, and requests per block and per batch."""
    found: dict[str, object] = {}
    rates = functools.partial(_rates, repeats=repeats)
    with started() as servers:
        for name, work in {FAKE_GCS: rates, LOCALBUCKET: rates, MOTO: _requests}.items():
            try:
                server = servers[name]
            except Missing as error:
                print(f"bucket         NOT MEASURED: {error}")
                continue
            with mock.patch.dict(os.environ, server.client_environ()):
                found["requests" if work is _requests else name] = work(server)
    return {"bucket": found}


def _rates(server: Server, *, repeats: int) -> dict[str, float]:
    blocks = range(LAYOUT.blocks)
    _write_raw(server, READ_RAW)
    _write(server, READ, LAYOUT, blocks=blocks, seal=True)
    ways: dict[str, Callable[[], object]] = {
        "write, TensorStore": lambda: _write_raw(server, WRITTEN_RAW),
        "write, actstore": lambda: _write(server, WRITTEN, LAYOUT, blocks=blocks, seal=True),
        "read, TensorStore": lambda: _read_raw(server),
        "read, actstore": lambda: _read(server),
        "batches, actstore": lambda: _train(server, READ),
    }
    timed = {name: functools.partial(_do, way) for name, way in ways.items()}
    seconds = median_seconds(timed, repeats=repeats, after=lambda _: _remove_written(server))
    rates = {name: round(LAYOUT.data_bytes / each / 1e6, 1) for name, each in seconds.items()}
    for name, rate in rates.items():
        limit = "write, TensorStore" if name.startswith("write") else "read, TensorStore"
        print(f"bucket {server.name:<12} {name:<20} {rate:>9,.1f} MB/s  {rate / rates[limit]:>5.2f} of TensorStore")
    return rates


def _do(way: Callable[[], object]) -> None:
    way()


def _remove_written(server: Server) -> None:
    """A store that is complete is not written again."""
    ts.KvStore.open(server.spec("written/")).result().delete_range(ts.KvStore.KeyRange()).result()


def _requests(server: Server) -> dict[str, dict[str, float]]:
    """Requests by kind: of a run, of each block more, of opening, of a sample, of a batch."""
    key = "counted/run.acts.zarr"
    with FaultProxy(server.endpoint) as proxy, mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": proxy.endpoint}):

        def count(work: Callable[[], object]) -> collections.Counter[str]:
            before = len(proxy.requests)
            work()
            while proxy.under_way:  # an answer is there before its request is written down
                time.sleep(0.01)
            return collections.Counter(each.kind for each in proxy.requests[before:])

        def run(*blocks: int, seal: bool = False) -> collections.Counter[str]:
            return count(lambda: _write(server, key, COUNTED, blocks=blocks, seal=seal))

        creating, again, one, three = run(), run(), run(0), run(1, 2, 3)
        sealing = run(seal=True)
        opening = count(lambda: xr.open_dataset(server.url(key)))
        rows = actstore.open(server.url(key)).dataset(raw=True)[SITE.name]
        sample = count(lambda: rows.isel(layer=0, sample=12345).values)
        training = count(lambda: _train(server, key))
    kinds = sorted({*creating, *again, *three, *sealing})
    batches = len(LAYERS) * COUNTED.samples // BATCH
    found: dict[str, dict[str, float]] = {
        "a new store": dict(creating),
        "going on with one": dict(again),
        "a block": {kind: (three[kind] - one[kind]) / 2 for kind in kinds if three[kind] != one[kind]},
        "sealing": {kind: sealing[kind] - again[kind] for kind in kinds if sealing[kind] != again[kind]},
        "opening": dict(opening),
        "a random sample": dict(sample),
        "a batch": {kind: round(each / batches, 2) for kind, each in training.items()},
    }
    for name, each in found.items():
        print(f"bucket requests  {name:<20} {', '.join(f'{number:g} {kind}' for kind, number in sorted(each.items()))}")
    return found
