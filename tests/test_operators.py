"""Arithmetic between Arrays and with scalars; map and with_values."""

import operator

import numpy as np
import pytest

import scree
from cases import host_offsets
from expect import raises
from test_array import assert_rows, make, rows_of

# Arithmetic and map


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.lt, operator.le, operator.gt, operator.ge,
    operator.eq, operator.ne, operator.floordiv, operator.mod, operator.pow,
]  # fmt: skip


@pytest.mark.parametrize("op", BINARY, ids=lambda f: f.__name__)
def test_arithmetic(xp, op):
    arr = make(xp)
    data = xp.to_np(arr.values)
    for got, want in [
        (op(arr, 2), op(data, 2)),
        (op(2.0, arr), op(2.0, data)),
        (op(arr, arr + 1), op(data, data + 1)),
    ]:
        assert isinstance(got, scree.Array)
        assert got.offsets is arr.offsets
        np.testing.assert_allclose(xp.to_np(got.values), want, rtol=1e-6)


@pytest.mark.parametrize("op", [operator.neg, operator.pos, operator.abs], ids=lambda f: f.__name__)
def test_unary(xp, op):
    arr = make(xp) - 4
    got = op(arr)
    assert got.offsets is arr.offsets
    np.testing.assert_array_equal(xp.to_np(got.values), op(xp.to_np(arr.values)))


def test_numpy_scalars_do_not_take_the_array_apart(xp):
    arr = scree.Array(xp.array(np.arange(4.0), "float32"), xp.array(np.array([0, 1, 4]), "int32"))
    for got in (np.float64(2) * arr, arr * np.float64(2), np.float32(2) * arr, np.int64(2) * arr):
        assert isinstance(got, scree.Array)
        np.testing.assert_array_equal(xp.to_np(got.values), [0, 2, 4, 6])
    np.testing.assert_array_equal(xp.to_np((np.float32(2) > arr).values), [True, True, False, False])


def test_equal_structure_is_by_value(xp):
    a = make(xp)
    b = scree.Array(a.values, xp.array(host_offsets(xp, a), "int16"))
    got = a + b
    assert got.offsets is a.offsets
    np.testing.assert_array_equal(xp.to_np(got.values), 2 * xp.to_np(a.values))


def test_unequal_structure_is_an_error(xp):
    a = make(xp)
    others = [
        scree.Array(a.values, xp.array([0, 1, 3, 4, 9, 9], "int32")),
        scree.Array(a.values, xp.array([0, 9], "int32")),
        make(xp, lengths=(1, 2, 3)),
    ]
    for other in others:
        with raises(ValueError, "structure"):
            a + other
        with raises(ValueError, "structure"):
            a == other
    square = xp.array(np.zeros((4, 4)))
    offsets = xp.array([0, 1, 4], "int32")
    with raises(ValueError, "structure"):
        scree.Array(square, offsets, 0) + scree.Array(square, offsets, 1)


def test_other_operands_are_refused(xp):
    arr = make(xp)
    for other in ("a", None, [1, 2], {}):
        with pytest.raises(TypeError):
            arr + other
        with pytest.raises(TypeError):
            other + arr


def test_truth_and_conversion_are_errors(xp):
    arr = make(xp)
    with raises(ValueError):
        bool(arr)
    with raises(ValueError):
        bool(arr == arr)
    with raises(ValueError, "to_padded", "unpack"):
        np.asarray(arr)


def test_map_keeps_the_offsets(xp):
    arr = make(xp)
    got = arr.map(lambda v: v * 2)
    assert got.offsets is arr.offsets
    assert_rows(xp, got, [2 * r for r in rows_of(xp, arr)])
    per_token = arr.map(lambda v: v[:, :1])
    assert per_token.feature_shape == (1,)
    assert per_token.offsets is arr.offsets
    assert make(xp, features=(2,)).map(lambda v: v.sum(1)).feature_shape == ()


def test_map_that_changes_the_ragged_axis_is_an_error(xp):
    with raises(ValueError, 9, 8):
        make(xp).map(lambda v: v[1:])
    with raises((TypeError, ValueError)):
        make(xp).map(lambda v: None)


def test_map_along_another_axis(xp):
    arr = make(xp, features=(2, 3), ragged_dim=1)
    got = arr.map(lambda v: v + 1)
    assert got.ragged_dim == 1
    assert_rows(xp, got, [r + 1 for r in rows_of(xp, arr)])


def test_with_values(xp):
    arr = make(xp)
    values = xp.array(np.zeros((9, 7)))
    got = arr.with_values(values)
    assert got.values is values
    assert got.offsets is arr.offsets
    with raises(ValueError, 9, 8):
        arr.with_values(xp.array(np.zeros((8, 7))))
