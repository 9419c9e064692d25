"""Training for minutes on end: no batch may be wrong, and no memory, thread or file may be left over.

`make soak`, or `python -m tests.soak --minutes 10 --seed 1`. Small stores are read for many epochs by one loader after
the other, in both orders, with and without zstd. At random a state is saved or restored, a loader is closed or just
forgotten, a shard is away for a while, and a process that reads the same stores is killed. Every batch is compared with
arrays in memory, and its samples with what `actstore.shuffle` says. The last line of output is JSON.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

import actstore
from actstore import Layout, Site
from actstore.errors import CorruptStoreError, StoreError
from actstore.shuffle import BlockOrder, ExactOrder

TOP = Path(__file__).parent.parent
SITES = (Site("resid_post", 64, (0, 1, 2)), Site("mlp_out", 32, None, "float32"))
LAYOUT = Layout(SITES, 20_000, 2048, 256, ())
CODECS = ("crc32c", "none", "zstd")
BATCH, WINDOW_BYTES = 250, 512 << 10  # a tenth of a window to a half
CASES: dict[str, dict[str, Any]] = {
    "one layer": {"layer": 1},
    "two layers": {"layers": [0, 2]},
    "two sites": {"sites": ["resid_post", "mlp_out"]},
    "a part": {"layer": 2, "part": (1, 5)},
    "unchecked": {"site": "mlp_out", "check": False},
}
Case: TypeAlias = tuple[str, str, str, int]  # codec, name of CASES, order, seed
WARM = 0.2  # of the time: libraries, caches and thread pools fill
MEASURES = 120
# Growth of the fitted line from WARM to the end. TensorStore's threads come and go: 11 to 19 were seen.
ALLOWED = {"megabytes": 16.0, "threads": 8.0, "files": 1.5}
M_ARENA_MAX = -8  # of glibc's malloc.h


class Usage(NamedTuple):
    """What the process holds."""

    seconds: float
    megabytes: float
    threads: float
    files: float


@dataclasses.dataclass
class Counts:
    """What has happened so far."""

    batches: int = 0
    epochs: int = 0
    loaders: int = 0
    saves: int = 0
    restores: int = 0
    outages: int = 0
    late_errors: int = 0
    kills: int = 0


def one_heap() -> None:
    """Has glibc keep one heap for all threads: else those of short-lived threads fill in steps, for minutes."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def usage(since: float) -> Usage:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    threads, files = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
    return Usage(time.monotonic() - since, megabytes, threads, files)


def growth(measured: list[Usage], name: str) -> float:
    """How much a line through the values after the warm-up rises: the median slope of all pairs, times the time.

    The Theil-Sen line: up to a quarter of wild values do not move it.
    """
    seconds = np.array([each.seconds for each in measured])
    values = np.array([getattr(each, name) for each in measured], float)
    warm = seconds >= WARM * seconds[-1]
    seconds, values = seconds[warm], values[warm]
    one, other = np.triu_indices(len(values), 1)
    slopes = (values[other] - values[one]) / (seconds[other] - seconds[one])
    return float(np.median(slopes) * (seconds[-1] - seconds[0]))


def leaks(measured: list[Usage]) -> list[str]:
    """What grew and should not have."""
    grown = {name: growth(measured, name) for name in ALLOWED}
    return [
        f"{name} grew by {grown[name]:.1f} after the warm-up, at most {most} are noise"
        for name, most in ALLOWED.items()
        if grown[name] > most
    ]


