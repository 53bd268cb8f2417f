"""varlen_softmax: along the ragged axis, each sequence on its own."""

import numpy as np
import pytest

import cases
import oracle
import scree
from cases import LENGTHS, batch, host_offsets, normal, wide, with_spare
from expect import assert_close, assert_same_bits, values_of
from scree import kernels

OPS = ("varlen_softmax",)
USED = sum(LENGTHS)


def call(arr, implementation):
    """Call the front door."""
    return kernels.varlen_softmax(arr, implementation=implementation)


def expected(xp, arr):
    """Ask the oracle, whatever the ragged axis."""
    values = np.moveaxis(wide(xp, arr), arr.ragged_dim, 0)
    return np.moveaxis(oracle.softmax(values, host_offsets(xp, arr)), 0, arr.ragged_dim)


def check(xp, arr, dtype, implementation):
    """Compare with the oracle."""
    out = values_of(xp, lambda a: call(a, implementation), arr)
    assert xp.dtype_of(out) == dtype
    assert_close(wide(xp, out), expected(xp, arr), dtype)


@pytest.mark.parametrize("features", [(), (6,), (2, 0)])
def test_oracle(xp, floating, implementation, features):
    check(xp, batch(xp, LENGTHS, features, floating), floating, implementation)


@pytest.mark.parametrize("ragged_dim", [0, 1, 2])
def test_another_ragged_dim(xp, implementation, ragged_dim):
    check(xp, batch(xp, LENGTHS, (2, 3), ragged_dim=ragged_dim), "float32", implementation)


@pytest.mark.parametrize("edge", cases.EDGES, ids=str)
def test_edges(xp, implementation, edge):
    check(xp, batch(xp, cases.EDGES[edge], (6,)), "float32", implementation)


def test_large_values(xp, floating, implementation):
    arr = batch(xp, LENGTHS, (6,), floating, scale=1000.0)
    out = wide(xp, call(arr, implementation))
    assert np.isfinite(out).all()
    assert_close(out, expected(xp, arr), floating, scale=1e3)


def test_minus_infinity_weighs_nothing(xp, implementation):
    values = normal((USED,), 0)
    values[[0, 4, 5]] = -np.inf
    arr = scree.Array(xp.array(values), xp.array(oracle.offsets_of(LENGTHS), "int32"))
    out = wide(xp, call(arr, implementation))
    assert (out[[0, 4, 5]] == 0).all()
    assert np.isfinite(out).all()
    np.testing.assert_allclose([out[:3].sum(), out[3], out[4:9].sum(), out[9:].sum()], 1, rtol=1e-6)


def test_gradients(grad_xp, floating, implementation):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (6,), floating)
    weights = xp.array(normal((USED, 6), 10), floating)
    (got,) = xp.grad(lambda v: (call(arr.with_values(v), implementation).values * weights).sum(), arr.values)
    want = oracle.gradient(lambda x: oracle.softmax(x, oracle.offsets_of(LENGTHS)), wide(xp, weights), wide(xp, arr))
    assert_close(got, want[0], floating, scale=4.0 if floating != "float64" else 1e4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf in the row changed
@pytest.mark.parametrize("bad", [7.0, np.nan, np.inf])
def test_no_sequence_sees_another(xp, implementation, bad):
    arr = batch(xp, LENGTHS, (6,))
    before = xp.to_np(call(arr, implementation).values)
    values = xp.to_np(arr.values)
    values[4:9] = bad
    values[4, 0] = 1.0
    after = xp.to_np(call(arr.with_values(xp.array(values)), implementation).values)
    others = [*range(4), *range(9, USED)]
    assert_same_bits(after[others], before[others])


def test_rows_in_another_order_and_alone(xp, implementation):
    arr = batch(xp, LENGTHS, (6,))
    before = call(arr, implementation)
    order = [3, 6, 1, 5, 0, 2, 4]
    assert_same_bits(xp.to_np(call(arr[order], implementation).values), xp.to_np(before[order].values))
    for row in range(len(LENGTHS)):
        assert_same_bits(xp.to_np(call(arr[row : row + 1], implementation).values), xp.to_np(before[row]))


def test_the_gradient_of_a_row_alone(grad_xp, implementation):
    xp = grad_xp
    arr, weights = batch(xp, LENGTHS, (6,)), normal((USED, 6), 10)

    def grad(arr, weights):
        return xp.eager_grad(
            lambda v: (call(arr.with_values(v), implementation).values * xp.array(weights)).sum(), arr.values
        )[0]

    assert_same_bits(grad(arr[3:4], weights[4:9]), grad(arr, weights)[4:9])


@pytest.mark.parametrize("spare", [0.0, 3.0, np.nan])
@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_spare_values_are_left_out(xp, implementation, spare, ragged_dim):
    arr = batch(xp, LENGTHS, (6,), ragged_dim=ragged_dim)
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    out = call(full, implementation)
    assert out.offsets is full.offsets
    got = np.moveaxis(xp.to_np(out.values), ragged_dim, 0)
    assert_same_bits(got[:USED], np.moveaxis(xp.to_np(call(arr, implementation).values), ragged_dim, 0))
    assert_same_bits(got[USED:], np.zeros((4, 6), np.float32))


@pytest.mark.parametrize("spare", [0.0, np.nan])
def test_spare_values_get_no_gradient(grad_xp, implementation, spare):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (6,))
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    weights = normal((USED + 4, 6), 10)

    def grad(arr, weights):
        return xp.jit_grad(
            lambda v: (call(arr.with_values(v), implementation).values * xp.array(weights)).sum(), arr.values
        )[0]

    got = grad(full, weights)
    assert_same_bits(got[:USED], grad(arr, weights[:USED]))
    assert_same_bits(np.abs(got[USED:]), np.zeros((4, 6), np.float32))
