"""torch tensors and datasets: the rows of the store, in one sequence for any number of workers, trained on."""

import itertools
import json
import subprocess
import sys

import learnable
import ml_dtypes
import numpy as np
import pytest

import actstore
from actstore.errors import InputError

torch = pytest.importorskip("torch", reason="NOT CHECKED: torch is not installed here")
adapter = pytest.importorskip("actstore.adapters.torch")
SETTINGS = {"layer": 3, "batch_size": 256, "seed": 5, "window_bytes": 64 << 10}
WORKERS = {"no worker": 0, "one": 1, "two": 2}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return learnable.write(tmp_path_factory.mktemp("torch") / "run.acts.zarr")


def numpy_batches(url, count, **settings):
    with actstore.open(url).batches(**SETTINGS | settings) as batches:
        return list(itertools.islice(batches, count))


def loader_of(dataset, workers, kind=None):
    """Spawned workers: this process has used a store, so it may not fork."""
    context = {"multiprocessing_context": "spawn"} if workers else {}
    return (kind or torch.utils.data.DataLoader)(dataset, batch_size=None, num_workers=workers, **context)


def assert_same(tensors, arrays):
    assert len(tensors) == len(arrays)
    for tensor, rows in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.view(torch.uint16).numpy(), rows.view(np.uint16))


# Tensors


DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_tensor_is_the_same_memory(dtype):
    rows = np.array([[1.5, -2], [0.25, 3e4]], dtype)
    tensor = adapter.as_tensor(rows)
    assert str(tensor.dtype) == f"torch.{np.dtype(dtype).name}"
    np.testing.assert_array_equal(tensor.float().numpy(), rows.astype(np.float32))
    tensor[0, 0] = 7
    assert rows[0, 0] == 7


def test_a_tensor_may_be_converted():
    rows = {"a": np.ones((2, 2), ml_dtypes.bfloat16), "b": np.zeros((2, 3), np.float16)}
    tensors = adapter.as_tensors(rows, device="cpu", dtype=torch.float32)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        "a": (torch.float32, (2, 2)), "b": (torch.float32, (2, 3)),
    }  # fmt: skip


# One sequence


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS.values(), ids=WORKERS.keys())
def test_any_number_of_workers_gives_the_same_sequence(url, workers):
    dataset = adapter.BatchDataset(url, **SETTINGS, epochs=2, drop_remainder=False)
    expected = numpy_batches(url, None, epochs=2, drop_remainder=False)
    assert len(expected) == 32
    assert_same(list(loader_of(dataset, workers)), expected)


@pytest.mark.long
@pytest.mark.slow
def test_the_state_with_a_minibatch_continues_with_any_number_of_workers(url):
    """torch's own loader reads ahead; the state that comes with a minibatch does not."""
    expected = numpy_batches(url, 12)
    pairs = iter(loader_of(adapter.BatchDataset(url, **SETTINGS, states=True), 2))
    taken = list(itertools.islice(pairs, 5))
    assert_same([rows for rows, _ in taken], expected[:5])
    state = json.loads(json.dumps(taken[-1][1]))
    for workers in (0, 1, 2):
        dataset = adapter.BatchDataset(url, **SETTINGS)
        dataset.load_state_dict(state)
        assert_same(list(itertools.islice(loader_of(dataset, workers), 7)), expected[5:])
        dataset.close()


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 on torch 2.13
@pytest.mark.parametrize("taken", [1, 4])
@pytest.mark.parametrize("workers", WORKERS.values(), ids=WORKERS.keys())
def test_a_stateful_loader_continues(url, workers, taken):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="NOT CHECKED: torchdata is not installed")
    expected = numpy_batches(url, taken + 3)
    first = loader_of(adapter.BatchDataset(url, **SETTINGS), workers, stateful.StatefulDataLoader)
    assert_same(list(itertools.islice(first, taken)), expected[:taken])
    state = first.state_dict()
    again = loader_of(adapter.BatchDataset(url, **SETTINGS), workers, stateful.StatefulDataLoader)
    again.load_state_dict(state)
    assert_same(list(itertools.islice(again, 3)), expected[taken:])


def test_a_restore_at_every_step_gives_the_same_tail(url):
    expected = numpy_batches(url, 20)
    dataset = adapter.BatchDataset(url, **SETTINGS)
    iterator, states = iter(dataset), [dataset.state_dict()]
    for _ in expected:
        next(iterator)
        states.append(dataset.state_dict())
    for step, state in enumerate(states[:-1]):
        again = adapter.BatchDataset(url, **SETTINGS)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert_same(list(itertools.islice(again, len(expected) - step)), expected[step:])
        again.close()
    dataset.close()


def test_several_layers_are_a_dictionary(url):
    dataset = adapter.BatchDataset(url, layers=[1, 3], batch_size=64)
    rows = learnable.make_arrays()["resid_post"]
    with actstore.open(url).batches(layers=[1, 3], batch_size=64) as batches:
        samples = batches.next_batch().samples
    assert_same([next(iter(dataset))["resid_post"]], [rows[:, samples].swapaxes(0, 1)])
    dataset.close()


