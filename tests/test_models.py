"""Models against torch's own Qwen2, and the loader against checkpoints that are wrong in every known way."""

import functools
import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_qwen2
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from torch_qwen2 import Batch, Segment, Values, make_batch, relative_error

import extract.demo
from extract.forward import Forward, make_forward
from extract.models import Model, ModelError, Tap, check_taps, default_layers, load_model, site_widths
from extract.models.attention import attend
from extract.models.decoder import RmsNorm
from extract.models.rope import rope_frequencies, rope_tables
from extract.models.sites import LAYER_SITES

TINY = Path(extract.demo.__path__[0]) / "tiny-qwen2"

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
V5_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

CONFIGS: dict[str, dict[str, Any]] = {
    "tied_v4_rope": BASE | {"rope_theta": 10_000.0, "rope_scaling": None},
    "untied_v5_rope_big_theta": BASE | V5_ROPE | {"tie_word_embeddings": False},
    "sliding_from_layer_2": BASE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "sliding_by_layer_types": BASE
    | {"use_sliding_window": True, "sliding_window": 70}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "window_given_but_not_used": BASE | {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
    "one_kv_head": BASE | {"num_key_value_heads": 1},
    "head_dim_wider_than_hidden": BASE | {"head_dim": 32, "tie_word_embeddings": False},
    "head_dim_and_kv_heads_null": BASE | {"head_dim": None, "num_key_value_heads": None},
}

SHAPE = (3, 150)
LAYOUTS = {
    "left_padded": [Segment(0, 110, 40), Segment(1, 0, 150), Segment(2, 13, 137)],
    "right_padded": [Segment(0, 0, 150), Segment(1, 0, 64), Segment(2, 0, 1)],
    "packed": [
        *(Segment(0, 0, 20), Segment(0, 20, 91), Segment(0, 111, 39)),
        *(Segment(1, 5, 60), Segment(1, 65, 66)),
        *(Segment(2, 0, 1), Segment(2, 1, 148)),
    ],
}

TEXT = """The "assert" statement: assert statements are a convenient way to insert debugging assertions into a program.
Return a list of the names in the module. If the optional argument is given, only names starting with it are returned.
Raise ValueError if the value is not present, or if the index is out of range.
"""


def all_taps(model: Model) -> list[Tap]:
    layered = itertools.starmap(Tap, itertools.product(LAYER_SITES, range(model.config.layers)))
    return [Tap("embed", None), *layered, Tap("final_norm", None)]


@functools.cache
def forward_of(model: Model) -> Forward:
    """Every tap of a model in the dtype it computes in, compiled once."""
    return make_forward(model, all_taps(model), dtype=model.dtype)


def values_at(model: Model, batch: Batch) -> Values:
    """Our value at every tap, as `torch_qwen2.one_by_one` returns them."""
    forward = forward_of(model)
    rows = forward(model.params, *batch[:3], np.arange(batch.token_ids.size, dtype=np.int32))
    layers = {site: dict(zip(forward.layers[site], np.asarray(rows[site]), strict=True)) for site in rows}
    return {tap: layers[tap.site][tap.layer][batch.used] for tap in all_taps(model)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Torch's model and ours for a named configuration, each made once."""

    @functools.cache
    def make(name: str) -> tuple[torch_qwen2.Qwen2ForCausalLM, Model]:
        folder = tmp_path_factory.mktemp(name)
        return torch_qwen2.random_model(CONFIGS[name], folder), load_model(folder)

    return make


# --- against torch ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_of_every_layer_equals_torch(pair, name, layout):
    reference, model = pair(name)
    batch = make_batch(LAYOUTS[layout], shape=SHAPE, vocab_size=BASE["vocab_size"])
    found = values_at(model, batch)
    run = torch_qwen2.one_by_one if layout == "packed" else torch_qwen2.masked
    expected = run(reference, batch)
    errors = {tap: relative_error(found[tap], expected[tap]).max() for tap in found}
    assert max(errors.values()) <= 2e-5, errors


@pytest.mark.parametrize("name", ["tied_v4_rope", "untied_v5_rope_big_theta"])
def test_logits_equal_torch(pair, name):
    reference, model = pair(name)
    batch = make_batch(LAYOUTS["packed"], shape=SHAPE, vocab_size=BASE["vocab_size"])
    logits = model.apply(model.params, batch.token_ids, segment_ids=batch.segment_ids, positions=batch.positions)
    found = np.asarray(logits).reshape(-1, BASE["vocab_size"])[batch.used]
    expected = torch_qwen2.one_by_one(reference, batch)[Tap("logits", None)]
    assert relative_error(found, expected).max() <= 2e-5


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model(TINY)


@pytest.fixture(scope="module")
def real_text() -> Batch:
    """Three documents of real text, packed and padded."""
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT).ids
    first, second = len(ids) // 3, len(ids) // 2
    segments = [Segment(0, 0, first), Segment(0, first, second), Segment(1, 0, len(ids))]
    batch = make_batch(segments, shape=(2, len(ids) + 3), vocab_size=1024)
    for row, start, length in segments:
        batch.token_ids[row, start : start + length] = ids[:length]
    return batch


def test_trained_model_equals_torch_on_real_text(tiny, real_text):
    found = values_at(tiny, real_text)
    expected = torch_qwen2.one_by_one(torch_qwen2.load(TINY, torch.float32), real_text)
    errors = {tap: relative_error(found[tap], expected[tap]).max() for tap in found}
    assert max(errors.values()) <= 2e-5, errors


def test_bfloat16_is_as_near_to_float32_as_torch_is(real_text):
    exact = torch_qwen2.one_by_one(torch_qwen2.load(TINY, torch.float32), real_text)
    theirs = torch_qwen2.one_by_one(torch_qwen2.load(TINY, torch.bfloat16), real_text)
    ours = values_at(load_model(TINY, dtype="bfloat16"), real_text)
    for tap, value in ours.items():
        assert value.dtype == ml_dtypes.bfloat16
        allowed = 1.5 * relative_error(theirs[tap], exact[tap]).mean()
        assert relative_error(value, exact[tap]).mean() <= allowed, tap


def test_trained_model_has_learned_python_documentation(tiny):
    ids = np.array([Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT).ids])
    logits = tiny.apply(tiny.params, ids)
    likelihoods = jax.nn.log_softmax(logits[0, :-1])[np.arange(ids.size - 1), ids[0, 1:]]
    bits_per_byte = -float(likelihoods.sum()) / math.log(2) / len(TEXT.encode())
    assert bits_per_byte < 2.2


