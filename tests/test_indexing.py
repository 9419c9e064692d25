"""Every kind of indexing of a store beside the same operation on what was written, in memory: identical."""

import dataclasses
import functools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import LAYOUT, Contents, make_contents

import actstore
from actstore import picked

SITES = [site.name for site in LAYOUT.sites]
OPENERS = {
    "engine": lambda path: xr.open_dataset(path, engine="actstore"),
    "engine, raw": lambda path: xr.open_dataset(path, engine="actstore", raw=True),
    "guessed engine": xr.open_dataset,
    "unchecked": lambda path: xr.open_dataset(path, check=False),
    "store": lambda path: actstore.open(path).dataset(),
    "tree": lambda path: xr.open_datatree(path).to_dataset(),
    "dask": lambda path: xr.open_dataset(path, chunks={}),
    "zarr": lambda path: xr.open_zarr(path, chunks=None).drop_vars("valid"),
    "zarr tree": lambda path: xr.open_datatree(path, engine="zarr").to_dataset().drop_vars("valid"),
}
STORED_DTYPE = {"engine, raw", "zarr", "zarr tree"}  # the others widen bfloat16
CODECS = ("crc32c", "none", "zstd")  # mapped, mapped, read through TensorStore


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of each codec, and what it holds."""

    @functools.cache
    def made(codec):
        contents = make_contents(dataclasses.replace(LAYOUT, codec=codec))
        return contents, contents.write(tmp_path_factory.mktemp(codec) / "run.acts.zarr")

    return made


def in_memory(contents: Contents, how: str, attrs: dict[str, dict]) -> xr.Dataset:
    """What was written as a Dataset over NumPy arrays, with the attributes that are expected of each variable."""
    layout = contents.layout
    coords = {name: ("sample", values, attrs[name]) for name, values in contents.columns.items()}
    if "row" in attrs:  # zarr-python shows what is stored, and no more
        coords["row"] = ("sample", np.arange(layout.samples), attrs["row"])
    arrays = {}
    for site in layout.sites:
        rows = contents.rows[site.name]
        wide = rows.dtype == ml_dtypes.bfloat16 and how not in STORED_DTYPE
        dims = ["sample", layout.width_dimension(site)]
        if site.layers is not None:
            label = layout.layer_dimension(site)
            coords[label] = (label, np.array(site.layers, np.int32), attrs[label])
            dims = [label, *dims]
        arrays[site.name] = (dims, rows.astype(np.float32) if wide else rows, attrs[site.name])
    return xr.Dataset(arrays, coords)


def pair(stores, how: str, codec: str) -> tuple[xr.Dataset, xr.Dataset]:
    """A store as it is opened, and what was written."""
    contents, path = stores(codec)
    stored = OPENERS[how](path)
    return stored, in_memory(contents, how, {name: variable.attrs for name, variable in stored.variables.items()})


def assert_same(found: xr.DataArray, expected: xr.DataArray, case: object) -> None:
    """The same values, dtypes, names, coordinates and attributes."""
    assert found.dtype == expected.dtype, case
    if found.dtype == ml_dtypes.bfloat16:  # xarray's own assertion does not know it
        found, expected = found.astype(np.float32), expected.astype(np.float32)
    try:
        xr.testing.assert_identical(found.load(), expected)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


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
LABELS = {
    "one layer": lambda array: array.sel(layer=5),
    "layers": lambda array: array.sel(layer=[11, 2]),
    "a slice of layers": lambda array: array.sel(layer=slice(3, 11)),
    "the nearest layer": lambda array: array.sel(layer=9, method="nearest"),
    "pointwise": lambda array: array.sel(layer=points(2, 11)).isel(sample=points(3, 3)),
    "a document": lambda array: array.isel(sample=np.flatnonzero(array.document.values == 1)),
    "a position": lambda array: array.isel(sample=array.position.values < 3),
    "a token": lambda array: array.isel(sample=(array.token_id == array.token_id[7]).values),
    "a score, by where": lambda array: array.astype(np.float32).where(array.score > 0, drop=True),
    "documents by an index of their own": lambda array: array.set_xindex("document").sel(document=2),
}


def cases(name: str) -> dict[str, dict]:
    """The table for a site: indices along its layers too, and its own name for `hidden`."""
    site = LAYOUT.site(name)
    table = INDEXINGS | (LAYERED if name in ("resid_post", "mlp_out") else {})
    width = LAYOUT.width_dimension(site)
    return {case: {width if key == "hidden" else key: of for key, of in index.items()} for case, index in table.items()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", OPENERS)
def test_every_indexing_is_that_of_memory(stores, how, codec):
    stored, expected = pair(stores, how, codec)
    for name in SITES:
        for case, index in cases(name).items():
            assert_same(stored[name].isel(index), expected[name].isel(index), (name, case))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", OPENERS)
def test_every_label_is_that_of_memory(stores, how, codec):
    stored, expected = pair(stores, how, codec)
    for case, chosen in LABELS.items():
        assert_same(chosen(stored.resid_post), chosen(expected.resid_post), case)
    with pytest.raises(KeyError):
        stored.resid_post.sel(layer=3)


@pytest.mark.parametrize("how", OPENERS)
def test_indexing_in_steps_is_that_of_memory(stores, how):
    stored, expected = pair(stores, how, "crc32c")
    assert not stored.resid_post.variable._in_memory
    for steps in [
        ({"sample": slice(10, 50, 3)}, {"sample": [5, 0, 5]}),
        ({"sample": [40, 3, 17]}, {"sample": slice(None, None, -1)}),
        ({"layer": [2, 1]}, {"layer": -1, "sample": slice(-3, None)}),
        ({"sample": slice(None, None, -1)}, {"sample": points(0, 52), "hidden": points(1, 2)}),
        ({"sample": slice(None, None, -1)}, {"sample": slice(None, None, -2)}, {"sample": slice(3, 20)}),
    ]:
        found, wanted = stored.resid_post, expected.resid_post
        for step in steps:
            found, wanted = found.isel(step), wanted.isel(step)
        assert_same(found, wanted, steps)


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("index", [53, -1000, [0, 53], [-1000], 10**12], ids=str)
def test_out_of_range_is_an_index_error(stores, how, index):
    """Far out of range: -54 becomes -1 and then 52 inside xarray's lazy indexing, whatever the engine."""
    with pytest.raises(IndexError):
        OPENERS[how](stores("crc32c")[1]).resid_post.isel(sample=index).load()


