"""A loaded model: its shape, its parameters and its fingerprints."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from extract.models.config import DecoderConfig
from extract.models.decoder import Decoder
from extract.models.sites import Tap, check_taps, default_layers

Params = nnx.State[Any, Any]
"""The weights of a decoder: a pytree, to be placed on devices and passed through `jax.jit` like any other."""

FINAL = Tap("final_norm", None)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A decoder with its weights. Weight processing is none: values are those of the checkpoint.

    Attributes:
        name: Name of the folder it was loaded from, or on a hub.
        config: Its shape.
        graph: Structure of the `Decoder`; `nnx.merge(model.graph, params)` makes the module again.
        params: Its weights, in `dtype`.
        dtype: "float32" or "bfloat16"; norms, softmax and rotary positions are float32 in either.
        weights_digest: sha256 over the tensors as stored, before conversion to `dtype`.
        config_digest: sha256 over `config`.
        mesh: The devices that the parameters lie on, with the axes `data` and `model`; None: one device.
        attention: Name of the kernel that computes attention, of `extract.models.kernels`.
        revision: Commit on a hub that it was loaded from; None: a folder that says nothing of one.
    """

    name: str
    config: DecoderConfig
    graph: nnx.GraphDef[Decoder]
    params: Params
    dtype: str
    weights_digest: str
    config_digest: str
    mesh: Mesh | None = None
    revision: str | None = None
    attention: str = "chunked"

    @property
    def platform(self) -> str:
        """Kind of the devices that the parameters lie on: "cpu", "gpu" or "tpu"."""
        (first, *_) = jax.tree.leaves(self.params)
        return next(iter(first.devices())).platform

    def apply(
        self,
        params: Params,
        input_ids: Int[Array | np.ndarray, "batch sequence"],
        *,
        segment_ids: Int[Array | np.ndarray, "batch sequence"] | None = None,
        positions: Int[Array | np.ndarray, "batch sequence"] | None = None,
        return_activations: bool = False,
        layers: tuple[int, ...] | None = None,
    ) -> (
        Float[Array, "batch sequence vocabulary"]
        | tuple[Float[Array, "batch sequence vocabulary"], dict[str, Float[Array, "batch sequence hidden"]]]
    ):
        """Returns float32 logits and, if asked, activations: a convenience for notebooks and small batches.

        Attention is the portable one, whatever `attention` is: that is of `extract.forward.make_forward`.
        Runs the whole model and returns whole sequences; `extract.forward.make_forward` stops early and returns only
        the rows that are kept. Compiles once for each shape and choice of layers.

        Args:
            params: `model.params`, or others of the same shape.
            input_ids: Tokens; shorter sequences are padded on the right, or anywhere with `segment_ids` 0.
            segment_ids: 1 and up for the documents of a packed row, 0 for padding. None: each row is one document.
            positions: Of each token in its segment. None: from 0 in each row.
            return_activations: Return `(logits, activations)`. The activations are `"layer_12"` for the residual
                stream after layer 12 and `"layer_24_norm"` for the final norm of a model of 24 layers.
            layers: Which layers; None for `default_layers`.

        Raises:
            ModelError: A layer does not exist.
        """
        chosen = default_layers(self.config.layers) if layers is None else layers
        taps = tuple(Tap("resid_post", layer) for layer in chosen) if return_activations else ()
        check_taps(self.config, taps)
        if segment_ids is None:
            segment_ids = jnp.ones_like(input_ids)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        logits, *values = _run(self.graph, params, input_ids, segment_ids, positions, taps)
        return (logits, self._named(taps, values)) if return_activations else logits

    def activations(
        self,
        input_ids: Int[Array | np.ndarray, "batch sequence"],
        *,
        segment_ids: Int[Array | np.ndarray, "batch sequence"],
        positions: Int[Array | np.ndarray, "batch sequence"],
        layers: tuple[int, ...],
    ) -> dict[str, Float[Array, "batch sequence hidden"]]:
        """Returns the activations that `apply` gives, without logits: these may be a hundred times as large.

        Args:
            input_ids: As in `apply`.
            segment_ids: As in `apply`.
            positions: As in `apply`.
            layers: Which layers.
        """
        taps = tuple(Tap("resid_post", layer) for layer in layers)
        check_taps(self.config, taps)
        values = _run(self.graph, self.params, input_ids, segment_ids, positions, taps, logits=False)
        return self._named(taps, values)

    def _named(
        self, taps: tuple[Tap, ...], values: Sequence[Float[Array, "batch sequence hidden"]]
    ) -> dict[str, Float[Array, "batch sequence hidden"]]:
        """Values at taps and, after them, at the final norm, by their names."""
        return {activation_name(tap, self.config): value for tap, value in zip((*taps, FINAL), values, strict=True)}


def activation_name(tap: Tap, config: DecoderConfig) -> str:
    """Returns what a value is called: "layer_12" after layer 12, "layer_24_norm" after the norm of 24 layers."""
    return f"layer_{config.layers}_norm" if tap == FINAL else f"layer_{tap.layer}"


@partial(jax.jit, static_argnames=("graph", "taps", "logits"))
def _run(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    token_ids: Int[Array, "batch sequence"],
    segment_ids: Int[Array, "batch sequence"],
    positions: Int[Array, "batch sequence"],
    taps: tuple[Tap, ...],
    *,
    logits: bool = True,
) -> list[Float[Array, "batch sequence _"]]:
    """Returns the logits, if asked for, the values at `taps`, and the final norm."""
    decoder = nnx.merge(graph, params)
    found = decoder.activations(token_ids, segment_ids, positions, {*taps, FINAL})
    head = [decoder.unembed(found[FINAL])] if logits else []
    return [*head, *(found[tap] for tap in (*taps, FINAL))]
