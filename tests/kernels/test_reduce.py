"""varlen_reduce: sum, mean, max, min, logsumexp of each sequence."""

import numpy as np
import pytest

import cases
import oracle
import scree
from cases import LENGTHS, batch, host_offsets, normal, wide, with_spare
from expect import assert_close, assert_same_bits
from scree import kernels

OPS = ("varlen_reduce",)
FLOATING = ("sum", "mean", "max", "min", "logsumexp")
USED = sum(LENGTHS)


def call(arr, how, implementation):
    """Call the front door."""
    return kernels.varlen_reduce(arr, how, implementation=implementation)


def expected(xp, arr, how):
    """Ask the oracle, whatever the ragged axis."""
    values = xp.to_np(arr.values)
    values = values.astype(np.float64) if values.dtype.kind == "f" else values
    return oracle.reduce(np.moveaxis(values, arr.ragged_dim, 0), host_offsets(xp, arr), how)


def check(xp, arr, how, dtype, implementation):
    """Compare with the oracle."""
    out = xp.run(lambda values: call(arr.with_values(values), how, implementation), arr.values)
    assert xp.is_array(out)
    assert xp.dtype_of(out) == dtype
    assert tuple(out.shape) == (arr.batch_size, *arr.feature_shape)
    assert_close(wide(xp, out), expected(xp, arr, how), dtype)


@pytest.mark.parametrize("how", FLOATING)
@pytest.mark.parametrize("features", [(), (6,)])
def test_oracle(xp, floating, implementation, how, features):
    check(xp, batch(xp, LENGTHS, features, floating), how, floating, implementation)


@pytest.mark.parametrize("how", FLOATING)
@pytest.mark.parametrize("ragged_dim", [1, 2])
def test_another_ragged_dim(xp, implementation, how, ragged_dim):
    check(xp, batch(xp, LENGTHS, (2, 3), ragged_dim=ragged_dim), how, "float32", implementation)


@pytest.mark.parametrize("how", FLOATING)
@pytest.mark.parametrize("edge", cases.EDGES, ids=str)
def test_edges(xp, implementation, how, edge):
    check(xp, batch(xp, cases.EDGES[edge], (6,)), how, "float32", implementation)


def test_empty_sequences(xp, implementation):
    arr = batch(xp, (0, 3, 0), ())
    for how, want in [("sum", 0), ("mean", np.nan), ("max", -np.inf), ("min", np.inf), ("logsumexp", -np.inf)]:
        out = xp.to_np(call(arr, how, implementation))
        np.testing.assert_array_equal(out[[0, 2]], [want, want])
        assert np.isfinite(out[1])


@pytest.mark.parametrize("how", ["sum", "max", "min"])
def test_integers(xp, integer, implementation, how):
    values = xp.array(np.arange(USED * 2).reshape(USED, 2) % 11 - (0 if integer == "uint8" else 5), integer)
    arr = scree.Array(values, xp.array(oracle.offsets_of(LENGTHS), "int32"))
    out = xp.run(lambda values: call(arr.with_values(values), how, implementation), values)
    assert xp.dtype_of(out) == integer
    np.testing.assert_array_equal(xp.to_np(out), expected(xp, arr, how))


def test_large_integers_are_exact(xp, implementation):
    dtype = "int64" if "int64" in xp.integers else "int32"
    big = 2**62 if dtype == "int64" else 2**30
    arr = scree.Array(xp.array([big + 1, 1, big - 1], dtype), xp.array([0, 2, 3], "int32"))
    assert xp.to_np(call(arr, "sum", implementation)).tolist() == [big + 2, big - 1]
    assert xp.to_np(call(arr, "max", implementation)).tolist() == [big + 1, big - 1]


def test_unsigned_integers_beyond_int64(xp, implementation):
    if xp.name not in ("numpy", "mlx") or implementation == "numba":
        return  # JAX has them with 64-bit types only, and PyTorch cannot calculate with them
    big = 2**64 - 1
    arr = scree.Array(xp.module.array(np.array([big, 1], np.uint64)), xp.array([0, 0, 2], "int32"))
    assert xp.to_np(call(arr, "max", implementation)).tolist() == [0, big]
    assert xp.to_np(call(arr, "min", implementation)).tolist() == [big, 1]
    assert xp.to_np(scree.to_padded(arr, fill_value=big)[0]).tolist() == [[big, big], [big, 1]]


@pytest.mark.parametrize("how", ["max", "min"])
def test_bools(xp, implementation, how):
    values = xp.array(np.arange(USED) % 2 == 0)
    arr = scree.Array(values, xp.array(oracle.offsets_of(LENGTHS), "int32"))
    out = call(arr, how, implementation)
    assert xp.to_np(out).dtype == bool
    np.testing.assert_array_equal(xp.to_np(out), expected(xp, arr, how))


