"""What decides the arithmetic of a decoder, read once from `config.json` and frozen."""

import dataclasses
import hashlib
import json


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that shapes the computation of one decoder, and nothing else.

    Families translate their own `config.json` into this; the decoder reads no other configuration.

    Attributes:
        family: Name of the family, as in `model_type` of `config.json`.
        vocab_size: Rows of the embedding matrix.
        hidden_size: Width of the residual stream.
        intermediate_size: Width between the two halves of an MLP.
        layers: Number of decoder layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; divides `heads`.
        head_dim: Width of one head; `heads * head_dim` need not be `hidden_size`.
        norm_epsilon: Added to the mean square in every norm.
        rope_frequencies: Radians per position, one for each pair of dimensions of a head (`head_dim / 2` values).
        max_positions: Longest sequence the model was made for. The decoder does not enforce it; a plan should.
        tied: The output head is the embedding matrix.
        windows: For each layer, how many tokens a token sees, itself included. None: all before it.
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

    def digest(self) -> str:
        """Returns a sha256 over all fields: two spellings of one `config.json` have the same digest."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()
