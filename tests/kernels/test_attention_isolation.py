"""varlen_attention: no sequence sees another, forward or backward, and spare values are left out."""

import numpy as np
import pytest

import cases
import scree
from cases import ATTENTION, LENGTHS, batch, host_offsets, normal, with_spare
from expect import assert_close, assert_same_bits
from scree import kernels

OPS = ("varlen_attention",)
BY_NAME = {case.name: case for case in ATTENTION}
HARD = ("grouped", "everything")


def attend(q, k, v, implementation, **options):
    """Call the front door."""
    return kernels.varlen_attention(q, k, v, implementation=implementation, **options)


# Isolation, order, bits


def outputs(xp, implementation, case, q, k, v, sinks):
    """Return output and LSE as NumPy, cut into rows."""
    out, lse = attend(q, k, v, implementation, return_lse=True, **case.arguments(sinks))
    cut = host_offsets(xp, q)[1:-1]
    return list(zip(np.split(xp.to_np(out.values), cut), np.split(xp.to_np(lse.values), cut), strict=True))


def assert_rows_same(a, b):
    """Require the same bits in outputs and LSE."""
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of inf - inf in the row changed
@pytest.mark.parametrize("name", ["cross causal", "grouped"])
@pytest.mark.parametrize("bad", [7.0, np.nan, np.inf])
def test_no_sequence_sees_another(xp, implementation, name, bad):
    case = BY_NAME[name]
    arrays = case.make(xp)
    before = outputs(xp, implementation, case, *arrays)
    for row in (1, 3):
        changed = []
        for arr in arrays[:3]:
            values, offsets = xp.to_np(arr.values), host_offsets(xp, arr)
            values[offsets[row] : offsets[row + 1]] = bad
            changed.append(arr.with_values(xp.array(values)))
        after = outputs(xp, implementation, case, *changed, arrays[3])
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            if i != row:
                assert_rows_same(x, y)
        assert not (before[row][0].tobytes() == after[row][0].tobytes())


def test_no_gradient_sees_another_sequence(grad_xp, implementation):
    xp, case = grad_xp, BY_NAME["causal"]
    q, k, v, _ = case.make(xp)
    weights = xp.array(normal((12, 2, 8), 10))
    offsets = host_offsets(xp, q)

    def grads(*arrays):
        def loss(*given):
            inner = [a.with_values(x) for a, x in zip(arrays, given, strict=True)]
            return (attend(*inner, implementation, **case.options).values * weights).sum()

        return xp.jit_grad(loss, *(a.values for a in arrays))

    before = grads(q, k, v)
    values = [xp.to_np(a.values) for a in (q, k, v)]
    for x in values:
        x[offsets[3] : offsets[4]] = np.nan
    after = grads(*(a.with_values(xp.array(x)) for a, x in zip((q, k, v), values, strict=True)))
    others = [t for t in range(12) if not offsets[3] <= t < offsets[4]]
    for x, y in zip(before, after, strict=True):
        assert_same_bits(x[others], y[others])


def test_rows_in_another_order(xp, implementation):
    case = BY_NAME["grouped"]
    q, k, v, sinks = case.make(xp)
    order = [3, 6, 1, 5, 0, 2, 4]
    before = outputs(xp, implementation, case, q, k, v, sinks)
    after = outputs(xp, implementation, case, q[order], k[order], v[order], sinks)
    for place, row in enumerate(order):
        assert_rows_same(after[place], before[row])


@pytest.mark.parametrize("row", [0, 1, 3])
def test_a_row_alone_is_the_row_in_the_batch(xp, implementation, row):
    for name in ("grouped", "cross causal"):
        case = BY_NAME[name]
        q, k, v, sinks = case.make(xp)
        before = outputs(xp, implementation, case, q, k, v, sinks)
        only = slice(row, row + 1)
        assert_rows_same(outputs(xp, implementation, case, q[only], k[only], v[only], sinks)[0], before[row])


def test_the_gradient_of_a_row_alone(grad_xp, implementation):
    xp, case = grad_xp, BY_NAME["grouped"]
    arrays = case.make(xp)[:3]
    weights = normal((12, 4, 8), 10)

    def grads(given, weights):
        def loss(*values):
            inner = [a.with_values(x) for a, x in zip(given, values, strict=True)]
            return (attend(*inner, implementation, **case.options).values * xp.array(weights)).sum()

        return xp.jit_grad(loss, *(a.values for a in given))

    together = grads(arrays, weights)
    start, stop = host_offsets(xp, arrays[0])[3:5]
    for x, y in zip(grads([a[3:4] for a in arrays], weights[start:stop]), together, strict=True):
        assert_same_bits(x, y[start:stop])


