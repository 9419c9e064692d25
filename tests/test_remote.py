"""Remote stores without a fault: how few requests they take, the cache folder, zarr-python, and what is hostile.

`memory://` is TensorStore's own store in memory: the same code of ours as for buckets, in one process, no server.
Requests are counted by TensorStore, on a moto server (see `servers.moto` for its start-up).
"""

import dataclasses
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import xarray as xr
from servers.moto import moto
from servers.server import Missing
from stores import make_contents

import actstore
from actstore.errors import BucketError, CorruptStoreError, InputError, StorageError
from actstore.kvstore import Cache, Root
from actstore.kvstore.cache import PART

CONTENTS = make_contents()


@pytest.fixture
def url(request):
    """A finished store in memory, of its own for each test."""
    name = re.sub(r"\W", "-", request.node.name)[:80]
    url = f"memory://{name}/run.acts.zarr"
    write(url)
    return url


def write(url, contents=CONTENTS):
    with contents.create(url, seal=True) as writer:
        for number in range(contents.layout.blocks):
            activations, columns = contents.block(number)
            writer.write(number, activations, samples=columns)
    return url


@pytest.fixture(scope="module")
def bucket():
    """A moto server, and the environment to reach it."""
    try:
        with moto() as server, pytest.MonkeyPatch.context() as patch:
            for name, value in server.client_environ().items():
                patch.setenv(name, value)
            write(server.url("remote/run.acts.zarr"))
            yield server
    except Missing as error:
        pytest.skip(f"NOT CHECKED: {error}")


def requests() -> int:
    """HTTP requests of this process so far."""
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/http/request_started")
    return metric["values"][0]["value"]


def received() -> int:
    """Bytes of the answers to this process so far."""
    (metric,) = ts.experimental_collect_matching_metrics("/tensorstore/http/response_bytes")
    (found,) = metric["values"]
    return round(found["mean"] * found["count"])


def counted(work):
    before = requests()
    return work(), requests() - before


# Requests


def test_opening_and_a_sample_cost_few_requests(bucket):
    """Promised in the how-to page on buckets: at most 5 to open a store, at most 3 for a random sample."""
    url = bucket.url("remote/run.acts.zarr")
    dataset, opening = counted(lambda: xr.open_dataset(url))
    assert opening <= 5
    store, opening = counted(lambda: actstore.open(url))
    assert opening <= 5
    for sample in (7, 30, 52):
        rows, reading = counted(lambda sample=sample: dataset.resid_post.sel(layer=5).isel(sample=sample).values)
        assert reading <= 3, sample
        assert np.array_equal(rows, CONTENTS.rows["resid_post"][1, sample].astype(np.float32))
    _, again = counted(lambda: dataset.resid_post.sel(layer=5).isel(sample=6).values)
    assert again == 1  # its marker is known
    with store.batches(site="resid_post", layer=5, batch_size=53) as batches:
        rows, reading = counted(lambda: next(batches))
    markers, chunks = 2 * CONTENTS.layout.blocks, 14
    assert reading <= markers + chunks
    assert len(rows) == 53


def test_a_web_server_without_ranges_is_said_to_be_one(finished):
    """Not that a sound store is damaged."""
    from servers.server import free_port, running

    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", finished.parent]
    with running(command, port):
        dataset = actstore.open(f"http://127.0.0.1:{port}/{finished.name}").dataset()
        for read in (lambda: dataset.mlp_out.values, lambda: dataset.mlp_out.isel(sample=3).values):
            with pytest.raises(BucketError, match=r"the server does not answer ranges .* copy the whole folder"):
                read()


def test_a_folder_with_a_space_on_a_web_server(finished, tmp_path):
    from servers.static_http import static_http

    shutil.copytree(finished, tmp_path / "é 50%" / finished.name)
    with static_http(tmp_path) as server:
        url = server.url(f"%C3%A9%2050%25/{finished.name}")
        store = actstore.open(url)
        assert np.array_equal(store.dataset().mlp_out.values, CONTENTS.rows["mlp_out"].astype(np.float32))


