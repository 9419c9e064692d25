"""Rows straight out of shards, beside the way of every other store; what is announced; how many files are open."""

import dataclasses
import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import LAYOUT, Contents, make_contents

import actstore
from actstore import Layout, Site
from actstore.errors import CorruptStoreError
from actstore.gather import Source, gather
from actstore.kvstore import Root
from actstore.mapped import AHEAD_BYTES, REQUEST_BYTES, RUN_BYTES, MappedRows, _ahead, _Shard
from actstore.moments import as_integers
from actstore.vouchers import Vouchers

WIDE = Layout(  # chunks of 128 KiB and more: copied with a call each where much of them is wanted
    (Site("resid_post", 512, (0, 3)), Site("mlp_out", 512, (3,), "float16"), Site("attn_out", 512, None, "float32")),
    samples=1000, block_samples=384, chunk_samples=128, columns=(),
)  # fmt: skip
HUGE = Layout((Site("x", 2 * REQUEST_BYTES // 4 + 3, None, "float32"),), 7, 4, 2, ())  # a row of two requests
LAYOUTS = {"small": LAYOUT, "wide": WIDE, "huge": HUGE}


@pytest.fixture(scope="module", params=itertools.product(LAYOUTS, ["crc32c", "none"]), ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, Path]:
    name, codec = request.param
    contents = make_contents(dataclasses.replace(LAYOUTS[name], codec=codec), documents=False)
    return contents, contents.write(tmp_path_factory.mktemp("made") / "run.acts.zarr")


def mapped(url: Path, site: Site, layer: int = 0, *, check: bool = True) -> MappedRows:
    root, plan = Root.of(url), actstore.open(url).plan
    vouchers = Vouchers(root, plan) if check else None
    return MappedRows(root, Source.open(root, plan, site.name, vouchers=vouchers), site, layer)


def gathered(url: Path, site: Site, layer: int, samples: np.ndarray) -> bytes:
    out = np.empty((1, len(samples), site.width), site.dtype)
    root, plan = Root.of(url), actstore.open(url).plan
    gather(Source.open(root, plan, site.name, vouchers=None), [layer], samples, out)
    return out.tobytes()


def taken(rows: MappedRows, site: Site, samples: np.ndarray) -> bytes:
    out = as_integers(np.zeros((len(samples), site.width), site.dtype))
    rows.take(samples, out)
    return out.tobytes()


def copied(rows: MappedRows, site: Site, layout: Layout, chunks: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The samples of the chunks, and their bytes."""
    size = layout.chunk_samples
    samples = np.concatenate([np.arange(c * size, min((c + 1) * size, layout.samples)) for c in chunks.tolist()])
    out = as_integers(np.zeros((len(samples), site.width), site.dtype))
    rows.copy(chunks, out)
    return samples, out.tobytes()


def rows_of_all(layout: Layout) -> Iterator[tuple[Site, int]]:
    return ((site, layer) for site in layout.sites for layer in range(site.rows_per_sample))


def choices(count: int) -> dict[str, np.ndarray]:
    """Some of `count` things, ascending."""
    generator = np.random.default_rng(count)
    return {
        "all": np.arange(count),
        "one": np.array([count - 1]),
        "half": np.sort(generator.choice(count, count // 2, replace=False)),
        "few": np.sort(generator.choice(count, max(count // 20, 2), replace=False)),
    }


@pytest.mark.parametrize("check", [True, False])
def test_single_rows_are_those_of_gather(made: tuple[Contents, Path], check: bool) -> None:
    contents, url = made
    for site, layer in rows_of_all(contents.layout):
        rows = mapped(url, site, layer, check=check)
        for samples in choices(contents.layout.samples).values():
            assert taken(rows, site, samples) == gathered(url, site, layer, samples)


@pytest.mark.parametrize("check", [True, False])
def test_whole_chunks_are_those_of_gather(made: tuple[Contents, Path], check: bool) -> None:
    contents, url = made
    layout = contents.layout
    for site, layer in rows_of_all(layout):
        rows = mapped(url, site, layer, check=check)
        for chunks in choices(-(-layout.samples // layout.chunk_samples)).values():
            samples, found = copied(rows, site, layout, chunks)
            assert found == gathered(url, site, layer, samples)


def test_both_ways_to_copy_single_rows_are_taken() -> None:
    row_bytes = WIDE.sites[0].row_bytes
    assert WIDE.chunk_samples * row_bytes >= RUN_BYTES > LAYOUT.chunk_samples * LAYOUT.sites[0].row_bytes
    assert HUGE.sites[0].row_bytes > REQUEST_BYTES


# What is not in memory


def forget(url: Path) -> None:
    """Has the system write files and forget what is in them; what comes back must not depend on whether it does."""
    for path in url.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told what to read")
def test_rows_that_are_not_in_memory_are_the_same(made: tuple[Contents, Path]) -> None:
    contents, url = made
    layout = contents.layout
    for site, layer in list(rows_of_all(layout))[::3]:
        for samples in (choices(layout.samples)[kind] for kind in ("half", "few")):
            expected = gathered(url, site, layer, samples)
            forget(url / site.name)
            assert taken(mapped(url, site, layer), site, samples) == expected
        forget(url / site.name)
        chunks = np.arange(-(-layout.samples // layout.chunk_samples))
        samples, found = copied(mapped(url, site, layer), site, layout, chunks)
        assert found == gathered(url, site, layer, samples)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told what to read")
def test_what_is_announced_comes_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(4 * REQUEST_BYTES) + b"tail")
    forget(tmp_path)
    shard = _Shard.open(path, b"tail", length=4 * REQUEST_BYTES + 4)
    assert shard is not None
    places = np.arange(0, 3 * REQUEST_BYTES, 4096)
    if not shard.lacks(places[-1:]):
        pytest.skip("the system does not forget files here")
    shard.announce(0, 3 * REQUEST_BYTES)
    deadline = time.monotonic() + 30
    while shard.lacks(places) and time.monotonic() < deadline:  # nothing else reads it
        time.sleep(0.01)
    assert not shard.lacks(places)
    assert shard.lacks(np.array([4 * REQUEST_BYTES - 1]))


SIZES = st.lists(st.integers(1, 3 * AHEAD_BYTES // 2), max_size=40)


@given(sizes=SIZES, most=st.integers(1, 20))
def test_items_come_in_order_some_bytes_behind_what_is_announced(sizes: list[int], most: int) -> None:
    announced = 0

    def announce(item: int) -> int:
        nonlocal announced
        announced += 1
        return sizes[item]

    for place, item in enumerate(_ahead(range(len(sizes)), announce, most=most)):
        ahead = sizes[item + 1 : announced]
        assert place == item < announced
        assert len(ahead) < most
        assert sum(ahead[:-1]) < AHEAD_BYTES  # no more than is asked for
        assert announced == len(sizes) or sum(ahead) >= AHEAD_BYTES or len(ahead) == most - 1  # and no less
    assert announced == len(sizes)


# Files


def open_files(folder: Path) -> int:
    """How many files below a folder this process holds open: files of other threads come and go."""
    below = f"{folder.resolve()}{os.sep}"
    return sum(os.path.realpath(link).startswith(below) for link in Path("/proc/self/fd").iterdir())


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here: open files are not counted")


@needs_proc
def test_files_are_closed_with_the_rows_and_a_copy_opens_its_own(made: tuple[Contents, Path]) -> None:
    contents, url = made
    site, samples = contents.layout.sites[0], np.arange(contents.layout.samples)
    rows = mapped(url, site)
    expected = taken(rows, site, samples)
    with_rows = open_files(url)
    assert with_rows > 0
    copy = pickle.loads(pickle.dumps(rows))
    assert open_files(url) == with_rows
    assert taken(copy, site, samples) == expected
    assert open_files(url) == 2 * with_rows
    del copy
    assert open_files(url) == with_rows
    del rows
    assert open_files(url) == 0


FEW_FILES = """
import json, resource, sys
from pathlib import Path

import numpy as np

import actstore
from actstore import mapped

resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
mapped._most_open = {"ours": mapped._most_open, "all": lambda layout: 4096}[sys.argv[3]]
store, most, sums = actstore.open(sys.argv[1]), 0, []
for order in ("exact", "block"):
    with store.batches(batch_size=100, epochs=2, order=order, seed=0) as loader:
        total = 0.0
        for rows in loader:
            total += rows.astype(np.float64).sum()
            most = max(most, len(list(Path("/proc/self/fd").iterdir())))
    sums.append(total)
print(json.dumps({"most": most, "sums": sums}))
"""


def with_few_files(url: Path, files: int, kept: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FEW_FILES, str(url), str(files), kept]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Contents, Path]:
    contents = make_contents(Layout((Site("resid_post", 3, None, "float32"),), 600, 2, 1, ()), documents=False)
    return contents, contents.write(tmp_path_factory.mktemp("many") / "run.acts.zarr")


@needs_proc
def test_a_store_of_more_shards_than_a_process_may_open_files(many_shards: tuple[Contents, Path]) -> None:
    contents, url = many_shards
    done = with_few_files(url, 200, "ours")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sums"] == pytest.approx([2 * contents.rows["resid_post"].astype(np.float64).sum()] * 2)
    assert found["most"] < 200


@needs_proc
def test_meta_to_keep_all_shards_open_would_be_found(many_shards: tuple[Contents, Path]) -> None:
    done = with_few_files(many_shards[1], 200, "all")
    assert done.returncode != 0
    assert "Too many open files" in done.stderr


# Damage


SHARD = "resid_post/c/1/2/0"
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another's": lambda path: path.write_bytes(path.with_name("0").parent.parent.joinpath("1/0").read_bytes()),
}


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Contents, Path]:
    contents = make_contents(documents=False)
    return contents, contents.write(tmp_path / "run.acts.zarr")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("way", ["take", "copy"])
def test_a_wrong_shard_is_an_error_of_its_block(damaged: tuple[Contents, Path], way: str, damage: str) -> None:
    contents, url = damaged
    site, layout = contents.layout.sites[0], contents.layout
    DAMAGES[damage](url / SHARD)
    rows = mapped(url, site, 1)
    with pytest.raises(CorruptStoreError, match=r"resid_post, layer 5, block 2 of .*run `actstore verify`"):
        taken(rows, site, np.array([3, 33, 34])) if way == "take" else copied(rows, site, layout, np.array([0, 8, 9]))
    other = np.array([3, 20])
    assert taken(rows, site, other) == contents.rows["resid_post"][1, other].tobytes()


@pytest.mark.parametrize("way", ["take", "copy"])
def test_a_shard_that_was_repaired_is_read_again(damaged: tuple[Contents, Path], way: str) -> None:
    """The wrong file is open when the right one takes its place."""
    contents, url = damaged
    site, layout, path = contents.layout.sites[0], contents.layout, url / SHARD
    expected = contents.rows["resid_post"][1]
    whole, rows = url / "whole", mapped(url, site, 1)
    shutil.copy(path, whole)
    DAMAGES["another's"](path)
    with pytest.raises(CorruptStoreError):
        copied(rows, site, layout, np.array([8]))
    whole.replace(path)
    if way == "take":
        assert taken(rows, site, np.array([33, 34])) == expected[[33, 34]].tobytes()
    else:
        samples, found = copied(rows, site, layout, np.array([8, 9]))
        assert found == expected[samples].tobytes()


def test_a_flipped_bit_in_a_whole_chunk_is_found_and_in_a_single_row_is_not(damaged: tuple[Contents, Path]) -> None:
    contents, url = damaged
    site, layout = contents.layout.sites[0], contents.layout
    with (url / SHARD).open("r+b") as file:
        file.seek(3 * (layout.chunk_samples * site.row_bytes + 4))
        file.write(b"\xff")
    rows, first = mapped(url, site, 1), 2 * layout.block_samples
    with pytest.raises(CorruptStoreError, match="layer 5, block 2 "):
        copied(rows, site, layout, np.array([first // layout.chunk_samples + 3]))
    samples = np.arange(first, first + layout.block_samples)
    assert taken(rows, site, samples) != contents.rows["resid_post"][1, samples].tobytes()
