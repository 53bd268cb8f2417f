"""How the suite compares: the table of tolerances, bit equality, structure, and errors by their text."""

import contextlib

import numpy as np
import pytest

import scree

# Of each dtype: the spacing of its values at 1 (one rounding errs by half of it), and what arithmetic in float32
# (float64 for float64) leaves beside that when sums have tens of terms of size 1.
TOLERANCES = {
    "float16": (2.0**-10, 4e-6),
    "bfloat16": (2.0**-7, 4e-6),
    "float32": (2.0**-23, 4e-6),
    "float64": (2.0**-52, 1e-13),
}


def assert_close(actual, expected, dtype, scale=1.0, rounded_factors=False):
    """Require |actual - expected| <= one spacing of the dtype relative + the noise of the wide arithmetic.

    With ``rounded_factors``, also one spacing of the largest value: the factors of products of matrices are rounded to
    the dtype, as tensor cores want them.
    """
    actual = np.asarray(actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape
    spacing, noise = TOLERANCES[dtype]
    with np.errstate(invalid="ignore"):
        size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
        largest = spacing * size.max(initial=0.0) if rounded_factors else 0.0
        bad = ~(np.abs(actual - expected) <= scale * (spacing * size + noise * np.maximum(size, 1.0) + largest))
    bad &= ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} values differ for {dtype}; first at {where}: "
            f"got {actual[where]!r}, expected {expected[where]!r}"
        )


def same_bits(a, b):
    """Say whether two NumPy arrays agree in shape, dtype and every bit."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_same_bits(a, b):
    """Require equal shape, dtype and bits, and show both when they are not."""
    assert same_bits(a, b), f"bits differ:\n{np.asarray(a)!r}\n{np.asarray(b)!r}"


def values_of(xp, op, arr):
    """Return the values that an op gives for an Array, which must keep its structure."""

    def run(values):
        out = op(arr.with_values(values))
        assert isinstance(out, scree.Array)
        assert out.offsets is arr.offsets
        assert out.ragged_dim == arr.ragged_dim
        return out.values

    return xp.run(run, arr.values)


@contextlib.contextmanager
def raises(error, *words):
    """Expect a one-line ValueError or TypeError whose text has all the words; says what it said when it has not."""
    with pytest.raises(error) as caught:
        yield caught
    text = str(caught.value)
    missing = [w for w in words if str(w) not in text]
    assert not missing, f"the error lacks {missing}: {text!r}"
    assert text.strip(), "an error without a text"
    assert "\n" not in text, f"an error's text is one line: {text!r}"
