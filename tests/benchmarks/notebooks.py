"""Reading as notebooks do, beside xarray-tensorstore, zarr-python and np.memmap: random rows, and a slice; memory.

`dataset.resid_post.isel(layer=..., sample=rows).values` of 4,096 rows, other rows in each turn, and of 117 MB in a row.
Everything is in the page cache. Each way gives bfloat16 and float32; those that know only one are cast by NumPy. First
the engine compares each chunk that holds one of the rows: that turn is reported by itself.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import xarray as xr

import actstore
from actstore import Layout, Site
from tests.benchmarks.timing import median_seconds, remove

WIDTHS = (896, 4096)
LAYERS, LAYER = (0, 1, 2, 3), 3
STORE_BYTES, SLICE_BYTES, ROWS = 940 << 20, 112 << 20, 4096
MEMMAP = "np.memmap"
Read = Callable[[np.ndarray | slice], np.ndarray]


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """Milliseconds of random rows and GB/s of a slice, by width, dtype and way; and the memory of each."""
    found: dict[str, object] = {}
    for width in WIDTHS:
        store, flat = folder / f"notebooks-{width}.acts.zarr", folder / f"notebooks-{width}.flat"
        samples = write(store, flat, width)
        found[f"{width} wide"] = one_width(store, flat, width, samples, repeats)
        found[f"{width} wide, memory"] = memory(store, flat, width)
        remove(store)
        remove(flat)
    return {"notebooks": found}


def write(store: Path, flat: Path, width: int) -> int:
    """A store of four layers, and the layer that is read as a plain file; the number of samples."""
    layout = Layout.fit(
        [Site("resid_post", width, LAYERS)], samples=STORE_BYTES // (2 * width * len(LAYERS)), columns=()
    )
    generator = np.random.default_rng(0)
    with actstore.create(store, layout, {}) as writer, flat.open("wb") as file:
        for number in range(layout.blocks):
            first, last = layout.block_range(number)
            rows = generator.standard_normal((len(LAYERS), last - first, width), np.float32).astype(ml_dtypes.bfloat16)
            writer.write(number, {"resid_post": rows}).result()
            rows[LAYER].view(np.uint16).tofile(file)
    return layout.samples


def ways(store: Path, flat: Path, width: int) -> dict[str, dict[str, Read]]:
    """By dtype and name: reads samples of one layer."""
    memmap = np.memmap(flat, ml_dtypes.bfloat16, "r").reshape(-1, width)
    datasets = {
        "zarr-python": xr.open_zarr(store, chunks=None),
        "actstore": xr.open_dataset(store, raw=True, engine="actstore"),
        "actstore, check=False": xr.open_dataset(store, raw=True, check=False, engine="actstore"),
    }
    try:
        import xarray_tensorstore

        datasets["xarray-tensorstore"] = xarray_tensorstore.open_zarr(str(store))
    except ImportError as error:
        print(f"notebooks  NOT MEASURED: xarray-tensorstore: {error}", flush=True)
    wide = {
        name: xr.open_dataset(store, check=check, engine="actstore")
        for name, check in {"actstore": True, "actstore, check=False": False}.items()
    }
    raw: dict[str, Read] = {name: reader(dataset) for name, dataset in datasets.items()}
    raw[MEMMAP] = lambda rows: np.array(memmap[rows])
    cast: dict[str, Read] = {name: widened(read) for name, read in raw.items()}
    return {"bfloat16": raw, "float32": cast | {name: reader(dataset) for name, dataset in wide.items()}}


def reader(dataset: xr.Dataset) -> Read:
    return lambda rows: dataset.resid_post.isel(layer=LAYER, sample=rows).values


def widened(read: Read) -> Read:
    return lambda rows: read(rows).astype(np.float32)


def one_width(store: Path, flat: Path, width: int, samples: int, repeats: int) -> dict[str, dict[str, float]]:
    """Medians of all ways, taken turn by turn, and their ratios to np.memmap; printed."""
    generator, found = np.random.default_rng(1), {}
    span = slice(0, SLICE_BYTES // (2 * width))
    for dtype, of in ways(store, flat, width).items():
        for name, read in of.items():
            started = time.perf_counter()
            read(generator.choice(samples, ROWS, replace=False))
            found[f"{dtype}, {name}"] = {"first rows ms": (time.perf_counter() - started) * 1e3}
        rows = median_seconds(
            {name: lambda read=read: read(generator.choice(samples, ROWS, replace=False)) for name, read in of.items()},
            repeats=3 * repeats,
        )
        slices = median_seconds({name: lambda read=read: read(span) for name, read in of.items()}, repeats=repeats)
        for name in of:
            line = found[f"{dtype}, {name}"]
            line |= {"rows ms": rows[name] * 1e3, f"rows, {MEMMAP} is 1": rows[name] / rows[MEMMAP]}
            line |= {
                "slice GB/s": SLICE_BYTES / slices[name] / 1e9,
                f"slice, {MEMMAP} is 1": slices[name] / slices[MEMMAP],
            }
            found[f"{dtype}, {name}"] = line = {key: round(value, 2) for key, value in line.items()}
            print(f"notebooks {width:>5}  {dtype:<8}  {name:<22} {line}", flush=True)
    return found


MEASURE = """
import json, re, sys, threading, time
from pathlib import Path

import numpy as np

from tests.benchmarks import notebooks


def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


store, flat, width, dtype, name = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
read = notebooks.ways(store, flat, width)[dtype][name]
samples = flat.stat().st_size // (2 * width)
read(np.arange(0, samples, 3)[:64])  # all libraries are in memory before it counts
shares = {}
cases = {"rows": np.random.default_rng(0).permutation(samples)[: samples // 4],
         "slice": slice(0, notebooks.SLICE_BYTES // (2 * width))}
for case, chosen in cases.items():
    before, peak, reading = status("RssAnon"), 0, True

    def look():
        global peak
        while reading:
            peak = max(peak, status("RssAnon"))
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    found = read(chosen)
    peak = max(peak, status("RssAnon"))
    reading = False
    thread.join()
    shares[case] = round((peak - before) / found.nbytes, 2)
    del found
print(json.dumps(shares))
"""


def memory(store: Path, flat: Path, width: int) -> dict[str, dict[str, float]]:
    """Growth of a process's own memory while it reads, as a share of the result; each way in a process of its own."""
    found = {}
    for dtype, of in ways(store, flat, width).items():
        for name in of:
            command = [sys.executable, "-W", "ignore", "-c", MEASURE, store, flat, str(width), dtype, name]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[f"{dtype}, {name}"] = json.loads(told)
            print(f"notebooks {width:>5}  memory, result is 1  {dtype:<8}  {name:<22} {told.strip()}", flush=True)
    return found
