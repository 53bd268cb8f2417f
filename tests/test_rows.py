"""Rows of an Array: by number, slice, list, array and mask; iteration; views."""

import numpy as np
import pytest

import scree
from cases import host_offsets, with_spare
from expect import raises
from test_array import LENGTHS, assert_rows, make, rows_of

# Row access


def test_rows_by_integer(xp):
    arr, rows = make(xp), rows_of(xp, make(xp))
    for i in (0, 1, 3, 4, -1, -2, -5, np.int64(1), np.int32(-2)):
        row = arr[i]
        assert xp.is_array(row)
        np.testing.assert_array_equal(xp.to_np(row), rows[i])
    for i in (5, -6, 10**6):
        with raises(IndexError, i, 5):
            arr[i]


@pytest.mark.parametrize(
    "cut",
    [
        slice(None), slice(1, 4), slice(0, 0), slice(3, 1), slice(-2, None), slice(None, None, 2), slice(None, None, -1),
        slice(4, None, -2), slice(1, 100), slice(-100, 2), slice(None, None, -3),
    ],
    ids=str,
)  # fmt: skip
def test_rows_by_slice(xp, cut):
    arr = make(xp)
    got = arr[cut]
    assert isinstance(got, scree.Array)
    assert_rows(xp, got, rows_of(xp, arr)[cut])
    assert host_offsets(xp, got)[0] == 0
    assert host_offsets(xp, got)[-1] == got.total_length
    assert got.max_length == max((len(r) for r in rows_of(xp, arr)[cut]), default=0)


@pytest.mark.parametrize(
    "index",
    [
        [], [0], [3, 1], [1, 1, 1], [-1, 0, -5], (2, 3), [True, False, True, False, True], [False] * 5, range(1, 4),
    ],
    ids=str,
)  # fmt: skip
def test_rows_by_list(xp, index):
    arr, rows = make(xp), rows_of(xp, make(xp))
    if isinstance(index, (tuple, range)):
        index = list(index)
    got = arr[index]
    picked = [i for i, keep in enumerate(index) if keep] if index and isinstance(index[0], bool) else index
    assert_rows(xp, got, [rows[i] for i in picked])


def test_rows_by_array(xp):
    arr, rows = make(xp), rows_of(xp, make(xp))
    for index in (xp.array([3, -1, 0], "int32"), np.array([3, -1, 0])):
        assert_rows(xp, arr[index], [rows[3], rows[-1], rows[0]])
    mask = [True, True, False, True, False]
    for index in (xp.array(mask, "bool"), np.array(mask)):
        assert_rows(xp, arr[index], [rows[0], rows[1], rows[3]])
    assert_rows(xp, arr[np.array([], np.int64)], [])


def test_bad_row_indices(xp):
    arr = make(xp)
    for mask in ([True, False], [True] * 6, np.ones(4, bool), xp.array(np.ones(6), "bool")):
        with raises((IndexError, ValueError), 5):
            arr[mask]
    for index in ([0, 5], [-6], np.array([9]), xp.array([0, 7], "int32")):
        with raises(IndexError, 5):
            arr[index]
    with raises(IndexError, "mask", "()"):
        arr[xp.array(np.array(True), "bool")]  # one bool is no row number, though PyTorch would make it one
    for index in ("a", 1.0, None, [0.5], np.array([0.0]), [[0, 1]], np.zeros((2, 2), int), {}):
        with pytest.raises((TypeError, IndexError, ValueError)) as caught:
            arr[index]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ragged_dim", [1, 2, -1])
def test_rows_along_another_axis(xp, ragged_dim):
    arr = make(xp, features=(2, 3), ragged_dim=ragged_dim % 3)
    rows = rows_of(xp, arr)
    assert [xp.to_np(r).shape[ragged_dim] for r in arr] == list(LENGTHS)
    for row, want in zip(arr, rows, strict=True):
        np.testing.assert_array_equal(xp.to_np(row), want)
    assert_rows(xp, arr[1:4], rows[1:4])
    assert_rows(xp, arr[[3, 0, 1]], [rows[3], rows[0], rows[1]])
    assert arr[1:4].ragged_dim == ragged_dim % 3


def test_iteration(xp):
    arr = make(xp)
    rows = list(arr)
    assert len(rows) == 5
    for row, want in zip(rows, rows_of(xp, arr), strict=True):
        np.testing.assert_array_equal(xp.to_np(row), want)
    assert list(make(xp, lengths=())) == []


def test_rows_are_views_where_the_framework_has_them(xp):
    if not xp.has_views:
        return
    for arr in (make(xp), make(xp, features=(2, 2), ragged_dim=1)):
        for rows in (list(arr), scree.unpack(arr), [arr[i] for i in range(5)]):
            assert xp.shares_memory(rows[3], arr.values)


def test_rows_of_a_capacity_array(xp):
    arr = make(xp)
    full = with_spare(xp, arr, 7, 13, spare=50)
    rows = rows_of(xp, arr) + [np.zeros((0, 2))] * 2
    assert_rows(xp, full, rows)
    np.testing.assert_array_equal(xp.to_np(full[3]), rows[3])
    assert_rows(xp, full[3:], rows[3:])
    assert_rows(xp, full[[6, 3]], [rows[6], rows[3]])
    assert_rows(xp, full[::-1], rows[::-1])
    assert [len(xp.to_np(r)) for r in full] == [*LENGTHS, 0, 0]
    assert full.max_length == 5
