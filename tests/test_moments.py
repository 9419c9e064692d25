"""Statistics of rows: every bit pattern of the small types, norms against float64, and refusals."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stores import make_rows

from actstore import Site
from actstore.errors import InputError
from actstore.moments import as_stored, row_norms, to_float32

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00}  # all bits set: infinity or NaN
FINITE = {dtype: PATTERNS[PATTERNS & bits != bits].view(dtype).astype(np.float64) for dtype, bits in EXPONENTS.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_pattern_widens_exactly(dtype):
    values = PATTERNS.view(dtype)
    with np.errstate(invalid="ignore"):  # NumPy and ml_dtypes report the signalling NaNs
        wide, independent = to_float32(values), values.astype(np.float32)
    assert wide.dtype == np.float32
    numbers = ~np.isnan(independent)
    np.testing.assert_array_equal(wide.view(np.uint32)[numbers], independent.view(np.uint32)[numbers])  # -0 is not 0
    np.testing.assert_array_equal(np.isnan(wide), ~numbers)
    assert numbers.sum() == {"bfloat16": 65_536 - 254, "float16": 65_536 - 2046}[dtype]
    np.testing.assert_array_equal(wide[numbers].astype(dtype).view(np.uint16), PATTERNS[numbers])


@pytest.mark.parametrize("shape", [(0,), (), (3, 0, 2), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_widening_keeps_the_shape(shape, dtype):
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    np.testing.assert_array_equal(to_float32(values), values.astype(np.float64))
    assert to_float32(values).shape == shape


def test_widening_takes_strided_rows():
    values = np.arange(60).reshape(5, 12).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(to_float32(values[::-2, ::3].T), values.astype(np.float32)[::-2, ::3].T)


def test_float32_is_not_copied():
    values = np.zeros(3, np.float32)
    assert np.shares_memory(to_float32(values), values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2500])
def test_norms_are_those_of_numpy_in_float64(dtype, count):
    rows = make_rows(Site("a", 37, None, dtype), count)
    expected = np.linalg.norm(rows.astype(np.float64), axis=1)
    np.testing.assert_allclose(row_norms(rows), expected, rtol=2e-6)
    assert row_norms(rows).dtype == np.float32


def test_norms_of_huge_rows_are_infinite_and_of_broken_rows_not_numbers():
    rows = np.array([[3e38, 3e38], [np.nan, 1], [np.inf, 1], [3, 4], [0, 0]], np.float32)
    np.testing.assert_array_equal(row_norms(rows), np.array([np.inf, np.nan, np.inf, 5, 0], np.float32))


@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)), st.sampled_from(["bfloat16", "float16"])
)
def test_values_are_rounded_to_the_nearest(values, dtype):
    """No value of the target type is nearer than the one that is stored."""
    stored = as_stored(values, dtype, what="x")
    assert stored.dtype == dtype
    every = np.unique(FINITE[dtype])
    place = np.searchsorted(every, values.astype(np.float64))
    nearest = np.minimum(np.abs(every[place - 1] - values), np.abs(every[place] - values))
    np.testing.assert_array_equal(np.abs(stored.astype(np.float64) - values), nearest)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_right_dtype_is_not_copied(dtype):
    values = np.ones(4, dtype)
    assert as_stored(values, dtype, what="x") is values


@pytest.mark.parametrize("found", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_infinity_and_nan_pass_through(found, dtype):
    """The writer refuses them with the place of the row, which is not known here."""
    values = np.array([np.inf, -np.inf, np.nan], found)
    np.testing.assert_array_equal(as_stored(values, dtype, what="x").astype("f8"), values.astype("f8"))


REFUSED = {
    "float16 overflow": (
        np.array([1, -70_000], np.float32),
        "float16",
        "site 'a' has a value of 70000, float16 ends at 65504; store this site as bfloat16 or float32",
    ),
    "largest of several": (np.array([66_000, 1e30, 1]), "float16", "site 'a' has a value of 1e+30, float16 ends"),
    "bfloat16 overflow": (np.array([1e39]), "bfloat16", "site 'a' has a value of 1e+39, bfloat16 ends at 3.3895e+38"),
    "float32 overflow": (np.array([1e39]), "float32", "site 'a' has a value of 1e+39, float32 ends at 3.4028e+38"),
    "float16 as bfloat16": (
        np.ones(2, np.float16),
        "bfloat16",
        "site 'a' has dtype float16; expected bfloat16, or float32 or float64 to be rounded to bfloat16",
    ),
    "bfloat16 as float16": (np.ones(2, ml_dtypes.bfloat16), "float16", "site 'a' has dtype bfloat16; expected float16"),
}


@pytest.mark.parametrize(("values", "dtype", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_be_lost_is_refused(values, dtype, message):
    with pytest.raises(InputError) as caught:
        as_stored(values, dtype, what="site 'a'")
    assert str(caught.value).startswith(message)


def test_the_largest_float16_is_kept():
    values = np.array([65_504, 65_519.9, -65_504], np.float32)
    np.testing.assert_array_equal(as_stored(values, "float16", what="x"), np.array([65_504, 65_504, -65_504], "f2"))