def test_iterating_again_begins_anew(url):
    dataset = adapter.BatchDataset(url, **SETTINGS)
    expected = numpy_batches(url, 2)
    for _ in range(2):
        assert_same(list(itertools.islice(dataset, 2)), expected)
    dataset.load_state_dict(dataset.state_dict())
    dataset.load_state_dict({})
    assert_same(list(itertools.islice(dataset, 2)), expected)
    dataset.close()


def in_worker(url, worker, workers):
    batches = actstore.open(url).batches(**SETTINGS)
    return adapter._Share(batches, worker, workers, states=False)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_share_the_minibatches(url, workers):
    """Without processes: every worker's part, restored at every step, dealt round robin."""
    expected = numpy_batches(url, 15)
    for worker in range(workers):
        mine = expected[worker::workers]
        share = in_worker(url, worker, workers)
        states = [share.state_dict()]
        for rows in mine:
            assert_same([next(share)], [rows])
            states.append(share.state_dict())
        for step, state in enumerate(states[:-1]):
            again = in_worker(url, worker, workers)
            again.load_state_dict(state)
            assert_same([next(again)], [mine[step]])
            again.close()
        share.close()


# Refusals


def test_what_is_not_a_state_is_refused(url):
    dataset = adapter.BatchDataset(url, **SETTINGS)
    for wrong in ({"epoch": 1}, {"loader": 3}, {"loader": {}, "more": 1}):
        dataset.load_state_dict(wrong)
        with pytest.raises(InputError, match=r"not a state of a BatchDataset: .*; expected what state_dict\(\) gave"):
            iter(dataset)
        dataset.close()


def test_the_state_of_a_worker_fits_as_many_workers_only(url):
    share = in_worker(url, 1, 2)
    state = share.state_dict()
    share.close()
    other = in_worker(url, 1, 3)
    with pytest.raises(InputError) as caught:
        other.load_state_dict(state)
    assert str(caught.value) == (
        "the state is of one of 2 workers, there are 3; use as many, or `states=True`, whose states fit any number"
    )
    other.close()


@pytest.mark.slow
def test_a_wrong_setting_is_named_through_a_worker(url):
    dataset = adapter.BatchDataset(url, layer=9, batch_size=8)
    with pytest.raises(Exception, match="layer 9 of site 'resid_post' is not in this store") as caught:
        next(iter(loader_of(dataset, 1)))
    assert type(caught.value).__name__ == "UnknownNameError"


FORK = """
import sys, itertools, torch, actstore
from actstore.adapters.torch import BatchDataset
used, url = sys.argv[1] == "used", sys.argv[2]
if used:
    actstore.open(url)
dataset = BatchDataset(url, layer=3, batch_size=256)
loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
print(len(list(itertools.islice(loader, 3))), "minibatches")
"""


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("used", ["fresh", "used"])
def test_forked_workers_read_where_no_store_was_used(url, used):
    """What the documentation says of forks: sound in a fresh process, else an error and no hang."""
    done = subprocess.run([sys.executable, "-c", FORK, used, url], capture_output=True, text=True, timeout=120)
    if used == "fresh":
        assert done.stdout == "3 minibatches\n", done.stderr
    else:
        assert done.returncode != 0
        assert "was forked from one that had used a store" in done.stderr
        assert "multiprocessing_context='spawn'" in done.stderr


# Training


class TopK(torch.nn.Module):
    def __init__(self, width, features, k):
        super().__init__()
        self.encoder = torch.nn.Linear(width, features)
        self.decoder = torch.nn.Linear(features, width)
        self.k = k

    def forward(self, rows):
        best = self.encoder(rows).topk(self.k, dim=1)
        return self.decoder(torch.zeros(len(rows), self.encoder.out_features).scatter(1, best.indices, best.values))


def train(batches, model, optimizer, steps):
    losses = []
    for rows in itertools.islice(batches, steps):
        scaled = rows.float() / 4
        loss = (model(scaled) - scaled).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 0])
def test_training_learns_and_continues_exactly(url, workers, tmp_path):
    """150 real steps with a stop in the middle: the loss falls, and both halves are those of an unbroken run."""

    def start():
        torch.manual_seed(0)
        model = TopK(learnable.WIDTH, learnable.DIRECTIONS, learnable.ACTIVE)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2)

    model, optimizer = start()
    with actstore.open(url).batches(**SETTINGS) as batches:
        unbroken = train(map(adapter.as_tensor, batches), model, optimizer, 150)
    assert np.mean(unbroken[-10:]) < 0.5 * np.mean(unbroken[:10])

    model, optimizer = start()
    dataset, states = adapter.BatchDataset(url, **SETTINGS, states=True), []

    def rows_of(pairs):
        for rows, state in pairs:
            states.append(state)
            yield rows

    losses = train(rows_of(loader_of(dataset, workers)), model, optimizer, 60)
    torch.save([model.state_dict(), optimizer.state_dict(), states[-1]], tmp_path / "checkpoint.pt")

    model, optimizer = start()
    weights, moments, state = torch.load(tmp_path / "checkpoint.pt")
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    again = adapter.BatchDataset(url, **SETTINGS)
    again.load_state_dict(state)
    losses += train(loader_of(again, workers), model, optimizer, 90)
    assert losses == unbroken
    dataset.close(), again.close()
