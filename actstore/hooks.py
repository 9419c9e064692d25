"""The names that libraries give to places in a decoder, and the site and layer that each is. No input, no output.

Schemes: TransformerLens and its bridge (`blocks.12.hook_resid_post`), modules of Hugging Face transformers
(`model.layers.12`), its `hidden_states[13]`, nnterp (`layers_output[12]`), and our own (`resid_post[12]`). Values of
TransformerLens are the same where it was loaded without weight processing: its default folds norms into weights.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from actstore.errors import InputError, UnknownNameError
from actstore.layout import Layout


class Place(NamedTuple):
    """A site and the label of a layer of it; None where the site has none."""

    site: str
    layer: int | None


_OF_LAYERS = {
    "resid_pre": (r"blocks\.N\.hook_resid_pre", r"blocks\.N\.hook_in", r"layers_input\[N\]"),
    "resid_mid": (r"blocks\.N\.hook_resid_mid",),
    "resid_post": (
        r"blocks\.N\.hook_resid_post", r"blocks\.N\.hook_out", r"model\.layers\.N", r"layers_output\[N\]", r"layer_N",
    ),
    "attn_out": (
        r"blocks\.N\.hook_attn_out", r"blocks\.N\.attn\.hook_out", r"model\.layers\.N\.self_attn",
        r"attentions_output\[N\]",
    ),
    "mlp_out": (
        r"blocks\.N\.hook_mlp_out", r"blocks\.N\.mlp\.hook_out", r"model\.layers\.N\.mlp", r"mlps_output\[N\]",
    ),
    "mlp_post": (r"blocks\.N\.mlp\.hook_post",),
    "attn_z": (r"blocks\.N\.attn\.hook_z",),
    "q": (r"blocks\.N\.attn\.hook_q",),
    "k": (r"blocks\.N\.attn\.hook_k",),
    "v": (r"blocks\.N\.attn\.hook_v",),
}  # fmt: skip
_LAYERLESS = {
    "embed": (r"hook_embed", r"embed\.hook_out", r"model\.embed_tokens", r"token_embeddings"),
    "final_norm": (r"ln_final\.hook_normalized", r"ln_final\.hook_out", r"model\.norm", r"layer_\d+_norm"),
}
_NUMBER = r"(\d{1,6})"
_PATTERNS = [
    *((re.compile(form.replace("N", _NUMBER)), site) for site, forms in _OF_LAYERS.items() for form in forms),
    *((re.compile(form), site) for site, forms in _LAYERLESS.items() for form in forms),
]
_OWN = re.compile(rf"([A-Za-z][A-Za-z0-9_]*)(?:\[{_NUMBER}\])?")
_HIDDEN_STATES = re.compile(r"hidden_states\[(-?\d{1,6})\]")
EXAMPLES = "resid_post[12], blocks.12.hook_resid_post, model.layers.12, layers_output[12] or hidden_states[13]"


def place_of(name: str, layout: Layout, *, model_layers: Callable[[], int | None]) -> Place:
    """The site and layer that a name means, which the store holds.

    Args:
        name: of any scheme above.
        layout: of the store.
        model_layers: how many layers the model has, None where that is not known; asked for `hidden_states` alone.

    Raises:
        UnknownNameError: no scheme has such a name, or the store does not hold the place.
        InputError: the name means several places; says which.
    """
    place = _place(name, layout, model_layers)
    sites = {site.name: site for site in layout.sites}
    if place.site not in sites:
        raise UnknownNameError(
            f"{name!r} is site {place.site!r}, which is not in this store; it holds {', '.join(sites)}"
        )
    site = sites[place.site]
    return Place(site.name, site.layer_label(site.layer_index(place.layer)))


def _place(name: str, layout: Layout, model_layers: Callable[[], int | None]) -> Place:
    if not isinstance(name, str):
        raise InputError(f"{name!r} is no name of a hook; expected text such as {EXAMPLES}")
    for pattern, site in _PATTERNS:
        found = pattern.fullmatch(name)
        if found:
            return Place(site, int(found[1]) if found.groups() else None)
    found = _HIDDEN_STATES.fullmatch(name)
    if found:
        return _of_hidden_states(name, int(found[1]), model_layers())
    found = _OWN.fullmatch(name)
    if found and (found[1] in {site.name for site in layout.sites} or found[1] in _OF_LAYERS | _LAYERLESS):
        return Place(found[1], None if found[2] is None else int(found[2]))
    raise UnknownNameError(
        f"{name!r} is no name of a hook that is known here; use one such as {EXAMPLES}. This store holds "
        f"{', '.join(site.name for site in layout.sites)}"
    )


def _of_hidden_states(name: str, number: int, count: int | None) -> Place:
    """`hidden_states` are the embeddings, then what each layer gives; but the last ones have passed the final norm."""
    if number == -1:
        return Place("final_norm", None)
    if number == 0:
        return Place("embed", None)
    if count is None:
        raise InputError(
            f"{name!r} depends on how many layers the model has, which this store does not say: the last hidden states "
            "have passed the final norm, others are resid_post of the layer before; ask for resid_post[LAYER] or "
            "final_norm"
        )
    place = number if number > 0 else count + 1 + number
    if place == count:
        raise InputError(
            f"{name!r} means two places: transformers applies the final norm to the last hidden states of a model of "
            f"{count} layers; ask for hidden_states[-1] or final_norm to get these, or for resid_post[{count - 1}] to "
            "get what the last layer gives before the norm"
        )
    if not 0 < place < count:
        raise UnknownNameError(f"{name!r} does not exist: a model of {count} layers has hidden_states[0] to [{count}]")
    return Place("resid_post", place - 1)
