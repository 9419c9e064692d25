# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Train a sparse autoencoder
#
# `store.batches` gives shuffled minibatches. The same seed gives the same minibatches on every machine. First the SAE
# of the demo is trained on them. Then a loop of our own is stopped and continued.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import actstore
from extract.demo.sae import train_sae

store = actstore.open("tiny.acts.zarr")
width = store.sites[0].width

# %% [markdown]
# ## Documents to learn from, documents to judge by
#
# A split takes whole documents, by the hash of their ids. `max_norm` would leave attention sinks out. This model has
# none, so nothing is lost by asking.

# %%
train = actstore.Filter(split=(0.3, 1), max_norm=10)
test = actstore.Filter(split=(0, 0.3), max_norm=10)
for name, where in [("train", train), ("test", test)]:
    part = store.dataset().acts.sel(where=where)
    print(f"{name}: {part.sizes['sample']} samples of documents {np.unique(part.document).tolist()}")

# %% [markdown]
# ## Train

# %%
with store.batches(layer=3, batch_size=256, seed=0, where=train) as batches:
    trained = train_sae(batches, width=width, features=512, k=16, steps=300, seed=0)
print(trained.metrics)

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(range(1, 301), [metrics.fvu for metrics in trained.history])
axes.set(xlabel="step (batches of 256 rows)", ylabel="fraction of variance unexplained", ylim=(0, 1))
axes.grid(alpha=0.3)

# %% [markdown]
# ## Judge
#
# The store is small, and the SAE has seen each row some twenty times. On documents that it has not seen it is worse.
# That is why the split is there.


# %%
def unexplained(where):
    rows = store.dataset().acts.sel(where=where).resid_post.sel(layer=3).values / trained.scale
    missed = rows - np.asarray(trained.sae(jnp.asarray(rows)))
    return float(np.square(missed).sum() / np.square(rows - rows.mean(axis=0)).sum())


print(f"unexplained: {unexplained(train):.4f} of train, {unexplained(test):.4f} of test")

# %% [markdown]
# ## Stop and go on
#
# To continue a run exactly, save three things together: the weights, the state of the optimizer, and `batches.state()`,
# which is a small dictionary. A loop of our own shows it.

# %%
optimizer = optax.adam(1e-3)


def beginning():
    keys = jax.random.split(jax.random.key(0))
    params = {
        "encoder": jax.random.normal(keys[0], (width, 512)) / np.sqrt(width),
        "decoder": jax.random.normal(keys[1], (512, width)) / np.sqrt(512),
    }
    return params, optimizer.init(params)


def loss_of(params, rows):
    features = jax.nn.relu(rows @ params["encoder"])
    return jnp.square(features @ params["decoder"] - rows).sum(1).mean() + 0.1 * features.sum(1).mean()


@jax.jit
def step(learnt, rows):
    params, state = learnt
    loss, gradients = jax.value_and_grad(loss_of)(params, rows.astype(jnp.float32))
    updates, state = optimizer.update(gradients, state)
    return (optax.apply_updates(params, updates), state), loss


def learn(learnt, batches, steps):
    losses = []
    for _ in range(steps):
        learnt, loss = step(learnt, next(batches))
        losses.append(float(loss))
    return learnt, losses


def loader():
    return store.batches(layer=3, batch_size=256, seed=0, where=train)


# %% [markdown]
# One run of 100 steps, without a stop:

# %%
with loader() as batches:
    _, whole = learn(beginning(), batches, 100)

# %% [markdown]
# Another run, stopped and saved after 40 steps:

# %%
folder = Path("output")
folder.mkdir(exist_ok=True)

with loader() as batches:
    learnt, before = learn(beginning(), batches, 40)
    (folder / "batches.json").write_text(json.dumps(batches.state()))
np.savez(folder / "learnt.npz", *jax.tree.leaves(learnt))

# %% [markdown]
# And continued from the files, as a new process would:

# %%
with np.load(folder / "learnt.npz") as saved:
    learnt = jax.tree.unflatten(jax.tree.structure(beginning()), [jnp.asarray(saved[name]) for name in saved.files])
with loader() as batches:
    batches.restore(json.loads((folder / "batches.json").read_text()))
    _, after = learn(learnt, batches, 60)

print(f"the same losses as without a stop: {before + after == whole}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(range(1, 101), whole, color="lightgray", linewidth=5, label="without a stop")
axes.plot(range(1, 41), before, label="before the stop")
axes.plot(range(41, 101), after, label="after the stop")
axes.set(xlabel="step (batches of 256 rows)", ylabel="loss: squared error + 0.1 x sum of features")
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# More: `docs/how-to/train-an-sae.md`, and `docs/explanation/shuffling.md` on what a minibatch mixes.