def test_a_web_server_is_read_and_never_listed(finished, tmp_path):
    from servers.static_http import static_http

    with static_http(finished.parent) as server:
        url = server.url(finished.name)
        dataset = xr.open_dataset(url, engine="actstore")
        assert np.array_equal(dataset.mlp_out.values, CONTENTS.rows["mlp_out"].astype(np.float32))
        assert actstore.open(url).text([3])[0] == actstore.open(finished).text([3])[0]
        with pytest.raises(InputError, match="is on a web server, which cannot be listed, and this needs a list"):
            _ = actstore.open(url).committed
        with pytest.raises(
            InputError, match=r"is on a web server, which cannot be listed.*copy the store with `actstore copy`"
        ):
            actstore.open(url).verify()
        actstore.copy(url, tmp_path / "copied.acts.zarr")
        assert actstore.open(tmp_path / "copied.acts.zarr").verify().status == "complete"
        with pytest.raises(
            InputError, match=r"cannot write .*: web servers are only read; give gs://, s3:// or a path"
        ):
            CONTENTS.create(url)


# What is read is what was committed


def test_every_value_and_every_way_to_read(url):
    store = actstore.open(url)
    for opened in (store.dataset(raw=True), xr.open_dataset(url, engine="actstore", raw=True)):
        for name, rows in CONTENTS.rows.items():
            assert np.array_equal(opened[name].values.view(np.uint8), np.ascontiguousarray(rows).view(np.uint8)), name
        for name, values in CONTENTS.columns.items():
            assert np.array_equal(opened[name].values, values), name
    assert store.stats(layer=5).samples == 53
    assert store.documents.strings("text") == list(CONTENTS.documents.texts)


def test_a_writer_says_what_sending_whole_shards_takes(tmp_path):
    """Four shards are encoded at once, and are in memory once more until they are sent."""
    here, away = CONTENTS.create(tmp_path / "run.acts.zarr"), CONTENTS.create("memory://announced/run.acts.zarr")
    shard_bytes = max(site.row_bytes for site in CONTENTS.layout.sites) * CONTENTS.layout.block_samples
    assert away.memory_bytes - here.memory_bytes == 2 * 4 * shard_bytes
    for writer in (here, away):
        writer.close()


def test_memory_holds_its_own_bytes():
    """What was written is not what the caller has: it may be filled with the next block."""
    url, contents = "memory://own/run.acts.zarr", make_contents()
    with contents.create(url, seal=True) as writer:
        for number in range(contents.layout.blocks):
            activations, columns = contents.block(number)
            given = {name: np.ascontiguousarray(rows) for name, rows in activations.items()}
            writer.write(number, given, samples=columns).result()
            for rows in given.values():
                rows[...] = 0
    assert np.array_equal(xr.open_dataset(url, engine="actstore").mlp_out.values, CONTENTS.rows["mlp_out"].astype("f4"))


KEY = "resid_post/c/1/2/0"


def damaged(root, how):
    data = bytearray(root.read(KEY))
    if how == "flip":
        data[5] ^= 1
        root.write(KEY, bytes(data))
    elif how == "short":
        root.write(KEY, bytes(data[:40]))
    elif how == "another":
        root.write(KEY, root.read("resid_post/c/0/2/0"))
    elif how == "missing":
        root.delete(KEY)
    elif how == "empty":
        root.write(KEY, b"")


@pytest.mark.parametrize("how", ["flip", "short", "another", "missing", "empty"])
def test_a_damaged_object_is_an_error_that_names_it(url, how, tmp_path):
    damaged(Root.of(url), how)
    for cache in (None, tmp_path):
        dataset = actstore.open(url, cache=cache).dataset()
        with pytest.raises(CorruptStoreError, match=r"resid_post, layer 5, block 2 of memory://.*repair"):
            _ = dataset.resid_post.sel(layer=5).isel(sample=33).values
        assert dataset.resid_post.sel(layer=5).isel(sample=1).values.shape == (6,)


def test_an_object_that_is_larger_than_its_rows_costs_no_more(url):
    """Only the wanted bytes are asked for: what a stranger put behind them is not read."""
    root = Root.of(url)
    root.write("resid_post_norm/c/1/0", root.read("resid_post_norm/c/1/0") + bytes(1 << 20))
    norms = actstore.open(url).dataset().resid_post_norm.sel(layer=5).isel(sample=3).values
    assert norms == np.linalg.norm(CONTENTS.rows["resid_post"][1, 3].astype(np.float64)).astype(np.float32)


def test_small_objects_that_are_large_are_not_read(url):
    Root.of(url).write(".act/plan.json", bytes((16 << 20) + 1))
    with pytest.raises(
        CorruptStoreError, match=r"plan.json has more than 16,777,216 bytes, expected at most .* not read"
    ):
        actstore.open(url)


def test_a_column_without_a_marker_is_not_read_whole(url):
    """What is not compared goes through TensorStore, which reads an object whole: its size is asked for before."""
    root = Root.of(url)
    root.write("score/c/0", bytes(1 << 20))
    with pytest.raises(CorruptStoreError, match=r"score/c/0 has more than 68 bytes"):
        _ = actstore.open(url).dataset(check=False).score.values


