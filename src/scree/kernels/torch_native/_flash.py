"""One row at a time through the kernel behind `scaled_dot_product_attention` on the CPU, forward and backward.

The kernel's matrix products come out of MKL, whose last bits depend on where in memory a matrix begins: a row goes in
from where torch itself would have put it alone, which is the row itself where that is so, and a copy of it otherwise.
For the same reason rows are not stacked: which thread computes a row, in which of its buffers, would be another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, spans, visible
from ._common import empty, wide

_Limits = tuple[int | None, int | None]
_LINE = 64  # bytes
_QUERIES = 512  # of a span with a mask, whose memory is this times the keys

_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Rows:
    """Rows of x (T, heads, D) as (K, G, n, D): aligned, and contiguous as (n, heads, D)."""

    def __init__(self, x: Tensor, kv_heads: int, group: int, width: int) -> None:
        self.x, self.dtype, self.width = x, wide(x.dtype), width  # zeros beyond the features that it has
        self.kv_heads, self.group = kv_heads, group
        step = x.shape[1] * x.shape[2] * x.element_size()
        here = x.dtype == self.dtype and width == x.shape[2] and x.is_contiguous()
        self.whole = self._by_heads(x) if here and x.data_ptr() % _LINE == 0 and step % _LINE == 0 else None

    def _by_heads(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).unflatten(0, (self.kv_heads, -1))
        return x if x.shape[1] == self.group else x.expand(-1, self.group, -1, -1)

    def __call__(self, start: int, stop: int) -> Tensor:
        if self.whole is not None:
            return self.whole[:, :, start:stop]
        row = self.x[start:stop]
        copy = torch.empty if self.width == row.shape[2] else torch.zeros
        wider = copy((*row.shape[:2], self.width), dtype=self.dtype)
        wider[..., : row.shape[2]] = row
        return self._by_heads(wider)


def _by_heads(x: Tensor, kv_heads: int) -> Tensor:
    """View (T, H, ...) as (K, G, T, ...)."""
    return x.transpose(0, 1).unflatten(0, (kv_heads, -1))


def _mask(span: Span, n: int, m: int, limits: _Limits, dtype: torch.dtype) -> Tensor | None:
    seen = visible(span, n, m, *limits)
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~seen), -float("inf"))


def _parts(n: int, m: int, limits: _Limits) -> list[tuple[Span, bool]]:
    """The spans of a row, and of each whether the kernel's own causal flag is its mask."""
    if n == m and limits == (None, 0):
        return [(Span(0, n, 0, m), True)]
    most = n if limits == (None, None) else _QUERIES
    return [(span, False) for span in spans(n, m, *limits, max(most, 1))]


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: HostInts, k_offsets: HostInts, scale: float, limits: _Limits
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H): 0 and -inf where a query sees no key; zeros beyond the last row."""
    dtype, (total, heads, _), (_, kv_heads, v_dim) = wide(q.dtype), q.shape, v.shape
    o, lse = empty((total, heads, v_dim), dtype), empty((total, heads), dtype)
    used = int(q_offsets[-1])
    o[used:], lse[used:] = 0, 0
    width = max(q.shape[2], v_dim)
    group = heads // kv_heads
    q_rows, k_rows, v_rows = (_Rows(x, kv_heads, group, width) for x in (q, k, v))
    by_heads, lse_by_heads = _by_heads(o, kv_heads), _by_heads(lse, kv_heads)
    bounds = zip(*(x.tolist() for x in (q_offsets, q_offsets[1:], k_offsets, k_offsets[1:])), strict=False)
    for a, b, c, d in bounds:
        n, m = b - a, d - c
        if n == 0:
            continue
        parts = _parts(n, m, limits) if m else []
        if sum(span.last - span.first for span, _ in parts) < n:
            o[a:b], lse[a:b] = 0, -float("inf")
        if not parts:
            continue
        rows = q_rows(a, b), k_rows(c, d), v_rows(c, d)
        for span, causal in parts:
            mask = None if causal else _mask(span, n, m, limits, dtype)
            some, keys = slice(span.first, span.last), slice(span.low, span.high)
            given = (
                rows if span == (0, n, 0, m) else [x[:, :, y] for x, y in zip(rows, (some, keys, keys), strict=True)]
            )
            y, z = _fwd(*given, 0.0, causal, attn_mask=mask, scale=scale)
            by_heads[:, :, a + span.first : a + span.last] = y if width == v_dim else y[..., :v_dim]
            lse_by_heads[:, :, a + span.first : a + span.last] = z
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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v.

    The kernel knows no gradient of the LSE, which adds grad_lse to <grad_o, v[j]>: v gets one more feature, of ones,
    and grad_o beside it grad_lse, while o has 0 there.
    """
    (_, heads, dim), (_, kv_heads, v_dim) = q.shape, v.shape
    dq, dk, dv = (empty(tuple(x.shape), x.dtype) for x in (q, k, v))
    dq[int(q_offsets[-1]) :] = 0
    dk[int(k_offsets[-1]) :] = 0
    dv[int(k_offsets[-1]) :] = 0
    width = max(dim, v_dim if grad_lse is None else v_dim + 1)
    group = heads // kv_heads
    q_rows, k_rows, v_rows, g_rows, o_rows = (_Rows(x, kv_heads, group, width) for x in (q, k, v, grad_o, o))
    lse_by_heads, dq_by_heads = _by_heads(lse, kv_heads), _by_heads(dq, kv_heads)
    bounds = zip(*(x.tolist() for x in (q_offsets, q_offsets[1:], k_offsets, k_offsets[1:])), strict=False)
    for a, b, c, d in bounds:
        n, m = b - a, d - c
        parts = _parts(n, m, limits) if n and m else []
        if not parts:
            dq[a:b], dk[c:d], dv[c:d] = 0, 0, 0
            continue
        if sum(span.last - span.first for span, _ in parts) < n:
            dq[a:b] = 0
        rows = g_rows(a, b), q_rows(a, b), k_rows(c, d), v_rows(c, d), o_rows(a, b)
        lr = lse_by_heads[:, :, a:b].contiguous()
        if grad_lse is not None:
            rows[0][..., v_dim] = _by_heads(grad_lse[a:b], kv_heads)
            rows[3][:, 0, :, v_dim] = 1  # the memory of every head of the group
        whole = len(parts) == 1 and parts[0][0].low == 0 and parts[0][0].high == m
        dkr, dvr = (torch.zeros((0 if whole else m, kv_heads, width), dtype=lse.dtype) for _ in range(2))
        for span, causal in parts:
            mask = None if causal else _mask(span, n, m, limits, lse.dtype)
            some, keys = slice(span.first, span.last), slice(span.low, span.high)
            given = [x[:, :, y] for x, y in zip((*rows, lr), (some, some, keys, keys, some, some), strict=True)]
            x, y, z = _bwd(*given, 0.0, causal, attn_mask=mask, scale=scale)
            dq_by_heads[:, :, a + span.first : a + span.last] = x if width == dim else x[..., :dim]
            y, z = _summed(y), _summed(z)
            if whole:
                dkr, dvr = y, z
            else:
                dkr[keys] += y
                dvr[keys] += z
        dk[c:d], dv[c:d] = dkr[..., :dim], dvr[..., :v_dim]
    return dq, dk, dv


def _summed(x: Tensor) -> Tensor:
    """(K, G, m, D) to (m, K, D), added up over the group in order."""
    total = x[:, 0]
    for head in range(1, x.shape[1]):
        total = total + x[:, head]
    return total.transpose(0, 1)
