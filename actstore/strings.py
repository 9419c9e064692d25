"""Many texts as one array of UTF-8 bytes with offsets, as a store keeps them: no Python object for each."""

import itertools
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import xxhash
from jaxtyping import Int64, UInt8, UInt64

from actstore.errors import InputError

_AT_ONCE = 4096  # texts that are encoded or hashed together


class Strings(Sequence[str]):
    """Texts, decoded as they are asked for. Costs 8 bytes per text beside the UTF-8 itself.

    The arrays may be maps of files, larger than memory.

    Args:
        data: UTF-8 of all texts, one after the other.
        offsets: text i is `data[offsets[i]:offsets[i + 1]]`.
    """

    def __init__(self, data: UInt8[np.ndarray, " byte"], offsets: Int64[np.ndarray, " edge"]) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, values: Sequence[str]) -> "Strings":
        """The texts of any sequence; one that is of this kind already is given back.

        Raises:
            InputError: half of a surrogate pair, which has no UTF-8 form.
        """
        if isinstance(values, cls):
            return values
        encoded = [_encoded(value) for value in values]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @property
    def sizes(self) -> Int64[np.ndarray, " text"]:
        """Bytes of each text."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self.data[self.offsets[place] : self.offsets[place + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for raw in self.encoded():
            yield raw.decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def encoded(self) -> Iterator[bytes]:
        """The UTF-8 of each text, in order."""
        for first in range(0, len(self), _AT_ONCE):
            edges = self.offsets[first : first + _AT_ONCE + 1].tolist()
            raw = self.data[edges[0] : edges[-1]].tobytes()
            for start, stop in itertools.pairwise(edges):
                yield raw[start - edges[0] : stop - edges[0]]

    def hashes(self) -> UInt64[np.ndarray, " text"]:
        """XXH3 of each text, 64 bits: about 3 million texts per second."""
        return np.fromiter(map(xxhash.xxh3_64_intdigest, self.encoded()), np.uint64, len(self))

    def twice(self) -> str | None:
        """A text that stands here more than once, or None. Costs 24 bytes per text."""
        hashes = self.hashes()
        order = np.argsort(hashes)
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        seen: set[str] = set()
        for place in order[np.union1d(same, same + 1)].tolist():  # few: equal hashes of other texts are next to none
            text = self[place]
            if text in seen:
                return text
            seen.add(text)
        return None


def _encoded(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"documents: {value[:40]!r} holds half of a surrogate pair; expected whole characters"
        ) from None
