"""The forward pass: rows, dtypes, early exit, isolation of documents, and the same bits every time."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import extract
from extract.forward import make_forward
from extract.models import Model, ModelError, Tap, load_model
from extract.models.sites import LAYER_SITES

ROOT = Path(extract.__path__[0]).parent
TINY = ROOT / "extract" / "demo" / "tiny-qwen2"
BATCH, CONTEXT = 2, 100
KEPT = np.array([0, 7, 99, 100, 163, 7], np.int32)
EARLY = [Tap("resid_post", 0), Tap("mlp_post", 0), Tap("resid_pre", 1)]


def every_tap(model: Model) -> list[Tap]:
    layered = itertools.starmap(Tap, itertools.product(LAYER_SITES, range(model.config.layers)))
    return [Tap("embed", None), *layered, Tap("final_norm", None)]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(TINY)


@pytest.fixture
def tokens() -> dict[str, np.ndarray]:
    """Two packed rows: three documents and padding, and two documents."""
    ids = np.random.default_rng(0).integers(3, 1024, (BATCH, CONTEXT)).astype(np.int32)
    runs = [[(1, 30), (2, 40), (3, 20), (0, 10)], [(1, 64), (2, 36)]]
    segments = np.array([np.repeat(*zip(*run, strict=True)) for run in runs], np.int32)
    positions = np.array([np.concatenate([np.arange(length) for _, length in run]) for run in runs], np.int32)
    return {"token_ids": ids, "segment_ids": segments, "positions": positions}


@pytest.fixture(scope="module")
def full(model):
    """Every row of every site, as float32."""
    forward = make_forward(model, every_tap(model), dtype="float32")
    return lambda tokens: forward(model.params, **tokens, kept=np.arange(BATCH * CONTEXT, dtype=np.int32))


def bits(rows) -> dict[str, bytes]:
    return {site: np.asarray(value).tobytes() for site, value in rows.items()}


def test_kept_rows_equal_direct_indexing_bit_for_bit(model, tokens, full):
    forward = make_forward(model, every_tap(model), dtype="float32")
    everything = full(tokens)
    assert bits(forward(model.params, **tokens, kept=KEPT)) == bits(
        {site: np.asarray(rows)[:, KEPT] for site, rows in everything.items()}
    )


def test_indices_outside_are_clipped(model, tokens):
    forward = make_forward(model, [Tap("embed", None)], dtype="float32")
    last = BATCH * CONTEXT - 1
    outside = forward(model.params, **tokens, kept=np.array([-1, last + 1, 10**6], np.int32))
    inside = forward(model.params, **tokens, kept=np.array([0, last, last], np.int32))
    assert bits(outside) == bits(inside)


def test_early_exit_equals_the_full_pass_bit_for_bit(model, tokens, full):
    early = make_forward(model, EARLY, dtype="float32")(model.params, **tokens, kept=KEPT)
    everything = full(tokens)
    for site, layer in EARLY:
        np.testing.assert_array_equal(early[site][0], np.asarray(everything[site])[layer, KEPT])


def test_layers_after_the_last_are_not_computed(model, tokens):
    poisoned = jax.tree.map(lambda leaf: leaf, model.params)
    for path, variable in nnx.to_flat_state(poisoned):
        if path[0] in {"final_norm"} or (path[0] == "layers" and path[1] > 0):
            variable[...] = jnp.full_like(variable[...], jnp.nan)
    forward = make_forward(model, EARLY, dtype="float32")
    assert bits(forward(poisoned, **tokens, kept=KEPT)) == bits(forward(model.params, **tokens, kept=KEPT))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("taps", "share"),
    [([Tap("embed", None)], 0.001), ([Tap("resid_post", 0)], 0.26), ([Tap("attn_out", 1)], 0.36)],
    ids=["embed", "one_layer", "one_layer_and_attention"],
)
def test_early_exit_saves_its_share_of_the_work(model, tokens, taps, share):
    def flops(taps: list[Tap]) -> float:
        forward = make_forward(model, taps, dtype="float32")
        lowered = jax.jit(forward).lower(model.params, *tokens.values(), KEPT)
        return lowered.compile().cost_analysis().get("flops", 0.0)

    assert flops(taps) <= share * flops([Tap("resid_post", 3)])


def test_no_logits_are_computed(model, tokens):
    forward = make_forward(model, [Tap("final_norm", None)], dtype="float32")
    text = str(jax.make_jaxpr(forward)(model.params, *tokens.values(), KEPT))
    assert f"{BATCH},{CONTEXT},{model.config.hidden_size}]" in text
    assert f"{BATCH},{CONTEXT},{model.config.vocab_size}]" not in text


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_cast_once_from_the_computed_values(model, tokens, full, dtype):
    rows = make_forward(model, every_tap(model), dtype=dtype)(model.params, **tokens, kept=KEPT)
    expected = {site: np.asarray(value)[:, KEPT].astype(jnp.dtype(dtype)) for site, value in full(tokens).items()}
    assert bits(rows) == bits(expected)


@pytest.mark.parametrize("taps", [EARLY, [Tap("embed", None)], [Tap("mlp_post", 3), Tap("mlp_post", 1)]])
def test_shapes_are_known_before_compute(model, tokens, taps):
    forward = make_forward(model, taps, dtype="bfloat16")
    expected = jax.eval_shape(forward, model.params, *tokens.values(), KEPT)
    rows = forward(model.params, **tokens, kept=KEPT)
    assert {site: (value.shape, value.dtype) for site, value in rows.items()} == {
        site: ((len(forward.layers[site]), KEPT.size, forward.widths[site]), jnp.bfloat16) for site in forward.layers
    }
    assert {site: (value.shape, value.dtype) for site, value in expected.items()} == {
        site: (value.shape, value.dtype) for site, value in rows.items()
    }


def test_layers_are_ascending_and_each_once(model):
    taps = [Tap("resid_post", 3), Tap("embed", None), Tap("resid_post", 0), Tap("resid_post", 3)]
    assert make_forward(model, taps, dtype="float32").layers == {"embed": (None,), "resid_post": (0, 3)}


def test_content_of_padding_does_not_matter(model, tokens, full):
    used = tokens["segment_ids"].reshape(-1) > 0
    before = {site: np.asarray(rows)[:, used] for site, rows in full(tokens).items()}
    tokens["token_ids"][tokens["segment_ids"] == 0] = 5
    assert bits({site: np.asarray(rows)[:, used] for site, rows in full(tokens).items()}) == bits(before)


def test_documents_of_a_row_do_not_see_each_other(model, tokens, full):
    others = (tokens["segment_ids"] != 2).reshape(-1)
    before = {site: np.asarray(rows) for site, rows in full(tokens).items()}
    tokens["token_ids"][tokens["segment_ids"] == 2] = 9
    after = {site: np.asarray(rows) for site, rows in full(tokens).items()}
    for site, rows in after.items():
        np.testing.assert_array_equal(rows[:, others], before[site][:, others])
        assert (rows[:, ~others] != before[site][:, ~others]).any()


def test_later_tokens_do_not_matter(model, tokens, full):
    earlier = np.zeros((BATCH, CONTEXT), bool)
    earlier[:, :50] = True
    before = full(tokens)
    tokens["token_ids"][:, 50:] = 9
    for site, rows in full(tokens).items():
        kept = earlier.reshape(-1)
        np.testing.assert_array_equal(np.asarray(rows)[:, kept], np.asarray(before[site])[:, kept])


DIGEST = """
import hashlib, sys
import numpy as np
from extract.forward import make_forward
from extract.models import Tap, load_model

