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
from actstore.mapped import AHEAD_BYTES, REQUEST_BYTES, ROW_BYTES, MappedRows, Shard, can_map, read_ahead
from actstore.rows import Memory
from actstore.vouchers import Vouchers

WIDE = Layout(  # chunks of 128 KiB and more: copied with a call each where much of them is wanted
    (Site("resid_post", 512, (0, 3)), Site("mlp_out", 512, (3,), "float16"), Site("attn_out", 512, None, "float32")),
    samples=1000, block_samples=384, chunk_samples=128, columns=(),
)  # fmt: skip
LARGE = Layout((Site("x", ROW_BYTES // 4, None, "float32"),), 47, 32, 16, ())  # a chunk of two requests
LAYOUTS = {"small": LAYOUT, "wide": WIDE, "large": LARGE}


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


def taken(rows: MappedRows, site: Site, samples: np.ndarray, *, whole: bool = False) -> bytes:
    found = rows.rows(samples, np.arange(len(samples)), Memory(), whole=whole)
    return found.taken(slice(None), site.dtype).tobytes()


def samples_of(layout: Layout, chunks: np.ndarray) -> np.ndarray:
    size = layout.chunk_samples
    return np.concatenate([np.arange(c * size, min((c + 1) * size, layout.samples)) for c in chunks.tolist()])


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


@pytest.mark.sampled(5)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("check", [True, False])
def test_rows_are_those_of_gather(made: tuple[Contents, Path], check: bool, whole: bool) -> None:
    contents, url = made
    layout = contents.layout
    for site, layer in rows_of_all(layout):
        rows = mapped(url, site, layer, check=check)
        chosen = [*choices(layout.samples).values()]
        chosen += [
            samples_of(layout, chunks) for chunks in choices(-(-layout.samples // layout.chunk_samples)).values()
        ]
        for samples in chosen:
            assert taken(rows, site, samples, whole=whole) == gathered(url, site, layer, samples)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("most", [1, 2, 4096])
def test_rows_of_more_shards_than_may_stay_mapped_are_the_same(
    made: tuple[Contents, Path], monkeypatch: pytest.MonkeyPatch, most: int, whole: bool
) -> None:
    """In any order, some of them more than once; memory is used again when nobody looks at it, and not before."""
    contents, url = made
    layout, memory, rng = contents.layout, Memory(), np.random.default_rng(0)
    monkeypatch.setattr("actstore.mapped._most_mapped", lambda layout: most)
    site = layout.sites[0]
    rows, held = mapped(url, site), []
    for _ in range(6):
        samples = np.sort(rng.choice(layout.samples, max(layout.samples * 2 // 3, 1), replace=False))
        places = rng.integers(0, len(samples), 2 * layout.samples)
        found = rows.rows(samples, places, memory, whole=whole)
        held = [*held[-1:], (found, gathered(url, site, 0, samples), places)]
        for view, expected, wanted in held:
            expected_rows = np.frombuffer(expected, f"V{site.row_bytes}")[wanted]
            assert view.taken(slice(None), site.dtype).tobytes() == expected_rows.tobytes()
            out = np.zeros((len(wanted), 2, site.width), site.dtype)
            view.copy(slice(3, None), out[3:, 1])
            assert out[3:, 1].tobytes() == expected_rows[3:].tobytes()
            assert not out[:3].any()
            assert not out[:, 0].any()


def test_no_rows_are_no_rows(made: tuple[Contents, Path]) -> None:
    contents, url = made
    site, none = contents.layout.sites[0], np.arange(0)
    assert mapped(url, site).rows(none, none, Memory()).taken(slice(None), site.dtype).shape == (0, site.width)


def test_a_chunk_of_two_requests_is_among_these() -> None:
    assert LARGE.chunk_samples * LARGE.sites[0].row_bytes > REQUEST_BYTES


def test_rows_that_are_too_large_are_read_as_in_every_store(tmp_path: Path) -> None:
    layout = Layout((Site("x", ROW_BYTES // 4 + 1, None, "float32"),), 7, 4, 2, ())
    contents = make_contents(layout, documents=False)
    store = actstore.open(contents.write(tmp_path / "run.acts.zarr"))
    assert not can_map(Root.of(tmp_path / "run.acts.zarr"), Source.open(store._root, store.plan, "x", vouchers=None))
    with store.batches(batch_size=7, site="x", epochs=1, seed=0) as loader:
        batch = loader.next_batch()
    np.testing.assert_array_equal(batch.rows, contents.rows["x"][batch.samples])


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
        samples = np.arange(layout.samples)
        found = taken(mapped(url, site, layer), site, samples, whole=True)
        assert found == gathered(url, site, layer, samples)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told what to read")
def test_what_is_announced_comes_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(4 * REQUEST_BYTES) + b"tail")
    forget(tmp_path)
    shard = Shard.open(path, b"tail", length=4 * REQUEST_BYTES + 4)
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

    for place, item in enumerate(read_ahead(range(len(sizes)), announce, most=most)):
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
@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_shard_is_an_error_of_its_block(damaged: tuple[Contents, Path], whole: bool, damage: str) -> None:
    contents, url = damaged
    site = contents.layout.sites[0]
    DAMAGES[damage](url / SHARD)
    rows = mapped(url, site, 1)
    with pytest.raises(CorruptStoreError, match=r"resid_post, layer 5, block 2 of .*run `actstore verify`"):
        taken(rows, site, np.array([3, 33, 34]), whole=whole)
    other = np.array([3, 20])
    assert taken(rows, site, other) == contents.rows["resid_post"][1, other].tobytes()


@pytest.mark.parametrize("whole", [True, False])
def test_a_shard_that_was_repaired_is_read_again(damaged: tuple[Contents, Path], whole: bool) -> None:
    """The wrong file is open when the right one takes its place."""
    contents, url = damaged
    site, path = contents.layout.sites[0], url / SHARD
    expected = contents.rows["resid_post"][1]
    sound, rows = url / "sound", mapped(url, site, 1)
    shutil.copy(path, sound)
    DAMAGES["another's"](path)
    with pytest.raises(CorruptStoreError):
        taken(rows, site, np.array([33]), whole=True)
    sound.replace(path)
    assert taken(rows, site, np.array([33, 34]), whole=whole) == expected[[33, 34]].tobytes()


def test_a_flipped_bit_in_a_whole_chunk_is_found_and_in_a_single_row_is_not(damaged: tuple[Contents, Path]) -> None:
    contents, url = damaged
    site, layout = contents.layout.sites[0], contents.layout
    with (url / SHARD).open("r+b") as file:
        file.seek(3 * (layout.chunk_samples * site.row_bytes + 4))
        file.write(b"\xff")
    rows, first = mapped(url, site, 1), 2 * layout.block_samples
    with pytest.raises(CorruptStoreError, match="layer 5, block 2 "):
        taken(rows, site, np.array([first + 3 * layout.chunk_samples]), whole=True)
    samples = np.arange(first, first + layout.block_samples)
    assert taken(rows, site, samples) != contents.rows["resid_post"][1, samples].tobytes()
