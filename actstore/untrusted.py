"""JSON: bounded before it is parsed where it comes out of a store that may be hostile; canonical where we write it."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from actstore.errors import CorruptStoreError

MAX_DOCUMENT_BYTES = 16 << 20  # Python's objects take about 20 times as much; the manifest is compared, never parsed
MAX_DEPTH = 32
MAX_VALUES = 1 << 18  # each takes up to 250 bytes as Python's object: 64 MiB, three times over

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # one without an end is looked at once, too
_LONG_NUMBER = re.compile(rb"[0-9]{1000}")  # no number that is meant needs as many digits; reading them is slow


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, as UTF-8 bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses JSON from an untrusted store: bounded in size and depth, no duplicate keys, no NaN.

    Raises:
        CorruptStoreError: `where` names the document.
    """
    excess = excess_of(data)
    if excess:
        raise CorruptStoreError(f"{where} {excess}; not read")
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(
            f"{where} is not valid JSON ({printable(str(error), most=80)}); restore it from a copy, or write the "
            "store again"
        ) from None


def excess_of(data: bytes) -> str | None:
    """Which limit a document exceeds, if any. Looked at before any parser recurses or allocates: about 0.2 GB/s."""
    if len(data) > MAX_DOCUMENT_BYTES:
        return f"has {len(data):,} bytes, expected at most {MAX_DOCUMENT_BYTES:,}"
    outside = _STRING.sub(b"", data)
    if _LONG_NUMBER.search(outside):
        return "is not valid JSON (Exceeds the limit of 999 digits in a number)"
    values = sum(map(outside.count, (b"[", b"{", b",")))
    if values > MAX_VALUES:
        return f"has {values:,} values, expected at most {MAX_VALUES:,}"
    bare = np.frombuffer(outside, np.uint8)
    opened = (bare == ord("[")) | (bare == ord("{"))
    closed = (bare == ord("]")) | (bare == ord("}"))
    if np.cumsum(opened.astype(np.int32) - closed.astype(np.int32)).max(initial=0) > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH} levels"
    return None


def printable(text: str, *, most: int) -> str:
    """Text out of a hostile document as part of a message: one line, short, nothing that a terminal would obey."""
    short = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in short)


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every scalar of nested dictionaries and lists with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{prefix}[{index}]")
    else:
        yield prefix, value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number
