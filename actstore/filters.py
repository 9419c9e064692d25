"""What a reader asks of samples: a `Filter`, checked when it is made. No input, no output."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Bool, Shaped

from actstore.errors import InputError

Number: TypeAlias = int | float
Value: TypeAlias = str | Number
Wanted: TypeAlias = slice | tuple[Value, ...]


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which samples to keep: those for which everything holds that is said here.

    Columns are those of samples (`position`, `token_id`, your own) and of documents (`id`, your own). What is wanted of
    one is a value, several values, or for numbers a `slice`, which holds both its ends as in xarray's `sel`. Values are
    compared in the dtype of the column.

    Args:
        split: (start, stop) of 0 to 1: documents whose hashed id falls there, start included. The same document falls
            to the same place in every store, so `(0, 0.9)` and `(0.9, 1)` share none, also across models.
        keep: what is wanted of each column.
        drop: what is not wanted of each column.
        max_norm: how many times the median norm of its site and layer a row may have; the median is that of all rows
            of the store. A sample of several layers is kept if all its rows are. Attention sinks have about 100 times
            the median on Qwen.

    Raises:
        InputError: something in it cannot be meant.

    Example:
        >>> train = Filter(split=(0, 0.9), keep={"position": slice(1, None)}, drop={"token_id": 151643}, max_norm=10)
    """

    split: Sequence[Number] = (0.0, 1.0)
    keep: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    drop: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_norm: Number | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a store, and writes equal filters equally."""
        object.__setattr__(self, "split", _split(self.split))
        if self.max_norm is not None:
            object.__setattr__(self, "max_norm", _multiple(self.max_norm))
        for said in ("keep", "drop"):
            columns = getattr(self, said)
            if not isinstance(columns, Mapping):
                raise InputError(f"{said} is {columns!r}; expected what is wanted of columns by their names")
            object.__setattr__(self, said, {name: _wanted(name, value) for name, value in columns.items()})

    def __hash__(self) -> int:
        """Equal filters have equal hashes."""
        return hash(repr(self.as_json()))

    def as_json(self) -> list[Any]:
        """Everything it says, in one order: what a loader's state remembers."""
        columns = [
            [said, name, {"slice": [wanted.start, wanted.stop]} if isinstance(wanted, slice) else list(wanted)]
            for said in ("keep", "drop")
            for name, wanted in sorted(getattr(self, said).items())
        ]
        return [list(self.split), self.max_norm, columns]


class Condition(NamedTuple):
    """What one column must be, or must not be."""

    name: str
    wanted: Wanted
    drop: bool

    def refuse_kind(self, *, number: bool) -> None:
        """Refuses text of a column of numbers, and the reverse: nothing would ever be equal."""
        wrong: list[object] = [] if number else [self.wanted]
        if not isinstance(self.wanted, slice):
            wrong = [value for value in self.wanted if isinstance(value, str) == number]
        if wrong:
            expected = "numbers, or a slice of them" if number else "values that are text"
            raise InputError(f"column {self.name!r}: found {wrong[0]!r}; expected {expected}")

    def holds(self, values: Shaped[np.ndarray, " n"] | Sequence[str]) -> Bool[np.ndarray, " n"]:
        """For each value of the column, whether its sample may be kept."""
        if isinstance(self.wanted, slice):
            low, high = self.wanted.start, self.wanted.stop
            numbers = np.asarray(values)
            inside = np.ones(len(numbers), bool)
            if low is not None:
                inside &= numbers >= low
            if high is not None:
                inside &= numbers <= high
        elif isinstance(values, np.ndarray):
            inside = np.isin(values, _in_dtype(self.wanted, values.dtype))
        else:
            wanted = frozenset(self.wanted)
            inside = np.array([value in wanted for value in values], bool)
        return ~inside if self.drop else inside


def _in_dtype(wanted: tuple[Value, ...], dtype: np.dtype) -> Shaped[np.ndarray, " m"]:
    """Numbers in the dtype of a column; those that it cannot hold equal nothing in it."""
    if dtype.kind == "f":
        return np.array(wanted, dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return np.array([value for value in wanted if isinstance(value, int) and low <= value <= high], dtype)


def _split(split: object) -> tuple[float, float]:
    expected = f"split is {split!r}; expected (start, stop) with 0 <= start < stop <= 1"
    if not isinstance(split, Sequence) or isinstance(split, str) or len(split) != 2:
        raise InputError(expected)
    ends = [_plain(end) for end in split]
    if not all(isinstance(end, int | float) for end in ends) or not 0 <= ends[0] < ends[1] <= 1:
        raise InputError(expected)
    return float(ends[0]), float(ends[1])


def _multiple(value: object) -> float:
    found = _plain(value)
    if isinstance(value, bool) or not isinstance(found, int | float) or not (found > 0 and math.isfinite(found)):
        raise InputError(f"max_norm is {value!r}; expected a positive multiple of the median norm, or None")
    return float(found)


def _wanted(name: object, value: object) -> Wanted:
    """What is wanted of a column: a slice, or at least one value, each once and in one order."""
    if not isinstance(name, str):
        raise InputError(f"column {name!r}: expected the name of a column")
    if isinstance(value, slice):
        ends = [None if end is None else _value(name, end) for end in (value.start, value.stop)]
        if value.step is not None or ends == [None, None]:
            raise InputError(f"column {name!r}: found {value}; expected slice(first, last), one of them may be None")
        if None not in ends and not any(isinstance(end, str) for end in ends) and ends[0] > ends[1]:  # type: ignore[operator]
            raise InputError(f"column {name!r}: found {value}, which holds nothing; expected first <= last")
        return slice(*ends)
    if isinstance(value, np.ndarray):
        value = value.reshape(-1) if value.ndim < 2 else list(value)
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    found = {_value(name, each) for each in (cast("Iterable[object]", value) if several else [value])}
    if not found:
        raise InputError(f"column {name!r}: found no value; name at least one, or leave the column out")
    return tuple(sorted(found, key=lambda each: (isinstance(each, str), each)))


def _value(name: str, value: object) -> Value:
    """Text, a whole number or a finite one, as Python's; a whole float is a whole number."""
    found = _plain(value)
    if isinstance(found, float) and math.isfinite(found):
        return int(found) if found.is_integer() else found
    if not isinstance(found, str | int):
        raise InputError(f"column {name!r}: found {value!r}; expected text, a whole number or a finite one")
    return int(found) if isinstance(found, bool) else found


def _plain(value: object) -> Any:
    """NumPy's numbers as Python's."""
    single = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.ndim)
    return cast("np.generic", value).item() if single else value
