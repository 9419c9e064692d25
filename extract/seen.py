"""Which ids came before, among as many as there may be: 8 bytes for each, and no Python object."""

import numpy as np
from jaxtyping import Bool, UInt64


class Seen:
    """A growing set of hashes. Asked a few hundred at a time it takes about a microsecond for each.

    Sorted arrays of doubling sizes, as in a log-structured merge tree, so that every hash is merged a few times only.
    Different ids have the same 64 bits with a chance of 3 in a million among ten million of them.
    """

    def __init__(self) -> None:
        self._levels: list[UInt64[np.ndarray, " n"]] = []

    def add(self, hashes: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Adds some hashes; True where one was there before, or stands earlier among these."""
        _, firsts = np.unique(hashes, return_index=True)
        found = np.ones(len(hashes), bool)
        found[firsts] = False
        for level in self._levels:
            places = np.searchsorted(level, hashes)
            found |= level[np.minimum(places, len(level) - 1)] == hashes
        added = np.sort(hashes[~found])
        if len(added):
            while self._levels and len(self._levels[-1]) <= len(added):
                added = np.sort(np.concatenate([self._levels.pop(), added]), kind="stable")
            self._levels.append(added)
        return found
