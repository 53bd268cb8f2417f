"""Attention within each sequence, by dense matrices of scores."""

from __future__ import annotations

from ..._array import Array
from ..._backends import Backend, Dense
from .. import _contract
from .._options import AttentionOptions
from ._common import joined, rows_of

_INF = float("inf")


def attend(q: Array, k: Array, v: Array, sinks: Dense | None, options: AttentionOptions) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, one sequence after the other."""
    xp = q._xp
    op = "varlen_attention"
    sink = None if sinks is None else xp.upcast(sinks)
    outputs: list[Dense] = []
    lses: list[Dense] = []
    for rows in zip(rows_of(op, q), rows_of(op, k), rows_of(op, v), strict=True):
        o, lse = _attend(xp, *rows, sink, options)
        outputs.append(o)
        lses.append(lse)
    heads, v_dim = q.values.shape[1], v.values.shape[2]
    result = q.with_values(xp.cast_like(joined(q, outputs, (heads, v_dim)), q.values))
    if not options.return_lse:
        return result
    return result, q.with_values(xp.astype(joined(q, lses, (heads,)), "float32"))


varlen_attention = _contract.checked(attend)


def _attend(
    xp: Backend, q: Dense, k: Dense, v: Dense, sink: Dense | None, options: AttentionOptions
) -> tuple[Dense, Dense]:
    """One sequence: q (n, H, D), k (m, K, D), v (m, K, D_v) to o (n, H, D_v) and lse (n, H)."""
    (n, heads, head_dim), (m, kv_heads, v_dim) = q.shape, v.shape
    group = heads // kv_heads
    q = xp.permute_dims(q.reshape(n, kv_heads, group, head_dim), (1, 2, 0, 3))  # (K, G, n, D)
    k = xp.permute_dims(k, (1, 2, 0)).reshape(kv_heads, 1, head_dim, m)  # (K, 1, D, m)
    v = xp.permute_dims(v, (1, 0, 2)).reshape(kv_heads, 1, m, v_dim)  # (K, 1, m, D_v)

    s = xp.matmul(q, k) * options.scale  # (K, G, n, m)
    if options.softcap is not None:
        s = options.softcap * xp.tanh(s / options.softcap)
    visible = _visible(xp, n, m, options, s)
    if visible is not None:
        s = xp.where(visible, s, xp.full((), -_INF, s))

    top = xp.max(s, axis=-1, keepdims=True) if m else xp.full((kv_heads, group, n, 1), -_INF, s)
    sinks = None if sink is None else sink.reshape(kv_heads, group, 1, 1) + xp.full((1, 1, n, 1), 0, sink)
    if sinks is not None:
        top = xp.where(top > sinks, top, sinks)
    top = xp.where(top == -_INF, xp.full((), 0, s), top)  # no key is visible: exp(-inf - 0) is the 0 we want
    p = xp.exp(s - top)
    l = xp.sum(p, axis=-1, keepdims=True)
    if sinks is not None:
        l = l + xp.exp(sinks - top)
    none = l == 0
    safe = xp.where(none, xp.full((), 1, s), l)
    o = xp.matmul(p, v) / safe  # (K, G, n, D_v)
    lse = xp.where(none, xp.full((), -_INF, s), xp.log(safe) + top)
    return (
        xp.permute_dims(o, (2, 0, 1, 3)).reshape(n, heads, v_dim),
        xp.permute_dims(lse, (2, 0, 1, 3)).reshape(n, heads),
    )


def _visible(xp: Backend, n: int, m: int, options: AttentionOptions, like: Dense) -> Dense | None:
    """(n, m), bool: which keys each query sees; None where it sees all."""
    left, right = options.sides
    if left is None and right is None:
        return None
    p = xp.arange(n, like)[:, None] + (m - n)
    j = xp.arange(m, like)[None, :]
    span = n + m  # no window reaches further
    low = p - (span if left is None else min(left, span))
    high = p + (span if right is None else min(right, span))
    return (j >= low) & (j <= high)
