"""Rotary position embedding: frequencies from a configuration, tables from positions, and the rotation.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of the HuggingFace checkpoints: pair
`i` of a head is made of its dimensions `i` and `i + head_dim / 2`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from extract.models.errors import ModelError


class RopeTables(NamedTuple):
    """Cosine and sine of every position and pair, always float32: in bfloat16 each would be off by up to 0.4 %."""

    cosine: Float[Array, "batch sequence pair"]
    sine: Float[Array, "batch sequence pair"]


def rope_tables(frequencies: tuple[float, ...], positions: Int[Array, "batch sequence"]) -> RopeTables:
    """Returns the tables of a batch; `positions` counts tokens from the start of each segment."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return RopeTables(jnp.cos(angles), jnp.sin(angles))


def rotate(
    heads: Float[Array, "batch sequence head dim"], tables: RopeTables
) -> Float[Array, "batch sequence head dim"]:
    """Rotates queries or keys; computed in float32 and returned in the dtype of `heads`."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = tables.cosine[:, :, None], tables.sine[:, :, None]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(heads.dtype)


def rope_frequencies(config: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Returns radians per position for each pair of dimensions, from a HuggingFace configuration.

    Understands both spellings: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (transformers 5).

    Raises:
        ModelError: The rope type is not supported, a parameter is unknown, or the two spellings disagree.
    """
    rope = dict(config.get("rope_parameters") or {})
    scaling = dict(config.get("rope_scaling") or {})
    thetas = {float(theta) for theta in (rope.pop("rope_theta", None), config.get("rope_theta")) if theta is not None}
    kinds = {kind for source in (rope, scaling) for key in ("rope_type", "type") if (kind := source.pop(key, None))}
    if len(thetas) > 1:
        raise ModelError(
            f"found rope_theta {' and '.join(map(str, sorted(thetas)))} in one config.json; expected one value; "
            "remove either the top-level rope_theta or the one in rope_parameters"
        )
    if kinds - {"default"}:
        raise ModelError(
            f"found rope type {', '.join(sorted(map(repr, kinds)))}; expected 'default', the only one supported; "
            "use a checkpoint without rope scaling"
        )
    if rope or scaling:
        raise ModelError(
            f"found rope parameters {', '.join(sorted(rope | scaling))}; expected only rope_type and rope_theta; "
            "use a checkpoint without rope scaling"
        )
    theta = np.float32(thetas.pop() if thetas else 10_000.0)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return tuple(float(frequency) for frequency in np.float32(1) / theta**exponents)
