"""The frequencies of rotary positions, from a HuggingFace configuration: every scaling that changes them.

Understands both spellings: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (transformers 5). The
reference is `transformers.modeling_rope_utils` of transformers 5; all arithmetic on frequencies is float32, as there.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from extract.models.config import Rope
from extract.models.errors import ModelError
from extract.models.kinds import POSITIVE, SWITCH, is_number

Frequencies = Float32[np.ndarray, " pair"]

ORIGINAL = "original_max_position_embeddings"

THETA = 10_000.0
"""What every family here takes where `config.json` names no `rope_theta`, but for Gemma 3."""


class _Plain(NamedTuple):
    """What a scaling starts from.

    Attributes:
        frequencies: Without scaling.
        theta: Their base.
        longest: `max_position_embeddings`.
    """

    frequencies: Frequencies
    theta: float
    longest: int


def read_rope(raw: Mapping[str, Any], head_dim: int, *, theta: float = THETA) -> Rope:
    """Returns how positions turn queries and keys.

    Args:
        raw: `config.json`, with `max_position_embeddings`.
        head_dim: Width of one head.
        theta: Where `raw` names none.

    Raises:
        ModelError: The rope type is not supported, a parameter is unknown or missing, or the spellings disagree.
    """
    kind, found_theta, parameters = _spelled(raw)
    base = np.float32(theta if found_theta is None else found_theta)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = _Plain(np.float32(1) / base**exponents, float(base), raw["max_position_embeddings"])
    return _SCALINGS[kind].scale(plain, parameters)


def stretched_positions(raw: Mapping[str, Any]) -> int | None:
    """Returns the longest sequence that yarn is for, where that is more than `max_position_embeddings`; None elsewhere.

    Whoever adds yarn to a `config.json` often leaves that key as it was. torch computes any position with the same
    frequencies; they are meant for `factor` times the original length, which `raw` has to name.

    Raises:
        ModelError: as in `read_rope`.
    """
    kind, _, parameters = _spelled(raw)
    if kind != "yarn" or ORIGINAL not in parameters:
        return None
    stretched = int(parameters["factor"] * parameters[ORIGINAL])
    return stretched if stretched > raw["max_position_embeddings"] else None


def _spelled(raw: Mapping[str, Any]) -> tuple[str, float | None, dict[str, Any]]:
    """The type, the base and the other parameters, whichever spelling says them."""
    new, old = (_given(raw.get(key)) for key in ("rope_parameters", "rope_scaling"))
    said = (new.pop("rope_theta", None), old.pop("rope_theta", None), raw.get("rope_theta"))
    thetas = {float(theta) for theta in said if theta is not None and POSITIVE.fits(theta)}
    kinds = [source.pop(key) for source in (new, old) for key in ("rope_type", "type") if key in source]
    problems = [
        f"found rope_theta {theta!r}; expected a positive number; correct config.json"
        for theta in said
        if theta is not None and not POSITIVE.fits(theta)
    ]
    if len(thetas) > 1:
        problems.append(
            f"found rope_theta {' and '.join(map(str, sorted(thetas)))} in one config.json; expected one value; "
            "remove either the top-level rope_theta or the one in rope_parameters"
        )
    if new and old and new != old:
        problems.append(
            f"found rope_parameters {new} and rope_scaling {old}; expected both to say the same; remove one of them"
        )
    kind = kinds[0] if kinds else "default"
    if any(other != kind for other in kinds) or not isinstance(kind, str) or kind not in _SCALINGS:
        why = "; frequencies of longrope differ with the longest text of a batch" if "longrope" in kinds else ""
        problems.append(
            f"found rope type {', '.join(sorted(set(map(repr, kinds))))}; expected one of {', '.join(_SCALINGS)}{why}; "
            "use a checkpoint with one of these"
        )
    else:
        problems += _SCALINGS[kind].problems(kind, new | old)
    if problems:
        raise ModelError("\n".join(problems))
    top = raw.get(ORIGINAL) if ORIGINAL in _SCALINGS[kind].optional else None  # the reference believes this one first
    return kind, next(iter(thetas), None), new | old | ({} if top is None else {ORIGINAL: top})


def _given(parameters: Any) -> dict[str, Any]:
    """The parameters that are not null; partial_rotary_factor of 1 says what is done without it."""
    if not isinstance(parameters, Mapping | None):
        raise ModelError(f"found rope parameters {parameters!r}; expected an object; correct config.json")
    given = {key: value for key, value in (parameters or {}).items() if value is not None}
    return {
        key: value
        for key, value in given.items()
        if not (key == "partial_rotary_factor" and is_number(value) and value == 1)
    }


class _Scaling(NamedTuple):
    """One rope type: the parameters it has, and what it makes of the plain frequencies."""

    required: frozenset[str]
    optional: frozenset[str]
    scale: Callable[[_Plain, Mapping[str, Any]], Rope]

    def problems(self, kind: str, parameters: Mapping[str, Any]) -> list[str]:
        found = []
        if missing := sorted(self.required - parameters.keys()):
            found.append(f"found rope type {kind!r} without {', '.join(missing)}; expected numbers; add to config.json")
        if unknown := sorted(parameters.keys() - self.required - self.optional):
            known = ", ".join(["rope_type", "rope_theta", *sorted(self.required | self.optional)])
            found.append(
                f"found rope parameters {', '.join(unknown)} of type {kind!r}; expected only {known}; "
                "use a checkpoint without them"
            )
        kinds = {key: SWITCH if key in _SWITCHES else POSITIVE for key in self.required | self.optional}
        return found + [
            f"found rope parameter {key} {value!r}; expected {kinds[key].expected}; correct config.json"
            for key, value in parameters.items()
            if key in kinds and not kinds[key].fits(value)
        ]


def _rope(frequencies: Frequencies, factor: float = 1.0, positions: int | None = None) -> Rope:
    return Rope(tuple(float(frequency) for frequency in frequencies.astype(np.float32)), factor, positions)


def _default(plain: _Plain, _: Mapping[str, Any]) -> Rope:
    return _rope(plain.frequencies)


def _linear(plain: _Plain, parameters: Mapping[str, Any]) -> Rope:
    """Positions count for less: https://arxiv.org/abs/2306.15595."""
    return _rope(plain.frequencies / np.float32(parameters["factor"]))


