"""What single samples are: values of their columns, and their tokens in the text around them."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64, Shaped, UInt32

from actstore.documents import StoredDocuments
from actstore.errors import InputError, UnfinishedStoreError, UnknownNameError
from actstore.kvstore import Root
from actstore.layout import whole_number
from actstore.ledger import read_asset, read_status
from actstore.markers import committed_ranges
from actstore.reader import read_column
from actstore.schema import Plan


@dataclasses.dataclass(frozen=True)
class TokenInContext:
    """One token with the text around it, exactly as it stands in its document."""

    before: str
    token: str
    after: str


def column(root: Root, plan: Plan, name: str, rows: Sequence[int] | Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """Values of a coordinate such as `document`, `position` or `token_id` for some samples.

    Raises:
        UnknownNameError: no such column.
        InputError: a row does not exist.
        UnfinishedStoreError: a row is not written yet.
    """
    wanted = _existing(plan, rows)
    names = [column.name for column in plan.layout.columns]
    if name not in names:
        raise UnknownNameError(f"column {name!r} is not in this store; it holds {', '.join(names) or 'none'}")
    _check_committed(root, plan, wanted)
    return read_column(root, plan, name, wanted)


def in_context(
    root: Root, plan: Plan, stored: StoredDocuments, rows: Sequence[int] | Int[np.ndarray, " n"], *, window: int
) -> list[TokenInContext]:
    """Each row's token with up to `window` tokens before and after it: `Store.text`."""
    wanted = _existing(plan, rows)
    window = whole_number(window, "window")
    if window < 0:
        raise InputError(f"window is {window}; expected a number of tokens, 0 or more")
    places = zip(column(root, plan, "document", wanted), column(root, plan, "position", wanted), strict=True)
    found: dict[int, tuple[bytes, UInt32[np.ndarray, "token edge"]]] = {}
    shown = []
    for document, position in places:
        if document not in found:
            text = stored.strings("text", np.array([document]))[0].encode()
            found = {int(document): (text, stored.tokens(int(document))[1])}  # rows come in runs of one document
        text, spans = found[int(document)]
        if not 0 <= position < len(spans):
            raise InputError(f"a sample is token {position} of document {document}, which has {len(spans)} tokens")
        shown.append(_cut(text, spans, int(position), window))
    return shown


def token_ids(root: Root, plan: Plan, text: str) -> list[int]:
    """Ids of the tokens that are exactly this text, by the stored tokenizer's vocabulary. Reads `tokenizer.json`.

    Raises:
        UnknownNameError: there is no such token, or the store has no tokenizer: give its `token_id` as a number.
    """
    tokenizer = json.loads(read_asset(root, plan, "tokenizer.json"))
    vocabulary = tokenizer["model"]["vocab"]  # by piece, or a list of (piece, score)
    if isinstance(vocabulary, list):
        vocabulary = {piece: number for number, (piece, *_) in enumerate(vocabulary)}
    forms = {
        text,
        "".join(_BYTE_LEVEL[byte] for byte in text.encode()),
        text.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}"),
    }
    found = {vocabulary[form] for form in forms if form in vocabulary}
    found |= {added["id"] for added in tokenizer.get("added_tokens", []) if added["content"] == text}
    if not found:
        near = [
            other for other in (f" {text}", text.strip()) if other != text and other and _is_token(vocabulary, other)
        ]
        hint = f"; {' and '.join(map(repr, near))} is one" if near else ""
        raise UnknownNameError(f"no token of {root.url} is exactly {text!r}{hint}: a token's spaces belong to it")
    return sorted(found)


def _is_token(vocabulary: dict[str, int], text: str) -> bool:
    return "".join(_BYTE_LEVEL[byte] for byte in text.encode()) in vocabulary


def _byte_level() -> list[str]:
    """The characters that byte-level vocabularies write bytes with: printable ones, and U+0100 on for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_LEVEL = _byte_level()


def _existing(plan: Plan, rows: Sequence[int] | Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    found, samples = np.atleast_1d(np.asarray(rows)), plan.layout.samples
    if found.size and found.dtype.kind not in "iu":
        mask = "; of a mask take np.flatnonzero(mask)" if found.dtype == np.bool else ""
        raise InputError(f"rows are of type {found.dtype}; expected whole numbers{mask}")
    if found.ndim > 1:
        raise InputError(f"rows have the shape {found.shape}; expected numbers, one after the other")
    wanted = found.astype(np.int64)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() < samples):
        raise InputError(f"rows {wanted.min()} to {wanted.max()} asked for; this store has 0 to {samples - 1}")
    return wanted


def _check_committed(root: Root, plan: Plan, rows: Int64[np.ndarray, " n"]) -> None:
    """Refuses rows of an unfinished store that are not written yet. Costs one read, one listing if unfinished."""
    if read_status(root, plan) == "complete":
        return
    starts, stops = np.array([(0, 0), *committed_ranges(root, plan)]).T
    waiting = rows >= stops[np.searchsorted(starts, rows, side="right") - 1]
    if waiting.any():
        block = int(rows[waiting].min()) // plan.layout.block_samples
        raise UnfinishedStoreError(
            f"{root.url} is unfinished: block {block} of the rows asked for is not committed; run the "
            "command that writes it again, or ask for other rows"
        )


def _cut(text: bytes, spans: UInt32[np.ndarray, "token edge"], position: int, window: int) -> TokenInContext:
    """Cuts before, token and after out of the UTF-8 of a document, at whole characters."""
    first, last = max(position - window, 0), min(position + window, len(spans) - 1)
    start, end = (int(edge) for edge in spans[position])
    return TokenInContext(
        text[int(spans[first][0]) : start].decode(errors="replace"),
        text[start:end].decode(errors="replace"),
        text[end : int(spans[last][1])].decode(errors="replace"),
    )