# zarr-python


def test_plain_xarray_and_zarr_read_a_remote_store(url):
    import zarr

    store = actstore.zarr_store(url)
    plain = xr.open_zarr(store)
    assert np.array_equal(plain.resid_post.astype(np.float32).values, CONTENTS.rows["resid_post"].astype(np.float32))
    assert np.array_equal(plain.document.values, CONTENTS.columns["document"])
    group = zarr.open_group(store, mode="r")
    names = {name for name, _ in group.arrays()}
    assert names == {"valid", *actstore.open(url).dataset().variables} - {"row"}
    assert np.array_equal(group["final_norm"][3:9], CONTENTS.rows["final_norm"][3:9])
    assert store == actstore.zarr_store(url) != actstore.zarr_store(f"{url}2")
    with pytest.raises(ValueError, match="Store is read-only but mode is"):
        zarr.open_group(store, mode="r+")


# The cache folder


def test_what_was_read_is_read_from_the_folder(bucket, tmp_path):
    url = bucket.url("remote/run.acts.zarr")
    first = actstore.open(url, cache=tmp_path / "near").dataset()
    rows, fetched = counted(lambda: first.resid_post.values)
    assert fetched > 8
    again = actstore.open(url, cache=tmp_path / "near").dataset()
    same, fetched = counted(lambda: again.resid_post.values)
    assert fetched == 2 * CONTENTS.layout.blocks  # the markers, which say what is right
    assert np.array_equal(rows, same)
    assert 0 < Cache(tmp_path / "near").size < 2 * CONTENTS.layout.data_bytes


def test_a_cache_costs_compressed_stores_no_request_and_no_byte(bucket, tmp_path):
    """Where their chunks lie is not known: they are read as without a cache."""
    contents = make_contents(dataclasses.replace(CONTENTS.layout, codec="zstd"))
    url = write(bucket.url("compressed/run.acts.zarr"), contents)
    costs = {}
    for cache in (None, tmp_path):
        dataset, before = actstore.open(url, cache=cache).dataset(), received()
        rows, some = counted(lambda dataset=dataset: dataset.mlp_out.isel(sample=[3, 30]).values)
        everything, fetched = counted(lambda dataset=dataset: dataset.mlp_out.values)
        costs[cache] = (some, fetched, received() - before)
        assert np.array_equal(rows, contents.rows["mlp_out"][:, [3, 30]].astype(np.float32))
        assert np.array_equal(everything, contents.rows["mlp_out"].astype(np.float32))
    assert costs[tmp_path] == costs[None]


def test_a_damaged_file_of_the_folder_is_fetched_again(url, tmp_path):
    expected = actstore.open(url, cache=tmp_path).dataset().resid_post.values
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path]
    assert files
    for number, path in enumerate(files):
        data = path.read_bytes()
        path.write_bytes([data[:-1], b"", bytes(len(data))][number % 3])
    assert np.array_equal(actstore.open(url, cache=tmp_path).dataset().resid_post.values, expected)
    assert np.array_equal(actstore.open(url, cache=tmp_path).dataset().resid_post.values, expected)


def test_what_is_damaged_at_its_source_is_never_kept(url, tmp_path):
    damaged(Root.of(url), "flip")
    with pytest.raises(CorruptStoreError):
        _ = actstore.open(url, cache=tmp_path).dataset().resid_post.sel(layer=5).values
    with pytest.raises(CorruptStoreError):
        _ = actstore.open(url, cache=tmp_path).dataset().resid_post.sel(layer=5).values


def test_a_repaired_store_is_not_read_from_what_was_kept_before(url, tmp_path):
    before = actstore.open(url, cache=tmp_path).dataset().attn_out.values
    other = make_contents(seed=1)
    assert other.plan.fingerprint == CONTENTS.plan.fingerprint  # another mesh, other low bits: the same plan
    root = Root.of(url)
    for key in [key for key in root.keys(".act/") if "SEALED" in key or "commits" in key]:
        root.delete(key)
    root.delete("zarr.json")
    write(url, other)
    after = actstore.open(url, cache=tmp_path).dataset().attn_out.values
    assert np.array_equal(after, other.rows["attn_out"].astype(np.float32))
    assert not np.array_equal(after, before)


