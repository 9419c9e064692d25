"""Shuffled reading beside np.take in memory, np.memmap, TensorStore, and the loaders of four peers; warm and cold.

Every way is a process of its own (`loaders`) that yields fresh minibatches of the same rows; turns are taken in
changing order. Warm: everything is in the page cache. Cold: nothing is, which is looked up before each turn; the limit
is then reading the shards from end to end. Beside each speed stands how many contexts of 128 rows a batch mixes, as a
share of those in a batch that is drawn at random from all rows that this way holds.
"""

import ctypes
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import actstore
from actstore import Layout, Site
from tests.benchmarks.loaders import BATCH, CONTEXT, PEER_BYTES, SMALL_WINDOW_BYTES, STORE_BYTES, WAYS, Data, numbered
from tests.benchmarks.peers import Peer
from tests.benchmarks.timing import remove

WIDTHS = (896, 4096)
TAKE, MEMMAP, DISK = "np.take in RAM", "np.memmap random rows", "the disk, end to end"
LOADERS = ("TensorStore chunks", "SAELens", "annbatch", "datasets", "grain, ArrayRecord")
SEQUENTIAL_BYTES = 8 << 20
ADDED_BYTES = 100_000_000  # that a loader may hold beside its window and three batches


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """MB/s of every way, width and state of the page cache, with its ratios to the limits."""
    found: dict[str, object] = {}
    for width in WIDTHS:
        with made(folder / f"read-{width}", width) as data, ExitStack() as stack:
            peers, missing = start(data, stack)
            found[f"{width} wide"] = report(width, *take_turns(data, peers, repeats)) | {"not measured": missing}
    return {"read": found, "read_memory": memory(folder)}


@contextmanager
def made(folder: Path, width: int) -> Iterator[Data]:
    """The rows, flat and as a store; removed in the end."""
    folder.mkdir()
    data = Data(folder, width)
    layout = Layout.fit([Site("resid_post", width, (0,))], samples=data.samples(STORE_BYTES), columns=())
    generator = np.random.default_rng(0)
    with actstore.create(data.store, layout, {}) as writer, data.flat.open("wb") as file:
        for number in range(layout.blocks):
            first, last = layout.block_range(number)
            rows = generator.standard_normal((last - first, width), np.float32).astype(ml_dtypes.bfloat16)
            numbered(rows.view(np.uint16), first)
            writer.write(number, {"resid_post": rows[None]}).result()
            rows.view(np.uint16).tofile(file)
    try:
        yield data
    finally:
        remove(folder)


def start(data: Data, stack: ExitStack) -> tuple[dict[str, Peer], dict[str, str]]:
    """A process for every way that can be measured, its files written; and why the others cannot."""
    peers: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name in WAYS:
        try:
            module = ["tests.benchmarks.loaders", name, data.folder, str(data.width)]
            peer = Peer(name, module, data.folder / f"{len(peers)}.log")
            stack.callback(peer.close)
            peer.ask("write")
            peers[name] = peer
        except (OSError, RuntimeError) as error:
            missing[name] = str(error)
            print(f"read  {data.width:>5}    NOT MEASURED: {name}: {error}", flush=True)
    os.sync()  # what is not on the disk yet would stay in the page cache
    return peers, missing


