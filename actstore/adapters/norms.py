"""The numbers trainers normalise by, from the norms that are stored beside each row: no activation is read."""

import numpy as np
from jaxtyping import Float64

from actstore.api import Store
from actstore.errors import CorruptStoreError
from actstore.layout import norm_name

STRETCH_SAMPLES = 1 << 22  # 16 MiB of norms at a time


def mean_norm(store: Store, *, site: str = "resid_post", layer: int | None = None) -> float:
    """The mean Euclidean norm of all rows of a site and layer. Reads 4 bytes per sample.

    Raises:
        UnknownNameError: no such site or layer.
        CorruptStoreError: a norm is missing, or all rows are zero.
    """
    return float(_means(store, site, layer)[0])


def root_mean_square_norm(store: Store, *, site: str = "resid_post", layer: int | None = None) -> float:
    """The square root of the mean squared norm. Larger than the mean norm where a few rows are very long.

    Raises:
        UnknownNameError: no such site or layer.
        CorruptStoreError: a norm is missing, or all rows are zero.
    """
    return float(np.sqrt(_means(store, site, layer)[1]))


def _means(store: Store, site: str, layer: int | None) -> Float64[np.ndarray, " 2"]:
    """Mean of the norms and of their squares, summed in float64."""
    where = store.plan.layout.site(site)
    index = where.layer_index(layer)
    norms = store.dataset(raw=True)[norm_name(site)]
    if where.layers is not None:
        norms = norms[index]
    sums = np.zeros(2)
    for start in range(0, store.samples, STRETCH_SAMPLES):
        part = norms[start : start + STRETCH_SAMPLES].values.astype(np.float64)
        sums += part.sum(), np.square(part).sum()
    means = sums / store.samples
    if not (np.isfinite(means).all() and means[0] > 0):
        raise CorruptStoreError(
            f"the norms of {site!r} in {store.url} have the mean {means[0]}; expected a positive number; "
            "run `actstore verify`"
        )
    return means
