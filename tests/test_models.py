"""Models against torch's own: every site of every layer of every family, and the interface of the predecessor."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from batches_of_segments import LAYOUTS, SHAPE, Batch, Segment, make_batch, relative_error
from family_configs import COMMON, CONFIGS, ONE_OF_EACH
from tokenizers import Tokenizer

import extract
from extract.forward import Forward, make_forward
from extract.models import Model, ModelError, Tap, check_taps, default_layers, load_model, site_widths
from extract.models.sites import LAYER_SITES

torch = pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here, and these tests compare with it")
import torch_reference  # noqa: E402  needs torch
from torch_reference import Values  # noqa: E402

TINY = Path(extract.__path__[0]) / "demo" / "tiny-qwen2"

LOGITS = Tap("logits", None)

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
    """Our value at every tap, as `torch_reference.one_by_one` returns them."""
    forward = forward_of(model)
    rows = forward(model.params, *batch[:3], np.arange(batch.token_ids.size, dtype=np.int32))
    layers = {site: dict(zip(forward.layers[site], np.asarray(rows[site]), strict=True)) for site in rows}
    return {tap: layers[tap.site][tap.layer][batch.used] for tap in all_taps(model)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Torch's model and ours for a named configuration, and their folder, each made once."""

    @functools.cache
    def make(name: str) -> tuple[torch_reference.PreTrainedModel, Model, Path]:
        folder = tmp_path_factory.mktemp(name)
        return torch_reference.random_model(CONFIGS[name], folder), load_model(folder), folder

    return make


# --- against torch ---


def random_batch(layout: str) -> Batch:
    return make_batch(LAYOUTS[layout], shape=SHAPE, vocab_size=COMMON["vocab_size"])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_site_of_every_layer_equals_torch(pair, name, layout):
    reference, model, _ = pair(name)
    batch = random_batch(layout)
    found = values_at(model, batch)
    run = torch_reference.one_by_one if layout == "packed" else torch_reference.masked
    expected = settled(lambda: run(reference, batch))
    assert found.keys() == expected.keys() - {LOGITS}
    errors = {tap: relative_error(found[tap], expected[tap]).max() for tap in found}
    assert max(errors.values()) < 2e-5, errors


def settled(run: Callable[[], Values]) -> Values:
    """What torch computes twice: its first pass in a process was 5.5e-5 off all later ones, in two of many runs."""
    values = run()
    for _ in range(5):
        before, values = values, run()
        if changed(before, values) < 1e-6:
            return values
    pytest.fail("torch does not compute the same twice")


def changed(before: Values, after: Values) -> float:
    """By how much values that are computed twice differ, at the worst token of any tap."""
    return max(float(relative_error(after[tap], before[tap]).max()) for tap in before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*ONE_OF_EACH.values(), "gemma2_low_caps", "llama_smol_tied_three_heads"])
def test_logits_equal_torch(pair, name):
    reference, model, _ = pair(name)
    batch = random_batch("packed")
    logits = model.apply(model.params, batch.token_ids, segment_ids=batch.segment_ids, positions=batch.positions)
    found = np.asarray(logits).reshape(-1, COMMON["vocab_size"])[batch.used]
    expected = torch_reference.one_by_one(reference, batch)[LOGITS]
    assert relative_error(found, expected).max() <= 2e-5


def check_bfloat16(reference: torch_reference.PreTrainedModel, folder: Path, batch: Batch) -> None:
    """At every site ours is no more than half as far again from the reference's float32 as torch's bfloat16 is."""
    exact = torch_reference.one_by_one(reference, batch)
    theirs = torch_reference.one_by_one(torch_reference.load(folder, torch.bfloat16), batch)
    for tap, value in values_at(load_model(folder, dtype="bfloat16"), batch).items():
        assert value.dtype == ml_dtypes.bfloat16
        allowed = 1.5 * relative_error(theirs[tap], exact[tap]).mean()
        assert relative_error(value, exact[tap]).mean() <= allowed, tap


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_bfloat16_is_as_near_to_float32_as_torch_is(pair, family):
    reference, _, folder = pair(ONE_OF_EACH[family])
    check_bfloat16(reference, folder, random_batch("packed"))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3_plain"])
def test_scaled_embeddings_in_bfloat16_equal_torch_bit_for_bit(pair, name):
    """The scale, the root of 48, is rounded to bfloat16 before it is multiplied."""
    folder = pair(name)[2]
    batch = random_batch("right_padded")
    expected = torch_reference.masked(torch_reference.load(folder, torch.bfloat16), batch)[Tap("embed", None)]
    model = load_model(folder, dtype="bfloat16")
    forward = make_forward(model, [Tap("embed", None)], dtype="float32")
    found = np.asarray(forward(model.params, *batch[:3], batch.used.astype(np.int32))["embed"][0])
    np.testing.assert_array_equal(found, expected)
    rows = np.asarray(model.params["embedding"][...]).astype(np.float32)[batch.token_ids.reshape(-1)[batch.used]]
    assert (found != (rows * np.float32(48**0.5)).astype(ml_dtypes.bfloat16)).any()


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
    expected = torch_reference.one_by_one(torch_reference.load(TINY, torch.float32), real_text)
    errors = {tap: relative_error(found[tap], expected[tap]).max() for tap in found}
    assert max(errors.values()) <= 2e-5, errors


def test_bfloat16_of_a_trained_model_is_as_near_to_float32_as_torch_is(real_text):
    check_bfloat16(torch_reference.load(TINY, torch.float32), TINY, real_text)


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
    expected = torch_reference.one_by_one(torch_reference.load(TINY, torch.float32), batch)
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
            (
                "the known sites are embed, resid_pre, q, k, v, attn_z, attn_out, resid_mid, mlp_post, mlp_out, "
                "resid_post, final_norm; use"
            ),
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
