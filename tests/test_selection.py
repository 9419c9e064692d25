"""Which rows are kept, against a loop over every token that asks the same in plain Python."""

import hashlib
import itertools
import json
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import InputError
from actstore.strings import Strings
from extract.bits import Bits
from extract.conditions import KINDS
from extract.packing import Kind, pack
from extract.selection import Selection, Stream, Vocabulary

PIECES = [b"a", b"b ", b"7", b"12", b".", b" ,", b"\n", b"x1", b"\xc3", b"<end>"]
OF_PIECES = ["word", "word", "digit", "digit", "punctuation", "punctuation", "space", "mixed", "partial", "special"]
VOCABULARY = Vocabulary(PIECES, frozenset({9}), lambda text: [PIECES.index(each.encode()) for each in text.split("|")])


def stream(lengths, *, seed=0, longest=None, completions=True) -> Stream:
    offsets = np.cumsum([0, *lengths])
    token_id = np.random.default_rng(seed).integers(0, len(PIECES), offsets[-1]).astype(np.int32)
    document = np.repeat(np.arange(len(lengths)), lengths)
    start = (3 * (np.arange(offsets[-1]) - offsets[document])).astype(np.uint32)
    begins = np.array([length // 2 * 3 for length in lengths], np.int64) if completions else None
    ids = Strings.of([f"d{number}" for number in range(len(lengths))])
    return Stream(offsets, token_id, start, begins, ids.__getitem__, ids.hashes, longest)


def tokens(found: Stream):
    """(document, position, length, token, in the completion) of every token."""
    for document, (first, stop) in enumerate(zip(found.token_offsets[:-1], found.token_offsets[1:], strict=True)):
        length = int(stop - first)
        for position in range(length):
            place = first + position
            after = found.token_start[place] >= found.completion_start[document]
            yield document, position, min(length, found.longest or length), int(found.token_id[place]), bool(after)


CONDITIONS = {
    "all": lambda d, p, n, t, c: True,
    "first": lambda d, p, n, t, c: p == 0,
    "first(3)": lambda d, p, n, t, c: p < 3,
    "last": lambda d, p, n, t, c: p == n - 1,
    "last(2)": lambda d, p, n, t, c: p >= n - 2,
    "positions(0, 5, -2)": lambda d, p, n, t, c: p in (0, 5, n - 2),
    "every(4)": lambda d, p, n, t, c: p % 4 == 0,
    "completion": lambda d, p, n, t, c: c,
    "prompt": lambda d, p, n, t, c: not c,
    "tokens(3, 'a')": lambda d, p, n, t, c: t in (3, 0),
    "kind('word', 'space')": lambda d, p, n, t, c: OF_PIECES[t] in ("word", "space"),
    "kind('special')": lambda d, p, n, t, c: t == 9,
    "kind('partial', 'mixed', 'digit', 'punctuation')": lambda d, p, n, t, c: t in (2, 3, 4, 5, 7, 8),
    "not last": lambda d, p, n, t, c: p != n - 1,
    "first or last and completion": lambda d, p, n, t, c: p == 0 or (p == n - 1 and c),
    "(first or last) and not kind('word')": lambda d, p, n, t, c: p in (0, n - 1) and OF_PIECES[t] != "word",
}


@pytest.mark.parametrize("text", CONDITIONS)
@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 9),
    longest=st.none() | st.integers(1, 8), at_once=st.integers(1, 30),
)  # fmt: skip
def test_a_condition_keeps_what_a_loop_keeps(text, lengths, seed, longest, at_once):
    found = stream(lengths, seed=seed, longest=longest)
    bits = Selection(text).bits(found, VOCABULARY, at_once=at_once)
    expected = [CONDITIONS[text](*each) and each[1] < each[2] for each in tokens(found)]
    if text == "all" and longest is None:
        assert bits is None
    else:
        assert bits.take(0, len(bits)).tolist() == expected


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), context=st.integers(1, 9),
    text=st.sampled_from([*CONDITIONS]),
    kind=st.sampled_from(get_args(Kind)), batch=st.integers(1, 4), truncate=st.booleans(),
)  # fmt: skip
@settings(max_examples=150)
def test_what_is_packed_is_what_is_kept(lengths, context, text, kind, batch, truncate):
    longest = context if truncate and kind != "concatenated" else None
    found = stream(lengths, longest=longest)
    bits = Selection(text).bits(found, VOCABULARY)
    packing = pack(lengths, context, kind=kind, kept=bits)
    edges, rows = packing.row_edges(), []
    for first in range(0, packing.contexts, batch):
        taken = packing.take(first, batch, token_offsets=found.token_offsets, token_id=found.token_id, kept=bits)
        assert len(taken.documents) == taken.kept.sum() == edges[min(first + batch, packing.contexts)] - edges[first]
        rows += zip(
            taken.documents.tolist(),
            taken.document_positions.tolist(),
            taken.token_ids[taken.kept].tolist(),
            strict=True,
        )
        if kind == "concatenated":
            assert set(taken.segment_ids.ravel().tolist()) <= {0, 1}
            for filled, positions in zip(taken.filled, taken.positions, strict=True):
                assert positions[filled].tolist() == list(range(filled.sum()))
    expected = [(d, p, t) for d, p, n, t, c in tokens(found) if p < n and CONDITIONS[text](d, p, n, t, c)]
    assert sorted(rows) == expected
    assert packing.rows == len(rows)
    assert (np.diff(edges) > 0).all(), "nothing is computed for a context without rows"
    if kind == "single":
        assert len({*packing.first_piece.tolist()}) == len(packing.piece_rows) + 1
    if kind != "concatenated" and rows:
        assert all(packing.piece_tokens <= context)


