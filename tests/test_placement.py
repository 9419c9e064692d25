"""Placement: rules by name, meshes that fit, and eight devices that compute what one computes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sharded
import xarray as xr
from flax import nnx
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

import actstore
import extract
from actstore.errors import InputError
from actstore.kvstore import Root
from actstore.ledger import read_plan
from actstore.verify import verify
from extract.mesh import Group, default_mesh, device_errors, make_mesh
from extract.models import ModelError, load_model
from extract.models.config import DecoderConfig
from extract.models.placement import axes_of, check_mesh, meshes_that_fit, partition
from extract.sources import open_documents

ROOT = Path(actstore.__file__).parent.parent
EIGHT = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
}
CONFIG = load_model(sharded.TINY).config  # 4 heads over 2 key heads, an inner width of 320, a vocabulary of 1024


def config(**changes: int) -> DecoderConfig:
    shape: dict[str, Any] = dict.fromkeys(DecoderConfig.__dataclass_fields__)
    shape = {name: getattr(CONFIG, name) for name in shape} | changes
    return DecoderConfig(**shape)


# --- rules ---

Q, K, O = (("layers", 0, "attention", name, "weight") for name in ("query", "key", "output"))  # noqa: E741
UP, DOWN, BIAS = ("layers", 1, "mlp", "up", "weight"), ("layers", 1, "mlp", "down", "weight"), (*K[:-1], "bias")

PARTITIONS: dict[str, tuple[tuple[str | int, ...], int, dict[str, int], tuple[str | None, ...]]] = {
    "heads": (Q, 2, {}, ("model", None)),
    "output": (O, 2, {}, (None, "model")),
    "key heads": (K, 2, {}, ("model", None)),
    "bias of key heads": (BIAS, 2, {}, ("model",)),
    "fewer key heads than model": (K, 4, {}, (None, None)),
    "their bias": (BIAS, 4, {}, (None,)),
    "key heads that model does not divide": (K, 2, {"heads": 6, "kv_heads": 3}, (None, None)),
    "up": (UP, 4, {}, ("model", None)),
    "down": (DOWN, 4, {}, (None, "model")),
    "embedding": (("embedding",), 4, {}, ("model", None)),
    "vocabulary that model does not divide": (("embedding",), 4, {"vocab_size": 50257}, (None, None)),
    "head": (("head", "weight"), 2, {}, ("model", None)),
    "norm": (("layers", 0, "attention_norm", "weight"), 2, {}, (None,)),
    "norm of a head": (("layers", 0, "attention", "query_norm", "weight"), 2, {}, (None,)),
    "norm after": (("layers", 0, "mlp_post_norm", "bias"), 2, {}, (None,)),
    "positions": (("position_embedding",), 2, {}, (None, None)),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_each_parameter_is_cut_by_its_rule(name):
    path, model, changes, expected = PARTITIONS[name]
    assert partition(path, config(**changes), model=model) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    "path",
    [("layers", 0, "attention", "gate", "weight"), ("layers", 0, "attention", "query"), ("router", "weight")],
    ids=["module", "leaf", "outside"],
)
def test_a_parameter_without_a_rule_is_refused(path):
    shown = "/".join(map(str, path))
    with pytest.raises(ModelError, match=f"found parameter {shown} without a rule of placement; expected one of emb"):
        axes_of(path)


def test_every_parameter_has_as_many_named_axes_as_it_has_axes():
    for path, variable in nnx.to_flat_state(load_model(sharded.TINY).params):
        assert len(axes_of(path)) == variable[...].ndim, path


# --- meshes ---

FITS = {
    "four heads": ({}, 8, [(8, 1), (4, 2), (2, 4)]),
    "one device": ({}, 1, [(1, 1)]),
    "three devices": ({}, 3, [(3, 1)]),
    "nine heads": ({"heads": 9, "kv_heads": 3, "intermediate_size": 1536}, 12, [(12, 1), (4, 3)]),
    "inner width": ({"heads": 8, "intermediate_size": 36}, 8, [(8, 1), (4, 2), (2, 4)]),
}


@pytest.mark.parametrize("name", FITS)
def test_meshes_that_fit_are_those_that_are_not_refused(name):
    changes, devices, expected = FITS[name]
    shape = config(**changes)
    assert meshes_that_fit(shape, devices=devices) == expected
    for model in range(1, devices + 1):
        if devices % model == 0 and (devices // model, model) not in expected:
            with pytest.raises(ModelError, match=rf"{devices // model} x {model} .* use mesh {devices},1"):
                check_mesh(shape, data=devices // model, model=model)
    for data, model in expected:
        check_mesh(shape, data=data, model=model)


@pytest.mark.parametrize("shape", [(9, 2), (0, 1), (1, 0), (1, 17)])
def test_a_mesh_of_devices_that_are_not_there_is_refused(shape):
    there = jax.local_device_count()  # 1, or 2 after tests of adapters in this process
    with pytest.raises(InputError, match=rf"mesh .*,.* needs .* this process has {there} \(cpu\); give positive sizes"):
        make_mesh(*shape)


def test_one_device_needs_no_mesh():
    assert make_mesh(1, 1) is None
    assert default_mesh(7) == (1, 1), "no number of devices here divides 7"


def test_a_mesh_for_a_model_that_lies_somewhere_already_is_refused():
    model = extract.load_model(sharded.TINY)
    with pytest.raises(InputError, match=r"mesh is \(4, 2\), but the model is loaded already .* give the mesh to load"):
        extract.make_plan(sharded.TINY, open_documents("python-docs", limit=1), mesh=(4, 2), model=model)


# --- eight devices, one process for all tests ---


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    run = subprocess.run([sys.executable, sharded.__file__, str(folder)], env=EIGHT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {"odd folder": folder / "odd"} | json.loads(run.stdout)


PLACED = ["tiny-qwen2 8x1", "tiny-qwen2 4x2", "tiny-qwen2 2x4", "odd 2x4", "odd 1x8"]


@pytest.mark.parametrize("name", PLACED)
def test_every_site_equals_one_device(eight, name):
    errors = eight[name]["errors"]
    assert len(errors) == 13
    assert max(errors.values()) < 1e-5, errors


def test_kernels_are_dealt_out_over_a_mesh(eight):
    assert set(eight["kernels"]) == {"splash", "cudnn"}
    assert max(eight["kernels"].values()) < 1e-5, eight["kernels"]


@pytest.mark.parametrize("name", PLACED)
def test_the_digest_is_that_of_one_device(eight, name):
    assert eight[name]["same_digest"]


def bytes_of_a_device(tensors: dict[str, np.ndarray], *, model: int, kv_heads: int) -> int:
    """What one device must hold, from the names in the checkpoint."""
    total = 0
    for name, tensor in tensors.items():
        cut = ("q_proj" in name and "weight" in name) or any(part in name for part in ("o_proj", "mlp", "q_proj"))
        cut = cut or (("k_proj" in name or "v_proj" in name) and kv_heads % model == 0)
        cut = cut or (("embed" in name or "lm_head" in name) and len(tensor) % model == 0)
        total += tensor.nbytes // (model if cut else 1)
    return total


@pytest.mark.parametrize("name", PLACED)
def test_each_device_holds_its_own_part_and_no_more(eight, name):
    folder = sharded.TINY if name.startswith("tiny") else eight["odd folder"]
    model = int(name[-1])
    expected = bytes_of_a_device(load_file(folder / "model.safetensors"), model=model, kv_heads=2)
    assert eight[name]["devices"] == {"bytes": [expected] * 8, "right": True}


@pytest.mark.parametrize("name", [name for name in PLACED if name.startswith("tiny")])
def test_devices_exchange_two_sums_a_layer_and_never_a_weight(eight, name):
    """One sum for the embedding, two for each of 4 layers, one of the kept rows where the batch is dealt out."""
    data, model = int(name[-3]), int(name[-1])
    rows = len(sharded.batch(1024)["kept"])
    stream = {f"all-reduce f32[{8 // data},70,128]": 9} if model > 1 else {}
    kept = {f"all-reduce f32[{rows},128]": 1} if data > 1 else {}
    assert eight[name]["resid_post"] == stream | kept


@pytest.mark.parametrize("name", [name for name in PLACED if name.startswith("tiny")])
def test_of_a_site_that_is_cut_only_the_kept_rows_are_gathered(eight, name):
    gathers = [what for what in eight[name]["mlp_post"] if not what.startswith("all-reduce")]
    assert gathers == ([] if name.endswith("x1") else [f"all-gather f32[{len(sharded.batch(1024)['kept'])},320]"])


def test_meta_a_gathered_weight_would_be_seen(eight):
    assert eight["gathered"] == {"all-gather f32[320,128]": 1}


def test_a_mesh_that_does_not_fit_is_refused_with_those_that_do(eight):
    assert eight["tiny-qwen2 1x8"] == {
        "refused": "found a mesh of 1 x 8 devices (data x model) for 4 heads and an inner width of 320; expected a "
        "model axis that divides both; use mesh 8,1 or 4,2 or 2,4"
    }


def test_a_batch_that_cannot_be_dealt_out_is_refused(eight):
    assert eight["uneven"] == {
        "forward": "found a batch of 6; expected a multiple of 4, the mesh's axis data; pad the batch with rows of "
        "segment id 0",
        "plan": "a batch of 6 contexts cannot be dealt out to 4 parts, the mesh's axis data; expected a multiple of 4; "
        "use --batch 4 or 8, or --mesh 3,2",
    }


def test_without_a_mesh_a_run_takes_the_devices_that_divide_its_batch(eight):
    assert eight["default"] == {"1": [1, 1], "6": [6, 1], "8": [8, 1], "12": [6, 1], "16": [8, 1]}


# --- the command ---

ARGUMENTS = ["--documents", "python-docs", "--limit", "6", "--context", "64", "--dtype", "float32", "--sites"]
SITES = ("resid_post", "mlp_post")


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory) -> Iterator[Path]:
    """A store that `actstore extract --mesh 4,2` wrote."""
    url = tmp_path_factory.mktemp("mesh") / "run.acts.zarr"
    command = [
        sys.executable,
        "-m",
        "actstore",
        "extract",
        str(url),
        "--model",
        "tiny-qwen2",
        *ARGUMENTS,
        ",".join(SITES),
    ]
    run = subprocess.run([*command, "--layers", "1,3", "--mesh", "4,2"], env=EIGHT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "computed in float32 on 4 x 2 devices (data x model)" in run.stderr
    return url


def assert_whole(url: Path) -> None:
    root = Root.of(str(url))
    assert verify(root, read_plan(root)).findings == ()


def plan_of_one_device(**settings: Any) -> extract.ExtractPlan:
    documents = open_documents("python-docs", limit=6)
    model = extract.load_model(sharded.TINY)
    return extract.make_plan(
        sharded.TINY, documents, sites=SITES, layers=[1, 3], context=64, dtype="float32", model=model, **settings
    )


def test_the_store_of_a_mesh_is_whole_and_has_the_rows_and_the_fingerprint_of_one_device(on_mesh, tmp_path):
    assert_whole(on_mesh)
    plan = plan_of_one_device()
    extract.run(plan, str(tmp_path / "one.acts.zarr"))
    ours, theirs = xr.open_dataset(on_mesh), xr.open_dataset(tmp_path / "one.acts.zarr")
    assert read_plan(Root.of(str(on_mesh))).fingerprint == plan.store.fingerprint
    for site in SITES:
        expected = theirs[site].values
        error = np.linalg.norm(ours[site].values - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        assert error.max() < 1e-5


def test_a_store_of_a_mesh_is_appended_to_on_one_device(on_mesh):
    extract.run(extract.append_layers(str(on_mesh), sharded.TINY, layers=[2]), str(on_mesh))
    assert_whole(on_mesh)


@pytest.mark.parametrize("text", ["4", "4,2,1", "4x2", "-4,2", "a,b", ""])
def test_a_mesh_that_is_not_two_numbers_is_refused(text):
    from extract.options import mesh_sizes

    with pytest.raises(
        InputError, match=r"--mesh is .*; expected two whole numbers, DATA,MODEL, such as 4,2 for 8 dev"
    ):
        mesh_sizes(text)


def test_a_device_without_memory_is_told_in_one_line():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore")
    expected = r"a device ran out of memory \(RESOURCE_EXHAUSTED: .* 9 bytes.\); run again with a smaller --batch or"
    with pytest.raises(InputError, match=expected), device_errors(Group.of(None)):
        raise full
    with pytest.raises(jax.errors.JaxRuntimeError), device_errors(Group.of(None)):
        raise jax.errors.JaxRuntimeError("INTERNAL: a chip")
