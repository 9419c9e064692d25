"""HTML that a notebook shows, in its own colours: tables and values. No script, no style sheet, no link.

Styles stand at each cell, since a style sheet would reach other cells of the notebook; where they are taken away, the
tables are still tables. Pure: no input, no output.
"""

import html
from collections.abc import Iterable, Sequence

_TABLE = "border-collapse:collapse;border:0"
_CELL = "padding:0.1em 1em 0.1em 0;vertical-align:top;text-align:left;white-space:pre-wrap"


def table(rows: Iterable[Sequence[str]], *, head: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; without `head` its rows have none above them."""
    above = f"<thead>{_row('th', head)}</thead>" if head else ""
    return f'<table style="{_TABLE}">{above}<tbody>{"".join(_row("td", row) for row in rows)}</tbody></table>'


def isolated(text: str) -> str:
    """Any text as HTML: escaped, and in whatever script it is, it cannot turn around what stands beside it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def _row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(_cell(kind, cell) for cell in cells)}</tr>"


def _cell(kind: str, cell: str) -> str:
    return f'<{kind} style="{_CELL}">{cell}</{kind}>'
