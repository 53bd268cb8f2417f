"""concat, with_capacity."""

import numpy as np
import pytest

import oracle
import scree
from cases import host_offsets, normal, with_spare
from expect import raises
from test_array import LENGTHS, assert_rows, make, rows_of

SIDES = ("right", "left")


def rows_in(xp, lengths=LENGTHS, features=(2,), dtype="float32", ragged_dim=0):
    """Return rows as NumPy and as the framework's arrays."""
    rows = rows_of(xp, make(xp, dtype, lengths, features, ragged_dim))
    return rows, [xp.array(r, dtype) for r in rows]


# concat


def two(xp, ragged_dim=0):
    """Return two Arrays of five rows."""
    a = make(xp, features=(2, 3), ragged_dim=ragged_dim)
    b = make(xp, lengths=(2, 0, 1, 1, 0), features=(2, 3), ragged_dim=ragged_dim) * -1
    return a, b


@pytest.mark.parametrize("ragged_dim", [0, 1, 2])
def test_concat_by_rows(xp, ragged_dim):
    a, b = two(xp, ragged_dim)
    c = make(xp, lengths=(), features=(2, 3), ragged_dim=ragged_dim)
    for given in ([a, b], (a, b), iter([a, b]), [c, a, c, b]):
        got = scree.concat(given)
        assert_rows(xp, got, rows_of(xp, a) + rows_of(xp, b))
        assert got.ragged_dim == ragged_dim
        assert got.max_length == 5
    assert_rows(xp, scree.concat([a, b], dim="batch"), rows_of(xp, a) + rows_of(xp, b))
    assert_rows(xp, scree.concat([a]), rows_of(xp, a))
    assert xp.dtype_of(scree.concat([a, b]).offsets) == "int32"


@pytest.mark.parametrize("ragged_dim", [0, 1, 2])
def test_concat_row_by_row(xp, ragged_dim):
    a, b = two(xp, ragged_dim)
    got = scree.concat([a, b, a], dim="ragged")
    want = [np.concatenate([x, y, x], ragged_dim) for x, y in zip(rows_of(xp, a), rows_of(xp, b), strict=True)]
    assert_rows(xp, got, want)
    assert got.max_length == max(r.shape[ragged_dim] for r in want)
    assert_rows(xp, scree.concat([a], dim="ragged"), rows_of(xp, a))
    none = make(xp, lengths=(), features=(2, 3), ragged_dim=ragged_dim)
    assert len(scree.concat([none, none], dim="ragged")) == 0


def test_concat_keeps_the_dtype(xp, any_dtype):
    a = make(xp, any_dtype)
    for dim in ("batch", "ragged"):
        assert xp.dtype_of(scree.concat([a, a], dim=dim).values) == any_dtype


def test_concat_of_capacity_arrays_leaves_the_spare_out(xp):
    a, b = make(xp), make(xp, lengths=(2, 0, 1, 1, 0))
    full = with_spare(xp, a, 5, 13)
    assert_rows(xp, scree.concat([full, b]), rows_of(xp, a) + rows_of(xp, b))
    assert_rows(xp, scree.concat([b, full]), rows_of(xp, b) + rows_of(xp, a))
    want = [np.concatenate([x, y]) for x, y in zip(rows_of(xp, a), rows_of(xp, b), strict=True)]
    assert_rows(xp, scree.concat([full, b], dim="ragged"), want)


def test_concat_errors(xp):
    a, _ = two(xp)
    for dim in ("batch", "ragged"):
        with raises(ValueError, "concat", "empty"):
            scree.concat([], dim=dim)
        with raises((TypeError, ValueError), "concat", "[1]", "float16", "float32"):
            scree.concat([a, a.astype("float16")], dim=dim)
        with raises(ValueError, "concat", "[1]"):
            scree.concat([a, make(xp, features=(2, 4))], dim=dim)
        with raises(ValueError, "concat", "[2]", "ragged_dim"):
            scree.concat([a, a, two(xp, 1)[0]], dim=dim)
        with raises(TypeError, "concat", "[1]"):
            scree.concat([a, a.values], dim=dim)
    with raises(ValueError, "concat", "[1]", 4, 5):
        scree.concat([a, make(xp, lengths=(1, 1, 1, 1), features=(2, 3))], dim="ragged")
    for dim in ("rows", 0, None):
        with raises((ValueError, TypeError), "concat", "dim", "batch", "ragged"):
            scree.concat([a, a], dim=dim)


