"""Llama 1 to 3, and models of the same shape such as SmolLM. Absent keys mean what they do in `LlamaConfig`."""

from extract.models.reading import Family, Fields, Raw, attention_bias, rope, shape


def mlp_bias(raw: Raw) -> Fields:
    """The key `mlp_bias`: on all three matrices."""
    return {"mlp_bias": raw.get("mlp_bias", False)}


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    parts=(shape, rope, attention_bias, mlp_bias),
    only_values={"hidden_act": ("silu",)},
    defaults={"num_key_value_heads": None, "max_position_embeddings": 2048},
)
