"""Gemma 2. Absent keys mean what they do in `transformers.Gemma2Config`."""

from collections.abc import Sequence

from extract.models import gemma
from extract.models.reading import Family, Fields, Raw, attention_bias, rope, shape, windows_by_type
from extract.models.stored import LAYER_TENSORS

LAYER_TENSORS_WITH_POST_NORMS = LAYER_TENSORS | {
    "post_attention_layernorm.weight": "attention_post_norm/weight",
    "pre_feedforward_layernorm.weight": "mlp_norm/weight",
    "post_feedforward_layernorm.weight": "mlp_post_norm/weight",
}


def windows(raw: Raw) -> Fields:
    """The window of each layer, from `layer_types` or, in files before it, every other layer."""
    types = raw.get("layer_types", types_by_pattern(raw, 2))
    return windows_by_type(raw, types, raw["sliding_window"], "sliding_window is null")


def types_by_pattern(raw: Raw, pattern: int) -> Sequence[str]:
    """The types of layers of which every `pattern`-th sees everything."""
    layers = range(1, raw["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]


def scores(raw: Raw) -> Fields:
    """Norms after attention and MLP; how scores and logits are scaled and capped."""
    return {
        "post_norms": True,
        "attention_scales": (raw["query_pre_attn_scalar"] ** -0.5,) * raw["num_hidden_layers"],
        "attention_softcap": raw["attn_logit_softcapping"],
        "logit_softcap": raw["final_logit_softcapping"],
    }


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    parts=(shape, rope, windows, attention_bias, gemma.gemma, scores),
    only_values=gemma.ONLY_VALUES,
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    layer_tensors=LAYER_TENSORS_WITH_POST_NORMS,
)
