"""Reading with xarray: every kind of indexing against NumPy in memory, refusals, and damage that must be loud."""

import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import LAYOUT, make_contents

import actstore
from actstore.errors import CorruptStoreError, StoreNotFoundError, UnfinishedStoreError
from actstore.reader import ActstoreBackend

SITES = [site.name for site in LAYOUT.sites]
RESID = make_contents().rows["resid_post"]
OPENERS = {
    "engine": lambda path: xr.open_dataset(path, engine="actstore"),
    "engine, raw": lambda path: xr.open_dataset(path, engine="actstore", raw=True),
    "guessed engine": xr.open_dataset,
    "store": lambda path: actstore.open(path).dataset(),
    "zarr": xr.open_zarr,
    "datatree": lambda path: xr.open_datatree(path, engine="zarr").to_dataset(),
}


def in_memory(contents, name):
    """A site as a DataArray over the NumPy array that was written, in float32."""
    rows = contents.rows[name].astype(np.float32)
    return xr.DataArray(rows, dims=["layer", "sample", "hidden"][-rows.ndim :])


def as_memory(array):
    """An array of a store with the dimension names of `in_memory`; nothing is read."""
    dims = ["layer", "sample", "hidden"][-array.ndim :]
    return array.drop_vars(list(array.coords)).rename(dict(zip(array.dims, dims, strict=True)))


def points(*values):
    return xr.DataArray(np.array(values), dims="point")


INDEXINGS = {
    "everything": {},
    "slice": {"sample": slice(3, 40)},
    "step": {"sample": slice(1, 50, 7)},
    "step over the end": {"sample": slice(5, 1000, 3)},
    "backwards": {"sample": slice(None, None, -1)},
    "backwards by three": {"sample": slice(50, 2, -3), "hidden": slice(None, None, -2)},
    "from the end": {"sample": slice(-9, -2)},
    "empty slice": {"sample": slice(7, 7)},
    "slice past the end": {"sample": slice(100, 200)},
    "integer": {"sample": 17},
    "last": {"sample": -1},
    "two integers": {"sample": 0, "hidden": -2},
    "integers": {"sample": [3, 30, 52]},
    "unsorted with repeats": {"sample": [52, 0, 17, 17, 0, 51, 16]},
    "negative integers": {"sample": [-1, 0, -53, 5]},
    "no integers": {"sample": np.zeros(0, int)},
    "boolean": {"sample": np.arange(53) % 3 == 1},
    "nothing true": {"sample": np.zeros(53, bool)},
    "everything true": {"sample": np.ones(53, bool)},
    "outer": {"sample": [40, 1, 1], "hidden": [2, 0]},
    "outer with a slice": {"sample": slice(None, None, -5), "hidden": [1, 1]},
    "boolean and integers": {"sample": np.arange(53) > 49, "hidden": [2, -1, 0]},
    "pointwise": {"sample": points(5, 52, 0, 5), "hidden": points(0, 2, 1, 1)},
    "pointwise with a slice": {"sample": points(9, 3), "hidden": slice(None, 2)},
    "pointwise in two dimensions": {"sample": xr.DataArray([[1, 50], [50, 3]], dims=["a", "b"])},
    "pointwise, none": {"sample": points(*np.zeros(0, int)).astype(int)},
}
LAYERED = {
    "one layer": {"layer": 1},
    "last layer": {"layer": -1, "sample": slice(4, 9)},
    "layers reversed": {"layer": slice(None, None, -1), "sample": [9, 2]},
    "layers repeated": {"layer": [2, 0, 0], "sample": slice(20, 10, -3), "hidden": [3, 1]},
    "all pointwise": {"layer": points(0, 2, 1), "sample": points(52, 0, 20), "hidden": points(3, 0, 1)},
    "layer boolean": {"layer": np.array([True, False, True]), "sample": 20},
    "a scalar": {"layer": 2, "sample": 33, "hidden": 1},
}


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("name", SITES)
def test_every_indexing_gives_what_numpy_gives(finished, contents, how, name):
    stored, expected = as_memory(OPENERS[how](finished)[name]), in_memory(contents, name)
    indexings = INDEXINGS | (LAYERED if name in ("resid_post", "mlp_out") else {})
    for case, index in indexings.items():
        found, wanted = stored.isel(index).load(), expected.isel(index)
        assert found.dims == wanted.dims, case
        np.testing.assert_array_equal(found.values.astype(np.float32), wanted.values, err_msg=case, strict=True)


