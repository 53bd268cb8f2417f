"""One row at a time through the kernel behind `scaled_dot_product_attention` on the CPU, forward and backward.

The kernel's matrix products come out of MKL, whose last bits depend on where in memory a matrix begins: a row goes in
from where torch itself would have put it alone, which is the row itself where that is so, and a copy of it otherwise.
For the same reason rows are not stacked: which thread computes a row, in which of its buffers, would be another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, spans, visible
from ._common import empty, wide

_Limits = tuple[int | None, int | None]
_LINE = 64  # bytes
_SMALL = (
    1 << 20
)  # elements that are copied at once; row by row, the copy of a row is still in the cache when it is read
_QUERIES = 512  # of a span with a mask, whose memory is this times the keys

_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Rows:
    """Rows of x (T, heads, D) as (K, G, n, D): aligned, and contiguous as (n, heads, D)."""

    def __init__(self, x: Tensor, lengths: list[int], kv_heads: int, group: int, width: int) -> None:
        self.dtype, self.width = wide(x.dtype), width  # zeros beyond the features that it has
        self.kv_heads, self.group = kv_heads, group
        x = x[: sum(lengths)]
        size = x.shape[1] * width
        here = x.dtype == self.dtype and width == x.shape[2] and x.is_contiguous() and x.data_ptr() % _LINE == 0
        self.aligned = size * self.dtype.itemsize % _LINE == 0 and (here or size * x.shape[0] <= _SMALL)
        if self.aligned:
            x = self._by_heads(x if here else self._copied(x))
        # All views at once: one by one they would take longer than what a short row has to be computed.
        self.rows = x.split(lengths, 2 if self.aligned else 0)

    def _by_heads(self, x: Tensor) -> Tensor:
        x = _by_heads(x, self.kv_heads)
        return x if x.shape[1] == self.group else x.expand(-1, self.group, -1, -1)

    def _copied(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.width)
        wider = empty(shape, self.dtype) if self.width == x.shape[2] else torch.zeros(shape, dtype=self.dtype)
        wider[..., : x.shape[2]] = x
        return wider

    def __getitem__(self, row: int) -> Tensor:
        return self.rows[row] if self.aligned else self._by_heads(self._copied(self.rows[row]))


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


def _kinds(q_offsets: HostInts, k_offsets: HostInts) -> tuple[list[int], list[int]]:
    return np.diff(q_offsets).tolist(), np.diff(k_offsets).tolist()


def _all_whole(n: list[int], m: list[int], limits: _Limits) -> bool:
    """Whether every row that has queries is one call without a mask."""
    if limits == (None, None):
        return all(y for x, y in zip(n, m, strict=True) if x)
    return limits == (None, 0) and n == m


def forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: HostInts, k_offsets: HostInts, scale: float, limits: _Limits
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H): 0 and -inf where a query sees no key; zeros beyond the last row."""
    dtype, (total, heads, _), (_, kv_heads, v_dim) = wide(q.dtype), q.shape, v.shape
    o, lse = empty((total, heads, v_dim), dtype), empty((total, heads), dtype)
    ns, ms = _kinds(q_offsets, k_offsets)
    used = int(q_offsets[-1])
    o[used:], lse[used:] = 0, 0
    width = max(q.shape[2], v_dim)
    group = heads // kv_heads
    q_rows, k_rows, v_rows = (_Rows(x, lengths, kv_heads, group, width) for x, lengths in ((q, ns), (k, ms), (v, ms)))
    some = [row for row, n in enumerate(ns) if n]
    if _all_whole(ns, ms, limits):
        causal = limits == (None, 0)
        done = [_fwd(q_rows[row], k_rows[row], v_rows[row], 0.0, causal, scale=scale) for row in some]
        if done:
            _join([y if width == v_dim else y[..., :v_dim] for y, _ in done], o[:used])
            _join([z for _, z in done], lse[:used])
        return o, lse
    o_rows, lse_rows = o[:used].split(ns), lse[:used].split(ns)
    for row in some:
        n, m = ns[row], ms[row]
        parts = _parts(n, m, limits) if m else []
        if sum(span.last - span.first for span, _ in parts) < n:
            o_rows[row].zero_()
            lse_rows[row].fill_(-float("inf"))
        if not parts:
            continue
        given = q_rows[row], k_rows[row], v_rows[row]
        by_heads, lse_by_heads = _by_heads(o_rows[row], kv_heads), _by_heads(lse_rows[row], kv_heads)
        for span, causal in parts:
            mask = None if causal else _mask(span, n, m, limits, dtype)
            mine, keys = slice(span.first, span.last), slice(span.low, span.high)
            part = (
                given if span == (0, n, 0, m) else [x[:, :, y] for x, y in zip(given, (mine, keys, keys), strict=True)]
            )
            y, z = _fwd(*part, 0.0, causal, attn_mask=mask, scale=scale)
            by_heads[:, :, mine] = y if width == v_dim else y[..., :v_dim]
            lse_by_heads[:, :, mine] = z
    return o, lse


