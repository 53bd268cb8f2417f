"""Attention by dense products, some queries of a row at a time; short rows of one length together.

`mx.fast.scaled_dot_product_attention` gives no LSE and takes no softcap, and a result must not depend on whether the
LSE is asked for.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray
from ..._backends.mlx import exp, on_cpu
from .._options import AttentionOptions
from .._rows import TOGETHER, Span, pairs_alike, spans, visible
from ._common import in_order, of_host, taken, wide

_QUERIES, _QUERIES_CPU = 256, 64  # at a time: fewer leave out more keys that a mask hides, and are more calls
_INF = float("inf")


def attend(
    q: Array, k: Array, v: Array, sinks: mx.array | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, rows of one length together."""
    op = "varlen_attention"
    limits, scale, softcap = options.sides, options.scale, options.softcap
    heads, kv_heads, v_dim = q.values.shape[1], *v.values.shape[1:]
    q_offsets, k_offsets = q._host_offsets(op), k._host_offsets(op)
    total = q.total_length
    at_once = _QUERIES_CPU if on_cpu() else _QUERIES
    sink = None if sinks is None else wide(sinks).reshape(1, kv_heads, -1, 1, 1)
    # What sees no key, and what is no row's, stays behind: zeros that are a part of the gradient's graph.
    base = wide(q.values)[:, :, :1] * 0 if total else wide(q.values)[:, :, :1]
    base = mx.where(mx.isnan(base), mx.zeros_like(base), base)
    seen = np.zeros(total, bool)
    outs: list[mx.array] = []
    lses: list[mx.array] = []
    places: list[HostArray] = []
    for numbers, n, m in pairs_alike(q_offsets, k_offsets, heads, TOGETHER):
        starts = q_offsets[numbers].astype(np.int64)
        for span in spans(n, m, *limits, _QUERIES if limits == (None, None) else at_once):
            mine = taken(q.values, starts + span.first, span.last - span.first)
            keys = k_offsets[numbers].astype(np.int64) + span.low
            key, value = (wide(taken(x.values, keys, span.high - span.low)) for x in (k, v))
            hidden = visible(span, n, m, *limits)
            y, z = _attend(wide(mine), key, value, scale, softcap, hidden, sink)
            outs.append(y.reshape(-1, heads, v_dim))
            lses.append(z.reshape(-1, heads))
            places.append(_places(starts, span))
            seen[places[-1]] = True
    rest = np.flatnonzero(~seen)
    if len(rest):
        outs.append(mx.zeros((len(rest), heads, v_dim), base.dtype) + taken(base, rest, 1)[:, 0])
        lses.append(_unseen(rest, int(q_offsets[-1]), sinks, heads, base.dtype))
        places.append(rest)
    if not total:
        o, lse = mx.zeros((0, heads, v_dim), base.dtype), mx.zeros((0, heads), base.dtype)
    else:
        o, lse = in_order(outs, places, total), in_order(lses, places, total)
    out = q.with_values(o.astype(q.values.dtype))
    return (out, q.with_values(lse.astype(mx.float32))) if options.return_lse else out


def _places(starts: HostArray, span: Span) -> HostArray:
    return (starts[:, None] + np.arange(span.first, span.last)).reshape(-1)


def _unseen(rest: HostArray, used: int, sinks: mx.array | None, heads: int, dtype: mx.Dtype) -> mx.array:
    """The LSE of queries that see no key: the sink, or -inf; 0 of tokens beyond the last row."""
    value = mx.full((heads,), -_INF, dtype) if sinks is None else wide(sinks).astype(dtype)
    return mx.where(of_host(rest < used)[:, None], value[None], mx.zeros((1, heads), dtype))


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    softcap: float | None,
    seen: HostArray | None,
    sink: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """q (G, n, H, D), k (G, m, K, D), v (G, m, K, D_v) to o (G, n, H, D_v) and lse (G, n, H)."""
    (rows, n, heads, dim), (_, _, kv_heads, v_dim) = q.shape, v.shape
    q = (q * scale).reshape(rows, n, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)  # (G, K, H / K, n, D)
    k = k.transpose(0, 2, 3, 1)[:, :, None]  # (G, K, 1, D, m)
    v = v.transpose(0, 2, 1, 3)[:, :, None]  # (G, K, 1, m, D_v)
    s = mx.matmul(q, k)
    if softcap is not None:
        s = softcap * mx.tanh(s / softcap)
    if seen is not None:
        s = mx.where(of_host(seen), s, mx.array(-_INF, s.dtype))
    top = mx.max(s, axis=-1, keepdims=True)
    if sink is not None:
        top = mx.maximum(top, sink)
    top = mx.stop_gradient(top)
    p = exp(s - top)
    l = mx.sum(p, axis=-1, keepdims=True)
    if sink is not None:
        l = l + exp(sink - top)
    o = mx.matmul(p, v) / l
    lse = mx.log(l) + top
    return (
        o.transpose(0, 3, 1, 2, 4).reshape(rows, n, heads, v_dim),
        lse.transpose(0, 3, 1, 2, 4).reshape(rows, n, heads),
    )
