"""Tasks to prompts: a JSONL file of documents that `extract` and `generate` read, each within a budget of tokens."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from actstore.errors import InputError
from extract.arc.faults import Counts, Fault, OnError, check_choice
from extract.arc.grids import grid_text
from extract.arc.sources import fingerprint_of, tasks_of
from extract.arc.tasks import Task
from extract.gathering import check_target, made_before, write_whole
from extract.tokens import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, str]]
Render: TypeAlias = Callable[[Messages], str]

SYSTEM = (
    "You solve puzzles. A puzzle shows pairs of grids: an input, and the output that one rule makes of it. "
    "A grid is rows of digits. Find the rule and answer with the output of the last input, as rows of digits, and "
    "nothing else."
)
_TOO_LONG = "too long"
_TASKS_AT_ONCE = 64  # tokenised together: enough to keep the tokenizer's threads busy


@dataclasses.dataclass(frozen=True)
class Prompted:
    """What was made of some tasks.

    Attributes:
        tasks: Tasks read.
        prompts: Prompts written, one for each test input.
        shortened: Prompts among them that lack train pairs.
        left_out: Prompts that do not fit even with one train pair.
        faults: How many things were left out, by kind: those prompts, and what is no task.
        first_faults: The first few of them, with their place.
        longest: Tokens of the longest prompt.
        before: The file was there already; the figures are those of its making.
        seconds: Of this call.
    """

    tasks: int
    prompts: int
    shortened: int
    left_out: int
    faults: Mapping[str, int]
    first_faults: tuple[str, ...]
    longest: int
    before: bool
    seconds: float


def plain_text(messages: Messages) -> str:
    """Messages without a chat template: their texts, a blank line between, and a line break for the answer."""
    return "\n\n".join(message["content"] for message in messages) + "\n"


def task_text(task: Task, sample: int, pairs: Sequence[int]) -> str:
    """The train pairs of these numbers, then one test input: what a user would write.

    Pairs are numbered anew from 1: a gap would tell that something is missing.
    """
    shown = (task.train[number] for number in pairs)
    parts = [
        f"Example {number}\nInput:\n{grid_text(pair.input)}\nOutput:\n{grid_text(pair.output or ())}\n"
        for number, pair in enumerate(shown, start=1)
    ]
    return "\n".join([*parts, f"Test\nInput:\n{grid_text(task.test[sample].input)}\nOutput:"])


def write_prompts(
    source: str | Path,
    output: str | Path,
    tokenizer: Tokenizer,
    *,
    render: Render = plain_text,
    system: str = SYSTEM,
    max_tokens: int | None = None,
    on_error: OnError = "error",
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prompted:
    """Writes one prompt for each test input of the tasks of a source.

    A line has `id` (`<task>_<test input>`), `text`, `task_id`, `sample_idx` (which test input, from 0), `train_pairs`
    (how many are shown), `train_numbers` (which of the task's, from 0, such as "0 2 3") and `prompt_tokens`.

    Where a prompt has more than `max_tokens` tokens, its longest train pair is left out, again and again, the later one
    of two that are equally long: so as many pairs stay as can stay, and a rule is seen in many examples rather than
    large ones. A grid is never cut. Run again, a finished file is left alone; killed, the same call begins again.

    Args:
        source: Of tasks: see `read_tasks`.
        output: A `.jsonl` file.
        tokenizer: Of the model, for counting: no tokens are added to the text, as in `extract` and `generate`.
        render: Makes the text of a prompt out of messages with `role` and `content`: a chat template.
        system: The system message; empty for none, which some templates ask for.
        max_tokens: Most tokens of a prompt, without the answer; None for any number.
        on_error: What happens with what is no task, and where a prompt does not fit even with one train pair: "error"
            counts all of it and writes nothing; "skip" leaves it out.
        limit: Read this many tasks and no more.
        progress: Called with the number of tasks done.

    Raises:
        InputError: Prompts do not fit, tasks are malformed, or there is none.
        PlanMismatchError: The output was made with other settings; the differing fields are named.
        StorageError: It cannot be written.
    """
    started, target = time.perf_counter(), Path(output)
    check_target(target)
    check_choice(limit, "limit", on_error)
    check_choice(max_tokens, "max_tokens", on_error)
    settings = {
        "tasks": fingerprint_of(source), "tokenizer": tokenizer.digest, "frame": render(_messages("...", system)),
        "max_tokens": max_tokens, "limit": limit, "on_error": on_error,
    }  # fmt: skip
    found = made_before(target, settings)
    if found is None:
        work = _Work(tokenizer, render, system, max_tokens, on_error)
        tasks = tasks_of(source, work.counts, limit=limit)
        write_whole(target, settings, work.lines(tasks, progress), work.as_json)
    known = found or work.as_json()
    return Prompted(
        known.get("tasks", 0), known.get("prompts", 0), known.get("shortened", 0), known.get("left_out", 0),
        known.get("faults", {}), tuple(known.get("first_faults", ())), known.get("longest", 0),
        before=found is not None, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _messages(text: str, system: str) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


@dataclasses.dataclass(frozen=True)
class _Draft:
    """A prompt with some of its train pairs."""

    task: Task
    sample: int
    pairs: tuple[int, ...]

    def shorter(self) -> "_Draft":
        """Without its longest pair."""
        longest = max(self.pairs, key=lambda number: (self._size(number), number))
        return dataclasses.replace(self, pairs=tuple(number for number in self.pairs if number != longest))

    def _size(self, number: int) -> int:
        """Digits of a pair: tokenizers differ in how many they join, and grids of digits in nothing else."""
        pair = self.task.train[number]
        return sum(len(grid) * len(grid[0]) for grid in (pair.input, pair.output or ((),)))


@dataclasses.dataclass
class _Work:
    """One pass over the tasks, and what it counted."""

    tokenizer: Tokenizer
    render: Render
    system: str
    max_tokens: int | None
    on_error: OnError
    prompts: int = 0
    shortened: int = 0
    longest: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)

    def as_json(self) -> dict[str, Any]:
        found = self.counts.as_json()
        return {
            "tasks": self.counts.tasks, "prompts": self.prompts, "shortened": self.shortened,
            "left_out": self.counts.faults[_TOO_LONG], "faults": found["faults"], "first_faults": found["first_faults"],
            "longest": self.longest,
        }  # fmt: skip

    def lines(self, tasks: Iterable[Task], progress: Callable[[int], None] | None) -> Iterator[bytes]:
        """The lines of the file. After a fault that is not to be skipped, they are only counted."""
        for part in _parts(tasks):
            self.counts.tasks += len(part)
            drafts = [_Draft(it, sample, tuple(range(len(it.train)))) for it in part for sample in range(len(it.test))]
            for draft, text, tokens in self._fitted(drafts):
                if self.max_tokens is not None and tokens > self.max_tokens:
                    size = f"{tokens:,} tokens with its shortest train pair alone"
                    self.counts.fault(_identifier(draft), Fault(_TOO_LONG, size, f"at most {self.max_tokens:,}"))
                elif self.on_error == "skip" or not self.counts.faults:
                    self._count(draft, tokens)
                    yield json.dumps(_line(draft, text, tokens)).encode() + b"\n"
            if progress:
                progress(self.counts.tasks)
        if self.counts.faults and (self.on_error == "error" or not self.prompts):
            raise InputError(self._refusal())

    def _refusal(self) -> str:
        long, others = self.counts.faults[_TOO_LONG], self.counts.faults.total() - self.counts.faults[_TOO_LONG]
        found = [f"{long} prompts do not fit"] * bool(long) + [f"{others} are no tasks"] * bool(others)
        mend = ["give more --max-tokens"] * bool(long) + ["mend these tasks"] * bool(others)
        leave = ", or leave them out with --on-error skip" if self.on_error == "error" else ""
        kinds = f" ({self.counts.listed()})" if others else ""
        return f"{', '.join(found)}{kinds}: {self.counts.shown()}; nothing was written: {', '.join(mend)}{leave}"

    def _fitted(self, drafts: list[_Draft]) -> list[tuple[_Draft, str, int]]:
        """Each draft with as many pairs as fit, at least one, with its text and tokens."""
        fitted = dict[int, tuple[_Draft, str, int]]()
        pending = dict(enumerate(drafts))
        while pending:
            texts = [self._text(draft) for draft in pending.values()]
            encodings = self.tokenizer.engine.encode_batch(texts, add_special_tokens=False)
            again = dict[int, _Draft]()
            for (number, draft), text, encoding in zip(pending.items(), texts, encodings, strict=True):
                tokens = len(encoding.ids)
                if self.max_tokens is None or tokens <= self.max_tokens or len(draft.pairs) == 1:
                    fitted[number] = (draft, text, tokens)
                else:
                    again[number] = draft.shorter()
            pending = again
        return [fitted[number] for number in range(len(drafts))]

    def _text(self, draft: _Draft) -> str:
        return self.render(_messages(task_text(draft.task, draft.sample, draft.pairs), self.system))

    def _count(self, draft: _Draft, tokens: int) -> None:
        self.prompts += 1
        self.shortened += len(draft.pairs) < len(draft.task.train)
        self.longest = max(self.longest, tokens)


def _parts(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    rest = iter(tasks)
    while part := list(itertools.islice(rest, _TASKS_AT_ONCE)):
        yield part


def _identifier(draft: _Draft) -> str:
    return f"{draft.task.id}_{draft.sample}"  # as Kaggle names outputs; the last underscore parts the two


def _line(draft: _Draft, text: str, tokens: int) -> dict[str, Any]:
    return {
        "id": _identifier(draft), "text": text, "task_id": draft.task.id, "sample_idx": draft.sample,
        "train_pairs": len(draft.pairs), "train_numbers": " ".join(map(str, draft.pairs)), "prompt_tokens": tokens,
    }  # fmt: skip
