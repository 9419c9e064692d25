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
# # 4. Top activating examples
#
# What does a direction stand for? Look at the tokens that excite it most, in their text. `dataset.acts.top` takes any
# score of rows, and holds 64 MiB of rows at a time, however large the store is.

# %%
import matplotlib.pyplot as plt
import numpy as np

import actstore
from extract.demo.sae import train_sae

store = actstore.open("tiny.acts.zarr")
dataset = store.dataset()


def show(best, window=8):
    for row, score, token in zip(best.row.values, best.top_score.values, best.acts.text(window=window), strict=True):
        print(f"{row:5d} {score:7.3f}  {token.before!r} [{token.token}] {token.after!r}")


# %% [markdown]
# ## A direction
#
# The plainest one is a difference of means: rows of one token less all rows. Its best examples should be that token.

# %%
quotes = dataset.acts.sel(token=' "').resid_post.sel(layer=3).values
rows = dataset.resid_post.sel(layer=3)
direction = quotes.mean(axis=0) - rows.mean("sample").values
direction /= np.linalg.norm(direction)

show(dataset.acts.top(lambda rows: rows @ direction, 10, hook="resid_post[3]"))

# %% [markdown]
# More telling are the best examples that are *not* this token: what else does the model put there?

# %%
quote = int(dataset.acts.sel(token=' "').token_id[0])
others = dataset.acts.sel(where=actstore.Filter(drop={"token_id": quote}))
show(others.acts.top(lambda rows: rows @ direction, 10, hook="resid_post[3]"))

# %% [markdown]
# ## Features of an SAE
#
# A small SAE learns many directions at once. It is trained as in the notebook before.

# %%
with store.batches(layer=3, batch_size=256, seed=0) as batches:
    trained = train_sae(batches, width=store.sites[0].width, features=512, k=16, steps=300, seed=0)
values, features = trained.encode(rows.values)
fires = np.bincount(features[values > 0], minlength=trained.features)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(np.arange(1, len(fires) + 1), -np.sort(-fires))
axes.set(xlabel="rank of the feature", ylabel="rows on which it fires", yscale="log")
axes.grid(alpha=0.3)

# %% [markdown]
# Features that fire on most rows say little, and those that fire on three rows too. Of the others, take those that are
# strongest on one row.


# %%
def activation(feature):
    """A score of rows: how strongly one feature fires on each."""

    def score(rows):
        values, features = trained.encode(rows)
        return np.where(features == feature, values, 0).max(axis=1)

    return score


peak = np.zeros(trained.features, np.float32)
np.maximum.at(peak, features, values)
between = np.flatnonzero((fires >= 15) & (fires <= 80))
chosen = between[np.argsort(-peak[between], kind="stable")][:5]

for feature in chosen:
    print(f"\nfeature {feature}, fires on {fires[feature]} of {store.samples} rows")
    show(dataset.acts.top(activation(feature), 6, hook="resid_post[3]"))

# %% [markdown]
# ## Not only the top
#
# The strongest examples flatter a feature. Rows on which it fires weakly show whether it means one thing: here the
# first of the features above, on rows from its strongest to its weakest.

# %%
scores = activation(chosen[0])(rows.values)
ranked = np.flatnonzero(scores > 0)[np.argsort(-scores[scores > 0], kind="stable")]
spread = ranked[np.linspace(0, len(ranked) - 1, 8).astype(int)]
show(dataset.isel(sample=spread).assign_coords(top_score=("sample", scores[spread])))

# %% [markdown]
# More: `docs/how-to/find-rows.md`. A store of 4,000 tokens of one kind of text is small: take what you see here as the
# way to look, not as a finding.
