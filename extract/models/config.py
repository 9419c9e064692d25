"""What decides the arithmetic of a decoder, read once from `config.json` and frozen."""

import dataclasses
import hashlib
import json
from typing import Literal, NamedTuple, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]
"""What an MLP applies to its inner values; `gelu` is the exact one, `gelu_tanh` its approximation."""


class Rope(NamedTuple):
    """How positions turn queries and keys.

    Attributes:
        frequencies: Radians per position, one for each pair of dimensions of a head (`head_dim / 2` values).
        factor: Of cosine and sine; yarn makes attention sharper by it.
        positions: The frequencies hold for positions below this one, from where on the model computes NaN. None: all.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    positions: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes the computation of one decoder, and nothing else.

    Families translate their own `config.json` into this; the decoder reads no other configuration. The defaults are
    what Qwen2 does.

    Attributes:
        family: Name of the family, as in `model_type` of `config.json`.
        vocab_size: Rows of the embedding matrix.
        hidden_size: Width of the residual stream.
        intermediate_size: Width between the two halves of an MLP.
        layers: Number of decoder layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; divides `heads`.
        head_dim: Width of one head; `heads * head_dim` need not be `hidden_size`.
        norm_epsilon: Added to the mean square, or to the variance, in every norm.
        rope_frequencies: Of `rope`; empty where positions are learned.
        max_positions: Longest sequence the model was made for. The decoder does not enforce it; a plan should.
        tied: The output head is the embedding matrix.
        windows: For each layer, how many tokens a token sees, itself included. None: all before it.
        rope_factor: Of `rope`.
        rope_positions: Of `rope`.
        stretched_positions: Longest sequence that the rope was stretched for, where that is above `max_positions`.
        local_rope: For the layers with a window, where these differ from the others. None: they do not.
        learned_positions: A row for each position is added to the embeddings; nothing is rotated.
        norm: Root mean square, or LayerNorm with weight and bias.
        norm_offset: Norms scale by this plus their weight, added in float32.
        query_key_norm: Each head of queries and keys is normed before it is rotated.
        post_norms: What attention and MLP give is normed before it is added to the residual stream.
        projection_bias: Queries, keys and values have biases.
        output_bias: The output of attention has a bias.
        mlp_bias: The matrices of the MLP have biases.
        gated: The MLP multiplies by a gate.
        activation: Of the gate, or of the MLP without one.
        embedding_scale: Embeddings are multiplied by this, rounded to the dtype of the computation first.
        attention_scales: For each layer, the factor of the products of queries and keys. None: `head_dim ** -0.5`.
        attention_softcap: Attention scores become `softcap * tanh(score / softcap)`. None: they stay.
        logit_softcap: The same for logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_frequencies: tuple[float, ...]
    max_positions: int
    tied: bool
    windows: tuple[int | None, ...]
    rope_factor: float = 1.0
    rope_positions: int | None = None
    stretched_positions: int | None = None
    local_rope: Rope | None = None
    learned_positions: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    query_key_norm: bool = False
    post_norms: bool = False
    projection_bias: bool = True
    output_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    embedding_scale: float | None = None
    attention_scales: tuple[float, ...] | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def rope(self) -> Rope:
        """How positions turn queries and keys, in layers without a window and, unless `local_rope` says, with one."""
        return Rope(self.rope_frequencies, self.rope_factor, self.rope_positions)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model is for."""
        return self.stretched_positions or self.max_positions

    def digest(self) -> str:
        """Returns a sha256 over all fields that are not at their default.

        Two spellings of one `config.json` have the same digest. It is part of a run's fingerprint, so a new field must
        have a default that means what was computed before: digests of older models then stay as they were.
        `stretched_positions` has no part in it: it changes no value.
        """
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        told = {name: value for name, value in dataclasses.asdict(self).items() if value != fields[name]}
        told.pop("stretched_positions", None)
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
