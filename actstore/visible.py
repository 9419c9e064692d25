"""What is seen of a text: every letter of it, the same on a terminal and in a notebook, and the columns that it takes.

What would move a cursor, break a line, turn around the order of letters or not be seen at all becomes a visible letter
or escape. Pure: no input, no output.
"""

import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

CUT = "\u2026"
_MOST_JOINED = 32  # letters drawn in one place; Unicode's Stream-Safe Text has 31
_PICTURES = {chr(code): chr(0x2400 + code) for code in range(32)} | {"\n": "\u23ce", "\t": "\u21e5", "\x7f": "\u2421"}
_NON_JOINER, _JOINER, _AS_EMOJI = "\u200c", "\u200d", "\ufe0f"  # Persian and Indic words need the first two
_CIRCLE = "\u25cc"


class Cluster(NamedTuple):
    """Letters that are drawn in one place, and the columns of a terminal that they take."""

    letters: str
    columns: int


def visible(text: str) -> str:
    """Text of one line in which everything is seen: line breaks, tabs, controls, and marks with nothing to stand on.

    A line break is a return symbol, a tab an arrow, other ASCII controls are their pictures. What a terminal or browser
    would not show, or would obey (bidirectional overrides, lone surrogates, unknown characters), is a Python escape.
    Spaces stay as they are.
    """
    return joined(clusters(text))


def clusters(text: str) -> list[Cluster]:
    """Visible letters by the place where they are drawn, near to Unicode's grapheme clusters (UAX 29).

    East Asian wide letters take two columns, combining marks and joiners none, joined emoji and flags two: as most
    terminals draw them; some do not join emoji. A mark with nothing before it, or on too high a stack, stands on a
    dotted circle.
    """
    found: list[Cluster] = []
    for letter in "".join(map(_shown, text)):
        columns = _columns_of(letter)
        before = found[-1] if found else None
        if before and len(before.letters) < _MOST_JOINED and (columns == 0 or _joins(before, letter)):
            wide = columns or (letter == _AS_EMOJI and _is_emoji(before))
            found[-1] = Cluster(before.letters + letter, 2 if wide else before.columns)
        else:
            found.append(Cluster(letter, columns) if columns else Cluster(_CIRCLE + letter, 1))
    return found


def columns_of(found: Iterable[Cluster]) -> int:
    """Columns that clusters take together."""
    return sum(cluster.columns for cluster in found)


def joined(found: Iterable[Cluster]) -> str:
    """The text of clusters."""
    return "".join(cluster.letters for cluster in found)


def first_columns(text: str, columns: int) -> list[Cluster]:
    """The beginning of a text, as much as fits, with a sign where more was cut. Costs no more for a long text."""
    return _cut(clusters(text[: _letters(columns)]), columns)


def last_columns(text: str, columns: int) -> list[Cluster]:
    """The end of a text, as much as fits, with a sign where more was cut. Costs no more for a long text."""
    return _cut(clusters(text[-_letters(columns) :])[::-1], columns)[::-1]


def _cut(found: list[Cluster], columns: int) -> list[Cluster]:
    if columns_of(found) <= columns:
        return found
    kept, left = list[Cluster](), columns - 1
    for cluster in found:
        left -= cluster.columns
        if left < 0:
            break
        kept.append(cluster)
    return [*kept, Cluster(CUT, 1)] if columns > 0 else []


def _letters(columns: int) -> int:
    """More letters than can be drawn in some columns: a text that is cut there is always cut again."""
    return _MOST_JOINED * (columns + 1)


def _shown(letter: str) -> str:
    kept = letter.isprintable() or letter in (_JOINER, _NON_JOINER) or unicodedata.category(letter) == "Zs"
    return letter if kept else _PICTURES.get(letter) or ascii(letter)[1:-1]


def _joins(before: Cluster, letter: str) -> bool:
    """Whether a letter with columns of its own is drawn into what stands before it: emoji, and halves of flags."""
    tone = "\U0001f3fb" <= letter <= "\U0001f3ff"
    if _is_emoji(before) and (tone or before.letters[-1] == _JOINER):
        return True
    return len(before.letters) == 1 and _is_half_flag(before.letters) and _is_half_flag(letter)


def _is_emoji(cluster: Cluster) -> bool:
    return cluster.letters[0] != _CIRCLE and unicodedata.category(cluster.letters[0]) == "So"


def _is_half_flag(letter: str) -> bool:
    return "\U0001f1e6" <= letter <= "\U0001f1ff"


def _columns_of(letter: str) -> int:
    """Columns of one letter: none of marks, joiners, and the vowels and finals of a Korean syllable."""
    joins = letter in (_JOINER, _NON_JOINER) or "\u1160" <= letter <= "\u11ff"
    if joins or unicodedata.category(letter) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in ("W", "F") else 1
