"""Attention by BLAS, some queries of a row at a time against the keys that they see; short rows of one length together.

Memory beside the result is that of one block of scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray, HostInts
from .._rows import Span, pairs_alike, sides, spans, visible
from ._common import aligned, wide

_QUERIES = 128  # at a time
_SCORES = 1 << 17  # elements of a block of scores: what stays in the second-level cache
_INF = float("inf")


def _gathered(x: HostArray, starts: HostInts, n: int, scale: float = 1.0) -> HostArray:
    """The tokens (n, heads, D) of rows of x as (heads, G, n, D), aligned, in the wide dtype, times `scale`."""
    _, heads, features = x.shape
    out = aligned((heads, len(starts), n, features), wide(x))
    for i, start in enumerate(starts.tolist()):
        out[:, i] = x[start : start + n].transpose(1, 0, 2)
    if scale != 1.0:
        out *= out.dtype.type(scale)
    return out


def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    scale: float,
    window_size: tuple[int | None, int | None],
    softcap: float | None,
    sinks: HostArray | None,
    return_lse: bool,
    deterministic: bool,  # noqa: ARG001, it always is
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, block by block."""
    op = "varlen_attention"
    limits = sides(causal, window_size)
    (total, heads, _), (_, kv_heads, v_dim) = q.values.shape, v.values.shape
    q_offsets, k_offsets = q._host_offsets(op), k._host_offsets(op)
    dtype = wide(q.values)
    o, lse = np.zeros((total, heads, v_dim), q.values.dtype), np.zeros((total, heads), np.float32)
    no_key = -_INF if sinks is None else sinks.astype(np.float32)
    lse[: int(q_offsets[-1])] = no_key
    sink = None if sinks is None else sinks.astype(dtype)
    with np.errstate(invalid="ignore"):  # of inf - inf, which is NaN as it should
        for numbers, n, m in pairs_alike(q_offsets, k_offsets, heads, _SCORES):
            if m == 0:
                continue
            starts = q_offsets[numbers].astype(np.int64)
            qr = _gathered(q.values, starts, n, scale)
            kr, vr = (_gathered(x.values, k_offsets[numbers], m) for x in (k, v))
            qr = qr.reshape(kv_heads, heads // kv_heads, len(numbers), n, -1)
            kr = kr.swapaxes(-1, -2)
            for span in spans(n, m, *limits, _QUERIES):
                seen = visible(span, n, m, *limits)
                for heads_at_once in _head_blocks(kv_heads, heads // kv_heads, span):
                    y, z = _block(qr, kr, vr, heads_at_once, span, seen, softcap, sink)
                    h = slice(heads_at_once.start * y.shape[1], heads_at_once.stop * y.shape[1])
                    y, z = y.reshape(-1, *y.shape[2:]), z.reshape(-1, *z.shape[2:])  # (heads, G, queries, ...)
                    for i, start in enumerate(starts.tolist()):
                        place = slice(start + span.first, start + span.last)
                        o[place, h] = y[:, i].swapaxes(0, 1)
                        lse[place, h] = z[:, i].swapaxes(0, 1)
    out = q.with_values(o)
    return (out, q.with_values(lse)) if return_lse else out


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
    heads: slice,
    span: Span,
    seen: HostArray | None,
    softcap: float | None,
    sink: HostArray | None,
) -> tuple[HostArray, HostArray]:
    """o (K', G', G, queries, D_v) and lse (K', G', G, queries) of some key heads K' with G' heads each."""
    some = q[heads, :, :, span.first : span.last]  # (K', G', G, queries, D)
    keys = slice(span.low, span.high)
    s = np.matmul(some, k[heads, None, ..., keys])  # (K', G', G, queries, keys)
    if softcap is not None:
        s /= s.dtype.type(softcap)
        np.tanh(s, out=s)
        s *= s.dtype.type(softcap)
    if seen is not None:
        first = int(seen.all(axis=0).argmin())  # the keys before it are seen by all, as most are
        np.copyto(s[..., first:], s.dtype.type(-_INF), where=~seen[:, first:])
    top = np.maximum.reduce(s, axis=-1, keepdims=True)
    s -= top
    np.exp(s, out=s)
    total = np.add.reduce(s, axis=-1, keepdims=True)
    o = np.matmul(s, v[heads, None, :, keys])
    lse = np.log(total) + top
    if sink is not None:
        both = np.logaddexp(lse, sink.reshape(q.shape[0], q.shape[1], 1, 1, 1)[heads])
        o *= np.exp(lse - both) / total
        return o, both[..., 0]
    o /= total
    return o, lse[..., 0]
