"""Prompts to completions: batches of one shape per length, into a JSONL file that `extract` reads again."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from actstore.errors import InputError
from actstore.table import DocumentTable
from extract import tokens
from extract.documents import Document
from extract.gathering import Gathering
from extract.loaded import load_model
from extract.models.cache import generation_bytes
from extract.models.checkpoint import read_json
from extract.models.errors import ModelError
from extract.models.kinds import is_whole, shown
from extract.models.sampling import Sampling
from extract.planning import check_tokenizer, check_tokens, provenance_of
from extract.tokenising import Progress, digest, tokenise

if TYPE_CHECKING:
    from extract.models import Model

BATCH = 8
NARROWEST = 16  # tokens; shorter prompts share one compiled program
OWN_FIELDS = ("id", "prompt", "completion", "text", "tokens", "finish")


@dataclasses.dataclass(frozen=True)
class Written:
    """How far a run is."""

    prompts: int
    prompts_before: int
    prompts_computed: int
    tokens_computed: int
    stopped: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of this process, compilation included."""
        return self.tokens_computed / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class CompletionPlan:
    """Completions that are decided but not begun. `settings` is what the file's neighbour keeps and compares."""

    model: "Model"
    tokenizer: tokens.Tokenizer
    documents: tuple[Document, ...]
    prompts: DocumentTable = dataclasses.field(repr=False)
    max_tokens: int
    sampling: Sampling
    stop: tuple[int, ...]
    batch: int
    settings: dict[str, Any]

    def prompt(self, number: int) -> Int32[np.ndarray, " token"]:
        """Token ids of one prompt."""
        return self.prompts.token_id[slice(*self.prompts.token_offsets[number : number + 2])]

    def width(self, number: int) -> int:
        """Tokens to which a prompt is padded: a power of two, so that few shapes are compiled.

        It is decided by the prompt alone, so that the batch it lands in does not change a bit of its result.
        """
        size = len(self.prompt(number))
        widest = self.model.config.longest - self.max_tokens
        return min(max(NARROWEST, 1 << (size - 1).bit_length()), widest)

    def batches(self, missing: Collection[int]) -> Iterator[list[int]]:
        """Prompts of one width, at most `batch`. The widest come first: what does not fit in memory fails early."""
        by_width: dict[int, list[int]] = {}
        for number in sorted(missing):
            by_width.setdefault(self.width(number), []).append(number)
        for width in sorted(by_width, reverse=True):
            numbers = by_width[width]
            yield from (numbers[start : start + self.batch] for start in range(0, len(numbers), self.batch))

    def describe(self) -> str:
        """The plan in a few lines."""
        sizes = np.diff(self.prompts.token_offsets)
        how = "greedy" if self.sampling.greedy else str(self.sampling).removeprefix("Sampling")
        widest = max(self.width(int(np.argmax(sizes))), 1)
        memory = generation_bytes(
            self.model.config, batch=self.batch, prompt_tokens=widest, max_tokens=self.max_tokens,
            itemsize=2 if self.model.dtype == "bfloat16" else 4,
        )  # fmt: skip
        return "\n".join(
            [
                f"model      {self.model.name}, {self.model.config.layers} layers, computed in {self.model.dtype}",
                f"prompts    {len(sizes):,}, {sizes.sum():,} tokens, the longest has {sizes.max():,}",
                f"to add     at most {self.max_tokens:,} tokens to each, {how}",
                f"stop       {', '.join(map(str, self.stop)) or 'nowhere: no end-of-text token is known'}",
                f"batches    of {self.batch}, {len({self.width(number) for number in range(len(sizes))})} widths",
                f"memory     {memory / 1e6:,.0f} MB at most, beside the model",
            ]
        )

    def line(self, number: int, result: dict[str, Any]) -> dict[str, Any]:
        """The object of one line of the file."""
        document, prompt = self.documents[number], self.prompts.texts[number]
        new = result["tokens"][:-1] if result["finish"] == "stop" else result["tokens"]
        completion = self._text(number, new)
        own = (document.id, prompt, completion, prompt + completion, result["tokens"], result["finish"])
        return dict(zip(OWN_FIELDS, own, strict=True)) | dict(document.columns)

    def _text(self, number: int, new: list[int]) -> str:
        """New tokens as text that follows their prompt: some tokenizers drop a space where a text begins."""
        decode, before = self.tokenizer.engine.decode, self.prompt(number).tolist()
        begin = str(decode(before, skip_special_tokens=False))
        whole = str(decode(before + new, skip_special_tokens=False))
        return whole[len(begin) :] if whole.startswith(begin) else str(decode(new, skip_special_tokens=False))


