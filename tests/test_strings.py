"""Texts as bytes and offsets, against lists of the same texts."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from actstore import strings
from actstore.errors import InputError
from actstore.strings import Strings

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12)


@given(texts=TEXTS, at_once=st.integers(1, 4))
def test_texts_come_back_as_from_a_list(texts, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strings, "_AT_ONCE", at_once)
        found = Strings.of(texts)
        assert [*found] == texts == found
        assert found == Strings(found.data, found.offsets)
        assert len(found) == len(texts)
        assert [found[place] for place in range(-len(texts), len(texts))] == texts + texts
        assert found[1:7:2] == texts[1:7:2]
        assert found.sizes.tolist() == [len(text.encode()) for text in texts]
        assert found.hashes().tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
        twice = found.twice()
    assert twice in {text for text in texts if texts.count(text) > 1} | (
        {None} if len({*texts}) == len(texts) else set()
    )
    assert Strings.of(found) is found


def test_other_texts_are_not_equal_and_an_index_outside_is_an_error():
    found = Strings.of(["a", "bc"])
    assert found != ["a", "b"]
    assert found != ["a"]
    with pytest.raises(IndexError):
        found[2]


def test_equal_hashes_of_other_texts_are_no_duplicates(monkeypatch):
    monkeypatch.setattr(Strings, "hashes", lambda self: np.zeros(len(self), np.uint64))
    assert Strings.of(["a", "b", "c"]).twice() is None
    assert Strings.of(["a", "b", "a"]).twice() == "a"


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(
        InputError, match=r"documents: '\\ud800' holds half of a surrogate pair; expected whole characters"
    ):
        Strings.of(["\ud800"])
