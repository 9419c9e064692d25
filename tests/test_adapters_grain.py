"""The grain dataset: the loader's sequence, states at every step, prefetching to a device, trained on."""

import itertools
import json

import jax
import jax.numpy as jnp
import learnable
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest

import actstore
from actstore.errors import InputError, StoreNotFoundError

grain = pytest.importorskip("grain", reason="NOT CHECKED: grain is not installed here")
adapter = pytest.importorskip("actstore.adapters.grain")
SETTINGS = {"layer": 3, "batch_size": 256, "seed": 5, "window_bytes": 64 << 10}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return learnable.write(tmp_path_factory.mktemp("grain") / "run.acts.zarr")


def loader_batches(url, count, **settings):
    with actstore.open(url).batches(**SETTINGS | settings) as batches:
        return list(itertools.islice(batches, count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, rows in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint16), rows.view(np.uint16))


def pipelines(dataset):
    """The dataset alone, and behind what grain offers."""
    return {
        "alone": dataset,
        "mapped": dataset.map(lambda rows: rows),
        "on a device": grain.experimental.device_put(dataset, jax.devices()[0]),
    }


def test_elements_are_the_minibatches(url):
    dataset = adapter.BatchDataset(url, **SETTINGS, epochs=2, drop_remainder=False)
    expected = loader_batches(url, None, epochs=2, drop_remainder=False)
    for pipeline in pipelines(dataset).values():
        assert_same(list(pipeline), expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["alone", "mapped", "on a device"])
def test_a_restore_at_every_step_gives_the_same_tail(url, kind):
    pipeline = pipelines(adapter.BatchDataset(url, **SETTINGS))[kind]
    expected = loader_batches(url, 12)
    iterator = iter(pipeline)
    states = [iterator.get_state()]
    for rows in expected:
        assert_same([next(iterator)], [rows])
        states.append(json.loads(json.dumps(iterator.get_state())))
    for step, state in enumerate(states[:-1]):
        again = iter(pipeline)
        again.set_state(state)
        assert_same(list(itertools.islice(again, len(expected) - step)), expected[step:])
        again.close()
    iterator.close()


def test_a_state_may_be_set_while_under_way(url):
    iterator = iter(adapter.BatchDataset(url, **SETTINGS))
    start = iterator.get_state()
    first = [next(iterator) for _ in range(3)]
    iterator.set_state(start)
    assert_same([next(iterator) for _ in range(3)], first)
    iterator.close()


def test_orbax_keeps_an_iterator_with_a_checkpoint(url, tmp_path):
    """Through grain's own handler for orbax, with a filter and normalised rows."""
    settings = SETTINGS | {"where": actstore.Filter(drop={"token_id": 3}), "normalize": "norm_factor"}
    iterator = iter(adapter.BatchDataset(url, **settings))
    next(iterator)
    with orbax.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=orbax.args.Composite(batches=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(3)]
        again = iter(adapter.BatchDataset(url, **settings))
        manager.restore(1, args=orbax.args.Composite(batches=grain.checkpoint.CheckpointRestore(again)))
    for rows in expected:
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(next(again), rows)
    iterator.close()
    again.close()


def test_a_closed_iterator_says_so(url):
    iterator = iter(adapter.BatchDataset(url, **SETTINGS))
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_mistakes_are_named(url, tmp_path):
    with pytest.raises(StoreNotFoundError):
        iter(adapter.BatchDataset(tmp_path / "none.acts.zarr", layer=3, batch_size=8))
    other = iter(adapter.BatchDataset(url, **SETTINGS | {"seed": 6}))
    state = iter(adapter.BatchDataset(url, **SETTINGS)).get_state()
    with pytest.raises(InputError, match="the state belongs to the loader"):
        other.set_state(state)
    assert str(adapter.BatchDataset("x.acts.zarr")) == "BatchDataset('x.acts.zarr')"


def test_workers_of_grain_are_refused(url):
    """Each would read the whole store for its share."""
    dataset = adapter.BatchDataset(url, **SETTINGS)
    with pytest.raises(InputError) as caught:
        next(iter(grain.experimental.multithread_prefetch(dataset, num_threads=2, buffer_size=1)))
    assert str(caught.value).startswith(
        f"the minibatches of {url} are not divided among grain's workers; leave `mp_prefetch` out: the loader reads "
        "ahead in a thread of its own"
    )


@pytest.mark.slow
def test_training_learns_and_continues_exactly(url):
    """120 real steps with a stop in the middle: the loss falls, and both halves are those of an unbroken run."""
    adam = optax.adam(1e-2)

    def loss_of(params, rows):
        features = jax.nn.relu(rows @ params["encoder"] + params["offset"])
        return jnp.square(features @ params["decoder"] - rows).mean() + 1e-3 * features.mean()

    @jax.jit
    def step(params, moments, rows):
        loss, gradients = jax.value_and_grad(loss_of)(params, rows.astype(jnp.float32) / 4)
        updates, moments = adam.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, loss

    first = jax.random.normal(jax.random.key(0), (learnable.WIDTH, learnable.DIRECTIONS)) / 6
    params = {"encoder": first, "decoder": first.T, "offset": jnp.zeros(learnable.DIRECTIONS)}
    start = (params, adam.init(params))

    def train(batches, params, moments, steps):
        losses = []
        for rows in itertools.islice(batches, steps):
            params, moments, loss = step(params, moments, rows)
            losses.append(float(loss))
        return params, moments, losses

    with actstore.open(url).batches(**SETTINGS) as batches:
        *_, unbroken = train(batches, *start, 120)
    assert np.mean(unbroken[-5:]) < 0.3 * np.mean(unbroken[:5])

    pipeline = grain.experimental.device_put(adapter.BatchDataset(url, **SETTINGS), jax.devices()[0])
    iterator = iter(pipeline)
    *learnt, losses = train(iterator, *start, 50)
    state = json.dumps(iterator.get_state())
    iterator.close()
    again = iter(pipeline)
    again.set_state(json.loads(state))
    *_, rest = train(again, *learnt, 70)
    again.close()
    assert losses + rest == unbroken