def take_turns(data: Data, peers: dict[str, Peer], repeats: int) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Answers of every way, warm and cold, and the largest share of a file that was in memory before a cold turn."""
    warm: dict[str, list[Any]] = {name: [] for name in peers}
    cold: dict[str, list[Any]] = {
        name: [] for name in [*peers, DISK] if name == DISK or not leaves_out_cold(name, data)
    }
    left = 0.0
    for turn in range(repeats):
        for name in random.Random(turn).sample(list(cold), len(cold)):
            left = max(left, drop(data.folder))
            cold[name].append({"rate": sequential(data.store)} if name == DISK else peers[name].ask("cold"))
    for peer in peers.values():  # brings what it reads into memory
        peer.ask("warm")
    for turn in range(repeats):
        for name in random.Random(turn).sample(list(peers), len(peers)):
            warm[name].append(peers[name].ask("warm"))
    return warm, cold, left


def leaves_out_cold(name: str, data: Data) -> bool:
    """Whether a way reads no file."""
    batches = WAYS[name].cold_batches
    return batches is not None and batches(data) == 0


def drop(folder: Path) -> float:
    """Has the system forget the contents of all files in a folder; the share that it still holds."""
    held = total = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found = resident(file.fileno())
            held, total = held + int(found.sum()), total + len(found)
    return held / total


def resident(file: int) -> np.ndarray:
    """Which pages of a file are in memory: mincore(2)."""
    size = os.fstat(file).st_size
    with mmap.mmap(file, size, flags=mmap.MAP_PRIVATE) as view:  # writable in private: only so ctypes says where it is
        pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        place = ctypes.c_char.from_buffer(view)
        address, length = ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, length, ctypes.c_void_p(pages.ctypes.data))
        del place
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return pages & 1 == 1


def sequential(store: Path) -> float:
    """MB/s of reading all shards, one after the other."""
    buffer, count, started = bytearray(SEQUENTIAL_BYTES), 0, time.perf_counter()
    for path in sorted((store / "resid_post/c").rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while read := file.readinto(buffer):
                    count += read
    return count / (time.perf_counter() - started) / 1e6


def report(width: int, warm: dict[str, Any], cold: dict[str, Any], left: float) -> dict[str, Any]:
    """Medians and their ratios to the limits, printed."""
    rates = [
        {name: statistics.median(each["rate"] for each in turns) for name, turns in of.items()} for of in (warm, cold)
    ]
    if left > 0.001:
        print(f"read  {width:>5}    NOT COLD: up to {left:.1%} of the pages were still in memory before a cold turn")
    found: dict[str, Any] = {"resident before cold turns": round(left, 4)}
    for state, medians in zip(("warm", "cold"), rates, strict=True):
        limit = TAKE if state == "warm" else DISK
        for name, rate in medians.items():
            line = {"MB/s": round(rate, 1), f"of {limit}": round(rate / medians[limit], 3)}
            if MEMMAP in medians:
                line[f"of {MEMMAP}"] = round(rate / medians[MEMMAP], 2)
            if name in warm:
                line["contexts"] = round(mixing(name, width, warm[name][0]["contexts"]), 3)
            found[f"{state}, {name}"] = line
            shares = "  ".join(f"{key} {value:,.2f}" for key, value in list(line.items())[1:])
            print(f"read  {width:>5}  {state}  {name:<24} {rate:>9,.1f} MB/s  {shares}", flush=True)
    fastest = max((rates[0][name], name) for name in LOADERS if name in rates[0])
    found["warm block order, of the fastest other loader"] = round(rates[0]["actstore, block order"] / fastest[0], 2)
    print(
        f"read  {width:>5}  warm  block order is {rates[0]['actstore, block order'] / fastest[0]:.2f} of {fastest[1]}"
    )
    return found


def mixing(name: str, width: int, contexts: int) -> float:
    """Contexts in a batch, as a share of those in one drawn at random from all rows that the way holds."""
    held = Data(Path(), width).samples(PEER_BYTES if WAYS[name].write else STORE_BYTES) / CONTEXT
    return contexts / (held * (1 - (1 - 1 / held) ** BATCH))


ITERATE = """
import json, re, sys, time
from pathlib import Path

import actstore


def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


url, order, window_bytes = *sys.argv[1:3], int(sys.argv[3])
store, own = actstore.open(url), 0
with store.batches(batch_size=64, seed=1, order=order, window_bytes=1 << 20) as batches:
    next(batches)  # all libraries are in memory before it counts
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: man 5 proc
before, own_before = status("VmRSS"), status("RssAnon")
with store.batches(batch_size=4096, seed=0, order=order, epochs=1, window_bytes=window_bytes) as batches:
    for rows in batches:
        time.sleep(0.03)  # a trainer: the next window is there before this one is used up
        own = max(own, status("RssAnon") - own_before)
print(json.dumps({"peak": status("VmHWM") - before, "own": own, "batch": rows.nbytes}))
"""


def memory(folder: Path) -> dict[str, Any]:
    """Growth of a process that reads an epoch of several windows, with and without the pages of mapped files."""
    found: dict[str, Any] = {}
    with made(folder / "read-memory", WIDTHS[0]) as data:
        for order in ("block", "exact"):
            command = [sys.executable, "-c", ITERATE, str(data.store), order, str(SMALL_WINDOW_BYTES)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            told["allowed"] = SMALL_WINDOW_BYTES + 3 * told.pop("batch") + ADDED_BYTES
            found[order] = told
            print(
                f"read memory    {order:<6} " + ", ".join(f"{key} {value / 1e6:,.0f} MB" for key, value in told.items())
            )
    return found
