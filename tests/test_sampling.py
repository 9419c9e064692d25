"""Draws against distributions that NumPy computes by itself."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from extract.models import ModelError
from extract.models.sampling import Sampling, choose

LOGITS = np.array([2.0, -1.0, 0.5, 0.5, 3.0, -4.0, 1.0, 0.0, 2.5, -0.5, 1.5, -2.0], np.float32)
DRAWS = 20_000

CASES = {
    "plain": Sampling(temperature=1.0, seed=1),
    "hot": Sampling(temperature=2.5, seed=2),
    "cold": Sampling(temperature=0.4, seed=3),
    "top_k": Sampling(temperature=1.0, top_k=4, seed=4),
    "top_k_of_more_than_there_are": Sampling(temperature=1.0, top_k=99, seed=5),
    "top_p": Sampling(temperature=1.0, top_p=0.8, seed=6),
    "top_p_of_one_token": Sampling(temperature=1.0, top_p=0.05, seed=7),
    "all": Sampling(temperature=1.7, top_k=6, top_p=0.7, seed=8),
}
ALPHA = 1e-3  # chance that a right sampler fails one case; the seeds are fixed


def expected_shares(sampling: Sampling) -> np.ndarray:
    """The distribution, in float64, by its definition: one token after the other in falling order."""
    shares = np.exp(LOGITS.astype(np.float64) / sampling.temperature)
    order = np.argsort(-shares, kind="stable")
    kept = order[: sampling.top_k]
    shares[np.setdiff1d(order, kept)] = 0
    shares /= shares.sum()
    total, last = 0.0, 0
    while total < sampling.top_p and last < len(kept):
        total += shares[kept[last]]
        last += 1
    shares[kept[last:]] = 0
    return shares / shares.sum()


@functools.cache
def counts(sampling: Sampling) -> np.ndarray:
    draws = sampling.draws(np.arange(DRAWS, dtype=np.uint32))
    tokens = choose(jnp.broadcast_to(LOGITS, (DRAWS, LOGITS.size)), draws, 0)
    return np.bincount(np.asarray(tokens), minlength=LOGITS.size)


def chi_square(found: np.ndarray, shares: np.ndarray) -> tuple[float, int]:
    """The statistic and its degrees of freedom; infinite if a token was drawn that cannot be."""
    if found[shares == 0].any():
        return np.inf, 1
    expected = shares[shares > 0] * found.sum()
    return float(((found[shares > 0] - expected) ** 2 / expected).sum()), max(int((shares > 0).sum()) - 1, 1)


def critical(freedom: int) -> float:
    """Where a chi-square has `ALPHA` above it: a million draws of the distribution itself, rounded up."""
    draws = np.random.default_rng(0).chisquare(freedom, 1_000_000)
    return float(np.quantile(draws, 1 - ALPHA)) + 0.5


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES)
def test_frequencies_are_those_of_the_distribution(sampling: Sampling) -> None:
    statistic, freedom = chi_square(counts(sampling), expected_shares(sampling))
    assert statistic <= critical(freedom)


@pytest.mark.parametrize(
    ("drawn", "claimed"), [("plain", "hot"), ("hot", "plain"), ("top_k", "plain"), ("plain", "top_k"), ("all", "top_p")]
)
def test_meta_another_distribution_would_be_noticed(drawn: str, claimed: str) -> None:
    statistic, freedom = chi_square(counts(CASES[drawn]), expected_shares(CASES[claimed]))
    assert statistic > critical(freedom)


def test_steps_draw_independently() -> None:
    draws = Sampling(temperature=1.0).draws(np.arange(DRAWS, dtype=np.uint32))
    rows = jnp.broadcast_to(LOGITS, (DRAWS, LOGITS.size))
    first, second = (np.asarray(choose(rows, draws, step)) for step in (0, 1))
    shares = expected_shares(Sampling(temperature=1.0))
    assert np.mean(first == second) == pytest.approx((shares**2).sum(), abs=0.02)


def test_greedy_takes_the_first_of_equals() -> None:
    assert np.asarray(choose(jnp.array([[0.0, 5, 5], [1, 0, 0]]), None, 0)).tolist() == [1, 0]


REFUSED = {
    "negative temperature": ({"temperature": -0.5}, r"temperature is -0.5; expected 0, which is greedy, or more"),
    "temperature that is no number": ({"temperature": float("nan")}, r"temperature is nan; expected 0"),
    "no tokens left": ({"temperature": 1, "top_k": 0}, r"top_k is 0; expected at least 1; leave it out"),
    "no share": ({"temperature": 1, "top_p": 0}, r"top_p is 0; expected more than 0 and at most 1"),
    "too much": ({"temperature": 1, "top_p": 1.5}, r"top_p is 1.5; expected more than 0 and at most 1"),
    "negative seed": ({"seed": -1}, r"seed is -1; expected 0 to 4294967295; choose one of these"),
    "without effect": ({"top_k": 5}, r"top_k or top_p is given with temperature 0; expected a temperature"),
    "half a token": ({"temperature": 1, "top_k": 2.5}, r"^top_k is 2.5; expected a whole number; pass an int$"),
    "true for one": ({"temperature": 1, "top_k": True}, r"^top_k is True; expected a whole number; pass an int$"),
    "a word for heat": ({"temperature": "hot"}, r"^temperature is 'hot'; expected a number; pass an int or a float$"),
    "no heat": ({"temperature": None}, r"^temperature is None; expected a number; pass an int or a float$"),
    "a share in words": ({"temperature": 1, "top_p": "0.9"}, r"^top_p is '0.9'; expected a number; pass an int or a"),
    "half a seed": ({"seed": 0.5}, r"^seed is 0.5; expected a whole number; pass an int$"),
    "a seed of another library": (
        {"seed": np.int64(3)},
        r"^seed is np.int64\(3\); expected a whole number; pass an int$",
    ),
    "too hot": ({"temperature": 10**400}, r"^temperature is 1000.*; expected 0, which is greedy, or more"),
    "all kinds together": ({"temperature": "1", "top_k": 2.5, "seed": "0"}, r"(?s)temperature is.*top_k is.*seed is"),
    "all together": ({"temperature": -1, "top_p": 2}, r"(?s)temperature is -1.*top_p is 2"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Sampling(**arguments)
