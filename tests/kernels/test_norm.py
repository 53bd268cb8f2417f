"""varlen_layernorm and varlen_rmsnorm: one suite for both."""

import numpy as np
import pytest

import cases
import oracle
from cases import LENGTHS, batch, normal, wide, with_spare
from expect import assert_close, assert_same_bits, values_of
from scree import kernels

OPS = ("varlen_layernorm", "varlen_rmsnorm")
ORACLE = {"varlen_layernorm": oracle.layernorm, "varlen_rmsnorm": oracle.rmsnorm}
USED = sum(LENGTHS)


def parameters(xp, op, size, dtype="float32"):
    """Return the op's learnt vectors."""
    names = ("weight", "bias") if op == "varlen_layernorm" else ("weight",)
    return {name: xp.array(normal((size,), 20 + i) + 1, dtype) for i, name in enumerate(names)}


def call(op, arr, implementation, **options):
    """Call the front door."""
    return getattr(kernels, op)(arr, implementation=implementation, **options)


def check(xp, op, arr, dtype, implementation, **options):
    """Compare with the oracle."""
    out = values_of(xp, lambda a: call(op, a, implementation, **options), arr)
    assert xp.dtype_of(out) == dtype
    given = {n: (wide(xp, o) if n != "eps" else o) for n, o in options.items()}
    assert_close(wide(xp, out), ORACLE[op](wide(xp, arr), **given), dtype)


def test_oracle(xp, floating, op, implementation):
    arr = batch(xp, LENGTHS, (6,), floating)
    check(xp, op, arr, floating, implementation)
    check(xp, op, arr, floating, implementation, **parameters(xp, op, 6, floating))


def test_float32_parameters_beside_half_values(xp, floating, op, implementation):
    arr = batch(xp, LENGTHS, (6,), floating)
    check(xp, op, arr, floating, implementation, **parameters(xp, op, 6, "float32"))


@pytest.mark.parametrize("features", [(1,), (7,), (2, 6), (64,)])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_features_and_eps(xp, op, implementation, features, eps):
    arr = batch(xp, LENGTHS, features)
    if features == (1,) and op == "varlen_layernorm":
        # One feature has no spread: 0, or the bias.
        np.testing.assert_array_equal(wide(xp, call(op, arr, implementation, eps=eps)), np.zeros((USED, 1)))
        return
    check(xp, op, arr, "float32", implementation, eps=eps, **parameters(xp, op, features[-1]))


def test_weight_without_bias_and_bias_without_weight(xp, implementation):
    arr = batch(xp, LENGTHS, (6,))
    for name, vector in parameters(xp, "varlen_layernorm", 6).items():
        check(xp, "varlen_layernorm", arr, "float32", implementation, **{name: vector})


def test_the_default_eps(xp, op, implementation):
    tiny = batch(xp, LENGTHS, (6,), scale=1e-3)
    check(xp, op, tiny, "float32", implementation)
    assert_close(
        wide(xp, call(op, tiny, implementation)),
        ORACLE[op](wide(xp, tiny), eps=1e-5 if op == "varlen_layernorm" else 1e-6),
        "float32",
    )


def test_zeros_stay_finite(xp, op, implementation):
    arr = batch(xp, LENGTHS, (6,), scale=0.0)
    np.testing.assert_array_equal(wide(xp, call(op, arr, implementation)), np.zeros((USED, 6)))


def test_squares_beyond_half_precision(xp, op, implementation):
    # 1000^2 is beyond float16: the arithmetic inside has to be wider.
    arr = batch(xp, LENGTHS, (6,), "float16", scale=3000.0)
    check(xp, op, arr, "float16", implementation)


@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_another_ragged_dim(xp, op, implementation, ragged_dim):
    check(xp, op, batch(xp, LENGTHS, (2, 6), ragged_dim=ragged_dim), "float32", implementation)


@pytest.mark.parametrize("edge", cases.EDGES, ids=str)
def test_edges(xp, op, implementation, edge):
    arr = batch(xp, cases.EDGES[edge], (6,))
    check(xp, op, arr, "float32", implementation, **parameters(xp, op, 6))


def test_gradients(grad_xp, floating, op, implementation):
    xp = grad_xp
    arr, given = batch(xp, LENGTHS, (6,), floating), parameters(xp, op, 6, floating)
    weights = xp.array(normal((USED, 6), 10), floating)

    def loss(values, *vectors):
        return (
            call(op, arr.with_values(values), implementation, **dict(zip(given, vectors, strict=True))).values * weights
        ).sum()

    got = xp.grad(loss, arr.values, *given.values())
    want = oracle.gradient(
        lambda x, *vectors: ORACLE[op](x, *vectors),
        wide(xp, weights),
        wide(xp, arr),
        *(wide(xp, g) for g in given.values()),
    )
    for x, y in zip(got, want, strict=True):
        # Central differences are good to 1e-9, and a vector's gradient sums over every token.
        assert_close(x, y, floating, scale=4.0 if floating != "float64" else 1e5)


