"""The decoder that all families share: pre-norm residual layers of attention and an MLP, in flax NNX.

Layers are separate modules in a list, not one stack that is scanned over: the weights of a layer are then read where
they lie (slicing stacked weights made compilation of 24 layers 8 times slower and copied 455 MB).
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from extract.models.attention import Attend, AttentionRule, Heads, KeyHeads, Mix, attend
from extract.models.config import Activation, DecoderConfig
from extract.models.norms import LayerNorm, RmsNorm, make_norm
from extract.models.recorder import Recorder
from extract.models.rope import RopeTables, rope_tables, rotate
from extract.models.sites import Tap

ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}

INIT_SCALE = 0.02
"""Standard deviation of fresh matrices, as in the HuggingFace models."""


class Linear(nnx.Module):
    """A matrix in the layout of the checkpoints, [out, in], with or without a bias."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), (outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, rows: Float[Array, "*axes inputs"]) -> Float[Array, "*axes outputs"]:
        """Multiplies every row. float32 stays float32 on TPU and GPU too, whose default would round the factors."""
        product = jnp.einsum("...i,oi->...o", rows, self.weight[...], precision=lax.Precision.HIGHEST)
        return product if self.bias is None else product + self.bias[...]


class Attention(nnx.Module):
    """Grouped-query self-attention, its queries and keys rotated by their positions."""

    def __init__(self, config: DecoderConfig, *, layer: int, rngs: nnx.Rngs) -> None:
        width, inner, kv_inner = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(width, inner, bias=config.projection_bias, rngs=rngs)
        self.key = Linear(width, kv_inner, bias=config.projection_bias, rngs=rngs)
        self.value = Linear(width, kv_inner, bias=config.projection_bias, rngs=rngs)
        self.output = Linear(inner, width, bias=config.output_bias, rngs=rngs)
        self.query_norm = make_norm(config, config.head_dim) if config.query_key_norm else None
        self.key_norm = make_norm(config, config.head_dim) if config.query_key_norm else None
        self.head_dim = config.head_dim
        scale = config.head_dim**-0.5 if config.attention_scales is None else config.attention_scales[layer]
        self.rule = AttentionRule(config.windows[layer], scale, config.attention_softcap)

    def project(
        self, hidden: Float[Array, "batch sequence hidden"], tables: RopeTables | None, recorder: Recorder, layer: int
    ) -> tuple[Heads, KeyHeads, KeyHeads]:
        """Returns rotated queries, rotated keys, and values; offers them to the recorder before they are rotated."""
        query, key, value = (self._split(linear(hidden)) for linear in (self.query, self.key, self.value))
        query, key = _normed(self.query_norm, query), _normed(self.key_norm, key)
        for site, heads in (("q", query), ("k", key), ("v", value)):
            recorder.offer(site, layer, _joined(heads))
        return (query, key, value) if tables is None else (rotate(query, tables), rotate(key, tables), value)

    def finish(self, mixed: Heads) -> Float[Array, "batch sequence hidden"]:
        """Brings the mixed values of all heads back to the residual stream."""
        return self.output(_joined(mixed))

    def __call__(
        self,
        hidden: Float[Array, "batch sequence hidden"],
        tables: RopeTables | None,
        mix: Mix,
        recorder: Recorder,
        layer: int,
    ) -> Float[Array, "batch sequence hidden"]:
        """Returns what attention gives, and offers the values of its heads to the recorder."""
        mixed = mix(layer, self.rule, *self.project(hidden, tables, recorder, layer))
        recorder.offer("attn_z", layer, _joined(mixed))
        return self.finish(mixed)

    def _split(self, rows: Float[Array, "batch sequence inner"]) -> Heads:
        return rows.reshape(*rows.shape[:2], -1, self.head_dim)