def test_gradients_through_concat(grad_xp):
    xp = grad_xp
    wa, wb = normal((9, 2), 1), normal((4, 2), 2)
    left, right = xp.array(oracle.offsets_of(LENGTHS), "int32"), xp.array(oracle.offsets_of((2, 0, 1, 1, 0)), "int32")
    for dim in ("batch", "ragged"):
        weights = scree.concat([scree.Array(xp.array(wa), left), scree.Array(xp.array(wb), right)], dim=dim).values

        def through(a, b, dim=dim, weights=weights):
            return (scree.concat([scree.Array(a, left), scree.Array(b, right)], dim=dim).values * weights).sum()

        ga, gb = xp.eager_grad(through, xp.array(wa), xp.array(wb))
        np.testing.assert_allclose(ga, wa, rtol=1e-6)
        np.testing.assert_allclose(gb, wb, rtol=1e-6)


# with_capacity


@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_with_capacity(xp, any_dtype, ragged_dim):
    arr = make(xp, any_dtype, ragged_dim=ragged_dim)
    full = scree.with_capacity(arr, 7, 13)
    assert full.batch_size == 7
    assert full.total_length == 13
    assert full.ragged_dim == ragged_dim
    assert host_offsets(xp, full) == [*host_offsets(xp, arr), 9, 9]
    assert xp.dtype_of(full.values) == any_dtype
    assert xp.dtype_of(full.offsets) == "int32"
    assert_rows(xp, full[:5], rows_of(xp, arr))
    spare = np.moveaxis(xp.to_np(full.values), ragged_dim, 0)[9:]
    np.testing.assert_array_equal(spare, np.zeros((4, 2)))


def test_with_capacity_of_what_fits_exactly(xp):
    arr = make(xp)
    full = scree.with_capacity(arr, 5, 9)
    assert_rows(xp, full, rows_of(xp, arr))
    assert (full.batch_size, full.total_length) == (5, 9)


def test_with_capacity_twice(xp):
    arr = make(xp)
    twice = scree.with_capacity(with_spare(xp, arr, 6, 11), 8, 16)
    assert (twice.batch_size, twice.total_length) == (8, 16)
    assert host_offsets(xp, twice) == [*host_offsets(xp, arr), 9, 9, 9]
    assert_rows(xp, twice[:5], rows_of(xp, arr))


def test_with_capacity_of_nothing(xp):
    full = scree.with_capacity(make(xp, lengths=()), 3, 4)
    assert host_offsets(xp, full) == [0, 0, 0, 0]
    assert full.total_length == 4
    assert scree.with_capacity(make(xp, lengths=()), 0, 0).batch_size == 0


def test_with_capacity_errors(xp):
    arr = make(xp)
    with raises(ValueError, "batch_size", 4, 5):
        scree.with_capacity(arr, 4, 20)
    with raises(ValueError, "total_length", 8, 9):
        scree.with_capacity(arr, 7, 8)
    for bad in (-1, 2.5, "7", None):
        with raises((TypeError, ValueError), "batch_size"):
            scree.with_capacity(arr, bad, 13)
        with raises((TypeError, ValueError), "total_length"):
            scree.with_capacity(arr, 7, bad)


def test_only_with_capacity_leaves_values_over(xp):
    full = scree.with_capacity(make(xp), 7, 13)
    with raises(ValueError, "offsets[-1]", 9, 13):
        scree.Array(full.values, full.offsets).validate()


def test_gradients_through_with_capacity(grad_xp):
    xp = grad_xp
    weights = normal((13, 2), 1)
    offsets = xp.array(oracle.offsets_of(LENGTHS), "int32")

    def through(values):
        return (scree.with_capacity(scree.Array(values, offsets), 7, 13).values * xp.array(weights)).sum()

    np.testing.assert_allclose(xp.eager_grad(through, xp.array(normal((9, 2), 0)))[0], weights[:9], rtol=1e-6)
