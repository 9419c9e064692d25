"""The loader: every tensor arrives, and whatever is wrong with a folder is said in words that help."""

import dataclasses
import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import extract
from extract.models import Model, ModelError, families, load_model, loading
from extract.models.checkpoint import Checkpoint
from extract.models.reading import Family

TINY = Path(extract.__path__[0]) / "demo" / "tiny-qwen2"


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model(TINY)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    target = tmp_path / "tiny"
    shutil.copytree(TINY, target)
    return target


ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: array for name, array in tensors.items() if array is not None}, folder / "model.safetensors")


def shard(folder: Path, *, count: int = 3) -> dict[str, str]:
    """Cuts the checkpoint into shards; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{number % count}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def leaves(model: Model) -> dict[Any, np.ndarray]:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(model.params)}


def test_every_tensor_arrives_unchanged(tiny):
    tensors = load_file(TINY / "model.safetensors")
    found = sorted(array.tobytes() for array in leaves(tiny).values())
    assert found == sorted(array.tobytes() for array in tensors.values())


def test_shards_equal_a_single_file(tiny, folder):
    shard(folder)
    sharded = load_model(folder)
    assert sharded.weights_digest == tiny.weights_digest
    for path, array in leaves(tiny).items():
        np.testing.assert_array_equal(leaves(sharded)[path], array)


def test_an_index_may_list_buffers_that_no_shard_has(tiny, folder):
    weight_map = shard(folder)
    write_index(folder, weight_map | {ROTARY: "part-0.safetensors"} | {ROTARY.replace("0", "1"): "part-9.safetensors"})
    assert load_model(folder).weights_digest == tiny.weights_digest


def test_meta_a_buffer_of_another_name_that_no_shard_has_is_refused(folder):
    write_index(folder, shard(folder) | {ROTARY + "x": "part-0.safetensors"})
    with pytest.raises(ModelError, match=r"found 1 tensors that are not in the file .*inv_freqx\); expected index and"):
        load_model(folder)


@pytest.mark.parametrize("buffer", ["attn.bias", "attn.masked_bias"])
def test_an_index_of_gpt2_may_list_its_masks(tmp_path, buffer):
    golden = Path(__file__).parent / "golden_models" / "gpt2"
    folder = Path(shutil.copytree(golden, tmp_path / "gpt2"))
    write_index(folder, shard(folder) | {f"h.0.{buffer}": "part-0.safetensors"})
    assert load_model(folder).weights_digest == load_model(golden).weights_digest


def test_model_says_what_it_is(tiny):
    assert (tiny.name, tiny.dtype, tiny.config.family, tiny.config.layers) == ("tiny-qwen2", "float32", "qwen2", 4)
    assert len(tiny.weights_digest) == len(tiny.config_digest) == 64


def test_weights_digest_sees_one_changed_bit(tiny, folder):
    norm = load_file(folder / "model.safetensors")["model.norm.weight"]
    norm.view(np.uint32)[0] ^= 1
    edit_tensors(folder, {"model.norm.weight": norm})
    assert load_model(folder).weights_digest != tiny.weights_digest


def test_weights_digest_sees_exchanged_tensors(tiny, folder):
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    tensors = load_file(folder / "model.safetensors")
    edit_tensors(folder, {names[0]: tensors[names[1]], names[1]: tensors[names[0]]})
    assert load_model(folder).weights_digest != tiny.weights_digest


def test_weights_digest_does_not_depend_on_the_dtype_computed_in(tiny):
    assert load_model(TINY, dtype="bfloat16").weights_digest == tiny.weights_digest


def test_config_digest_is_that_of_the_meaning(tiny, folder):
    raw = json.loads((folder / "config.json").read_text())
    theta = raw.pop("rope_theta")
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(raw, indent=3))
    assert load_model(folder).config_digest == tiny.config_digest
    edit_config(folder, {"rms_norm_eps": 1e-5})
    assert load_model(folder).config_digest != tiny.config_digest


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("requested", ["float32", "bfloat16"])
def test_stored_dtypes_are_converted(folder, stored, requested):
    tensors = {name: array.astype(stored) for name, array in load_file(folder / "model.safetensors").items()}
    edit_tensors(folder, tensors)
    model = load_model(folder, dtype=requested)
    found = leaves(model)[("embedding",)]
    assert found.dtype == jnp.dtype(requested)
    expected = tensors["model.embed_tokens.weight"].astype(np.float32).astype(jnp.dtype(requested))
    np.testing.assert_array_equal(found, expected)


def test_a_stored_copy_of_the_tied_head_is_accepted(folder):
    edit_tensors(folder, {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]})
    assert ("head", "weight") not in leaves(load_model(folder))


UP = "model.layers.2.mlp.up_proj.weight"

WRONG_TENSORS: dict[str, tuple[dict[str, np.ndarray | None], str]] = {
    "missing": ({UP: None}, f"found no tensor {UP}; expected every tensor of the model; download it again"),
    "left_over": (
        {"model.layers.0.self_attn.q_norm.weight": np.ones(32, np.float32)},
        "found tensors that have no place in this model: model.layers.0.self_attn.q_norm.weight; expected every tensor",
    ),
    "many_left_over": (
        {f"extra.{number}": np.ones(1, np.float32) for number in range(7)},
        "extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more; expected every tensor",
    ),
    "shape": (
        {UP: np.ones((128, 320), np.float32)},
        f"found tensor {UP!r} of shape (128, 320); expected (320, 128) by config.json",
    ),
    "dtype": (
        {UP: np.ones((320, 128), np.int8)},
        f"found tensor {UP!r} of dtype I8 in model.safetensors; expected one",
    ),
    "head": (
        {"lm_head.weight": np.zeros((1024, 128), np.float32)},
        "found 'lm_head.weight' that differs from 'model.embed_tokens.weight'; expected the same values",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors_are_refused(folder, name):
    changes, message = WRONG_TENSORS[name]
    edit_tensors(folder, changes)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert message in str(caught.value)


def test_missing_and_left_over_tensors_are_reported_together(folder):
    edit_tensors(folder, {UP: None, "extra": np.ones(1, np.float32)})
    with pytest.raises(ModelError, match=f"(?s)found no tensor {UP}.*no place in this model: extra"):
        load_model(folder)


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": (
        {"model_type": "mamba"},
        (
            "found model_type 'mamba' in config.json; expected one of the supported families: gemma, gemma2, "
            "gemma3_text, gpt2, llama, mistral, qwen2, qwen3; convert the model"
        ),
    ),
    "activation": ({"hidden_act": "gelu"}, "found hidden_act 'gelu'; expected 'silu'"),
    "architecture": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "found architectures ['Qwen2ForSequenceClassification']; expected ['Qwen2ForCausalLM']",
    ),
    "mrope": ({"use_mrope": True}, "found use_mrope True; expected False"),
    "partial_rotary": ({"partial_rotary_factor": 0.5}, "found partial_rotary_factor 0.5; expected 1.0"),
    "quantised": ({"quantization_config": {"bits": 4}}, "found quantization_config {'bits': 4}; expected no such key"),
    "remote_code": ({"auto_map": {"AutoModel": "x.Y"}}, "found auto_map {'AutoModel': 'x.Y'}; expected no such key"),
    "rope": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0}},
        "found rope type 'longrope'; expected one of default, linear, dynamic, yarn, llama3; frequencies of longrope",
    ),
    "layer_type": (
        {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
        "found layer_types with 4 entries and unknown ['linear_attention']; expected 4 entries",
    ),
    "layer_count": ({"layer_types": ["full_attention"]}, "found layer_types with 1 entries; expected 4 entries"),
    "window": (
        {"layer_types": ["sliding_attention"] * 4},
        "found sliding_attention in layer_types, but use_sliding_window is false or sliding_window is null",
    ),
    "heads": ({"num_key_value_heads": 3}, "found num_attention_heads 4 and num_key_value_heads 3; expected the first"),
    "head_dim": ({"num_attention_heads": 6}, "found hidden_size 128 and num_attention_heads 6 without head_dim"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_configs_that_cannot_be_computed_are_refused(folder, name):
    changes, message = WRONG_CONFIGS[name]
    edit_config(folder, changes)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert message in str(caught.value)


def test_missing_keys_are_named_together(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["vocab_size"], raw["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"(?s)found no vocab_size; expected a number.*found no num_key_value_heads"):
        load_model(folder)


def only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def break_index(folder: Path, changes: dict[str, str]) -> None:
    write_index(folder, shard(folder) | changes)


WRONG_FOLDERS: dict[str, tuple[Any, str]] = {
    "absent": (shutil.rmtree, "found nothing at {folder}; expected a HuggingFace model folder with config.json and"),
    "no_config": (
        lambda folder: only(folder, "model.safetensors"),
        "found model.safetensors in {folder}; expected a HuggingFace model folder with config.json",
    ),
    "empty": (only, "found nothing in {folder}; expected a HuggingFace model folder"),
    "broken_json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "found config.json that is not JSON (Expecting property name",
    ),
    "not_an_object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "found config.json with a list; expected a JSON object; write or download {folder}/config.json again",
    ),
    "no_weights": (
        lambda folder: only(folder, "config.json"),
        "expected model.safetensors, or shards with model.safetensors.index.json; download the weights into this",
    ),
    "pickled_weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled torch weights can run code and are never read: save the model again with save_pretrained",
    ),
    "cut_off": (
        lambda folder: (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-100]),
        "found model.safetensors that is not a safetensors file",
    ),
    "missing_shard": (
        lambda folder: (shard(folder), (folder / "part-1.safetensors").unlink()),
        "found shard 'part-1.safetensors' in model.safetensors.index.json, but no such file in {folder}",
    ),
    "shard_elsewhere": (
        lambda folder: break_index(folder, {UP: "../tiny/part-0.safetensors"}),
        "found shard '../tiny/part-0.safetensors' in model.safetensors.index.json, but no such file in {folder}",
    ),
    "wrong_index": (
        lambda folder: break_index(folder, {"extra": "part-0.safetensors"}),
        "found 1 tensors that are not in the file model.safetensors.index.json says (extra); expected index and",
    ),
    "numbers_for_files": (
        lambda folder: break_index(folder, {UP: 3}),
        "found model.safetensors.index.json without weight_map; expected tensor names with their files",
    ),
    "no_weight_map": (
        lambda folder: (shard(folder), (folder / "model.safetensors.index.json").write_text("{}")),
        "found model.safetensors.index.json without weight_map; expected tensor names with their files",
    ),
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_folders_that_cannot_be_loaded_are_refused(folder, name):
    damage, message = WRONG_FOLDERS[name]
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert message.format(folder=folder) in str(caught.value)


def test_a_file_is_not_a_folder():
    with pytest.raises(ModelError, match=r"found a file at .*config.json; expected a HuggingFace model folder"):
        load_model(TINY / "config.json")


def test_unknown_dtype_is_refused():
    with pytest.raises(
        ModelError, match="found dtype 'float16'; expected one of float32, bfloat16; pass dtype='float32'"
    ):
        load_model(TINY, dtype="float16")


def fused(folder: Path) -> Family:
    """Stores queries, keys and values of each layer as one transposed tensor; returns the family that says so."""
    tensors = load_file(folder / "model.safetensors")
    family = families.FAMILIES["qwen2"]
    apart = [f"self_attn.{each}_proj.weight" for each in "qkv"]
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        tensors[f"{prefix}qkv"] = np.concatenate([tensors.pop(prefix + name) for name in apart]).T.copy()
    save_file(tensors, folder / "model.safetensors")
    others = {name: form for name, form in family.layer_tensors.items() if name not in apart}
    together = "T:" + "+".join(family.layer_tensors[name] for name in apart)
    return dataclasses.replace(family, layer_tensors=others | {"qkv": together})


def test_parameters_may_be_parts_of_a_transposed_tensor(tiny, folder, monkeypatch):
    family = fused(folder)
    monkeypatch.setattr(loading, "family_of", lambda _: family)
    for path, array in leaves(tiny).items():
        np.testing.assert_array_equal(leaves(load_model(folder))[path], array)


def test_a_tensor_of_parts_must_have_their_shape(folder, monkeypatch):
    family = fused(folder)
    monkeypatch.setattr(loading, "family_of", lambda _: family)
    edit_tensors(folder, {"model.layers.1.qkv": np.ones((128, 264), np.float32)})
    with pytest.raises(
        ModelError, match=r"found tensor 'model.layers.1.qkv' of shape \(128, 264\); expected \(128, 256"
    ):
        load_model(folder)


def test_the_digest_of_the_tiny_model_is_what_it_always_was(tiny):
    """Stores keep it: plans of another digest are plans of another model. Computed here from the definition."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(TINY / "model.safetensors").items()):
        digest.update(json.dumps([name, "F32", array.shape]).encode() + array.tobytes())
    assert tiny.weights_digest == digest.hexdigest()


def test_what_goes_wrong_while_loading_stops_the_thread_that_hashes(folder, monkeypatch):
    stops = []
    digest = Checkpoint.digest

    def slow(self: Checkpoint, *, stop: threading.Event) -> str:
        stops.append(stop.wait(30))
        return digest(self, stop=stop)

    monkeypatch.setattr(Checkpoint, "digest", slow)
    edit_tensors(folder, {"lm_head.weight": np.zeros((1024, 128), np.float32)})
    with pytest.raises(ModelError, match=r"found 'lm_head.weight' that differs"):
        load_model(folder)
    assert stops == [True]