@pytest.mark.parametrize("other", [{"sample": slice(4, 8)}, {"sample": slice(3, 7), "hidden": slice(None, None, -1)}])
def test_meta_a_wrong_row_or_value_would_be_found(stores, other):
    stored, expected = pair(stores, "engine", "crc32c")
    with pytest.raises(AssertionError, match="the case"):
        assert_same(stored.resid_post.isel(other), expected.resid_post.isel(sample=slice(3, 7)), "the case")


def test_every_bfloat16_is_widened_bit_by_bit(tmp_path):
    """Both zeros and the smallest too; infinities and NaN are never stored."""
    layout = actstore.Layout((actstore.Site("x", 256, None),), 256, 64, 16, ())
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values[values & 0x7F80 == 0x7F80] ^= 0x4000
    path = Contents(layout, {"x": values.view(ml_dtypes.bfloat16)}, {}).write(tmp_path / "x.acts.zarr")
    for sample in (slice(None), slice(None, None, -1), np.arange(0, 256, 9)):
        found = xr.open_dataset(path).x.isel(sample=sample).values
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.view(np.uint32), values[sample].astype(np.uint32) << 16)


# Random selections


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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("how", ["engine", "engine, raw", "zarr"])
@given(layer=selections(3), sample=selections(53), hidden=selections(6))
@settings(max_examples=40)
def test_any_outer_indexing_is_that_of_numpy(stores, how, codec, layer, sample, hidden):
    """One axis after the other, with NumPy: outer indexing by its definition."""
    stored, expected = pair(stores, how, codec)
    values = expected.resid_post.values
    for axis, index in [(2, hidden), (1, sample), (0, layer)]:
        values = values[(slice(None),) * axis + (index,)]
    found = stored.resid_post.isel(layer=layer, sample=sample, hidden=hidden).values
    np.testing.assert_array_equal(found, values, strict=True)


