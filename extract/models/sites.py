"""Sites: the places in a decoder whose values can be kept, and the taps that ask for them."""

from collections.abc import Iterable
from typing import NamedTuple

from extract.models.config import DecoderConfig
from extract.models.errors import ModelError

LAYER_SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")
"""Sites that every layer has, in the order in which a layer computes them."""

LAYERLESS_SITES = ("embed", "final_norm")
"""Sites that a decoder has once: before the first layer and after the last."""


class Tap(NamedTuple):
    """One site of one layer: `Tap("resid_post", 12)`; `Tap("embed", None)` and `Tap("final_norm", None)`."""

    site: str
    layer: int | None


def site_widths(config: DecoderConfig) -> dict[str, int]:
    """Returns the width of one row at every site, in the order in which a decoder computes them."""
    widths = dict.fromkeys(("embed", *LAYER_SITES, "final_norm"), config.hidden_size)
    widths["mlp_post"] = config.intermediate_size
    return widths


def check_taps(config: DecoderConfig, taps: Iterable[Tap]) -> None:
    """Refuses taps that the model does not have, all of them in one message.

    Raises:
        ModelError: A site is unknown, a layer does not exist, or a layer is given where there is none (or the reverse).
    """
    problems = list(dict.fromkeys(problem for tap in taps if (problem := _problem(config, tap))))
    if problems:
        raise ModelError("\n".join(problems))


def default_layers(layer_count: int) -> tuple[int, ...]:
    """Returns the layers to keep when nobody says: 6, 12, 18 and 23, or quarters of a model that has fewer than 24.

    Raises:
        ModelError: `layer_count` is not positive.
    """
    if layer_count < 1:
        raise ModelError(f"found {layer_count} layers; expected a model with at least one; pass its layer count")
    if layer_count > 23:
        return 6, 12, 18, 23
    return tuple(sorted({layer_count // 4, layer_count // 2, 3 * layer_count // 4, layer_count - 1}))


def _problem(config: DecoderConfig, tap: Tap) -> str | None:
    site, layer = tap
    if site in LAYERLESS_SITES:
        if layer is not None:
            return f"site {site!r} has no layers, found layer {layer}; use Tap({site!r}, None)"
        return None
    if site not in LAYER_SITES:
        known = ", ".join(site_widths(config))
        return f"site {site!r} does not exist: the known sites are {known}; use one of these"
    if layer is None:
        return f"site {site!r} needs a layer, found None; use Tap({site!r}, layer) with layer 0 to {config.layers - 1}"
    if not 0 <= layer < config.layers:
        return (
            f"layer {layer} does not exist: the model has {config.layers} layers, 0 to {config.layers - 1}; "
            f"choose one of these for site {site!r} (the value after the last norm is site 'final_norm')"
        )
    return None
