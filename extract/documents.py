"""Documents: what a run reads, one at a time, and how a record of named fields becomes one."""

import dataclasses
import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

TEXT_FIELD, ID_FIELD = "text", "id"
TEXT_BYTES = 64 << 20  # of one document: as much as a store reads at once

Column = int | float | str
Kind = Literal["broken", "wrong type", "empty", "too long", "duplicate id", "other columns", "refused chat"]


@dataclasses.dataclass(frozen=True)
class Document:
    """One input text, with where it came from.

    Attributes:
        id: Unique among the documents of a run.
        text: What is tokenised, always encodable as UTF-8. Empty where there are `messages` or `token_ids` instead.
        columns: Scalars that describe the document, such as its kind. Kept in the store.
        source: Where to find it again: `"texts.jsonl:17"`, `"notes/a.md"`, `"pydoc_data.topics:assert"`.
        completion: The character of the text at which a completion begins, where there is one: before it is the prompt.
        messages: A chat, each message with its `role` and `content`, to be rendered by the model's template.
        token_ids: Tokens of a document that is tokenised already.
    """

    id: str
    text: str
    columns: Mapping[str, Column]
    source: str
    completion: int | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    token_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in a source that is no document, and why: found, expected, what to do."""

    kind: Kind
    message: str


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which fields of a record mean what.

    Attributes:
        text: The field that holds the text. Where a record has none: `messages`, a chat; `prompt` and `completion`,
            which are joined; or `input_ids`, tokens.
        id: The field that holds the identifier, a string or an integer. Where a record has none, the identifier is the
            place: `"texts.jsonl:17"`.
        columns: Fields to keep. None keeps all that hold a number or a string; booleans become 0 and 1, dates and times
            texts such as 2026-07-26T12:00:00, and nulls, lists and objects are left out. Named ones have to be there,
            in every record.
    """

    text: str = TEXT_FIELD
    id: str = ID_FIELD
    columns: tuple[str, ...] | None = None


def document_of(record: Mapping[str, Any], where: str, fields: Fields) -> Document | Problem:
    """The document of one record.

    Args:
        record: Its fields by their names.
        where: The place it stands at, for errors and as its source.
        fields: Which of them mean what.
    """
    names: list[object] = list(record)
    if wrong := [name for name in names if not isinstance(name, str)]:
        return Problem(
            "wrong type", f"{where} has a field named {wrong[0]!r:.60}; expected texts as names. Rename the field."
        )
    identifier = record.get(fields.id, where)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | np.integer):
        return Problem(
            "wrong type",
            f"{where} has {identifier!r} in {fields.id!r}; expected a string or an integer. Correct or drop the field.",
        )
    if isinstance(identifier, str) and not encodable(identifier):
        return Problem("wrong type", f"{where}, field {fields.id!r}, {_SURROGATE}")
    if isinstance(identifier, str) and not identifier.strip():
        return Problem(
            "empty", f"{where} has an empty text in {fields.id!r}; expected an id. Write one, or drop the field."
        )
    columns = _columns(record, where, fields)
    content = _content(record, where, fields)
    if isinstance(columns, Problem):
        return columns
    return (
        content if isinstance(content, Problem) else Document(str(identifier), columns=columns, source=where, **content)
    )


def checked_text(text: object, where: str) -> str | Problem:
    """A text that can be tokenised, or why it cannot."""
    if not isinstance(text, str):
        return Problem(
            "wrong type", f"{where} holds a {type(text).__name__}; expected a string. Write the text in quotes."
        )
    if not text.strip():
        return Problem(
            "empty", f"{where} holds an empty text; expected at least one visible character. Drop this document."
        )
    if not encodable(text):
        return Problem("wrong type", f"{where} {_SURROGATE}")
    return too_long(text, where) or text


def too_long(text: str, where: str) -> Problem | None:
    """Why a text cannot be read at once, if it cannot."""
    if len(text) * 4 <= TEXT_BYTES or (size := len(text.encode())) <= TEXT_BYTES:
        return None
    return Problem(
        "too long",
        f"{where} holds {size:,} bytes of text; expected at most {TEXT_BYTES:,}, which are read at once. "
        "Cut it into several documents.",
    )