def test_a_piece_ends_with_its_last_row():
    bits = Bits(12)
    bits.put(0, np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], bool))
    packing = pack([6, 6], 4, kept=bits)
    assert packing.piece_tokens.tolist() == [2, 2]
    assert (packing.piece_document.tolist(), packing.piece_position.tolist()) == ([0, 1], [0, 4])
    assert packing.contexts == 1


def test_contexts_may_begin_with_a_token_that_is_no_row():
    packing = pack([5, 2], 4, kind="concatenated", begin=99)
    taken = packing.take(0, 3, token_offsets=np.array([0, 5, 7]), token_id=np.arange(7, dtype=np.int32))
    assert taken.token_ids.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 0, 0]]
    assert taken.kept.tolist() == [[False, True, True, True]] * 2 + [[False, True, False, False]]
    assert taken.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert taken.documents.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert taken.document_positions.tolist() == [0, 1, 2, 3, 4, 0, 1]


def kept_of(text: str, lengths: list[int], **more) -> np.ndarray:
    found = stream(lengths)
    return Selection(text, **more).bits(found, VOCABULARY).take(0, sum(lengths))


def test_a_fraction_is_random_even_and_the_same_for_a_document_wherever_it_stands():
    lengths = [100] * 400
    kept = kept_of("fraction(0.25)", lengths)
    spread = np.sqrt(40_000 * 0.25 * 0.75)
    assert abs(kept.sum() - 10_000) < 5 * spread
    table = kept.reshape(400, 100)
    for axis in (0, 1):  # of positions and of documents alike: chi-square per degree of freedom
        counts = table.sum(axis)
        expected = 10_000 / len(counts)
        assert 0.6 < ((counts - expected) ** 2 / (expected * 0.75)).mean() < 1.5
    assert np.array_equal(kept_of("fraction(0.25)", lengths[:10]), kept[:1000])
    assert not np.array_equal(kept_of("fraction(0.25, seed=1)", lengths), kept)
    assert kept_of("fraction(1)", [7]).all()
    assert (kept_of("fraction(0.5)", lengths) | ~kept).all(), "a larger part holds the smaller one"


@pytest.mark.parametrize("most", [1, 3, 50])
def test_rows_per_document_are_a_random_choice_of_those_kept(most):
    lengths = [1, 5, 40, 200] * 50
    whole, some = kept_of("every(2)", lengths), kept_of("every(2)", lengths, per_document=most)
    assert not (some & ~whole).any()
    edges = np.cumsum([0, *lengths])
    for first, stop in itertools.pairwise(edges):
        assert some[first:stop].sum() == min(most, whole[first:stop].sum())
    if most < 50:
        places = np.concatenate(
            [np.flatnonzero(some[a:b]) / (b - a) for a, b in itertools.pairwise(edges) if b - a == 200]
        )
        assert 0.4 < places.mean() < 0.6, "from everywhere in the document"


