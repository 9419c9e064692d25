"""One bit for each of many tokens."""

import numpy as np
from jaxtyping import Bool


class Bits:
    """Whether each of `count` items is in. Costs one bit for each; all are out at first.

    Args:
        count: of items.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._data = np.zeros(-(-count // 8), np.uint8)

    def __len__(self) -> int:
        return self._count

    def put(self, first: int, mask: Bool[np.ndarray, " n"]) -> None:
        """Sets the items from `first` on, those after them are out again: called with ascending `first`."""
        byte, offset = divmod(first, 8)
        before = np.unpackbits(self._data[byte : byte + 1])[:offset].astype(bool)
        packed = np.packbits(np.concatenate([before, mask]))
        self._data[byte : byte + len(packed)] = packed

    def take(self, first: int, stop: int) -> Bool[np.ndarray, " n"]:
        """Which of the items first..stop-1 are in."""
        byte = first // 8
        bits = np.unpackbits(self._data[byte : -(-stop // 8)])
        return bits[first - 8 * byte : stop - 8 * byte].astype(bool)
