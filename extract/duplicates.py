"""Documents that are nearly the same, by the runs of tokens that they share. Reported, not removed."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from actstore.errors import InputError
from actstore.shuffle import mix
from actstore.table import stretches

RUN = 5  # tokens that follow each other: what two documents share or not
_BINS, _BAND = 64, 4  # lowest hashes of a document, and how many of them together make two documents candidates
_EMPTY = np.uint64((1 << 64) - 1)
_PADDING = np.uint64(1 << 40)  # no token


@dataclasses.dataclass(frozen=True)
class Group:
    """Documents that are like the first of them.

    Attributes:
        documents: Their numbers, ascending.
        similarities: Of each to the first: shared runs of tokens by all runs of both (Jaccard).
    """

    documents: tuple[int, ...]
    similarities: tuple[float, ...]


def near_duplicates(
    token_offsets: Int64[np.ndarray, " document_edge"],
    token_id: Int32[np.ndarray, " token"],
    *,
    threshold: int | float = 0.8,
    at_once: int = 1 << 20,
) -> list[Group]:
    """Groups of documents that share at least `threshold` of their runs of 5 tokens with the first of their group.

    Candidates come from MinHash (Broder, 1997) with one permutation (Li, Owen, Zhang, 2012) and bands of 4 of 64
    hashes; each is then compared exactly, so that nothing is reported wrongly. Of pairs at 0.8, one in five thousand is
    missed. Costs about half a microsecond per token and 128 bytes per document.

    Args:
        token_offsets: Where each document begins.
        token_id: Tokens of all documents, in memory or in a file.
        threshold: Over 0 and up to 1.
        at_once: Tokens that are looked at together.

    Raises:
        InputError: The threshold is none.
    """
    if not 0 < threshold <= 1:
        raise InputError(f"near-duplicates are asked for from {threshold}; expected a similarity over 0 and up to 1")
    bands = np.concatenate(
        [_bands(token_offsets[first : last + 1], token_id) for first, last in stretches(token_offsets, most=at_once)]
    )
    leader = np.arange(len(bands))
    found: dict[int, dict[int, float]] = {}
    for first, other in _candidates(bands):
        if leader[other] != other or leader[first] != first:
            continue  # it is in a group already
        similarity = _similarity(*(token_id[token_offsets[each] : token_offsets[each + 1]] for each in (first, other)))
        if similarity >= threshold:
            leader[other] = first
            found.setdefault(first, {})[other] = similarity
    return [
        Group((first, *sorted(others)), (1.0, *(others[other] for other in sorted(others))))
        for first, others in sorted(found.items())
    ]


def _bands(
    offsets: Int64[np.ndarray, " edge"], token_id: Int32[np.ndarray, " token"]
) -> UInt64[np.ndarray, "document band"]:
    """What has to be equal, at one place at least, for two documents to be compared."""
    documents, hashes = _runs(offsets, token_id)
    keys = documents * _BINS + (hashes >> np.uint64(58)).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    firsts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    lowest = np.full((len(offsets) - 1) * _BINS, _EMPTY)
    lowest[keys[order][firsts]] = np.minimum.reduceat(hashes[order] & np.uint64((1 << 58) - 1), firsts)
    table = lowest.reshape(-1, _BINS)
    for _ in range(_BINS - 1):  # a bin without a run takes that of its neighbour (Shrivastava and Li, 2014)
        empty = table == _EMPTY
        if not empty.any():
            break
        table = np.where(
            empty, np.where((near := np.roll(table, -1, axis=1)) == _EMPTY, _EMPTY, near + np.uint64(1 << 58)), table
        )
    bands = np.zeros((len(table), _BINS // _BAND), np.uint64)
    with np.errstate(over="ignore"):
        for place in range(_BAND):
            bands = mix(bands + table[:, place::_BAND])
    return bands


def _runs(
    offsets: Int64[np.ndarray, " edge"], token_id: Int32[np.ndarray, " token"]
) -> tuple[Int64[np.ndarray, " run"], UInt64[np.ndarray, " run"]]:
    """Document and hash of every run of tokens. A document that is shorter is one run."""
    here = token_id[offsets[0] : offsets[-1]].astype(np.uint64)
    edges = offsets - offsets[0]
    counts = np.maximum(np.diff(edges) - RUN + 1, 1)
    documents = np.repeat(np.arange(len(counts)), counts)
    starts = edges[:-1][documents] + np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    hashes = np.zeros(len(documents), np.uint64)
    with np.errstate(over="ignore"):
        for place in range(RUN):
            inside = starts + place < edges[1:][documents]
            token = np.where(inside, here[np.minimum(starts + place, len(here) - 1)], _PADDING)
            hashes = mix(hashes + token + np.uint64(1))
    return documents, hashes


def _candidates(bands: UInt64[np.ndarray, "document band"]) -> Iterator[tuple[int, int]]:
    """Pairs of documents that may be alike, each with the first of those that it shares a band with."""
    pairs: set[tuple[int, int]] = set()
    for column in bands.T:
        order = np.argsort(column, kind="stable")
        values = column[order]
        begins = np.flatnonzero(np.diff(values, prepend=values[0] + np.uint64(1)) != 0) if len(values) else order
        sizes = np.diff(np.append(begins, len(values)))
        leaders = np.repeat(order[begins], sizes)
        others = leaders != order
        pairs.update(zip(leaders[others].tolist(), order[others].tolist(), strict=True))
    yield from sorted(pairs)


def _similarity(first: Int32[np.ndarray, " token"], other: Int32[np.ndarray, " other_token"]) -> float:
    """Jaccard similarity of the sets of runs of two documents."""
    sets = [
        {tuple(ids[place : place + RUN]) for place in range(max(len(ids) - RUN + 1, 1))}
        for ids in (first.tolist(), other.tolist())
    ]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])
