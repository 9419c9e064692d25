"""Minibatches: the right rows, every sample once, the same tail after a restore at any step, nothing left over."""

import gc
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from kill_points import unchecked
from stores import LAYOUT, make_contents

import actstore
from actstore.errors import CorruptStoreError, InputError, UnfinishedStoreError, UnknownNameError
from actstore.shuffle import BlockOrder

CHUNK_BYTES = 2 * 6 * 2 * 4  # of resid_post, in both halves of a window
WINDOWS = {"one chunk": 1, "three chunks": 3 * CHUNK_BYTES, "the whole store": 1 << 20}
PLACES = [("resid_post", 5), ("mlp_out", 11), ("attn_out", None), ("final_norm", None)]


def rows_of(contents, site, layer):
    """The rows of one site and layer, in memory, in the stored dtype."""
    where = contents.layout.site(site)
    rows = contents.rows[site]
    return rows if where.layers is None else rows[where.layers.index(layer) if layer is not None else 0]


@pytest.fixture
def loader(finished):
    """Makes loaders of the finished store, and closes them."""
    made = []

    def make(batch_size=8, *, site="resid_post", layer=5, **settings):
        made.append(actstore.open(finished).batches(batch_size=batch_size, site=site, layer=layer, **settings))
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def drain(batches):
    return list(iter(batches.next_or_none, None))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("batch_size", [1, 8, 53])
