"""What a family refuses, and what it reads from a folder: keys, ropes, names and shapes of tensors. Needs no torch."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from family_configs import CONFIGS, LLAMA, LLAMA3, ONE_OF_EACH
from flax import nnx
from safetensors.numpy import load_file, save_file

import extract
from extract.forward import make_forward
from extract.models import Model, ModelError, Tap, load_model
from extract.models.config import DecoderConfig
from extract.models.decoder import Decoder
from extract.models.families import FAMILIES
from extract.models.reading import KINDS, ONLY_VALUES

GOLDEN = Path(__file__).parent / "golden_models"
MODELS = Path(extract.__path__[0]) / "models"
QWEN2_DIGEST = "94e4135619dba3230e322cf9f3f8814e8653392f7c7e2bf6a8569faa576e42d0"


def read(name: str, **changes: Any) -> DecoderConfig:
    raw = CONFIGS[name] | changes
    return FAMILIES[raw["model_type"]].read_config(raw)


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden model that a test may damage."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(GOLDEN / family, tmp_path / family))

    return copy


def edit(folder: Path, change: Any) -> None:
    """Rewrites the tensors of a folder; `change` takes and returns all of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def leaves(model: Model) -> dict[Any, bytes]:
    return {path: np.asarray(variable[...]).tobytes() for path, variable in nnx.to_flat_state(model.params)}


# --- the digest of a configuration ---


def test_the_digest_of_a_qwen2_is_what_it_was_before_there_were_other_families():
    raw = json.loads((MODELS.parent / "demo" / "tiny-qwen2" / "config.json").read_text())
    assert FAMILIES["qwen2"].read_config(raw).digest() == QWEN2_DIGEST


def test_every_configuration_that_computes_something_else_has_a_digest_of_its_own():
    # These two write one model in two ways, and are no more than that.
    same = {"llama3_v4", "llama3_v5"}, {"qwen2", "qwen2_window_given_but_not_used"}
    digests = {name: FAMILIES[raw["model_type"]].read_config(raw).digest() for name, raw in CONFIGS.items()}
    for first, second in same:
        assert digests.pop(first) == digests[second]
    assert len(set(digests.values())) == len(digests)


# --- keys that matter ---

ONLY = [
    (name, key)
    for family, name in ONE_OF_EACH.items()
    for key in [*ONLY_VALUES, "architectures", *FAMILIES[family].only_values]
]


@pytest.mark.parametrize(("name", "key"), ONLY)
def test_another_value_of_a_key_that_matters_is_refused(name, key):
    with pytest.raises(
        ModelError, match=rf"(?s)cannot be computed here:\n.*found {key} 'another'; expected .*; use a che"
    ):
        read(name, **{key: "another"})


