"""What adapters share: hooks aligned by sample, numbers from the stored norms, and who imports what."""

import ast
import math
from pathlib import Path

import learnable
import numpy as np
import pytest

import actstore
import actstore.adapters
from actstore.adapters.hooks import Hooks
from actstore.adapters.saelens import STATE_FILE, load_state, save_with_checkpoints, scaling_factor
from actstore.errors import InputError, UnknownNameError

FOLDER = Path(actstore.adapters.__file__).parent
SETTINGS = {"batch_size": 100, "seed": 3, "window_bytes": 64 << 10}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return learnable.write(tmp_path_factory.mktemp("adapters") / "run.acts.zarr")


@pytest.fixture(scope="module")
def arrays():
    return learnable.make_arrays()


PLACES = {"one": ("resid_post", 1), "three": ("resid_post", 3), "end": ("final_norm", None)}


def hooks_of(store, **changes):
    return Hooks(store, PLACES, **SETTINGS | changes)


# Hooks


def test_hooks_are_the_same_samples(url, arrays):
    expected = {"one": arrays["resid_post"][0], "three": arrays["resid_post"][1], "end": arrays["final_norm"]}
    with hooks_of(actstore.open(url), epochs=2, drop_remainder=False) as hooks:
        seen = 0
        while (batch := hooks.next_or_none()) is not None:
            seen += len(batch.samples)
            assert list(batch.rows) == list(expected)
            for name, rows in expected.items():
                assert batch.rows[name].dtype == rows.dtype
                np.testing.assert_array_equal(batch.rows[name], rows[batch.samples])
    assert seen == 2 * learnable.LAYOUT.samples


@pytest.mark.parametrize("layer", [1, 3])
def test_hooks_of_two_sites_may_have_layers_of_their_own(url, arrays, layer):
    with Hooks(actstore.open(url), {"a": ("mlp_out", 1), "b": ("resid_post", layer)}, **SETTINGS) as hooks:
        batch = hooks.next_batch()
    np.testing.assert_array_equal(batch.rows["a"], arrays["mlp_out"][0][batch.samples])
    np.testing.assert_array_equal(batch.rows["b"], arrays["resid_post"][[1, 3].index(layer)][batch.samples])


def test_a_restore_at_every_step_gives_the_same_tail(url):
    store = actstore.open(url)
    with hooks_of(store) as hooks:
        states, expected = [], []
        for _ in range(10):
            states.append(hooks.state())
            expected.append(next(hooks))
    for step, state in enumerate(states):
        with hooks_of(store) as again:
            again.restore(state)
            for rows in expected[step:]:
                found = next(again)
                assert all(np.array_equal(found[name], rows[name]) for name in rows)


REFUSED = {
    "none": ({}, InputError, "no hook was named; expected {hook name: (site, layer)}"),
    "no layer": (
        {"a": ("resid_post", None)}, InputError, "hook 'a' names no layer; site 'resid_post' holds layers [1, 3]",
    ),
    "unknown": (
        {"a": ("resid_post", 2)}, UnknownNameError, "layer 2 of site 'resid_post' is not in this store; it holds",
    ),
    "layerless": ({"a": ("final_norm", 3)}, UnknownNameError, "site 'final_norm' has no layers, asked for layer 3"),
}  # fmt: skip


@pytest.mark.parametrize(("places", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_hooks_that_cannot_be_read_are_refused(url, places, kind, message):
    with pytest.raises(kind) as caught:
        Hooks(actstore.open(url), places, **SETTINGS)
    assert str(caught.value).startswith(message)


# Norms


ARRAYS = [("resid_post", 1, 0), ("resid_post", 3, 1), ("mlp_out", None, 0), ("final_norm", None, None)]


@pytest.mark.parametrize(("site", "layer", "index"), ARRAYS)
def test_the_scaling_factor_is_that_of_the_rows(url, arrays, site, layer, index):
    rows = (arrays[site] if index is None else arrays[site][index]).astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    store = actstore.open(url)
    assert scaling_factor(store, site=site, layer=layer) == pytest.approx(math.sqrt(32) / norms.mean(), rel=1e-6)


def test_norms_of_an_unknown_layer_are_refused(url):
    with pytest.raises(UnknownNameError, match="layer 2 of site 'resid_post' is not in this store"):
        scaling_factor(actstore.open(url), layer=2)


def test_rows_of_zeros_cannot_be_normalised(tmp_path):
    layout = actstore.Layout((actstore.Site("zero", 4, None),), samples=8, block_samples=8, chunk_samples=8, columns=())
    with actstore.create(tmp_path / "x.acts.zarr", layout, {}) as writer:
        writer.write(0, {"zero": np.zeros((8, 4), np.float32).astype(layout.sites[0].dtype)}, samples={})
    with pytest.raises(InputError, match=r"the norms of zero of .* have the mean 0.0; expected a positive finite one"):
        scaling_factor(actstore.open(tmp_path / "x.acts.zarr"), site="zero")


# States in checkpoints


def test_a_state_is_saved_with_a_checkpoint(url, tmp_path):
    with hooks_of(actstore.open(url)) as hooks:
        next(hooks)
        save_with_checkpoints(hooks)(None)
        save_with_checkpoints(hooks)(tmp_path)
        assert load_state(tmp_path) == hooks.state()
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_a_checkpoint_without_a_state_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        load_state(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds no actstore_batches.json; give the trainer save_checkpoint_fn=save_with_checkpoints(batches)"
    )


# Who imports what


OWN = {
    "__init__": set(), "hooks": set(), "saelens": set(),
    "torch": {"torch"}, "jax": {"jax"}, "grain": {"grain"}, "llamascopium": {"torch"},
    "dictionary_learning": {"dictionary_learning", "torch"},
}  # fmt: skip
KNOWN = {"torch", "jax", "grain", "dictionary_learning", "sae_lens", "llamascopium", "sparsify", "flax", "transformers"}


def imported(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_a_module_imports_its_own_library_alone():
    assert {path.stem: imported(path.read_text()) & KNOWN for path in FOLDER.glob("*.py")} == OWN


def test_meta_another_library_would_be_noticed():
    assert imported("def f():\n    import jax.numpy as jnp\nfrom torch.utils import data") == {"jax", "torch"}
