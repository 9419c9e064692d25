"""Statistics of stored norms: what trainers normalise by, and what an outlier is measured by. Reads no activation."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32, Int64

from actstore.gather import Source, gather

STRETCH_SAMPLES = 1 << 20  # 4 MiB of norms at a time


@dataclasses.dataclass(frozen=True)
class NormStatistics:
    """Euclidean norms of the rows of one site and layer; NaN where there is no row."""

    samples: int
    mean: float
    root_mean_square: float
    median: float
    largest: float


def stored_norms(source: Source, layer: int) -> Iterator[tuple[int, Float32[np.ndarray, " sample"]]]:
    """First sample and norms of one stretch after the other; `source` is the array of a site's norms.

    Raises:
        CorruptStoreError: norms are missing, damaged, swapped or stale.
    """
    samples, block = source.layout.samples, source.layout.block_samples
    step = max(STRETCH_SAMPLES // block, 1) * block  # each block is read once
    for start in range(0, samples, step):
        norms = np.empty((1, min(step, samples - start)), np.float32)
        gather(source, [layer], range(start, start + norms.shape[1]), norms)
        yield start, norms[0]


def summarize(stretches: Callable[[], Iterator[Float32[np.ndarray, " sample"]]]) -> NormStatistics:
    """Statistics of norms that are read twice, stretch by stretch: 1 MiB of memory, however many there are.

    Sums are in float64. The median is exact: NumPy's of all norms together. Norms are positive, so that their bits as
    whole numbers have their order: first the upper 16 bits are counted, then the lower ones where the median lies.
    """
    sums, largest = np.zeros(2), 0.0
    upper: Int64[np.ndarray, " bin"] = np.zeros(1 << 16, np.int64)
    for norms in stretches():
        wide = norms.astype(np.float64)
        sums += wide.sum(), np.square(wide).sum()
        largest = max(largest, float(norms.max(initial=0)))
        upper += np.bincount(norms.view(np.uint32) >> 16, minlength=1 << 16)
    count = int(upper.sum())
    if not count:
        return NormStatistics(0, *[float("nan")] * 4)
    ends = np.cumsum(upper)
    places = np.array([(count - 1) // 2, count // 2])
    bins = np.searchsorted(ends, places, side="right")
    lower: Int64[np.ndarray, "middle bin"] = np.zeros((2, 1 << 16), np.int64)
    for norms in stretches():
        bits = norms.view(np.uint32)
        for middle, number in enumerate(bins):
            lower[middle] += np.bincount(bits[bits >> 16 == number] & 0xFFFF, minlength=1 << 16)
    inside = places - (ends[bins] - upper[bins])
    found = [np.searchsorted(np.cumsum(lower[middle]), inside[middle], side="right") for middle in (0, 1)]
    middles = ((bins << 16) + found).astype(np.uint32).view(np.float32)
    mean, square = sums / count
    return NormStatistics(count, float(mean), float(np.sqrt(square)), float(middles.mean(dtype=np.float32)), largest)
