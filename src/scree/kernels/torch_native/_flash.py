"""One row at a time through the kernel behind `scaled_dot_product_attention` on the CPU, forward and backward.

The kernel's matrix products come out of MKL, whose last bits depend on where in memory a matrix begins: a row goes in
from where torch itself would have put it alone, which is the row itself where that is so, and a copy of it otherwise.
For the same reason rows are not stacked: which thread computes a row, in which of its buffers, would be another.

Under a causal mask the kernel multiplies each query with whole blocks of 512 keys, most of which a row of that length
hides: such a row goes in span by span, each with the keys that it sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, spans, visible
from ._common import empty, wide

_Limits = tuple[int | None, int | None]
_Parts = list[tuple[Span, bool]]  # and whether the kernel's own causal flag is the mask of the span
_CAUSAL: _Limits = (None, 0)
_LINE = 64  # bytes
_SMALL = (
    1 << 20
)  # elements that are copied at once; row by row, the copy of a row is still in the cache when it is read
_QUERIES = 512  # of a span with a mask, whose memory is this times the keys
_SPLIT = 64  # queries of a span of a causal row
_SPLIT_MIN, _SPLIT_MAX, _SPLIT_SIZE = 128, 1024, 1 << 15  # tokens, and least elements, of a row that is cut into spans
_INF = float("inf")

# Quicker to call than the same in torch.ops.
_fwd: Any = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_corners: dict[torch.dtype, Tensor] = {}


class _Rows:
    """Rows of x (T, heads, D) as `_by_heads` has them: aligned, and contiguous as (n, heads, D)."""

    def __init__(self, x: Tensor, lengths: list[int], kv_heads: int, group: int, width: int) -> None:
        self.dtype, self.width = wide(x.dtype), width  # zeros beyond the features that it has
        self.kv_heads, self.group = kv_heads, group
        x = x[: sum(lengths)]
        size = x.shape[1] * width
        here = x.dtype == self.dtype and width == x.shape[2] and x.is_contiguous() and x.data_ptr() % _LINE == 0
        self.aligned = size * self.dtype.itemsize % _LINE == 0 and (here or size * x.shape[0] <= _SMALL)
        if self.aligned:
            x = _by_heads(x if here else self._copied(x), kv_heads, group)
        # All views at once: one by one they would take longer than what a short row has to be computed.
        self.rows = x.split_with_sizes(lengths, 2 if self.aligned else 0)

    def _copied(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.width)
        wider = empty(shape, self.dtype, x.device) if self.width == x.shape[2] else torch.zeros(shape, dtype=self.dtype)
        wider[..., : x.shape[2]] = x
        return wider

    def __iter__(self) -> Iterator[Tensor]:
        if self.aligned:
            return iter(self.rows)
        return (_by_heads(self._copied(row), self.kv_heads, self.group) for row in self.rows)


def _by_heads(x: Tensor, kv_heads: int, group: int) -> Tensor:
    """View (T, heads, ...) as (1, H, T, ...), or with grouped queries as (K, H / K, T, ...)."""
    if group == 1:
        return x.transpose(0, 1).unsqueeze(0)
    x = x.transpose(0, 1).unflatten(0, (kv_heads, -1))
    return x if x.shape[1] == group else x.expand(-1, group, *x.shape[2:])


def _corner(dtype: torch.dtype) -> Tensor:
    """The mask of the last `_SPLIT` queries of a causal row: those of its spans are parts of it."""
    if dtype not in _corners:
        with torch.inference_mode(False), torch.no_grad():
            hidden = torch.full((_SPLIT, _SPLIT), -_INF, dtype=dtype).triu_(1)
            _corners[dtype] = torch.cat([torch.zeros(_SPLIT, _SPLIT_MAX - _SPLIT, dtype=dtype), hidden], 1)
    return _corners[dtype]


def _mask(span: Span, n: int, m: int, limits: _Limits, dtype: torch.dtype) -> Tensor | None:
    if limits == _CAUSAL and n == m and span.last - span.first <= _SPLIT and m <= _SPLIT_MAX:
        return _corner(dtype)[_SPLIT - (span.last - span.first) :, _SPLIT_MAX - span.high :]
    seen = visible(span, n, m, *limits)
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~seen), -_INF)


def _cut_from(heads: int, width: int) -> int:
    """The fewest tokens of a causal row that is cut: a span is work for few threads, as many as there are heads at least."""
    if torch.get_num_threads() > heads:
        return _SPLIT_MAX + 1
    return max(_SPLIT_MIN, -(-_SPLIT_SIZE // max(heads * width, 1)))


def _is_whole(n: int, m: int, limits: _Limits, cut_from: int) -> bool:
    """Whether the kernel's own causal flag is the mask of the row, and the row one call."""
    return n == m and limits == _CAUSAL and not cut_from <= n <= _SPLIT_MAX


