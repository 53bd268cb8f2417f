"""varlen_attention: every implementation against the oracle, and the promises on isolation, edges and bits."""

import numpy as np
import pytest

import cases
import oracle
import scree
from cases import ATTENTION, LENGTHS, Attention, batch, host_offsets, normal, wide
from expect import assert_close, assert_same_bits
from scree import kernels

OPS = ("varlen_attention",)
BY_NAME = {case.name: case for case in ATTENTION}
HARD = ("grouped", "everything")


def attend(q, k, v, implementation, **options):
    """Call the front door."""
    return kernels.varlen_attention(q, k, v, implementation=implementation, **options)


def expected(xp, case, q, k, v, sinks, **more):
    """Ask the oracle, given what the framework really holds."""
    return oracle.attention(
        wide(xp, q), wide(xp, k), wide(xp, v), host_offsets(xp, q), host_offsets(xp, k),
        sinks=None if sinks is None else wide(xp, sinks), **case.options, **more,
    )  # fmt: skip


def check(xp, case, dtype, implementation):
    """Compare outputs and LSE."""
    q, k, v, sinks = case.make(xp, dtype)

    def both(qv, kv, vv, *sink):
        options = {**case.options, "sinks": sink[0]} if sink else case.options
        arrays = q.with_values(qv), k.with_values(kv), v.with_values(vv)
        out, lse = attend(*arrays, implementation, return_lse=True, **options)
        for got in (out, lse):
            assert isinstance(got, scree.Array)
            assert got.offsets is q.offsets
        return out.values, lse.values

    out, lse = xp.run(both, q.values, k.values, v.values, *([] if sinks is None else [sinks]))
    want, want_lse = expected(xp, case, q, k, v, sinks)
    assert xp.dtype_of(out) == dtype
    assert tuple(out.shape) == (sum(case.lengths), case.heads, case.v_dim)
    assert_close(wide(xp, out), want, dtype, rounded_factors=implementation != "reference")
    assert xp.dtype_of(lse) == "float32"
    assert_close(wide(xp, lse), want_lse, "float32")


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_oracle(xp, implementation, case):
    check(xp, case, "float32", implementation)


@pytest.mark.parametrize("name", HARD)
def test_oracle_in_every_dtype(xp, floating, implementation, name):
    check(xp, BY_NAME[name], floating, implementation)


@pytest.mark.parametrize("name", ["grouped", "sinks cross causal"])
def test_lse_changes_nothing(xp, implementation, name):
    case = BY_NAME[name]
    q, k, v, sinks = case.make(xp)
    out = attend(q, k, v, implementation, **case.arguments(sinks))
    assert isinstance(out, scree.Array)
    assert out.offsets is q.offsets
    with_lse, _ = attend(q, k, v, implementation, return_lse=True, **case.arguments(sinks))
    assert_same_bits(xp.to_np(out.values), xp.to_np(with_lse.values))


def test_permission_to_vary_changes_no_forward(xp, implementation):
    case = BY_NAME["grouped"]
    q, k, v, _ = case.make(xp)
    out, free = (attend(q, k, v, implementation, deterministic=fixed, **case.options) for fixed in (True, False))
    assert_same_bits(xp.to_np(out.values), xp.to_np(free.values))


def check_gradients(xp, case, dtype, implementation):
    """Compare the gradients of outputs and LSE together."""
    q, k, v, sinks = case.make(xp, dtype)
    grad_out = xp.array(normal((sum(case.lengths), case.heads, case.v_dim), 10), dtype)
    grad_lse = normal((sum(case.lengths), case.heads), 11)
    _, lse = expected(xp, case, q, k, v, sinks)
    grad_lse[~np.isfinite(lse)] = 0.0
    weights = xp.array(grad_lse, "float32")
    seen = xp.array(np.isfinite(lse))

    def loss(qv, kv, vv, *sink):
        options = {**case.options, "sinks": sink[0]} if sink else case.options
        out, lse = attend(
            q.with_values(qv), k.with_values(kv), v.with_values(vv), implementation, return_lse=True, **options
        )
        finite = where(xp, seen, lse.values, weights)
        return (out.values * grad_out).sum() + (finite * weights).sum()

    given = [q.values, k.values, v.values] + ([] if sinks is None else [sinks])
    grads = xp.grad(loss, *given)
    want = expected(xp, case, q, k, v, sinks, grad_out=wide(xp, grad_out), grad_lse=wide(xp, weights))
    for got, expect in zip(grads, want, strict=False):
        # dq, dk, dv are sums of products of gradients: a few more roundings than the outputs.
        assert_close(got, expect, dtype, scale=4.0, rounded_factors=implementation != "reference")


