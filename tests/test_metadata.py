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
from zarr.core.metadata.v3 import ArrayV3Metadata

from actstore import Column, DocumentTable, Layout, Plan, Site
from actstore.metadata import array_metadata, group_metadata, table_metadata
from actstore.schema import canonical_json

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


def tensorstore_metadata(spec, *, create):
    """An array of this metadata in memory, as TensorStore reads (`create` False) or makes it."""
    kvstore = ts.KvStore.open({"driver": "memory"}, context=ts.Context()).result()
    base = {"driver": "zarr3", "kvstore": kvstore.spec().to_json()}
    if not create:
        kvstore.write("zarr.json", canonical_json(spec)).result()
        return ts.open(base, open=True, context=kvstore.spec().to_json().get("context"), kvstore=None)
    return ts.open(base | {"metadata": spec}, create=True)


@pytest.mark.parametrize(("name", "spec"), NODES)
def test_tensorstore_opens_it(tmp_path, name, spec):
    (tmp_path / "zarr.json").write_bytes(canonical_json(spec))
    array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/"}}, open=True).result()
    assert list(array.shape) == spec["shape"]
    assert array.dtype.name == spec["data_type"]
    assert list(array.domain.labels) == spec["dimension_names"]
    assert list(array.chunk_layout.write_chunk.shape) == spec["chunk_grid"]["configuration"]["chunk_shape"]


@pytest.mark.parametrize(("name", "spec"), NODES)
def test_zarr_reads_it_and_writes_the_same(name, spec):
    """zarr-python parses every field and, asked for JSON again, says nothing else."""
    again = ArrayV3Metadata.from_dict(json.loads(canonical_json(spec))).to_dict()
    assert again["data_type"].to_json(zarr_format=3) == spec["data_type"]
    np.testing.assert_equal(float(again["fill_value"]), float(spec["fill_value"]))
    assert list(again["shape"]) == spec["shape"]
    assert list(again["dimension_names"]) == spec["dimension_names"]
    assert again["attributes"] == spec["attributes"]
    assert list(again["codecs"]) == [zarr_codec(codec) for codec in spec["codecs"]]
