"""The demo's sparse autoencoder, its features and its picture, against numpy and known directions."""

import dataclasses
import itertools
import math
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from actstore.errors import InputError
from extract.demo.features import Firing, count_firing, pick_features, top_samples, write_features
from extract.demo.plot import plot_loss
from extract.demo.sae import Metrics, TopKSAE, train_sae

WIDTH, DIRECTIONS, ACTIVE, BATCH = 32, 48, 3, 256


def _directions() -> np.ndarray:
    directions = np.random.default_rng(0).normal(size=(DIRECTIONS, WIDTH))
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def _sparse_batches(*, sinks: int = 0, seed: int = 1):
    """Endless rows that are sums of a few known directions around a mean; the last `sinks` rows of a batch are huge."""
    rng = np.random.default_rng(seed)
    directions = _directions()
    sink = 100 * rng.normal(size=WIDTH).astype(np.float32)
    while True:
        chosen = rng.random((BATCH, DIRECTIONS)).argsort(axis=1)[:, :ACTIVE]
        sizes = rng.uniform(1, 2, size=(BATCH, ACTIVE)).astype(np.float32)
        rows = np.einsum("bk,bkh->bh", sizes, directions[chosen]) + 0.5
        rows[BATCH - sinks :] = sink
        yield rows


def _train(batches, **changes):
    arguments = {"width": WIDTH, "features": DIRECTIONS, "k": ACTIVE, "steps": 20, "learning_rate": 1e-2}
    return train_sae(batches, **(arguments | changes))


def _recovery(sae: TopKSAE) -> float:
    """The mean over the true directions of the best cosine that a learnt one has with it."""
    return float((_directions() @ np.asarray(sae.decoder[...]).T).max(axis=1).mean())


# Training


@pytest.fixture(scope="module")
def trained():
    return _train(_sparse_batches(), steps=600)


def test_training_recovers_the_directions(trained):
    assert _recovery(TopKSAE(WIDTH, features=DIRECTIONS, k=ACTIVE, rngs=nnx.Rngs(0))) < 0.6
    assert _recovery(trained.sae) > 0.9


def test_training_explains_the_variance(trained):
    first, last = trained.history[0], trained.history[-1]
    assert first.fvu > 0.5
    assert trained.metrics.fvu < 0.1
    assert last.loss < 0.1 * first.loss
    assert len(trained.history) == 600


def test_exactly_k_features_fire(trained):
    assert trained.metrics.l0 == pytest.approx(ACTIVE, rel=1e-2)
    values, indices = trained.encode(next(_sparse_batches(seed=5)))
    assert values.shape == indices.shape == (BATCH, ACTIVE)
    assert (values > 0).mean() > 0.98
    assert all(len(set(row)) == ACTIVE for row in indices.tolist())


def test_directions_keep_norm_one(trained):
    np.testing.assert_allclose(np.linalg.norm(trained.sae.decoder[...], axis=1), 1, rtol=1e-5)


def test_the_final_metrics_are_the_mean_of_the_last_tenth(trained):
    tail = trained.history[-60:]
    expected = {
        field.name: np.mean([getattr(one, field.name) for one in tail]) for field in dataclasses.fields(Metrics)
    }
    assert dataclasses.asdict(trained.metrics) == pytest.approx(expected)


def test_the_same_batches_and_seed_give_the_same_dictionary():
    one, two, other = (_train(_sparse_batches(), seed=seed) for seed in (0, 0, 1))
    assert one.history == two.history
    np.testing.assert_array_equal(one.sae.decoder[...], two.sae.decoder[...])
    assert one.history != other.history


def test_progress_counts_the_steps():
    steps = []
    trained = _train(_sparse_batches(), steps=3, progress=lambda *step: steps.append(step))
    assert steps == [(f"training, fvu {one.fvu:.3f}", done, 3) for done, one in enumerate(trained.history, start=1)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "convert",
    [
        lambda rows: rows.astype(ml_dtypes.bfloat16),
        jnp.asarray,
        lambda rows: rows.astype(np.float16),
    ],
    ids=["bfloat16", "jax", "float16"],
)
def test_rows_may_have_any_float_type(convert):
    batches = itertools.islice(_sparse_batches(), 20)
    trained = _train(convert(rows) for rows in batches)
    expected = _train(_sparse_batches())
    assert trained.metrics.fvu == pytest.approx(expected.metrics.fvu, rel=0.02)
    values, _ = trained.encode(convert(next(_sparse_batches())))
    assert values.dtype == np.float32


# The numbers, against numpy


def _dense(sae: TopKSAE, rows: np.ndarray) -> np.ndarray:
    """All activations, with those outside the k largest of a row set to zero."""
    activations = (rows - np.asarray(sae.pre_bias[...])) @ np.asarray(sae.encoder[...])
    smallest = np.sort(activations, axis=1)[:, [-sae.k]]
    return np.where((activations >= smallest) & (activations > 0), activations, 0)


