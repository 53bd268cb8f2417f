"""varlen_rope: both layouts, positions from the place in the sequence plus start."""

import numpy as np
import pytest

import cases
import oracle
from cases import LENGTHS, batch, host_offsets, normal, wide, with_spare
from expect import assert_close, assert_same_bits, values_of
from scree import kernels

OPS = ("varlen_rope",)
USED = sum(LENGTHS)
POSITIONS = 12


def tables(xp, half=3, dtype="float32", positions=POSITIONS):
    """Return cos and sin of angles place / 100^(c / half)."""
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    return xp.array(np.cos(angles), dtype), xp.array(np.sin(angles), dtype)


def starts(xp, kind):
    """Return a start as given and as the oracle wants it."""
    rows = [4, 0, 7, 3, 1, 9, 2]
    return {
        "none": (None, None),
        "zero": (0, 0),
        "five": (5, 5),
        "rows": (xp.array(rows, "int32"), rows),
        "short rows": (xp.array(rows, "int16"), rows),
    }[kind]


def call(arr, cos, sin, implementation, **options):
    """Call the front door."""
    return kernels.varlen_rope(arr, cos, sin, implementation=implementation, **options)


def check(xp, arr, cos, sin, dtype, implementation, start=(None, None), interleaved=False):
    """Compare with the oracle."""
    options = {"interleaved": interleaved, "start": start[0]}
    out = values_of(xp, lambda a: call(a, cos, sin, implementation, **options), arr)
    assert xp.dtype_of(out) == dtype
    want = oracle.rope(
        wide(xp, arr), host_offsets(xp, arr), wide(xp, cos), wide(xp, sin), interleaved=interleaved, start=start[1]
    )
    assert_close(wide(xp, out), want, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table_dtype", ["float32", "same", "float16"])
def test_oracle(xp, floating, implementation, interleaved, table_dtype):
    arr = batch(xp, LENGTHS, (2, 6), floating)
    cos, sin = tables(xp, dtype=floating if table_dtype == "same" else table_dtype)
    check(xp, arr, cos, sin, floating, implementation, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["none", "zero", "five", "rows", "short rows"])
def test_starts(xp, implementation, interleaved, kind):
    arr = batch(xp, LENGTHS, (2, 6))
    check(xp, arr, *tables(xp), "float32", implementation, starts(xp, kind), interleaved)


@pytest.mark.parametrize("features", [(6,), (2, 1, 6), (1, 2)])
def test_features(xp, implementation, features):
    arr = batch(xp, LENGTHS, features)
    check(xp, arr, *tables(xp, features[-1] // 2), "float32", implementation)


@pytest.mark.parametrize("edge", cases.EDGES, ids=str)
def test_edges(xp, implementation, edge):
    check(xp, batch(xp, cases.EDGES[edge], (2, 6)), *tables(xp), "float32", implementation)


def test_a_table_of_just_the_right_length(xp, implementation):
    arr = batch(xp, LENGTHS, (2, 6))
    check(xp, arr, *tables(xp, positions=5), "float32", implementation)
    check(xp, arr, *tables(xp, positions=8), "float32", implementation, (3, 3))
    # An empty sequence reads no position, however far it would start.
    rows = [100, 0, 0, 0, 100, 0, 100]
    check(xp, arr, *tables(xp, positions=5), "float32", implementation, (xp.array(rows, "int32"), rows))


def test_position_zero_turns_nothing(xp, implementation):
    arr = batch(xp, (1, 1, 1), (2, 6))
    for interleaved in (False, True):
        out = call(arr, *tables(xp), implementation, interleaved=interleaved)
        np.testing.assert_array_equal(xp.to_np(out.values), xp.to_np(arr.values))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(grad_xp, floating, implementation, interleaved):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (2, 6), floating)
    cos, sin = tables(xp)
    weights = xp.array(normal((USED, 2, 6), 10), floating)
    start, rows = starts(xp, "rows")

    def loss(values):
        out = call(arr.with_values(values), cos, sin, implementation, interleaved=interleaved, start=start)
        return (out.values * weights).sum()

    (got,) = xp.grad(loss, arr.values)
    # Turning back: the transpose of a rotation is the rotation by the opposite angle.
    want = oracle.rope(
        wide(xp, weights), host_offsets(xp, arr), wide(xp, cos), -wide(xp, sin), interleaved=interleaved, start=rows
    )
    assert_close(got, want, floating, scale=4.0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf in the row changed
@pytest.mark.parametrize("bad", [7.0, np.nan, np.inf])
def test_no_sequence_sees_another(xp, implementation, bad):
    arr = batch(xp, LENGTHS, (2, 6))
    before = xp.to_np(call(arr, *tables(xp), implementation).values)
    values = xp.to_np(arr.values)
    values[4:9] = bad
    after = xp.to_np(call(arr.with_values(xp.array(values)), *tables(xp), implementation).values)
    others = [*range(4), *range(9, USED)]
    assert_same_bits(after[others], before[others])


def test_rows_in_another_order_and_alone(xp, implementation):
    arr = batch(xp, LENGTHS, (2, 6))
    before = call(arr, *tables(xp), implementation)
    order = [3, 6, 1, 5, 0, 2, 4]
    assert_same_bits(xp.to_np(call(arr[order], *tables(xp), implementation).values), xp.to_np(before[order].values))
    for row in range(len(LENGTHS)):
        alone = call(arr[row : row + 1], *tables(xp), implementation)
        assert_same_bits(xp.to_np(alone.values), xp.to_np(before[row]))


@pytest.mark.parametrize("spare", [3.0, np.nan])
@pytest.mark.parametrize("kind", ["none", "five"])
def test_spare_values_are_left_out(xp, implementation, spare, kind):
    arr = batch(xp, LENGTHS, (2, 6))
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    start = starts(xp, kind)[0]
    out = call(full, *tables(xp), implementation, start=start)
    assert out.offsets is full.offsets
    want = call(arr, *tables(xp), implementation, start=start)
    assert_same_bits(xp.to_np(out.values)[:USED], xp.to_np(want.values))
    assert_same_bits(np.abs(xp.to_np(out.values)[USED:]), np.zeros((4, 2, 6), np.float32))


def test_spare_values_with_a_start_for_each_row(xp, implementation):
    arr = batch(xp, LENGTHS, (2, 6))
    full = with_spare(xp, arr, *cases.CAPACITY)
    rows = [4, 0, 7, 3, 1, 9, 2]
    out = call(full, *tables(xp), implementation, start=xp.array([*rows, 0, 0], "int32"))
    want = call(arr, *tables(xp), implementation, start=xp.array(rows, "int32"))
    assert_same_bits(xp.to_np(out.values)[:USED], xp.to_np(want.values))
    assert_same_bits(np.abs(xp.to_np(out.values)[USED:]), np.zeros((4, 2, 6), np.float32))


@pytest.mark.parametrize("spare", [3.0, np.nan])
def test_spare_values_get_no_gradient(grad_xp, implementation, spare):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (2, 6))
    full = with_spare(xp, arr, *cases.CAPACITY, spare)
    weights = normal((USED + 4, 2, 6), 10)

    def grad(arr, weights):
        def loss(values):
            return (call(arr.with_values(values), *tables(xp), implementation).values * xp.array(weights)).sum()

        return xp.jit_grad(loss, arr.values)[0]

    got = grad(full, weights)
    assert_same_bits(got[:USED], grad(arr, weights[:USED]))
    assert_same_bits(np.abs(got[USED:]), np.zeros((4, 2, 6), np.float32))


def test_gradients_of_the_tables(grad_xp, implementation):
    xp = grad_xp
    arr = batch(xp, LENGTHS, (2, 6))
    weights = normal((USED, 2, 6), 10)

    def loss(cos, sin):
        return (call(arr, cos, sin, implementation).values * xp.array(weights)).sum()

    got = xp.grad(loss, *tables(xp))
    want = oracle.gradient(
        lambda c, s: oracle.rope(wide(xp, arr), host_offsets(xp, arr), c, s),
        weights,
        *(wide(xp, t) for t in tables(xp)),
    )
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, "float32", scale=4.0)
