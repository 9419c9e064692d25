"""What a loader holds in memory, as the system counts it, beside what it promises: window + 3 batches + 100 MB."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np
import pytest
from benchmarks.growth import sparse_store
from watched import WATCH

import actstore
from actstore import Layout, Site

WINDOW, BATCH, ROOM = 48 << 20, 2048, 100_000_000
SITES = (Site("resid_post", 1024, (0,)), Site("mlp_out", 1024, (0,)))
LAYOUT = Layout(SITES, 60_000, 8192, 256, ())  # 123 MB a site: five half windows, seven of both sites

READ = (
    WATCH
    + """
import actstore

url, settings, seconds, keep = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "keep"
store, kept = actstore.open(url), []
with store.batches(**settings | {"window_bytes": 1, "batch_size": 1}) as small:
    next(small)  # libraries, TensorStore's threads
before = anonymous()
watching = threading.Thread(target=watch)
watching.start()
count = 0
with store.batches(**settings) as loader:
    for rows in loader:
        count += 1
        kept += [rows] if keep else []
        time.sleep(seconds)
done = True
watching.join()
print(json.dumps({"batches": count, "peak": peak[0] - before}))
"""
)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows with crc32c, which are mapped, and with zstd, which are not."""
    made, rng = {}, np.random.default_rng(0)
    rows = rng.standard_normal((8192, 1024), np.float32).astype(np.dtype("bfloat16"))[None]
    for codec in ("crc32c", "zstd"):
        made[codec] = tmp_path_factory.mktemp("memory") / f"{codec}.acts.zarr"
        with actstore.create(made[codec], Layout(SITES, 60_000, 8192, 256, (), codec), {}) as writer:
            for block in range(LAYOUT.blocks):
                start, stop = LAYOUT.block_range(block)
                writer.write(block, {site.name: rows[:, : stop - start] for site in SITES}).result()
    return made


def measured(url: Path, *, seconds: float = 0.0, keep: bool = False, **settings: object) -> dict[str, int]:
    """Batches, and the peak of this process's own memory above what it had before, of two epochs."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc/self/status here: the peak of memory is not measured")
    given = {"batch_size": BATCH, "window_bytes": WINDOW, "epochs": 2, **settings}
    command = [sys.executable, "-c", READ, str(url), json.dumps(given), str(seconds), "keep" if keep else "drop"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def promised(sites: int, window: int = WINDOW) -> int:
    return window + 3 * sites * BATCH * SITES[0].row_bytes + ROOM


CASES: dict[str, dict[str, object]] = {
    "one site": {"site": "resid_post"},
    "two sites": {"sites": ["resid_post", "mlp_out"]},
    "a slow consumer": {"site": "resid_post", "seconds": 0.02},
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["block", "exact"])
@pytest.mark.parametrize("codec", ["crc32c", "zstd"])
def test_a_loader_holds_what_it_promises(urls: dict[str, Path], codec: str, order: str, case: str) -> None:
    found = measured(urls[codec], order=order, **CASES[case])  # type: ignore[arg-type]
    most = promised(2 if "sites" in CASES[case] else 1)
    print(f"{codec}, {order}, {case}: {found['peak'] / 1e6:.0f} MB of {most / 1e6:.0f} MB promised")
    assert found["batches"] == 2 * (60_000 // BATCH)
    assert found["peak"] <= most


@pytest.mark.parametrize("order", ["block", "exact"])
def test_a_large_window_is_two_halves(tmp_path: Path, order: str) -> None:
    """A third one, read before the first is given back, would be more than the room beside the window."""
    window = 320 << 20
    url = sparse_store(tmp_path / "holes.acts.zarr", Layout(SITES[:1], 300_000, 8192, 256, ()))  # 614 MB of holes
    found = measured(url, site="resid_post", order=order, window_bytes=window, check=False, seconds=0.005)
    print(f"{order}, {window >> 20} MiB: {found['peak'] / 1e6:.0f} MB of {promised(1, window) / 1e6:.0f} MB promised")
    assert found["peak"] <= promised(1, window)


def test_meta_windows_that_are_kept_would_be_found(urls: dict[str, Path]) -> None:
    """Two epochs of batches that a consumer keeps: what a loader would hold that forgot to drop its windows."""
    assert measured(urls["crc32c"], site="resid_post", keep=True)["peak"] > promised(1)
