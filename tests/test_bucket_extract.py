"""`actstore extract` with a real model, straight into a bucket of each scheme: two workers, one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import xarray as xr
from bucket_processes import stored, values
from servers.everywhere import Reached
from servers.moto import NAME as MOTO
from servers.server import Server
from servers.strict_gcs import NAME as STRICT_GCS
from stores import tree

import actstore

pytestmark = pytest.mark.slow  # of the protocol and not of the Python

OPTIONS = [
    "--model", "tiny-qwen2", "--documents", "python-docs", "--limit", "12", "--layers", "1,3", "--context", "128",
    "--batch", "4", "--block-samples", "512",
]  # fmt: skip
ALONE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
OWN = (".act/probes/", ".act/claims/")  # of workers that died: no part of the store


def extract(url: str, *more: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "actstore", "extract", url, *OPTIONS, *more, "--json"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **ALONE, **(environ or {})},
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> dict[str, object]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker writes to a folder."""
    url = tmp_path_factory.mktemp("local") / "run.acts.zarr"
    finished(extract(str(url)))
    return tree(url)


@pytest.fixture(params=[MOTO, STRICT_GCS])
def server(request: pytest.FixtureRequest, reached: Reached) -> Iterator[Server]:
    with reached(request.param) as found:
        yield found


def committed(server: Server, key: str) -> int:
    return sum(name.startswith(".act/commits/") for name in stored(server, key))


@pytest.mark.sampled(2)
def test_workers_write_into_a_bucket_what_one_writes_into_a_folder(server: Server, whole: dict[str, bytes]) -> None:
    key = "extract/run.acts.zarr"
    workers = [extract(server.url(key), "--num-processes", "2", "--process-id", str(rank)) for rank in range(2)]
    deadline = time.monotonic() + 120
    while committed(server, key) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGKILL)
    workers[1].communicate()
    said = finished(extract(server.url(key)))  # whoever comes next does what the dead one left
    finished(workers[0])
    assert said["blocks"] == len([name for name in whole if name.startswith(".act/commits/")])
    found = {name: data for name, data in stored(server, key).items() if not name.startswith(OWN)}
    assert found.keys() == whole.keys()
    assert found == whole
    rows = values(server, key, "resid_post").astype(np.float32)
    assert np.array_equal(xr.open_dataset(server.url(key)).resid_post.values, rows)
    with actstore.open(server.url(key)).batches(layer=3, batch_size=256, seed=0, epochs=1) as batches:
        batch = batches.next_batch()
    assert np.array_equal(batch.rows.astype(np.float32), rows[1][batch.samples])
