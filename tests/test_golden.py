"""The committed stores of format 1: every later version reads them, whoever reads, and would write the same bytes."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from golden.make import BLOCKS, NOT_YET, SAMPLES, STORES, columns, documents, make, make_appended, values
from stores import raw_tensorstore, tree

import actstore
from actstore.errors import UnfinishedStoreError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.runs import DocumentRuns
from actstore.sealing import seal
from actstore.verify import verify

FOLDER = Path(__file__).parent / "golden"
FINISHED = [name for name, blocks in BLOCKS.items() if len(blocks) == 3]


def golden(name):
    return FOLDER / f"{name}.acts.zarr"


def before(files, *fields):
    """The files of a store as writers left them when markers had none of some fields. The seal follows the manifest."""

    def dump(document):
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    def older(document):
        return {name: value for name, value in document.items() if name not in fields}

    old = {name: data for name, data in files.items() if not (name.endswith("/ranges.json") and "ranges" in fields)}
    for name in [name for name in files if "/commits/" in name]:
        old[name] = dump(older(json.loads(files[name])))
    for name in [name for name in files if name.endswith("/SEALED.json")]:
        manifest_name = name.replace("SEALED", "manifest")
        manifest, seal = json.loads(files[manifest_name]), json.loads(files[name])
        assert seal["manifest_sha256"] == hashlib.sha256(files[manifest_name]).hexdigest()
        old[manifest_name] = dump(manifest | {"blocks": [older(marker) for marker in manifest["blocks"]]})
        if "ranges" in fields:
            seal.pop("ranges_sha256", None)
        old[name] = dump(seal | {"manifest_sha256": hashlib.sha256(old[manifest_name]).hexdigest()})
    return old


READERS = {
    "actstore": lambda path, name: actstore.open(path).dataset(raw=True)[name].values,
    "actstore, float32": lambda path, name: xr.open_dataset(path)[name].values,
    "xarray": lambda path, name: xr.open_zarr(path)[name].values,
    "zarr": lambda path, name: zarr.open_group(path, mode="r")[name][...],
    "zarr array": lambda path, name: zarr.open_array(path / name, mode="r")[...],
    "tensorstore": lambda path, name: raw_tensorstore(path, name).read().result(),
}


def test_the_formula_is_the_one_of_the_first_day():
    """Numbers by hand, so that formula and stores cannot change together."""
    assert values(8, (1, 3)).shape == (2, 10, 8)
    assert values(8, (1, 3))[0, 0, :4].tolist() == [-6.25, -5.0, -3.75, -2.5]
    assert values(8, (1, 3))[1, 9, 7] == -3.25
    assert values(8, None)[0, 0] == -5.0


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("name", FINISHED)
def test_every_reader_sees_the_values(name, reader):
    for site in STORES[name]:
        rows = values(site.width, site.layers)
        found = reader(golden(name), site.name)
        assert found.shape == rows.shape
        np.testing.assert_array_equal(found.astype(np.float64), rows)
        norms = np.sqrt((rows**2).sum(axis=-1))
        np.testing.assert_allclose(reader(golden(name), f"{site.name}_norm"), norms, rtol=1e-6)
    for column, expected in columns().items():
        np.testing.assert_array_equal(reader(golden(name), column), expected)
    np.testing.assert_array_equal(reader(golden(name), "layer"), [1, 3])


@pytest.mark.parametrize("name", FINISHED)
def test_dtypes_are_those_of_the_sites(name):
    for site in STORES[name]:
        assert READERS["actstore"](golden(name), site.name).dtype == site.dtype
        assert READERS["zarr"](golden(name), site.name).dtype == site.dtype


LOADERS = {
    "bfloat16": "f8bee2d8d45b2e91",
    "float16": "d8c872ebf3ef9541",
    "float32": "995f7a198f7688ec",
    "several": "e01f80826ed73e00",
    "chunks": "7d46cab3bafe4dde",
    "ranges": "7d46cab3bafe4dde",
    "packed": "b8c82e356254a449",
}


@pytest.mark.parametrize("name", FINISHED)
def test_batches_of_a_golden_store_never_change(name):
    """The order is part of what is promised: a saved loader state of last year goes on as it would have."""
    settings = {"batch_size": 4, "layer": 3, "seed": 7, "epochs": 1, "window_bytes": 512 << 20}
    with actstore.open(golden(name)).batches(**settings) as batches:
        first = batches.next_batch()
        assert first.samples.tolist() == [1, 4, 9, 5]
        np.testing.assert_array_equal(first.rows.astype(np.float64), values(8, (1, 3))[1][first.samples])
        assert batches.state() == {"version": 1, "epoch": 0, "position": 4, "loader": LOADERS[name]}


@pytest.mark.parametrize("name", ["several", "packed"])
def test_documents_of_a_golden_store(name):
    store, table = actstore.open(golden(name)), documents()
    assert store.documents.strings("text", np.arange(3)) == list(table.texts)
    assert store.documents.strings("kind", np.arange(3)) == ["de", "ja", ""]
    assert store.documents.numbers("pages", np.arange(3)).tolist() == [1, -2, 3]
    assert store.documents.numbers("weight", np.arange(3)).tolist() == [0.5, 1.0, -0.25]
    shown = [(token.before, token.token, token.after) for token in store.text(range(SAMPLES), window=1)]
    assert shown == [
        ("", "G", "r"), ("G", "r", "ü"), ("r", "ü", "ß"), ("ü", "ß", ""),
        ("", "日", "本"), ("日", "本", "語"), ("本", "語", " "), ("語", " ", ""),
        ("", "t", "h"), ("t", "h", ""),
    ]  # fmt: skip


def test_an_unfinished_golden_store_is_refused_and_readable_in_part():
    with pytest.raises(UnfinishedStoreError, match="2 of 3 blocks are committed"):
        actstore.open(golden("unfinished"))
    dataset = actstore.open(golden("unfinished"), partial=True).dataset(partial=True)
    committed = [0, 1, 2, 3, 8, 9]
    np.testing.assert_array_equal(dataset.resid_post, values(8, (1, 3))[:, committed])
    np.testing.assert_array_equal(dataset.token_id, columns()["token_id"][committed])
    valid = READERS["tensorstore"](golden("unfinished"), "valid")
    assert np.flatnonzero(valid).tolist() == committed


def test_an_unfinished_golden_store_can_be_continued(tmp_path):
    shutil.copytree(golden("unfinished"), tmp_path / "unfinished.acts.zarr")
    make("unfinished", tmp_path, blocks=[1])
    with pytest.raises(UnfinishedStoreError):
        actstore.open(tmp_path / "unfinished.acts.zarr")
    root = Root.of(tmp_path / "unfinished.acts.zarr")
    seal(root, read_plan(root))
    assert verify(root, read_plan(root)).findings == (), "old markers are in the manifest as they are"
    shutil.rmtree(tmp_path / "unfinished.acts.zarr")
    path = make("unfinished", tmp_path, blocks=[0, 1, 2])
    assert before(tree(path), "chunks", "ranges") == tree(golden("bfloat16"))
    store = actstore.open(path)
    assert verify(store._root, store.plan).findings == ()
    assert [len(DocumentRuns(store._root, store.plan).samples([number])) for number in range(3)] == [4, 4, 2]


@pytest.mark.parametrize("name", STORES)
def test_the_same_bytes_would_be_written_today(tmp_path, name):
    """A change of these bytes is a change of the format: it needs a new format number and new golden stores."""
    files, there = before(tree(make(name, tmp_path)), *NOT_YET[name]), tree(golden(name))
    assert files.keys() == there.keys()
    compressed = [key for key in there if name == "packed" and re.match(r"documents/\w+/c/", key)]
    for key in compressed:  # another zstd may compress otherwise: their marker has the digests of the values
        del files[key], there[key]
    assert len(compressed) == (12 if name == "packed" else 0)
    assert files == there


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_every_reader_sees_what_was_appended(reader):
    for site in STORES["several"]:
        np.testing.assert_array_equal(reader(golden("appended"), site.name).astype(np.float64), values(*site_of(site)))
    for column, expected in columns().items():
        np.testing.assert_array_equal(reader(golden("appended"), column), expected)
    np.testing.assert_array_equal(reader(golden("appended"), "layer"), [1, 3])
    np.testing.assert_array_equal(reader(golden("appended"), "mlp_out_layer"), [3])


def site_of(site):
    return site.width, site.layers


def test_the_same_bytes_would_be_appended_today(tmp_path):
    assert before(tree(make_appended(tmp_path)), "ranges") == tree(golden("appended"))
    store = actstore.open(golden("appended"))
    assert store.plan.generation == 3
    assert store.documents.strings("text", np.arange(3)) == list(documents().texts)
    assert store.documents.numbers("pages", np.arange(3)).tolist() == [1, -2, 3]


@pytest.mark.parametrize("name", FINISHED)
def test_older_markers_lack_what_was_added_later(name):
    """And `before` changes nothing in them: what the test above leaves out are the new fields alone."""
    files = tree(golden(name))
    assert {"chunks", "ranges"} - json.loads(files[".act/commits/00000000.json"]).keys() == set(NOT_YET[name])
    assert before(files, *NOT_YET[name]) == files


def test_golden_stores_are_small():
    sizes = {name: sum(map(len, tree(golden(name)).values())) for name in STORES}
    assert all(size < 64_000 for size in sizes.values()), sizes