class Mlp(nnx.Module):
    """An MLP with a gate (https://arxiv.org/abs/2002.05202) or without one."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(width, inner, bias=bias, rngs=rngs) if config.gated else None
        self.up = Linear(width, inner, bias=bias, rngs=rngs)
        self.down = Linear(inner, width, bias=bias, rngs=rngs)
        self.activation = config.activation

    def expand(self, hidden: Float[Array, "batch sequence hidden"]) -> Float[Array, "batch sequence intermediate"]:
        """Returns the inner activations, gated where there is a gate: the site `mlp_post`."""
        activate = ACTIVATIONS[self.activation]
        if self.gate is None:
            return activate(self.up(hidden))
        return activate(self.gate(hidden)) * self.up(hidden)


class Layer(nnx.Module):
    """One decoder layer: attention, then the MLP, each normed before and added to the residual stream.

    Some families norm what they add, too.
    """

    def __init__(self, config: DecoderConfig, *, layer: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, layer=layer, rngs=rngs)
        self.attention_post_norm = make_norm(config, config.hidden_size) if config.post_norms else None
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = Mlp(config, rngs=rngs)
        self.mlp_post_norm = make_norm(config, config.hidden_size) if config.post_norms else None

    def __call__(
        self,
        hidden: Float[Array, "batch sequence hidden"],
        tables: RopeTables | None,
        mix: Mix,
        recorder: Recorder,
        layer: int,
    ) -> Float[Array, "batch sequence hidden"]:
        """Returns the residual stream after this layer, and offers the value at each site to the recorder."""
        hidden = recorder.offer("resid_pre", layer, hidden)
        change = self.attention(self.attention_norm(hidden), tables, mix, recorder, layer)
        change = recorder.offer("attn_out", layer, _normed(self.attention_post_norm, change))
        hidden = recorder.offer("resid_mid", layer, hidden + change)
        inner = recorder.offer("mlp_post", layer, self.mlp.expand(self.mlp_norm(hidden)))
        change = recorder.offer("mlp_out", layer, _normed(self.mlp_post_norm, self.mlp.down(inner)))
        return recorder.offer("resid_post", layer, hidden + change)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Args:
        config: Its shape.
        rngs: Where fresh weights come from; loading replaces them.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.embedding = _rows_for(config.vocab_size, config, rngs)
        self.position_embedding = _rows_for(config.max_positions, config, rngs) if config.learned_positions else None
        self.layers = nnx.List([Layer(config, layer=layer, rngs=rngs) for layer in range(config.layers)])
        self.final_norm = make_norm(config, config.hidden_size)
        self.head = None if config.tied else Linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)
        self.embedding_scale = config.embedding_scale
        self.rope = None if config.learned_positions else config.rope
        self.local_rope = config.local_rope
        self.logit_softcap = config.logit_softcap

    def activations(
        self,
        token_ids: Int[Array, "batch sequence"],
        segment_ids: Int[Array, "batch sequence"],
        positions: Int[Array, "batch sequence"],
        taps: Collection[Tap],
        *,
        kernel: Attend = attend,
    ) -> dict[Tap, Float[Array, "batch sequence width"]]:
        """Returns the values at `taps`, and computes no layer after the last of them.

        Capture costs only the memory of what is captured. Rows of padding are garbage.

        Args:
            token_ids: Below the vocabulary size; a larger or negative one gives NaN, never the row of another token.
            segment_ids: 1 and up for the documents of a packed row, 0 for padding; runs of neighbouring tokens.
            positions: Of each token in its segment, from 0. One that the model has no rotation or embedding for gives
                NaN, never the row of another.
            taps: What to keep; must have passed `check_taps`.
            kernel: What computes attention.
        """

        def mix(_: int, rule: AttentionRule, query: Heads, key: KeyHeads, value: KeyHeads) -> Heads:
            return kernel(query, key, value, segment_ids, rule=rule)

        recorder = Recorder(taps)
        self.run(token_ids, positions, mix, recorder)
        return recorder.found

    def run(
        self,
        token_ids: Int[Array, "batch sequence"],
        positions: Int[Array, "batch sequence"],
        mix: Mix,
        recorder: Recorder,
    ) -> None:
        """Offers the value at every site to the recorder, until it has all that it wants.

        Args:
            token_ids: As in `activations`.
            positions: As in `activations`.
            mix: How the tokens of a layer see each other, and tokens that were computed before.
            recorder: Says what is wanted, and keeps it.
        """
        tables = None if self.rope is None else rope_tables(self.rope, positions)
        local = tables if self.local_rope is None else rope_tables(self.local_rope, positions)
        hidden = recorder.offer("embed", None, self.embed(token_ids))
        if self.position_embedding is not None:
            hidden = hidden + _taken(self.position_embedding[...], positions)
        for layer, module in enumerate(self.layers):
            if recorder.complete:
                break
            windowed = module.attention.rule.window is not None
            hidden = module(hidden, local if windowed else tables, mix, recorder, layer)
        if not recorder.complete:
            recorder.offer("final_norm", None, self.final_norm(hidden))

    def embed(self, token_ids: Int[Array, "batch sequence"]) -> Float[Array, "batch sequence hidden"]:
        """Returns the embeddings of tokens, scaled where the family does so, without their positions."""
        rows = _taken(self.embedding[...], token_ids)
        return rows if self.embedding_scale is None else rows * jnp.asarray(self.embedding_scale, rows.dtype)

    def unembed(self, normed: Float[Array, "batch sequence hidden"]) -> Float[Array, "batch sequence vocabulary"]:
        """Returns float32 logits from the values at `final_norm`; `batch * sequence * vocabulary * 4` bytes."""
        matrix = self.embedding[...] if self.head is None else self.head.weight[...]
        logits = jnp.einsum(
            "bsh,vh->bsv", normed, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        return logits if self.logit_softcap is None else self.logit_softcap * jnp.tanh(logits / self.logit_softcap)


def _taken(
    rows: Float[Array, "row width"], numbers: Int[Array, "batch sequence"]
) -> Float[Array, "batch sequence width"]:
    """Rows by their numbers, NaN where there is no such row: JAX would count negative ones from the end."""
    return jnp.take(rows, jnp.where(numbers < 0, len(rows), numbers), axis=0, mode="fill")


def _rows_for(count: int, config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Param[Array]:
    return nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), (count, config.hidden_size)))


def _normed(norm: RmsNorm | LayerNorm | None, rows: Float[Array, "*axes width"]) -> Float[Array, "*axes width"]:
    return rows if norm is None else norm(rows)


def _joined(heads: Heads) -> Float[Array, "batch sequence inner"]:
    return heads.reshape(*heads.shape[:2], -1)
