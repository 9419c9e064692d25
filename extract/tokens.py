"""Texts to tokens: the tokenizer of a model folder, and the place of every token in the UTF-8 of its text."""

import dataclasses
import datetime as dt
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt32

from actstore.errors import InputError
from actstore.table import MAX_READ_BYTES, TOKEN_BYTES
from extract.chat import ChatTemplate, load_chat_template
from extract.conversation import chat_text
from extract.documents import Document, Problem, checked_text, too_long
from extract.messages import ChatError
from extract.pieces import byte_level, flat, joined, pieces_of, whole_characters
from extract.selection import Vocabulary
from extract.special_tokens import Bos, Eos, SpecialTokens, special_tokens

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A HuggingFace `tokenizer.json`, with the bytes it was made from, and what is done with documents besides.

    Attributes:
        engine: The tokenizer of the library.
        data: Bytes of `tokenizer.json`.
        plain: Tokens before and after each text.
        rendered: Tokens before and after each chat, which has those that its template wrote.
        template: For chats; None where the model has none.
        answer: Whether a chat that ends with its user is continued by what comes before an answer.
    """

    engine: "tokenizers.Tokenizer"
    data: bytes = dataclasses.field(repr=False)
    plain: SpecialTokens = dataclasses.field(default_factory=SpecialTokens)
    rendered: SpecialTokens = dataclasses.field(default_factory=lambda: SpecialTokens(rendered=True))
    template: ChatTemplate | None = dataclasses.field(default=None, repr=False)
    answer: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 of `tokenizer.json`."""
        return hashlib.sha256(self.data).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What decides the tokens of a text."""
        special: Any = self.plain.provenance() if self.plain.prefix or self.plain.suffix else "none"
        return {"sha256": self.digest, "special_tokens": special}

    @property
    def vocabulary(self) -> int:
        """Number of token ids, without those of added tokens."""
        return int(self.engine.get_vocab_size(with_added_tokens=False))

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes that each token stands for, by its id."""
        return pieces_of(self.data)

    @functools.cached_property
    def words(self) -> Vocabulary:
        """What a selection of tokens needs to know."""
        added = self.engine.get_added_tokens_decoder()
        special = frozenset(number for number, token in added.items() if token.special)
        return Vocabulary(
            self.pieces, special, lambda text: self.engine.encode(text, add_special_tokens=False).ids
        )  # fmt: skip

    @functools.cached_property
    def piece_bytes(self) -> Int64[np.ndarray, " vocabulary"] | None:
        """Sizes of the pieces; None where the tokens of a text do not stand for exactly its bytes."""
        exact = byte_level(json.loads(self.data))
        return np.fromiter(map(len, self.pieces), np.int64, len(self.pieces)) if exact else None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of some documents, one after the other, with their places in the UTF-8 of their documents."""

    counts: Int64[np.ndarray, " document"]
    ids: Int32[np.ndarray, " token"]
    start: UInt32[np.ndarray, " token"]
    end: UInt32[np.ndarray, " token"]


def load_tokenizer(
    folder: str | Path,
    *,
    bos: Bos = "model",
    eos: Eos = "never",
    answer: bool = False,
    chat_date: str | None = None,
) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: Of a model, with `tokenizer.json`; the chat template lies there as well.
        bos: What goes before every text; see `extract.special_tokens`.
        eos: What goes after.
        answer: End chats whose last message is the user's with what comes before an answer.
        chat_date: The date, such as 2026-07-26, for templates that write today's.

    Raises:
        InputError: there is no `tokenizer.json`, it cannot be read, or it has no such token.
    """
    import tokenizers

    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(
            f"{folder} has no {FILE}; expected a HuggingFace model folder with a fast tokenizer; put the "
            f"{FILE} there that belongs to the model"
        )
    data = path.read_bytes()
    try:
        engine = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception
        raise InputError(f"{path} is not a tokenizer ({str(error)[:80]}); expected a HuggingFace {FILE}") from None
    plain, rendered = (special_tokens(folder, engine, bos=bos, eos=eos, rendered=chat) for chat in (False, True))
    template = load_chat_template(folder, now=None if chat_date is None else _date(chat_date))
    return Tokenizer(engine, data, plain, rendered, template, answer)