@pytest.mark.parametrize("how", OPENERS)
def test_indexing_in_steps_gives_what_numpy_gives(finished, contents, how):
    stored, expected = as_memory(OPENERS[how](finished).resid_post), in_memory(contents, "resid_post")
    assert not stored.variable._in_memory
    for first, then in [
        ({"sample": slice(10, 50, 3)}, {"sample": [5, 0, 5]}),
        ({"sample": [40, 3, 17]}, {"sample": slice(None, None, -1)}),
        ({"layer": [2, 1]}, {"layer": -1, "sample": slice(-3, None)}),
        ({"sample": slice(None, None, -1)}, {"sample": points(0, 52), "hidden": points(1, 2)}),
    ]:
        found = stored.isel(first).isel(then).load().astype(np.float32)
        xr.testing.assert_equal(found, expected.isel(first).isel(then))


@st.composite
def selections(draw, size):
    number = st.integers(-size, size - 1)
    slices = st.slices(size).filter(
        lambda index: (index.step or 1) > 0 or len(range(size)[index])
    )  # xarray raises there
    return draw(
        slices
        | number
        | st.lists(number, max_size=9).map(lambda values: np.array(values, int))
        | st.lists(st.booleans(), min_size=size, max_size=size).map(np.array)
    )


@given(layer=selections(3), sample=selections(53), hidden=selections(6))
@settings(max_examples=60)
def test_any_outer_indexing_gives_what_numpy_gives(finished, layer, sample, hidden):
    """One axis after the other, with NumPy: outer indexing by its definition."""
    expected = RESID.astype(np.float32)
    for axis, index in [(2, hidden), (1, sample), (0, layer)]:
        expected = expected[(slice(None),) * axis + (index,)]
    dataset = actstore.open(finished).dataset()
    stored = dataset.resid_post.isel(layer=layer, sample=sample, hidden=hidden)
    np.testing.assert_array_equal(stored.values, expected)


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("index", [53, -1000, [0, 53], [-1000], 10**12], ids=str)
def test_out_of_range_is_an_index_error(finished, how, index):
    """Far out of range: -54 becomes -1 and then 52 inside xarray's lazy indexing, whatever the engine."""
    with pytest.raises(IndexError):
        OPENERS[how](finished).resid_post.isel(sample=index).load()


def test_labels_select_layers(finished, contents):
    dataset = xr.open_dataset(finished)
    np.testing.assert_array_equal(dataset.resid_post.sel(layer=[11, 2]), in_memory(contents, "resid_post")[[2, 0]])
    with pytest.raises(KeyError):
        dataset.resid_post.sel(layer=3)


# What a dataset is


def test_the_dataset_holds_everything(finished, contents):
    dataset = xr.open_dataset(finished)
    sites = [*SITES, *(f"{name}_norm" for name in SITES)]
    assert set(dataset.data_vars) == set(sites)
    assert set(dataset.coords) == {"layer", "attn_out_layer", "row", *contents.columns}
    assert dataset.layer.values.tolist() == [2, 5, 11]
    assert dataset.attn_out_layer.values.tolist() == [5]
    assert dict(dataset.sizes) == {
        "layer": 3, "attn_out_layer": 1, "sample": 53, "hidden": 6, "mlp_out_hidden": 4, "final_norm_hidden": 3,
    }  # fmt: skip
    for name, values in contents.columns.items():
        np.testing.assert_array_equal(dataset[name].values, values)
        assert dataset[name].dtype == values.dtype
    for name in SITES:
        norms = np.linalg.norm(contents.rows[name].astype(np.float64), axis=-1)
        np.testing.assert_allclose(dataset[f"{name}_norm"].values, norms, rtol=1e-6)
    assert dataset.attrs["actstore"]["fingerprint"] == contents.plan.fingerprint


def test_all_ways_to_open_say_the_same(finished):
    ours = xr.open_dataset(finished)
    for how in ("store", "engine"):
        xr.testing.assert_identical(OPENERS[how](finished), ours)
    ours = ours.drop_vars("row")
    for how in ("zarr", "datatree"):
        plain = OPENERS[how](finished).drop_vars("valid")
        assert plain.attrs == ours.attrs
        xr.testing.assert_equal(plain.astype(np.float32), ours.astype(np.float32))
        assert set(plain.coords) == set(ours.coords)


@pytest.mark.parametrize(("raw", "wide"), [(False, np.float32), (True, ml_dtypes.bfloat16)], ids=["widened", "raw"])
def test_raw_keeps_bfloat16(finished, contents, raw, wide):
    dataset = xr.open_dataset(finished, engine="actstore", raw=raw)
    found = {name: dataset[name].dtype for name in SITES}
    assert found == {"resid_post": wide, "mlp_out": np.float16, "attn_out": np.float32, "final_norm": wide}
    values = dataset.resid_post.isel(sample=[3, 1]).values
    assert values.dtype == wide
    np.testing.assert_array_equal(values, contents.rows["resid_post"][:, [3, 1]].astype(wide))


