"""Documents x sites x layers x packing -> a frozen plan. Whatever would fail later is refused here, before compute."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np

from actstore.errors import InputError
from actstore.hooks import place_in_model
from actstore.layout import ActivationDType, Codec, Layout, Site
from actstore.schema import Plan
from actstore.strings import Strings
from actstore.table import TOKENS_AT_ONCE, DocumentTable
from extract import tokens
from extract.alike import COMPLETION
from extract.arrangement import BATCH, CONTEXT, Arrangement, TooLong
from extract.conditions import ALL
from extract.documents import Document
from extract.loaded import check_batch, loaded_for
from extract.models.errors import ModelError
from extract.models.sites import LAYERLESS_SITES, Tap, check_taps, default_layers, matched_sites, site_widths
from extract.packing import Choice
from extract.plan import ExtractPlan
from extract.selection import Selection, Stream
from extract.sources import SAE_LENS, Documents
from extract.special_tokens import Bos, Eos
from extract.tokenising import Progress, digest, tokenise

if TYPE_CHECKING:
    from extract.models import Model

DEFAULT_SITES = ("resid_post",)


def make_plan(
    folder: str | Path,
    documents: Iterable[Document],
    *,
    sites: Sequence[str] = DEFAULT_SITES,
    layers: Sequence[int] | None = None,
    context: int = CONTEXT,
    batch: int = BATCH,
    packing: Choice = "auto",
    too_long: TooLong = "cut",
    rows: str = ALL,
    rows_per_document: int | None = None,
    dtype: str = "bfloat16",
    block_samples: int | None = None,
    codec: str = "crc32c",
    mesh: tuple[int, int] | None = None,
    attention: str | None = None,
    model: "Model | None" = None,
    bos: Bos = "model",
    eos: Eos = "never",
    answer: bool = False,
    chat_date: str | None = None,
    tokens_folder: str | Path | None = None,
    progress: Progress | None = None,
) -> ExtractPlan:
    """Plans a run: tokenises, packs, chooses rows, and gives every one of them its sample number.

    Args:
        folder: of the model, as HuggingFace saves it, with `tokenizer.json`.
        documents: what to read, such as `extract.Documents`.
        sites: places to keep, by the names of `extract.models.site_widths`, patterns such as `resid_*` and `*`, or
            names of hooks in any scheme of `actstore.hooks`, such as `blocks.12.hook_resid_post`: these name their
            own layer.
        layers: layers of every layered site that no hook names; None keeps 6, 12, 18 and 23, or quarters of a smaller
            model.
        context: tokens the model sees at once.
        batch: contexts per forward pass.
        packing: how documents share contexts: `auto`, `best-fit`, `best-fit-decreasing`, `single` or `concatenated`;
            see `extract.packing`. It is part of the plan, which says what `auto` has come to.
        too_long: what becomes of a document that is longer than a context: `cut`, `truncate` or `error`.
        rows: which tokens to keep, as in `extract.conditions`: `last`, `completion and not kind("space")`.
        rows_per_document: at most so many rows of each document, a random choice; None for no limit.
        dtype: of the stored rows.
        block_samples: samples per block; None aims at shards of 128 MiB.
        codec: of the stored chunks.
        mesh: devices of this process as (data, model): the batch is dealt out along the first, heads and MLPs are cut
            along the second. None takes as many as divide the batch, on the first. It is no part of the plan: a run may
            be continued on another mesh, whose rows differ in their last bits.
        attention: the kernel that computes attention, as in `load_model`, which chooses where it is None. It is part of
            the plan.
        model: the model of `folder` where it is loaded already, on the mesh that it lies on; None loads it.
        bos: what goes before every text: `model` for what its tokenizer puts there, `always` or `never`.
        eos: what goes after every text: `always` or `never`.
        answer: end chats whose last message is the user's with what comes before an answer.
        chat_date: the date for chat templates that write today's, such as 2026-07-26.
        tokens_folder: where to keep the tokens while they are made, for more than memory holds; killed, the same call
            continues. None keeps them in memory.
        progress: called with (documents tokenised, documents in all or None).

    Raises:
        InputError: anything that would fail later: an unknown layer or site, a context that is too long, no documents,
            no rows.
    """
    arrangement = Arrangement(context, batch, packing, too_long, Selection(rows, rows_per_document))
    made = documents.context if isinstance(documents, Documents) else None
    if made is not None and made != context:
        raise InputError(
            f"context is {context}, the documents are contexts of {made} tokens by their {SAE_LENS}; expected the "
            f"same; use --context {made}"
        )
    loaded = loaded_for(batch, folder, mesh=mesh, model=model, attention=attention)
    _check_settings(loaded, context, batch, dtype, codec)
    taps = checked_taps(loaded, sites, layers)
    encoder = tokens.load_tokenizer(folder, bos=bos, eos=eos, answer=answer, chat_date=chat_date)
    check_tokenizer(loaded, encoder)
    kept = None if tokens_folder is None else Path(tokens_folder)
    table = tokenise(documents, encoder, folder=kept, progress=progress)
    check_tokens(loaded, table)
    part = arrangement.part(stream_of(table), encoder.words)
    layout = Layout.fit(
        _sites(loaded, taps, dtype), samples=part.packing.rows, block_samples=block_samples, codec=cast(Codec, codec)
    )
    arrangement = dataclasses.replace(arrangement, packing=part.packing.kind)
    provenance = provenance_of(loaded, encoder, table, arrangement)
    assets = {tokens.FILE: encoder.data, "config.json": (Path(folder) / "config.json").read_bytes()}
    store = Plan.make(layout, provenance, table.layout, assets)
    return ExtractPlan(store, loaded, taps, (part,), batch, table, assets)


def stream_of(table: DocumentTable) -> Stream:
    """The tokens of a table, as a selection sees them."""
    ids, begins = Strings.of(table.ids), table.columns.get(COMPLETION)
    return Stream(
        table.token_offsets, table.token_id, table.token_start,
        None if begins is None else np.asarray(begins, np.int64), ids.__getitem__, ids.hashes,
    )  # fmt: skip


def _check_settings(model: "Model", context: int, batch: int, dtype: str, codec: str) -> None:
    longest = model.config.longest
    if not 1 <= context <= longest:
        raise InputError(
            f"context {context} does not fit: the model {model.name} was made for 1 to {longest} tokens; "
            f"use --context {min(max(context, 1), longest)}"
        )
    if batch < 1:
        raise InputError(f"batch is {batch}; expected at least 1 context per step")
    check_batch(model, batch)
    for value, what, known in [(dtype, "dtype", get_args(ActivationDType)), (codec, "codec", get_args(Codec))]:
        if value not in known:
            raise InputError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")


def check_tokens(model: "Model", table: DocumentTable) -> None:
    """Refuses documents with tokens that the model does not embed, such as images of a model that has none.

    Raises:
        InputError: names the first.
    """
    for first in range(0, len(table.token_id), TOKENS_AT_ONCE):
        wrong = np.flatnonzero(table.token_id[first : first + TOKENS_AT_ONCE] >= model.config.vocab_size)
        if wrong.size:
            place = first + int(wrong[0])
            document = int(np.searchsorted(table.token_offsets, place, side="right")) - 1
            raise InputError(
                f"document {table.ids[document]!r} has token {table.token_id[place]}, the model {model.name} embeds "
                f"0 to {model.config.vocab_size - 1}; take that token out of the text, or give the tokenizer of this "
                "model"
            )


def check_tokenizer(model: "Model", encoder: tokens.Tokenizer) -> None:
    """Refuses a tokenizer whose vocabulary the model does not embed. Added tokens may be more, if nobody uses them.

    Raises:
        InputError: it has more.
    """
    if encoder.vocabulary > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {encoder.vocabulary} tokens, the model {model.name} embeds {model.config.vocab_size}; "
            "they do not belong together: give the tokenizer of this model"
        )


def checked_taps(model: "Model", sites: Sequence[str], layers: Sequence[int] | None) -> tuple[Tap, ...]:
    """What to capture, in the order in which it is stored: site by site, layers ascending.

    Args:
        model: what has the sites.
        sites: names and patterns of sites, as in `sites_of`, and names of hooks in any scheme of `actstore.hooks`,
            which name their own layer.
        layers: of the sites that no hook names.

    Raises:
        InputError: a site or layer the model does not have, or the same twice.
    """
    places = [place_in_model(name, layers=model.config.layers, family=model.config.family) for name in sites]
    named = [Tap(*place) for place in places if place is not None]
    plain = sites_of(model, [name for name, place in zip(sites, places, strict=True) if place is None])
    wanted = tuple(layers) if layers is not None else default_layers(model.config.layers)
    if not sites or not wanted:
        raise InputError(f"sites are {list(sites)} and layers {list(wanted)}; name at least one of each")
    if named and not plain and layers is not None:
        raise InputError(f"layers {list(wanted)} were given, and {list(sites)} name their own; leave the layers out")
    found = [Tap(site, layer) for site in plain for layer in ([None] if site in LAYERLESS_SITES else wanted)] + named
    if len(set(found)) != len(found):
        raise InputError(f"sites {list(sites)} or layers {list(wanted)} name something twice; name each once")
    try:
        check_taps(model.config, found)
    except ModelError as error:
        raise InputError(str(error)) from None
    order = list(dict.fromkeys(tap.site for tap in found))
    return tuple(sorted(found, key=lambda tap: (order.index(tap.site), -1 if tap.layer is None else tap.layer)))


def sites_of(model: "Model", patterns: Sequence[str]) -> tuple[str, ...]:
    """The sites that patterns such as `resid_*` or `*` mean, those of a pattern in the order of computing.

    Raises:
        InputError: a pattern means no site of the model; names all.
    """
    try:
        return matched_sites(model.config, patterns)
    except ModelError as error:
        raise InputError(str(error)) from None


def _sites(model: "Model", taps: Sequence[Tap], dtype: str) -> list[Site]:
    """The sites of the layout."""
    widths = site_widths(model.config)
    names = list(dict.fromkeys(tap.site for tap in taps))
    layers = {name: tuple(tap.layer for tap in taps if tap.site == name and tap.layer is not None) for name in names}
    return [Site(name, widths[name], layers[name] or None, cast(ActivationDType, dtype)) for name in names]


def provenance_of(
    model: "Model",
    encoder: tokens.Tokenizer,
    table: DocumentTable | None = None,
    arrangement: Arrangement | None = None,
) -> dict[str, Any]:
    """Everything that decides the values. No path, no time, no machine: the same run has the same fingerprint.

    Nor the mesh, which decides the last bits as the kind of machine does: rows of any are as good, and a run may be
    continued where other devices are free. Of a model from a hub, its commit.

    Without documents and their arrangement, only what is known of the model and its tokenizer.
    """
    known: dict[str, Any] = {
        "model": {
            "name": model.name,
            "family": model.config.family,
            "config_sha256": model.config_digest,
            "weights_sha256": model.weights_digest,
            "compute_dtype": model.dtype,
            "weight_processing": "none",
        }
        | ({} if model.revision is None else {"revision": model.revision})
        | ({} if model.attention == "chunked" else {"attention": model.attention}),
        "tokenizer": encoder.provenance(),
    }
    if table is None or arrangement is None:
        return known
    return known | {
        "documents": {"count": len(table.ids), "tokens": len(table.token_id), "sha256": digest(table)},
        **arrangement.as_json(),
    }
