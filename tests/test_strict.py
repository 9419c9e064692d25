"""Strict reading: a missing, torn, flipped, swapped or stale shard is an error that names it, however it is read.

Every damage is a file of a sound store put in a wrong place, or broken. What was written, in memory, says which values
are right.
"""

import functools
import itertools
import json
import os
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import tensorstore as ts
import xarray as xr
from stores import Contents, make_contents, raw_tensorstore

import actstore
from actstore import Column, Layout, Site, cli, gather, vouchers
from actstore.errors import CorruptStoreError, StoragePermissionError

SITES = (
    Site("resid_pre", 4, (2, 7)), Site("resid_post", 4, (2, 7)), Site("embed", 3, None, "float32"),
    Site("final_norm", 3, None, "float32"),
)  # fmt: skip
COLUMNS = (*actstore.layout.DEFAULT_COLUMNS, Column("score", "float32"))
CODECS = ("crc32c", "none", "zstd")
BLOCKS = {0: (0, 8), 1: (8, 16), 2: (16, 22)}
REMEDY = "run `actstore verify`, then `actstore repair`"


def layout(codec="crc32c"):
    return Layout(SITES, samples=22, block_samples=8, chunk_samples=2, columns=COLUMNS, codec=codec)


def with_low_bits(contents):
    """The same run, but for the lowest bit of the first value of every array and layer in block 1."""
    changed = {name: values.copy() for name, values in (contents.rows | contents.columns).items()}
    for name, values in changed.items():
        bits = values.view(f"u{values.dtype.itemsize}")
        bits[(..., 8, 0) if name in contents.rows else 8] ^= 1
    rows = {name: changed[name] for name in contents.rows}
    return Contents(contents.layout, rows, {name: changed[name] for name in contents.columns}, contents.documents)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Per codec: what is stored, the store, one of another run, and one whose last bits differ."""
    folder = tmp_path_factory.mktemp("strict")

    @functools.cache
    def made(codec):
        ours = make_contents(layout(codec))
        kinds = {"ours": ours, "other": make_contents(layout(codec), seed=1), "bits": with_low_bits(ours)}
        return ours, {kind: store.write(folder / f"{codec}-{kind}.acts.zarr") for kind, store in kinds.items()}

    return made


@pytest.fixture
def copied(stores, tmp_path):
    """A store that may be damaged, with its relatives."""

    def make(codec="crc32c"):
        ours, paths = stores(codec)
        return ours, shutil.copytree(paths["ours"], tmp_path / "run.acts.zarr"), paths

    return make


def swap(first, second):
    ours, theirs = first.read_bytes(), second.read_bytes()
    assert ours != theirs
    first.write_bytes(theirs)
    second.write_bytes(ours)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


# name: what is done to the shard `key` of layer 7, block 1; the keys of all shards that are wrong then
SWAPS = {
    "another layer": lambda array: (f"{array}/c/0/1/0",),
    "another block": lambda array: (f"{array}/c/1/0/0", f"{array}/c/0/0"),
    "the short last block": lambda array: (f"{array}/c/1/2/0", f"{array}/c/2/0"),
    "another site": lambda array: ("resid_pre/c/1/1/0", "embed/c/1/0"),
}
BROKEN = {
    "bit flip": lambda path: flip(path, 3),
    "bit flip in the index": lambda path: flip(path, -30),
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
STALE = {"stale": "other", "low bit": "bits"}
KINDS = {"layered": ("resid_post", 7, "resid_post/c/1/1/0"), "layerless": ("final_norm", None, "final_norm/c/1/0")}


def damage(path, paths, what, key):
    """Damages the shard `key`; the keys of all shards that are wrong then."""
    if what in BROKEN:
        BROKEN[what](path / key)
    elif what in STALE:
        shutil.copy(paths[STALE[what]] / key, path / key)
    else:
        depth = key.count("/")
        other = next((name for name in SWAPS[what](key.split("/")[0]) if name.count("/") == depth), None)
        if other is None:
            pytest.skip("a layerless site has one layer")
        swap(path / key, path / other)
        return [key, other]
    return [key]


def parts(key):
    """Site, layer label and block of a shard."""
    site, _, *place = key.split("/")[: -1 if key.count("/") > 2 else None]
    return site, SITES[1].layers[int(place[0])] if len(place) == 2 else None, int(place[-1])


def named(key):
    site, layer, block = parts(key)
    return f"{site}{'' if layer is None else f', layer {layer}'}, block {block} of "


def of_layer(array, layer):
    return array if layer is None else array.sel(layer=layer)


READS = {
    "slice": lambda array, start, stop: array.isel(sample=slice(start, stop)),
    "one row": lambda array, start, stop: array.isel(sample=start),
    "scattered rows": lambda array, start, stop: array.isel(sample=[stop - 1, start, start + 3]),
    "every third row": lambda array, start, stop: array.isel(sample=slice(start, stop, 3)),
    "backwards": lambda array, start, stop: array.isel(sample=slice(stop - 1, start - 1 if start else None, -1)),
    "one value of each row": lambda array, start, stop: array[..., 1].isel(sample=slice(start, stop)),
    "pointwise": lambda array, start, stop: array.isel(sample=xr.DataArray([start + 1, start], dims="point")),
}
DATASETS = {
    "store": lambda path, **settings: actstore.open(path).dataset(**settings),
    "engine": lambda path, **settings: xr.open_dataset(path, engine="actstore", **settings),
    "raw": lambda path, **settings: actstore.open(path).dataset(raw=True, **settings),
}


def all_batches(path, site, layer, **settings):
    with actstore.open(path).batches(batch_size=5, site=site, layer=layer, epochs=1, **settings) as batches:
        return list(batches)


def message_of(read):
    with pytest.raises(CorruptStoreError) as caught:
        read()
    return str(caught.value)


def assert_errors_name(path, key):
    """Every way to read the shard `key` is an error that names it and says what to do."""
    site, layer, block = parts(key)
    arrays = {how: of_layer(opened(path)[site], layer) for how, opened in DATASETS.items()}
    reads = {how: functools.partial(read, arrays["store"], *BLOCKS[block]) for how, read in READS.items()}
    reads |= {how: functools.partial(array.isel, sample=slice(*BLOCKS[block])) for how, array in arrays.items()}
    for how, read in reads.items():
        message = message_of(lambda read=read: read().values)
        assert named(key) + str(path) in message, how
        assert message.endswith(REMEDY), how
        assert "\n" not in message, how


def assert_only_these_are_wrong(path, contents, wrong):
    """Reads that touch one of `wrong` are errors; everything else has its values."""
    for key in wrong:
        assert_errors_name(path, key)
    dataset = actstore.open(path).dataset(raw=True)
    for site in SITES:
        for index, layer in enumerate(site.layers or [None]):
            rows = contents.rows[site.name] if layer is None else contents.rows[site.name][index]
            array = of_layer(dataset[site.name], layer)
            here = {parts(key)[2]: named(key) for key in wrong if parts(key)[:2] == (site.name, layer)}
            sound = np.concatenate([np.arange(*span) for block, span in BLOCKS.items() if block not in here])
            np.testing.assert_array_equal(array.isel(sample=sound), rows[sound])
            if here:
                whole = message_of(functools.partial(getattr, array, "values"))
                batches = message_of(functools.partial(all_batches, path, site.name, layer))
                assert any(name in whole for name in here.values())
                assert any(name in batches for name in here.values())
            else:
                np.testing.assert_array_equal(array, rows)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [*SWAPS, *STALE, *BROKEN])
@pytest.mark.parametrize("codec", CODECS)
def test_a_wrong_shard_is_an_error_that_names_it(copied, codec, what, kind):
    contents, path, paths = copied(codec)
    wrong = damage(path, paths, what, KINDS[kind][2])
    assert_only_these_are_wrong(path, contents, wrong)


@pytest.mark.parametrize("codec", CODECS)
def test_every_way_to_read_a_sound_store_gives_its_values(stores, codec):
    """So that none of the reads above raises by itself."""
    contents, paths = stores(codec)
    assert_only_these_are_wrong(paths["ours"], contents, [])
    for (site, layer, _), (opener, opened) in itertools.product(KINDS.values(), DATASETS.items()):
        array = of_layer(opened(paths["ours"])[site], layer)
        rows = contents.rows[site] if layer is None else contents.rows[site][1]
        expected = xr.DataArray(rows.astype(np.float32), dims=array.dims)
        for (how, read), span in itertools.product(READS.items(), BLOCKS.values()):
            found = read(array, *span).values.astype(np.float32)
            np.testing.assert_array_equal(found, read(expected, *span), err_msg=f"{how} {opener}")
        assert sum(map(len, all_batches(paths["ours"], site, layer))) == 20


UNSEEN = [*SWAPS, *STALE]  # by any codec


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", UNSEEN)
@pytest.mark.parametrize("codec", CODECS)
def test_without_comparing_a_wrong_shard_is_readable(copied, codec, what, kind):
    """So it is the comparison with the markers that finds it."""
    contents, path, paths = copied(codec)
    site, layer, _ = KINDS[kind]
    damage(path, paths, what, KINDS[kind][2])
    rows = contents.rows[site] if layer is None else contents.rows[site][1]
    for opened in DATASETS.values():
        found = of_layer(opened(path, check=False)[site], layer).values
        assert not np.array_equal(found.astype(np.float32), rows.astype(np.float32))
    assert sum(map(len, all_batches(path, site, layer, check=False))) == 20


def test_without_comparing_a_flipped_bit_is_readable(copied):
    contents, path, _ = copied("none")
    flip(path / "resid_post/c/1/1/0", 3)
    found = actstore.open(path).dataset(raw=True, check=False).resid_post.values
    assert (found != contents.rows["resid_post"]).sum() == 1


def test_without_comparing_no_marker_is_read(copied):
    contents, path, _ = copied()
    shutil.rmtree(path / ".act/commits")
    found = actstore.open(path).dataset(raw=True, check=False)
    np.testing.assert_array_equal(found.resid_post, contents.rows["resid_post"])
    np.testing.assert_array_equal(found.score, contents.columns["score"])


def edit_marker(path, block, change):
    file = path / f".act/commits/{block:08d}.json"
    document = json.loads(file.read_bytes())
    change(document)
    file.write_text(json.dumps(document))


def test_stores_without_chunk_digests_are_read_as_before(copied):
    """Swaps of activations are then found by `verify` alone; those of norms and columns at reading too."""
    contents, path, paths = copied()
    for block in BLOCKS:
        edit_marker(path, block, lambda document: document.pop("chunks"))
    np.testing.assert_array_equal(actstore.open(path).dataset(raw=True).resid_post, contents.rows["resid_post"])
    damage(path, paths, "another layer", "resid_post/c/1/1/0")
    dataset = actstore.open(path).dataset()
    dataset.resid_post.load()
    all_batches(path, "resid_post", 7)
    swap(path / "resid_post_norm/c/1/1", path / "resid_post_norm/c/0/1")
    with pytest.raises(CorruptStoreError, match=r"resid_post_norm, layer 2, block 1 of "):
        dataset.resid_post_norm.load()


# Texts


def test_what_the_errors_say(copied):
    _, path, paths = copied()
    dataset = actstore.open(path).dataset()
    damage(path, paths, "low bit", "resid_post/c/1/1/0")
    damage(path, paths, "missing", "final_norm/c/2/0")
    damage(path, paths, "low bit", "score/c/1")
    shown = message_of(lambda: dataset.resid_post.sel(layer=7).isel(sample=8).values)
    assert re.sub(r"\b[0-9a-f]{8}(?=,|:)", "X", shown) == (
        f"resid_post, layer 7, block 1 of {path}: samples 8 to 9 have the checksum X, their commit marker has X: "
        f"swapped, stale or edited; {REMEDY}"
    )  # fmt: skip
    assert message_of(lambda: dataset.final_norm.isel(sample=21).values) == (
        f"could not read final_norm, block 2 of {path}: missing object at final_norm/c/2/0; {REMEDY}"
    )
    assert re.sub("[0-9a-f]{32}", "X", message_of(lambda: dataset.score.values)) == (
        f"score, block 1 of {path}: samples 8 to 15 have the checksum X, their commit marker has X: swapped, stale or "
        f"edited; {REMEDY}"
    )


def chunks_of(site, change):
    return lambda document: document["chunks"].update({site: change(document["chunks"][site])})


MARKERS = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is not valid JSON"),
    "of another block": (lambda path: shutil.copy(path.with_name("00000000.json"), path), "is of block 0"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), ""),
}
CHANGES = {
    "of another plan": (lambda document: document.update(fingerprint="0" * 64), "of plan 000000000000"),
    "of other samples": (lambda document: document.update(samples=[8, 15]), "vouches for samples (8, 15)"),
    "without a site": (lambda document: document["chunks"].pop("resid_post"), "does not vouch for every chunk of"),
    "a layer short": (chunks_of("resid_post", lambda layers: layers[:1]), "does not vouch for every chunk of"),
    "a chunk short": (
        chunks_of("resid_post", lambda layers: [layers[0], layers[1][8:]]),
        "does not vouch for every chunk of resid_post",
    ),
    "half a digest": (chunks_of("resid_post", lambda layers: [layers[0], layers[1][4:]]), "String should match"),
    "no norms": (lambda document: document["checksums"].pop("resid_post_norm"), "vouches for samples (8, 16) of"),
}  # fmt: skip


@pytest.mark.parametrize("what", [*MARKERS, *CHANGES])
def test_a_block_whose_marker_is_damaged_cannot_be_read(copied, what):
    contents, path, _ = copied()
    if what in MARKERS:
        change, problem = MARKERS[what]
        change(path / ".act/commits/00000001.json")
    else:
        change, problem = CHANGES[what]
        edit_marker(path, 1, change)
    dataset = actstore.open(path).dataset(raw=True)
    for name, label in {"resid_post": ", layer 2", "resid_post_norm": ", layer 2", "score": ""}.items():
        message = message_of(lambda name=name: dataset[name].isel(sample=9).values)
        start = f"{name}{label}, block 1 of {path} cannot be compared with its commit marker: "
        assert message.startswith(start)
        assert problem in message
        assert message.endswith(REMEDY)
        outside = dataset[name].isel(sample=np.r_[0:8, 16:22])
        expected = contents.rows.get(name, contents.columns.get(name))
        if expected is not None:
            axis = -2 if name in contents.rows else -1
            np.testing.assert_array_equal(outside, np.delete(expected, np.s_[8:16], axis))
    assert "block 1 of" in message_of(lambda: all_batches(path, "resid_post", 7))


def test_labels_of_layers_are_those_of_the_plan(copied):
    _, path, _ = copied()
    raw_tensorstore(path, "layer").write(np.array([7, 2], np.int32)).result()
    for opened in DATASETS.values():
        assert message_of(lambda opened=opened: opened(path)) == (
            f"layer of {path} has the labels [7, 2], the plan has [2, 7]; {REMEDY}"
        )
    assert "layer" not in xr.open_dataset(path, drop_variables="layer").coords


@pytest.fixture
def nobody():
    """This process as a user that files may be closed to: permissions do not hold root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