def test_reductions_are_right(finished, contents):
    """NumPy's mean of 100,000 bfloat16 values can be 200 times too small: float32 is the default."""
    mean = xr.open_dataset(finished).resid_post.mean("sample")
    np.testing.assert_allclose(mean, contents.rows["resid_post"].astype(np.float64).mean(axis=1), rtol=1e-5, atol=1e-5)


def test_variables_can_be_left_out(finished):
    assert "resid_post" not in xr.open_dataset(finished, drop_variables="resid_post")
    assert set(xr.open_dataset(finished, drop_variables=[*SITES, "layer"]).data_vars) == {f"{n}_norm" for n in SITES}


def test_documents_are_a_group_of_their_own(finished, contents):
    tree = xr.open_datatree(finished, engine="zarr")
    documents = tree["documents"].to_dataset()
    np.testing.assert_array_equal(documents.token_id, contents.documents.token_id)
    assert documents.text_bytes.values.tobytes().decode() == "".join(contents.documents.texts)
    np.testing.assert_array_equal(documents.pages, contents.documents.columns["pages"])


def test_a_dataset_can_be_pickled(finished, contents):
    again = pickle.loads(pickle.dumps(xr.open_dataset(finished)))
    np.testing.assert_array_equal(again.resid_post.values, in_memory(contents, "resid_post"))


def test_many_threads_may_read(finished, contents):
    dataset, expected = xr.open_dataset(finished), in_memory(contents, "resid_post").values
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: dataset.resid_post.isel(sample=row).values, range(53)))
    np.testing.assert_array_equal(np.stack(rows, axis=1), expected)


def test_dask_chunks_are_shards(finished, contents):
    pytest.importorskip("dask", reason="dask is not installed: its chunks are not tested")
    dataset = xr.open_dataset(finished, chunks={})
    assert dataset.resid_post.chunks == ((1, 1, 1), (16, 16, 16, 5), (6,))
    np.testing.assert_array_equal(dataset.resid_post.compute(), in_memory(contents, "resid_post"))


@pytest.mark.parametrize(
    ("name", "answer"),
    [("run.acts.zarr", True), ("run.acts.zarr/", True), ("run.zarr", False), ("acts.zarr.nc", False), (3, False)],
    ids=str,
)
def test_the_engine_takes_stores_only(name, answer):
    assert ActstoreBackend().guess_can_open(name) is answer


