"""The figures of a shuffle beside brute force: drawing, counting and integers of any size."""

import collections
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from actstore import mixing
from actstore.mixing import (
    expected_groups,
    expected_pairs,
    group_sizes,
    groups_per_batch,
    lag_correlation,
    neighbour_pairs,
)
from actstore.shuffle import BlockOrder, Permutation

SIZES = {
    "equal": [10] * 50,
    "one": [500],
    "single samples": [1] * 300,
    "one large, many small": [400, *[3] * 40],
    "ragged": [*range(1, 40)],
}


@pytest.mark.parametrize("draws", [1, 2, 37, 150])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_expected_groups_are_the_mean_of_many_draws(sizes, draws):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(7)
    found = [len(np.unique(rng.choice(labels, draws, replace=False))) for _ in range(400)]
    noise = np.std(found) / np.sqrt(len(found))
    expected = expected_groups(np.array(sizes), draws, samples=len(labels))
    assert abs(np.mean(found) - expected) <= 4 * noise + 1e-9


@pytest.mark.parametrize(("size", "draws", "samples"), [
    (3, 2, 10), (7, 50, 10**12), (4096, 300, 10**9), (10**6, 20, 10**7), (60, 41, 100), (60, 40, 100), (5, 5, 5),
])  # fmt: skip
def test_expected_groups_are_exact_for_stores_of_any_size(size, draws, samples):
    missing = Fraction(math.comb(samples - size, draws), math.comb(samples, draws))
    found = expected_groups(np.array([size]), draws, samples=size) if size == samples else (
        expected_groups(np.array([size, samples - size]), draws, samples=samples)
        - float(1 - Fraction(math.comb(size, draws), math.comb(samples, draws)))
    )  # fmt: skip
    assert found == pytest.approx(float(1 - missing), rel=1e-9, abs=1e-15)


def test_sizes_of_a_part_stand_for_the_whole():
    sizes = np.array([10, 10, 25, 5])
    whole = np.tile(sizes, 20)
    assert expected_groups(sizes, 64, samples=1000) == pytest.approx(expected_groups(whole, 64, samples=1000))
    assert expected_pairs(sizes, samples=1000) == pytest.approx(expected_pairs(whole, samples=1000))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_expected_pairs_count_all_pairs(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    alike = (labels[:, None] == labels).sum() - len(labels)
    assert expected_pairs(np.array(sizes), samples=len(labels)) == pytest.approx(
        alike / len(labels) / (len(labels) - 1)
    )


def test_of_one_sample_there_is_no_pair():
    assert expected_pairs(np.array([1]), samples=1) == 0.0
    assert neighbour_pairs(np.array([[4]])) == 0.0
    assert lag_correlation(np.array([0]), samples=1) == (0.0, 0.0)


@pytest.mark.parametrize("pending", [1, 7, 1 << 20])
def test_groups_are_counted_across_pieces(monkeypatch, pending):
    monkeypatch.setattr(mixing, "_PENDING", pending)
    labels = np.random.default_rng(0).integers(-5, 60, size=1000, dtype=np.int32)
    found = group_sizes(np.split(labels, [0, 3, 400, 401, 990]))
    assert sorted(found.tolist()) == sorted(collections.Counter(labels.tolist()).values())


def test_no_labels_are_no_groups():
    assert group_sizes([]).tolist() == []


def test_figures_of_batches_are_those_of_sets_and_loops():
    labels = np.random.default_rng(1).integers(9, size=(20, 12))
    assert groups_per_batch(labels) == pytest.approx(np.mean([len(set(batch)) for batch in labels.tolist()]))
    pairs = [one == next_one for batch in labels.tolist() for one, next_one in itertools.pairwise(batch)]
    assert neighbour_pairs(labels) == pytest.approx(np.mean(pairs))


# Lag correlation

N = 40_000
ORDERS = {
    "stored order": (np.arange(N), 1.0),
    "a tenth of stored order": (np.arange(N // 10), 1.0),
    "the end, backwards": (np.arange(N)[: -N // 10 : -1], 1.0),
    "perfect": (Permutation(N, (3,))(np.arange(N)), 0.0),
    "perfect, by NumPy": (np.random.default_rng(0).permutation(N), 0.0),
}


@pytest.mark.parametrize(("order", "expected"), ORDERS.values(), ids=ORDERS.keys())
def test_lag_correlation_is_1_in_stored_order_and_0_when_shuffled(order, expected):
    found, error = lag_correlation(order.astype(np.int64), samples=N)
    assert abs(found - expected) < 4 * error
    assert error == pytest.approx(np.sqrt(0.5 / (len(order) * mixing.LAGS)), rel=0.01)


@pytest.mark.parametrize("window_chunks", [1, 4, 20])
def test_windows_of_w_chunks_have_a_lag_correlation_of_one_in_w(window_chunks):
    order = BlockOrder(N, 5, 400, window_chunks)
    numbers, position = [], 0
    while position < N:
        first, last = order.window_at(0, position)
        numbers.append(order.rows(0, first, last))
        position = last
    found, _ = lag_correlation(np.concatenate(numbers), samples=N)
    assert found == pytest.approx(1 / window_chunks - (1 - 1 / window_chunks) / (order.chunks - 1), rel=0.35)


def test_a_narrow_window_shows_before_it_ends():
    """The usual coefficient takes the window's mean for the store's: it would find nothing here."""
    order = BlockOrder(N, 5, 40, 2)
    first, last = order.window_at(0, 0)
    numbers = order.rows(0, first, last)
    found = [lag_correlation(order.rows(epoch, first, last), samples=N)[0] for epoch in range(200)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.15)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.3


def test_the_error_is_that_of_many_perfect_shuffles():
    found = [lag_correlation(Permutation(2000, (key,))(np.arange(2000)), samples=2000)[0] for key in range(200)]
    _, error = lag_correlation(np.arange(2000), samples=2000)
    assert np.std(found) == pytest.approx(error, rel=0.2)
    assert abs(np.mean(found)) < 4 * error / np.sqrt(len(found)) + 1 / 2000