def prepare(document: Document, tokenizer: Tokenizer) -> Document | Problem:
    """The document with its text: that of a chat is rendered, that of tokens is what they stand for.

    A `Problem` where a chat is refused by the template, a token is none of this tokenizer, or tokens stand for a text
    that is too long.

    Raises:
        InputError: there is no template for chats, or one that writes today's date.
    """
    if document.messages is not None:
        return _rendered(document, document.messages, tokenizer)
    if document.token_ids is None:
        return document
    known = len(tokenizer.pieces)
    if wrong := [number for number in document.token_ids if number >= known]:
        return Problem(
            "wrong type",
            f"document {document.id!r} ({document.source}) has token {wrong[0]}, the tokenizer has 0 to {known - 1}; "
            "expected tokens of this tokenizer; give the model whose tokenizer made them",
        )
    text = joined([tokenizer.pieces[number] for number in document.token_ids])[0]
    return too_long(text, f"document {document.id!r} ({document.source})") or dataclasses.replace(document, text=text)


def begin_encoding(documents: Sequence[Document], tokenizer: Tokenizer) -> "list[tokenizers.Encoding]":
    """What the library makes of some texts, in as many threads as there are cores, without Python's lock."""
    engine = tokenizer.engine
    batch = engine.encode_batch if tokenizer.piece_bytes is None else engine.encode_batch_fast  # without offsets
    return batch(
        [document.text if document.token_ids is None else "" for document in documents], add_special_tokens=False
    )


def size_problem(document: Document, tokenizer: Tokenizer, found: "tokenizers.Encoding") -> Problem | None:
    """Why a document has too few tokens or too many, if it has.

    Args:
        document: with its text.
        tokenizer: of the model.
        found: what `begin_encoding` made of it.
    """
    own, most = len(found if document.token_ids is None else document.token_ids), MAX_READ_BYTES // TOKEN_BYTES
    if not own:
        return Problem(
            "empty",
            f"document {document.id!r} ({document.source}) has no tokens; expected text that the tokenizer "
            "does not drop; remove the document",
        )
    special = tokenizer.plain if document.messages is None else tokenizer.rendered
    if own + len(special.prefix) + len(special.suffix) <= most:
        return None
    count = own + sum(map(len, _around(document, found.ids, tokenizer)))
    if count <= most:
        return None
    return Problem(
        "too long",
        f"document {document.id!r} ({document.source}) has {count:,} tokens; expected at most {most:,}, "
        "which are read at once; cut it into several documents",
    )


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, found: "Sequence[tokenizers.Encoding] | None" = None
) -> Encoded:
    """Tokens of some documents that were prepared.

    Args:
        documents: with their texts, and with tokens: see `size_problem`.
        tokenizer: of the model.
        found: what `begin_encoding` made of them; None does it now.
    """
    found = begin_encoding(documents, tokenizer) if found is None else found
    own = [
        each.ids if document.token_ids is None else document.token_ids
        for document, each in zip(documents, found, strict=True)
    ]
    around = [_around(document, ids, tokenizer) for document, ids in zip(documents, own, strict=True)]
    before, after = (np.fromiter((len(each[side]) for each in around), np.int64, len(around)) for side in (0, 1))
    counts = before + after + np.fromiter(map(len, own), np.int64, len(own))
    lists = [[*ends[0], *ids, *ends[1]] if any(ends) else ids for ends, ids in zip(around, own, strict=True)]
    ids = flat(lists, int(counts.sum()))
    first = np.cumsum(counts) - counts
    raw = [document.text.encode() for document in documents]
    text_bytes = np.fromiter(map(len, raw), np.int64, len(raw))
    text_first = np.repeat(np.cumsum(text_bytes) - text_bytes, counts)
    if tokenizer.piece_bytes is None:
        exact = np.zeros(len(raw), bool)
        start, end = (np.zeros(len(ids), np.int64) for _ in range(2))
    else:
        here = tokenizer.piece_bytes[ids]
        if before.any() or after.any():  # tokens around a text have no place in it
            place = np.arange(len(ids)) - np.repeat(first, counts)
            here[(place < np.repeat(before, counts)) | (place >= np.repeat(counts - after, counts))] = 0
        end = np.cumsum(here)
        begins = np.repeat((end - here)[first], counts)
        start, end = end - here - begins, end - begins
        exact = (np.add.reduceat(here, first) == text_bytes) & _unchanged(documents, tokenizer)
    for number in np.flatnonzero(~exact).tolist():
        inner = slice(int(first[number] + before[number]), int(first[number] + counts[number] - after[number]))
        spans = _spans(documents[number], found[number], tokenizer)
        start[inner.start - before[number] : inner.start], end[inner.start - before[number] : inner.start] = 0, 0
        start[inner], end[inner] = spans
        start[inner.stop : inner.stop + after[number]] = end[inner.stop : inner.stop + after[number]] = text_bytes[
            number
        ]
    start, end = whole_characters(np.frombuffer(b"".join(raw), np.uint8), start + text_first, end + text_first)
    return Encoded(counts, ids, (start - text_first).astype(np.uint32), (end - text_first).astype(np.uint32))