PLAIN = """
import sys, warnings
warnings.simplefilter("error")
import xarray as xr
for way in sys.argv[2:]:
    open_it = {"zarr": xr.open_zarr, "dataset": xr.open_dataset}.get(way)
    dataset = open_it(sys.argv[1]) if open_it else xr.open_datatree(sys.argv[1], engine="zarr").to_dataset()
    print(way, dataset.resid_post.dtype, float(dataset.resid_post.astype("float32").sum()))
"""


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param(["dataset", "zarr", "datatree"], id="any way after the engine"),
        pytest.param(["zarr", "datatree"], id="zarr alone"),
    ],
)
def test_a_program_that_only_knows_xarray_opens_a_store(finished, contents, ways):
    """A fresh process that never names actstore, every warning an error."""
    answer = subprocess.run([sys.executable, "-c", PLAIN, str(finished), *ways], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    total = float(in_memory(contents, "resid_post").sum())
    found = [line.split() for line in answer.stdout.splitlines()]
    assert [line[0] for line in found] == ways
    assert [line[1] for line in found] == ["float32" if way == "dataset" else "bfloat16" for way in ways]
    assert [float(line[2]) for line in found] == pytest.approx([total] * len(ways), rel=1e-5)
    assert answer.stderr == ""


# Unfinished


COMMITTED = np.r_[16:32, 48:53]


@pytest.mark.parametrize("how", ["engine", "engine, raw", "guessed engine", "store"])
def test_an_unfinished_store_is_refused(unfinished, how):
    with pytest.raises(UnfinishedStoreError) as caught:
        OPENERS[how](unfinished)
    assert str(caught.value) == (
        f"{unfinished} is unfinished: 2 of 4 blocks are committed; run the command that writes it again to finish it, "
        "or give partial=True to see the committed samples"
    )  # fmt: skip


@pytest.mark.parametrize(
    "opened",
    [
        lambda path: xr.open_dataset(path, partial=True, engine="actstore"),
        lambda path: actstore.open(path, partial=True).dataset(partial=True),
    ],
    ids=["engine", "store"],
)
def test_partial_shows_committed_samples_only(unfinished, contents, opened):
    dataset = opened(unfinished)
    assert "valid" not in dataset
    for name in SITES:
        np.testing.assert_array_equal(as_memory(dataset[name]), in_memory(contents, name)[..., COMMITTED, :])
        assert np.isfinite(dataset[f"{name}_norm"]).all()
    for name, values in contents.columns.items():
        np.testing.assert_array_equal(dataset[name], values[COMMITTED])
    picked = dataset.resid_post.isel(sample=[20, 0, 3], layer=1)
    np.testing.assert_array_equal(picked, in_memory(contents, "resid_post")[1, COMMITTED[[20, 0, 3]]])


def test_valid_masks_an_unfinished_store_for_plain_xarray(unfinished, contents):
    plain = xr.open_zarr(unfinished)
    assert plain.sizes["sample"] == contents.layout.padded_samples
    committed = plain.isel(sample=plain.valid.values == 1)
    np.testing.assert_array_equal(as_memory(committed.resid_post), in_memory(contents, "resid_post")[:, COMMITTED])


def test_a_store_without_blocks_is_an_empty_dataset(tmp_path, contents):
    path = contents.write(tmp_path / "x.acts.zarr", blocks=[], seal=False)
    dataset = actstore.open(path, partial=True).dataset(partial=True)
    assert dataset.sizes["sample"] == 0
    assert dataset.resid_post.values.shape == (3, 0, 6)


def test_nothing_is_not_a_store(tmp_path):
    for opened in (actstore.open, xr.open_dataset):
        with pytest.raises(StoreNotFoundError, match="no activation store at"):
            opened(tmp_path / "x.acts.zarr")
    assert list(tmp_path.iterdir()) == []


# Damage


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run.acts.zarr")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "first bit": lambda path: flip(path, 0),
    "a bit of the last chunk": lambda path: flip(path, path.stat().st_size - 75),
    "a bit of the index": lambda path: flip(path, -30),
    "last bit": lambda path: flip(path, -1),
    "missing": lambda path: path.unlink(),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "shorter than its index": lambda path: path.write_bytes(path.read_bytes()[:10]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
SHARDS = {"resid_post": "resid_post/c/1/2/0", "final_norm": "final_norm/c/2/0"}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_shard_is_an_error_and_the_rest_is_readable(copied, contents, damage, name):
    damage(copied / SHARDS[name])
    dataset = xr.open_dataset(copied)
    with pytest.raises(CorruptStoreError) as caught:
        dataset[name].isel(sample=slice(32, 48)).load()
    message = str(caught.value)
    label = ", layer 5" if name == "resid_post" else ""
    assert message.startswith(f"could not read {name}{label}, block 2 of {copied}: ")
    assert SHARDS[name] in message
    assert message.endswith("; run `actstore verify`, then `actstore repair`")
    assert "\n" not in message
    undamaged = {"layer": [0, 2]} if name == "resid_post" else {"sample": slice(0, 32)}
    np.testing.assert_array_equal(as_memory(dataset[name].isel(undamaged)), in_memory(contents, name).isel(undamaged))


@pytest.mark.parametrize("damage", ["first bit", "last bit", "missing", "one byte short", "empty", "zeros"])
@pytest.mark.parametrize("name", ["document", "resid_post_norm", "score"])
def test_a_damaged_chunk_of_a_small_array_is_an_error(copied, damage, name):
    DAMAGES[damage](copied / name / "c" / ("1/2" if name.endswith("norm") else "2"))
    label = ", layer 5" if name.endswith("norm") else ""
    with pytest.raises(CorruptStoreError, match=f"could not read {name}{label}, block 2 of .*`actstore repair`$"):
        xr.open_dataset(copied)[name].load()


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_other_codecs_notice_all_damage_too(tmp_path, codec, damage):
    layout = actstore.Layout((actstore.Site("resid_post", 6, (0,)),), 8, 8, 2, codec=codec)
    path = make_contents(layout, documents=False).write(tmp_path / "x.acts.zarr")
    damage(path / "resid_post/c/0/0/0")
    with pytest.raises(CorruptStoreError, match=r"resid_post, layer 0, block 0 of .*`actstore repair`$"):
        xr.open_dataset(path).resid_post.load()


def test_opening_reads_no_rows(copied):
    for folder in copied.glob("*/c"):
        if not folder.parent.name.endswith("layer"):
            shutil.rmtree(folder)
    dataset = xr.open_dataset(copied)
    assert dataset.resid_post.shape == (3, 53, 6)


@pytest.mark.parametrize("name", ["plan.json", "../zarr.json"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[" * 200_000, b"\xff"], ids=["empty", "object", "deep", "binary"])
def test_damaged_metadata_is_an_error(copied, name, data):
    (copied / ".act" / name).write_bytes(data)
    with pytest.raises(CorruptStoreError):
        xr.open_dataset(copied)


def test_metadata_of_an_array_is_never_trusted(copied, contents):
    """An edited shape or codec of one array misleads other readers, never this one."""
    (copied / "resid_post" / "zarr.json").write_text('{"shape": [1]}')
    np.testing.assert_array_equal(xr.open_dataset(copied).resid_post, in_memory(contents, "resid_post"))