def test_two_runs_give_the_same_bits(xp, implementation):
    case = BY_NAME["grouped"]
    arrays = case.make(xp)
    for x, y in zip(
        outputs(xp, implementation, case, *arrays), outputs(xp, implementation, case, *arrays), strict=True
    ):
        assert_rows_same(x, y)


# Keys and values that are not finite, and the queries of their own sequence that do not see them

HIDE_VALUES = ("numba", "numpy_blas", "torch_native")  # elsewhere a hidden value counts 0 times, and 0 * NaN is NaN


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, of 0 * inf
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (20, 3)}, {"window_size": (None, 2), "softcap": 2.0}],
    ids=["causal", "window", "softcap"],
)
def test_what_is_not_finite_and_hidden(xp, implementation, options, which, bad):
    lengths, row, place = (5, 0, 150, 3), 2, 100
    arrays = [batch(xp, lengths, (2, 8), seed=seed) for seed in range(3)]
    first = host_offsets(xp, arrays[0])[row]
    values = xp.to_np(arrays[1 if which == "key" else 2].values).copy()
    values[first + place, 1, 3] = bad
    changed = list(arrays)
    changed[1 if which == "key" else 2] = arrays[0].with_values(xp.array(values, "float32"))

    def run(given):
        return [xp.to_np(x.values) for x in attend(*given, implementation, return_lse=True, **options)]

    (o, lse), (o_bad, lse_bad) = run(arrays), run(changed)
    left, right = options.get("window_size", (None, 0))
    i = np.arange(len(o)) - first  # of as many keys as queries
    mine = (i >= 0) & (i < lengths[row])
    seen = mine & (place <= i + right) & (place >= i - (len(o) if left is None else left))
    assert not np.array_equal(o_bad[seen], o[seen])
    for x, y in ((o, o_bad), (lse, lse_bad)):
        assert_same_bits(y[~mine], x[~mine])
        assert_close(y[~seen, 0], x[~seen, 0], "float32")
    assert_close(lse_bad[~seen], lse[~seen], "float32")
    hidden, want = o_bad[~seen, 1], o[~seen, 1]
    if which == "value" and implementation not in HIDE_VALUES:
        assert np.isnan(hidden[:, 3]).any()  # or the name belongs above
        hidden, want = np.delete(hidden, 3, 1), np.delete(want, 3, 1)
    assert_close(hidden, want, "float32")


# Capacity


@pytest.mark.parametrize("spare", [0.0, np.nan, np.inf])
def test_spare_values_are_left_out(xp, implementation, spare):
    case = BY_NAME["grouped"]
    plain = case.make(xp)[:3]
    full = [with_spare(xp, a, *cases.CAPACITY, spare) for a in plain]
    want = attend(*plain, implementation, **case.options)
    out, lse = attend(*full, implementation, return_lse=True, **case.options)
    used = sum(LENGTHS)
    assert out.offsets is full[0].offsets
    assert (out.total_length, out.batch_size) == cases.CAPACITY[::-1]
    assert_same_bits(xp.to_np(out.values)[:used], xp.to_np(want.values))
    assert_same_bits(xp.to_np(out.values)[used:], np.zeros((4, 4, 8), np.float32))
    np.testing.assert_array_equal(xp.to_np(lse.values)[used:], np.zeros((4, 4)))


def test_spare_values_get_no_gradient(grad_xp, implementation):
    xp, case = grad_xp, BY_NAME["everything"]
    *plain, sinks = case.make(xp)
    full = [with_spare(xp, a, len(LENGTHS) + 2, a.total_length + 4) for a in plain]
    used = [a.total_length for a in plain]
    weights = normal((used[0] + 4, 4, 5), 10)

    def grads(arrays, weights):
        def loss(*given):
            inner = [a.with_values(x) for a, x in zip(arrays, given[:3], strict=True)]
            out = attend(*inner, implementation, sinks=given[3], **case.options)
            return (out.values * xp.array(weights)).sum()

        return xp.jit_grad(loss, *(a.values for a in arrays), sinks)

    want, got = grads(plain, weights[: used[0]]), grads(full, weights)
    for x, y, n in zip(got, want, used, strict=False):
        assert_same_bits(x[:n], y)
        assert_same_bits(np.abs(x[n:]), np.zeros_like(x[n:]))
    assert_same_bits(got[3], want[3])


def test_capacity_of_queries_alone(xp, implementation):
    case = BY_NAME["causal"]
    q, k, v, _ = case.make(xp)
    more_rows = scree.with_capacity(q, len(LENGTHS), sum(LENGTHS) + 4)
    out = attend(more_rows, k, v, implementation, **case.options)
    assert_same_bits(xp.to_np(out.values)[:12], xp.to_np(attend(q, k, v, implementation, **case.options).values))
    assert_same_bits(xp.to_np(out.values)[12:], np.zeros((4, 2, 8), np.float32))
