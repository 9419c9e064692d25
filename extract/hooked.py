"""The interface of the scripts that came before: a model with hooks, its parameters apart, activations by layer name.

The same values as everywhere else in `extract`; `docs/how-to/from-the-old-scripts.md` has the counterpart of each call.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from extract.models import Model, ModelError, Params, Tap, check_taps, default_layers, load_model
from extract.models.checkpoint import read_json
from extract.models.config import DecoderConfig
from extract.models.decoder import Decoder
from extract.models.families import family_of
from extract.models.generate import generate
from extract.models.kinds import shown
from extract.models.model import FINAL, activation_name
from extract.positions import HostOrDevice, Mask, real_tokens

Activations = dict[str, Float[Array, "batch sequence hidden"]]


@dataclasses.dataclass(frozen=True, eq=False)
class HookedModel:
    """The structure of a model without its parameters, and the layers whose activations it returns.

    Attributes:
        config: Its shape.
        graph: Structure of the decoder.
        layers: Whose residual streams `apply` returns.
    """

    config: DecoderConfig
    graph: nnx.GraphDef[Decoder]
    layers: tuple[int, ...]

    def init(self, key: Array, input_ids: Int[HostOrDevice, "batch sequence"]) -> Params:
        """Returns fresh random parameters in float32. The shape of `input_ids` decides nothing.

        Args:
            key: A key of `jax.random`.
            input_ids: Any batch of tokens; kept for the sake of old scripts.

        Raises:
            ModelError: A token of it does not exist in this model.
        """
        if input_ids.size and int(input_ids.max()) >= self.config.vocab_size:
            raise ModelError(
                f"found token {int(input_ids.max())}; expected 0 to {self.config.vocab_size - 1}; "
                "use the tokenizer of this model"
            )
        return nnx.split(Decoder(self.config, rngs=nnx.Rngs(key)))[1]

    def load(self, folder: str | Path, *, dtype: str = "float32") -> Params:
        """Returns the weights of a HuggingFace folder, every tensor of them.

        Raises:
            ModelError: The folder is of another model, or not what its family expects.
        """
        loaded = load_model(folder, dtype=dtype)
        ours, theirs = (dataclasses.asdict(config) for config in (self.config, loaded.config))
        if other := [_difference(name, theirs[name], ours[name]) for name in ours if ours[name] != theirs[name]]:
            raise ModelError(
                f"found weights of another model in {folder} ({'; '.join(other)}); expected the same config; "
                "give create_model_with_hooks this folder"
            )
        return loaded.params

    def apply(
        self,
        params: Params,
        input_ids: Int[HostOrDevice, "batch sequence"],
        *,
        attention_mask: Mask | None = None,
        return_activations: bool = False,
    ) -> Float[Array, "batch sequence vocabulary"] | tuple[Float[Array, "batch sequence vocabulary"], Activations]:
        """Returns logits and, if asked, activations, as `extract.models.Model.apply` does.

        Args:
            params: From `init` or `load`.
            input_ids: Tokens.
            attention_mask: 1 for tokens, 0 for padding, left or right. None: there is no padding. Values at padding
                are garbage.
            return_activations: Return `(logits, {"layer_12": ..., "layer_24_norm": ...})`.
        """
        return _apply(self._with(params), input_ids, attention_mask, self.layers, return_activations=return_activations)

    def _with(self, params: Params) -> Model:
        dtype = str(jax.tree.leaves(params)[0].dtype)
        # It stays in this module: nobody stores the name and digest of weights that came from anywhere.
        return Model(self.config.family, self.config, self.graph, params, dtype, "", self.config.digest())


def create_model_with_hooks(
    config: Mapping[str, Any] | str | Path, layers_to_extract: Sequence[int] | None = None
) -> HookedModel:
    """Returns a model whose `apply` gives activations by layer name. It has no parameters yet: `init` or `load` them.

    Args:
        config: What `config.json` of a HuggingFace model holds, or the folder that holds it.
        layers_to_extract: Whose residual streams to return; None for 6, 12, 18 and 23, or quarters of a model with
            fewer layers.

    Raises:
        ModelError: The configuration is not that of a supported family, or a layer does not exist.

    Example:
        >>> import jax, extract
        >>> model = extract.create_model_with_hooks(extract.model_folder("tiny-qwen2"), layers_to_extract=[2])
        >>> ids = jax.numpy.ones((1, 5), int)
        >>> logits, activations = model.apply(model.init(jax.random.key(0), ids), ids, return_activations=True)
        >>> {name: value.shape for name, value in activations.items()}
        {'layer_2': (1, 5, 128), 'layer_4_norm': (1, 5, 128)}
    """
    raw = config if isinstance(config, Mapping) else _read_config(Path(config))
    read = family_of(raw).read_config(raw)
    layers = default_layers(read.layers) if layers_to_extract is None else tuple(layers_to_extract)
    check_taps(read, [Tap("resid_post", layer) for layer in layers])
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(read, rngs=nnx.Rngs(0))))
    return HookedModel(read, graph, layers)


def generate_with_layer_activations(
    model: HookedModel | Model,
    params: Params,
    input_ids: Int[HostOrDevice, "batch sequence"],
    *,
    max_tokens: int = 50,
    layers_to_extract: Sequence[int] | None = None,
    return_all_step_activations: bool = False,
    attention_mask: Mask | None = None,
) -> tuple[Int[Array, "batch more"], dict[str, Float[Array, "batch more hidden"]], list[dict[str, Any]]]:
    """Continues every row greedily by `max_tokens` tokens, and returns activations.

    `extract.generate` is the same with sampling and stop tokens. The tokens are computed with a cache of keys and
    values, then one forward pass over all of them gives the activations.

    Args:
        model: Its structure.
        params: Its parameters.
        input_ids: Prompts.
        max_tokens: Tokens to add to each row.
        layers_to_extract: Whose residual streams to return; None for those of the model, or `default_layers`.
        return_all_step_activations: Fill the third result.
        attention_mask: 1 for tokens, 0 for padding, left or right. None: there is no padding.

    Returns:
        The ids, prompts included: `[batch, sequence + max_tokens]`. Rows that were padded on the right are padded on
        the left here, so that the last column is always a real token.
        The activations of all of them, `{"layer_12": [batch, sequence + max_tokens, hidden], ...,
        "layer_24_norm": ...}`.
        For each step `{"step", "activations", "seq_len"}`: `[batch, 1, hidden]` at the token from which the new one was
        predicted, and the columns that were there. Empty unless asked for.

    Raises:
        ModelError: A layer does not exist, a row is empty or too long, or a mask has holes.
    """
    chosen = model.layers if isinstance(model, HookedModel) else default_layers(model.config.layers)
    layers = chosen if layers_to_extract is None else tuple(layers_to_extract)
    loaded = model._with(params) if isinstance(model, HookedModel) else dataclasses.replace(model, params=params)
    taps = [*(Tap("resid_post", layer) for layer in layers), FINAL]
    ids = np.asarray(input_ids)
    prompts = [row[real] for row, real in zip(ids, real_tokens(ids.shape, attention_mask), strict=True)]
    found = generate(loaded, prompts, max_tokens=max_tokens, taps=taps if return_all_step_activations else ())
    width = ids.shape[1]
    longer = np.zeros((len(ids), width + max_tokens), np.int32)
    mask = np.zeros(longer.shape, np.int32)
    for row, (prompt, tokens) in enumerate(zip(prompts, found.tokens, strict=True)):
        longer[row, width - len(prompt) :] = np.concatenate([prompt, tokens])
        mask[row, width - len(prompt) :] = 1
    activations = loaded.activations(longer, segment_ids=mask, positions=_places(mask.astype(bool)), layers=layers)
    names = {tap: activation_name(tap, loaded.config) for tap in found.activations}
    steps = [
        {
            "step": step,
            "activations": {names[tap]: values[:, step : step + 1] for tap, values in found.activations.items()},
            "seq_len": width + step,
        }
        for step in range(max_tokens if return_all_step_activations else 0)
    ]
    return jnp.asarray(longer), activations, steps


def _apply(
    model: Model,
    input_ids: Int[HostOrDevice, "batch sequence"],
    attention_mask: Mask | None,
    layers: tuple[int, ...],
    *,
    return_activations: bool,
) -> Float[Array, "batch sequence vocabulary"] | tuple[Float[Array, "batch sequence vocabulary"], Activations]:
    real = real_tokens(input_ids.shape, attention_mask)
    return model.apply(
        model.params, input_ids, segment_ids=real.astype(np.int32), positions=_places(real), layers=layers,
        return_activations=return_activations,
    )  # fmt: skip


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """What differs between two values of a configuration; of frequencies and windows of layers the first that do."""
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours):
        places = [place for place, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]]
        more = f" and {len(places) - 1} more of {name}" if len(places) > 1 else ""
        return _difference(f"{name}[{places[0]}]", theirs[places[0]], ours[places[0]]) + more
    return f"{name} {shown(theirs)}, here {shown(ours)}"


def _places(real: Bool[np.ndarray, "batch sequence"]) -> Int[np.ndarray, "batch sequence"]:
    """The position of each real token in its row, from 0."""
    return np.maximum(np.cumsum(real, axis=1) - 1, 0)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"found no config.json in {folder}; expected a HuggingFace model folder; check the path, or pass the "
            "configuration as a dictionary"
        )
    return read_json(folder / "config.json")
