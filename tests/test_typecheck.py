"""Shape checks are on in every test: without these, a broken import hook would go unnoticed."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

import actstore
import extract.packing
from actstore import moments, shuffle


def test_a_wrong_number_of_axes_is_refused():
    with pytest.raises(TypeCheckError, match="row_norms"):
        moments.row_norms(np.zeros((2, 3, 4), np.float32))


def test_a_wrong_dtype_is_refused():
    with pytest.raises(TypeCheckError, match="Permutation"):
        shuffle.Permutation(4, (0,))(np.zeros(2, np.float32))


def test_axes_of_one_name_have_one_length():
    ids, rows, kept = np.zeros((2, 3), np.int32), np.zeros(4, np.int32), np.ones((2, 3), bool)
    with pytest.raises(TypeCheckError, match="Contexts"):
        extract.packing.Contexts(ids, ids[:, :2], ids, kept, rows, rows)


def test_results_are_checked(monkeypatch):
    monkeypatch.setattr(moments.np, "sqrt", lambda values: values)
    monkeypatch.setattr(moments.np, "empty", lambda shape, dtype: np.zeros((2, *np.atleast_1d(shape)), dtype)[0:0])
    with pytest.raises(TypeCheckError, match="row_norms"):
        moments.row_norms(np.zeros((0, 3), np.float32))


def test_extract_is_checked_too():
    with pytest.raises(TypeCheckError, match="pack"):
        extract.packing.pack(np.zeros((2, 2), np.int64), 8)


def test_plain_types_are_checked():
    with pytest.raises(TypeCheckError, match="samples"):
        actstore.Layout((actstore.Site("a", 4, (0,)),), "many", 4, 2)