# --- the interface of the predecessor ---


def test_apply_returns_activations_by_layer_name(tiny):
    ids = np.arange(24).reshape(2, 12)
    logits, activations = tiny.apply(tiny.params, ids, return_activations=True)
    assert logits.shape == (2, 12, 1024)
    assert logits.dtype == jnp.float32
    assert {name: value.shape for name, value in activations.items()} == dict.fromkeys(
        ("layer_1", "layer_2", "layer_3", "layer_4_norm"), (2, 12, 128)
    )
    batch = make_batch([Segment(0, 0, 12), Segment(1, 0, 12)], shape=(2, 12), vocab_size=1024)
    batch.token_ids[:] = ids
    expected = torch_qwen2.one_by_one(torch_qwen2.load(TINY, torch.float32), batch)
    assert (
        relative_error(np.asarray(activations["layer_2"]).reshape(24, -1), expected[Tap("resid_post", 2)]).max() < 2e-5
    )
    final = expected[Tap("final_norm", None)]
    assert relative_error(np.asarray(activations["layer_4_norm"]).reshape(24, -1), final).max() < 2e-5


def test_apply_returns_the_layers_asked_for(tiny):
    ids = np.arange(6).reshape(1, 6)
    _, activations = tiny.apply(tiny.params, ids, return_activations=True, layers=(3, 0))
    assert list(activations) == ["layer_3", "layer_0", "layer_4_norm"]
    forward = make_forward(tiny, [Tap("resid_post", 0), Tap("resid_post", 3)], dtype="float32")
    rows = forward(tiny.params, ids, np.ones_like(ids), ids, np.arange(6))["resid_post"]
    np.testing.assert_allclose(activations["layer_0"][0], rows[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(activations["layer_3"][0], rows[1], rtol=1e-5, atol=1e-5)


def test_apply_without_activations_returns_logits(tiny):
    assert tiny.apply(tiny.params, np.arange(6).reshape(1, 6)).shape == (1, 6, 1024)


def test_apply_refuses_a_layer_that_does_not_exist(tiny):
    with pytest.raises(ModelError, match="layer 4 does not exist: the model has 4 layers, 0 to 3"):
        tiny.apply(tiny.params, np.zeros((1, 2), int), return_activations=True, layers=(4,))


def test_a_token_beyond_the_vocabulary_gives_nan_and_not_another_tokens_row(tiny):
    assert np.isnan(tiny.apply(tiny.params, np.array([[1024, 3]]))).all()


# --- sites, taps and layers ---


@pytest.mark.parametrize(
    ("layer_count", "layers"),
    [
        (30, (6, 12, 18, 23)),
        (24, (6, 12, 18, 23)),
        (23, (5, 11, 17, 22)),
        (12, (3, 6, 9, 11)),
        (4, (1, 2, 3)),
        (2, (0, 1)),
        (1, (0,)),
    ],
)
def test_default_layers(layer_count, layers):
    assert default_layers(layer_count) == layers


def test_default_layers_of_no_model():
    with pytest.raises(ModelError, match="found 0 layers; expected a model with at least one"):
        default_layers(0)


def test_widths_are_those_of_the_values(tiny):
    widths = site_widths(tiny.config)
    assert list(widths) == ["embed", *LAYER_SITES, "final_norm"]
    forward = make_forward(tiny, all_taps(tiny), dtype="float32")
    tokens = np.zeros((1, 4), np.int32)
    rows = forward(tiny.params, tokens, tokens + 1, tokens, np.arange(4, dtype=np.int32))
    assert {site: value.shape[-1] for site, value in rows.items()} == widths


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (
            Tap("resid_post", 4),
            "choose one of these for site 'resid_post' (the value after the last norm is site 'final_norm')",
        ),
        (Tap("mlp_out", -1), "layer -1 does not exist: the model has 4 layers, 0 to 3; choose one of these"),
        (
            Tap("hidden", 1),
            "the known sites are embed, resid_pre, attn_out, resid_mid, mlp_post, mlp_out, resid_post, final_norm; use",
        ),
        (Tap("embed", 0), "site 'embed' has no layers, found layer 0; use Tap('embed', None)"),
        (
            Tap("resid_pre", None),
            "site 'resid_pre' needs a layer, found None; use Tap('resid_pre', layer) with layer 0 to 3",
        ),
    ],
    ids=lambda value: f"{value.site}_{value.layer}" if isinstance(value, Tap) else "",
)
def test_wrong_taps_are_refused(tiny, tap, message):
    with pytest.raises(ModelError) as caught:
        check_taps(tiny.config, [tap])
    assert message in str(caught.value)