@pytest.mark.parametrize(("name", "key"), ONLY)
def test_null_is_as_if_such_a_key_were_absent(name, key):
    raw = {other: value for other, value in CONFIGS[name].items() if other != key}
    assert FAMILIES[raw["model_type"]].read_config(raw) == read(name, **{key: None})


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "a word for a number": ("llama", {"hidden_size": "48"}, "found hidden_size '48'; expected a positive whole number"),
    "half a layer": ("qwen3", {"num_hidden_layers": 1.5}, "found num_hidden_layers 1.5; expected a positive whole"),
    "true": ("gemma", {"head_dim": True}, "found head_dim True; expected a positive whole number; correct config.json"),
    "no window": ("mistral_every_layer_windowed", {"sliding_window": 0}, "found sliding_window 0; expected a positive"),
    "epsilon": ("llama", {"rms_norm_eps": -1e-6}, "found rms_norm_eps -1e-06; expected a positive number; correct"),
    "cap": (
        "gemma2",
        {"attn_logit_softcapping": "50"},
        "found attn_logit_softcapping '50'; expected a positive number",
    ),
    "key of the family": ("gpt2", {"n_embd": "48"}, "found n_embd '48'; expected a positive whole number"),
    "heads of gpt2": ("gpt2", {"n_head": 5}, "found hidden_size 48 and num_attention_heads 5 without head_dim"),
    "layer_types": ("mistral_every_layer_windowed", {"layer_types": []}, "found layer_types []; expected no such key"),
    "types": ("gemma2", {"layer_types": ["full_attention"]}, "found layer_types with 1 entries; expected 2 entries"),
    "null window": (
        "gemma3_plain",
        {"sliding_window": None},
        "found sliding_attention in layer_types, but sliding_win",
    ),
    "flat rope of gemma3": (
        "gemma3_plain",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "expected one for full_attention and one for sliding_attention; correct config.json",
    ),
    "layered rope of others": (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "found rope parameters full_attention of type 'default'; expected only rope_type, rope_theta; use a check",
    ),
    "longrope": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "found rope type 'longrope'; expected one of default, linear, dynamic, yarn, llama3; frequencies of longrope",
    ),
    "unknown rope": ("qwen3", {"rope_scaling": {"type": "mrope"}}, "found rope type 'mrope'; expected one of default,"),
    "two ropes": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "dynamic", "factor": 2.0}},
        "found rope type 'dynamic', 'linear'; expected one of",
    ),
    "two factors": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 4.0}},
        "found rope_parameters {'factor': 4.0} and rope_scaling {'factor': 2.0}; expected both to say the same",
    ),
    "two bases": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e6}},
        "found rope_theta 10000.0 and 1000000.0 in one config.json; expected one value",
    ),
    "no factor": ("llama", {"rope_scaling": {"type": "linear"}}, "found rope type 'linear' without factor; expected"),
    "odd factor": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": "4"}},
        "found rope parameter factor '4'; expected a positive number; correct config.json",
    ),
    "stray parameter": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 4.0, "beta_fast": 2}},
        "found rope parameters beta_fast of type 'linear'; expected only rope_type, rope_theta, factor; use a check",
    ),
    "no object": ("llama", {"rope_scaling": "linear"}, "found rope parameters 'linear'; expected an object"),
    "a word for false": (
        "llama",
        {"tie_word_embeddings": "false"},
        "found tie_word_embeddings 'false'; expected true or false; correct config.json",
    ),
    "one for true": ("llama", {"attention_bias": 1}, "found attention_bias 1; expected true or false; correct config"),
    "list for a switch": ("llama", {"mlp_bias": []}, "found mlp_bias []; expected true or false; correct config.json"),
    "null in a string": (
        "qwen2_sliding_from_layer_1",
        {"use_sliding_window": "null"},
        "found use_sliding_window 'null'; expected true or false",
    ),
    "switch of gpt2": ("gpt2", {"scale_attn_weights": "no"}, "found scale_attn_weights 'no'; expected true or false"),
    "another of gpt2": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": 0},
        "found scale_attn_by_inverse_layer_idx 0; expected true or false",
    ),
    "a list of activations": (
        "gpt2",
        {"activation_function": ["gelu"]},
        "found activation_function ['gelu']; expected",
    ),
    "first window": (
        "qwen2_sliding_from_layer_1",
        {"max_window_layers": "x"},
        "found max_window_layers 'x'; expected a whole number, 0 or more; correct config.json",
    ),
    "first window below": (
        "qwen3",
        {"max_window_layers": -1},
        "found max_window_layers -1; expected a whole number, 0",
    ),
    "a word for types": (
        "gemma2",
        {"layer_types": "full_attention"},
        "found layer_types 'full_attention'; expected a list of strings; correct config.json",
    ),
    "lists for types": ("qwen2", {"layer_types": [["full_attention"]]}, "found layer_types [['full_attention']]; exp"),
    "no types": ("gemma2", {"layer_types": []}, "found layer_types with 0 entries; expected 2 entries"),
    "no types of gemma3": ("gemma3_plain", {"layer_types": []}, "found layer_types with 0 entries; expected 3 entries"),
    "infinite": ("llama", {"rms_norm_eps": float("inf")}, "found rms_norm_eps inf; expected a positive number"),
    "too large": ("llama", {"rms_norm_eps": 10**400}, "; expected a positive number; correct config.json"),
    "zero for false": ("qwen2", {"use_mrope": 0}, "found use_mrope 0; expected False; use a checkpoint without it"),
    "true for one": ("qwen2", {"partial_rotary_factor": True}, "found partial_rotary_factor True; expected 1.0"),
    "a word for theta": ("llama", {"rope_theta": "1e6"}, "found rope_theta '1e6'; expected a positive number; correct"),
    "true for theta": (
        "llama_yarn_v5",
        {"rope_parameters": {"rope_type": "default", "rope_theta": True}},
        "found rope_theta True; expected a positive number; correct config.json",
    ),
    "local theta": (
        "gemma3_v4",
        {"rope_local_base_freq": "1e3"},
        "found rope_local_base_freq '1e3'; expected a positive number; correct config.json",
    ),
    "list of ropes": (
        "gemma3_plain",
        {"rope_parameters": ["full_attention"]},
        "expected one for full_attention and one for sliding_attention; correct config.json",
    ),
    "rope in a rope": (
        "gemma3_plain",
        {"rope_parameters": {"full_attention": "linear"}},
        "found rope parameters 'linear'; expected an object; correct config.json",
    ),
    "number for a rope": ("llama", {"rope_scaling": {"type": 3, "rope_type": "yarn"}}, "found rope type 'yarn', 3; ex"),
    "list for a rope": ("llama", {"rope_scaling": {"type": ["yarn"]}}, "found rope type ['yarn']; expected one of"),
    "switch of a rope": (
        "qwen2_yarn_v4",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "false"}},
        "found rope parameter truncate 'false'; expected true or false; correct config.json",
    ),
    "length on top": (
        "llama3_rope_with_its_length_on_top",
        {"original_max_position_embeddings": "x"},
        "found original_max_position_embeddings 'x'; expected a positive number; correct config.json",
    ),
    "part of a head": (
        "llama",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "found rope parameters partial_rotary_factor of type 'default'; expected only rope_type, rope_theta",
    ),
}