def _dynamic(plain: _Plain, _: Mapping[str, Any]) -> Rope:
    """Plain frequencies up to the longest sequence, and none beyond.

    torch stretches them there by the longest text of the batch, and keeps that for later batches: the values of one
    text then depend on its neighbours, which rows of a store must not.
    """
    return _rope(plain.frequencies, positions=plain.longest)


def _llama3(plain: _Plain, parameters: Mapping[str, Any]) -> Rope:
    """Long waves are stretched by `factor`, short ones are not, those between in part."""
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise ModelError(
            f"found low_freq_factor {low} and high_freq_factor {high}; expected the first to be the smaller; correct "
            "config.json"
        )
    original = parameters.get("original_max_position_embeddings", plain.longest)
    frequencies = plain.frequencies
    waves = np.float32(2 * math.pi) / frequencies
    share = (original / waves - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    stretched = np.where(waves > original / low, frequencies / factor, frequencies)
    return _rope(np.where((waves <= original / low) & (waves >= original / high), between, stretched))


def _yarn(plain: _Plain, parameters: Mapping[str, Any]) -> Rope:
    """Long waves are stretched, short ones are not, and attention is sharpened: https://arxiv.org/abs/2309.00071.

    `factor` is taken as it is said. transformers 4 put `max_position_embeddings / original_max_position_embeddings` in
    its place where both were said; transformers 5 does not.
    """
    factor = parameters["factor"]
    original = parameters.get("original_max_position_embeddings", plain.longest)
    pairs = len(plain.frequencies)

    def pair_turning(times: int | float) -> float:
        """The pair of dimensions that turns so often within the original length."""
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(plain.theta)

    first, last = pair_turning(parameters.get("beta_fast", 32)), pair_turning(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = np.arange(pairs, dtype=np.float32) - np.float32(first)
    share = np.clip(ramp / np.float32(last - first if last != first else 0.001), 0, 1)
    frequencies = plain.frequencies / np.float32(factor) * share + plain.frequencies * (1 - share)
    return _rope(frequencies, _yarn_sharpness(factor, parameters))


def _yarn_sharpness(factor: int | float, parameters: Mapping[str, Any]) -> float:
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if factor <= 1:
        return 1.0
    if above and below:
        return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


_NONE: frozenset[str] = frozenset()
_FACTOR = frozenset({"factor"})
_SWITCHES = frozenset({"truncate", "finetuned"})  # the second says how the weights came to be, and nothing more
_YARN = frozenset({ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", *_SWITCHES})
_SCALINGS = {
    "default": _Scaling(_NONE, _NONE, _default),
    "linear": _Scaling(_FACTOR, _NONE, _linear),
    "dynamic": _Scaling(_FACTOR, _NONE, _dynamic),
    "yarn": _Scaling(_FACTOR, _YARN, _yarn),
    "llama3": _Scaling(_FACTOR | {"low_freq_factor", "high_freq_factor"}, frozenset({ORIGINAL}), _llama3),
}