@pytest.mark.parametrize("window_bytes", WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_rows_are_those_of_their_samples(loader, contents, site, layer, window_bytes, batch_size, drop):
    """Each batch against memory, and every sample once per epoch (but for a remainder that is dropped)."""
    batches = loader(batch_size, site=site, layer=layer, window_bytes=window_bytes, epochs=2, drop_remainder=drop)
    found, rows = drain(batches), rows_of(contents, site, layer)
    per_epoch = 53 // batch_size if drop else -(-53 // batch_size)
    assert len(found) == 2 * per_epoch
    for batch in found:
        assert batch.rows.dtype == rows.dtype
        np.testing.assert_array_equal(batch.rows, rows[batch.samples])
    for epoch in (found[:per_epoch], found[per_epoch:]):
        samples = np.concatenate([batch.samples for batch in epoch])
        assert len(set(samples.tolist())) == len(samples) == (per_epoch * batch_size if drop else 53)
        assert all(len(batch.samples) == batch_size for batch in epoch[: 53 // batch_size])


@pytest.mark.parametrize("window_bytes", WINDOWS.values(), ids=WINDOWS.keys())
def test_the_order_is_that_of_shuffle(loader, window_bytes):
    batches = loader(7, seed=11, window_bytes=window_bytes, epochs=3, drop_remainder=False)
    order = BlockOrder(53, 11, 4, max(window_bytes // CHUNK_BYTES, 1))
    expected = []
    for epoch in range(3):
        position = 0
        while position < 53:
            start, stop = order.window_at(epoch, position)
            expected += order.rows(epoch, start, stop).tolist()
            position = stop
    assert [sample for batch in drain(batches) for sample in batch.samples.tolist()] == expected


def test_iterating_gives_the_rows(loader, contents):
    ours, twin = loader(8, epochs=1), loader(8, epochs=1)
    found = list(ours)
    assert len(found) == 6
    for rows, batch in zip(found, drain(twin), strict=True):
        np.testing.assert_array_equal(rows, batch.rows)


def test_it_never_ends_unless_told(loader):
    samples = [tuple(batch.samples) for batch in itertools.islice(iter(loader(10).next_or_none, None), 50)]
    assert len(samples) == 50
    assert len(set(samples)) == 50  # ten epochs, each in an order of its own


def test_seeds_differ(loader):
    first = [tuple(loader(53, seed=seed).next_batch().samples) for seed in range(5)]
    assert len(set(first)) == 5


def test_a_batch_may_be_larger_than_a_window(loader, contents):
    batch = loader(50, window_bytes=1).next_batch()
    assert len(set(batch.samples.tolist())) == 50
    np.testing.assert_array_equal(batch.rows, rows_of(contents, "resid_post", 5)[batch.samples])


def test_a_batch_may_be_larger_than_the_store(loader):
    batches = loader(1000, drop_remainder=False, epochs=2)
    assert [sorted(batch.samples) for batch in drain(batches)] == [list(range(53))] * 2


def test_buffers_are_fresh_and_writable(loader, contents):
    """dictionary_learning divides in place: neither later batches nor the store may change by it."""
    expected = rows_of(contents, "resid_post", 5)
    seen = []
    for batch in drain(loader(8, epochs=3, window_bytes=3 * CHUNK_BYTES)):
        np.testing.assert_array_equal(batch.rows, expected[batch.samples])
        assert not any(np.shares_memory(batch.rows, rows) for rows in seen)
        assert batch.rows.flags.writeable
        assert batch.rows.flags.c_contiguous
        seen.append(batch.rows)
        batch.rows[:] = 0
        batch.samples[:] = 0


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_other_codecs_give_the_same_rows(tmp_path, codec):
    layout = actstore.Layout(LAYOUT.sites, 53, 16, 4, codec=codec)
    contents = make_contents(layout, documents=False)
    store = actstore.open(contents.write(tmp_path / "x.acts.zarr"))
    with store.batches(batch_size=9, site="mlp_out", layer=2, epochs=1) as batches:
        for batch in drain(batches):
            np.testing.assert_array_equal(batch.rows, contents.rows["mlp_out"][0][batch.samples])


# State


@pytest.mark.sampled(3)
@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("window_bytes", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_restore_at_every_step_gives_the_same_tail(loader, window_bytes, drop):
    settings = {"seed": 3, "epochs": 2, "window_bytes": window_bytes, "drop_remainder": drop}
    batches = loader(9, **settings)
    states, expected = [batches.state()], []
    while (batch := batches.next_or_none()) is not None:
        expected.append(batch)
        states.append(batches.state())
    assert len(expected) == 2 * (5 if drop else 6)
    for step, state in enumerate(states):
        written = json.dumps(state)
        assert len(written) <= 200
        again = loader(9, **settings)
        again.restore(json.loads(written))
        assert again.state() == state
        tail = drain(again)
        assert len(tail) == len(expected) - step
        for batch, wanted in zip(tail, expected[step:], strict=True):
            np.testing.assert_array_equal(batch.samples, wanted.samples)
            np.testing.assert_array_equal(batch.rows, wanted.rows)


def test_a_used_loader_can_be_restored_in_both_directions(loader):
    batches = loader(9, window_bytes=2 * CHUNK_BYTES, epochs=4)
    states, expected = [], []
    for _ in range(12):
        states.append(batches.state())
        expected.append(batches.next_batch().samples.tolist())
    for step in [11, 0, 7, 3, 10, 1, 1]:
        batches.restore(states[step])
        assert batches.next_batch().samples.tolist() == expected[step]
    drain(batches)
    batches.restore(states[2])  # also when it was used up
    assert batches.next_batch().samples.tolist() == expected[2]


def test_the_state_of_a_huge_epoch_stays_small(loader):
    batches = loader()
    batches.restore({**batches.state(), "epoch": 10**15, "position": 53})
    assert len(json.dumps(batches.state())) <= 200
    assert len(set(batches.next_batch().samples.tolist())) == 8


def test_a_state_past_the_end_is_refused(loader):
    batches = loader()
    with pytest.raises(InputError, match="the state is at sample 54, the store has 53; not restored"):
        batches.restore({**batches.state(), "position": 54})


OTHERS = {
    "seed": {"seed": 1},
    "site": {"site": "mlp_out"},
    "layer": {"layer": 2},
    "batch size": {"batch_size": 9},
    "window": {"window_bytes": 2 * CHUNK_BYTES},
    "remainder": {"drop_remainder": False},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS.keys())
def test_the_state_of_another_loader_is_refused(loader, changes):
    settings = {"batch_size": 8, "window_bytes": CHUNK_BYTES}
    state, other = loader(**settings).state(), loader(**{**settings, **changes})
    with pytest.raises(InputError) as caught:
        other.restore(state)
    assert str(caught.value) == (
        f"the state belongs to the loader {state['loader']}, this one is {other.state()['loader']}: another store, "
        "site, layer, seed, order, window, batch size, filter or normalisation; make the loader with the settings it "
        "had"
    )  # fmt: skip
    assert other.state()["position"] == 0


def test_the_state_of_another_store_is_refused(loader, tmp_path):
    other = actstore.open(make_contents(documents=False).write(tmp_path / "x.acts.zarr"))
    with pytest.raises(InputError, match="the state belongs to the loader"):
        loader().restore(other.batches(batch_size=8, layer=5).state())


def test_epochs_may_be_prolonged(loader):
    """How long one trains does not decide the order, so a state fits a loader with more epochs."""
    short = loader(epochs=1)
    drain(short)
    longer = loader(epochs=2)
    longer.restore(short.state())
    assert len(drain(longer)) == 6


BAD_STATES = {
    "nothing": {},
    "no position": {"version": 1, "epoch": 0, "loader": "x"},
    "more": {"version": 1, "epoch": 0, "position": 0, "loader": "x", "more": 1},
    "text": {"version": 1, "epoch": "0", "position": 0, "loader": "x"},
    "negative": {"version": 1, "epoch": 0, "position": -1, "loader": "x"},
    "fraction": {"version": 1, "epoch": 0, "position": 0.5, "loader": "x"},
    "its text": '{"version": 1, "epoch": 0, "position": 0, "loader": "x"}',
    "null": {"version": 1, "epoch": None, "position": 0, "loader": "x"},
}


@pytest.mark.parametrize("state", BAD_STATES.values(), ids=BAD_STATES.keys())
def test_what_is_not_a_state_is_refused(loader, state):
    with unchecked(), pytest.raises(InputError, match=r"not a state of batches: .*; expected what state\(\) returned"):
        loader().restore(state)


# Refusals and failures


REFUSED = {
    "no rows": ({"batch_size": 0}, InputError, "batch_size 0 and window_bytes 2147483648 must be positive"),
    "no window": ({"window_bytes": 0}, InputError, "batch_size 8 and window_bytes 0 must be positive"),
    "no epochs": ({"epochs": 0}, InputError, "epochs is 0; expected a positive number, or None for endless batches"),
    "negative seed": ({"seed": -1}, InputError, "seed is -1; expected a number >= 0"),
    "too large": (
        {"batch_size": 54},
        InputError,
        (
            "batch_size is 54, the store holds 53 samples: no batch would ever be full; use a smaller batch_size, or "
            "drop_remainder=False"
        ),
    ),
    "site": ({"site": "resid_pre"}, UnknownNameError, "site 'resid_pre' is not in this store; it holds resid_post"),
    "layer": ({"layer": 3}, UnknownNameError, "layer 3 of site 'resid_post' is not in this store; it holds"),
    "layer unsaid": ({"layer": None}, InputError, "site 'resid_post' holds layers [2, 5, 11]; say which one"),
    "layer of a layerless site": ({"site": "final_norm"}, UnknownNameError, "site 'final_norm' has no layers, asked"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_give_a_batch_is_refused(loader, settings, kind, message):
    with pytest.raises(kind) as caught:
        loader(**settings)
    assert str(caught.value).startswith(message)


NOT_SETTINGS = {
    "half a seed": ({"seed": 1.5}, "seed is 1.5; expected a whole number"),
    "no seed": ({"seed": None}, "seed is None; expected a whole number"),
    "text": ({"batch_size": "8"}, "batch_size is '8'; expected a whole number"),
    "half a part": ({"part": (0.5, 2)}, "part is 0.5; expected a whole number"),
    "a part alone": ({"part": 1}, "part is 1; expected (number, parts) with 0 <= number < parts, such as (0, 4)"),
    "three": ({"part": (0, 1, 2)}, "part is (0, 1, 2); expected (number, parts) with 0 <= number < parts"),
    "one layer": ({"layer": None, "layers": 5}, "layers is 5; expected several, such as [5]"),
    "one site": ({"layer": None, "sites": "mlp_out"}, "sites is 'mlp_out'; expected several, such as ['mlp_out']"),
    "layers without any": (
        {"layer": None, "layers": {"final_norm": [3]}}, "site 'final_norm' has no layers, asked for [3]; give None",
    ),
    "both": (
        {"layer": None, "sites": ["mlp_out"], "layers": {"mlp_out": [2]}},
        "sites ['mlp_out'] and layers by site were given; give the layers by site alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), NOT_SETTINGS.values(), ids=NOT_SETTINGS.keys())
def test_what_is_no_setting_is_refused(loader, settings, message):
    with unchecked(), pytest.raises(InputError) as caught:
        loader(**settings)
    assert str(caught.value).startswith(message)


def test_numbers_of_numpy_are_numbers(loader):
    """Their state is JSON too, and that of a loader with Python's."""
    given = {"batch_size": 8, "seed": 1, "window_bytes": 100, "epochs": 2, "part": (0, 2)}
    theirs = {name: np.int64(value) if name != "part" else tuple(map(np.int64, value)) for name, value in given.items()}
    with unchecked():
        ours, other = loader(**given), loader(**theirs, drop_remainder=1)
    ours.next_batch(), other.next_batch()
    assert json.loads(json.dumps(other.state())) == ours.state()


def test_an_unfinished_store_gives_no_batches(unfinished):
    with pytest.raises(UnfinishedStoreError, match="2 of 4 blocks are committed"):
        actstore.open(unfinished, partial=True).batches(batch_size=4, layer=5)


@pytest.mark.parametrize("damage", ["flipped", "missing", "empty"])
def test_damage_is_an_error_and_the_same_batch_comes_after_repair(finished, tmp_path, damage):
    path = shutil.copytree(finished, tmp_path / "x.acts.zarr")
    store = actstore.open(path)
    with store.batches(batch_size=9, layer=5, epochs=1, window_bytes=CHUNK_BYTES) as sound:
        expected = [batch.samples.tolist() for batch in drain(sound)]
    shard = path / "resid_post/c/1/2/0"
    whole = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(b"" if damage == "empty" else bytes([whole[0] ^ 1]) + whole[1:])
    with store.batches(batch_size=9, layer=5, epochs=1, window_bytes=CHUNK_BYTES) as batches:
        found: list[list[int]] = []
        with pytest.raises(CorruptStoreError) as caught:
            found.extend(batch.samples.tolist() for batch in iter(batches.next_batch, None))
        assert re.match(f"(could not read )?resid_post, layer 5, block 2 of {path}: ", str(caught.value))
        assert "\n" not in str(caught.value)
        with pytest.raises(CorruptStoreError):
            batches.next_batch()
        shard.write_bytes(whole)
        found += [batch.samples.tolist() for batch in drain(batches)]
    assert found == expected


# Nothing left over


def our_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("actstore-batches")]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_closing_ends_the_thread(finished):
    with actstore.open(finished).batches(batch_size=8, layer=5) as batches:
        batches.next_batch()
        assert len(our_threads()) == 1
    assert our_threads() == []
    batches.close()
    batches.next_batch()  # and may be used again
    batches.close()
    assert our_threads() == []


def test_the_last_epoch_ends_the_thread(loader):
    drain(loader(epochs=1))
    assert our_threads() == []


def test_a_forgotten_loader_ends_its_thread(finished):
    batches = actstore.open(finished).batches(batch_size=8, layer=5)
    batches.next_batch()
    del batches
    gc.collect()
    assert wait_until(lambda: our_threads() == [])


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_file_stays_open(finished):
    def round_trip():
        with actstore.open(finished).batches(batch_size=8, layer=5, window_bytes=1) as batches:
            for _ in range(10):
                batches.next_batch()

    round_trip()  # TensorStore's own threads and files come with the first use
    before = open_files()
    for _ in range(20):
        round_trip()
    assert wait_until(lambda: open_files() <= before)


def test_a_program_ends_with_a_loader_under_way(finished):
    program = (
        "import sys, actstore\n"
        "batches = actstore.open(sys.argv[1]).batches(batch_size=8, layer=5)\n"
        "print(batches.next_batch().rows.shape)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(finished)], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "(8, 6)\n", "")