@pytest.mark.parametrize(("name", "changes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_computed_is_refused(name, changes, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        read(name, **changes)


def test_all_problems_are_in_one_message():
    with pytest.raises(ModelError) as caught:
        read(
            "llama",
            hidden_act="relu",
            quantization_config={"bits": 4},
            rope_scaling={"type": "su"},
            num_key_value_heads=3,
        )
    first, *problems = str(caught.value).splitlines()
    assert first == "this llama config.json cannot be computed here:"
    assert [re.match(r"found (\w+ ?\w*)", problem)[1] for problem in problems] == [
        "quantization_config ", "hidden_act ", "num_attention_heads 4", "rope type",
    ]  # fmt: skip


def test_all_values_of_a_wrong_kind_are_in_one_message():
    with pytest.raises(ModelError) as caught:
        read("llama", tie_word_embeddings="no", max_window_layers=-1, rope_theta="x", layer_types=3, hidden_act="relu")
    found = [re.match(r"found (\w+) ", problem)[1] for problem in str(caught.value).splitlines()[1:]]
    assert sorted(found) == ["hidden_act", "layer_types", "max_window_layers", "rope_theta", "tie_word_embeddings"]


@pytest.mark.parametrize("key", ["quantization_config", "auto_map"])
def test_an_empty_object_is_as_if_such_a_key_were_absent(key):
    assert read("llama", **{key: {}}) == read("llama")


def test_a_quantised_model_is_told_what_to_use_and_not_shown_all_of_it():
    modules = {f"key{number}": [f"model.layers.{number}"] * 50 for number in range(50)}
    with pytest.raises(ModelError) as caught:
        read("llama", quantization_config={"bits": 4} | modules)
    (problem,) = str(caught.value).splitlines()[1:]
    assert problem.startswith("found quantization_config {'bits': 4, ")
    assert problem.endswith(
        "; expected no such key; use a checkpoint that is not quantised: float32, float16 or bfloat16"
    )
    assert len(problem) < 700


ROPES_READ = {"rope_parameters", "rope_scaling"}  # checked by `rope_scaling`, parameter by parameter


def without_a_kind(source: str) -> set[str]:
    """Keys that some source reads from a configuration, and of which nobody says what they must be."""
    only = {*ONLY_VALUES, *(key for family in FAMILIES.values() for key in family.only_values)}
    return set(re.findall(r'\braw(?:\.get\(|\[)"(\w+)"', source)) - {*KINDS, *only, *ROPES_READ}


@pytest.mark.parametrize("module", ["reading", "rope_scaling", *FAMILIES])
def test_every_key_that_is_read_has_a_kind(module):
    assert without_a_kind((MODELS / f"{module.removesuffix('_text')}.py").read_text()) == set()


def test_meta_a_key_without_a_kind_is_found():
    assert without_a_kind('raw["vocab_size"], raw["new"], raw.get("newer", 3)') == {"new", "newer"}
    assert re.search(r'raw(?:\.get\(|\[)"', (MODELS / "reading.py").read_text())


def test_gemma_3_with_images_is_told_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": CONFIGS["gemma3_plain"]}))
    with pytest.raises(ModelError, match=r"found model_type 'gemma3'.*Gemma 3 with images: load it with transformers"):
        load_model(tmp_path)


# --- what is read ---


def test_yarn_takes_the_factor_that_is_said_and_not_the_ratio_of_lengths():
    explicit = read("llama_yarn_v5")
    assert explicit.max_positions / 128 == 4.0
    assert read("llama_yarn_v5", max_position_embeddings=128).rope == explicit.rope


STRETCHED = {
    "as they were": ({"max_position_embeddings": 32}, 128),
    "said by both": ({"max_position_embeddings": 128}, 128),
    "said to be more": ({"max_position_embeddings": 200}, 200),
    "on top": ({"max_position_embeddings": 32, "original_max_position_embeddings": 40}, 160),
    "not said": ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 32),
    "another rope": ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 32),
}


