"""GPT-2. Absent keys mean what they do in `transformers.GPT2Config`."""

from extract.models.reading import ACTIVATIONS, Family, Fields, Raw, shape


def layers(raw: Raw) -> Fields:
    """LayerNorms, biases everywhere, an MLP without a gate, learned positions, and how scores are scaled."""
    count = raw["num_hidden_layers"]
    scale = (raw["hidden_size"] // raw["num_attention_heads"]) ** -0.5 if raw["scale_attn_weights"] else 1.0
    divisors = range(1, count + 1) if raw.get("scale_attn_by_inverse_layer_idx") else (1,) * count
    return {
        "intermediate_size": raw.get("n_inner") or 4 * raw["hidden_size"],
        "rope_frequencies": (),
        "learned_positions": True,
        "norm": "layer",
        "output_bias": True,
        "mlp_bias": True,
        "gated": False,
        "activation": ACTIVATIONS.get(str(raw["activation_function"])),
        "attention_scales": tuple(scale / divisor for divisor in divisors),
    }


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    parts=(shape, layers),
    # reorder_and_upcast_attn says in which precision scores are computed: here it is always float32.
    only_values={"activation_function": tuple(ACTIVATIONS), "add_cross_attention": (False,)},
    defaults={
        "intermediate_size": 1,  # never absent: n_inner may be
        "num_key_value_heads": None,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "activation_function": "gelu_new",
    },
    renamed={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
    },
    tensors={
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "position_embedding",
        "transformer.ln_f.weight": "final_norm/weight",
        "transformer.ln_f.bias": "final_norm/bias",
    },
    layer_prefix="transformer.h.{}.",
    layer_tensors={
        "ln_1.weight": "attention_norm/weight",
        "ln_1.bias": "attention_norm/bias",
        "attn.c_attn.weight": "T:attention/query/weight+attention/key/weight+attention/value/weight",
        "attn.c_attn.bias": "attention/query/bias+attention/key/bias+attention/value/bias",
        "attn.c_proj.weight": "T:attention/output/weight",
        "attn.c_proj.bias": "attention/output/bias",
        "ln_2.weight": "mlp_norm/weight",
        "ln_2.bias": "mlp_norm/bias",
        "mlp.c_fc.weight": "T:mlp/up/weight",
        "mlp.c_fc.bias": "mlp/up/bias",
        "mlp.c_proj.weight": "T:mlp/down/weight",
        "mlp.c_proj.bias": "mlp/down/bias",
    },
    optional_prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
)
