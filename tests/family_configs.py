"""Tiny configurations of every family, each with something that a loader can get wrong."""

from typing import Any

Raw = dict[str, Any]

COMMON: Raw = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def _base(model_type: str, architecture: str, **more: Any) -> Raw:
    return COMMON | {"model_type": model_type, "architectures": [architecture]} | more


QWEN2 = _base("qwen2", "Qwen2ForCausalLM", hidden_act="silu")
QWEN3 = _base("qwen3", "Qwen3ForCausalLM", hidden_act="silu", head_dim=16)
LLAMA = _base("llama", "LlamaForCausalLM", hidden_act="silu", tie_word_embeddings=False)
MISTRAL = _base("mistral", "MistralForCausalLM", hidden_act="silu", tie_word_embeddings=False)
GEMMA = _base("gemma", "GemmaForCausalLM", hidden_act="gelu_pytorch_tanh", head_dim=20, pad_token_id=None)
GEMMA2 = _base(
    "gemma2", "Gemma2ForCausalLM", hidden_activation="gelu_pytorch_tanh", head_dim=20, query_pre_attn_scalar=28,
    sliding_window=70, pad_token_id=None,
)  # fmt: skip
GEMMA3 = _base(
    "gemma3_text", "Gemma3ForCausalLM", hidden_activation="gelu_pytorch_tanh", head_dim=20, query_pre_attn_scalar=28,
    sliding_window=9, num_hidden_layers=3, sliding_window_pattern=3, pad_token_id=None,
)  # fmt: skip
GPT2: Raw = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 160,
    "activation_function": "gelu_new",
}

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
BY_LAYER_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

CONFIGS: dict[str, Raw] = {
    "llama3_rope_with_its_length_on_top": LLAMA
    | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3, "original_max_position_embeddings": 32},
    "llama_yarn_with_its_length_on_top": LLAMA | {"rope_parameters": YARN, "original_max_position_embeddings": 16},
    "qwen2": QWEN2 | {"rope_theta": 10_000.0, "rope_scaling": None},
    "qwen2_untied_v5_rope": QWEN2
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False},
    "qwen2_sliding_from_layer_1": QWEN2 | SOME_WINDOWS,
    "qwen2_sliding_by_layer_types": QWEN2
    | {"use_sliding_window": True, "sliding_window": 70, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_window_given_but_not_used": QWEN2
    | {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
    "qwen2_one_kv_head": QWEN2 | {"num_key_value_heads": 1},
    "qwen2_head_dim_wider_than_hidden": QWEN2 | {"head_dim": 32},
    "qwen2_head_dim_and_kv_heads_null": QWEN2 | {"head_dim": None, "num_key_value_heads": None},
    "qwen2_yarn_v4": QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    "qwen2_yarn_beyond_its_length": QWEN2
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}}
    | {"max_position_embeddings": 40},
    "qwen3": QWEN3,
    "qwen3_biases_untied_windows": QWEN3 | SOME_WINDOWS | {"attention_bias": True, "tie_word_embeddings": False},
    "qwen3_head_dim_absent": {key: value for key, value in QWEN3.items() if key != "head_dim"},
    "llama": LLAMA | {"rope_theta": 10_000.0},
    "llama_kv_heads_absent": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "llama_smol_tied_three_heads": LLAMA
    | {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 1e5},
    "llama_all_biases_head_dim": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama_linear_v4": LLAMA | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama_dynamic_v4": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 150},
    "llama3_v4": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "llama3_v5": LLAMA | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    "llama_yarn_v5": LLAMA | {"rope_parameters": YARN},
    "llama_yarn_mscale": LLAMA
    | {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 16.0}},
    "llama_yarn_attention_factor": LLAMA | {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_slow": 2.0}},
    "mistral_every_layer_windowed": MISTRAL | {"sliding_window": 9, "rope_theta": 1e6},
    "mistral_no_window_head_dim": MISTRAL | {"sliding_window": None, "head_dim": 20, "tie_word_embeddings": True},
    "gemma": GEMMA,
    "gemma_legacy_gelu_multi_query": GEMMA | {"hidden_act": "gelu", "num_key_value_heads": 1, "attention_bias": True},
    "gemma2": GEMMA2,
    "gemma2_layer_types_no_caps": GEMMA2
    | {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2_low_caps": GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
    "gemma3_v4": GEMMA3
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3_v5_layer_types": GEMMA3
    | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "rope_parameters": BY_LAYER_TYPE}
    | {"final_logit_softcapping": 3.0, "attention_bias": True},
    "gemma3_plain": GEMMA3,
    "gpt2": GPT2,
    "gpt2_inner_exact_gelu_untied": GPT2
    | {"n_inner": 100, "activation_function": "gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    "gpt2_scales": GPT2
    | {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
}

ONE_OF_EACH = {
    "qwen2": "qwen2",
    "qwen3": "qwen3_biases_untied_windows",
    "llama": "llama3_v4",
    "mistral": "mistral_every_layer_windowed",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_v5_layer_types",
    "gpt2": "gpt2",
}
"""A lively configuration of each family."""
