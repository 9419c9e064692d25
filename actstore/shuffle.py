"""Sample order as a pure function of (seed, epoch, index). No input, no output, no memory in the number of samples.

`Permutation` is a keyed bijection of 0..n-1 (a Feistel network with cycle walking: Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002), evaluated for any indices at once, in both directions. `BlockOrder` is built on it: a
permutation of chunks, then a permutation of the samples inside a window of many chunks. Each chunk is read once and
whole; a batch mixes as many chunks as a window holds. `ExactOrder` is a permutation of all samples.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 10  # enough for pairs of 5 values to pass a chi-square test over the keys, six are not: tests/test_shuffle.py
_PIECE = 1 << 15  # indices at once: their rounds stay in the core's cache


def mix(values: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: UInt64[np.ndarray, "*n"] = values ^ (values >> np.uint64(31))
    return mixed


def _keys(words: tuple[int, ...], count: int) -> list[np.uint64]:
    """`count` round keys from a tuple of integers, by NumPy's SeedSequence (stable by its documented contract)."""
    state = np.random.SeedSequence(list(words)).generate_state(count, np.uint64)
    return [np.uint64(word) for word in state]


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A keyed bijection of the integers 0..size-1. Costs O(1) memory, and about 0.1 us per index.

    Where many times sqrt(size) indices are asked for at once, what a round can give is looked up in a table: 0.03 us.

    Equal `key` and `size` give the same permutation on every machine and version of actstore.
    """

    size: int
    key: tuple[int, ...]

    def __call__(self, index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The images of `index`, each in 0..size-1."""
        return self._walk(index, forward=True)

    def inverse(self, image: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The indices whose images are `image`."""
        return self._walk(image, forward=False)

    def _walk(self, values: Int64[np.ndarray, " n"], *, forward: bool) -> Int64[np.ndarray, " n"]:
        """Encrypts until the value falls into 0..size-1: the domain is less than 4 times the size."""
        half = max((max(self.size - 1, 1).bit_length() + 1) // 2, 1)
        rounds: Sequence[_Round] = [_Round(key, half) for key in _keys(self.key, _ROUNDS)]
        if len(values) >= 4 << half:  # tables of at most 20 bytes per index
            rounds = [each.in_a_table() for each in rounds]
        images = np.empty(len(values), np.int64)
        for first in range(0, len(values), _PIECE):
            out = _network(values[first : first + _PIECE].astype(np.uint64), half, rounds, forward=forward)
            outside = np.flatnonzero(out >= np.uint64(self.size))
            while outside.size:
                again = _network(out[outside], half, rounds, forward=forward)
                out[outside] = again
                outside = outside[again >= np.uint64(self.size)]
            images[first : first + _PIECE] = out.view(np.int64)
        return images


@dataclasses.dataclass(frozen=True)
class _Round:
    """What a round of a Feistel network makes of half a value, of `half` bits."""

    key: np.uint64
    half: int
    table: UInt64[np.ndarray, " value"] | None = None

    def __call__(self, values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        if self.table is not None:
            return np.take(self.table, values.view(np.int64))
        with np.errstate(over="ignore"):
            return mix(values + self.key) & np.uint64((1 << self.half) - 1)

    def in_a_table(self) -> "_Round":
        """The same, looked up."""
        return dataclasses.replace(self, table=self(np.arange(1 << self.half, dtype=np.uint64)))


def _network(
    values: UInt64[np.ndarray, " n"], half: int, rounds: "Sequence[_Round]", *, forward: bool
) -> UInt64[np.ndarray, " n"]:
    """One pass of the Feistel network over 2 * half bits."""
    shift = np.uint64(half)
    left, right = values >> shift, values & np.uint64((1 << half) - 1)
    for each in rounds if forward else reversed(rounds):
        if forward:
            left, right = right, left ^ each(right)
        else:
            left, right = right ^ each(left), left
    return (left << shift) | right


@dataclasses.dataclass(frozen=True)
class BlockOrder:
    """Chunks in a keyed random order; samples shuffled inside windows of `window_chunks` chunks.

    A batch then holds rows of nearly `min(batch, window_chunks)` chunks. Every sample comes exactly once per epoch. A
    window as large as the store gives a perfect shuffle.
    """

    samples: int
    seed: int
    chunk_samples: int
    window_chunks: int

    @property
    def chunks(self) -> int:
        """Number of chunks; the last one may be short."""
        return math.ceil(self.samples / self.chunk_samples)

    def chunks_of(self, epoch: int, window: int) -> Int64[np.ndarray, " chunks"]:
        """The chunks of a window, in random order."""
        places = np.arange(
            window * self.window_chunks, min((window + 1) * self.window_chunks, self.chunks), dtype=np.int64
        )
        return Permutation(self.chunks, (self.seed, epoch, 1))(places)

    def window_at(self, epoch: int, position: int) -> tuple[int, int]:
        """The window around `position`. O(1): only the place of the short last chunk moves the windows' starts."""
        missing = self.chunks * self.chunk_samples - self.samples
        last = np.array([self.chunks - 1], dtype=np.int64)
        short_place = int(Permutation(self.chunks, (self.seed, epoch, 1)).inverse(last)[0])
        window_samples = self.window_chunks * self.chunk_samples
        short_window = short_place // self.window_chunks

        def start_of(window: int) -> int:
            return min(window * window_samples - (missing if window > short_window else 0), self.samples)

        window = position // window_samples
        if position >= start_of(window + 1):
            window += 1
        return start_of(window), start_of(window + 1)

    def rows(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """The samples at epoch positions start..stop-1, which must lie in one window."""
        first, last = self.window_at(epoch, start)
        window = self._window_number(first)
        starts = self.chunks_of(epoch, window) * self.chunk_samples
        members = (starts[:, None] + np.arange(self.chunk_samples, dtype=np.int64)).ravel()
        members = members[members < self.samples]
        places = np.arange(start - first, stop - first, dtype=np.int64)
        shuffled: Int64[np.ndarray, " n"] = members[Permutation(last - first, (self.seed, epoch, 2, window))(places)]
        return shuffled

    def _window_number(self, first: int) -> int:
        """The number of the window that starts at epoch position `first`."""
        return math.ceil(first / (self.window_chunks * self.chunk_samples))


@dataclasses.dataclass(frozen=True)
class ExactOrder:
    """All samples in a keyed random order: a perfect shuffle, at the price of reading rows one by one.

    Its windows are stretches of the order, `window_samples` long: what is read together.
    """

    samples: int
    seed: int
    window_samples: int

    def window_at(self, epoch: int, position: int) -> tuple[int, int]:  # noqa: ARG002  as BlockOrder asks for it
        """The window around `position`; the same in every epoch."""
        first = position // self.window_samples * self.window_samples
        return first, min(first + self.window_samples, self.samples)

    def rows(self, epoch: int, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """The samples at epoch positions start..stop-1."""
        return Permutation(self.samples, (self.seed, epoch, 3))(np.arange(start, stop, dtype=np.int64))