@pytest.mark.parametrize(("changes", "longest"), STRETCHED.values(), ids=STRETCHED)
def test_yarn_is_for_its_factor_times_the_original_length(changes, longest):
    yarn = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    assert read("llama", **{"rope_theta": None} | yarn | changes).longest == longest


def test_the_length_that_yarn_is_for_has_no_part_in_the_digest():
    config = read("llama_yarn_v5", max_position_embeddings=32)
    assert config.stretched_positions == 512
    assert dataclasses.replace(config, stretched_positions=None).digest() == config.digest()


def test_dynamic_frequencies_end_with_the_longest_sequence():
    config = read("llama_dynamic_v4", max_position_embeddings=6)
    plain = read("llama", max_position_embeddings=6)
    assert config.rope == plain.rope._replace(positions=6)
    decoders = [Decoder(shape, rngs=nnx.Rngs(0)) for shape in (config, plain)]
    ids = jnp.arange(8)[None]
    taps = [Tap("q", 0), Tap("resid_post", 0)]
    scaled, unscaled = (decoder.activations(ids, jnp.ones_like(ids), ids, taps) for decoder in decoders)
    np.testing.assert_array_equal(scaled[taps[1]][0, :6], unscaled[taps[1]][0, :6])
    assert np.isnan(scaled[taps[1]][0, 6:]).all()
    assert np.isfinite(scaled[taps[0]]).all()  # before it is rotated


def test_a_position_that_was_never_learned_gives_nan_and_not_another_positions_row():
    model = load_model(GOLDEN / "gpt2")
    longest = model.config.max_positions
    ids = np.zeros((1, 2), np.int32)
    positions = np.array([[longest - 1, longest]], np.int32)
    rows = make_forward(model, [Tap("embed", None), Tap("resid_pre", 0)], dtype="float32")(
        model.params, ids, ids + 1, positions, np.arange(2, dtype=np.int32)
    )
    assert np.isfinite(rows["embed"]).all()
    assert np.isfinite(rows["resid_pre"][0, 0]).all()
    assert np.isnan(rows["resid_pre"][0, 1]).all()


