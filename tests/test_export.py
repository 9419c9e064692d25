"""What leaves a store: each format read back by a reader of its own, against the arrays that were written."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from kill_points import unchecked
from stores import SITES, make_contents

from actstore import Layout, Plan, Site, foreign
from actstore.errors import CorruptStoreError, InputError, StorageError, UnknownNameError
from actstore.export import (
    HOOKS,
    sae_lens_metadata,
    to_anndata,
    to_numpy,
    to_torch,
    write_parquet,
    write_safetensors,
)

NAMES = [site.name for site in SITES]
LAYERS = {site.name: site.layers for site in SITES}
COLUMNS = ["document", "position", "token_id", "score", "flag"]
SAMPLES = {
    "all": slice(None),
    "a slice": slice(3, 40),
    "one": [17],
    "none": [],
    "none of a slice": slice(7, 7),
    "permuted": np.random.default_rng(3).permutation(53),
    "repeated": [52, 0, 17, 17],
    "backwards": slice(None, None, -2),
}
RAW = {"float32": False, "raw": True}
each_selection = pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES.keys())
each_dtype = pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())


@pytest.fixture
def dataset(finished):
    return xr.open_dataset(finished)


@pytest.fixture
def small_slabs(monkeypatch):
    """Files are made of many parts: row groups of two or three samples, tensors of twenty rows or so."""
    monkeypatch.setattr(foreign, "SLAB_BYTES", 500)


def expected(contents, name, samples, *, raw=False):
    """The rows that were written, as NumPy selects them: [..., sample, hidden]."""
    rows = contents.rows[name][..., np.arange(53)[samples], :]
    return rows if raw or rows.dtype != ml_dtypes.bfloat16 else rows.astype(np.float32)


def same(found, wanted):
    """Same values, dtype and shape; bfloat16 by its bits."""
    if wanted.dtype == ml_dtypes.bfloat16:
        assert found.dtype == wanted.dtype
        found, wanted = found.view(np.uint16), wanted.view(np.uint16)
    np.testing.assert_array_equal(found, wanted, strict=True)


def bits_of(tensor):
    """A tensor of torch as NumPy's array."""
    torch = pytest.importorskip("torch")
    return (
        tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype is torch.bfloat16 else tensor.numpy()
    )


# In memory


@pytest.mark.sampled(3)
@each_dtype
@each_selection
def test_arrays(finished, contents, samples, raw):
    chosen = xr.open_dataset(finished, raw=raw).isel(sample=samples)
    arrays = to_numpy(chosen)
    assert list(arrays) == NAMES
    for name in NAMES:
        same(arrays[name], expected(contents, name, samples, raw=raw))
        same(to_numpy(chosen, name), arrays[name])
        same(to_numpy(chosen[[name, f"{name}_norm"]]), arrays[name])  # the only site comes by itself


def test_arrays_have_the_axes_of_the_dataset(dataset, contents):
    same(
        to_numpy(dataset.sel(layer=5).isel(sample=3), "resid_post"),
        contents.rows["resid_post"][1, 3].astype(np.float32),
    )
    turned = dataset.isel(hidden=[4, 0]).transpose("hidden", "sample", ...)
    same(
        to_numpy(turned, "resid_post"), contents.rows["resid_post"][:, :, [4, 0]].astype(np.float32).transpose(2, 1, 0)
    )


@pytest.mark.sampled(5)
@each_dtype
@each_selection
@pytest.mark.parametrize("loaded", [False, True], ids=["lazy", "loaded"])
def test_tensors(finished, contents, samples, raw, loaded):
    torch = pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here")
    chosen = xr.open_dataset(finished, raw=raw)
    chosen = (chosen.load() if loaded else chosen).isel(sample=samples)
    tensors = to_torch(chosen)
    assert list(tensors) == NAMES
    assert tensors["resid_post"].dtype is (torch.bfloat16 if raw else torch.float32)
    for name, tensor in tensors.items():
        same(bits_of(tensor), expected(contents, name, samples, raw=raw))
    same(bits_of(to_torch(chosen, "mlp_out")), expected(contents, "mlp_out", samples))


