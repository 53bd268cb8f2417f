"""Attention by dense matrices of scores, some queries of a row at a time.

For what the kernel behind `scaled_dot_product_attention` on the CPU does not do: softcaps, and other devices.

t = tanh(scale * <q[i], k[j]> / c)      s = c * t, or scale * <q[i], k[j]> without c      p = exp(s - lse)
ds = p * (<g[i], v[j]> - <g[i], o[i]> + g_lse[i]) * (1 - t**2) * scale, without (1 - t**2) without c
dq[i] = sum_j ds * k[j]      dk[j] = sum_i ds * q[i]      dv[j] = sum_i p * g[i]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, visible
from ._common import empty, on, wide
from ._hidden import cut_spans, not_finite

_Limits = tuple[int | None, int | None]
_QUERIES = 256  # at a time: memory is this times the keys of a row
_INF = float("inf")


def _rows(q_offsets: HostInts, k_offsets: HostInts) -> list[tuple[int, int, int, int, int]]:
    """The number of every row that is not empty, and its bounds in q and in k."""
    bounds = (x.tolist() for x in (q_offsets, q_offsets[1:], k_offsets, k_offsets[1:]))
    return [(i, a, b, c, d) for i, (a, b, c, d) in enumerate(zip(*bounds, strict=False)) if a < b or c < d]


def _queries(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(n, H, D) as (K, G * n, D), a copy: where a matrix begins is the same for every row."""
    n, heads, features = x.shape
    copy = x.new_empty((kv_heads, heads // kv_heads, n, features), dtype=dtype)
    copy.copy_(x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3))
    return copy.view(kv_heads, -1, features)


def _tokens(x: Tensor, n: int) -> Tensor:
    """The inverse: (K, G * n, D) as (n, H, D)."""
    return x.unflatten(1, (-1, n)).flatten(0, 1).transpose(0, 1)


def _keys(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(m, K, D) as (K, m, D), a copy."""
    return x.transpose(0, 1).to(dtype, copy=True).contiguous()


def _hidden(span: Span, n: int, m: int, limits: _Limits, group: int, like: Tensor) -> Tensor | None:
    """(G * queries, keys): true where a query does not see a key."""
    seen = visible(span, n, m, *limits)
    return None if seen is None else on(like, ~seen).repeat(group, 1)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """t, (K, G * n, m), or without a softcap s."""
    s = torch.bmm(q, k.transpose(1, 2))
    return s.mul_(scale / softcap).tanh_() if softcap else s.mul_(scale)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: HostInts,
    k_offsets: HostInts,
    scale: float,
    limits: _Limits,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H), as `_flash.forward`."""
    dtype, (total, heads, _), (_, kv_heads, v_dim) = wide(q.dtype), q.shape, v.shape
    o, lse = empty((total, heads, v_dim), dtype, q.device), empty((total, heads), dtype, q.device)
    used = int(q_offsets[-1])
    o[:used], lse[:used] = 0, -_INF
    o[used:], lse[used:] = 0, 0
    apart = not_finite(k, v, k_offsets, limits)
    for row, a, b, c, d in _rows(q_offsets, k_offsets):
        n, m = b - a, d - c
        kr, vr = _keys(k[c:d], dtype), _keys(v[c:d], dtype)
        for span in cut_spans(n, m, limits, _QUERIES, apart.get(row, [])):
            some, keys = slice(a + span.first, a + span.last), slice(span.low, span.high)
            s = _scores(_queries(q[some], kv_heads, dtype), kr[:, keys], scale, softcap)
            if softcap:
                s.mul_(softcap)
            hidden = _hidden(span, n, m, limits, heads // kv_heads, q)
            if hidden is not None:
                s.masked_fill_(hidden, -_INF)
            top = s.amax(-1, keepdim=True)
            p = s.sub_(top).exp_()
            total_p = p.sum(-1, keepdim=True)
            o[some] = _tokens(torch.bmm(p, vr[:, keys]).div_(total_p), span.last - span.first)
            lse[some] = _tokens(total_p.log_().add_(top), span.last - span.first)[..., 0]
    return o, lse


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    q_offsets: HostInts,
    k_offsets: HostInts,
    scale: float,
    limits: _Limits,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v."""
    dtype, heads, kv_heads = wide(q.dtype), q.shape[1], k.shape[1]
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    apart = not_finite(k, v, k_offsets, limits)
    for row, a, b, c, d in _rows(q_offsets, k_offsets):
        n, m = b - a, d - c
        kr, vr = _keys(k[c:d], dtype), _keys(v[c:d], dtype)
        dkr, dvr = torch.zeros_like(kr), torch.zeros_like(vr)
        for span in cut_spans(n, m, limits, _QUERIES, apart.get(row, [])):
            some, keys = slice(a + span.first, a + span.last), slice(span.low, span.high)
            qr, gr = (_queries(x[some], kv_heads, dtype) for x in (q, grad_o))
            lr = _queries(lse[some][..., None], kv_heads, dtype)
            pull = (gr * _queries(o[some], kv_heads, dtype)).sum(-1, keepdim=True).neg_()
            if grad_lse is not None:
                pull += _queries(grad_lse[some][..., None], kv_heads, dtype)
            t = _scores(qr, kr[:, keys], scale, softcap)
            p = (softcap * t if softcap else t).sub(lr).exp_()
            hidden = _hidden(span, n, m, limits, heads // kv_heads, q)
            if hidden is not None:
                p.masked_fill_(hidden, 0)
            dvr[:, keys] += torch.bmm(p.transpose(1, 2), gr)
            ds = torch.bmm(gr, vr[:, keys].transpose(1, 2)).add_(pull).mul_(p).mul_(scale)
            if softcap:
                ds.mul_(t.square_().neg_().add_(1))
            dq[some] = _tokens(torch.bmm(ds, kr[:, keys]), span.last - span.first).to(q.dtype)
            dkr[:, keys] += torch.bmm(ds.transpose(1, 2), qr)
        dk[c:d], dv[c:d] = dkr.transpose(0, 1), dvr.transpose(0, 1)
    return dq, dk, dv
