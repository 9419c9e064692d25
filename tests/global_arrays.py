"""One process of several that train on global arrays: `python global_arrays.py URL FOLDER PORT PROCESS PROCESSES`.

Each process has two CPU devices. It trains some steps on whole minibatches, saves the loader's state, restores it in a
new loader of its own part of each minibatch and goes on. What its devices held and the losses go into FOLDER, for the
test to compare.
"""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import actstore
from actstore.adapters.jax import as_global_array

SETTINGS = {"layer": 3, "batch_size": 256, "seed": 5}
HALF = 40


def loss_of(params, rows):
    best, places = jax.lax.top_k(rows @ params["encoder"], 3)
    features = jnp.zeros((len(rows), params["decoder"].shape[0])).at[jnp.arange(len(rows))[:, None], places].set(best)
    return jnp.square(features @ params["decoder"] + params["bias"] - rows).mean()


def main(url: str, folder: Path, port: int, process: int, processes: int) -> None:
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, process)
    devices = jax.devices()
    assert len(devices) == 2 * processes, devices
    mesh = Mesh(np.array(devices), ("batch",))
    sharding, everywhere = NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec())
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, moments, rows):
        loss, gradients = jax.value_and_grad(loss_of)(params, rows.astype(jnp.float32) / 4)
        updates, moments = adam.update(gradients, moments)
        return optax.apply_updates(params, updates), moments, loss

    rng = np.random.default_rng(0)
    first = rng.normal(size=(32, 64)).astype(np.float32) / 6
    params = {"encoder": first, "decoder": first.T.copy(), "bias": np.zeros(32, np.float32)}
    params = jax.device_put(params, everywhere)
    moments = jax.jit(adam.init, out_shardings=everywhere)(params)

    losses, held = [], {}
    store, state = actstore.open(url), None
    for part in range(2):
        own = {"part": (process, processes)} if part else {}
        with store.batches(**SETTINGS, **own) as batches:
            if state is not None:
                batches.restore(state)
            for number in range(part * HALF, (part + 1) * HALF):
                rows = next(batches)
                assert len(rows) == SETTINGS["batch_size"] // (processes if part else 1), len(rows)
                array = as_global_array(rows, sharding, batch_size=SETTINGS["batch_size"])
                assert array.shape == (SETTINGS["batch_size"], 32), array.shape
                assert array.is_fully_addressable == (processes == 1)
                for shard in array.addressable_shards:
                    held[f"{number}/{shard.index[0].start or 0}"] = np.asarray(shard.data).view(np.uint16)
                params, moments, loss = step(params, moments, array)
                losses.append(float(loss))
            state = json.loads(json.dumps(batches.state()))
    np.savez(folder / f"held-{process}.npz", **held)
    (folder / f"losses-{process}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
