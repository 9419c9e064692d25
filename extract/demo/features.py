"""What the features of a dictionary stand for: the samples that excite each one most, shown in their text.

Two passes over the same batches: `count_firing` to choose features with `pick_features`, then `top_samples` for the
chosen ones. `write_features` makes the page to read.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from actstore.errors import InputError

Batch = tuple[Float[np.ndarray, "batch hidden"], Int[np.ndarray, "batch"]]
Context = Callable[[int], tuple[str, str, str]]
TopSamples = dict[int, list[tuple[int, float]]]

_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


@runtime_checkable
class Dictionary(Protocol):
    """What is asked of a dictionary here; `extract.demo.sae.TrainedSAE` has it."""

    @property
    def features(self) -> int:
        """Number of features."""
        ...

    def encode(
        self, rows: Float[np.ndarray, "batch hidden"], /
    ) -> tuple[Float[np.ndarray, "batch k"], Int[np.ndarray, "batch k"]]:
        """Gives the activations of each row that may be above zero, and the features they belong to."""
        ...


@dataclasses.dataclass(frozen=True)
class Firing:
    """How often each feature fires.

    Attributes:
        samples: Number of samples looked at.
        counts: On how many of them each feature fires.
    """

    samples: int
    counts: Int[np.ndarray, "feature"]


def count_firing(sae: Dictionary, batches: Iterable[Batch]) -> Firing:
    """Counts on how many samples each feature fires, in one pass; holds one batch and one number per feature.

    Args:
        sae: The dictionary.
        batches: Pairs of rows and their sample indices, each sample once.

    Raises:
        InputError: There are no samples.
    """
    samples = 0
    counts = np.zeros(sae.features, np.int64)
    for rows, _ in batches:
        values, indices = sae.encode(rows)
        samples += len(rows)
        counts += np.bincount(indices[values > 0], minlength=sae.features)
    if samples == 0:
        raise InputError("The batches hold no samples; expected at least one. Pass a fresh iterator.")
    return Firing(samples, counts)


def pick_features(
    firing: Firing, *, count: int = 8, least_share: float = 0.0005, most_share: float = 0.02
) -> list[int]:
    """Chooses live, selective features to look at, from rare to frequent, and not the prettiest.

    Ranking by strength was tried and is no good: wherever attention sinks were not dropped, their features win.

    Args:
        firing: What `count_firing` found.
        count: How many to choose.
        least_share: Features that fire on a smaller share of the samples are as good as dead.
        most_share: Features that fire on a larger share say little about a sample.

    Returns:
        Up to `count` features, evenly spread over the ranking by firing rate of all that qualify; fewer when fewer
        do. The same counts give the same features.
    """
    shares = firing.counts / firing.samples
    (candidates,) = np.nonzero((shares >= least_share) & (shares <= most_share) & (firing.counts > 0))
    ranked = candidates[np.argsort(shares[candidates], kind="stable")]
    chosen = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).astype(int)
    return [int(feature) for feature in ranked[chosen]]


def top_samples(sae: Dictionary, batches: Iterable[Batch], *, features: Sequence[int], k: int) -> TopSamples:
    """Finds the `k` samples on which each feature is most active, in one pass.

    Holds one batch and `k` samples per feature, however many samples pass by.

    Args:
        sae: The dictionary.
        batches: Pairs of rows and their sample indices, each sample once.
        features: Which features to follow.
        k: How many samples to keep for each.

    Returns:
        For each feature its samples as (sample index, activation), strongest first, equal ones by sample index. Fewer
        than `k` where the feature fired less often; none where it never did.

    Raises:
        InputError: `k` is below 1, or a feature does not exist.
    """
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1. Ask for one sample or more.")
    unknown = sorted(feature for feature in features if not 0 <= feature < sae.features)
    if unknown:
        raise InputError(f"There are no features {unknown}; expected 0 to {sae.features - 1}. Take some of these.")
    best: TopSamples = {feature: [] for feature in features}
    for rows, samples in batches:
        values, indices = sae.encode(rows)
        for feature, kept in best.items():
            row, place = np.nonzero((indices == feature) & (values > 0))
            new = zip(samples[row].tolist(), values[row, place].tolist(), strict=True)
            best[feature] = sorted([*kept, *new], key=_strongest_first)[:k]
    return best


def write_features(
    path: Path, *, firing: Firing, top: Mapping[int, Sequence[tuple[int, float]]], context: Context
) -> None:
    """Writes a text file that shows each feature: how often it fires, and its top tokens in their text.

    Args:
        path: The file; overwritten.
        firing: What `count_firing` found.
        top: What `top_samples` found.
        context: Gives for a sample index the text before its token, the token, and the text after it. They are shown
            on one line as `before⟦token⟧after`, line breaks and tabs as ⏎ and ⇥.
    """
    lines = [line for feature, samples in top.items() for line in _feature_lines(feature, samples, firing, context)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _strongest_first(found: tuple[int, float]) -> tuple[float, int]:
    sample, activation = found
    return -activation, sample


def _feature_lines(
    feature: int, samples: Sequence[tuple[int, float]], firing: Firing, context: Context
) -> Iterator[str]:
    count = int(firing.counts[feature])
    yield f"feature {feature}: fires on {count:,} of {firing.samples:,} samples ({count / firing.samples:.3%})"
    for sample, activation in samples:
        before, token, after = (_visible(text) for text in context(sample))
        yield f"  {activation:8.2f}  {before}⟦{token}⟧{after}"
    yield ""


def _visible(text: str) -> str:
    return "".join(_VISIBLE.get(character, character if character.isprintable() else "·") for character in text)
