"""Rows as text with the row's token marked, for a terminal and for a notebook. For looking, not for parsing.

Text comes from untrusted stores: nothing of it is obeyed, all of it is seen (`actstore.visible`).
"""

import html as escaping
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar, overload, runtime_checkable

import numpy as np

from actstore.errors import InputError
from actstore.notebook import isolated, table
from actstore.visible import CUT, columns_of, first_columns, joined, last_columns, visible

WIDTH = 120  # columns of a line where no terminal says how many it has
LEAST_TEXT = 20  # columns that labels leave for the text
MOST_LABEL = 24  # columns of one label
MOST_LETTERS = 2000  # of each piece of a row in HTML
MOST_ROWS = 100  # that show themselves
_OPEN, _CLOSE, _NOTHING, _BLANK = "\u27e6", "\u27e7", "\u2205", "\u2423"
_REVERSE, _FORWARD = "\x1b[7m", "\x1b[27m"  # ECMA-48, SGR 7 and 27: reverse video is seen on light and dark


@runtime_checkable
class InContext(Protocol):
    """One token with the text around it, such as `actstore.TokenInContext`."""

    @property
    def before(self) -> str:
        """Text before the token."""

    @property
    def token(self) -> str:
        """Text of the token; empty where it has none."""

    @property
    def after(self) -> str:
        """Text after the token."""


Row = TypeVar("Row", bound=InContext)
Labels: TypeAlias = Mapping[str, Iterable[object]]


class TokenRows(Sequence[Row]):
    """Rows that show themselves with their tokens marked; otherwise a sequence like any other. Never changed.

    The first `MOST_ROWS` are shown, on a terminal in lines as long as it is wide; `text` and `html` show all.

    Args:
        rows: what to hold.
        labels: more about each row, such as a score, by name.

    Raises:
        InputError: there are more or fewer labels than rows.
    """

    def __init__(self, rows: Iterable[Row], *, labels: Labels | None = None) -> None:
        self.rows = tuple(rows)
        self.labels = _checked(labels, len(self.rows))

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> "TokenRows[Row]": ...

    def __getitem__(self, place: int | slice) -> "Row | TokenRows[Row]":
        """A row; of a slice, rows with their labels."""
        if isinstance(place, slice):
            return TokenRows(self.rows[place], labels={name: values[place] for name, values in self.labels.items()})
        return self.rows[place]

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        """Equal to other such rows with the same labels, and to a list or tuple of the same rows."""
        if isinstance(other, TokenRows):
            return self.rows == other.rows and self.labels == other.labels
        return self.rows == tuple(other) if isinstance(other, list | tuple) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of a list: labels may be anything

    def __repr__(self) -> str:
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        shown = self[:MOST_ROWS]
        lines = [text(shown, labels=shown.labels, width=columns)] if shown else []
        return "\n".join([*lines, *self._left_out()])

    def _repr_html_(self) -> str:
        """What notebooks show."""
        shown = self[:MOST_ROWS]
        return html(shown, labels=shown.labels) + "".join(f"<p>{line}</p>" for line in self._left_out())

    def _left_out(self) -> list[str]:
        """What is said below the rows that are shown, if anything."""
        if not self.rows:
            return ["no rows"]
        more = len(self.rows) - MOST_ROWS
        return [f"and {more:,} more: take a slice to see them"] if more > 0 else []