def test_encode_keeps_the_k_largest(trained):
    rows = next(_sparse_batches(seed=7))
    values, indices = trained.encode(rows)
    found = np.zeros((BATCH, DIRECTIONS), np.float32)
    np.put_along_axis(found, indices, values, axis=1)
    np.testing.assert_allclose(found, _dense(trained.sae, rows / trained.scale), atol=1e-4)
    assert (np.diff(values, axis=1) <= 0).all()


def test_activations_are_never_negative():
    sae = TopKSAE(WIDTH, features=8, k=8, rngs=nnx.Rngs(0))
    rows = next(_sparse_batches())
    values, _ = sae.encode(jnp.asarray(rows))
    assert ((rows @ np.asarray(sae.encoder[...])) < 0).any()
    assert values.min() == 0


def test_decode_is_the_weighted_sum(trained):
    rows = next(_sparse_batches(seed=7)) / trained.scale
    sae = trained.sae
    expected = _dense(sae, rows) @ np.asarray(sae.decoder[...]) + np.asarray(sae.pre_bias[...])
    np.testing.assert_allclose(sae(jnp.asarray(rows)), expected, atol=1e-4)


@pytest.mark.parametrize("sinks", [0, 9], ids=["plain", "sinks"])
def test_scale_mean_and_metrics_of_the_first_step(sinks):
    batches = list(itertools.islice(_sparse_batches(sinks=sinks), 4))
    trained = _train(iter(batches), steps=4, learning_rate=0.0)
    rows = np.concatenate(batches)
    assert trained.scale**2 * WIDTH == pytest.approx((rows**2).sum(axis=1).mean(), rel=1e-4)
    np.testing.assert_allclose(trained.sae.pre_bias[...], rows.mean(axis=0) / trained.scale, rtol=1e-3, atol=1e-5)

    first = batches[0] / trained.scale
    error = ((np.asarray(trained.sae(jnp.asarray(first))) - first) ** 2).sum(axis=1)
    variance = ((first - first.mean(axis=0)) ** 2).sum(axis=1)
    fires = _dense(trained.sae, first) > 0
    expected = (error.mean() / WIDTH, error.sum() / variance.sum(), fires.sum(axis=1).mean())
    found = trained.history[0]
    assert (found.loss, found.fvu, found.l0) == pytest.approx(expected, rel=1e-3)


def test_dead_features_are_those_that_did_not_fire_lately():
    batches = list(itertools.islice(_sparse_batches(), 12))
    trained = _train(iter(batches), steps=12, features=512, learning_rate=0.0, dead_after_samples=4 * BATCH)
    for step in (3, 4, 8, 12):
        recent = np.concatenate(batches[step - 4 : step]) if step >= 4 else None
        dead = 0.0 if recent is None else float((_dense(trained.sae, recent / trained.scale) == 0).all(axis=0).mean())
        assert trained.history[step - 1].dead == pytest.approx(dead, abs=1 / 512), step
    assert trained.history[-1].dead > 0.05


def test_dropping_the_sinks_saves_the_directions():
    with_sinks = _train(_sparse_batches(sinks=5), steps=300)
    without = _train((rows[:-5] for rows in _sparse_batches(sinks=5)), steps=300)
    assert _recovery(without.sae) > 0.85
    assert _recovery(with_sinks.sae) < _recovery(without.sae) - 0.1


# Refusals


def _with_nan():
    rows = next(_sparse_batches())
    rows[3, 4] = np.nan
    return rows


SOUND = next(_sparse_batches())
REFUSED = {
    "k-too-big": ([SOUND], {"k": 49}, "k is 49 with 48 features; expected 1 to 48. Lower k or add features."),
    "k-zero": ([SOUND], {"k": 0}, "k is 0 with 48 features; expected 1 to 48. Lower k or add features."),
    "no-steps": ([SOUND], {"steps": 0}, "steps is 0; expected at least 1. Ask for one step or more."),
    "width": (
        [SOUND[:, :8]],
        {},
        "A batch has rows of width 8; expected 32. Pass the hidden size of the site.",
    ),
    "none": ([], {}, "The batches ended after 0; expected 20, one for each step. Ask for fewer steps"),
    "few": ([SOUND] * 7, {}, "The batches ended after 7; expected 20, one for each step. Ask for fewer steps"),
    "nan-first": (
        [_with_nan()],
        {},
        "The first batches: rows or loss are zero or not finite; expected",
    ),
    "zeros": ([SOUND * 0], {}, "The first batches: rows or loss are zero or not finite; expected"),
    "nan-later": ([SOUND] * 5 + [_with_nan()], {}, "Step 6: rows or loss are zero or not finite; expected sound rows."),
}