def test_tensors_share_the_memory_of_a_loaded_dataset_unless_it_is_read_only(dataset):
    pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here")
    loaded = dataset[["attn_out"]].load()
    to_torch(loaded)[0, 0, 0] = 123
    assert loaded.attn_out.values[0, 0, 0] == 123
    loaded.attn_out.values.flags.writeable = False
    to_torch(loaded)[0, 0, 0] = 7
    assert loaded.attn_out.values[0, 0, 0] == 123


@pytest.mark.sampled(5)
@each_dtype
@each_selection
@pytest.mark.parametrize("name", NAMES)
def test_anndata(finished, contents, samples, raw, name, tmp_path):
    anndata = pytest.importorskip("anndata", reason="NOT CHECKED: anndata is not installed here")
    chosen = xr.open_dataset(finished, raw=raw).sel(layer=5).isel(sample=samples)
    to_anndata(chosen, name).write_h5ad(tmp_path / "rows.h5ad")
    found = anndata.read_h5ad(tmp_path / "rows.h5ad")
    rows = expected(contents, name, samples)
    same(found.X, rows if rows.ndim == 2 else rows[LAYERS[name].index(5)])
    for column in COLUMNS:
        same(found.obs[column].to_numpy(), contents.columns[column][samples])
    assert {"resid_post_norm", "final_norm_norm"} < set(found.obs)
    assert list(found.obs_names) == [str(number) for number in range(len(found))]
    assert {found.uns["site"], found.uns["layer"], found.uns["model"]} == {name, "5", "made-up"}
    assert json.loads(found.uns["actstore"])["fingerprint"] == contents.plan.fingerprint


# Files


