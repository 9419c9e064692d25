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
# # 5. Write a store of your own
#
# A store needs no `extract`, no JAX and no model that this project knows. Any arrays will do. Here a "model" of a few
# lines of NumPy: layer 0 is a random vector for each word, layer 1 the mean of the words so far.

# %%
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import actstore

TEXTS = {
    "tea": ("en", "The tea is hot and the cup is full."),
    "rain": ("en", "The rain falls on the roof and on the road."),
    "katze": ("de", "Die Katze schläft und die Maus tanzt."),
    "brot": ("de", "Das Brot ist frisch und die Butter ist kühl."),
}
WIDTH = 32

# %% [markdown]
# ## Documents and their tokens
#
# Words and full stops are our tokens. A span says where a token stands in the UTF-8 bytes of its text, so that rows can
# be shown as text later. Characters are not bytes: `ä` has two.


# %%
def spans_of(text):
    """Byte spans [token, start and end] of words and full stops."""
    places = [match.span() for match in re.finditer(r"\w+|\.", text)]
    return np.array([[len(text[:edge].encode()) for edge in place] for place in places], np.uint32)


texts = [text for _, text in TEXTS.values()]
spans = [spans_of(text) for text in texts]
words = [text.encode()[start:end].decode() for text, found in zip(texts, spans, strict=True) for start, end in found]
vocabulary = {word: number for number, word in enumerate(sorted(set(words)))}

counts = np.array([len(found) for found in spans])
token_id = np.array([vocabulary[word] for word in words], np.int32)
document = np.repeat(np.arange(len(texts)), counts)
position = np.concatenate([np.arange(count) for count in counts])
print(f"{len(words)} tokens of {len(texts)} documents, {len(vocabulary)} different ones")

# %%
documents = actstore.DocumentTable(
    ids=list(TEXTS),
    texts=texts,
    token_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
    token_id=token_id,
    token_start=np.concatenate(spans)[:, 0].copy(),
    token_end=np.concatenate(spans)[:, 1].copy(),
    columns={"language": [language for language, _ in TEXTS.values()]},
)

# %% [markdown]
# ## Activations

# %%
embedding = np.random.default_rng(0).standard_normal((len(vocabulary), WIDTH), dtype=np.float32)
vectors = embedding[token_id]
means = [
    np.cumsum(vectors[document == number], axis=0) / np.arange(1, count + 1)[:, None]
    for number, count in enumerate(counts)
]
activations = np.stack([vectors, np.concatenate(means)]).astype(np.float32)
activations.shape

# %% [markdown]
# ## Write
#
# `Layout.fit` decides the shapes. Blocks are written in any order; `writer.missing()` names those that are not there
# yet, so a script that was killed is run again as it is. Leaving the `with` seals the store. A block this small is for
# show: leave `block_samples` out, and shards of 128 MiB are the aim.

# %%
path = Path("output/own.acts.zarr")
shutil.rmtree(path, ignore_errors=True)  # this notebook may have run before; a sealed store is not written again

layout = actstore.Layout.fit(
    [actstore.Site("resid_post", width=WIDTH, layers=(0, 1))],
    samples=len(words),
    columns=[*actstore.layout.DEFAULT_COLUMNS, actstore.Column("length", "int32")],
    block_samples=16,
)
columns = {
    "document": document,
    "position": position,
    "token_id": token_id,
    "length": np.array([len(word) for word in words]),
}

with actstore.create(path, layout, {"model": {"name": "mean-of-words"}, "seed": 0}, documents=documents) as writer:
    for block in writer.missing():
        start, stop = writer.block_range(block)
        part = {name: values[start:stop] for name, values in columns.items()}
        writer.write(block, {"resid_post": activations[:, start:stop]}, samples=part)
        print(f"block {block}: samples {start} to {stop}")

# %% [markdown]
# ## Open it again
#
# It is a store like any other: selections, texts, minibatches and `actstore verify` work.

# %%
store = actstore.open(path)
dataset = store.dataset()
print(store)
print("the columns of documents:", store.documents.strings("language", np.arange(len(texts))))

# %% [markdown]
# Rows are kept as bfloat16, which has 8 significant bits: a value is off by at most 1 part in 256. Ask for
# `actstore.Site(..., dtype="float32")` to keep all of them.

# %%
stored = dataset.resid_post.values
error = np.abs(stored / activations - 1).max()
print(f"largest relative error {error:.6f}; 1/256 is {1 / 256:.6f}")

# %%
german = dataset.acts.sel(language="de")
long = german.acts.sel(length=slice(6, 99))
for row, token in zip(long.row.values, long.acts.text(window=2), strict=True):
    print(f"{row:3d}  {token.before!r} [{token.token}] {token.after!r}")

# %% [markdown]
# Means of more and more random vectors get shorter, with the square root of their number. The stored norms show it.
# Where a word comes again in its sentence, as `ist` and `the` do, they are longer than that.

# %%
by_position = dataset.resid_post_norm.sel(layer=1).groupby("position").mean()
expected = np.sqrt(WIDTH / np.arange(1, by_position.size + 1))

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(by_position.position, by_position, marker="o", label="stored")
axes.plot(by_position.position, expected, linestyle="--", label="independent words")
axes.set(xlabel="position in the document", ylabel="mean norm of a row of layer 1", ylim=(0, None))
axes.legend()
axes.grid(alpha=0.3)

# %% [markdown]
# More: `docs/how-to/own-store.md`; how a store grows is in `docs/how-to/append.md`.