def test_all_wrong_taps_are_reported_together(tiny):
    with pytest.raises(ModelError) as caught:
        check_taps(tiny.config, [Tap("resid_post", 9), Tap("resid_post", 1), Tap("head", 1)])
    first, second = str(caught.value).splitlines()
    assert first.startswith("layer 9 does not exist")
    assert second.startswith("site 'head' does not exist")


def test_right_taps_pass(tiny):
    check_taps(tiny.config, all_taps(tiny))


# --- attention ---


def plain_attention(query, key, value, segment_ids, window):
    """Attention in float64, one query at a time."""
    mixed = np.zeros_like(query, np.float64)
    batch, length, heads, dim = query.shape
    for row, token, head in np.ndindex(batch, length, heads):
        seen = np.arange(0 if window is None else max(0, token - window + 1), token + 1)
        seen = seen[segment_ids[row, seen] == segment_ids[row, token]]
        kv_head = head * key.shape[2] // heads
        scores = key[row, seen, kv_head].astype(np.float64) @ query[row, token, head] / math.sqrt(dim)
        shares = np.exp(scores - scores.max())
        mixed[row, token, head] = shares @ value[row, seen, kv_head] / shares.sum()
    return mixed


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    ("length", "chunk_rows"),
    [(1, 16), (16, 16), (17, 16), (64, 16), (100, 16), (128, 16), (9, 1), (60, 64)],
)
def test_chunked_attention_equals_plain_attention(length, chunk_rows, window):
    rng = np.random.default_rng(length)
    query = rng.normal(size=(2, length, 6, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, length, 2, 8)).astype(np.float32)
    segment_ids = np.sort(rng.integers(0, 3, (2, length)), axis=1)
    mixed = jax.jit(partial(attend, window=window, chunk_rows=chunk_rows))(query, key, value, segment_ids)
    np.testing.assert_allclose(mixed, plain_attention(query, key, value, segment_ids, window), atol=2e-6)