def test_a_refusing_storage_is_not_called_damage(copied, request):
    _, path, _ = copied()
    dataset = actstore.open(path).dataset()
    (path / "resid_post/c/1/1/0").chmod(0)
    request.getfixturevalue("nobody")
    expected = r"^could not read resid_post, layer 7, block 1 of .*check the permissions of the target$"
    with pytest.raises(StoragePermissionError, match=expected):
        _ = dataset.resid_post.sel(layer=7).isel(sample=8).values


# Norms, columns, texts, the command line

SMALL = {
    "norm": ("resid_post_norm", "resid_post_norm/c/1/1", "resid_post_norm, layer 7, block 1 of "),
    "layerless norm": ("final_norm_norm", "final_norm_norm/c/1", "final_norm_norm, block 1 of "),
    "document": ("document", "document/c/1", "document, block 1 of "),
    "position": ("position", "position/c/1", "position, block 1 of "),
    "score": ("score", "score/c/1", "score, block 1 of "),
}
OTHERS = {
    "another block": {name: f"{name}/c/0" for name in ("document", "position", "score", "final_norm_norm")}
    | {"resid_post_norm": "resid_post_norm/c/1/0"},
    "another layer": {"resid_post_norm": "resid_post_norm/c/0/1"},
    "another array": {
        "resid_post_norm": "resid_pre_norm/c/1/1", "final_norm_norm": "embed_norm/c/1", "document": "position/c/1",
        "position": "token_id/c/1",
    },
}  # fmt: skip
NOT_SHARDED = [what for what in BROKEN if what != "bit flip in the index"]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("what", [*OTHERS, *STALE, *NOT_SHARDED])
def test_a_wrong_chunk_of_a_small_array_is_an_error_that_names_it(copied, monkeypatch, capsys, what, name):
    contents, path, paths = copied()
    array, key, shown = SMALL[name]
    if what in OTHERS:
        if array not in OTHERS[what]:
            pytest.skip("there is none of its kind")
        swap(path / key, path / OTHERS[what][array])
    elif what == "low bit" and array.endswith("norm"):
        flip_stored_norm(path, array)
    else:
        damage(path, paths, what, key)
    store = actstore.open(path)
    reads = {
        "dataset": lambda: of_block(store.dataset()[array]).values,
        "one sample": lambda: of_block(store.dataset()[array])[..., 7].values,
        "some samples": lambda: of_block(xr.open_dataset(path)[array])[..., [4, 1]].values,
    }
    if array in contents.columns:
        reads["column"] = lambda: store.column(array, np.array([15, 9, 9]))
    if array in ("document", "position"):
        reads["text"] = lambda: store.text([12])
    for how, read in reads.items():
        message = message_of(read)
        assert shown + str(path) in message, how
        assert message.endswith(REMEDY), how
    code, error = command(monkeypatch, capsys, "head", path, "--start", "8", "--count", "2")
    assert code == 4
    assert "block 1 of " in error  # of this array, or of the one it was swapped with
    assert error.rstrip().endswith(REMEDY)
    code, error = command(monkeypatch, capsys, "head", path, "--start", "16", "--count", "2")
    assert (code, error) == (0, "")
    outside = store.dataset()[array].isel(sample=slice(16, 22)).values
    if array in contents.columns:
        np.testing.assert_array_equal(outside, contents.columns[array][16:22])
        np.testing.assert_array_equal(store.column(array, np.array([21, 16])), contents.columns[array][[21, 16]])


