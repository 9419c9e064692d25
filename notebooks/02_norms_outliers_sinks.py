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
# # 2. Norms, outliers and attention sinks, by layer
#
# Look at norms before you train on activations. A few rows of a hundred times the usual norm decide the loss and the
# scale. A store keeps the Euclidean norm of every row, 4 bytes each, so no activation is read to find them.

# %%
import matplotlib.pyplot as plt
import numpy as np

import actstore

store = actstore.open("tiny.acts.zarr")
dataset = store.dataset()
norms = dataset.resid_post_norm.load()
norms.attrs["long_name"] = "norm of a row"

# %% [markdown]
# ## By layer

# %%
for layer in dataset.layer.values:
    found = store.stats(layer=int(layer))
    print(f"layer {layer}: median {found.median:.4f}, mean {found.mean:.4f}, largest {found.largest:.4f}")

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for layer in norms.layer.values:
    norms.sel(layer=layer).plot.hist(ax=axes, bins=80, alpha=0.6, label=f"layer {layer}")
axes.set(ylabel="rows", title="")
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# ## By position
#
# The model saw contexts of 256 tokens. A longer page was cut, and each piece began anew. So what counts is the position
# in the context, not the one in the document.

# %%
context = store.plan.provenance["packing"]["context"]
in_context = (norms.position % context).rename("position in the context")
by_position = norms.groupby(in_context).median()

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
by_position.plot.line(x="position in the context", ax=axes)
axes.set(xlabel="position in the context", ylabel="median norm of a row", ylim=(0, None))
axes.grid(alpha=0.3)

# %% [markdown]
# ## Attention sinks
#
# Many models give the first token of a context a norm of many times the median: about 100 times in large Qwen models.
# Other tokens attend to it when they have nothing better to do.

# %%
medians = norms.median("sample")
first = norms.where(in_context == 0, drop=True)
for layer in norms.layer.values:
    times = float((first / medians).sel(layer=layer).median())
    above = int((norms > 10 * medians).sel(layer=layer).sum())
    print(f"layer {layer}: first tokens have {times:.3f} times the median norm; {above} rows have more than 10 times")

# %% [markdown]
# `tiny-qwen2` has no sinks: its first tokens are a little longer than others, and no more. To know that we would see
# some, plant them: multiply the norms of first tokens by 50, and look again.

# %%
planted = norms.where(in_context != 0, 50 * norms)
print(
    (planted > 10 * planted.median("sample")).sum("sample").values, "of", first.sizes["sample"], "planted sinks found"
)

# %% [markdown]
# ## Outliers
#
# Which rows have the largest norms, and what are they?

# %%
largest = dataset.acts.top(norms.sel(layer=3), 12)
for score, position, token in zip(
    largest.top_score.values, largest.position.values, largest.acts.text(window=5), strict=True
):
    print(f"{score:7.3f}  position {position:3d}  {token.before!r} [{token.token}] {token.after!r}")

# %% [markdown]
# They are few tokens, not few places: this model gives some tokens a large norm wherever they stand. A filter can leave
# out what is too long, here from twice the median on; for sinks ten times is usual.

# %%
short = actstore.Filter(max_norm=2)
kept = store.stats(layer=3, where=short)
print(f"{store.samples - kept.samples} rows left out; the largest norm is {kept.largest:.4f} then")

# %% [markdown]
# ## Dimensions that stick out
#
# Not only rows but also single dimensions of the hidden state can be much larger than the others.

# %%
sizes = np.sqrt((dataset.resid_post**2).mean("sample")).rename("root mean square").compute()
ranked = -np.sort(-sizes.values, axis=1)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for layer, values in zip(sizes.layer.values, ranked, strict=True):
    axes.plot(np.arange(1, len(values) + 1), values, label=f"layer {layer}")
    times = values[0] / np.median(values)
    print(f"layer {layer}: dimension {int(sizes.sel(layer=layer).argmax('hidden'))} is {times:.2f} times the median")
axes.set(xlabel="rank of the dimension", ylabel="root mean square", ylim=(0, None))
axes.legend()
axes.grid(alpha=0.3)
