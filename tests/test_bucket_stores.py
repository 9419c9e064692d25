"""A store in a bucket, from four writers of which one dies to every kind of reader, on every server."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from bucket_processes import LAYOUT, Processes, as_files, small_contents, stored, values
from kill_points import check_kept
from servers.everywhere import SERVERS, Reached
from servers.server import Server
from servers.static_http import static_http
from stores import tree

import actstore

pytestmark = pytest.mark.slow  # of the protocol and not of the Python


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one writer leaves in a folder of this machine."""
    url = tmp_path_factory.mktemp("local") / "run.acts.zarr"
    small_contents().write(url)
    return tree(url)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, reached: Reached) -> Iterator[Server]:
    with reached(request.param) as found:
        yield found


@pytest.mark.sampled(2)
def test_four_writers_of_which_one_is_killed_leave_what_every_reader_reads(
    server: Server, processes: Processes, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    key = "four/run.acts.zarr"
    killed_at = "after write valid/c/1"  # all of block 1 but its marker
    started = [
        processes.start(server, "write", key, blocks=[block], seal=False, kill_at=killed_at)
        for block in range(LAYOUT.blocks)
    ]
    assert sum(processes.wait(process).killed for process in started) == 1
    marked = check_kept(as_files(stored(server, key), tmp_path / "killed"), small_contents(), whole)
    assert marked == {0, 2, 3}
    assert processes.value(server, "committed", key) == [0, 2, 3]
    assert processes.value(server, "write", key) == [1]  # and seals
    assert processes.value(server, "check", key) == "complete"
    found = {name: data for name, data in stored(server, key).items() if not name.startswith(".act/probes/")}
    assert found.keys() == whole.keys()
    assert found == whole
    assert processes.value(server, "read", key) == "right"
    check_readers(server, key)
    check_copies(server, key, tmp_path, whole)


def test_a_plain_web_server_is_enough_to_read(tmp_path: Path, processes: Processes) -> None:
    """`http://`: no list, no writing."""
    small_contents().write(tmp_path / "run.acts.zarr")
    with static_http(tmp_path) as server:
        assert processes.value(server, "read", "run.acts.zarr") == "right"
        unlisted = processes.run(server, "check", "run.acts.zarr")  # shards that are too many are found by a list
        assert (unlisted.error, unlisted.exit_code) == ("InputError", 2)
        assert "which cannot be listed" in unlisted.message
        decoded = xr.open_dataset(server.url("run.acts.zarr"))
        assert np.array_equal(decoded.resid_post.values, small_contents().rows["resid_post"].astype(np.float32))
        refused = processes.run(server, "write", "other.acts.zarr")
        assert (refused.error, refused.exit_code) == ("InputError", 2)
        assert "web servers are only read" in refused.message


def check_readers(server: Server, key: str) -> None:
    """xarray, zarr-python and TensorStore give every bit that was written."""
    contents, url = small_contents(), server.url(key)
    rows = contents.rows["final_norm"]
    raw = actstore.open(url).dataset(raw=True)
    decoded = xr.open_dataset(url)
    for name, expected in {**contents.rows, **contents.columns}.items():
        assert values(server, key, name).tobytes() == expected.tobytes()
        assert raw[name].values.tobytes() == expected.tobytes()
        assert np.array_equal(decoded[name].values, expected.astype(decoded[name].dtype))
    assert raw.final_norm.isel(sample=[7, 2, 14]).values.tobytes() == rows[[7, 2, 14]].tobytes()
    plain = zarr.open_group(actstore.zarr_store(url), mode="r")
    for name, expected in {**contents.rows, **contents.columns}.items():
        found = plain[name][...]
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
    for name, expected in contents.columns.items():
        assert np.array_equal(xr.open_zarr(actstore.zarr_store(url))[name].values, expected)


def check_copies(server: Server, key: str, folder: Path, whole: dict[str, bytes]) -> None:
    """To a folder and from there to another key: the same bytes."""
    near, far = folder / "copied.acts.zarr", f"copied/{Path(key).name}"
    actstore.copy(server.url(key), near)
    assert tree(near) == whole
    actstore.copy(near, server.url(far))
    assert {name: data for name, data in stored(server, far).items() if "/probes/" not in name} == whole
