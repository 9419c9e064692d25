"""Causal attention in bounded memory: the scores of a few query rows exist at a time, never all of them."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

CHUNK_ROWS = 64
"""Query rows whose scores exist at once. 64 keeps them in the caches of a CPU core (figures in `attend`)."""

QUERY_RUNS = 4
"""The queries are cut into this many runs, each of which reads only the keys its rows may see. More runs save up to a
tenth of the time and cost as much more compilation, in every layer."""


Heads: TypeAlias = Float[Array, "batch sequence head dim"]
"""Queries, or what attention gives."""

KeyHeads: TypeAlias = Float[Array, "batch sequence kv_head dim"]
"""Keys or values: several heads of queries may share one."""


class AttentionRule(NamedTuple):
    """How the queries of one layer meet its keys.

    Attributes:
        window: How many tokens a token sees, itself included; None for all before it.
        scale: Factor of the products of queries and keys.
        softcap: Scores become `softcap * tanh(score / softcap)`; None leaves them.
    """

    window: int | None
    scale: float
    softcap: float | None = None


Mix: TypeAlias = Callable[[int, AttentionRule, Heads, KeyHeads, KeyHeads], Heads]
"""What mixes the values of the layer of some number, by its rule, from queries, keys and values: `attend` over whole
sequences, or over what was computed before."""


class Attend(Protocol):
    """What computes attention over whole sequences: `attend`, or a kernel of `extract.models.kernels`."""

    def __call__(
        self,
        query: Heads,
        key: KeyHeads,
        value: KeyHeads,
        segment_ids: Int[Array, "batch sequence"],
        *,
        rule: AttentionRule,
    ) -> Heads:
        """Mixes the values that each token may see: see `attend`."""
        ...


class _Rows(NamedTuple):
    """Query rows of one chunk, the query heads that share a key head side by side."""

    query: Float[Array, "batch kv_head group row dim"]
    segment_ids: Int[Array, "batch row"]
    indices: Int[Array, " row"]


class _Keys(NamedTuple):
    """The keys and values that a run of queries may see."""

    key: Float[Array, "batch kv_head source dim"]
    value: Float[Array, "batch kv_head source dim"]
    segment_ids: Int[Array, "batch source"]
    indices: Int[Array, " source"]


def attend(
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    segment_ids: Int[Array, "batch sequence"],
    *,
    rule: AttentionRule,
    chunk_rows: int = CHUNK_ROWS,
) -> Heads:
    """Mixes the values that each token may see: same segment, not later, and no further back than `window` tokens.

    Scores and softmax are float32 whatever the dtype of the arguments. Segments must be runs of neighbouring tokens.
    Head `h` of the query reads key head `h // (heads / kv_heads)`.

    Cost: `batch * heads * chunk_rows * sequence` float32 scores at a time. Sequences up to `chunk_rows` are one chunk,
    which is plain attention. With 9 heads of 64 and 3 key heads in float32 on 2 CPU cores, a batch of (8, 256) takes
    14 ms, against 35 ms with all scores at once; (1, 2048) takes 90 against 450 ms.

    Args:
        query: Rotated queries.
        key: Rotated keys.
        value: Values.
        segment_ids: Tokens attend within their own segment only.
        rule: Window, scale and soft cap of the layer.
        chunk_rows: Query rows at a time.
    """
    batch, length, heads, dim = query.shape
    kv_heads = key.shape[2]
    # Heads first makes each product one plain batched matmul: XLA's CPU backend takes 1.5 to 2 times longer for the
    # same contraction in the (sequence, head) order.
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    keys = _Keys(key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), segment_ids, jnp.arange(length))
    rows = _Rows(grouped, segment_ids, keys.indices)
    mixed = _attend_rows(rows, keys, rule) if length <= chunk_rows else _attend_runs(rows, keys, rule, chunk_rows)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def attend_next(
    query: Float[Array, "batch 1 head dim"],
    key: Float[Array, "batch kv_head slot dim"],
    value: Float[Array, "batch kv_head slot dim"],
    segment_ids: Int[Array, "batch slot"],
    index: Int[Array, ""],
    *,
    rule: AttentionRule,
) -> Float[Array, "batch 1 head dim"]:
    """Mixes the values that one new token of each row may see, by the same rule and code as `attend`.

    Cost: `batch * heads * slots` float32 scores, whatever part of the slots is used.

    Args:
        query: Rotated queries of the new tokens, which are in segment 1.
        key: Rotated keys, heads first, those of the new tokens among them.
        value: Values, heads first.
        segment_ids: 1 for the tokens of a row, 0 before them. What lies behind `index` is not seen.
        index: The slot of the new tokens, the same in every row.
        rule: Window, scale and soft cap of the layer.
    """
    batch, _, heads, dim = query.shape
    kv_heads, slots = key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, 1, dim)
    rows = _Rows(grouped, jnp.ones((batch, 1), segment_ids.dtype), index[None])
    mixed = _attend_rows(rows, _Keys(key, value, segment_ids, jnp.arange(slots)), rule)
    return mixed.reshape(query.shape)


def visible(
    rows: Int[Array, " row"],
    row_segments: Int[Array, "batch row"],
    sources: Int[Array, " source"],
    source_segments: Int[Array, "batch source"],
    *,
    window: int | None,
) -> Bool[Array, "batch row source"]:
    """Who sees whom: tokens of the same segment that are not later, and no further back than `window` tokens.

    Args:
        rows: Places of the tokens that look.
        row_segments: Their segments.
        sources: Places of the tokens that are looked at.
        source_segments: Their segments.
        window: Of the rule; None for all before.
    """
    ahead = rows[:, None] - sources[None]
    in_reach = (ahead >= 0) if window is None else (ahead >= 0) & (ahead < window)
    return in_reach & (row_segments[:, :, None] == source_segments[:, None])


def _attend_runs(
    rows: _Rows, keys: _Keys, rule: AttentionRule, chunk_rows: int
) -> Float[Array, "batch kv_head group sequence dim"]:
    """Runs of chunks: a Python loop where the visible keys differ, `lax.map` (one body to compile) within a run."""
    length = rows.indices.size
    run = -(-length // (QUERY_RUNS * chunk_rows)) * chunk_rows
    parts = []
    for start in range(0, length, run):
        stop = min(start + run, length)
        low = 0 if rule.window is None else max(0, start - rule.window + 1)
        reached = _Keys(
            keys.key[:, :, low:stop], keys.value[:, :, low:stop], keys.segment_ids[:, low:stop], keys.indices[low:stop]
        )
        whole = (stop - start) // chunk_rows * chunk_rows + start
        if whole > start + chunk_rows:
            parts.append(_attend_mapped(_slice(rows, start, whole - start), reached, rule, chunk_rows))
        elif whole > start:
            parts.append(_attend_rows(_slice(rows, start, chunk_rows), reached, rule))
        if stop > whole:
            parts.append(_attend_rows(_slice(rows, whole, stop - whole), reached, rule))
    return jnp.concatenate(parts, axis=3)


def _attend_mapped(
    rows: _Rows, keys: _Keys, rule: AttentionRule, chunk_rows: int
) -> Float[Array, "batch kv_head group run dim"]:
    starts = jnp.arange(0, rows.indices.size, chunk_rows)
    chunks = lax.map(lambda start: _attend_rows(_slice(rows, start, chunk_rows), keys, rule), starts)
    return jnp.moveaxis(chunks, 0, 3).reshape(rows.query.shape)


def _attend_rows(rows: _Rows, keys: _Keys, rule: AttentionRule) -> Float[Array, "batch kv_head group row dim"]:
    batch, kv_heads, group, count, dim = rows.query.shape
    seen = visible(rows.indices, rows.segment_ids, keys.indices, keys.segment_ids, window=rule.window)
    flat = rows.query.reshape(batch, kv_heads, group * count, dim)
    products = jnp.einsum(
        "bkrd,bksd->bkrs", flat, keys.key, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    scores = products.reshape(batch, kv_heads, group, count, -1) * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    # Every row sees at least itself, so no row is all -inf.
    shares = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    flat_shares = shares.astype(keys.value.dtype).reshape(batch, kv_heads, group * count, -1)
    mixed = jnp.einsum("bkrs,bksd->bkrd", flat_shares, keys.value, precision=lax.Precision.HIGHEST)
    return mixed.reshape(rows.query.shape)


def _slice(rows: _Rows, start: int | Int[Array, ""], count: int) -> _Rows:
    return _Rows(
        lax.dynamic_slice_in_dim(rows.query, start, count, axis=3),
        lax.dynamic_slice_in_dim(rows.segment_ids, start, count, axis=1),
        lax.dynamic_slice_in_dim(rows.indices, start, count, axis=0),
    )