@pytest.mark.parametrize("how", ["engine", "engine, raw", "zarr"])
@given(
    places=st.lists(st.tuples(st.integers(-3, 2), st.integers(-53, 52), st.integers(-6, 5)), min_size=1, max_size=20)
)
def test_any_pointwise_indexing_is_that_of_numpy(stores, how, places):
    stored, expected = pair(stores, how, "crc32c")
    layer, sample, hidden = np.array(places).T
    index = {"layer": points(*layer), "sample": points(*sample), "hidden": points(*hidden)}
    values = expected.resid_post.values[layer, sample, hidden]
    np.testing.assert_array_equal(stored.resid_post.isel(index).values, values, strict=True)


MANY = actstore.Layout((actstore.Site("x", 8, (0, 1)),), 4000, 1024, 32, ())
CHOICES = {
    "dense": lambda generator: np.sort(generator.choice(4000, 3000, replace=False)),
    "dense, shuffled": lambda generator: generator.permutation(4000),
    "dense, repeated": lambda generator: generator.integers(4000, size=9000),
    "few": lambda generator: np.sort(generator.choice(4000, 90, replace=False)),
    "few, shuffled and repeated": lambda generator: generator.integers(4000, size=300),
    "one": lambda generator: generator.integers(4000, size=1),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    contents = make_contents(MANY, documents=False)
    return contents.rows["x"], contents.write(tmp_path_factory.mktemp("many") / "x.acts.zarr")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("piece_bytes", [16, picked.PIECE_BYTES])
@pytest.mark.parametrize("part_bytes", [512, 8192, picked.PART_BYTES])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_parts_threads_and_pieces_change_no_value(many, monkeypatch, choice, part_bytes, piece_bytes):
    rows, path = many
    monkeypatch.setattr(picked, "PART_BYTES", part_bytes)
    monkeypatch.setattr(picked, "PIECE_BYTES", piece_bytes)
    samples = choice(np.random.default_rng(0))
    for raw in (True, False):
        dataset = xr.open_dataset(path, engine="actstore", raw=raw)
        for _ in range(2):  # chunks are compared, and then known
            found = dataset.x.isel(sample=samples, layer=[1, 0]).values
            np.testing.assert_array_equal(found, rows[[1, 0]][:, samples].astype(found.dtype))


WIDE = actstore.Layout((actstore.Site("x", 512, None),), 16384, 4096, 128, ())
MEMORY = {
    "slice": slice(100, 16000),
    "backwards": slice(None, None, -1),
    "shuffled": np.random.default_rng(0).permutation(16384),
    "few, shuffled": np.random.default_rng(0).permutation(16384)[:4000],
    "repeated": np.zeros(9000, int),
}


def peak_of(read):
    """The result, and the most memory that NumPy and Python held at once while it was read."""
    tracemalloc.start()
    try:
        return read(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_costs_the_memory_of_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(picked, "THREADS", 1)  # each has a piece of its own
    contents = make_contents(WIDE, documents=False)
    path = contents.write(tmp_path / "x.acts.zarr")
    for raw in (True, False):
        array = xr.open_dataset(path, engine="actstore", raw=raw).x
        array.isel(sample=MEMORY["shuffled"][:2000]).load()
        for case, samples in MEMORY.items():
            found, peak = peak_of(lambda array=array, samples=samples: array.isel(sample=samples).values)
            assert peak < 1.2 * found.nbytes, case


def test_meta_a_second_copy_would_be_seen():
    found, peak = peak_of(lambda: np.ones(1 << 20).astype(np.float32))
    assert peak > 1.2 * found.nbytes
