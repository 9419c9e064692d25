"""Global arrays over a mesh: two real processes hold what one process reads, and train on it."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import global_arrays
import learnable
import numpy as np
import orbax.checkpoint as orbax
import pytest

import actstore


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return learnable.write(tmp_path_factory.mktemp("jax") / "run.acts.zarr")


def test_orbax_keeps_the_state_with_the_weights(url, tmp_path):
    """`state()` is JSON: another program's checkpoint of weights and state goes on at the very next minibatch."""
    settings = {"layer": 3, "batch_size": 256, "seed": 5, "window_bytes": 64 << 10}
    items = ("weights", "batches")
    weights = {"encoder": np.arange(6, dtype=np.float32)}
    with actstore.open(url).batches(**settings) as batches:
        next(batches)
        with orbax.CheckpointManager(tmp_path, item_names=items) as manager:
            saved = orbax.args.Composite(
                weights=orbax.args.StandardSave(weights), batches=orbax.args.JsonSave(batches.state())
            )
            manager.save(1, args=saved)
        expected = next(batches)
    with orbax.CheckpointManager(tmp_path, item_names=items) as manager:
        wanted = orbax.args.Composite(weights=orbax.args.StandardRestore(weights), batches=orbax.args.JsonRestore())
        found = manager.restore(1, args=wanted)
    np.testing.assert_array_equal(found["weights"]["encoder"], weights["encoder"])
    with actstore.open(url).batches(**settings) as batches:
        batches.restore(found["batches"])
        np.testing.assert_array_equal(next(batches).view(np.uint16), expected.view(np.uint16))


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(url, folder, processes):
    """The losses of each process, and the parts of each minibatch that its devices held."""
    folder.mkdir()
    program = Path(__file__).with_name("global_arrays.py")
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, program, url, folder, port, str(process), str(processes)],
            stderr=subprocess.PIPE, text=True,
        )
        for process in range(processes)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, errors
    losses = [json.loads((folder / f"losses-{process}.json").read_text()) for process in range(processes)]
    return losses, [dict(np.load(folder / f"held-{process}.npz")) for process in range(processes)]


@pytest.mark.slow
def test_two_processes_hold_and_learn_what_one_does(url, tmp_path):
    (alone,), _ = run(url, tmp_path / "one", 1)
    losses, held = run(url, tmp_path / "two", 2)
    assert np.mean(alone[-5:]) < 0.5 * np.mean(alone[:5])
    assert losses[0] == losses[1]
    np.testing.assert_allclose(losses[0], alone, rtol=1e-3)  # sums over four devices are not in the order of two
    assert not set(held[0]) & set(held[1])
    parts = held[0] | held[1]
    with actstore.open(url).batches(**global_arrays.SETTINGS) as batches:
        for number in range(2 * global_arrays.HALF):
            whole = np.concatenate([parts[f"{number}/{start}"] for start in (0, 64, 128, 192)])
            np.testing.assert_array_equal(whole, next(batches).view(np.uint16))
