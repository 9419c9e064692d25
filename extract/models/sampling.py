"""How the next token is chosen from logits: the most likely one, or a draw that depends on seed, row and step alone."""

import dataclasses
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from extract.models.errors import ModelError
from extract.models.kinds import is_number, is_whole, shown

COLDEST = 1e-30
"""Temperatures below are taken as this one: float32 would make zero of them, and zero by zero of the likeliest."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The default is greedy: the most likely token, always.

    Logits are divided by `temperature`; then only the `top_k` most likely tokens stay; then, of what these have
    together, the most likely ones that reach `top_p`. Tokens of exactly the same logit stay or go together.

    Attributes:
        temperature: 0 is greedy; 1 draws from the model's own distribution.
        top_k: How many tokens stay; None for all.
        top_p: The share that the tokens which stay must reach, in (0, 1].
        seed: Of the draws. A draw depends on the seed, on the row's id and on the step, and on nothing else.

    Raises:
        ModelError: A value is of the wrong type, out of its range, or would have no effect.
    """

    temperature: float | int = 0.0
    top_k: int | None = None
    top_p: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks all values together."""
        problems = [
            f"{name} is {shown(value)}; expected a number; pass an int or a float"
            for name, value in (("temperature", self.temperature), ("top_p", self.top_p))
            if not is_number(value)
        ]
        problems += [
            f"{name} is {shown(value)}; expected a whole number; pass an int"
            for name, value in (("top_k", 1 if self.top_k is None else self.top_k), ("seed", self.seed))
            if not is_whole(value)
        ]
        if problems:
            raise ModelError("\n".join(problems))
        if not 0 <= self.temperature <= sys.float_info.max:
            problems.append(
                f"temperature is {self.temperature}; expected 0, which is greedy, or more; pass for example 1"
            )
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k is {self.top_k}; expected at least 1; leave it out to keep all tokens")
        if not 0 < self.top_p <= 1:
            problems.append(
                f"top_p is {self.top_p}; expected more than 0 and at most 1; leave it out to keep all tokens"
            )
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed is {self.seed}; expected 0 to {2**32 - 1}; choose one of these")
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1):
            problems.append(
                "top_k or top_p is given with temperature 0; expected a temperature, since greedy choice ignores them; "
                "pass temperature=1, or leave them out"
            )
        if problems:
            raise ModelError("\n".join(problems))

    @property
    def greedy(self) -> bool:
        """Nothing is drawn."""
        return self.temperature == 0

    def draws(self, row_ids: UInt32[np.ndarray, " batch"]) -> "Draws | None":
        """Returns what `choose` takes; None for greedy choice."""
        if self.greedy:
            return None
        return Draws(
            key=jax.random.key(np.uint32(self.seed)),
            row_ids=jnp.asarray(row_ids),
            temperature=jnp.float32(max(self.temperature, COLDEST)),
            top_k=None if self.top_k is None else jnp.int32(min(self.top_k, 2**31 - 1)),
            top_p=None if self.top_p == 1 else jnp.float32(self.top_p),
        )


class Draws(NamedTuple):
    """A `Sampling` as arrays: another temperature needs no compilation. What is None is not computed."""

    key: Array
    row_ids: UInt32[Array, " batch"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None


def choose(
    logits: Float[Array, "batch vocabulary"], draws: Draws | None, step: Int[Array, ""] | int
) -> Int[Array, " batch"]:
    """Returns the next token of every row. No row's choice depends on another row.

    Draws add Gumbel noise and take the largest: noise is that of the token, whatever `top_k` and `top_p` leave.
    `top_k` and `top_p` cost a sort of the vocabulary per row.

    Args:
        logits: float32.
        draws: None for greedy choice; of equal logits the first token then wins.
        step: How many tokens the rows have before this one.
    """
    if draws is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the largest, so that no temperature makes an infinity of it.
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / draws.temperature
    kept = jnp.where(scaled >= _smallest_kept(scaled, draws), scaled, -jnp.inf)

    def noise(row: UInt32[Array, ""]) -> Float[Array, " vocabulary"]:
        key = jax.random.fold_in(jax.random.fold_in(draws.key, row), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    return jnp.argmax(kept + jax.vmap(noise)(draws.row_ids), axis=-1).astype(jnp.int32)


def _smallest_kept(scaled: Float[Array, "batch vocabulary"], draws: Draws) -> Float[Array, "batch #vocabulary"]:
    """The smallest value of each row that `top_k` and `top_p` leave."""
    if draws.top_k is None and draws.top_p is None:
        return jnp.full((scaled.shape[0], 1), -jnp.inf)
    descending = -jnp.sort(-scaled, axis=-1)
    if draws.top_k is not None:
        descending = jnp.where(jnp.arange(scaled.shape[-1]) < draws.top_k, descending, -jnp.inf)
    if draws.top_p is not None:
        shares = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        descending = jnp.where(before < draws.top_p, descending, -jnp.inf)
    return jnp.min(descending, axis=-1, where=descending > -jnp.inf, initial=0.0, keepdims=True)