def encodable(text: str) -> bool:
    """Whether a text has a UTF-8 form."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_SURROGATE = (
    "holds half of a surrogate pair, which has no UTF-8 form; expected whole characters. "
    "Remove the escape \\ud800 to \\udfff."
)


def _content(record: Mapping[str, Any], where: str, fields: Fields) -> dict[str, Any] | Problem:
    """`text`, `completion`, `messages` and `token_ids` of a record."""
    halves = (record.get("prompt"), record.get("completion"))
    whole = halves[0] + halves[1] if isinstance(halves[0], str) and isinstance(halves[1], str) else None
    begins = len(halves[0] or "")
    if fields.text in record:
        text = checked_text(record[fields.text], f"{where}, field {fields.text!r},")
        if isinstance(text, Problem):
            return text
        return {"text": text, "completion": begins if text == whole else None}
    if whole is not None:
        text = checked_text(whole, f"{where}, fields 'prompt' and 'completion',")
        return text if isinstance(text, Problem) else {"text": text, "completion": begins}
    if "messages" in record:
        return _chat(record["messages"], where)
    if "input_ids" in record:
        return _tokens(record["input_ids"], where)
    return Problem(
        "wrong type",
        f"{where} has no field {fields.text!r}, only {sorted(record)}; expected the text there, or messages, or prompt "
        f"and completion, or input_ids. Rename the field that holds the text to {fields.text!r}, or give its name as "
        "--text-field.",
    )


def _chat(messages: object, where: str) -> dict[str, Any] | Problem:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return Problem(
            "wrong type" if messages else "empty",
            f"{where}, field 'messages', holds {messages!r:.60}; expected a list of messages, each with role and "
            "content. Correct the field.",
        )
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return Problem(
                "wrong type",
                f"{where}, field 'messages', holds {message!r:.60}; expected objects with role and content, such as "
                '{"role": "user", "content": "Hello"}. Correct the message.',
            )
    return {"text": "", "messages": tuple(dict(message) for message in messages)}


def _tokens(values: object, where: str) -> dict[str, Any] | Problem:
    numbers = np.asarray(values) if isinstance(values, Sequence | np.ndarray) else np.zeros((1, 1))
    if numbers.size == 0:
        return Problem("empty", f"{where}, field 'input_ids', is empty; expected tokens. Drop this document.")
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or numbers.min() < 0 or numbers.max() >= 1 << 31:
        return Problem(
            "wrong type",
            f"{where}, field 'input_ids', holds {values!r:.60}; expected a list of token ids, whole numbers from 0. "
            "Correct the field.",
        )
    return {"text": "", "token_ids": tuple(numbers.tolist())}


def _columns(record: Mapping[str, Any], where: str, fields: Fields) -> dict[str, Column] | Problem:
    """The user columns of a record."""
    names = record if fields.columns is None else fields.columns
    if missing := [name for name in names if name not in record]:
        return Problem(
            "wrong type",
            f"{where} has no field {missing[0]!r}, only {sorted(record)}; expected every column that was asked for. "
            "Correct --columns.",
        )
    taken = {fields.text, fields.id} | (set() if fields.text in record else {"prompt", "completion"})
    kept: dict[str, Column] = {}
    for name in names:
        value = record[name]
        if name in taken:
            continue
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, dt.date | dt.time):
            value = value.isoformat()  # of parquet files, such as the time of a run
        if isinstance(value, str) and not encodable(value):
            return Problem("wrong type", f"{where}, field {name!r}, {_SURROGATE}")
        if isinstance(value, int | float | str):
            kept[name] = int(value) if isinstance(value, bool) else value
        elif fields.columns is not None:
            return Problem(
                "wrong type",
                f"{where}, field {name!r}, holds {value!r:.60}; expected a number or a string in a column that was "
                "asked for. Correct the field, or --columns.",
            )
    return kept
