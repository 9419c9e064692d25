"""What kind of value a setting has to be: `"false"` is a string, which Python takes for true, and true is not 1."""

import reprlib
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as errors show it, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def _is_positive(value: object) -> bool:
    """JSON has no infinity, but Python reads one; and a whole number may be too large to be a float."""
    return is_number(value) and 0 < value <= sys.float_info.max


def _is_words(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


class Kind(NamedTuple):
    """A kind of value: how errors call it, and whether a value is one."""

    expected: str
    fits: Callable[[object], bool]


WHOLE = Kind("a positive whole number", lambda value: is_whole(value) and value > 0)
COUNT = Kind("a whole number, 0 or more", lambda value: is_whole(value) and value >= 0)
POSITIVE = Kind("a positive number", _is_positive)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
WORDS = Kind("a list of strings", _is_words)