def where(xp, condition, a, b):
    """Choose, in the framework's own words."""
    module = __import__("jax.numpy", fromlist=["where"]) if xp.name == "jax" else xp.module
    return module.where(condition, a, b)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_gradients(grad_xp, implementation, case):
    check_gradients(grad_xp, case, "float32", implementation)


def test_gradients_in_every_dtype(grad_xp, floating, implementation):
    check_gradients(grad_xp, BY_NAME["everything"], floating, implementation)


def test_gradients_without_lse(grad_xp, implementation):
    xp, case = grad_xp, BY_NAME["cross causal"]
    q, k, v, _ = case.make(xp)
    grad_out = normal((sum(case.lengths), 2, 8), 10)

    def loss(*given):
        arrays = [a.with_values(x) for a, x in zip((q, k, v), given, strict=True)]
        return (attend(*arrays, implementation, **case.options).values * xp.array(grad_out)).sum()

    grads = xp.grad(loss, q.values, k.values, v.values)
    for got, want in zip(grads, expected(xp, case, q, k, v, None, grad_out=grad_out), strict=False):
        assert np.isfinite(got).all()
        assert_close(got, want, "float32", scale=4.0)


# Edges


@pytest.mark.parametrize("edge", cases.EDGES, ids=str)
def test_edges(xp, implementation, edge):
    lengths = cases.EDGES[edge]
    case = Attention(edge, lengths=lengths, key_lengths=lengths, options={"causal": True})
    check(xp, case, "float32", implementation)


@pytest.mark.parametrize("lengths", [(0, 0), (3, 0, 1)])
def test_no_keys_at_all(xp, implementation, lengths):
    none = tuple(0 for _ in lengths)
    check(xp, Attention("no keys", lengths=lengths, key_lengths=none), "float32", implementation)
    check(xp, Attention("no queries", lengths=none, key_lengths=lengths), "float32", implementation)
    check(xp, Attention("no keys, sinks", lengths=lengths, key_lengths=none, sinks=True), "float32", implementation)


def test_a_query_that_sees_no_key_gives_zero(xp, implementation):
    # Five queries, one key, causal: the first four are before it.
    q = batch(xp, (5,), (2, 4), seed=1)
    k = batch(xp, (1,), (2, 4), seed=2)
    out, lse = attend(q, k, k, implementation, causal=True, return_lse=True)
    np.testing.assert_array_equal(xp.to_np(out.values)[:4], np.zeros((4, 2, 4)))
    assert (xp.to_np(lse.values)[:4] == -np.inf).all()
    assert_close(xp.to_np(out.values)[4], xp.to_np(k.values)[0], "float32")
    sinks = xp.array([0.25, -3.0])
    out, lse = attend(q, k, k, implementation, causal=True, sinks=sinks, return_lse=True)
    np.testing.assert_array_equal(xp.to_np(out.values)[:4], np.zeros((4, 2, 4)))
    assert_close(xp.to_np(lse.values)[:4], np.tile([0.25, -3.0], (4, 1)), "float32")


def test_gradients_where_nothing_is_seen_are_zero(grad_xp, implementation):
    xp = grad_xp
    q, k = batch(xp, (3, 0, 5), (2, 4), seed=1), batch(xp, (0, 3, 0), (2, 4), seed=2)

    def loss(*given):
        arrays = [a.with_values(x) for a, x in zip((q, k, k), given, strict=True)]
        return attend(*arrays, implementation).values.sum()

    for grad in xp.grad(loss, q.values, k.values, k.values):
        np.testing.assert_array_equal(grad, np.zeros_like(grad))


def test_lower_right_causal_by_hand(xp, implementation):
    # Two queries, five keys: the first sees four, the second all five.
    q = scree.Array(xp.array(np.zeros((2, 1, 4))), xp.array([0, 2], "int32"))
    k = scree.Array(xp.array(np.zeros((5, 1, 4))), xp.array([0, 5], "int32"))
    v = k.with_values(xp.array(np.arange(1.0, 21.0).reshape(5, 1, 4)))
    out, lse = attend(q, k, v, implementation, causal=True, return_lse=True)
    want = np.stack([xp.to_np(v.values)[:4].mean(0), xp.to_np(v.values).mean(0)])
    assert_close(wide(xp, out), want, "float32")
    assert_close(wide(xp, lse), np.log([[4], [5]]), "float32")
    # The window is inclusive and stands around the same place: key 3 for the first query, 4 for the second.
    out, lse = attend(q, k, v, implementation, window_size=(1, 0), return_lse=True)
    want = np.stack([xp.to_np(v.values)[2:4].mean(0), xp.to_np(v.values)[3:5].mean(0)])
    assert_close(wide(xp, out), want, "float32")
    assert_close(wide(xp, lse), np.log([[2], [2]]), "float32")


