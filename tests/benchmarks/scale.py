"""Stores of the largest size: opening one of 10^10 samples beside a tiny one, and listing 100,000 markers."""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import actstore
from actstore import Layout, Plan, Site
from actstore.commits import Marker
from actstore.kvstore import Root
from actstore.ledger import create_plan, write_assets
from actstore.markers import missing_blocks
from actstore.metadata import array_metadata, group_metadata
from actstore.sealing import create_nodes
from actstore.untrusted import canonical_json

SITE = Site("resid_post", 896, (6, 12))
SIZES = {"tiny": 10, "10^10 samples": 10**10}
MARKERS = 100_000


def measure(folder: Path, *, repeats: int) -> dict[str, object]:
    """Seconds and megabytes, each printed."""
    found: dict[str, object] = {}
    for name, samples in SIZES.items():
        url = without_data(folder / f"{samples}.acts.zarr", samples)
        seconds, megabytes = opening(url, repeats)
        found[f"open {name}"] = {"seconds": round(seconds, 4), "MB more": round(megabytes, 1)}
    url = with_markers(folder / "markers.acts.zarr", MARKERS)
    root = Root.of(url)
    plan = actstore.open(url, partial=True).plan
    left, seconds = timed(lambda: missing_blocks(root, plan), repeats)
    found[f"{MARKERS:,} markers"] = {"blocks left": len(left), "seconds to resume": round(seconds, 3)}
    for name, values in found.items():
        print(f"{'scale':<14} {name:<22} {values}")
    return found


def timed(work: Callable[[], list[int]], repeats: int) -> tuple[list[int], float]:
    """The result, and the median of the seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return result, statistics.median(seconds)


def opening(url: Path, repeats: int) -> tuple[float, float]:
    """Seconds to open a store with its dataset, and MB by which the process grew. The first time loads libraries."""
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for number in range(repeats + 1):
        started = time.perf_counter()
        store = actstore.open(url)
        assert store.dataset().sizes["sample"] == store.samples
        seconds += [time.perf_counter() - started] if number else []
    return statistics.median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def without_data(url: Path, samples: int) -> Path:
    """A store of one size."""
    return sealed(url, Layout((SITE,), samples, 65_536, 256))


def sealed(url: Path, layout: Layout) -> Path:
    """A store with all its metadata, complete, of which no row is there."""
    root, plan = Root.of(url), Plan.make(layout, {})
    create_plan(root, plan)
    write_assets(root, plan, {})
    create_nodes(root, plan)
    arrays = array_metadata(plan, complete=True)
    for name, metadata in arrays.items():
        root.write(f"{name}/zarr.json", canonical_json(metadata))
    root.write("zarr.json", canonical_json(group_metadata(plan, status="complete")))
    root.open_array("layer", arrays["layer"]).write(np.array(layout.sites[0].layers, np.int32)).result()
    return url


def with_markers(url: Path, count: int) -> Path:
    """An unfinished store of `count` committed blocks and one more."""
    layout = Layout((Site("resid_post", 8, None),), (count + 1) * 64, 64, 64, ())
    root, plan = Root.of(url), Plan.make(layout, {})
    create_plan(root, plan)
    create_nodes(root, plan)
    folder = url / ".act/commits"
    folder.mkdir(parents=True)
    digests = {"resid_post": ("0" * 32,), "resid_post_norm": ("0" * 32,)}
    for block in range(count):
        marker = Marker(
            format=1, block=block, samples=layout.block_range(block), fingerprint=plan.fingerprint, checksums=digests,
            chunks={"resid_post": ("0" * 8,)},
        )  # fmt: skip
        (folder / f"{block:08d}.json").write_bytes(marker.to_json())
    return url