def text(rows: Sequence[InContext], *, labels: Labels | None = None, width: int = WIDTH, colour: bool = False) -> str:
    """The rows for a terminal, one line each, their tokens below each other between the marks of `actstore head`.

    Text that does not fit is cut at its outer ends, between letters as they are drawn.

    Args:
        rows: what to show.
        labels: more about each row, by name: shown before its text, without the names.
        width: columns of a line. Labels leave the text at least `LEAST_TEXT`, though a line is then longer.
        colour: True shows the token in reverse video and without marks: for terminals only.

    Raises:
        InputError: there are more or fewer labels than rows, or no room at all.
    """
    if width < 1:
        raise InputError(f"width is {width}; expected a number of columns, such as {WIDTH}")
    padded = [_padded(values) for values in _checked(labels, len(rows)).values()]
    taken = sum(columns_of(first_columns(cells[0], width)) + 2 for cells in padded if cells)
    room = max(width - taken - 2 * (not colour), LEAST_TEXT)
    before = [last_columns(row.before, room // 2) for row in rows]
    left = max(map(columns_of, before), default=0)
    opened, closed = (_REVERSE, _FORWARD) if colour else (_OPEN, _CLOSE)
    lines = []
    for place, (row, ahead) in enumerate(zip(rows, before, strict=True)):
        token = first_columns(row.token or _NOTHING * colour, room - left)
        after = first_columns(row.after, room - left - columns_of(token))
        cells = "".join(f"{column[place]}  " for column in padded)
        pad = " " * (left - columns_of(ahead))
        lines.append(f"{cells}{pad}{joined(ahead)}{opened}{joined(token)}{closed}{joined(after)}")
    return "\n".join(lines)


def line(row: InContext) -> str:
    """One row with its token between marks, neither cut nor aligned: what `actstore head` shows."""
    return f"{visible(row.before)}{_OPEN}{visible(row.token)}{_CLOSE}{visible(row.after)}"


def html(rows: Sequence[InContext], *, labels: Labels | None = None) -> str:
    """The rows for a notebook: a table with a row each, its token in `<mark>`.

    A token without text is shown as an empty set, one of nothing but spaces as open boxes: both are seen where a
    notebook takes styles away, too. The text of a row is isolated: its first letter decides whether it runs from the
    right, and it turns nothing else around. Pieces of more than `MOST_LETTERS` are cut at their outer ends.

    Raises:
        InputError: there are more or fewer labels than rows.
    """
    checked = _checked(labels, len(rows))
    if not rows:
        return ""
    cells = [
        [*(isolated(_label(values[place])) for values in checked.values()), _in_html(row)]
        for place, row in enumerate(rows)
    ]
    return table(cells, head=[*(isolated(_label(name)) for name in checked), "text"] if checked else ())


def _in_html(row: InContext) -> str:
    ahead = f"{CUT}{row.before[-MOST_LETTERS:]}" if len(row.before) > MOST_LETTERS else row.before
    blank = row.token != "" and not row.token.strip(" ")
    token = _until_cut(_BLANK * min(len(row.token), MOST_LETTERS) if blank else row.token or _NOTHING)
    ahead, token, after = (escaping.escape(visible(piece)) for piece in (ahead, token, _until_cut(row.after)))
    return f"<bdi>{ahead}<mark>{token}</mark>{after}</bdi>"


def _until_cut(piece: str) -> str:
    return f"{piece[:MOST_LETTERS]}{CUT}" if len(piece) > MOST_LETTERS else piece


def _checked(labels: Labels | None, rows: int) -> dict[str, tuple[object, ...]]:
    found = {name: tuple(values) for name, values in (labels or {}).items()}
    wrong = [name for name, values in found.items() if len(values) != rows]
    if wrong:
        raise InputError(
            f"labels {wrong[0]!r}: found {len(found[wrong[0]])} values for {rows} rows; give one for each row"
        )
    return found


def _label(value: object) -> str:
    """A label as a short line; numbers that are not whole with four digits."""
    shown = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
    return joined(first_columns(shown, MOST_LABEL))


def _padded(values: Sequence[object]) -> list[str]:
    """Labels of one width, to the right: digits stand below each other."""
    cells = [_label(value) for value in values]
    widths = [columns_of(first_columns(cell, MOST_LABEL)) for cell in cells]
    return [f"{' ' * (max(widths) - width)}{cell}" for cell, width in zip(cells, widths, strict=True)]
