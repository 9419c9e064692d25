"""Rows wherever they lie in this process's memory, in mapped files or in its own, taken by one call of NumPy.

NumPy takes rows out of one array, and the rows of a window lie in many files. Here all of them are elements of one
array that begins at the first row and has an element every few bytes; only those are looked at that are rows. So each
row is copied once, to where it is wanted: docs/decisions/0012-rows-are-taken-where-they-lie.md.
"""

import weakref
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int64, Shaped, UInt8

from actstore.moments import as_integers

ROWS_AT_ONCE = 512  # copied twice, the second time out of the core's cache; with fewer NumPy stops other threads


class RowView(NamedTuple):
    """Rows of one layer, in an order, and what they lie in: it stays there as long as this does."""

    elements: Shaped[np.ndarray, " element"]
    places: Int64[np.ndarray, " row"]
    """Which element each row is."""

    @classmethod
    def at(cls, addresses: Int64[np.ndarray, " row"], row_bytes: int, *, step: int, keep: object) -> "RowView":
        """Rows of `row_bytes` bytes at addresses that differ by multiples of `step`, in what `keep` keeps there."""
        first, last = (int(addresses.min()), int(addresses.max())) if len(addresses) else (0, 0)
        count = (last - first) // step + 1 if len(addresses) else 0
        return cls(_elements(first, count, step, row_bytes, keep), (addresses - first) // step)

    @classmethod
    def of(cls, memory: UInt8[np.ndarray, "stored byte"], places: Int64[np.ndarray, " row"]) -> "RowView":
        """Rows of contiguous memory."""
        count, row_bytes = memory.shape
        return cls(_elements(memory.ctypes.data, count, row_bytes, row_bytes, memory), places)

    def taken(self, part: slice, dtype: str) -> Shaped[np.ndarray, "row width"]:
        """Some of the rows, copied."""
        rows = self.elements[self.places[part]]
        return rows.view(np.uint8).reshape(len(rows), rows.itemsize).view(dtype)

    def copy(self, part: slice, out: Shaped[np.ndarray, "row width"]) -> None:
        """Copies some of the rows into `out`, whose rows are contiguous."""
        places, target = self.places[part], as_integers(out).view(self.elements.dtype)[:, 0]
        for first in range(0, len(places), ROWS_AT_ONCE):
            target[first : first + ROWS_AT_ONCE] = self.elements[places[first : first + ROWS_AT_ONCE]]


class _Addresses:
    """How NumPy is told of an array: it keeps this, and this keeps what lies there."""

    def __init__(self, first: int, count: int, step: int, row_bytes: int, keep: object) -> None:
        self.keep = keep
        self.__array_interface__ = {
            "version": 3,
            "data": (first, True),
            "shape": (count,),
            "strides": (step,),
            "typestr": f"|V{row_bytes}",
        }


def _elements(first: int, count: int, step: int, row_bytes: int, keep: object) -> Shaped[np.ndarray, " element"]:
    if not count:
        return np.empty(0, f"V{row_bytes}")
    return np.asarray(cast(Any, _Addresses(first, count, step, row_bytes, keep)))


class Memory:
    """Memory that was used up, to be used again: new memory costs as much as reading into it."""

    def __init__(self) -> None:
        """Holds nothing."""
        self._spare = list[UInt8[np.ndarray, " byte"]]()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no memory to reuse."""
        return self.__dict__ | {"_spare": []}

    def rows(self, count: int, row_bytes: int) -> UInt8[np.ndarray, "row byte"]:
        """Memory for some rows, with anything in it."""
        size = count * row_bytes
        fitting = next((place for place, spare in enumerate(self._spare) if spare.nbytes >= size), None)
        if fitting is None:
            self._spare.clear()
        memory = np.empty(size, np.uint8) if fitting is None else self._spare.pop(fitting)
        return memory[:size].reshape(count, row_bytes)

    def take_back(self, rows: UInt8[np.ndarray, "row byte"]) -> None:
        """Takes back what `rows` gave, once nobody holds that very array. Not for reads that failed: they may go on."""
        weakref.finalize(rows, self._spare.append, cast("UInt8[np.ndarray, ' byte']", rows.base))

    def clear(self) -> None:
        """Gives back to the system what is not in use."""
        self._spare.clear()
