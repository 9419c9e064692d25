"""Attention, norms and rotary positions against their definitions in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from extract.models import ModelError
from extract.models.attention import AttentionRule, attend
from extract.models.norms import LayerNorm, RmsNorm
from extract.models.rope import rope_tables
from extract.models.rope_scaling import read_rope


def plain_attention(query, key, value, segment_ids, rule):
    """Attention in float64, one query at a time."""
    mixed = np.zeros_like(query, np.float64)
    batch, length, heads, _ = query.shape
    for row, token, head in np.ndindex(batch, length, heads):
        seen = np.arange(0 if rule.window is None else max(0, token - rule.window + 1), token + 1)
        seen = seen[segment_ids[row, seen] == segment_ids[row, token]]
        kv_head = head * key.shape[2] // heads
        scores = key[row, seen, kv_head].astype(np.float64) @ query[row, token, head] * rule.scale
        scores = scores if rule.softcap is None else rule.softcap * np.tanh(scores / rule.softcap)
        shares = np.exp(scores - scores.max())
        mixed[row, token, head] = shares @ value[row, seen, kv_head] / shares.sum()
    return mixed


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "rule",
    [AttentionRule(None, 8**-0.5), AttentionRule(1, 8**-0.5), AttentionRule(40, 8**-0.5), AttentionRule(40, 0.7, 2.0)],
    ids=["all", "itself", "window", "soft_cap"],
)
@pytest.mark.parametrize(
    ("length", "chunk_rows"),
    [(1, 16), (16, 16), (17, 16), (64, 16), (100, 16), (128, 16), (9, 1), (60, 64)],
)
def test_chunked_attention_equals_plain_attention(length, chunk_rows, rule):
    rng = np.random.default_rng(length)
    query = rng.normal(size=(2, length, 6, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, length, 2, 8)).astype(np.float32)
    segment_ids = np.sort(rng.integers(0, 3, (2, length)), axis=1)
    mixed = jax.jit(partial(attend, rule=rule, chunk_rows=chunk_rows))(query, key, value, segment_ids)
    np.testing.assert_allclose(mixed, plain_attention(query, key, value, segment_ids, rule), atol=2e-6)


def test_attention_in_bfloat16_keeps_scores_in_float32():
    """Scores of about 100 would be off by up to 0.25 in bfloat16, and shares by a quarter."""
    rng, rule = np.random.default_rng(0), AttentionRule(None, 16**-0.5)
    query, key, value = (rng.normal(size=(1, 24, 2, 16)) * scale for scale in (8, 8, 1))
    rounded = [array.astype(ml_dtypes.bfloat16) for array in (query, key, value)]
    segment_ids = np.ones((1, 24), np.int32)
    mixed = np.asarray(jax.jit(partial(attend, rule=rule))(*rounded, segment_ids))
    expected = plain_attention(*(array.astype(np.float64) for array in rounded), segment_ids, rule)
    assert mixed.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(mixed.astype(np.float64), expected, atol=0.02)


def test_attention_never_holds_all_scores():
    heads, length, rule = 8, 4096, AttentionRule(None, 16**-0.5)
    query, key = (jax.ShapeDtypeStruct((1, length, count, 16), jnp.float32) for count in (heads, 2))
    segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(partial(attend, rule=rule)).lower(query, key, key, segment_ids).compile()
    all_scores = heads * length * length * 4
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 10


# --- norms and rotary positions ---


def test_norm_of_bfloat16_is_rounded_once():
    norm = RmsNorm(256, epsilon=1e-6, offset=0.0)
    weight, rows = np.random.default_rng(0).normal(size=(2, 256)).astype(ml_dtypes.bfloat16)
    norm.weight[...] = jnp.asarray(weight)
    found = np.asarray(norm(jnp.asarray(rows)[None, None]))[0, 0]
    exact = rows.astype(np.float64)
    expected = exact / np.sqrt(np.mean(exact**2) + 1e-6) * weight.astype(np.float64)
    np.testing.assert_array_equal(found, expected.astype(ml_dtypes.bfloat16))


def test_a_norm_with_an_offset_adds_it_in_float32():
    norm = RmsNorm(64, epsilon=1e-6, offset=1.0)
    assert (norm.weight[...] == 0).all()
    weight = (0.01 * np.random.default_rng(5).standard_normal(64)).astype(ml_dtypes.bfloat16)
    norm.weight[...] = jnp.asarray(weight)
    rows = np.random.default_rng(6).standard_normal((2, 64)).astype(np.float32)
    scaled = rows / np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(jnp.asarray(rows)), scaled * (1 + weight.astype(np.float64)), rtol=1e-6)
    rounded = scaled * (1 + weight).astype(np.float64)  # what adding in bfloat16 would give
    assert np.abs(norm(jnp.asarray(rows)) / rounded - 1).max() > 1e-3


def test_layer_norm_follows_the_paper():
    norm = LayerNorm(64, epsilon=1e-5)
    generator = np.random.default_rng(7)
    weight, bias = generator.standard_normal((2, 64)).astype(np.float32)
    norm.weight[...], norm.bias[...] = jnp.asarray(weight), jnp.asarray(bias)
    rows = (100 + generator.standard_normal((3, 64))).astype(np.float32)
    exact = rows.astype(np.float64)
    expected = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(norm(jnp.asarray(rows)), expected, atol=2e-5)


LONGEST = {"max_position_embeddings": 4096}


def test_rope_tables_are_exact_at_far_positions():
    rope = read_rope({"rope_theta": 1e6} | LONGEST, 64)
    tables = rope_tables(rope, jnp.array([[0, 1, 4095]]))
    angles = np.array([0, 1, 4095])[:, None] * np.array(rope.frequencies)
    np.testing.assert_allclose(tables.cosine[0], np.cos(angles), atol=3e-4)
    np.testing.assert_allclose(tables.sine[0], np.sin(angles), atol=3e-4)
    assert tables.cosine.dtype == jnp.float32


def test_frequencies_follow_the_paper():
    expected = [1e6 ** (-2 * pair / 64) for pair in range(32)]
    np.testing.assert_allclose(read_rope({"rope_theta": 1e6} | LONGEST, 64).frequencies, expected, rtol=3e-7)


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
    assert read_rope(spelling | LONGEST, 8) == read_rope({"rope_theta": 5e5} | LONGEST, 8)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (
            {"rope_scaling": {"type": "su", "factor": 4.0}},
            "found rope type 'su'; expected one of default, linear, dynamic",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            "found rope type 'llama3' without factor, high_freq_factor, low_freq_",
        ),
        (
            {"rope_parameters": {"rope_theta": 1.0, "factor": 2.0}},
            "found rope parameters factor of type 'default'; expected only rope_type",
        ),
        (
            {"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 1.0},
            "found rope_theta 1.0 and 2.0 in one config.json",
        ),
    ],
    ids=["unknown", "v4_llama3", "stray_factor", "contradiction"],
)
def test_rope_that_is_not_computed_is_refused(spelling, message):
    with pytest.raises(ModelError, match=message):
        read_rope(spelling | LONGEST, 8)
