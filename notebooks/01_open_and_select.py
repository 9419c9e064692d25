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
# # 1. Open a store and select from it
#
# `tiny.acts.zarr` lies beside this notebook. It holds the residual stream of `tiny-qwen2` after layers 1 and 3, for 17
# short pages of Python's documentation. Nothing here needs a network, a GPU or the model.

# %%
import matplotlib.pyplot as plt
import numpy as np

import actstore

store = actstore.open("tiny.acts.zarr")
store

# %% [markdown]
# ## The dataset
#
# `store.dataset()` is a lazy xarray dataset. Opening reads a few small JSON files. One sample is one token.

# %%
dataset = store.dataset()
dataset

# %% [markdown]
# Select first, compute then. Only the chunks that are needed are read. Values arrive as float32, because NumPy adds
# bfloat16 numbers in bfloat16 and gets sums wrong.

# %%
rows = dataset.resid_post.sel(layer=3).isel(sample=slice(0, 1000))
print(rows.dtype, rows.shape)
print(f"mean {rows.mean().item():.6f}, standard deviation {rows.std().item():.6f}")

# %% [markdown]
# ## Select as you think
#
# `dataset.acts` knows the names that other libraries have for a place, and takes documents, positions and tokens.

# %%
same = dataset.acts["blocks.3.hook_resid_post"].isel(sample=slice(0, 1000))
print(same.equals(rows))

# %%
ids = dataset.acts.documents.strings("id", np.arange(len(store.documents)))
print(", ".join(ids))

# %%
page = dataset.acts.sel(document="await")
print(f"{page.sizes['sample']} tokens, the first at positions {page.position.values[:5]}")

# %%
the = dataset.acts.sel(token=" the")
print(f"' the' stands {the.sizes['sample']} times in {len(np.unique(the.document))} documents")

# %% [markdown]
# Selections follow one another. The coordinate `row` says which samples of the store are left.

# %%
early = the.acts.sel(position=slice(0, 20))
for row, token in zip(early.row.values, early.acts.text(window=5), strict=True):
    print(f"{row:5d}  {token.before!r} [{token.token}] {token.after!r}")

# %% [markdown]
# ## A first comparison
#
# How alike is the same token in different places? In layer 1 a row is mostly its token. In layer 3 its context has come
# in. The cosines are of all pairs of ` the`.


# %%
def cosines(layer):
    vectors = the.resid_post.sel(layer=layer).values
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors @ vectors.T)[np.triu_indices(len(vectors), k=1)]


figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for layer in dataset.layer.values:
    pairs = cosines(layer)
    axes.hist(pairs, bins=60, alpha=0.6, label=f"layer {layer}")
    print(f"layer {layer}: mean cosine {pairs.mean():.4f}")
axes.set(xlabel="cosine of two rows of ' the'", ylabel="pairs")
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# More: `docs/how-to/open-in-xarray.md` and `docs/how-to/find-rows.md`.