BAD = {
    "": "rows are '', which cannot be understood; expected conditions such as last, first(4)",
    "last and": "rows are 'last and', which cannot be understood",
    "(" * 3000 + "last" + ")" * 3000: "which cannot be understood",
    "not " * 60 + "last": "are nested 61 deep, at most 50",
    "nothing": "rows have 'nothing', which is no condition",
    "1": "rows have '1', which is no condition",
    "last - 1": "rows have 'last - 1', which is no condition",
    "last < 3": "rows have 'last < 3', which is no condition",
    "__import__('os').system('true')": "which is no condition",
    "every": "rows have 'every', which is no condition",
    "every(0)": "rows have every(0); expected one whole number from 1",
    "every()": "rows have every(); expected one whole number from 1",
    "first(1, 2)": "rows have first(1, 2); expected one whole number from 1",
    "last(True)": "rows have last(True); expected one whole number from 1",
    "last(x)": "rows have last(x); expected plain numbers or texts inside the parentheses",
    "positions()": "rows have positions(); expected whole numbers, from 0 or, from the end, -1",
    "positions(0.5)": "rows have positions(0.5); expected whole numbers",
    "fraction(0)": "rows have fraction(0); expected a number over 0 and up to 1",
    "fraction(1.5)": "rows have fraction(1.5); expected a number over 0 and up to 1",
    "fraction(0.5, seed=-1)": "expected no name inside the parentheses but seed= of a fraction, a whole number from 0",
    "last(n=3)": "expected no name inside the parentheses but seed= of a fraction",
    "tokens(None)": "rows have tokens(None); expected token ids or texts",
    "kind('noun')": "rows have kind('noun'); expected one or more of \"word\", \"digit\"",
    "kinds('word')": "rows have kinds('word'); there is no condition 'kinds'",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[text[:30] for text in BAD])
def test_what_is_no_condition_is_refused(text, message):
    with pytest.raises(InputError) as caught:
        Selection(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens(10)", "tokens(10) is token 10; expected one token, an id of 0 to 9 or its text"),
        ("tokens('a|7')", "tokens('a|7') is 2 tokens [0, 2]; expected one token, an id of 0 to 9 or its text"),
    ],
)
def test_tokens_that_are_not_there_are_refused(text, message):
    with pytest.raises(InputError) as caught:
        Selection(text).bits(stream([3]), VOCABULARY)
    assert message in str(caught.value)


def test_completions_of_documents_without_any_are_refused():
    with pytest.raises(InputError, match=r"rows 'not completion' ask for prompts or completions, and no document says"):
        Selection("not completion").bits(stream([3], completions=False), VOCABULARY)
    with pytest.raises(InputError, match="rows per document are 0; expected at least 1; leave it out to keep all"):
        Selection(per_document=0)


def test_one_condition_has_one_spelling_and_a_plan_keeps_it():
    assert Selection(" ( last ) or first (4)").rows == "last or first(4)"
    for selection in (Selection(), Selection("last"), Selection("every(2)", 7)):
        assert Selection.of_json(json.loads(json.dumps(selection.as_json()))) == selection
    assert Selection().as_json() == "all tokens"
    with pytest.raises(InputError, match=r"the selection of rows is \{'cells': 3\}; expected one of this version"):
        Selection.of_json({"cells": 3})


def test_what_is_kept_does_not_change_between_versions():
    kept = kept_of("fraction(0.3, seed=5) or last", [17, 300, 4, 90], per_document=20)
    assert hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()[:16] == "7c96dff26024f0d6"


@given(
    masks=st.lists(st.lists(st.booleans(), max_size=20), max_size=8),
    cut=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_bits_are_a_mask(masks, cut):
    whole = [each for mask in masks for each in mask]
    bits, first = Bits(len(whole)), 0
    for mask in masks:
        bits.put(first, np.array(mask, bool))
        first += len(mask)
    start, stop = sorted(min(each, len(whole)) for each in cut)
    assert bits.take(start, stop).tolist() == whole[start:stop]


def test_kinds_are_those_of_the_help():
    assert set(OF_PIECES) == set(KINDS)
    assert [KINDS[number] for number in VOCABULARY.kinds()] == OF_PIECES
