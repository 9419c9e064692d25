"""A store with something to learn: rows that are sums of a few directions, so that an autoencoder's loss can fall.

Used by the tests of the adapters, and by the scripts that run trainers in environments of their own.
"""

from pathlib import Path

import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy
import numpy as np

import actstore
from actstore import Layout, Site

WIDTH, DIRECTIONS, ACTIVE = 32, 64, 3
LAYOUT = Layout(
    (Site("resid_post", WIDTH, (1, 3)), Site("mlp_out", WIDTH, (1,)), Site("final_norm", WIDTH, None, "float32")),
    samples=4096,
    block_samples=1024,
    chunk_samples=32,
)


def sparse_rows(samples: int, *, seed: int) -> np.ndarray:
    """Rows [samples, WIDTH] of norm about 20: three of 64 directions each, and a mean."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(DIRECTIONS, WIDTH)) / np.sqrt(WIDTH)
    chosen = rng.random((samples, DIRECTIONS)).argsort(axis=1)[:, :ACTIVE]
    sizes = rng.uniform(5, 15, size=(samples, ACTIVE))
    return np.einsum("sk,skw->sw", sizes, directions[chosen]) + rng.normal(size=WIDTH)


def make_arrays(layout: Layout = LAYOUT) -> dict[str, np.ndarray]:
    """All rows in memory, by site, as they are stored."""
    arrays = {}
    for number, site in enumerate(layout.sites):
        layers = [sparse_rows(layout.samples, seed=100 * number + layer) for layer in range(site.rows_per_sample)]
        stored = np.stack(layers).astype(site.dtype)
        arrays[site.name] = stored[0] if site.layers is None else stored
    return arrays


def write(url: str | Path, layout: Layout = LAYOUT) -> Path:
    """Writes the store. Token ids are the numbers of the samples, plus 7."""
    arrays = make_arrays(layout)
    with actstore.create(url, layout, {"model": {"name": "made-up"}}) as writer:
        for block in range(layout.blocks):
            span = slice(*layout.block_range(block))
            numbers = np.arange(layout.samples, dtype=np.int32)[span]
            columns = {"document": 0 * numbers, "position": numbers, "token_id": numbers + 7}
            writer.write(block, {name: rows[..., span, :] for name, rows in arrays.items()}, samples=columns)
    return Path(url)
