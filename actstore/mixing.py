"""How well samples are mixed: figures of an order, and beside each what a perfect shuffle has. No input, no output.

A *group* is what a batch should mix: a document, or a chunk where nothing is known of documents. A perfect shuffle
draws a batch from all samples without replacement; expected values under it are exact.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int64, Integer

LAGS = 32  # a batch is several times as long; a reader that alternates between places does so in shorter turns
_PENDING = 1 << 20  # labels that are counted together: 8 MiB


def group_sizes(labels: Iterable[Integer[np.ndarray, " _"]]) -> Int64[np.ndarray, " group"]:
    """Samples of each group, from the labels of all samples, piece by piece. Memory: 16 bytes per group and a piece."""
    names, sizes = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    for piece in labels:
        waiting.append(np.unique(piece.astype(np.int64), return_counts=True))
        if sum(len(some) for some, _ in waiting) > max(_PENDING, len(names)):
            names, sizes = _joined([(names, sizes), *waiting])
            waiting = []
    return _joined([(names, sizes), *waiting])[1]


def expected_groups(sizes: Int64[np.ndarray, " group"], draws: int, *, samples: int) -> float:
    """Expected number of different groups among `draws` samples, drawn from all `samples` without replacement.

    A group of n samples is missing with the probability C(samples - n, draws) / C(samples, draws); the sum of the
    complements is exact, and the logarithms are summed without cancellation. `sizes` may be those of a part of the
    store, which then stands for all of it. Costs min(n, draws) operations for each different n.
    """
    known, groups = np.unique(sizes, return_counts=True)
    present = -np.expm1([_log_missing(int(size), draws, samples) for size in known])
    return float(groups @ present * samples / sizes.sum())


def expected_pairs(sizes: Int64[np.ndarray, " group"], *, samples: int) -> float:
    """Probability that two different samples, drawn at random, are of one group. `sizes` as in `expected_groups`."""
    if samples < 2:
        return 0.0
    wide = sizes.astype(np.float64)
    return float(wide @ (wide - 1) / wide.sum() / (samples - 1))


def groups_per_batch(labels: Integer[np.ndarray, "batch row"]) -> float:
    """Mean number of different groups in a batch."""
    ordered = np.sort(labels, axis=1)
    return float((np.diff(ordered, axis=1) != 0).sum(axis=1).mean() + 1)


def neighbour_pairs(labels: Integer[np.ndarray, "batch row"]) -> float:
    """Share of the neighbours in a batch that are of one group."""
    return float((labels[:, 1:] == labels[:, :-1]).mean()) if labels.shape[1] > 1 else 0.0


def lag_correlation(order: Int64[np.ndarray, " n"], *, samples: int, lags: int = LAGS) -> tuple[float, float]:
    """Serial correlation of sample numbers, in the order in which they are handed out, and its standard error.

    Sample numbers are angles 2 pi number / samples on a circle. The correlation at lag k is the mean cosine of the
    angle between samples that are handed out k after one another; given is the mean over lags 1 to `lags`. It is 1
    where samples come in stored order, and 0 for a perfect shuffle, with the second number as its standard error:
    sqrt(1 / 2 pairs), because a cosine at random has the variance 1/2 and pairs are then uncorrelated. Windows of w
    out of many chunks, and far longer than the lags, give about 1/w.

    The circular form (Mardia and Jupp, "Directional Statistics", 2000) needs no mean and no variance of what was seen:
    a stretch of an epoch is judged like all of it. The usual coefficient takes the mean of a window for the mean of
    the store, and so does not see that the window is narrow. (0, 0) where there is no pair.
    """
    places = np.exp(order * (2j * np.pi / samples))
    found = range(1, min(lags, len(order) - 1) + 1)
    if not found:
        return 0.0, 0.0
    mean = float(np.mean([np.vdot(places[:-lag], places[lag:]).real / (len(places) - lag) for lag in found]))
    return mean, float(np.sqrt(0.5 / sum(len(places) - lag for lag in found)))


def _log_missing(size: int, draws: int, samples: int) -> float:
    """Logarithm of the probability that none of `size` samples is among `draws` of all."""
    fewer, more = sorted((size, draws))
    if fewer + more > samples:
        return -np.inf
    return float(np.log1p(-more / (samples - np.arange(fewer))).sum())


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Groups and sizes of several parts in one."""
    names, places = np.unique(np.concatenate([some for some, _ in parts]), return_inverse=True)
    sizes = np.zeros(len(names), np.int64)
    np.add.at(sizes, places, np.concatenate([counts for _, counts in parts]))
    return names, sizes
