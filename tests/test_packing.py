"""Packing against brute force: every token once, in order, never cut without need."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extract.packing import Kind, Packing, pack

LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=60)


def unpacked(packing: Packing, lengths: list[int], batch: int) -> list[tuple[int, int, int]]:
    """(document, position, token) of every row, from `take` alone; token ids are global token numbers."""
    offsets = np.cumsum([0, *lengths])
    token_id = np.arange(offsets[-1], dtype=np.int32)
    rows = []
    for first in range(0, packing.contexts, batch):
        contexts = packing.take(first, batch, token_offsets=offsets, token_id=token_id)
        tokens = contexts.token_ids[contexts.filled]
        rows += zip(contexts.documents.tolist(), contexts.document_positions.tolist(), tokens.tolist(), strict=True)
    return rows


@given(lengths=LENGTHS, context=st.integers(1, 32), batch=st.integers(1, 5))
def test_every_token_is_packed_exactly_once(lengths: list[int], context: int, batch: int) -> None:
    packing = pack(lengths, context)
    offsets = np.cumsum([0, *lengths])
    rows = unpacked(packing, lengths, batch)
    expected = {
        (document, position, int(offsets[document]) + position)
        for document, length in enumerate(lengths)
        for position in range(length)
    }
    assert len(rows) == packing.rows == sum(lengths)
    assert set(rows) == expected


@given(lengths=LENGTHS, context=st.integers(1, 32))
def test_segments_are_runs_of_one_document_with_positions_from_zero(lengths: list[int], context: int) -> None:
    packing = pack(lengths, context)
    token_id = np.zeros(sum(lengths), np.int32)
    contexts = packing.take(0, packing.contexts, token_offsets=np.cumsum([0, *lengths]), token_id=token_id)
    row = 0
    for segments, positions in zip(contexts.segment_ids, contexts.positions, strict=True):
        used = segments[segments > 0]
        assert np.array_equal(segments[: len(used)], used), "padding stands only at the end"
        for segment in range(1, int(used.max()) + 1):
            where = segments == segment
            assert np.array_equal(positions[where], np.arange(where.sum()))
            documents = contexts.documents[row : row + where.sum()]
            places = contexts.document_positions[row : row + where.sum()]
            assert len(set(documents.tolist())) == 1
            assert np.array_equal(places, np.arange(places[0], places[0] + where.sum()))
            row += int(where.sum())


@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_a_document_that_fits_is_never_cut(lengths: list[int]) -> None:
    packing = pack(lengths, 32)
    assert sorted(packing.piece_tokens.tolist()) == sorted(lengths)


@given(lengths=LENGTHS, context=st.integers(1, 32))
def test_row_edges_count_the_rows_before_each_context(lengths: list[int], context: int) -> None:
    packing = pack(lengths, context)
    counts = [
        sum(packing.piece_tokens[packing.first_piece[i] : packing.first_piece[i + 1]]) for i in range(packing.contexts)
    ]
    assert packing.row_edges().tolist() == np.cumsum([0, *counts]).tolist()
    assert max(counts) <= context


@pytest.mark.parametrize(
    ("lengths", "context", "contexts"),
    [
        pytest.param([4, 4, 4], 4, 3, id="each fills one"),
        pytest.param([3, 1, 3, 1], 4, 2, id="small ones fill the gaps"),
        pytest.param([10], 4, 3, id="a long one is cut"),
        pytest.param([3, 2, 1, 2], 4, 2, id="best fit, not first fit"),
    ],
)
def test_number_of_contexts(lengths: list[int], context: int, contexts: int) -> None:
    assert pack(lengths, context).contexts == contexts


def test_contexts_past_the_end_are_padding() -> None:
    contexts = pack([3], 4).take(0, 3, token_offsets=np.array([0, 3]), token_id=np.array([5, 6, 7], np.int32))
    assert contexts.token_ids.tolist() == [[5, 6, 7, 0], [0] * 4, [0] * 4]
    assert contexts.segment_ids.tolist() == [[1, 1, 1, 0], [0] * 4, [0] * 4]


def test_useful_share_on_lengths_like_docstrings() -> None:
    lengths = np.random.default_rng(0).lognormal(4.5, 1.0, 4000).astype(int).clip(1, 3000)
    assert pack(lengths, 256).useful_share > 0.98


def test_the_longest_first_leave_less_padding_where_documents_are_about_as_long_as_contexts() -> None:
    lengths = np.random.default_rng(0).lognormal(6.6, 0.7, 500).astype(int).clip(20, 3000)
    found = pack(lengths, 3072, kind="best-fit-decreasing")
    assert found.useful_share > 0.98
    assert pack(lengths, 3072, kind="best-fit").useful_share < 0.98
    assert sorted(found.piece_tokens.tolist()) == sorted(lengths.tolist())


def same(found: Packing, expected: Packing) -> None:
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


def test_auto_is_whichever_pads_less() -> None:
    """Best fit where it leaves 2 % or less, or where the other order needs as many contexts."""
    generator = np.random.default_rng(0)
    long = generator.lognormal(6.6, 0.7, 500).astype(int).clip(20, 3000)
    short = generator.lognormal(4.5, 1.0, 4000).astype(int).clip(1, 3000)
    same(pack(long, 3072), pack(long, 3072, kind="best-fit-decreasing"))
    same(pack(short, 256), pack(short, 256, kind="best-fit"))
    few = [3, 2, 2]
    assert pack(few, 8).useful_share < 0.98
    same(pack(few, 8), pack(few, 8, kind="best-fit"))
    assert [pack(few, 8, kind=kind).kind for kind in get_args(Kind)] == list(get_args(Kind))