@pytest.mark.parametrize(("batches", "changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_training_refuses(batches, changes, message):
    with pytest.raises(InputError) as caught:
        _train(iter(batches), **changes)
    assert str(caught.value).startswith(message)


# Features


class Table:
    """A dictionary whose activations stand in a table: row i of a batch is the number of the sample."""

    def __init__(self, activations: np.ndarray, k: int):
        self.activations, self.k = activations, k

    @property
    def features(self) -> int:
        return self.activations.shape[1]

    def encode(self, rows):
        dense = self.activations[rows[:, 0].astype(int)]
        indices = np.argsort(-dense, axis=1, kind="stable")[:, : self.k]
        return np.take_along_axis(dense, indices, axis=1), indices

    def batches(self, size: int):
        """The samples in another order than that of their numbers, in batches."""
        order = np.random.default_rng(3).permutation(len(self.activations))
        for start in range(0, len(order), size):
            samples = order[start : start + size]
            yield samples[:, None].astype(np.float32), samples


@pytest.fixture
def table() -> Table:
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(size=(500, 40)) + np.linspace(-3, 1, 40), 0).round(1).astype(np.float32)
    activations[:, 0] = 0
    return Table(activations, k=40)


@pytest.mark.parametrize("size", [1, 64, 500])
def test_top_samples_are_the_strongest(table, size):
    found = top_samples(table, table.batches(size), features=[0, 5, 20, 39], k=6)
    for feature, samples in found.items():
        column = table.activations[:, feature]
        order = np.lexsort((np.arange(500), -column))[:6]  # ties go to the lower sample; rounding made many
        assert samples == [(int(i), float(column[i])) for i in order if column[i] > 0]
    assert list(found) == [0, 5, 20, 39]
    assert found[0] == []


def test_counts_are_those_of_the_table(table):
    firing = count_firing(table, table.batches(64))
    assert firing.samples == 500
    np.testing.assert_array_equal(firing.counts, (table.activations > 0).sum(axis=0))


def test_a_trained_dictionary_finds_its_direction(trained):
    rows = np.concatenate(list(itertools.islice(_sparse_batches(seed=9), 4)))
    best = top_samples(trained, [(rows, np.arange(len(rows)))], features=[7], k=10)[7]
    column = _dense(trained.sae, rows / trained.scale)[:, 7]
    np.testing.assert_allclose([activation for _, activation in best], np.sort(column)[:-11:-1], atol=1e-4)


@pytest.mark.parametrize(
    ("counts", "count", "expected"),
    [
        ([0, 4, 5, 50, 200, 201], 8, [2, 3, 4]),
        ([60, 50, 40, 30, 20], 3, [4, 2, 0]),
        ([10, 10, 10, 10], 2, [0, 3]),
        ([10, 20, 30], 1, [0]),
        ([0, 9999], 4, []),
    ],
    ids=["bounds", "spread", "ties", "one", "none"],
)
def test_picked_features_are_live_and_selective(counts, count, expected):
    assert pick_features(Firing(10_000, np.array(counts)), count=count) == expected


@pytest.mark.parametrize(
    ("features", "k", "message"),
    [
        ([1], 0, "k is 0; expected at least 1. Ask for one sample or more."),
        ([3, 40, -1], 2, "There are no features [-1, 40]; expected 0 to 39. Take some of these."),
    ],
    ids=["k", "unknown"],
)
def test_top_samples_refuses(table, features, k, message):
    with pytest.raises(InputError) as caught:
        top_samples(table, table.batches(64), features=features, k=k)
    assert str(caught.value) == message


def test_no_batches_are_refused(table):
    with pytest.raises(InputError) as caught:
        count_firing(table, [])
    assert str(caught.value) == "The batches hold no samples; expected at least one. Pass a fresh iterator."


def test_the_page_shows_tokens_in_their_text(tmp_path):
    texts = {4: ("one\n", "two", "\tthree"), 9: ("", "\x07é", "\r\n")}
    firing = Firing(2000, np.array([0, 3, 1500]))
    top = {2: [(4, 12.345), (9, 0.5)], 0: []}
    write_features(tmp_path / "features.txt", firing=firing, top=top, context=texts.__getitem__)
    assert (tmp_path / "features.txt").read_text(encoding="utf-8").split("\n") == [
        "feature 2: fires on 1,500 of 2,000 samples (75.000%)",
        "     12.35  one⏎⟦two⟧⇥three",
        "      0.50  ⟦·é⟧␍⏎",
        "",
        "feature 0: fires on 0 of 2,000 samples (0.000%)",
        "",
        "",
    ]


# The picture


def test_the_plot_is_a_picture_of_the_history(tmp_path):
    falling = [Metrics(loss=math.exp(-i / 50), fvu=0.9 - i / 200, l0=32.0, dead=i / 1000) for i in range(100)]
    for name, history in {"a": falling, "b": falling, "c": falling[:50]}.items():
        plot_loss(history, tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", a[16:24])
    assert width > 800
    assert height > 600
    assert a == b != c
