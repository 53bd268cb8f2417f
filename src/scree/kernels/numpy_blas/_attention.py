"""Attention by BLAS, some queries of a row at a time against the keys that they see; short rows of one length together.

Memory beside the result is that of one block of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray
from .._options import AttentionOptions
from .._rows import Span, pairs_alike, spans, visible
from ._common import Scratch, wide

_QUERIES = 64  # at a time: of a causal row, half as many keys are computed and hidden
_SCORES = 1 << 16  # elements of a block of scores: what stays in the second-level cache
_INF = float("inf")


def _gathered(x: HostArray, starts: list[int], n: int, memory: Scratch, scale: float = 1.0) -> HostArray:
    """The tokens (n, heads, D) of rows of x as (heads, G, n, D), in the wide dtype, times `scale`."""
    _, heads, features = x.shape
    out = memory.take((heads, len(starts), n, features))
    for i, start in enumerate(starts):
        out[:, i] = x[start : start + n].transpose(1, 0, 2)
    if scale != 1.0:
        out *= out.dtype.type(scale)
    return out


def attend(
    q: Array, k: Array, v: Array, sinks: HostArray | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, block by block."""
    op = "varlen_attention"
    limits, scale, softcap, return_lse = options.sides, options.scale, options.softcap, options.return_lse
    (total, heads, _), (_, kv_heads, v_dim) = q.values.shape, v.values.shape
    q_offsets, k_offsets = q._host_offsets(op), k._host_offsets(op)
    dtype = wide(q.values)
    o = np.zeros((total, heads, v_dim), q.values.dtype)
    lse = np.zeros((total if return_lse else 0, heads), np.float32)
    lse[: int(q_offsets[-1])] = -_INF if sinks is None else sinks.astype(np.float32)  # where no key is seen
    sink = None if sinks is None else sinks.astype(dtype).reshape(kv_heads, -1, 1, 1, 1)
    of_q, of_k, of_v, scores = (Scratch(dtype) for _ in range(4))
    triangle = _triangle(dtype)
    with np.errstate(invalid="ignore"):  # of inf - inf, which is NaN as it should
        for numbers, n, m in pairs_alike(q_offsets, k_offsets, heads, _SCORES):
            if m == 0:
                continue
            starts, k_starts = q_offsets[numbers].tolist(), k_offsets[numbers].tolist()
            qr = _gathered(q.values, starts, n, of_q, scale)
            qr = qr.reshape(kv_heads, heads // kv_heads, len(numbers), n, -1)
            kr = _gathered(k.values, k_starts, m, of_k).swapaxes(-1, -2)
            vr = _gathered(v.values, k_starts, m, of_v)
            for span in spans(n, m, *limits, _QUERIES):
                bounds = _bounds(span, n, m, *limits, triangle)
                for some in _head_blocks(kv_heads, heads // kv_heads, span):
                    given = qr[some, :, :, span.first : span.last], kr[some], vr[some]
                    y, z = _block(
                        *given, span, bounds, softcap, None if sink is None else sink[some], scores, return_lse
                    )
                    h = slice(some.start * y.shape[1], some.stop * y.shape[1])
                    y = y.reshape(-1, *y.shape[2:])  # (heads, G, queries, D_v)
                    for i, start in enumerate(starts):
                        place = slice(start + span.first, start + span.last)
                        o[place, h] = y[:, i].swapaxes(0, 1)
                        if z is not None:
                            lse[place, h] = z.reshape(y.shape[:3])[:, i].T
    out = q.with_values(o)
    return (out, q.with_values(lse)) if return_lse else out


def _bounds(span: Span, n: int, m: int, left: int | None, right: int | None, triangle: HostArray) -> HostArray | None:
    """(queries, last keys): the most that a score may be, -inf where the query does not see the key, and else inf.

    All queries of the span see the keys before the last ones. ``triangle`` is that of `_triangle`.
    """
    if left is None and right is not None:
        first = span.first + m - n + right + 1  # what the first query sees no more, and the others one by one
        if span.low <= first:
            return triangle[: span.last - span.first, : span.high - first] if first < span.high else None
    seen = visible(span, n, m, left, right)
    return None if seen is None else np.where(seen, triangle.dtype.type(_INF), triangle.dtype.type(-_INF))


def _triangle(dtype: np.dtype[Any]) -> HostArray:
    """-inf on and above the diagonal, and inf below."""
    return np.where(np.tri(_QUERIES, k=-1, dtype=bool), dtype.type(_INF), dtype.type(-_INF))


def _head_blocks(kv_heads: int, group: int, span: Span) -> Iterator[slice]:
    """Cut the key heads so that the scores of a block stay in the cache."""
    size = group * (span.last - span.first) * (span.high - span.low)
    step = max(1, _SCORES // size)
    for h in range(0, kv_heads, step):
        yield slice(h, min(h + step, kv_heads))


def _block(
    q: HostArray,
    k: HostArray,
    v: HostArray,
    span: Span,
    bounds: HostArray | None,
    softcap: float | None,
    sink: HostArray | None,
    scores: Scratch,
    with_lse: bool,
) -> tuple[HostArray, HostArray | None]:
    """o (K', G', G, queries, D_v) and lse (K', G', G, queries, 1) of some key heads K' with G' heads each.

    q has the queries of the span, (K', G', G, queries, D), and k (K', G, D, m) and v (K', G, m, D_v) the whole rows.
    """
    keys = slice(span.low, span.high)
    s = scores.take((*q.shape[:-1], span.high - span.low))  # (K', G', G, queries, keys)
    np.matmul(q, k[:, None, ..., keys], out=s)
    if softcap is not None:
        s /= s.dtype.type(softcap)
        np.tanh(s, out=s)
        s *= s.dtype.type(softcap)
    if bounds is not None:
        last = s[..., s.shape[-1] - bounds.shape[1] :]
        np.fmin(last, bounds, out=last)  # in one pass; a NaN that is hidden is gone, and one that is seen leaves inf
    top = np.maximum.reduce(s, axis=-1, keepdims=True)
    s -= top
    np.exp(s, out=s)
    total = np.add.reduce(s, axis=-1, keepdims=True)
    o = np.matmul(s, v[:, None, :, keys])
    if not with_lse and sink is None:
        o /= total
        return o, None
    lse = np.log(total) + top
    if sink is None:
        o /= total
        return o, lse
    both = np.logaddexp(lse, sink)
    o *= np.exp(lse - both) / total
    return o, both
