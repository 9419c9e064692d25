"""Keys and values of tokens that were computed before, so that the next token costs one token and not a sequence.

Prompts lie right-aligned in slots of one width: every row writes its next token into the same slot, and who sees whom
is decided by the code and the rules of `extract.models.attention`. A row's own positions count from its first token.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from extract.models.attention import CHUNK_ROWS, AttentionRule, Heads, KeyHeads, attend, attend_next
from extract.models.config import DecoderConfig
from extract.models.sites import Tap, site_widths

Slots = Float[Array, "batch kv_head slot dim"]


class Cache(NamedTuple):
    """Rotated keys, and values, of every layer, heads first. Layers with a window keep all tokens too."""

    keys: tuple[Slots, ...]
    values: tuple[Slots, ...]


class Fill:
    """The mix of a prefill: whole prompts see themselves, and their keys and values are kept.

    Args:
        segment_ids: 1 for the tokens of the right-aligned prompts, 0 before them.
        slots: Of the cache; those behind the prompts are zero.
    """

    def __init__(self, segment_ids: Int[Array, "batch sequence"], slots: int) -> None:
        self._segment_ids, self._slots = segment_ids, slots
        self._keys: list[Slots] = []
        self._values: list[Slots] = []

    def __call__(self, _: int, rule: AttentionRule, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
        """Mixes as `attend` does. Layers come in order."""
        self._keys.append(self._kept(key))
        self._values.append(self._kept(value))
        return attend(query, key, value, self._segment_ids, rule=rule)

    @property
    def cache(self) -> Cache:
        """What was kept of the layers so far."""
        return Cache(tuple(self._keys), tuple(self._values))

    def _kept(self, heads: KeyHeads) -> Slots:
        behind = self._slots - heads.shape[1]
        return jnp.pad(heads.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, behind), (0, 0)))


class Extend:
    """The mix of one more token in every row: it is written into slot `index` and sees what is before it.

    Args:
        cache: Of the tokens before.
        segment_ids: 1 from each row's first token on.
        index: The slot to write.
    """

    def __init__(self, cache: Cache, segment_ids: Int[Array, "batch slot"], index: Int[Array, ""]) -> None:
        self._keys, self._values = list(cache.keys), list(cache.values)
        self._segment_ids, self._index = segment_ids, index

    def __call__(
        self,
        layer: int,
        rule: AttentionRule,
        query: Float[Array, "batch 1 head dim"],
        key: Float[Array, "batch 1 kv_head dim"],
        value: Float[Array, "batch 1 kv_head dim"],
    ) -> Float[Array, "batch 1 head dim"]:
        """Mixes as `attend` would with all tokens before given again."""
        self._keys[layer] = self._written(self._keys[layer], key)
        self._values[layer] = self._written(self._values[layer], value)
        return attend_next(
            query, self._keys[layer], self._values[layer], self._segment_ids, self._index, rule=rule
        )  # fmt: skip

    @property
    def cache(self) -> Cache:
        """The cache with the new token."""
        return Cache(tuple(self._keys), tuple(self._values))

    def _written(self, slots: Slots, heads: Float[Array, "batch 1 kv_head dim"]) -> Slots:
        return lax.dynamic_update_slice_in_dim(slots, heads.transpose(0, 2, 1, 3), self._index, axis=2)


def cache_bytes(config: DecoderConfig, *, batch: int, slots: int, itemsize: int) -> int:
    """Bytes of a cache: keys and values of every layer and slot, windows or not.

    For Qwen2.5-0.5B in bfloat16 that is 12 KiB per token, 100 MB for 8 rows of 1,024 tokens.
    """
    return 2 * config.layers * batch * slots * config.kv_heads * config.head_dim * itemsize


def generation_bytes(
    config: DecoderConfig,
    *,
    batch: int,
    prompt_tokens: int,
    max_tokens: int,
    itemsize: int,
    taps: Collection[Tap] = (),
) -> int:
    """A bound on what generation needs on the device beside the parameters.

    The cache, the step activations, and what one step of the prefill works with: it grows with the prompts' tokens and
    not with their square. `tests/test_generation.py` holds the compiled programs to it.

    Args:
        config: Of the model.
        batch: Rows, those that only fill the batch up included.
        prompt_tokens: Width to which prompts are padded.
        max_tokens: Tokens to generate.
        itemsize: Bytes of a value of the model's dtype: 4 or 2.
        taps: Sites that are kept at each step.
    """
    widths = site_widths(config)
    slots = prompt_tokens + max_tokens
    kept = batch * max_tokens * (4 + itemsize * sum(widths[tap.site] for tap in taps))
    heads = (config.heads + config.kv_heads) * config.head_dim
    row_values = 4 * config.hidden_size + 3 * config.intermediate_size + 4 * heads
    scores = 3 * 4 * batch * config.heads * min(CHUNK_ROWS, prompt_tokens) * slots
    return (
        cache_bytes(config, batch=batch, slots=slots, itemsize=itemsize)
        + kept
        + 4 * batch * prompt_tokens * row_values
        + scores
        + 8 * 4 * batch * config.vocab_size  # top_k and top_p sort all logits of a row
    )
