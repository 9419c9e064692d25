"""How a family reads: its `config.json` into a `DecoderConfig`, and its tensors into parameters. Families are data."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from extract.models.config import Activation, DecoderConfig
from extract.models.errors import ModelError
from extract.models.kinds import COUNT, POSITIVE, SWITCH, WHOLE, WORDS, Kind, is_number, shown
from extract.models.rope_scaling import ORIGINAL, read_rope, stretched_positions
from extract.models.stored import HEAD, LAYER_TENSORS, TENSORS, Stored, TensorPath

Raw: TypeAlias = Mapping[str, Any]
Fields: TypeAlias = dict[str, Any]

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
KINDS: dict[str, Kind] = {
    **dict.fromkeys(REQUIRED, WHOLE),
    **dict.fromkeys(
        ("max_position_embeddings", "head_dim", "sliding_window", "sliding_window_pattern", "n_inner"), WHOLE
    ),
    "max_window_layers": COUNT,
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar", "rope_theta", "rope_local_base_freq"), POSITIVE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", ORIGINAL), POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), SWITCH),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx"), SWITCH),
    "layer_types": WORDS,
}
"""What a key must be, in any family that has it. The parameters of a rope are checked where they are read."""

NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys of which null says something. Null in any other is as if the key were absent."""

EMPTY = ("quantization_config", "auto_map")
"""Keys of which an empty object says as much as null."""

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}

ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "use_mrope": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "auto_map": (),
    "is_causal": (True,),
}
"""Keys that change the computation in any family, with the values that are computed. Absent and null are the default.

Keys that neither this nor the family's file names are ignored, because the reference ignores them too.
"""

