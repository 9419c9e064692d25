"""The bfloat16 data type of zarr: what zarr-python writes, TensorStore reads, and the other way round, bit by bit."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import zarr
from zarr.dtype import data_type_registry

from actstore import bfloat16
from actstore.bfloat16 import BFloat16, DataTypeValidationError

EVERY = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def tensorstore(folder, **options):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}, **options}
    return ts.open(spec, create="metadata" in options, open="metadata" not in options).result()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # zarr compares chunks with the fill value: NaNs
@pytest.mark.parametrize("shards", [None, (1 << 15,)], ids=["chunks", "shards"])
def test_tensorstore_reads_what_zarr_writes(tmp_path, shards):
    array = zarr.create_array(tmp_path, shape=EVERY.shape, chunks=(1 << 12,), shards=shards, dtype=EVERY.dtype)
    array[:] = EVERY
    found = tensorstore(tmp_path).read().result()
    assert found.dtype == EVERY.dtype
    np.testing.assert_array_equal(found.view(np.uint16), EVERY.view(np.uint16))


def test_zarr_reads_what_tensorstore_writes(tmp_path):
    metadata = {"shape": [1 << 16], "data_type": "bfloat16", "fill_value": "NaN"}
    tensorstore(tmp_path, metadata=metadata).write(EVERY).result()
    array = zarr.open_array(tmp_path, mode="r")
    assert array.dtype == EVERY.dtype
    np.testing.assert_array_equal(array[:].view(np.uint16), EVERY.view(np.uint16))
    np.testing.assert_array_equal(array[5:40000:7].view(np.uint16), EVERY[5:40000:7].view(np.uint16))


def test_metadata_names_type_and_byte_order(tmp_path):
    zarr.create_array(tmp_path, shape=(4,), dtype=EVERY.dtype, compressors=None)
    metadata = json.loads((tmp_path / "zarr.json").read_bytes())
    assert metadata["data_type"] == "bfloat16"
    assert metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]


@pytest.mark.parametrize("fill", [0.0, -0.0, 1.5, float("nan"), float("inf"), float("-inf"), 3.3895314e38], ids=str)
def test_fill_values_come_back(tmp_path, fill):
    zarr.create_array(tmp_path, shape=(3,), dtype=EVERY.dtype, fill_value=fill)
    for found in (zarr.open_array(tmp_path, mode="r")[:], tensorstore(tmp_path).read().result()):
        np.testing.assert_array_equal(found.astype(np.float32), np.full(3, fill, ml_dtypes.bfloat16).astype(np.float32))
        assert (np.signbit(found.astype(np.float32)) == np.signbit(fill)).all() or np.isnan(fill)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint16", "int16", "float8_e5m2"])
def test_other_types_are_left_to_zarr(dtype):
    with pytest.raises(DataTypeValidationError, match=f"found {dtype}, expected bfloat16"):
        BFloat16.from_native_dtype(np.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "bool"])
def test_types_of_zarr_stay_what_they_are(tmp_path, dtype):
    zarr.create_array(tmp_path, shape=(3,), dtype=dtype)[:] = np.array([0, 1, 1], dtype)
    assert zarr.open_array(tmp_path, mode="r").dtype == dtype


def test_registering_again_is_harmless():
    bfloat16.register()
    bfloat16.register()
    assert data_type_registry.get("bfloat16") is BFloat16
    assert isinstance(data_type_registry.match_dtype(EVERY.dtype), BFloat16)


def test_the_type_knows_itself():
    kind = BFloat16()
    assert kind.to_native_dtype() == EVERY.dtype
    assert kind.item_size == EVERY.itemsize
    assert kind.to_json(zarr_format=3) == "bfloat16"
    assert BFloat16.from_json("bfloat16", zarr_format=3) == kind


def test_a_program_that_only_knows_zarr_reads_a_store(finished, contents):
    """A fresh process that never names actstore, every warning an error."""
    program = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "import zarr\n"
        "rows = zarr.open_group(sys.argv[1], mode='r')['resid_post']\n"
        "print(rows.dtype, float(rows[:].astype('float32').sum()))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(finished)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    dtype, total = answer.stdout.split()
    assert dtype == "bfloat16"
    assert float(total) == pytest.approx(contents.rows["resid_post"].astype(np.float32).sum(), rel=1e-5)
