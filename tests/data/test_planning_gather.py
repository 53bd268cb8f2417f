"""The tokens of planned bins, gathered from an Array."""

import functools
import operator

import numpy as np
import pytest
from test_planning import ALGORITHMS, pieces_of

import scree
from expect import raises
from scree.data import plan_bins


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_gather_takes_the_tokens_of_the_bins(xp, algo):
    lengths = [5, 0, 3, 8, 2, 6]
    values = np.arange(24)
    arr = scree.from_lengths(xp.array(values, "int32"), lengths)
    plan = plan_bins(lengths, 8, algo)
    whole = plan.gather(arr)
    assert xp.is_array(whole.values)
    expected = [values[np.cumsum([0, *lengths])[row] + start :][:n].tolist() for row, start, n in pieces_of(plan)]
    assert [xp.to_np(row).tolist() for row in whole] == expected
    one = plan.gather(arr, 1)
    a, b = plan.bins.offsets[1:3]
    assert [xp.to_np(row).tolist() for row in one] == expected[a:b]
    for choice in (slice(1, None), [1, 2], np.array([False, True, True])):
        assert xp.to_np(plan.gather(arr, choice).values).tolist() == functools.reduce(operator.iadd, expected[a:], [])
    assert plan.gather(arr, []).batch_size == 0


@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_gather_of_long_pieces_and_of_features(xp, any_dtype, ragged_dim):
    lengths = [70, 0, 33, 64, 90]
    values = np.arange(2 * sum(lengths)).reshape(-1, 2) % 2
    given_ = values if ragged_dim == 0 else values.T
    arr = scree.Array(xp.array(given_, any_dtype), np.cumsum([0, *lengths]).tolist(), ragged_dim=ragged_dim)
    plan = plan_bins(lengths, 64, too_long="split")
    got = plan.gather(arr)
    assert xp.dtype_of(got.values) == any_dtype
    begin = np.cumsum([0, *lengths])
    for (row, start, n), piece in zip(pieces_of(plan), got, strict=True):
        expected = values[begin[row] + start :][:n]
        assert xp.to_np(piece).tolist() == (expected if ragged_dim == 0 else expected.T).tolist()


def test_gather_refuses_another_array():
    plan = plan_bins([5, 3], 8)
    with raises(ValueError, "gather: arr has 1 rows", "sequence 1"):
        plan.gather(scree.from_lengths(np.arange(5), [5]))
    with raises(ValueError, "gather: row 0 of arr is shorter than it was planned"):
        plan.gather(scree.from_lengths(np.arange(7), [4, 3]))
    with raises(TypeError, "gather: arr is list"):
        plan.gather([1])
