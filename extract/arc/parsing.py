"""Answers to grids: rows of digits, spaces or commas between them, JSON, fences and words around. Never a guess."""

import json
import re
from collections.abc import Iterator

from extract.arc.faults import Fault
from extract.arc.grids import Grid, grid_of

_JSON = re.compile(r"\[\s*\[\s*[0-9]")
_LABEL = re.compile(r"^[A-Za-z* ]{1,40}:")  # "Output: 012", on the line of the first row
_ROW = re.compile(r"\s*\[?[0-9\s,|]*[0-9][0-9\s,|]*\]?[\s,]*")
_FENCE = re.compile(r"\s*```")


def parse_grid(text: str) -> Grid | None:
    r"""The grid that an answer gives, or None where it gives none.

    An answer that begins with a grid gives that one: models without a chat template go on with puzzles of their own.
    Any other gives its last grid: models that explain come to the answer in the end. A row is a line of digits, or of
    digits with spaces, commas or bars between; a line of anything else, or an empty one, ends a grid. A grid may be a
    list of lists in JSON too. Rows of several lengths and JSON that is cut off are no grid.

    Example:
        >>> parse_grid("The output is:\n```\n0 1\n2 3\n```\nEach cell is counted.")
        ((0, 1), (2, 3))
        >>> parse_grid("[[0, 1], [2]]") is None
        True
    """
    candidates = list(_candidates(text))
    if not candidates:
        return None
    begins, first = candidates[0]
    try:
        return grid_of(first if begins else candidates[-1][1])
    except Fault:
        return None


def _candidates(text: str) -> Iterator[tuple[bool, object]]:
    """Whatever may be a grid, and whether nothing but blanks, a label and a fence stands before it."""
    rows, begins = list[list[int]](), True
    for part in _parts(text):
        row = _row(part) if isinstance(part, str) else None
        if rows and row is None:
            yield begins, rows
            rows, begins = [], False
        if row is not None:
            rows.append(row)
        elif not isinstance(part, str):
            yield begins, part
            begins = False
        elif _LABEL.sub("", part).strip() and not _FENCE.match(part):
            begins = False
    if rows:
        yield begins, rows


def _parts(text: str) -> Iterator[str | list[object]]:
    """The lines of a text, and its lists of lists in JSON. One that does not end is an empty list, the last part."""
    end = 0
    for found in _JSON.finditer(text):
        if found.start() >= end:
            yield from text[end : found.start()].splitlines()
            try:
                value, end = json.JSONDecoder().raw_decode(text, found.start())
            except (ValueError, RecursionError):
                value, end = [], len(text)
            yield value
    yield from text[end:].splitlines()


def _row(line: str) -> list[int] | None:
    """The cells of a line: digits that stand alone, or one run of digits."""
    words = _LABEL.sub("", line)
    if not _ROW.fullmatch(words):
        return None
    numbers = re.findall("[0-9]+", words)
    if len(numbers) > 1 and max(map(len, numbers)) > 1:
        return None
    return [int(digit) for digit in "".join(numbers)]