def test_the_folder_is_bounded_and_forgets_what_was_used_longest_ago(tmp_path):
    most, size = 64 << 10, 1 << 10
    cache, buffer = Cache(tmp_path, most), np.empty(size, np.uint8)
    for number in range(200):
        cache.write(f"chunk {number}", np.full(size, number, np.uint8))
        time.sleep(0.001)  # the file system's clock
        assert cache.size <= most
    assert cache.read("chunk 199", buffer)
    assert (buffer == 199).all()
    assert not cache.read("chunk 0", buffer)
    assert not cache.read("chunk 199", np.empty(size - 1, np.uint8))
    cache.write("large", np.zeros(most // PART + 1, np.uint8))
    assert not cache.read("large", np.empty(most // PART + 1, np.uint8))


def test_several_processes_share_a_folder(tmp_path):
    """Each writes 8 times what the folder may hold, and reads what any of them wrote: all of it right."""
    program = (
        "import sys, numpy as np\n"
        "from actstore.kvstore import Cache\n"
        "cache, found = Cache(sys.argv[1], 1 << 20), 0\n"
        "for number in np.random.default_rng(int(sys.argv[2])).integers(0, 1024, 4000).tolist():\n"
        "    buffer = np.empty(8192, np.uint8)\n"
        "    if cache.read(f'chunk {number}', buffer):\n"
        "        assert (buffer == number % 251).all()\n"
        "        found += 1\n"
        "    else:\n"
        "        cache.write(f'chunk {number}', np.full(8192, number % 251, np.uint8))\n"
        "print(found)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    found = [int(process.communicate(timeout=120)[0]) for process in running]
    assert all(process.returncode == 0 for process in running)
    assert min(found) > 100
    assert Cache(tmp_path).size <= (1 << 20) * (1 + 3 / PART)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_that_cannot_be_written_any_more_is_said_once(url, tmp_path, caplog):
    store = actstore.open(url, cache=tmp_path / "near")
    (tmp_path / "near").rmdir()
    (tmp_path / "near").write_text("in the way")
    with caplog.at_level(logging.WARNING, "actstore.storage"):
        rows = store.dataset().resid_post.values
    assert np.array_equal(rows, CONTENTS.rows["resid_post"].astype(np.float32))
    (line,) = caplog.messages
    assert re.fullmatch(r"storage: the cache .*near is not used any more: Not a directory", line)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cache_bytes": 0}, InputError, "cache_bytes is 0; expected a positive number of bytes"),
        ({"cache": "file/inside"}, StorageError, "cannot be made: Not a directory; name another, or none"),
    ],
    ids=["bytes", "a file"],
)
def test_a_cache_that_cannot_be_is_refused(url, tmp_path, monkeypatch, settings, error, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(error, match=message):
        actstore.open(url, **{"cache": "near", **settings})


def test_a_bound_without_a_cache_is_refused(url):
    with pytest.raises(
        InputError, match=r"found cache_bytes 1000000 without cache; expected the folder too: give cache="
    ):
        actstore.open(url, cache_bytes=1_000_000)


def test_a_cache_that_would_keep_nothing_is_refused(url, tmp_path, monkeypatch):
    layout = CONTENTS.layout
    chunks = [site.row_bytes * layout.chunk_samples for site in layout.sites]
    chunks += [CONTENTS.columns[column.name].itemsize * layout.block_samples for column in layout.columns]
    least, said = (
        PART * max(chunks),
        "may hold {:,} bytes; expected at least {:,} for the chunks of memory://.*: give more",
    )
    with pytest.raises(InputError, match=said.format(least - 1, least)):
        actstore.open(url, cache=tmp_path, cache_bytes=least - 1)
    _ = actstore.open(url, cache=tmp_path, cache_bytes=least).dataset().resid_post.values
    assert Cache(tmp_path).size > 0
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path))
    monkeypatch.setenv("ACTSTORE_CACHE_BYTES", "5")
    for read in (actstore.open, xr.open_dataset):
        with pytest.raises(InputError, match=said.format(5, least)):
            read(url)


def test_a_cache_for_a_local_store_is_refused(finished, tmp_path):
    with pytest.raises(InputError, match="is local; expected a remote store to keep chunks of: leave the cache out"):
        actstore.open(finished, cache=tmp_path)


def test_a_cache_comes_from_the_environment_too(url, tmp_path, monkeypatch):
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path / "near"))
    monkeypatch.setenv("ACTSTORE_CACHE_BYTES", "many")
    with pytest.raises(InputError, match="ACTSTORE_CACHE_BYTES is 'many'; expected a number of bytes"):
        actstore.open(url)
    monkeypatch.setenv("ACTSTORE_CACHE_BYTES", "1000000")
    _ = xr.open_dataset(url, engine="actstore").resid_post.values
    assert Cache(tmp_path / "near").size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["near"]