def of_block(array):
    """Block 1 of layer 7, or of an array without layers."""
    return (array.sel(layer=7) if "layer" in array.dims else array).isel(sample=slice(8, 16))


def flip_stored_norm(path, array):
    """The lowest bit of one norm, in a chunk that is sound in itself."""
    stored = raw_tensorstore(path, array)
    index = (1, 8) if stored.rank == 2 else (8,)
    value = np.asarray(stored[index].read().result())
    stored[index].write((value.view(np.uint32) ^ 1).view(np.float32)).result()


def command(monkeypatch, capsys, *arguments):
    """Exit code and error output of `actstore ...`."""
    monkeypatch.setattr(sys, "argv", ["actstore", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


# While a store is open


def test_an_open_dataset_sees_a_repaired_block(copied):
    contents, path, paths = copied()
    dataset = xr.open_dataset(path, cache=False)
    kept = dataset.resid_post.isel(sample=9).values
    for name in ("resid_post", ".act/commits/00000001.json"):
        fresh = shutil.copytree if (path / name).is_dir() else shutil.copy
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
        fresh(paths["bits"] / name, path / name)
    found = dataset.resid_post.isel(sample=[8, 9]).values
    assert found[0, 0, 0] != contents.rows["resid_post"][0, 8, 0]
    np.testing.assert_array_equal(found[:, 1], kept)


def test_a_copy_in_another_process_compares_too(copied):
    _, path, paths = copied()
    packed = pickle.dumps(actstore.open(path).dataset())
    damage(path, paths, "stale", "resid_post/c/1/1/0")
    with pytest.raises(CorruptStoreError, match="resid_post, layer 7, block 1 of"):
        pickle.loads(packed).resid_post.load()


def test_batches_stay_where_they_were(copied):
    _, path, paths = copied()
    store, shard = actstore.open(path), path / "resid_post/c/1/1/0"
    with store.batches(batch_size=5, layer=7, epochs=1, window_bytes=1) as sound:
        expected = [batch.samples.tolist() for batch in iter(sound.next_or_none, None)]
    whole = shard.read_bytes()
    damage(path, paths, "stale", "resid_post/c/1/1/0")
    with store.batches(batch_size=5, layer=7, epochs=1, window_bytes=1) as batches:
        found = []

        def drain():
            found.extend((batches.state(), batch.samples.tolist()) for batch in iter(batches.next_or_none, None))

        message = message_of(drain)
        assert f"resid_post, layer 7, block 1 of {path}: " in message
        assert message.endswith(REMEDY)
        assert batches.state() == found[-1][0]
        shard.write_bytes(whole)
        drain()
    assert [samples for _, samples in found] == expected


def test_an_unfinished_store_is_compared_as_far_as_it_is_committed(tmp_path, stores):
    contents, paths = stores("crc32c")
    path = contents.write(tmp_path / "run.acts.zarr", blocks=[2, 1], seal=False)
    opened = functools.partial(actstore.open(path, partial=True).dataset, partial=True, raw=True)
    np.testing.assert_array_equal(opened().resid_post, contents.rows["resid_post"][:, 8:])
    damage(path, paths, "stale", "resid_post/c/1/1/0")
    with pytest.raises(CorruptStoreError, match="resid_post, layer 7, block 1 of"):
        opened().resid_post.load()
    np.testing.assert_array_equal(opened().resid_post.isel(sample=slice(8, None)), contents.rows["resid_post"][:, 16:])


# What it costs


def test_a_marker_is_read_once(copied):
    contents, path, _ = copied()
    dataset = actstore.open(path).dataset(raw=True)
    first = dataset.resid_post.copy(deep=False).load()
    shutil.rmtree(path / ".act/commits")
    np.testing.assert_array_equal(dataset.resid_post, first)
    np.testing.assert_array_equal(dataset.score, contents.columns["score"])


def test_what_is_kept_of_markers_is_bounded(copied, monkeypatch):
    """With no room, the digests of one block are kept: the next block's take their place."""
    _, path, _ = copied()
    monkeypatch.setattr(vouchers, "KEPT_BYTES", 1)
    dataset = actstore.open(path).dataset()
    dataset.resid_post.isel(sample=8).load()
    (path / ".act/commits/00000001.json").unlink()
    dataset.resid_post.isel(sample=9).load()
    dataset.resid_post.isel(sample=0).load()
    with pytest.raises(CorruptStoreError, match=r"00000001\.json is missing"):
        dataset.resid_post.isel(sample=9).load()


LIMITS = {"one chunk at a time": (1, 1), "chunks of four, two at a time": (64, 32), "as they are": (1 << 26, 1 << 22)}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS.keys())
def test_limits_change_no_value(stores, monkeypatch, limits):
    contents, paths = stores("zstd")  # the others are mapped
    monkeypatch.setattr(gather, "FLIGHT_BYTES", limits[0])
    monkeypatch.setattr(gather, "STRETCH_BYTES", limits[1])
    assert_only_these_are_wrong(paths["ours"], contents, [])


def bytes_read():
    metric = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for entry in metric for value in entry["values"])


def test_each_chunk_is_read_once(tmp_path):
    """However many of its rows are asked for, and in whichever order. Shard indices and markers come on top."""
    sites = (Site("resid_post", 256, (0, 1)),)
    shape = Layout(sites, samples=512, block_samples=256, chunk_samples=32, columns=(), codec="zstd")
    contents = make_contents(shape, documents=False)
    path = contents.write(tmp_path / "x.acts.zarr")
    dataset = actstore.open(path).dataset(raw=True)
    shard = (path / "resid_post/c/1/0/0").stat().st_size - 16 * 8 - 4  # without its index
    rows = np.random.default_rng(0).permutation(np.r_[0:256:2, 3:256:7])  # of all chunks of block 0
    before = bytes_read()
    found = dataset.resid_post.isel(layer=1, sample=rows).values
    assert shard <= bytes_read() - before < 1.1 * shard
    np.testing.assert_array_equal(found, contents.rows["resid_post"][1, rows])
