"""Sample order: bijections, uniformity, golden values, and windows against brute force."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore import shuffle
from actstore.shuffle import BlockOrder, Permutation

KEYS = st.lists(st.integers(0, 2**63), min_size=1, max_size=4).map(tuple)


def images(size, key, index=None):
    return Permutation(size, key)(np.arange(size, dtype=np.int64) if index is None else np.asarray(index, np.int64))


@given(st.integers(1, 600), KEYS)
def test_a_permutation_is_a_bijection_with_an_inverse(size, key):
    shuffled = images(size, key)
    assert sorted(shuffled.tolist()) == list(range(size))
    np.testing.assert_array_equal(Permutation(size, key).inverse(shuffled), np.arange(size))
    np.testing.assert_array_equal(images(size, key, Permutation(size, key).inverse(np.arange(size))), np.arange(size))


@given(st.integers(1, 2**62), KEYS, st.data())
def test_large_permutations_have_an_inverse(size, key, data):
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    shuffled = images(size, key, index)
    assert shuffled.min() >= 0
    assert shuffled.max() < size
    assert len(set(shuffled.tolist())) == len(index)
    np.testing.assert_array_equal(Permutation(size, key).inverse(shuffled), index)


@given(st.integers(1, 10**6), KEYS, st.lists(st.integers(0, 10**9), min_size=1, max_size=30))
def test_an_image_does_not_depend_on_what_is_asked_with_it(size, key, places):
    index = np.array(places) % size
    alone = [images(size, key, [place])[0] for place in index]
    np.testing.assert_array_equal(images(size, key, index), alone)


def feistel(size, key, index):
    """The same cipher in plain Python integers: ten rounds, splitmix64's finaliser, cycle walking."""
    half = max((max(size - 1, 1).bit_length() + 1) // 2, 1)
    keys = np.random.SeedSequence(list(key)).generate_state(10, np.uint64).tolist()

    def mix(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    while True:
        left, right = divmod(index, 1 << half)
        for word in keys:
            left, right = right, left ^ mix((right + word) % 2**64) % (1 << half)
        index = left << half | right
        if index < size:
            return index


@given(st.integers(1, 2**62), KEYS, st.data())
def test_it_is_the_cipher_of_its_description(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    assert images(size, key, [index])[0] == feistel(size, key, index)


GOLDEN = {
    "one": (1, (0,), [0]),
    "two": (2, (7,), [1, 0]),
    "ten": (10, (0,), [6, 7, 5, 2, 4, 0, 3, 1]),
    "ten with another key": (10, (1,), [7, 3, 6, 9, 5, 4, 0, 1]),
    "thousand": (1000, (3, 1, 4), [800, 66, 580, 89, 205, 813, 625, 59]),
    "over 32 bits": (
        2**32 + 1,
        (5,),
        [560669752, 1358394263, 1939282511, 3482272708, 1834343632, 2341793166, 1024117354, 3898943916],
    ),
    "terasamples": (
        10**12,
        (0, 0, 1),
        [317578776191, 299100858009, 789079199997, 532512090073, 41411436288, 993403323484, 969363328861, 362053717874],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("size", "key", "expected"), GOLDEN.values(), ids=GOLDEN.keys())
def test_the_order_never_changes_between_versions(size, key, expected):
    """A saved loader state means the same batches for ever. If this fails, the order was changed: do not."""
    assert images(size, key, range(len(expected))).tolist() == expected


def test_the_order_of_blocks_never_changes_between_versions():
    order = BlockOrder(samples=23, seed=9, chunk_samples=4, window_chunks=3)
    assert order.rows(0, 0, 11).tolist() == [5, 6, 3, 1, 22, 7, 21, 4, 0, 2, 20]
    assert order.rows(1, 0, 12).tolist() == [5, 4, 6, 16, 7, 22, 20, 17, 19, 18, 21, 19]


def chi_square(counts, cells):
    expected = sum(counts.values()) / cells
    return sum((count - expected) ** 2 for count in counts.values()) / expected + (cells - len(counts)) * expected


def tally(size, taken, keys):
    counts: dict[tuple[int, ...], int] = {}
    for key in range(keys):
        image = tuple(images(size, (key,), range(taken)).tolist())
        counts[image] = counts.get(image, 0) + 1
    return counts


UNIFORM = {  # size, images looked at, outcomes, the 99.99th percentile of chi-square with outcomes - 1 degrees
    "first image of 16": (16, 1, 16, 44.3),
    "first image of 13": (13, 1, 13, 39.1),
    "pairs of 16": (16, 2, 240, 325.7),
    "pairs of 5": (5, 2, 20, 50.8),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("size", "taken", "outcomes", "limit"), UNIFORM.values(), ids=UNIFORM.keys())
def test_small_permutations_are_uniform_over_keys(size, taken, outcomes, limit):
    assert chi_square(tally(size, taken, 2500), outcomes) < limit


def test_the_uniformity_test_would_fire(monkeypatch):
    monkeypatch.setattr(shuffle, "_ROUNDS", 2)
    assert chi_square(tally(16, 2, 2500), 240) > 325.7


@pytest.mark.parametrize("size", [64, 100])
def test_neighbours_of_a_permutation_are_uniform(size):
    """(image of i, image of i + 1), in sixteenths: 256 cells, 255 degrees, 99.99th percentile 344."""
    counts: dict[tuple[int, int], int] = {}
    for key in range(100):
        places = images(size, (key, 1)) * 16 // size
        for pair in itertools.pairwise(places.tolist()):
            counts[pair] = counts.get(pair, 0) + 1
    share = np.bincount(np.arange(size) * 16 // size, minlength=16)
    ordered = np.outer(share, share) - np.diag(share)
    expected = ordered / ordered.sum() * 100 * (size - 1)
    found = np.array([[counts.get((row, column), 0) for column in range(16)] for row in range(16)])
    assert ((found - expected) ** 2 / expected).sum() < 344


# Windows


ORDERS = st.builds(BlockOrder, st.integers(1, 120), st.integers(0, 2**40), st.integers(1, 20), st.integers(1, 9))


def windows(order, epoch):
    """Every window of an epoch, found by walking."""
    found, position = [], 0
    while position < order.samples:
        found.append(order.window_at(epoch, position))
        position = found[-1][1]
    return found


@given(ORDERS, st.integers(0, 1000))
def test_every_sample_comes_once_per_epoch(order, epoch):
    rows = np.concatenate([order.rows(epoch, *window) for window in windows(order, epoch)])
    assert sorted(rows.tolist()) == list(range(order.samples))


@given(ORDERS, st.integers(0, 1000))
def test_windows_tile_an_epoch_and_hold_whole_chunks(order, epoch):
    position = 0
    chunks_seen: list[int] = []
    for number, (start, stop) in enumerate(windows(order, epoch)):
        assert (start, position) == (position, start)
        chunks = order.chunks_of(epoch, number).tolist()
        assert len(chunks) == order.window_chunks or stop == order.samples
        members = [
            row for chunk in chunks for row in range(chunk * order.chunk_samples, (chunk + 1) * order.chunk_samples)
        ]
        expected = [row for row in members if row < order.samples]
        assert sorted(order.rows(epoch, start, stop).tolist()) == sorted(expected)
        chunks_seen += chunks
        position = stop
    assert sorted(chunks_seen) == list(range(order.chunks))
    assert position == order.samples


@given(ORDERS, st.integers(0, 50))
def test_every_position_knows_its_window(order, epoch):
    for start, stop in windows(order, epoch):
        for position in {start, (start + stop) // 2, stop - 1}:
            assert order.window_at(epoch, position) == (start, stop)


@given(ORDERS, st.integers(0, 50), st.data())
def test_a_part_of_a_window_is_the_same_part_of_the_whole(order, epoch, data):
    first, last = data.draw(st.sampled_from(windows(order, epoch)))
    start = data.draw(st.integers(first, last - 1))
    stop = data.draw(st.integers(start, last))
    np.testing.assert_array_equal(
        order.rows(epoch, start, stop), order.rows(epoch, first, last)[start - first : stop - first]
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("window_chunks", [1, 3, 1000])
def test_seeds_and_epochs_differ(window_chunks):
    orders = [
        np.concatenate([order.rows(epoch, *window) for window in windows(order, epoch)])
        for order in (BlockOrder(400, seed, 8, window_chunks) for seed in range(3))
        for epoch in range(3)
    ]
    for one, other in itertools.combinations([*orders, np.arange(400)], 2):
        assert np.count_nonzero(one == other) < 20  # two random orders agree at one place on average


def test_a_window_mixes_its_chunks():
    """The first 64 of 4,096 samples of a window of 64 chunks come from about 64 * (1 - exp(-1)) = 40 chunks."""
    order = BlockOrder(1 << 20, seed=1, chunk_samples=64, window_chunks=64)
    assert len(set((order.rows(0, 0, 64) // 64).tolist())) > 30


def test_a_window_as_large_as_the_store_is_a_uniform_shuffle():
    """First sample over 800 seeds: 20 cells, 19 degrees, 99.99th percentile 50.8."""
    counts: dict[int, int] = {}
    for seed in range(800):
        first = int(BlockOrder(20, seed, 4, 5).rows(0, 0, 1)[0])
        counts[first] = counts.get(first, 0) + 1
    assert chi_square(counts, 20) < 50.8


def test_a_store_of_terasamples_costs_nothing():
    order = BlockOrder(10**12 + 7, seed=3, chunk_samples=256, window_chunks=512)
    started = time.perf_counter()
    for position in [0, 10**6, 5 * 10**11, 10**12 + 6]:
        start, stop = order.window_at(2, position)
        rows = order.rows(2, start, stop)
        assert start <= position < stop
        assert len(set(rows.tolist())) == stop - start
        assert len(set((rows // 256).tolist())) == -(-(stop - start) // 256)
    assert time.perf_counter() - started < 10
