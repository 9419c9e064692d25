"""Grids of ARC tasks: out of JSON, checked, and as rows of digits.

A grid is a tuple of rows, a row a tuple of whole numbers 0 to 9: it can be compared, hashed and printed.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from extract.arc.faults import Fault

Grid: TypeAlias = tuple[tuple[int, ...], ...]

MOST_CELLS = 30  # on a side, as in ARC's own description of its files
_CELLS, _CELL = frozenset(range(10)), "a whole number 0 to 9"
_KINDS = frozenset({int, float})  # of cells, exactly: True is an int to `isinstance`, and equal to 1


def grid_of(value: object) -> Grid:
    """A grid out of lists or arrays. Whole numbers that are written as floats become integers: 3.0 is 3.

    Raises:
        Fault: It is no grid of 1 to 30 equally long rows of 1 to 30 whole numbers 0 to 9.
    """
    grid = tuple(_row(row) for row in _items(value, "grid", "rows"))
    if len({len(row) for row in grid}) > 1:
        widths = ", ".join(str(len(row)) for row in grid)
        raise Fault("ragged grid", f"the rows of a grid have {widths} cells", "rows of one length")
    return grid


def grid_text(grid: Grid) -> str:
    """Rows of digits, one row per line, without a line break at the end."""
    return "\n".join("".join(map(str, row)) for row in grid)


def _items(value: object, what: str, parts: str) -> Sequence[object]:
    items = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(items, list | tuple):
        raise Fault("wrong type", f"a {what} is a {type(value).__name__}", f"a list of {parts}")
    if not items:
        raise Fault("empty grid", f"a {what} has no {parts}", f"1 to {MOST_CELLS}")
    if len(items) > MOST_CELLS:
        raise Fault("large grid", f"a {what} has {len(items)} {parts}", f"1 to {MOST_CELLS}")
    return items


def _row(value: object) -> tuple[int, ...]:
    cells: Sequence[Any] = _items(value, "row", "cells")
    if not _KINDS.issuperset(map(type, cells)):
        wrong = next(cell for cell in cells if type(cell) not in _KINDS)
        raise Fault("wrong type", f"a cell is {str(wrong)[:20]!r} ({type(wrong).__name__})", _CELL)
    if not _CELLS.issuperset(cells):
        wrong = next(cell for cell in cells if cell not in _CELLS)
        raise Fault("bad cell", f"a cell is {str(wrong)[:20]}", _CELL)
    return tuple(map(int, cells))
