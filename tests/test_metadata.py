"""Zarr metadata: what zarr-python and TensorStore make of it by themselves, padded and complete."""

import dataclasses
import json

import numpy as np
import pytest
import tensorstore as ts
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import LAYOUT, make_contents
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata.v3 import ArrayV3Metadata

from actstore import Column, DocumentTable, Layout, Plan, Site
from actstore.metadata import array_metadata, group_metadata, table_metadata
from actstore.untrusted import canonical_json

PLANS = {
    "several sites, documents": make_contents().plan,
    "one site": Plan.make(Layout((Site("resid_post", 896, (6, 12)),), 100_000, 65_536, 256), {}),
    "layerless only": Plan.make(Layout((Site("embed", 7, None, "float32"),), 10, 4, 2), {}),
    "no columns": Plan.make(Layout((Site("a", 3, (0,)),), 10, 4, 2, columns=()), {}),
    "every column": Plan.make(
        Layout(
            (Site("a", 3, (0,)),), 10, 4, 2,
            columns=tuple(
                Column(f"c_{dtype}", dtype)
                for dtype in ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64"]
            ),
        ),
        {},
    ),
    "zstd": Plan.make(dataclasses.replace(LAYOUT, codec="zstd"), {}),
    "no codec": Plan.make(dataclasses.replace(LAYOUT, codec="none"), {}),
}  # fmt: skip
NODES = [
    pytest.param(name, spec, id=f"{plan_name}-{name}")
    for plan_name, plan in PLANS.items()
    for name, spec in array_metadata(plan, complete=True).items()
]


@pytest.mark.parametrize(("name", "spec"), NODES)
def test_tensorstore_opens_it(tmp_path, name, spec):
    (tmp_path / "zarr.json").write_bytes(canonical_json(spec))
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}}, open=True).result()
    assert list(array.shape) == spec["shape"]
    assert array.dtype.name == spec["data_type"]
    assert list(array.domain.labels) == spec["dimension_names"]
    assert list(array.chunk_layout.write_chunk.shape) == spec["chunk_grid"]["configuration"]["chunk_shape"]


@pytest.mark.parametrize(("name", "spec"), NODES)
def test_zarr_would_write_the_same(name, spec):
    """zarr-python parses every field and, asked for JSON again, says exactly this."""
    prototype = default_buffer_prototype()  # with the first one, zarr 3.1 loads what packages add to it
    parsed = ArrayV3Metadata.from_dict(json.loads(canonical_json(spec)))
    again = parsed.to_buffer_dict(prototype)["zarr.json"].to_bytes()
    assert json.loads(again) == spec


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_padded_shapes_are_whole_blocks(plan):
    padded, complete = array_metadata(plan, complete=False), array_metadata(plan, complete=True)
    assert list(padded) == list(complete)
    for name, spec in complete.items():
        if "sample" not in spec["dimension_names"]:
            assert padded[name] == spec
            continue
        axis = spec["dimension_names"].index("sample")
        block = spec["chunk_grid"]["configuration"]["chunk_shape"][axis]
        assert block == plan.layout.block_samples
        assert spec["shape"][axis] == plan.layout.samples
        assert padded[name]["shape"][axis] == -(-plan.layout.samples // block) * block
        assert {**padded[name], "shape": None} == {**spec, "shape": None}  # nothing else differs


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_array_is_there_once(plan):
    layout = plan.layout
    expected = {"valid"} | {column.name for column in layout.columns}
    for site in layout.sites:
        expected |= {site.name, f"{site.name}_norm"}
        if site.layers is not None:
            expected.add("layer" if site.layers == first_layers(layout) else f"{site.name}_layer")
    found = set(array_metadata(plan, complete=True))
    assert {name for name in found if "/" not in name} == expected
    assert any("/" in name for name in found) == (plan.documents is not None)


def first_layers(layout):
    return next(site.layers for site in layout.sites if site.layers is not None)


@pytest.mark.parametrize("status", ["writing", "complete"])
def test_consolidated_metadata_is_that_of_the_nodes(contents, status):
    group = group_metadata(contents.plan, status=status)
    nodes = dict(group["consolidated_metadata"]["metadata"])
    documents = nodes.pop("documents")
    assert (documents["zarr_format"], documents["node_type"]) == (3, "group")
    assert nodes == array_metadata(contents.plan, complete=status == "complete")
    assert group["attributes"]["actstore"] == {"format": 1, "status": status, "fingerprint": contents.plan.fingerprint}
    assert group["attributes"]["model"] == "made-up"


@pytest.mark.parametrize(("folder", "complete"), [("finished", True), ("unfinished", False)])
def test_what_is_stored_is_this_metadata(request, contents, folder, complete):
    path = request.getfixturevalue(folder)
    for name, spec in array_metadata(contents.plan, complete=complete).items():
        assert json.loads((path / name / "zarr.json").read_bytes()) == spec
    status = "complete" if complete else "writing"
    assert json.loads((path / "zarr.json").read_bytes()) == group_metadata(contents.plan, status=status)


@pytest.mark.filterwarnings("ignore:Object at .act is not recognized")  # only where consolidated metadata is not used
def test_zarr_sees_the_whole_hierarchy(finished, contents):
    with_consolidated, without = (
        dict(zarr.open_group(finished, mode="r", use_consolidated=use).members(max_depth=None)) for use in (True, False)
    )
    assert set(with_consolidated) == set(without) == {*array_metadata(contents.plan, complete=True), "documents"}
    assert all(without[name].metadata == node.metadata for name, node in with_consolidated.items() if "/" in name)


def test_a_shard_has_the_codecs_of_the_layout():
    chains = {
        codec: array_metadata(Plan.make(dataclasses.replace(LAYOUT, codec=codec), {}), complete=True)["resid_post"]
        for codec in ("none", "crc32c", "zstd")
    }
    inner = {
        codec: [part["name"] for part in spec["codecs"][0]["configuration"]["codecs"]] for codec, spec in chains.items()
    }
    assert inner == {"none": ["bytes"], "crc32c": ["bytes", "crc32c"], "zstd": ["bytes", "zstd", "crc32c"]}
    chunk = chains["crc32c"]["codecs"][0]["configuration"]["chunk_shape"]
    assert (chains["crc32c"]["chunk_grid"]["configuration"]["chunk_shape"], chunk) == ([1, 16, 6], [1, 4, 6])


TABLES = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=6)


@given(TABLES)
@settings(max_examples=15)
def test_table_shapes_are_those_of_its_arrays(texts):
    none = np.zeros(0, np.int32)
    table = DocumentTable(
        [str(number) for number in range(len(texts))], texts, np.zeros(len(texts) + 1, np.int64), none,
        none.astype(np.uint32), none.astype(np.uint32), columns={"size": [len(text) for text in texts]},
    )  # fmt: skip
    specs = table_metadata(table.layout)
    arrays = table.arrays()
    assert set(specs) == set(arrays)
    for name, values in arrays.items():
        assert (tuple(specs[name]["shape"]), specs[name]["data_type"]) == (values.shape, values.dtype.name)
        assert min(specs[name]["chunk_grid"]["configuration"]["chunk_shape"]) >= 1