@pytest.mark.sampled(3)
@each_dtype
@each_selection
def test_safetensors(finished, contents, samples, raw, tmp_path, small_slabs):
    torch_reader = pytest.importorskip("safetensors.torch", reason="NOT CHECKED: torch or safetensors is not installed")
    from safetensors import safe_open

    path = tmp_path / "new" / "rows.safetensors"
    write_safetensors(xr.open_dataset(finished, raw=raw).isel(sample=samples), path)
    found = {name: bits_of(tensor) for name, tensor in torch_reader.load_file(path).items()}
    for name in NAMES:
        same(found[name], expected(contents, name, samples, raw=raw))
        norms = np.linalg.norm(expected(contents, name, samples).astype(np.float64), axis=-1)
        np.testing.assert_allclose(found[f"{name}_norm"], norms, rtol=1e-6)
    for column in COLUMNS:
        same(found[column], contents.columns[column][samples])
    same(found["layer"], np.array([2, 5, 11], np.int32))
    same(found["row"], np.arange(contents.layout.samples)[samples])
    assert set(found) == {*NAMES, *[f"{name}_norm" for name in NAMES], *COLUMNS, "row", "layer", "attn_out_layer"}
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    assert metadata["model"] == "made-up"
    assert json.loads(metadata["actstore"])["fingerprint"] == contents.plan.fingerprint
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_safetensors_of_a_single_sample_and_layer(dataset, contents, tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy", reason="NOT CHECKED: safetensors is not installed here")
    write_safetensors(dataset.sel(layer=5).isel(sample=9), tmp_path / "a.safetensors")
    found = numpy_reader.load_file(tmp_path / "a.safetensors")
    same(found["resid_post"], contents.rows["resid_post"][1, 9].astype(np.float32))
    same(found["layer"], np.array(5, np.int32))
    same(found["token_id"], contents.columns["token_id"][9])


def test_safetensors_keeps_every_dtype_of_numbers(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy", reason="NOT CHECKED: safetensors is not installed here")
    dtypes = [each for each in foreign.SAFETENSORS_TYPES if each != ml_dtypes.bfloat16]
    arrays = {str(dtype): np.arange(5).astype(dtype) for dtype in dtypes}
    write_safetensors(xr.Dataset({name: ("sample", each) for name, each in arrays.items()}), tmp_path / "a.safetensors")
    found = numpy_reader.load_file(tmp_path / "a.safetensors")
    assert len(found) == 12
    for name, values in arrays.items():
        same(found[name], values)


def as_rows(column, dtype):
    """A column of fixed-size lists as an array [sample, hidden]."""
    width = column.type.list_size
    return np.concatenate([np.empty(0, dtype), *[each.flatten().to_numpy() for each in column.chunks]]).reshape(
        -1, width
    )


@pytest.mark.sampled(5)
@each_dtype
@each_selection
def test_parquet(finished, contents, samples, raw, tmp_path, small_slabs):
    pq = pytest.importorskip("pyarrow.parquet", reason="NOT CHECKED: pyarrow is not installed here")
    path = tmp_path / "rows.parquet"
    write_parquet(xr.open_dataset(finished, raw=raw).isel(sample=samples), path)
    found, names = pq.read_table(path), {*COLUMNS, "row"}
    for name in NAMES:
        rows = expected(contents, name, samples)
        for label, values in [("", rows)] if rows.ndim == 2 else zip(LAYERS[name], rows, strict=True):
            suffix = f"_layer_{label}" if rows.ndim == 3 else ""
            names |= {f"{name}{suffix}", f"{name}_norm{suffix}"}
            same(as_rows(found[f"{name}{suffix}"], values.dtype), values)
            norms = np.linalg.norm(values.astype(np.float64), axis=-1)
            np.testing.assert_allclose(found[f"{name}_norm{suffix}"].to_numpy(), norms, rtol=1e-6)
    for column in COLUMNS:
        same(found[column].to_numpy(), contents.columns[column][samples])
    assert set(found.column_names) == names
    assert json.loads(found.schema.metadata[b"actstore"])["fingerprint"] == contents.plan.fingerprint
    assert pq.ParquetFile(path).num_row_groups >= len(found) / 3


def test_parquet_of_one_layer_and_of_turned_axes(dataset, contents, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="NOT CHECKED: pyarrow is not installed here")
    turned = dataset[["resid_post"]].isel(hidden=slice(None, 4)).transpose("hidden", "sample", ...)
    write_parquet(turned.sel(layer=11), tmp_path / "one.parquet")
    write_parquet(turned, tmp_path / "three.parquet")
    one, three = pq.read_table(tmp_path / "one.parquet"), pq.read_table(tmp_path / "three.parquet")
    wanted = contents.rows["resid_post"][2, :, :4].astype(np.float32)
    same(as_rows(one["resid_post"], np.float32), wanted)
    same(as_rows(three["resid_post_layer_11"], np.float32), wanted)
    assert one.schema.metadata[b"layer"] == b"11"
    assert pq.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1


def test_parquet_keeps_texts(dataset, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="NOT CHECKED: pyarrow is not installed here")
    texts = [f"Wort {number} ü" for number in range(53)]
    given = dataset[["final_norm"]].assign(
        text=("sample", texts), other=("sample", np.array([*texts[1:], None], object))
    )
    write_parquet(given, tmp_path / "a.parquet")
    found = pq.read_table(tmp_path / "a.parquet")
    assert found["text"].to_pylist() == texts
    assert found["other"].to_pylist() == [*texts[1:], None]


WRITERS = {"safetensors": write_safetensors, "parquet": write_parquet}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


def need(write):
    if write is write_parquet:
        pytest.importorskip("pyarrow", reason="NOT CHECKED: pyarrow is not installed here")


@each_writer
def test_a_file_is_replaced_only_when_asked(dataset, write, tmp_path):
    need(write)
    path = tmp_path / "rows"
    path.write_bytes(b"mine")
    with pytest.raises(
        InputError, match=r"rows is there already; choose another name, or give overwrite=True to replace"
    ):
        write(dataset, path)
    assert path.read_bytes() == b"mine"
    write(dataset, path, overwrite=True)
    written = path.read_bytes()
    assert len(written) > 1000
    write(dataset, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == written
    with pytest.raises(InputError, match="is a folder; expected the name of a file in it"):
        write(dataset, tmp_path, overwrite=True)


@pytest.mark.sampled(2)
@each_writer
def test_no_file_is_left_of_one_that_failed(contents, write, tmp_path, small_slabs):
    """A damaged shard is met after much was written; the file that was there stays, and nothing beside it."""
    need(write)
    url = contents.write(tmp_path / "run.acts.zarr")
    shard = url / "resid_post/c/2/3/0"
    shard.write_bytes(shard.read_bytes()[:-40] + bytes(40))
    (tmp_path / "out").mkdir()
    for before in (None, b"before"):
        if before:
            (tmp_path / "out/rows").write_bytes(before)
        with pytest.raises(CorruptStoreError, match="resid_post"):
            write(xr.open_dataset(url), tmp_path / "out/rows", overwrite=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == (
            {"rows": before} if before else {}
        )


@each_writer
def test_a_place_that_cannot_be_written_is_named(dataset, write, tmp_path):
    need(write)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"could not write .*file/rows: .*; check the target"):
        write(dataset, tmp_path / "file/rows")


@each_writer
def test_what_is_written_is_not_kept_in_the_dataset(dataset, write, tmp_path):
    need(write)
    write(dataset, tmp_path / "rows")
    assert not any(dataset[name].variable._in_memory for name in [*NAMES, *COLUMNS])
    dataset.attn_out.load()  # the test could fail
    assert dataset.attn_out.variable._in_memory


# Refusals

REFUSALS = {
    "an array": (
        lambda given, _: to_numpy(given.resid_post),
        "found an object of type DataArray; expected an xarray Dataset; name it: array.to_dataset(name='resid_post')",
    ),
    "a path": (
        lambda _, path: write_safetensors(path, path),
        "expected an xarray Dataset; open it: xr.open_dataset(path)",
    ),
    "a path as text": (lambda _, path: write_parquet("x", path), "of type str; expected an xarray Dataset; open it"),
    "a tree": (
        lambda _, path: to_numpy(xr.DataTree()),
        "of type DataTree; expected an xarray Dataset; take the dataset",
    ),
    "a store": (lambda _, path: to_numpy(object()), "of type object; expected an xarray Dataset; of a store take"),
    "unknown site": (
        lambda given, _: to_numpy(given, "resid_pre"),
        "site 'resid_pre' is not in this dataset; it holds resid_post, mlp_out, attn_out, final_norm",
    ),
    "a norm is no site": (lambda given, _: to_numpy(given, "resid_post_norm"), "site 'resid_post_norm' is not in"),
    "no site": (
        lambda given, _: to_numpy(given[["final_norm_norm"]].drop_vars([*COLUMNS, "row"])),
        "the dataset has no site, only final_norm_norm; expected a variable with the axis `hidden`; keep one when you",
    ),
    "nothing": (lambda _given, _: to_numpy(xr.Dataset()), "the dataset has no site, only nothing"),
    "text in safetensors": (
        lambda given, path: write_safetensors(given.assign(text=("sample", ["a"] * 53)), path),
        "safetensors holds numbers only, and 'text' is <U1; leave it out: drop_vars(['text'])",
    ),
}
WITH_ANNDATA = {
    "several layers": (
        lambda given, _: to_anndata(given, "resid_post"),
        "'resid_post' has the layers [2, 5, 11] here, an AnnData holds one matrix; choose one: dataset.sel(layer=2)",
    ),
    "several sites": (
        lambda given, _: to_anndata(given.sel(layer=5)),
        "the dataset has the sites resid_post, mlp_out, attn_out, final_norm, an AnnData holds one matrix; say which",
    ),
    "no layers": (
        lambda given, _: to_anndata(given.isel(layer=[]), "resid_post"),
        "has the layers [] here, an AnnData holds one matrix; choose one: dataset.sel(layer=...)",
    ),
    "no sample axis": (
        lambda given, _: to_anndata(given.isel(sample=3), "final_norm"),
        "site 'final_norm' has the axes ['final_norm_hidden']; expected `sample` and one of the width; select",
    ),
}
WITH_PYARROW = {
    "no sample axis": (
        lambda given, path: write_parquet(given.isel(sample=3), path),
        "expected `sample`, for the lines of the table; select samples with a list or a slice, as in isel(sample=[5])",
    ),
    "no sample in a variable": (
        lambda given, path: write_parquet(given.assign(mean=given.final_norm.mean("sample")), path),
        "{'final_norm_hidden': 3}; expected `sample`, and at most a layer axis and one more with at least one",
    ),
    "no width": (
        lambda given, path: write_parquet(given.isel(hidden=[]), path),
        "variable 'resid_post' has the shape {'layer': 3, 'sample': 53, 'hidden': 0}",
    ),
    "four axes": (
        lambda given, path: write_parquet(given.assign(outer=given.resid_post * given.final_norm), path),
        "variable 'outer' has the shape {'layer': 3, 'sample': 53, 'hidden': 6, 'final_norm_hidden': 3}",
    ),
    "a layer twice": (
        lambda given, path: write_parquet(given[["mlp_out"]].isel(layer=[0, 2, 0]), path),
        "the columns ['mlp_out_layer_2'] would be there twice; choose each layer once, or rename a variable",
    ),
    "complex numbers": (
        lambda given, path: write_parquet(given.assign(wave=("sample", np.zeros(53, complex))), path),
        "variable 'wave' has values for which there is no column: ",
    ),
}
ALL_REFUSALS = [
    pytest.param(library, *case, id=f"{library}, {name}" if library else name)
    for library, cases in [(None, REFUSALS), ("anndata", WITH_ANNDATA), ("pyarrow", WITH_PYARROW)]
    for name, case in cases.items()
]


@pytest.mark.parametrize(("library", "act", "text"), ALL_REFUSALS)
def test_refusals_say_what_to_do(dataset, library, act, text, tmp_path):
    if library:
        pytest.importorskip(library, reason=f"NOT CHECKED: {library} is not installed here")
    with unchecked(), pytest.raises(InputError) as found:
        act(dataset, tmp_path / "rows")
    assert text in str(found.value)
    assert not list(tmp_path.iterdir())


def test_objects_that_are_no_text_are_refused_and_leave_no_file(dataset, tmp_path):
    pytest.importorskip("pyarrow", reason="NOT CHECKED: pyarrow is not installed here")
    things = np.array([{1}] * 53, object)
    with pytest.raises(InputError, match="variable 'thing' has values for which there is no column"):
        write_parquet(dataset.assign(thing=("sample", things)), tmp_path / "rows")
    assert not list(tmp_path.iterdir())


MISSING = {
    "torch": (lambda given, _: to_torch(given), r"pip install 'actstore\[torch\]'"),
    "anndata": (lambda given, _: to_anndata(given, "final_norm"), r"pip install 'actstore\[anndata\]'"),
    "pyarrow": (write_parquet, r"pip install 'actstore\[parquet\]'"),
}


@pytest.mark.parametrize(("library", "act", "text"), [(name, *case) for name, case in MISSING.items()], ids=MISSING)
def test_a_missing_library_is_named_with_what_to_install(dataset, library, act, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # what Python itself does to block an import
    with pytest.raises(InputError, match=rf"{library} cannot be imported \(.*\); install it: {text}"):
        act(dataset, tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def loaded_by(program):
    answer = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {"torch", "anndata"} & set(answer.stdout.split())


def test_importing_it_loads_no_library_that_it_exports_to():
    assert not loaded_by("import actstore.export")


def test_meta_a_loaded_library_would_be_noticed(tmp_path):
    (tmp_path / "anndata.py").touch()
    assert loaded_by(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import anndata, actstore.export") == {
        "anndata"
    }


# SAELens

PROVENANCE = {
    "model": {"name": "Qwen2.5-0.5B"},
    "packing": {"kind": "best-fit", "context": 256},
    "tokenizer": {"special_tokens": "none"},
    "documents": {"sha256": "ab"},
}
PLACES = {
    "embed": (None, "hook_embed"),
    "resid_pre": (12, "blocks.12.hook_resid_pre"),
    "attn_out": (12, "blocks.12.hook_attn_out"),
    "resid_mid": (0, "blocks.0.hook_resid_mid"),
    "mlp_post": (12, "blocks.12.mlp.hook_post"),
    "mlp_out": (0, "blocks.0.hook_mlp_out"),
    "resid_post": (12, "blocks.12.hook_resid_post"),
}


def plan_of(provenance, *more):
    sites = [Site(name, 8, None if layer is None else (0, 12)) for name, (layer, _) in PLACES.items()]
    return Plan.make(Layout.fit([*sites, *more], samples=10), provenance)


@pytest.mark.parametrize(("site", "layer", "hook"), [(name, *place) for name, place in PLACES.items()], ids=PLACES)
def test_metadata_of_saelens(site, layer, hook):
    """`make trainers` compares it with what SAELens and TransformerLens themselves take."""
    plan = plan_of(PROVENANCE)
    assert sae_lens_metadata(plan, site, layer) == {
        "model_name": "Qwen2.5-0.5B", "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {},
        "hook_name": hook, "d_in": 8, "context_size": 256, "prepend_bos": False, "documents_sha256": "ab",
        "actstore_fingerprint": plan.fingerprint,
    }  # fmt: skip


def test_every_site_with_a_hook_is_in_the_table():
    assert set(PLACES) == set(HOOKS)


@pytest.mark.parametrize(
    "provenance", [{}, {"model": "mine", "packing": [256]}, {"tokenizer": {"special_tokens": "bos"}}]
)
def test_metadata_leaves_out_what_the_provenance_does_not_say(provenance):
    found = sae_lens_metadata(plan_of(provenance), "resid_post", 12)
    assert set(found) == {
        "model_class_name", "model_from_pretrained_kwargs", "hook_name", "d_in", "actstore_fingerprint"
    }  # fmt: skip


METADATA_REFUSALS = {
    "no hook": (
        "final_norm",
        None,
        "site 'final_norm' has no hook in TransformerLens that gives its values; expected one",
    ),
    "layers of embed": ("mine", 3, "site 'mine', layer 3 has no hook in TransformerLens"),
    "unknown site": ("resid", 12, "site 'resid' is not in this store"),
    "unknown layer": ("resid_post", 3, "layer 3 of site 'resid_post' is not in this store; it holds layers [0, 12]"),
    "which layer": ("resid_post", None, "site 'resid_post' holds layers [0, 12]; say which one with `layer=`"),
    "a layer of embed": ("embed", 3, "site 'embed' has no layers, asked for layer 3"),
}


@pytest.mark.parametrize(("site", "layer", "text"), METADATA_REFUSALS.values(), ids=METADATA_REFUSALS.keys())
def test_metadata_of_a_place_without_a_hook_is_refused(site, layer, text):
    plan = plan_of(PROVENANCE, Site("final_norm", 8, None), Site("mine", 8, (3,)))
    with pytest.raises(InputError) as found:
        sae_lens_metadata(plan, site, layer)
    assert text in str(found.value)


def test_a_site_of_another_kind_than_its_hook_is_refused():
    plan = Plan.make(Layout.fit([Site("resid_post", 8, None), Site("embed", 8, (1,))], samples=10), {})
    for site, layer in (("resid_post", None), ("embed", 1)):
        with pytest.raises(UnknownNameError, match="has no hook in TransformerLens that gives its values"):
            sae_lens_metadata(plan, site, layer)


def test_the_only_layer_goes_without_saying():
    contents = make_contents()
    assert sae_lens_metadata(contents.plan, "attn_out")["hook_name"] == "blocks.5.hook_attn_out"