def _around(document: Document, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens before and after those of a document. What was tokenised before is as it is.

    A text that begins with the token already, as a rendered chat does, gets no second one.
    """
    if document.token_ids is not None:
        return (), ()
    before, after = (tokenizer.plain if document.messages is None else tokenizer.rendered).around(ids)
    return () if tuple(ids[: len(before)]) == before else before, after


def _rendered(document: Document, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Document | Problem:
    if tokenizer.template is None:
        raise InputError(
            f"document {document.id!r} ({document.source}) is a chat, and the model has no chat template; expected "
            "texts; give a model that was tuned for chats, or render them before"
        )
    if tokenizer.template.reads_the_clock:
        raise InputError(
            f"document {document.id!r} ({document.source}) is a chat, and the model's template writes today's date "
            "into it, so that tomorrow's run would be another; expected a date; give --chat-date, such as 2026-07-26"
        )
    answer = tokenizer.answer and messages[-1]["role"] != "assistant"
    try:
        text, prompt = chat_text(messages, tokenizer.template, where=document.source, add_generation_prompt=answer)
    except ChatError as error:
        return Problem("refused chat", str(error))
    checked = checked_text(text, f"{document.source}, rendered,")
    if isinstance(checked, Problem):
        return checked
    return dataclasses.replace(document, text=checked, completion=prompt)


def _date(text: str) -> dt.datetime:
    try:
        return dt.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"the date of chats is {text!r}; expected one such as 2026-07-26; correct it") from None


def _unchanged(documents: Sequence[Document], tokenizer: Tokenizer) -> Bool[np.ndarray, " document"]:
    """Which texts the tokenizer's normalizer leaves as they are."""
    change = tokenizer.engine.normalizer
    if change is None:
        return np.ones(len(documents), bool)
    texts = [document.text for document in documents]
    return np.array([text.isascii() or change.normalize_str(text) == text for text in texts])


def _spans(
    document: Document, found: "tokenizers.Encoding", tokenizer: Tokenizer
) -> tuple[Int64[np.ndarray, " token"], Int64[np.ndarray, " token"]]:
    """First and one-past-last byte of each token of one text, by the tokenizer's own account."""
    if document.token_ids is not None:
        return joined([tokenizer.pieces[number] for number in document.token_ids])[1:]
    if tokenizer.piece_bytes is not None:
        found = tokenizer.engine.encode(document.text, add_special_tokens=False)  # with offsets
    spans = np.asarray(found.offsets, np.int64).reshape(-1, 2)
    code_points = np.frombuffer(document.text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    edges = np.concatenate([[0], np.cumsum(sizes)])
    return edges[spans[:, 0]], edges[spans[:, 1]]
