"""The text models of Gemma 3. Absent keys mean what they do in `transformers.Gemma3TextConfig`."""

from collections.abc import Mapping

from extract.models import gemma, gemma2
from extract.models.errors import ModelError
from extract.models.qwen3 import FAMILY as QWEN3
from extract.models.qwen3 import norms
from extract.models.reading import Family, Fields, Raw, attention_bias, head_dim, shape, windows_by_type
from extract.models.rope_scaling import THETA, read_rope, stretched_positions

LAYER_TYPES = {"full_attention", "sliding_attention"}
GLOBAL_THETA = 1_000_000.0


def windows(raw: Raw) -> Fields:
    """The window of each layer, from `layer_types` or, in files before it, `sliding_window_pattern`."""
    types = raw.get("layer_types", gemma2.types_by_pattern(raw, raw["sliding_window_pattern"]))
    return windows_by_type(raw, types, raw["sliding_window"], "sliding_window is null")


def ropes(raw: Raw) -> Fields:
    """Two rotations: that of layers with a window, and that of the others, which alone is scaled in the older files."""
    layered = raw.get("rope_parameters", {})
    if not isinstance(layered, Mapping) or layered.keys() - LAYER_TYPES:
        raise ModelError(
            f"found rope_parameters {layered}; expected one for full_attention and one for sliding_attention; "
            "correct config.json"
        )
    rest = {"max_position_embeddings": raw["max_position_embeddings"]}
    scaled = {"rope_theta": raw.get("rope_theta"), "rope_scaling": raw.get("rope_scaling")}
    whole_raw = rest | scaled | {"rope_parameters": layered.get("full_attention")}
    whole = read_rope(whole_raw, head_dim(raw), theta=GLOBAL_THETA)
    local = read_rope(
        rest | {"rope_theta": raw.get("rope_local_base_freq"), "rope_parameters": layered.get("sliding_attention")},
        head_dim(raw),
        theta=THETA,
    )
    return {
        "rope_frequencies": whole.frequencies,
        "rope_factor": whole.factor,
        "rope_positions": whole.positions,
        "stretched_positions": stretched_positions(whole_raw),
        "local_rope": local,
    }


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    parts=(shape, ropes, windows, attention_bias, norms, gemma.gemma, gemma2.scores),
    # The reference has attn_logit_softcapping as a key and does not apply it.
    only_values=gemma.ONLY_VALUES | {"attn_logit_softcapping": ()},
    defaults={
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    layer_tensors={**QWEN3.layer_tensors, **gemma2.LAYER_TENSORS_WITH_POST_NORMS},
)