# --- tensors ---


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_in_one_tensor(name):
    raw = CONFIGS[name]
    family = FAMILIES[raw["model_type"]]
    config = family.read_config(raw)
    abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
    parameters = [path for path, _ in nnx.to_flat_state(abstract)]
    paths = [path for tensor in family.stored_tensors(config.layers, parameters).values() for path in tensor.paths]
    assert sorted(map(str, paths)) == sorted(map(str, parameters))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_tensor_too_few_or_too_many_is_refused(folder, family):
    damaged = folder(family)
    last = sorted(load_file(damaged / "model.safetensors"))[-1]
    edit(damaged, lambda tensors: {name.replace(last, "extra.weight"): array for name, array in tensors.items()})
    with pytest.raises(ModelError, match=rf"(?s)found no tensor {last}.*have no place in this model: extra.weight"):
        load_model(damaged)


def test_gpt2_is_the_same_without_its_prefix_and_with_its_buffers(folder):
    plain = folder("gpt2")
    before = load_model(plain)
    buffers = {
        "h.0.attn.bias": np.tril(np.ones((1, 1, 8, 8), bool)),
        "h.1.attn.masked_bias": np.array(-1e4, np.float32),
    }
    edit(plain, lambda tensors: {name.removeprefix("transformer."): array for name, array in tensors.items()} | buffers)
    assert leaves(load_model(plain)) == leaves(before)


def test_frequencies_in_an_old_llama_are_passed_over(folder):
    old = folder("llama")
    before = load_model(old)
    edit(old, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    after = load_model(old)
    assert leaves(after) == leaves(before)
    assert after.weights_digest == before.weights_digest


def test_matrices_of_gpt2_are_transposed_and_cut():
    tensors = load_file(GOLDEN / "gpt2" / "model.safetensors")
    found = {
        path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(load_model(GOLDEN / "gpt2").params)
    }
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (16, 48)
    for third, name in enumerate(("query", "key", "value")):
        part = slice(16 * third, 16 * third + 16)
        np.testing.assert_array_equal(found["layers", 1, "attention", name, "weight"], fused[:, part].T)
        bias = tensors["transformer.h.1.attn.c_attn.bias"][part]
        np.testing.assert_array_equal(found["layers", 1, "attention", name, "bias"], bias)
    down = tensors["transformer.h.1.mlp.c_proj.weight"]
    np.testing.assert_array_equal(found["layers", 1, "mlp", "down", "weight"], down.T)


def test_a_linear_layer_in_the_place_of_a_conv1d_is_refused(folder):
    wrong, name = folder("gpt2"), "transformer.h.0.mlp.c_fc.weight"
    edit(wrong, lambda tensors: tensors | {name: np.ascontiguousarray(tensors[name].T)})
    with pytest.raises(ModelError, match=re.escape(f"found tensor {name!r} of shape (24, 16); expected (16, 24)")):
        load_model(wrong)


def test_a_tensor_under_both_its_names_is_refused(folder):
    twice = folder("gpt2")
    edit(twice, lambda tensors: tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]})
    with pytest.raises(ModelError, match=r"found ln_f\.bias with and without a prefix; expected each tensor once"):
        load_model(twice)


@pytest.mark.parametrize("module", ["gemma", "gemma2", "gemma3", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_a_family_takes_fewer_than_100_lines(module):
    assert len((MODELS / f"{module}.py").read_text().splitlines()) < 100


ROPES = {
    "a theta beside its type": {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    "how the weights came to be": {"rope_scaling": {"type": "yarn", "factor": 4.0, "finetuned": True}},
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_ropes_that_the_reference_reads_are_read(changes):
    plain = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    assert len(FAMILIES["llama"].read_config(plain | changes).rope_frequencies) == 6


WRONG_ROPES = {
    "negative": ({"rope_theta": -1.0}, "found rope_theta -1.0; expected a positive number"),
    "zero": ({"rope_scaling": {"rope_type": "default", "rope_theta": 0}}, "found rope_theta 0; expected a positive"),
    "no band": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "found low_freq_factor 1.0 and high_freq_factor 1.0; expected the first to be the smaller",
    ),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_ROPES.values(), ids=WRONG_ROPES)
def test_ropes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        FAMILIES["llama"].read_config(LLAMA | changes)