model = load_model(sys.argv[1])
ids = np.random.default_rng(0).integers(0, 1024, (4, 300)).astype(np.int32)
positions = np.broadcast_to(np.arange(300, dtype=np.int32), ids.shape)
forward = make_forward(model, [Tap("resid_post", 3), Tap("mlp_post", 2)], dtype="float32")
rows = forward(model.params, ids, np.ones_like(ids), positions, np.arange(ids.size, dtype=np.int32))
print(hashlib.sha256(b"".join(np.asarray(rows[site]).tobytes() for site in sorted(rows))).hexdigest())
"""


def test_every_process_computes_the_same_bits():
    command = [sys.executable, "-c", DIGEST, str(TINY)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
    assert len(runs[0].stdout.strip()) == hashlib.sha256().digest_size * 2
    assert runs[0].stdout == runs[1].stdout


HEAVY = ("actstore", "tensorstore", "torch", "transformers", "zarr")


@pytest.mark.parametrize("extra", ["", "import zarr"], ids=["guard", "the_guard_would_fire"])
def test_models_and_forward_import_no_store_and_no_torch(extra):
    code = f"import sys, extract.forward, extract.models\n{extra}\nprint([m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == ("['zarr']" if extra else "[]")


@pytest.mark.parametrize(
    ("taps", "dtype", "message"),
    [
        ([], "float32", r"found no taps; expected at least one; pass for example \[Tap\('final_norm', None\)\]"),
        ([Tap("resid_post", 1)], "int8", "found dtype 'int8'; expected one of bfloat16, float16, float32"),
        ([Tap("resid_post", 7)], "float32", "layer 7 does not exist: the model has 4 layers, 0 to 3"),
    ],
    ids=["no_taps", "dtype", "layer"],
)
def test_wrong_requests_are_refused_before_compute(model, taps, dtype, message):
    with pytest.raises(ModelError, match=message):
        make_forward(model, taps, dtype=dtype)


def test_a_token_that_is_not_there_gives_nan_and_no_other_row():
    """Negative ones too, which are padding or labels elsewhere: JAX alone would count them from the end."""
    model = load_model(TINY)
    token_ids = np.array([[5, -1, 7], [-100, 6, 7], [5, 1024, 7], [5, 6, 7]])
    ones = np.ones_like(token_ids)
    forward = make_forward(model, [Tap("embed", None)], dtype="float32")
    rows = np.asarray(forward(model.params, token_ids, ones, ones, np.arange(12))["embed"])[0].reshape(4, 3, -1)
    np.testing.assert_array_equal(np.isnan(rows).all(axis=-1), (token_ids < 0) | (token_ids > 1023))
    assert not np.isnan(rows[3]).any()