def _join(parts: list[Tensor], out: Tensor) -> None:
    """Join parts (K, G, n, ...) to out (T, H, ...)."""
    parts = [x.flatten(0, 1).transpose(0, 1) for x in parts]
    if parts[0].dtype == out.dtype:
        torch.cat(parts, out=out)
    else:
        for x, y in zip(parts, out.split([len(x) for x in parts]), strict=True):
            y.copy_(x)


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
    ns, ms = _kinds(q_offsets, k_offsets)
    used, used_k = int(q_offsets[-1]), int(k_offsets[-1])
    dq[used:], dk[used_k:], dv[used_k:] = 0, 0, 0
    width = max(dim, v_dim if grad_lse is None else v_dim + 1)
    group = heads // kv_heads
    rows_of = [
        _Rows(x, lengths, kv_heads, group, width) for x, lengths in ((grad_o, ns), (q, ns), (k, ms), (v, ms), (o, ns))
    ]
    lse_rows = _by_heads(lse[:used], kv_heads).split(ns, 2)
    causal = limits == (None, 0)
    some = [row for row, n in enumerate(ns) if n]
    if grad_lse is None and _all_whole(ns, ms, limits) and len(some) == sum(map(bool, ms)):
        given = zip(*([rows[row] for row in some] for rows in (*rows_of, lse_rows)), strict=True)
        done = [_bwd(*row, 0.0, causal, scale=scale) for row in given]
        dqs, dks, dvs = zip(*done, strict=True) if done else ((), (), ())
        for out, parts in ((dq[:used], dqs), (dk[:used_k], _grouped(dks)), (dv[:used_k], _grouped(dvs))):
            if done:
                _join([x if width == out.shape[2] else x[..., : out.shape[2]] for x in parts], out)
        return dq, dk, dv
    grad_lse_rows = None if grad_lse is None else grad_lse[:used].split(ns)
    dq_rows, dk_rows, dv_rows = dq[:used].split(ns), dk[:used_k].split(ms), dv[:used_k].split(ms)
    for row, (n, m) in enumerate(zip(ns, ms, strict=True)):
        parts = _parts(n, m, limits) if n and m else []
        if not parts:
            for empty_row in (dq_rows[row], dk_rows[row], dv_rows[row]):
                empty_row.zero_()
            continue
        if sum(span.last - span.first for span, _ in parts) < n:
            dq_rows[row].zero_()
        given = [rows[row] for rows in rows_of]
        lr = lse_rows[row]
        if grad_lse_rows is not None:
            given[0][..., v_dim] = _by_heads(grad_lse_rows[row], kv_heads)
            given[3][:, 0, :, v_dim] = 1  # the memory of every head of the group
        dq_by_heads = _by_heads(dq_rows[row], kv_heads)
        whole = len(parts) == 1 and parts[0][0].low == 0 and parts[0][0].high == m
        dkr, dvr = (torch.zeros((0 if whole else m, kv_heads, width), dtype=lse.dtype) for _ in range(2))
        for span, causal in parts:
            mask = None if causal else _mask(span, n, m, limits, lse.dtype)
            some, keys = slice(span.first, span.last), slice(span.low, span.high)
            part = [*given, lr]
            if span != (0, n, 0, m):
                part = [x[:, :, y] for x, y in zip(part, (some, some, keys, keys, some, some), strict=True)]
            x, y, z = _bwd(*part, 0.0, causal, attn_mask=mask, scale=scale)
            dq_by_heads[:, :, some] = x if width == dim else x[..., :dim]
            y, z = _summed(y), _summed(z)
            if whole:
                dkr, dvr = y, z
            else:
                dkr[keys] += y
                dvr[keys] += z
        dk_rows[row].copy_(dkr if width == dim else dkr[..., :dim])
        dv_rows[row].copy_(dvr if width == v_dim else dvr[..., :v_dim])
    return dq, dk, dv


def _grouped(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """(K, G, m, D) each to (K, 1, m, D)."""
    if not parts or parts[0].shape[1] == 1:
        return parts
    return [_summed(x).transpose(0, 1)[:, None] for x in parts]


def _summed(x: Tensor) -> Tensor:
    """(K, G, m, D) to (m, K, D), added up over the group in order."""
    total = x[:, 0]
    for head in range(1, x.shape[1]):
        total = total + x[:, head]
    return total.transpose(0, 1)