def test_no_gradient_is_nan_at_zero(grad_xp, op, implementation):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (6,), scale=0.0)
    (grad,) = xp.grad(lambda v: call(op, arr.with_values(v), implementation).values.sum(), arr.values)
    assert np.isfinite(grad).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf in the row changed
@pytest.mark.parametrize("bad", [7.0, np.nan, np.inf])
def test_no_sequence_sees_another(xp, op, implementation, bad):
    arr, given = batch(xp, LENGTHS, (6,)), parameters(xp, op, 6)
    before = xp.to_np(call(op, arr, implementation, **given).values)
    values = xp.to_np(arr.values)
    values[3:4] = bad
    values[3, 0] = 1.0
    after = xp.to_np(call(op, arr.with_values(xp.array(values)), implementation, **given).values)
    assert_same_bits(np.delete(after, 3, 0), np.delete(before, 3, 0))


def test_rows_in_another_order_and_alone(xp, op, implementation):
    arr, given = batch(xp, LENGTHS, (6,)), parameters(xp, op, 6)
    before = call(op, arr, implementation, **given)
    order = [3, 6, 1, 5, 0, 2, 4]
    assert_same_bits(xp.to_np(call(op, arr[order], implementation, **given).values), xp.to_np(before[order].values))
    for row in range(len(LENGTHS)):
        alone = call(op, arr[row : row + 1], implementation, **given)
        assert_same_bits(xp.to_np(alone.values), xp.to_np(before[row]))


@pytest.mark.parametrize("size", [33, 256])
def test_a_long_row_alone_has_the_same_bits(xp, op, implementation, size):
    # Wide enough that a library may sum a lone token in another order than many.
    arr = batch(xp, (3, 1, 5), (size,))
    before = call(op, arr, implementation)
    for row in range(3):
        assert_same_bits(xp.to_np(call(op, arr[row : row + 1], implementation).values), xp.to_np(before[row]))


def test_the_gradient_of_a_row_alone(grad_xp, op, implementation):
    xp = grad_xp
    arr, given, weights = batch(xp, LENGTHS, (6,)), parameters(xp, op, 6), normal((USED, 6), 10)

    def grad(arr, weights):
        def loss(values):
            return (call(op, arr.with_values(values), implementation, **given).values * xp.array(weights)).sum()

        return xp.eager_grad(loss, arr.values)[0]

    together = grad(arr, weights)
    assert_same_bits(grad(arr[1:2], weights[:3]), together[:3])
    assert_same_bits(grad(arr[2:3], weights[3:4]), together[3:4])


@pytest.mark.parametrize("spare", [0.0, 3.0, np.nan])
def test_spare_values_are_left_out(xp, op, implementation, spare):
    arr, given = batch(xp, LENGTHS, (6,)), parameters(xp, op, 6)
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    out = call(op, full, implementation, **given)
    assert out.offsets is full.offsets
    assert_same_bits(xp.to_np(out.values)[:USED], xp.to_np(call(op, arr, implementation, **given).values))
    assert_same_bits(np.abs(xp.to_np(out.values)[USED:]), np.zeros((4, 6), np.float32))


def test_spare_values_of_another_ragged_dim(xp, op, implementation):
    arr = batch(xp, LENGTHS, (2, 6), ragged_dim=1)
    out = call(op, with_spare(xp, arr, *cases.CAPACITY), implementation)
    assert_same_bits(np.abs(xp.to_np(out.values)[:, USED:]), np.zeros((2, 4, 6), np.float32))


@pytest.mark.parametrize("spare", [0.0, 3.0, np.nan])
def test_spare_values_get_and_give_no_gradient(grad_xp, op, implementation, spare):
    xp = grad_xp
    arr, given = batch(xp, LENGTHS, (6,)), parameters(xp, op, 6)
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    weights = normal((USED + 4, 6), 10)

    def grads(arr, weights):
        def loss(values, *vectors):
            out = call(op, arr.with_values(values), implementation, **dict(zip(given, vectors, strict=True)))
            return (out.values * xp.array(weights)).sum()

        return xp.eager_grad(loss, arr.values, *given.values())

    got, want = grads(full, weights), grads(arr, weights[:USED])
    assert_same_bits(np.abs(got[0][USED:]), np.zeros((4, 6), np.float32))
    assert_same_bits(got[0][:USED], want[0])
    for x, y in zip(got[1:], want[1:], strict=True):
        assert_close(x, y, "float32")