def plan_completions(
    folder: str | Path,
    documents: Iterable[Document],
    *,
    max_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Sequence[str] | None = None,
    batch: int = BATCH,
    chat_date: str | None = None,
    model: "Model | None" = None,
    progress: Progress | None = None,
) -> CompletionPlan:
    """Decides what `write_completions` computes. The text of each document is its prompt, as it is.

    Args:
        folder: Of the model, as HuggingFace saves it, with `tokenizer.json`.
        documents: The prompts, such as `extract.Documents`, which counts those that cannot be read where it is told to
            skip them.
        max_tokens: Most tokens to add to each.
        sampling: How tokens are chosen; None for greedy. A draw depends on the seed, the document's id and the step.
        stop: Tokens that end a completion, by their text; None for the model's own: `eos_token_id` of
            `generation_config.json` or `config.json`. Each is one token, not a string that may be several.
        batch: Prompts at a time. Memory grows with it.
        chat_date: The date for chat templates that write today's, such as 2026-07-26.
        model: The model of `folder` where it is loaded already.
        progress: Called with (documents tokenised, documents in all).

    Raises:
        InputError: Anything that would fail later: a prompt that is too long, a stop token that does not exist.
    """
    read = list(documents)
    if not read:
        raise InputError("there are no prompts; expected at least one; check the source and its --limit")
    for value, name in ((max_tokens, "max_tokens"), (batch, "batch")):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1; give more")
    if taken := sorted({name for document in read for name in document.columns} & set(OWN_FIELDS)):
        raise InputError(
            f"the prompts have fields {', '.join(taken)}, which the completions have too; expected other names; "
            "rename them"
        )
    encoder = tokens.load_tokenizer(folder, answer=True, chat_date=chat_date)
    stops = _own_stop(Path(folder)) if stop is None else _stop_ids(encoder, stop)
    table = tokenise(read, encoder, source=documents, progress=progress)
    there = frozenset(table.ids)
    prompts = tuple(document for document in read if document.id in there)
    loaded = model or load_model(folder)
    check_tokenizer(loaded, encoder)
    _check_lengths(table, loaded, max_tokens)
    if wrong := [token for token in stops if not 0 <= token < loaded.config.vocab_size]:
        raise InputError(
            f"the model's eos_token_id has {wrong[0]}; expected 0 to {loaded.config.vocab_size - 1}; give --stop"
        )
    sampling = sampling or Sampling()
    check_tokens(loaded, table)
    known = provenance_of(loaded, encoder)
    known["model"].pop("attention", None)  # generation has one of its own
    settings = known | {
        "prompts": {"count": len(prompts), "sha256": digest(table)},
        "max_tokens": max_tokens,
        "sampling": dataclasses.asdict(sampling),
        "stop": list(stops),
        "batch": batch,
    }
    return CompletionPlan(loaded, encoder, prompts, table, max_tokens, sampling, stops, batch, settings)


def write_completions(
    plan: CompletionPlan, path: str | Path, *, progress: Callable[[Written], None] | None = None
) -> Written:
    """Computes what is missing and writes the file. Killed, the same call continues; a finished file is left alone.

    One line per prompt in the order of the documents: `id`, `prompt`, `completion`, `text` (both together), `tokens`
    (the new ones, with the stop token), `finish` ("stop" or "length"), and the document's columns. The stop token is
    not in the text. The same plan gives the same bytes on the same kind of machine, killed or not.

    Args:
        plan: What to compute.
        path: Of the file, `.jsonl`; see `extract.gathering` for what lies beside it.
        progress: Called after each batch.

    Raises:
        PlanMismatchError: The file was made with other settings; the differing fields are named.
        StorageError: It could not be written.
    """
    from extract.models.generate import generate

    count = len(plan.documents)
    with Gathering(Path(path), plan.settings, count=count) as gathering:
        before = gathering.known
        state = Written(count, len(before), 0, 0, 0, 0.0)
        started = time.perf_counter()
        for numbers in plan.batches(set(range(count)) - before):
            try:
                found = generate(
                    plan.model, [plan.prompt(number) for number in numbers], max_tokens=plan.max_tokens,
                    sampling=plan.sampling, stop=plan.stop, padded=(plan.batch, plan.width(numbers[0])),
                    row_ids=np.array([_row_id(plan.documents[number].id) for number in numbers], np.uint32),
                )  # fmt: skip
            except ModelError as error:
                raise InputError(str(error)) from None
            rows = zip(numbers, found.tokens, found.finish, strict=True)
            gathering.add({number: {"tokens": row.tolist(), "finish": finish} for number, row, finish in rows})
            state = dataclasses.replace(
                state,
                prompts_computed=state.prompts_computed + len(numbers),
                tokens_computed=state.tokens_computed + sum(map(len, found.tokens)),
                stopped=state.stopped + found.finish.count("stop"),
                seconds=time.perf_counter() - started,
            )
            if progress:
                progress(state)
        if not gathering.complete:
            gathering.finish(plan.line)
    return state


def _row_id(identifier: str) -> int:
    """What the draws of a prompt depend on, whatever other prompts there are: 32 bits of its id."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:4], "little")


def _own_stop(folder: Path) -> tuple[int, ...]:
    """The end-of-text tokens that a model folder names.

    Raises:
        InputError: the file that names them is broken, or names something else.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            found = read_json(path).get("eos_token_id") if path.is_file() else None
        except ModelError as error:
            raise InputError(f"{error}; or give --stop") from None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(map(is_whole, ids)):
            raise InputError(
                f"found eos_token_id {shown(found)} in {path}; expected the number of a token, or a list of such; "
                "correct it, or give --stop"
            )
        return tuple(sorted(ids))
    return ()


def _stop_ids(encoder: tokens.Tokenizer, stop: Sequence[str]) -> tuple[int, ...]:
    ids = {text: encoder.engine.token_to_id(text) for text in stop}
    if unknown := [text for text, number in ids.items() if number is None]:
        special = [token.content for _, token in sorted(encoder.engine.get_added_tokens_decoder().items())]
        raise InputError(
            f"stop {unknown[0]!r} is not a token of the tokenizer; expected one token, such as "
            f"{', '.join(special[:5]) or 'one of its vocabulary'}; correct --stop"
        )
    return tuple(sorted({number for number in ids.values() if number is not None}))


def _check_lengths(table: DocumentTable, model: "Model", max_tokens: int) -> None:
    most = model.config.longest - max_tokens
    sizes = np.diff(table.token_offsets)
    if too_long := np.flatnonzero(sizes > most).tolist():
        first = too_long[0]
        raise InputError(
            f"{len(too_long)} prompts are too long, the first is {table.ids[first]!r} with {sizes[first]} tokens: "
            f"expected at most {most}, since {max_tokens} more must fit into the {model.config.longest} that the "
            "model was made for; shorten these prompts, or lower --max-tokens"
        )
