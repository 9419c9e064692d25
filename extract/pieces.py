"""What each token stands for in bytes, where a tokenizer says so: places in a text without asking for them."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64, UInt8


def byte_level(known: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` spells every byte as one character, as GPT-2 does: then nothing of a text is lost."""
    kinds = {part.get("type") for part in _parts(known.get("decoder"))}
    return "ByteLevel" in kinds


def pieces_of(data: bytes) -> list[bytes]:
    """The bytes that each token of a `tokenizer.json` stands for, by its id; empty for ids of no token."""
    known = json.loads(data)
    vocabulary = known["model"]["vocab"]
    pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((item[0], i) for i, item in enumerate(vocabulary))
    level = byte_level(known)
    table = _byte_table() if level else {}
    fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}  # of SentencePiece
    found: dict[int, bytes] = {}
    for text, number in pairs:
        if level and all(character in table for character in text):
            found[number] = bytes(table[character] for character in text)
        else:
            found[number] = fallback.get(text) or text.replace("\u2581", " ").encode()
    for token in known.get("added_tokens", ()):
        found[token["id"]] = token["content"].encode()
    return [found.get(number, b"") for number in range(max(found, default=-1) + 1)]


def joined(pieces: Sequence[bytes]) -> tuple[str, Int64[np.ndarray, " token"], Int64[np.ndarray, " token"]]:
    """The text of some tokens, and the first and one-past-last byte of each in its UTF-8.

    Where a character is torn, as at the ends of a part of a longer text, U+FFFD stands in its place.
    """
    raw = b"".join(pieces)
    edges = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    text, begin = "", 0
    first, last = edges.copy(), edges.copy()
    while True:
        try:
            return text + raw[begin:].decode(), first[:-1], last[1:]
        except UnicodeDecodeError as error:
            start, stop = begin + error.start, begin + error.end
            text += raw[begin:start].decode() + "\ufffd"
            size = len(text.encode())
            inside, after = (edges > start) & (edges < stop), edges >= stop
            first[inside], last[inside] = size - len("\ufffd".encode()), size
            first[after], last[after] = edges[after] + size - stop, edges[after] + size - stop
            begin = stop


def whole_characters(
    raw: UInt8[np.ndarray, " byte"], start: Int[np.ndarray, " token"], end: Int[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
    """Spans of tokens in UTF-8, widened to the characters that they hold a part of."""
    inside = np.zeros(len(raw) + 1, bool)  # of a character, behind its first byte; one more, where the text ends
    np.equal(raw & 0xC0, 0x80, out=inside[:-1])
    start, end = start.copy(), end.copy()
    for places, step in ((start, -1), (end, 1)):
        torn = np.flatnonzero(inside[places])
        while len(torn):  # three times at most
            places[torn] += step
            torn = torn[inside[places[torn]]]
    return start, end


def flat(lists: Iterator[Sequence[int]] | Sequence[Sequence[int]], count: int) -> Int32[np.ndarray, " token"]:
    """Lists of token ids as one array."""
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32, count)


def _parts(node: Any) -> list[dict[str, Any]]:
    """A component of a tokenizer and those inside it, if it is a sequence."""
    if not isinstance(node, dict):
        return []
    inner = next((value for value in node.values() if isinstance(value, list)), [])
    return [node, *(part for each in inner for part in _parts(each))]


def _byte_table() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on: Radford et al.,
    "Language models are unsupervised multitask learners", 2019.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