def test_scores_beyond_half_precision(xp, floating, implementation):
    # Scores of 90,000 and more: float16 ends at 65,504, and exp overflows unless the largest is taken away.
    eye = np.eye(3, 8)[:, None, :] * 600.0
    q = scree.Array(xp.array(eye, floating), xp.array([0, 3], "int32"))
    v = q.with_values(xp.array(normal((3, 1, 8), 0), floating))
    out = xp.run(
        lambda x, y: attend(q.with_values(x), q.with_values(x), v.with_values(y), implementation).values,
        q.values,
        v.values,
    )
    assert_close(wide(xp, out), wide(xp, v), floating)


def test_sinks_beyond_the_range_of_exp(xp, implementation):
    # exp(200) is no float32: the sink has to count when the largest logit is taken away.
    q, k, v, _ = BY_NAME["plain"].make(xp)
    for logit in (200.0, -200.0):
        sinks = xp.array([logit, 0.5])
        out, lse = attend(q, k, v, implementation, sinks=sinks, return_lse=True)
        want, want_lse = oracle.attention(
            wide(xp, q), wide(xp, k), wide(xp, v), host_offsets(xp, q), host_offsets(xp, k), sinks=wide(xp, sinks)
        )
        assert_close(wide(xp, out), want, "float32")
        assert_close(wide(xp, lse), want_lse, "float32")


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("limits", [{}, {"causal": True}, {"window_size": (2, 0)}], ids=["all", "causal", "window"])
def test_any_number_is_a_scale(xp, implementation, limits, scale):
    case = Attention("scale", options={"scale": scale, **limits})
    check(xp, case, "float32", implementation)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_gradients_with_any_scale(grad_xp, implementation, scale):
    check_gradients(grad_xp, Attention("scale", options={"causal": True, "scale": scale}), "float32", implementation)


def test_the_same_offsets_by_value(xp, implementation):
    q, k, v, _ = BY_NAME["plain"].make(xp)
    other = scree.Array(v.values, xp.array(host_offsets(xp, v), "int16"))
    assert_same_bits(
        xp.to_np(attend(q, k, other, implementation).values), xp.to_np(attend(q, k, v, implementation).values)
    )


@pytest.mark.parametrize("dim", [1, 3, 80])
def test_odd_head_dims(xp, implementation, dim):
    check(xp, Attention("dims", lengths=(3,), key_lengths=(3,), dim=dim, v_dim=dim), "float32", implementation)


def test_strided_views_of_a_joint_tensor(xp, implementation):
    if not xp.has_views:
        return
    qkv = xp.array(normal((12, 3, 2, 8), 0))
    offsets = xp.array(oracle.offsets_of(LENGTHS), "int32")
    views = [scree.Array(qkv[:, i], offsets) for i in range(3)]
    whole = [scree.Array(xp.array(xp.to_np(a.values)), offsets) for a in views]
    assert xp.shares_memory(views[1].values, qkv)
    out = attend(*views, implementation, causal=True)
    assert_close(wide(xp, out), wide(xp, attend(*whole, implementation, causal=True)), "float32")


# The oracle itself


@pytest.mark.parametrize("name", ["grouped", "everything", "sinks cross causal"])
def test_the_oracle_differentiates_rightly(name):
    case = BY_NAME[name]
    q = normal((12, case.heads, 3), 0)
    k, v = normal((12, case.kv_heads, 3), 1), normal((12, case.kv_heads, 2), 2)
    sinks = normal((case.heads,), 3)
    offsets, keys = oracle.offsets_of(case.lengths), oracle.offsets_of(case.key_lengths)
    grad_out = normal((12, case.heads, 2), 4)

    def out(q, sinks):
        return oracle.attention(q, k, v, offsets, keys, sinks=sinks, **case.options)[0]

    def of_keys(k, v):
        return oracle.attention(q, k, v, offsets, keys, sinks=sinks, **case.options)[0]

    dq, dk, dv, dsinks = oracle.attention(q, k, v, offsets, keys, sinks=sinks, grad_out=grad_out, **case.options)
    for got, want in zip(
        (dq, dsinks, dk, dv),
        (*oracle.gradient(out, grad_out, q, sinks), *oracle.gradient(of_keys, grad_out, k, v)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-8)
