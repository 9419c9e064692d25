"""From a GGUF file to a HuggingFace folder: weights, configuration and tokenizer, with numpy alone.

Only what the demo needs, and everything else is refused: the `llama` architecture without rope scaling, and the
byte-level BPE tokenizer that llama.cpp calls `smollm`.

The folder describes the model as Qwen2. Qwen2 is Llama plus biases on q, k and v; with biases of zero the two are the
same function, and one well-tested family serves both.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from actstore.errors import InputError

Progress = Callable[[str, int, int], None]

_WHOLE_MODEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BIASED = ("attn_q", "attn_k", "attn_v")
_CONTROL_TOKEN = 3  # LLAMA_TOKEN_TYPE_CONTROL in llama.h


def convert_gguf(source: Path, target: Path, *, progress: Progress | None = None) -> None:
    """Writes the model in the GGUF file `source` as a HuggingFace folder at `target`.

    The folder gets `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json` (with the chat
    template), and opens with any reader of such folders as a `Qwen2ForCausalLM` with a tied head.

    Weights are float32: a block-quantised weight is a float16 scale times an integer of up to 8 bits, which neither
    float16 nor bfloat16 can hold. On SmolLM2-135M no quantised tensor survived a trip through either. SmolLM2's
    file is thus 538 MB, 5.5 times the GGUF; converting it takes 5 s and 0.9 GB of memory.

    transformers 5 trap: its `AutoTokenizer` replaces the tokenizer of any folder of type `qwen2` with Qwen's splitting
    rules, without a word, and other tokens come out. Use `tokenizers.Tokenizer.from_file` or `PreTrainedTokenizerFast`.

    Args:
        source: A GGUF file of the `llama` architecture.
        target: A folder; made if missing. Files of these names in it are overwritten.
        progress: Called as `progress(label, done, total)` after each tensor.

    Raises:
        InputError: The file is of another architecture, or has a tensor, rope scaling or tokenizer that this
            converter does not know. Nothing was written.
    """
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    tokenizer = _tokenizer(fields)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weights.update(_renamed(tensor.name, values, config))
        if progress is not None:
            progress(f"converting {tensor.name}", done, len(reader.tensors))
    target.mkdir(parents=True, exist_ok=True)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "config.json", config)
    _write_json(target / "tokenizer_config.json", _tokenizer_config(fields))


def undo_rope_permutation(
    weight: Float[np.ndarray, "head_hidden hidden"], *, heads: int
) -> Float[np.ndarray, "head_hidden hidden"]:
    """Gives the rows of a q or k projection in HuggingFace's order.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), ... of a head, HuggingFace rotates row i with row i + half.
    Its converter therefore interleaves the two halves of each head; this puts them back. Nothing fails if it is
    forgotten: the model merely talks nonsense.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    _expect(fields, "general.architecture", "llama")
    _expect(fields, "llama.rope.scaling.type", None, "none")
    heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    _expect(fields, "llama.rope.dimension_count", None, hidden // heads)
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _shortest(value: float) -> float:
    """The decimal that was meant: GGUF keeps float32, so 1e-5 would come back as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _renamed(
    name: str, values: Float[np.ndarray, "..."], config: dict[str, Any]
) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    if name in _WHOLE_MODEL:
        yield _WHOLE_MODEL[name], values
        return
    prefix, layer, kind = (*name.split("."), "", "")[:3]
    if prefix != "blk" or kind not in _PER_LAYER or not name.endswith(".weight"):
        raise InputError(
            f"The GGUF file has a tensor {name!r}; expected the tensors of a plain Llama with a tied head. "
            "This converter serves the demo's model only: take the model's HuggingFace folder instead."
        )
    if kind in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
        values = undo_rope_permutation(values, heads=heads)
    module = f"model.layers.{layer}.{_PER_LAYER[kind]}"
    yield f"{module}.weight", values
    if kind in _BIASED:
        yield f"{module}.bias", np.zeros(len(values), np.float32)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    _expect(fields, "tokenizer.ggml.model", "gpt2")
    _expect(fields, "tokenizer.ggml.pre", "smollm")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's `smollm`: split off every digit, then GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL_TOKEN]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }


def _expect(fields: dict[str, Any], name: str, *accepted: object) -> None:
    if fields.get(name) not in accepted:
        wanted = " or ".join("none" if value is None else repr(value) for value in accepted)
        raise InputError(
            f"The GGUF file has {fields.get(name)!r} in {name!r}; expected {wanted}. "
            "This converter serves the demo's model only: take the model's HuggingFace folder instead."
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
