"""The interface of the scripts that came before, call by call, against torch and against the model's own `apply`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import extract
from extract.models import Model, ModelError, Tap, load_model
from extract.models.model import _run

TINY = extract.model_folder("tiny-qwen2")
IDS = np.random.default_rng(0).integers(3, 1024, (2, 9))
LEFT = np.array([[0] * 4 + [1] * 5, [1] * 9])
RIGHT = np.array([[1] * 5 + [0] * 4, [1] * 9])


@pytest.fixture(scope="module")
def loaded() -> Model:
    return load_model(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return extract.create_model_with_hooks(TINY, layers_to_extract=[2])


def test_a_model_is_made_from_a_dictionary_or_a_folder(model: Any) -> None:
    raw = json.loads((TINY / "config.json").read_text())
    assert extract.create_model_with_hooks(raw).config == model.config
    assert extract.create_model_with_hooks(raw).layers == (1, 2, 3), "quarters, as the model has fewer than 24 layers"
    assert extract.create_model_with_hooks(raw | {"num_hidden_layers": 24}).layers == (6, 12, 18, 23)
    assert model.layers == (2,)


def test_fresh_parameters_are_those_of_the_key_and_fit_the_loaded_ones(model: Any, loaded: Model) -> None:
    first, again, other = (model.init(jax.random.key(seed), IDS) for seed in (0, 0, 1))
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, loaded.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, again)))
    assert not (first["embedding"][...] == other["embedding"][...]).any()
    logits = model.apply(first, IDS)
    assert logits.shape == (2, 9, 1024)
    assert 0 < float(jnp.std(logits)) < 1


def test_apply_with_loaded_weights_equals_the_loaded_model(model: Any, loaded: Model) -> None:
    logits, activations = model.apply(model.load(TINY), IDS, return_activations=True)
    expected, values = loaded.apply(loaded.params, IDS, return_activations=True, layers=(2,))
    np.testing.assert_array_equal(logits, expected)
    assert list(activations) == ["layer_2", "layer_4_norm"]
    for name, value in values.items():
        np.testing.assert_array_equal(activations[name], value)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padding_changes_no_real_token(model: Any, loaded: Model, mask: np.ndarray) -> None:
    _, padded = model.apply(loaded.params, IDS, attention_mask=mask, return_activations=True)
    _, alone = model.apply(loaded.params, IDS[:1, mask[0] > 0], return_activations=True)
    np.testing.assert_allclose(padded["layer_2"][0, mask[0] > 0], alone["layer_2"][0], rtol=2e-5, atol=2e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no_mask", "left", "right"])
def test_generation_with_activations(model: Any, loaded: Model, mask: np.ndarray | None) -> None:
    ids, final, steps = extract.generate_with_layer_activations(
        model, loaded.params, IDS, max_tokens=6, layers_to_extract=[3, 0], return_all_step_activations=True,
        attention_mask=mask,
    )  # fmt: skip
    assert ids.shape == (2, 15)
    assert {name: value.shape for name, value in final.items()} == dict.fromkeys(
        ("layer_3", "layer_0", "layer_4_norm"), (2, 15, 128)
    )
    assert [(step["step"], step["seq_len"]) for step in steps] == [(number, 9 + number) for number in range(6)]
    for row, real in enumerate(np.ones((2, 9)) if mask is None else mask):
        prompt = IDS[row, real > 0]
        chosen = np.asarray(ids[row, 9 - len(prompt) :])
        np.testing.assert_array_equal(chosen[: len(prompt)], prompt)
        logits, values = loaded.apply(loaded.params, chosen[None], return_activations=True, layers=(3, 0))
        np.testing.assert_array_equal(np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1), chosen[len(prompt) :])
        for name, value in values.items():
            np.testing.assert_allclose(final[name][row, 9 - len(prompt) :], value[0], rtol=1e-4, atol=2e-5)
            for step in steps:
                expected = value[0, len(prompt) - 1 + step["step"]]
                error = np.linalg.norm(step["activations"][name][row, 0] - expected) / np.linalg.norm(expected)
                assert error <= 1e-5


def test_without_steps_and_with_a_loaded_model(loaded: Model) -> None:
    ids, final, steps = extract.generate_with_layer_activations(loaded, loaded.params, IDS, max_tokens=6)
    assert (ids.shape, list(final), steps) == ((2, 15), ["layer_1", "layer_2", "layer_3", "layer_4_norm"], [])


# --- positions ---


VALUES = {"layer_1": np.arange(2 * 9 * 3, dtype=np.float32).reshape(2, 9, 3)}
POSITIONS = {
    "last column without a mask": (None, None, [[8], [8]]),
    "last real of left padding": (None, LEFT, [[8], [8]]),
    "last real of right padding": (None, RIGHT, [[4], [8]]),
    "one column": (4, RIGHT, [[4], [4]]),
    "columns": ([8, 5], LEFT, [[8, 5], [8, 5]]),
    "booleans": (None, RIGHT > 0, [[4], [8]]),
}


@pytest.mark.parametrize(("positions", "mask", "columns"), POSITIONS.values(), ids=POSITIONS)
def test_positions(positions: Any, mask: Any, columns: list[list[int]]) -> None:
    found = extract.extract_specific_layer_positions(VALUES, "layer_1", positions, attention_mask=mask)
    expected = np.stack([VALUES["layer_1"][row, chosen] for row, chosen in enumerate(columns)])
    np.testing.assert_array_equal(found, expected if isinstance(positions, list) else expected[:, 0])


HOLES = np.array([[1, 1, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
REFUSED = {
    "unknown layer": (("layer_9",), {}, r"found no 'layer_9'; expected one of layer_1; extract this layer too"),
    "beyond the row": (("layer_1", [3, 9]), {}, r"found token_positions \[9\]; expected 0 to 8; leave them out"),
    "negative": (("layer_1", -1), {}, r"found token_positions \[-1\]; expected 0 to 8"),
    "on padding": (("layer_1", 3), {"attention_mask": LEFT}, r"found token_positions 3 on padding in rows \[0\]"),
    "list on padding": (("layer_1", [3, 8]), {"attention_mask": RIGHT}, r"positions \[3, 8\] on padding in rows \[0\]"),
    "no real token": (("layer_1",), {"attention_mask": LEFT * [[0], [1]]}, r"found no real token in rows \[0\]"),
    "mask of another shape": (
        ("layer_1",),
        {"attention_mask": LEFT[:, :5]},
        r"mask of shape \(2, 5\); expected \(2, 9\)",
    ),
    "holes": (("layer_1",), {"attention_mask": HOLES}, r"found attention_mask with holes in rows \[0\]; expected"),
}


@pytest.mark.parametrize(("arguments", "named", "message"), REFUSED.values(), ids=REFUSED)
def test_positions_that_are_refused(arguments: tuple, named: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        extract.extract_specific_layer_positions(VALUES, *arguments, **named)


# --- what else is refused ---


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(ModelError, match="layer 6 does not exist: the model has 4 layers"):
        extract.create_model_with_hooks(TINY, layers_to_extract=[6, 12, 18, 23])


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"found no config.json in .*; expected a HuggingFace model folder"):
        extract.create_model_with_hooks(tmp_path)


def test_weights_of_another_model() -> None:
    other = json.loads((TINY / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    with pytest.raises(ModelError, match=r"weights of another model in .* \(norm_epsilon 1e-06, here 1e-05\)"):
        extract.create_model_with_hooks(other).load(TINY)


DIFFERENCES = {
    "frequencies": (
        {"rope_theta": 500_000.0},
        r"\(rope_frequencies\[1\] 0\.[0-9]+, here 0\.[0-9]+ and 14 more of rope_frequencies\)",
    ),
    "one number": ({"rms_norm_eps": 1e-5}, r"\(norm_epsilon 1e-06, here 1e-05\)"),
    "another count": (
        {"num_hidden_layers": 2},
        r"\(layers 4, here 2; windows \(None, None, None, None\), here \(None, None\)\)",
    ),
    "many layers": (
        {"num_hidden_layers": 40},
        r"here 40; windows .*, here \(None, None, None, None, None, None, \.\.\.\)\)",
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("changes", "difference"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_what_differs_is_said_in_few_words(changes: dict, difference: str) -> None:
    other = json.loads((TINY / "config.json").read_text()) | changes
    with pytest.raises(ModelError, match=difference) as caught:
        extract.create_model_with_hooks(other).load(TINY)
    assert len(str(caught.value).replace(str(TINY), "")) < 300


def test_tokens_of_another_model(model: Any) -> None:
    with pytest.raises(ModelError, match="found token 1024; expected 0 to 1023; use the tokenizer of this model"):
        model.init(jax.random.key(0), np.array([[1024]]))


def test_activations_of_generated_rows_compute_no_logits():
    """Logits of a real vocabulary would be a hundred times as large as all that is asked for."""
    model, ids = load_model(TINY), np.ones((2, 40), np.int32)
    activations = model.activations(ids, segment_ids=ids, positions=ids, layers=(1,))
    assert {name: value.shape for name, value in activations.items()} == {
        "layer_1": (2, 40, 128), "layer_4_norm": (2, 40, 128),
    }  # fmt: skip
    arguments = (model.graph, model.params, ids, ids, ids, (Tap("resid_post", 1),))
    sizes = [
        _run.lower(*arguments, logits=logits).compile().memory_analysis().output_size_in_bytes
        for logits in (True, False)
    ]
    assert sizes[0] - sizes[1] >= 2 * 40 * 1024 * 4
