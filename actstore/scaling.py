"""Normalisation of rows by the names that SAELens and dictionary_learning give it."""

import math
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float32

from actstore.errors import InputError
from actstore.norms import NormStatistics

Normalization: TypeAlias = Literal["expected_average_only_in", "norm_factor", "constant_norm_rescale", "layer_norm"]
LAYER_NORM_EPSILON = 1e-5  # of SAELens


def check_normalization(name: str) -> None:
    """Refuses a name that is none of them."""
    if name not in get_args(Normalization):
        raise InputError(f"normalize is {name!r}; expected one of {', '.join(get_args(Normalization))}, or None")


def by_statistics(name: Normalization) -> bool:
    """Whether rows are multiplied by one number for all, which comes from the norms of all."""
    return name in ("expected_average_only_in", "norm_factor")


def scale_of(name: Normalization, statistics: NormStatistics, width: int, *, what: str) -> float:
    """The number that all rows of a site and layer are multiplied by.

    Raises:
        InputError: all rows are zero, or a norm is over 3e38.
    """
    length = statistics.mean if name == "expected_average_only_in" else statistics.root_mean_square
    if not (math.isfinite(length) and length > 0):
        raise InputError(
            f"the norms of {what} have the mean {length}; expected a positive finite one; such rows cannot be "
            "normalised by one number"
        )
    return (math.sqrt(width) if name == "expected_average_only_in" else 1) / length


def normalize_rows(name: Normalization, rows: Float32[np.ndarray, "row width"], scale: float) -> None:
    """Normalises rows in place; `scale` is used where there is one number for all. A row of zeros stays so."""
    if by_statistics(name):
        rows *= np.float32(scale)
        return
    width = rows.shape[1]
    if name == "layer_norm":
        rows -= rows.mean(axis=1, keepdims=True)
        lengths = rows.std(axis=1, keepdims=True, ddof=1 if width > 1 else 0) + np.float32(LAYER_NORM_EPSILON)
    else:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) / np.float32(math.sqrt(width))
    np.divide(rows, lengths, out=rows, where=lengths > 0)