def _parts(n: int, m: int, limits: _Limits, cut_from: int) -> _Parts:
    """The spans of a row that see any key, in order."""
    if _is_whole(n, m, limits, cut_from):
        return [(Span(0, n, 0, m), True)] if n else []
    if n == m and limits == _CAUSAL:
        return [(Span(a, min(a + _SPLIT, n), 0, min(a + _SPLIT, n)), a == 0) for a in range(0, n, _SPLIT)]
    most = n if limits == (None, None) else _QUERIES
    return [(span, False) for span in spans(n, m, *limits, max(most, 1))]


def _lengths(q_offsets: HostInts, k_offsets: HostInts) -> tuple[list[int], list[int]]:
    n = np.diff(q_offsets).tolist()
    return n, n if k_offsets is q_offsets else np.diff(k_offsets).tolist()


def _cut(given: Sequence[Tensor], of_keys: tuple[int, int], span: Span, n: int, m: int) -> Sequence[Tensor]:
    """The queries of a span of each of the given (K, G, n, ...), and its keys of two of them (K, G, m, D)."""
    if span == (0, n, 0, m):
        return given
    mine, keys = slice(span.first, span.last), slice(span.low, span.high)
    return [x[:, :, keys if i in of_keys else mine] for i, x in enumerate(given)]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: HostInts,
    k_offsets: HostInts,
    scale: float,
    limits: _Limits,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H): 0 and -inf where a query sees no key; zeros beyond the last row.

    Without `with_lse` lse is of no size.
    """
    dtype, (total, heads, _), (_, kv_heads, v_dim) = wide(q.dtype), q.shape, v.shape
    o = empty((total, heads, v_dim), dtype, q.device)
    lse = empty((total if with_lse else 0, heads), dtype, q.device)
    ns, ms = _lengths(q_offsets, k_offsets)
    used = int(q_offsets[-1])
    width, group = max(q.shape[2], v_dim), heads // kv_heads
    cut_from = _cut_from(heads, width)
    rows_of = [_Rows(x, lengths, kv_heads, group, width) for x, lengths in ((q, ns), (k, ms), (v, ms))]
    ys: list[Tensor] = []
    zs: list[Tensor] = []

    def unseen(queries: int) -> None:
        ys.append(o.new_zeros((kv_heads if group > 1 else 1, heads if group == 1 else group, queries, width)))
        zs.append(o.new_full(ys[-1].shape[:3], -_INF))

    for n, m, *given in zip(ns, ms, *rows_of, strict=True):
        if not n:
            continue
        if _is_whole(n, m, limits, cut_from):
            y, z = _fwd(*given, 0.0, True, scale=scale)
            ys.append(y)
            zs.append(z)
            continue
        done = 0
        for span, causal in _parts(n, m, limits, cut_from):
            if span.first > done:
                unseen(span.first - done)
            mask = None if causal else _mask(span, n, m, limits, dtype)
            y, z = _fwd(*_cut(given, (1, 2), span, n, m), 0.0, causal, attn_mask=mask, scale=scale)
            ys.append(y)
            zs.append(z)
            done = span.last
        if done < n:
            unseen(n - done)
    _join(ys, o, used, kv_heads, group)
    if with_lse:
        _join(zs, lse, used, kv_heads, group)
    return o, lse


def _join(parts: list[Tensor], out: Tensor, used: int, kv_heads: int, group: int) -> None:
    """Write parts by heads, one behind the other, to the used tokens of out (T, heads, ...), and 0 to the others."""
    if used < len(out):
        out[used:] = 0
    if not parts:
        return
    if out.ndim == 3 and parts[0].shape[3] > out.shape[2]:
        parts = [x[..., : out.shape[2]] for x in parts]
    target = _by_heads(out[:used], kv_heads, group)
    if parts[0].dtype != out.dtype:
        for x, y in zip(parts, target.split([x.shape[2] for x in parts], 2), strict=True):
            y.copy_(x)
    elif group > 1:
        torch.cat(parts, 2, out=target)
    else:  # the kernel leaves them token by token
        torch.cat([x.transpose(1, 2) for x in parts], 1, out=out[:used].unsqueeze(0))


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
    dq, dk, dv = (empty(tuple(x.shape), x.dtype, x.device) for x in (q, k, v))
    ns, ms = _lengths(q_offsets, k_offsets)
    used, used_k = int(q_offsets[-1]), int(k_offsets[-1])
    width, group = max(dim, v_dim if grad_lse is None else v_dim + 1), heads // kv_heads
    cut_from = _cut_from(heads, width)
    rows_of = [
        _Rows(x, lengths, kv_heads, group, width) for x, lengths in ((grad_o, ns), (q, ns), (k, ms), (v, ms), (o, ns))
    ]
    lse_rows = _by_heads(lse[:used], kv_heads, group).split_with_sizes(ns, 2)
    grad_lse_rows = None if grad_lse is None else _by_heads(grad_lse[:used], kv_heads, group).split_with_sizes(ns, 2)
    dqs: list[Tensor] = []
    dks: list[Tensor] = []
    dvs: list[Tensor] = []

    def nothing(tokens: int) -> Tensor:
        return lse.new_zeros((kv_heads if group > 1 else 1, heads if group == 1 else group, tokens, width))

    for row, (n, m, *given) in enumerate(zip(ns, ms, *rows_of, lse_rows, strict=True)):
        if grad_lse_rows is not None:
            given[0][..., v_dim] = grad_lse_rows[row]
            given[3][:, : 1 if group > 1 else heads, :, v_dim] = 1  # the memory of every head of the group
        parts = _parts(n, m, limits, cut_from)
        mine: list[Tensor] = []
        after, dkr, dvr = n, None, None
        for span, causal in reversed(parts):  # the last sees all keys that any of a causal row does
            mask = None if causal else _mask(span, n, m, limits, lse.dtype)
            x, y, z = _bwd(*_cut(given, (2, 3), span, n, m), 0.0, causal, attn_mask=mask, scale=scale)
            if span.last < after:
                mine.append(nothing(after - span.last))
            mine.append(x)
            after = span.first
            if dkr is None and span.low == 0 and span.high == m:
                dkr, dvr = y, z
                continue
            if dkr is None or dvr is None:
                dkr, dvr = nothing(m), nothing(m)
            dkr[:, :, span.low : span.high] += y
            dvr[:, :, span.low : span.high] += z
        if after:
            mine.append(nothing(after))
        dqs += reversed(mine)
        if m:
            dks.append(nothing(m) if dkr is None else dkr)
            dvs.append(nothing(m) if dvr is None else dvr)
    _join(dqs, dq, used, kv_heads, group)
    _join([_summed(x, group) for x in dks], dk, used_k, kv_heads, 1)
    _join([_summed(x, group) for x in dvs], dv, used_k, kv_heads, 1)
    return dq, dk, dv


def _summed(x: Tensor, group: int) -> Tensor:
    """(K, G, m, D) to (1, K, m, D), added up over the group in order."""
    if group == 1:
        return x
    total = x[:, 0]
    for head in range(1, group):
        total = total + x[:, head]
    return total.unsqueeze(0)
