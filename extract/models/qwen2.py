"""Qwen2 and Qwen2.5: how their `config.json` reads, and where their tensors go.

The reference is `transformers.Qwen2ForCausalLM`; defaults of absent keys are those of its `Qwen2Config`.
"""

from collections.abc import Mapping
from typing import Any

from extract.models.config import DecoderConfig
from extract.models.errors import ModelError
from extract.models.rope import rope_frequencies

NAME = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)

ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "architectures": ([ARCHITECTURE],),
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "auto_map": (),
}
"""Keys that would change the computation, with the values that are computed here. Absent and null mean the default.

Keys named nowhere in this file are ignored, because the reference ignores them too.
"""

TENSORS = {
    "input_layernorm.weight": ("attention_norm", "weight"),
    "self_attn.q_proj.weight": ("attention", "query", "weight"),
    "self_attn.q_proj.bias": ("attention", "query", "bias"),
    "self_attn.k_proj.weight": ("attention", "key", "weight"),
    "self_attn.k_proj.bias": ("attention", "key", "bias"),
    "self_attn.v_proj.weight": ("attention", "value", "weight"),
    "self_attn.v_proj.bias": ("attention", "value", "bias"),
    "self_attn.o_proj.weight": ("attention", "output", "weight"),
    "post_attention_layernorm.weight": ("mlp_norm", "weight"),
    "mlp.gate_proj.weight": ("mlp", "gate", "weight"),
    "mlp.up_proj.weight": ("mlp", "up", "weight"),
    "mlp.down_proj.weight": ("mlp", "down", "weight"),
}
"""Tensors of one layer, by their name after `model.layers.N.`, and their path inside `extract.models.decoder.Layer`."""


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """Translates a Qwen2 `config.json`.

    Raises:
        ModelError: A key is missing, or has a value that the decoder here does not compute.
    """
    _check(raw)
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    return DecoderConfig(
        family=NAME,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw["num_key_value_heads"] or heads,
        head_dim=head_dim,
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope_frequencies=rope_frequencies(raw, head_dim),
        max_positions=raw.get("max_position_embeddings", 32_768),
        tied=bool(raw.get("tie_word_embeddings", False)),
        windows=_windows(raw),
    )


def tensor_paths(config: DecoderConfig) -> dict[str, tuple[str | int, ...]]:
    """Returns, for every tensor of the checkpoint, its path in `extract.models.decoder.Decoder`."""
    paths: dict[str, tuple[str | int, ...]] = {
        "model.embed_tokens.weight": ("embedding",),
        "model.norm.weight": ("final_norm", "weight"),
    }
    for layer in range(config.layers):
        paths |= {f"model.layers.{layer}.{name}": ("layers", layer, *path) for name, path in TENSORS.items()}
    if not config.tied:
        paths["lm_head.weight"] = ("head", "weight")
    return paths


def tensor_copies(config: DecoderConfig) -> dict[str, str]:
    """Returns tensors that a checkpoint may hold although they only repeat another: a tied head."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}


def _check(raw: Mapping[str, Any]) -> None:
    problems = [f"found no {key}; expected a number; add it to config.json" for key in REQUIRED if key not in raw]
    for key, allowed in ONLY_VALUES.items():
        value = raw.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "no such key"
            problems.append(f"found {key} {value!r}; expected {expected}; use a checkpoint without it")
    if problems:
        raise ModelError(f"this {NAME} config.json cannot be computed here:\n" + "\n".join(problems))
    hidden, heads, kv_heads = raw["hidden_size"], raw["num_attention_heads"], raw["num_key_value_heads"]
    if kv_heads and heads % kv_heads:
        raise ModelError(
            f"found num_attention_heads {heads} and num_key_value_heads {kv_heads}; "
            "expected the first to be a multiple of the second; correct config.json"
        )
    if not raw.get("head_dim") and hidden % heads:
        raise ModelError(
            f"found hidden_size {hidden} and num_attention_heads {heads} without head_dim; "
            "expected the first to be a multiple of the second; add head_dim to config.json"
        )


def _windows(raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or, in files before it, `max_window_layers`."""
    layers = raw["num_hidden_layers"]
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != layers:
        raise ModelError(
            f"found layer_types with {len(types)} entries{f' and unknown {unknown}' if unknown else ''}; "
            f"expected {layers} entries, each full_attention or sliding_attention; correct config.json"
        )
    if window is None and "sliding_attention" in types:
        raise ModelError(
            "found sliding_attention in layer_types, but use_sliding_window is false or sliding_window is null; "
            "expected both to agree; correct config.json"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
