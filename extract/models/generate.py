"""Generation: prompts in, completions out. One compiled prefill, and one compiled loop over the tokens that follow."""

import dataclasses
from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from extract.models.cache import Cache, Extend, Fill
from extract.models.config import DecoderConfig
from extract.models.decoder import Decoder
from extract.models.errors import ModelError
from extract.models.model import FINAL, Model, Params
from extract.models.recorder import Recorder
from extract.models.sampling import Draws, Sampling, choose
from extract.models.sites import Tap, check_taps

STEPS_AT_ONCE = 32
"""Tokens between two looks at the host, so that a signal does not wait for a whole batch."""

GREEDY = Sampling()

Prompts = Sequence[Sequence[int]] | Sequence[Int[np.ndarray, " _"]] | Int[np.ndarray, "prompt token"]


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What was generated, row by row in the order of the prompts.

    Attributes:
        tokens: The new tokens of each row; one that stopped ends with its stop token.
        finish: Why each row ended: "stop" at a stop token, "length" after `max_tokens`.
        activations: At each tap `[row, step, width]`, in the model's dtype: the values at the token from which token
            `step` was predicted, so step 0 is the last token of the prompt. Behind a row's own tokens it is garbage.
    """

    tokens: tuple[Int32[np.ndarray, " _"], ...]
    finish: tuple[Literal["stop", "length"], ...]
    activations: dict[Tap, Float[Array, "row step width"]]


class _State(NamedTuple):
    """Between two tokens. `kept` has an array for each tap."""

    step: Int[Array, ""]
    tokens: Int[Array, "batch step"]
    finished: Bool[Array, " batch"]
    sound: Bool[Array, ""]
    cache: Cache
    kept: tuple[Float[Array, "batch step _"], ...]


class _Rules(NamedTuple):
    """What decides the tokens beside the model: a pytree."""

    draws: Draws | None
    stop: Int[Array, " stop"]


def generate(
    model: Model,
    prompts: Prompts,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    row_ids: UInt32[np.ndarray, " prompt"] | None = None,
    taps: Collection[tuple[str, int | None]] = (),
    padded: tuple[int, int] | None = None,
) -> Generated:
    """Continues every prompt, of whatever lengths, until a stop token or `max_tokens`.

    A row does not see the others: greedy tokens are those of the prompt alone, up to the last bits of float sums,
    which may depend on the shape of the batch; with `padded` they do not. Values of the step activations are those of
    one forward pass over prompt and completion, up to the same bits.

    Each new shape (rows, longest prompt, `max_tokens`) compiles twice, once for the prompts and once for the loop. What
    the device holds is bounded by `extract.models.cache.generation_bytes`.

    Args:
        model: With its parameters.
        prompts: Token ids of each prompt, at least one.
        max_tokens: Most tokens to add to each.
        sampling: How tokens are chosen; greedy unless given.
        stop: Tokens that end a row, such as those of `eos_token_id`. Empty: every row gets `max_tokens`.
        row_ids: A number for each prompt that its draws depend on; 0 and up unless given. Equal prompts with equal ids
            get equal completions.
        taps: Sites to keep at every step.
        padded: The shape (rows, tokens) to pad the prompts to: batches of one shape share their compiled programs.

    Raises:
        ModelError: A prompt is empty, too long for the model, or has a token that the model does not embed; a stop
            token does not exist; another argument is out of its range; or the model gives logits that are not numbers.
    """
    kept = tuple(dict.fromkeys(Tap(*tap) for tap in taps))
    rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
    shape = (len(rows), max(map(len, rows), default=0)) if padded is None else padded
    check_taps(model.config, kept)
    if row_ids is not None and len(row_ids) != len(rows):
        raise ModelError(f"found {len(row_ids)} row_ids for {len(rows)} prompts; expected one for each; give as many")
    _check(model.config, rows, max_tokens, stop, shape)
    token_ids, lengths = _right_aligned(rows, shape)
    ids = np.arange(shape[0], dtype=np.uint32)
    if row_ids is not None:
        ids[: len(rows)] = row_ids
    rules = _Rules(sampling.draws(ids), jnp.asarray(sorted(stop), jnp.int32))
    state = _begin(model.graph, model.params, token_ids, lengths, rules, max_tokens=max_tokens, taps=kept)
    until = 1
    while until < max_tokens and not bool(state.finished.all()):
        until = min(until + STEPS_AT_ONCE, max_tokens)
        state = _advance(model.graph, model.params, state, lengths, rules, jnp.int32(until), taps=kept)
    if not bool(state.sound):
        raise ModelError(
            f"found logits of {model.name} that are not finite; expected numbers; look for weights that are not "
            "finite, or load the model with dtype='float32'"
        )
    return _generated(state, len(rows), frozenset(stop), kept)


@partial(jax.jit, static_argnames=("graph", "max_tokens", "taps"))
def _begin(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    token_ids: Int[Array, "batch sequence"],
    lengths: Int[Array, " batch"],
    rules: _Rules,
    *,
    max_tokens: int,
    taps: tuple[Tap, ...],
) -> _State:
    """The prefill, and the first token."""
    batch, width = token_ids.shape
    places = jnp.arange(width) - (width - lengths[:, None])
    mix = Fill((places >= 0).astype(jnp.int32), width + max_tokens)
    recorder = Recorder({*taps, FINAL})
    decoder = nnx.merge(graph, params)
    decoder.run(token_ids, jnp.maximum(places, 0), mix, recorder)
    found = {tap: value[:, -1:] for tap, value in recorder.found.items()}
    empty = _State(
        step=jnp.int32(0),
        tokens=jnp.zeros((batch, max_tokens), jnp.int32),
        finished=lengths == 0,
        sound=jnp.ones((), bool),
        cache=mix.cache,
        kept=tuple(jnp.zeros((batch, max_tokens, found[tap].shape[-1]), found[tap].dtype) for tap in taps),
    )
    return _chosen(decoder, empty, mix.cache, found, rules, taps)


@partial(jax.jit, static_argnames=("graph", "taps"), donate_argnames=("state",))
def _advance(
    graph: nnx.GraphDef[Decoder],
    params: Params,
    state: _State,
    lengths: Int[Array, " batch"],
    rules: _Rules,
    until: Int[Array, ""],
    *,
    taps: tuple[Tap, ...],
) -> _State:
    """Tokens until `until` of them are there or all rows are finished."""
    decoder = nnx.merge(graph, params)
    slots = state.cache.keys[0].shape[2]
    width = slots - state.tokens.shape[1]
    segment_ids = (jnp.arange(slots) >= width - lengths[:, None]).astype(jnp.int32)

    def one_more(state: _State) -> _State:
        newest = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        mix = Extend(state.cache, segment_ids, width + state.step - 1)
        recorder = Recorder({*taps, FINAL})
        decoder.run(newest, lengths[:, None] + state.step - 1, mix, recorder)
        return _chosen(decoder, state, mix.cache, recorder.found, rules, taps)

    return lax.while_loop(lambda state: (state.step < until) & ~state.finished.all(), one_more, state)


def _chosen(
    decoder: Decoder,
    state: _State,
    cache: Cache,
    found: dict[Tap, Float[Array, "batch 1 _"]],
    rules: _Rules,
    taps: tuple[Tap, ...],
) -> _State:
    """The state with one more token, and with the activations from which it was predicted."""
    logits = decoder.unembed(found[FINAL])[:, 0]
    token = choose(logits, rules.draws, state.step)
    return _State(
        step=state.step + 1,
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        finished=state.finished | jnp.isin(token, rules.stop),
        sound=state.sound & (state.finished | jnp.isfinite(logits.max(axis=-1))).all(),
        cache=cache,
        kept=tuple(
            lax.dynamic_update_slice_in_dim(values, found[tap], state.step, axis=1)
            for tap, values in zip(taps, state.kept, strict=True)
        ),
    )


def _right_aligned(
    rows: Sequence[Int[np.ndarray, " _"]], shape: tuple[int, int]
) -> tuple[Int32[np.ndarray, "batch sequence"], Int32[np.ndarray, " batch"]]:
    """Prompts with zeros before them, and their lengths; rows that fill the batch up have length 0."""
    token_ids, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    for number, row in enumerate(rows):
        token_ids[number, shape[1] - len(row) :] = row
        lengths[number] = len(row)
    return token_ids, lengths


def _generated(state: _State, rows: int, stop: frozenset[int], taps: tuple[Tap, ...]) -> Generated:
    tokens: list[Int32[np.ndarray, " _"]] = []
    finish: list[Literal["stop", "length"]] = []
    for row in np.asarray(state.tokens)[:rows, : int(state.step)]:
        ends = np.flatnonzero(np.isin(row, list(stop)))
        tokens.append(row[: ends[0] + 1] if ends.size else row)
        finish.append("stop" if ends.size else "length")
    steps = max(map(len, tokens))
    kept = {tap: values[:rows, :steps] for tap, values in zip(taps, state.kept, strict=True)}
    return Generated(tuple(tokens), tuple(finish), kept)


def _check(
    config: DecoderConfig,
    rows: Sequence[Int[np.ndarray, " _"]],
    max_tokens: int,
    stop: Collection[int],
    shape: tuple[int, int],
) -> None:
    """Refuses what cannot be generated, all of it in one message."""
    problems = []
    if max_tokens < 1:
        problems.append(f"max_tokens is {max_tokens}; expected at least 1; pass for example 50")
    if not rows:
        problems.append("found no prompts; expected at least one; pass a list of token ids for each")
    if unknown := sorted(token for token in stop if not 0 <= token < config.vocab_size):
        last = config.vocab_size - 1
        problems.append(f"found stop token {unknown[0]}; expected 0 to {last}; give ids of this model")
    for number, row in enumerate(rows):
        if not row.size:
            problems.append(f"prompt {number} is empty; expected at least one token; drop it, or begin it with one")
        elif row.min() < 0 or row.max() >= config.vocab_size:
            wrong = row[(row < 0) | (row >= config.vocab_size)][0]
            problems.append(
                f"prompt {number} has token {wrong}; expected 0 to {config.vocab_size - 1}; "
                "use the tokenizer of this model"
            )
        elif row.size + max(max_tokens, 1) > config.longest:
            problems.append(
                f"prompt {number} has {row.size} tokens, with {max_tokens} more that is over the "
                f"{config.longest} that the model was made for; shorten the prompt or lower max_tokens"
            )
    longest = max(map(len, rows), default=0)
    if shape[0] < len(rows) or shape[1] < longest:
        problems.append(
            f"padded is {shape}, but there are {len(rows)} prompts of up to {longest} tokens; expected no less; "
            "leave it out to fit them"
        )
    if problems:
        raise ModelError("\n".join(problems[:10]))