class Script:
    """Which samples must come, by `actstore.shuffle` alone."""

    def __init__(self, order: str, seed: int, settings: dict[str, Any]) -> None:
        sites = {site.name: site for site in SITES}
        names = settings.get("sites", [settings.get("site", "resid_post")])
        layers = 1 if {"layer", "site"} & set(settings) else len(settings.get("layers", ()))
        row_bytes = sum(sites[name].row_bytes * (layers or len(sites[name].layers or (0,))) for name in names)
        chunks = max(WINDOW_BYTES // 2 // (row_bytes * LAYOUT.chunk_samples), 1)  # the other half is read meanwhile
        self.settings, self._part = settings, settings.get("part", (0, 1))
        self._order = (
            BlockOrder(LAYOUT.samples, seed, LAYOUT.chunk_samples, chunks)
            if order == "block"
            else ExactOrder(LAYOUT.samples, seed, 4096)
        )
        self._rows = functools.lru_cache(maxsize=4)(self._order.rows)

    def samples(self, state: dict[str, Any]) -> list[int]:
        """Those of the batch that follows a state."""
        epoch, position = state["epoch"], state["position"]
        if position + BATCH > LAYOUT.samples:
            epoch, position = epoch + 1, 0
        number, parts = self._part
        position, last = (position + BATCH * edge // parts for edge in (number, number + 1))
        found: list[int] = []
        while position < last:
            start, stop = self._order.window_at(epoch, position)
            rows = self._rows(epoch, start, stop)[position - start : last - start]
            found += rows.tolist()
            position += len(rows)
        return found


class Soak:
    """One process that trains, and one that reads and is killed. `wrap` is what a test puts around each loader."""

    def __init__(self, folder: Path, seed: int, *, wrap: Callable[[Any], Any] = lambda loader: loader) -> None:
        one_heap()
        self._random, self._wrap = random.Random(seed), wrap
        self._rows = {site.name: _rows(site) for site in SITES}
        self._urls = {codec: self._write(folder / f"{codec}.acts.zarr", codec) for codec in CODECS}
        self._saved: dict[Case, list[str]] = {}
        self._weights: dict[int, np.ndarray] = {}
        self._reader: subprocess.Popen[bytes] | None = None
        self._kill_at: float | None = None
        self.counts = Counts()
        self.measured: list[Usage] = []

    def run(self, seconds: float) -> None:
        """Trains for some seconds; prints a line from time to time."""
        started = time.monotonic()
        said = 0.0
        try:
            while (now := time.monotonic() - started) < seconds:
                self._life()
                self._turn_reader()
                if now >= len(self.measured) * seconds / MEASURES:
                    self.measured.append(self._rest(started))
                if now >= said + min(seconds / 20, 15):
                    said = now
                    print(self._line(), flush=True)
        finally:
            if self._reader is not None:
                self._end_reader(self._reader)

    def result(self) -> dict[str, Any]:
        """Counts, what was measured, how much it grew, and what that means."""
        series = {name: [round(value, 1) for value in values] for name, values in _columns(self.measured).items()}
        grown = {name: round(growth(self.measured, name), 2) for name in ALLOWED}
        return {**dataclasses.asdict(self.counts), "measured": series, "grown": grown, "leaks": leaks(self.measured)}

    def _write(self, url: Path, codec: Any) -> Path:
        layout = dataclasses.replace(LAYOUT, codec=codec)
        with actstore.create(url, layout, {}) as writer:
            for block in range(layout.blocks):
                span = slice(*layout.block_range(block))
                writer.write(block, {name: rows[..., span, :] for name, rows in self._rows.items()})
        return url

    def _life(self) -> None:
        """One loader from its making to its end."""
        choose = self._random.choice
        case = (choose(CODECS), choose(list(CASES)), choose(["block", "exact"]), choose(range(3)))
        if self._saved and self._random.random() < 0.5:
            case = choose(list(self._saved))  # there is something to restore
        codec, name, order, seed = case
        store = actstore.open(self._urls[codec])
        given = {"batch_size": BATCH, "window_bytes": WINDOW_BYTES, "order": order, "seed": seed, **CASES[name]}
        loader, script = self._wrap(store.batches(**given)), Script(order, seed, CASES[name])
        self.counts.loaders += 1
        self._restore(loader, case)
        if self._random.random() < 0.2:
            self._outage(loader, script, self._urls[codec])
        for _ in range(min(int(self._random.expovariate(1 / 50)), 1000)):
            self._step(loader, script)
            chance = self._random.random()
            if chance < 0.01:
                saved = self._saved.setdefault(case, [])
                saved.append(json.dumps(loader.state()))
                del saved[:-5]
                self.counts.saves += 1
            elif chance < 0.02:
                self._restore(loader, case)
        if self._random.random() < 0.7:
            loader.close()  # else it is just forgotten, in the midst of reading ahead

    def _restore(self, loader: Any, case: Case) -> None:
        if saved := self._saved.get(case):
            loader.restore(json.loads(self._random.choice(saved)))
            self.counts.restores += 1

    def _step(self, loader: Any, script: Script) -> None:
        """One batch: the right one, and one step of training on it."""
        state = loader.state()
        try:
            batch = loader.next_batch()
        except CorruptStoreError:  # a window was read ahead while its shard was away: it is said once
            assert loader.state() == state
            self.counts.late_errors += 1
            batch = loader.next_batch()
        assert batch.samples.tolist() == script.samples(state), f"other samples after {state}"
        rows = batch.rows if isinstance(batch.rows, dict) else {"": batch.rows}
        expected = self._rows_of(script.settings, batch.samples)
        assert rows.keys() == expected.keys()
        for name, values in rows.items():
            assert values.tobytes() == expected[name].tobytes(), f"wrong rows {name} of {batch.samples[:3]}..."
        self.counts.batches += 1
        self.counts.epochs += loader.state()["epoch"] > state["epoch"]
        self._train(values.astype(np.float32).reshape(-1, values.shape[-1]))

    def _rows_of(self, settings: dict[str, Any], samples: np.ndarray) -> dict[str, np.ndarray]:
        """The rows in memory, by site, as a loader with these settings gives them. Labels of layers are indices."""
        if "layer" in settings or "site" in settings:
            name = settings.get("site", "resid_post")
            rows = self._rows[name]
            return {"": rows[samples] if rows.ndim == 2 else rows[settings["layer"]][samples]}
        found = {}
        for name in settings.get("sites", ["resid_post"]):
            rows = self._rows[name]
            layers = settings.get("layers", [0, 1, 2])
            found[name] = rows[samples] if rows.ndim == 2 else rows[layers][:, samples].swapaxes(0, 1)
        return found

    def _train(self, rows: np.ndarray) -> None:
        """A step towards the principal components: products of matrices, on every core."""
        weights = self._weights.setdefault(rows.shape[1], np.eye(rows.shape[1], dtype=np.float32))
        weights += 1e-3 / len(rows) * (rows.T @ (rows @ weights))
        weights /= np.linalg.norm(weights, axis=0) + 1e-6

    def _outage(self, loader: Any, script: Script, url: Path) -> None:
        """A shard is away: an error that changes nothing, as often as one asks; when it is back, it goes on."""
        name = script.settings.get("site", "resid_post")
        layer = script.settings.get("layer", 0)
        shard = url / name / "c" / ("" if name == "mlp_out" else f"{layer}") / f"{self._random.randrange(9)}/0"
        away = shard.with_suffix(".away")
        shard.rename(away)
        failed = False
        try:
            for _ in range(LAYOUT.samples // BATCH):
                state = loader.state()
                try:
                    batch = loader.next_batch()
                except CorruptStoreError:
                    failed = True
                    break
                assert batch.samples.tolist() == script.samples(state)
        finally:
            away.rename(shard)
        assert not failed or loader.state() == state
        if failed:  # not where few batches are left of the epoch
            self.counts.outages += 1
            self._step(loader, script)

    def _turn_reader(self) -> None:
        """Starts a process that reads the same stores; kills it some time after its first batch."""
        if self._reader is None:
            command = [sys.executable, "-m", "tests.soak", "--read", *map(str, self._urls.values())]
            self._reader, self._kill_at = subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE), None
            os.set_blocking(self._reader.stdout.fileno(), False)  # type: ignore[union-attr]
        elif self._reader.poll() is not None:
            raise AssertionError(f"the other reader ended by itself with {self._reader.returncode}")
        elif self._kill_at is None:
            if self._reader.stdout.read():  # type: ignore[union-attr]
                self._kill_at = time.monotonic() + 2 * self._random.random()
        elif time.monotonic() > self._kill_at:
            self._end_reader(self._reader)
            self.counts.kills += 1

    def _end_reader(self, reader: "subprocess.Popen[bytes]") -> None:
        with reader:
            reader.send_signal(signal.SIGKILL)
        self._reader = None

    def _rest(self, started: float) -> Usage:
        """What is held when every loader is closed or forgotten, and the last thread has had time to end."""
        gc.collect()
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any("actstore" in each.name for each in threading.enumerate()):
            time.sleep(0.005)
        return usage(started)

    def _line(self) -> str:
        last = self.measured[-1]
        counts = "  ".join(f"{name} {count:,}" for name, count in dataclasses.asdict(self.counts).items())
        return f"{last.seconds:5.0f} s  {counts}  {last.megabytes:.1f} MB  threads {last.threads}  files {last.files}"


def _rows(site: Site) -> np.ndarray:
    shape = (LAYOUT.samples, site.width) if site.layers is None else (len(site.layers), LAYOUT.samples, site.width)
    return np.random.default_rng(site.width).standard_normal(shape, np.float32).astype(np.dtype(site.dtype))


def _columns(measured: list[Usage]) -> dict[str, list[float]]:
    return {name: [getattr(each, name) for each in measured] for name in Usage._fields}


def read_for_ever(urls: list[Path]) -> None:
    """Reads the stores until it is killed; says so after the first batch. A shard that is away is waited for."""
    os.nice(10)
    said = False
    for turn in itertools.count():
        with actstore.open(urls[turn % len(urls)]).batches(
            layer=1, batch_size=BATCH, window_bytes=WINDOW_BYTES, epochs=2, order=("block", "exact")[turn % 2]
        ) as loader:
            try:
                for _ in loader:
                    if not said:
                        print("reading", flush=True)
                        said = True
            except StoreError:
                time.sleep(0.05)


def main() -> None:
    """Exits with 1 when something leaked."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=Path, nargs="+", metavar="URL", help="only read these: the process to kill")
    options = parser.parse_args()
    if options.read:
        read_for_ever(options.read)
    with tempfile.TemporaryDirectory(prefix="actstore-soak-") as name:
        soak = Soak(Path(name), options.seed)
        soak.run(60 * options.minutes)
    result = {"minutes": options.minutes, "seed": options.seed, **soak.result()}
    print(json.dumps(result))
    sys.exit(1 if result["leaks"] else 0)


if __name__ == "__main__":
    main()