REMEDIES = {"quantization_config": "use a checkpoint that is not quantised: float32, float16 or bfloat16"}
"""What to do about a key with another value, where it is not to use a checkpoint without it."""

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""What transformers calls them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        name: `model_type` of its `config.json`.
        architecture: The class of transformers that is the reference.
        parts: What reads the configuration, with `defaults` in it: each gives some fields of `DecoderConfig`; a later
            one has the last word.
        only_values: Keys that change the computation, with the values that are computed, as in `ONLY_VALUES`.
        defaults: Of keys that may be absent, those of the reference.
        renamed: Keys that the family calls otherwise than others.
        tensors: Names of tensors and the parameters they are, `embedding` for one.
        layer_prefix: Begins the names of a layer's tensors; `{}` is its number.
        layer_tensors: Names of a layer's tensors after that, and their parameters inside the layer. Several with `+`
            between lie in one tensor; a leading `T:` says that it is transposed: see `Stored.read`.
        optional_prefix: Begins all names but that of the head, or none.
        ignored: Expression for names of tensors that are no weights, and are not even read.
    """

    name: str
    architecture: str
    parts: tuple[Callable[[Raw], Fields], ...]
    only_values: Mapping[str, tuple[Any, ...]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: TENSORS)
    layer_prefix: str = "model.layers.{}."
    layer_tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: LAYER_TENSORS)
    optional_prefix: str = ""
    ignored: str = r".*\.rotary_emb\.inv_freq"

    def read_config(self, raw: Raw) -> DecoderConfig:
        """Translates a `config.json`.

        Raises:
            ModelError: Keys are missing, or have values that the decoder here does not compute; names all of them.
        """
        ours = {self.renamed.get(key, key): value for key, value in raw.items()}
        given = {key: value for key, value in ours.items() if key in NULLABLE or _says_something(key, value)}
        complete = DEFAULTS | dict(self.defaults) | given
        wrong_kinds = self._wrong_kinds(complete)
        problems = wrong_kinds + self._wrong_values(complete)
        fields: Fields = {"family": self.name}
        for part in () if wrong_kinds else self.parts:
            try:
                fields |= part(complete)
            except ModelError as error:
                problems.append(str(error))
        if problems:
            raise ModelError(f"this {self.name} config.json cannot be computed here:\n" + "\n".join(problems))
        return DecoderConfig(**fields)

    def stored_tensors(self, layers: int, parameters: Collection[TensorPath]) -> dict[str, Stored]:
        """Returns, for every tensor that a checkpoint of a model with `parameters` must have, what it holds."""
        stored = {name: Stored.read(form) for name, form in {**self.tensors, HEAD: "head/weight"}.items()}
        for layer in range(layers):
            prefix = self.layer_prefix.format(layer)
            inside: TensorPath = ("layers", layer)
            stored |= {prefix + name: Stored.read(form, inside=inside) for name, form in self.layer_tensors.items()}
        return {name: tensor for name, tensor in stored.items() if set(tensor.paths) <= set(parameters)}

    def tensor_copies(self, config: DecoderConfig) -> dict[str, str]:
        """Returns tensors that a checkpoint may hold although they only repeat another: a tied head."""
        embedding = next(name for name, form in self.tensors.items() if form == "embedding")
        return {HEAD: embedding} if config.tied else {}

    def spelled(self, names: Collection[str]) -> dict[str, str]:
        """Returns the name here of each tensor by its name in a checkpoint."""
        known = (self.optional_prefix, HEAD)
        return {name: name if name.startswith(known) else self.optional_prefix + name for name in names}

    def _wrong_values(self, raw: Raw) -> list[str]:
        problems = []
        for key, allowed in {**ONLY_VALUES, "architectures": ([self.architecture],), **self.only_values}.items():
            value = raw.get(key)
            # Python's 0 equals false and its true equals 1.0: a value of another kind is another value.
            if value is not None and not any(value == each and is_number(value) == is_number(each) for each in allowed):
                expected = " or ".join(map(repr, allowed)) or "no such key"
                remedy = REMEDIES.get(key, "use a checkpoint without it")
                problems.append(f"found {self._key(key)} {shown(value)}; expected {expected}; {remedy}")
        return problems

    def _wrong_kinds(self, raw: Raw) -> list[str]:
        missing = [key for key in REQUIRED if key not in raw]
        problems = [f"found no {self._key(key)}; expected a number; add it to config.json" for key in missing]
        only = {**ONLY_VALUES, **self.only_values}
        return problems + [
            f"found {self._key(key)} {shown(raw[key])}; expected {kind.expected}; correct config.json"
            for key, kind in KINDS.items()
            if key not in only and raw.get(key) is not None and not kind.fits(raw[key])
        ]

    def _key(self, key: str) -> str:
        """What the family calls a key."""
        return next((theirs for theirs, ours in self.renamed.items() if ours == key), key)


def _says_something(key: str, value: Any) -> bool:
    return value is not None and not (key in EMPTY and value == {})


def shape(raw: Raw) -> Fields:
    """Sizes, norms, the head; attention that sees everything before."""
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
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw["intermediate_size"],
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_dim": head_dim(raw),
        "norm_epsilon": float(raw["rms_norm_eps"]),
        "max_positions": raw["max_position_embeddings"],
        "tied": raw["tie_word_embeddings"],
        "windows": (None,) * raw["num_hidden_layers"],
    }


def rope(raw: Raw) -> Fields:
    """One rotation in all layers."""
    found = read_rope(raw, head_dim(raw))
    return {
        "rope_frequencies": found.frequencies,
        "rope_factor": found.factor,
        "rope_positions": found.positions,
        "stretched_positions": stretched_positions(raw),
    }


def attention_bias(raw: Raw) -> Fields:
    """The key `attention_bias`: on queries, keys, values and output."""
    bias = raw.get("attention_bias", False)
    return {"projection_bias": bias, "output_bias": bias}


def head_dim(raw: Raw) -> int:
    """Width of a head: what the key says, or an equal share of the hidden size."""
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def windows_by_type(raw: Raw, types: Collection[str], window: int | None, why: str) -> Fields:
    """The window of each layer by its type.

    Args:
        raw: The configuration.
        types: One for each layer.
        window: Of layers of sliding attention.
        why: There may be none.

    Raises:
        ModelError: Types are unknown, too many or too few, or there is no window for them.
    """
    layers = raw["num_hidden_layers"]
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != layers:
        raise ModelError(
            f"found layer_types with {len(types)} entries{f' and unknown {unknown}' if unknown else ''}; "
            f"expected {layers} entries, each full_attention or sliding_attention; correct config.json"
        )
    if window is None and "sliding_attention" in types:
        raise ModelError(
            f"found sliding_attention in layer_types, but {why}; expected both to agree; correct config.json"
        )
    return {"windows": tuple(window if kind == "sliding_attention" else None for kind in types)}