def test_attention_in_bfloat16_keeps_scores_in_float32():
    """Scores of about 100 would be off by up to 0.25 in bfloat16, and shares by a quarter."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 24, 2, 16)) * scale for scale in (8, 8, 1))
    rounded = [array.astype(ml_dtypes.bfloat16) for array in (query, key, value)]
    segment_ids = np.ones((1, 24), np.int32)
    mixed = np.asarray(jax.jit(partial(attend, window=None))(*rounded, segment_ids))
    expected = plain_attention(*(array.astype(np.float64) for array in rounded), segment_ids, None)
    assert mixed.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(mixed.astype(np.float64), expected, atol=0.02)


def test_attention_never_holds_all_scores():
    heads, length = 8, 4096
    query, key = (jax.ShapeDtypeStruct((1, length, count, 16), jnp.float32) for count in (heads, 2))
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(partial(attend, window=None)).lower(query, key, key, segment_ids).compile()
    all_scores = heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 10


# --- norms and rotary positions ---


def test_norm_of_bfloat16_is_rounded_once():
    norm = RmsNorm(256, epsilon=1e-6)
    weight, rows = np.random.default_rng(0).normal(size=(2, 256)).astype(ml_dtypes.bfloat16)
    norm.weight[...] = jnp.asarray(weight)
    found = np.asarray(norm(jnp.asarray(rows)[None, None]))[0, 0]
    exact = rows.astype(np.float64)
    expected = exact / np.sqrt(np.mean(exact**2) + 1e-6) * weight.astype(np.float64)
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def test_rope_tables_are_exact_at_far_positions():
    frequencies = rope_frequencies({"rope_theta": 1e6}, 64)
    tables = rope_tables(frequencies, jnp.array([[0, 1, 4095]]))
    angles = np.array([0, 1, 4095])[:, None] * np.array(frequencies)
    np.testing.assert_allclose(tables.cosine[0], np.cos(angles), atol=3e-4)
    np.testing.assert_allclose(tables.sine[0], np.sin(angles), atol=3e-4)
    assert tables.cosine.dtype == jnp.float32


def test_frequencies_follow_the_paper():
    expected = [1e6 ** (-2 * pair / 64) for pair in range(32)]
    np.testing.assert_allclose(rope_frequencies({"rope_theta": 1e6}, 64), expected, rtol=3e-7)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
    ],
    ids=["v4", "v4_null", "v4_default", "v5", "v5_no_type", "both"],
)
def test_both_spellings_of_rope(spelling):
    assert rope_frequencies(spelling, 8) == rope_frequencies({"rope_theta": 5e5}, 8)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "found rope type 'yarn'; expected 'default'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "found rope type 'llama3'; expected 'default'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "found rope type 'linear'; expected 'default'"),
        (
            {"rope_parameters": {"rope_theta": 1.0, "factor": 2.0}},
            "found rope parameters factor; expected only rope_type",
        ),
        (
            {"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 1.0},
            "found rope_theta 1.0 and 2.0 in one config.json",
        ),
    ],
    ids=["v4_yarn", "v4_llama3", "v5_linear", "stray_factor", "contradiction"],
)
def test_rope_that_is_not_computed_is_refused(spelling, message):
    with pytest.raises(ModelError, match=message):
        rope_frequencies(spelling, 8)


# --- loading ---


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    target = tmp_path / "tiny"
    shutil.copytree(TINY, target)
    return target


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
        "found model_type 'mamba' in config.json; expected one of the supported families: qwen2",
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
    "rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "found rope type 'dynamic'; expected 'default'"),
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