def test_nan_and_infinity(xp, implementation):
    values = np.array([1.0, np.nan, 2.0, np.inf, 1.0, -np.inf, -np.inf, -np.inf, 3.0])
    arr = scree.Array(xp.array(values), xp.array([0, 3, 5, 7, 9], "int32"))
    for how, want in [
        ("sum", [np.nan, np.inf, -np.inf, -np.inf]),
        ("max", [np.nan, np.inf, -np.inf, 3]),
        ("min", [np.nan, 1, -np.inf, -np.inf]),
        ("logsumexp", [np.nan, np.inf, -np.inf, 3]),
    ]:
        np.testing.assert_array_equal(xp.to_np(call(arr, how, implementation)), np.array(want, np.float32), err_msg=how)


def test_a_sum_is_wider_inside(xp, floating, implementation):
    # In float16 a running sum of ones stops at 2048, in bfloat16 at 256.
    arr = scree.Array(xp.array(np.ones((4096,)), floating), xp.array([0, 4096], "int32"))
    assert xp.to_np(call(arr, "sum", implementation)).tolist() == [4096]
    assert xp.to_np(call(arr, "mean", implementation)).tolist() == [1]


@pytest.mark.parametrize("how", FLOATING)
def test_large_values(xp, implementation, how):
    check(xp, batch(xp, (3, 5), (6,), scale=1000.0), how, "float32", implementation)


@pytest.mark.parametrize("how", FLOATING)
def test_gradients(grad_xp, floating, implementation, how):
    xp = grad_xp
    lengths = (3, 1, 5, 0, 3) if how != "mean" else (3, 1, 5, 3)
    arr = batch(xp, lengths, (2,), floating)
    weights = normal((len(lengths), 2), 10)
    if how != "mean":
        weights[3] = 0.0  # an empty sequence has no gradient to give
    given = xp.array(weights, floating)

    def loss(values):
        out = call(arr.with_values(values), how, implementation)
        # inf * 0 is NaN: leave the empty sequence out before the sum
        return sum((out[i] * given[i]).sum() for i in range(len(lengths)) if lengths[i])

    (got,) = xp.grad(loss, arr.values)
    want = oracle.gradient(
        lambda x: np.nan_to_num(oracle.reduce(x, oracle.offsets_of(lengths), how), posinf=0, neginf=0),
        wide(xp, given),
        wide(xp, arr),
    )
    if floating in ("float16", "bfloat16") and how in ("max", "min"):
        return  # two values of a sequence may round to the same, and then share or not
    assert_close(got, want[0], floating, scale=4.0 if floating != "float64" else 1e5)


@pytest.mark.parametrize("how", FLOATING)
def test_empty_sequences_spoil_no_gradient(grad_xp, implementation, how):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (2,))
    full = [i for i, n in enumerate(LENGTHS) if n]

    def loss(values):
        out = call(arr.with_values(values), how, implementation)
        return sum(out[i].sum() for i in full)

    (grad,) = xp.grad(loss, arr.values)
    assert np.isfinite(grad).all()
    assert np.abs(grad).sum() > 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf in the row changed
@pytest.mark.parametrize("how", FLOATING)
def test_no_sequence_sees_another(xp, implementation, how):
    arr = batch(xp, LENGTHS, (6,))
    before = xp.to_np(call(arr, how, implementation))
    for bad in (7.0, np.nan, np.inf):
        values = xp.to_np(arr.values)
        values[4:9] = bad
        after = xp.to_np(call(arr.with_values(xp.array(values)), how, implementation))
        assert_same_bits(np.delete(after, 3, 0), np.delete(before, 3, 0))


@pytest.mark.parametrize("how", FLOATING)
def test_rows_in_another_order_and_alone(xp, implementation, how):
    arr = batch(xp, LENGTHS, (6,))
    before = xp.to_np(call(arr, how, implementation))
    order = [3, 6, 1, 5, 0, 2, 4]
    assert_same_bits(xp.to_np(call(arr[order], how, implementation)), before[order])
    for row in range(len(LENGTHS)):
        assert_same_bits(xp.to_np(call(arr[row : row + 1], how, implementation)), before[row : row + 1])


@pytest.mark.parametrize("how", FLOATING)
@pytest.mark.parametrize("spare", [3.0, np.nan])
def test_spare_values_are_left_out(xp, implementation, how, spare):
    arr = batch(xp, LENGTHS, (6,))
    out = xp.to_np(call(with_spare(xp, arr, *cases.CAPACITY, spare), how, implementation))
    assert_same_bits(out[: len(LENGTHS)], xp.to_np(call(arr, how, implementation)))
    np.testing.assert_array_equal(out[len(LENGTHS) :], np.tile(out[:1], (2, 1)))


@pytest.mark.parametrize("how", FLOATING)
def test_spare_values_get_no_gradient(grad_xp, implementation, how):
    xp = grad_xp
    full = with_spare(xp, batch(xp, LENGTHS, (2,)), *cases.CAPACITY)

    def loss(values):
        out = call(full.with_values(values), how, implementation)
        return sum(out[i].sum() for i in (1, 2, 3, 5))

    (grad,) = xp.grad(loss, full.values)
    np.testing.assert_array_equal(grad[USED:], np.zeros((4, 2)))
    assert np.isfinite(grad).all()
