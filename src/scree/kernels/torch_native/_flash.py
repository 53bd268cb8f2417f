"""One row at a time through the kernel behind `scaled_dot_product_attention` on the CPU, forward and backward.

The kernel's matrix products come out of MKL, whose last bits depend on where in memory a matrix begins: a row begins
where torch itself would have put it alone. For the same reason rows are not stacked: which thread computes a row, in
which of its buffers, would be another.

Under a causal mask the kernel multiplies each query with whole blocks of 512 keys, most of which a row of that length
hides: such a row goes in span by span, each with the keys that it sees.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, visible
from ._common import empty, wide
from ._hidden import cut_spans, not_finite, witnesses_finite

_Limits = tuple[int | None, int | None]
_CAUSAL: _Limits = (None, 0)
_LINE = 64  # bytes
_QUERIES = 512  # of a span with a mask, whose memory is this times the keys
_SPANS = (64, 96)  # queries of a span of a causal row: where a query takes much to compute, and where it takes little
_MUCH = 256  # heads times their features and exponentials, for every thread
_EXPONENTIAL = 32  # features that take as long as the exponential of a score
_SPLIT_MAX = 1024  # tokens of a row that is cut into spans
_LARGE = 1 << 20  # elements
_INF = float("inf")

# Quicker to call than the same in torch.ops, and than what wraps it there.
_fwd: Any = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
_bwd: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._op


class _Shape(NamedTuple):
    """What rows are made ready for the kernel in: its heads, (1, H) or with grouped queries (K, H / K), and features."""

    kv_heads: int
    group: int
    width: int

    @classmethod
    def of(cls, heads: int, kv_heads: int, features: int, dtype: torch.dtype) -> _Shape:
        """So many features as begin every token at a cache line, and with it every row."""
        step = _LINE // math.gcd(_LINE, kv_heads * wide(dtype).itemsize)
        return cls(kv_heads, heads // kv_heads, -(-features // step) * step)

    def by_heads(self, x: Tensor) -> Tensor:
        """View (T, heads, ...) as (1, H, T, ...), or with grouped queries as (K, H / K, T, ...)."""
        if self.group == 1:
            return x.unsqueeze(0).transpose(1, 2)
        x = x.transpose(0, 1).unflatten(0, (self.kv_heads, -1))
        return x if x.shape[1] == self.group else x.expand(-1, self.group, *x.shape[2:])

    def ready(self, x: Tensor, used: int, *, copy: bool = False) -> Tensor:
        """The used tokens of x (T, heads, D) by heads, aligned, and with zeros beyond their features.

        Many of a narrow dtype may be as they are: `widened` row by row, they are in the cache when they are read.
        """
        dtype = wide(x.dtype)
        if used < x.shape[0]:
            x = x[:used]
        dense = x.shape[2] == self.width and x.is_contiguous()
        if dense and x.dtype != dtype and self.group == 1 and x.numel() > _LARGE and not copy:
            return self.by_heads(x)
        if copy or not dense or x.dtype != dtype or x.data_ptr() % _LINE:
            wider = empty((*x.shape[:2], self.width), dtype, x.device)
            if x.shape[2] == self.width:
                wider.copy_(x)
            else:
                wider[..., : x.shape[2]] = x
                wider[..., x.shape[2] :] = 0
            x = wider
        return self.by_heads(x)

    def filled(self, tokens: int, value: float, like: Tensor) -> Tensor:
        """(1, H, tokens, width) of one value, as the kernel would have given it."""
        outer, heads = (1, self.kv_heads) if self.group == 1 else (self.kv_heads, self.group)
        return like.new_full((outer, tokens, heads, self.width), value).transpose(1, 2)


_Piece = tuple[int, int, int, int, Span | None]
"""Some queries of a row that are one call: their number, the row, the keys ``low`` to ``high``, and the span.

There are no keys where none is seen. The span is None for a whole causal row, whose mask is the kernel's own flag.
"""


@functools.lru_cache(maxsize=2)
def _corner(dtype: torch.dtype) -> Tensor:
    """The mask of the last queries of a causal row: those of its spans are parts of it."""
    most = _longest(max(_SPANS))
    with torch.inference_mode(False), torch.no_grad():
        hidden = torch.full((most, most), -_INF, dtype=dtype).triu_(1)
        return torch.cat([torch.zeros(most, _SPLIT_MAX - most, dtype=dtype), hidden], 1)


def _longest(span: int) -> int:
    """How many queries may be left for the last span: fewer than half a span are no call of their own."""
    return span + span // 2


@functools.lru_cache(maxsize=256)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """The mask of the last queries among so many keys."""
    corner = _corner(dtype)
    return corner[corner.shape[0] - queries :, _SPLIT_MAX - keys :]


def _mask(span: Span, n: int, m: int, limits: _Limits, dtype: torch.dtype) -> Tensor | None:
    if limits == _CAUSAL and n == m <= _SPLIT_MAX and span.last - span.first <= _longest(max(_SPANS)):
        return _causal_mask(span.last - span.first, span.high, dtype)
    seen = visible(span, n, m, *limits)
    if seen is None:
        return None
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(~seen), -_INF)


def _span(shape: _Shape) -> int:
    """How many queries of a causal row are a call: many where what a call takes, and waking threads for it, counts.

    A span is work for few threads, as many as there are heads at least: for more of them no row is cut.
    """
    heads = shape.kv_heads * shape.group
    threads = torch.get_num_threads()
    if threads > heads:
        return _SPLIT_MAX
    much = heads * (shape.width + _EXPONENTIAL) >= _MUCH * threads
    return _SPANS[0] if much else _SPANS[1]


def _pieces(ns: list[int], ms: list[int], limits: _Limits, shape: _Shape, apart: dict[int, list[int]]) -> list[_Piece]:
    """Cut the queries of all rows, in order; `apart` is what `not_finite` has found."""
    step = _span(shape)
    pieces: list[_Piece] = []
    for row, (n, m) in enumerate(zip(ns, ms, strict=True)):
        if limits == _CAUSAL and n == m and row not in apart:
            if 2 * step <= n <= _SPLIT_MAX:
                pieces.append((step, row, 0, step, None))
                a = step
                while a < n:
                    b = n if n - a < _longest(step) else a + step
                    pieces.append((b - a, row, 0, b, Span(a, b, 0, b)))
                    a = b
            elif n:
                pieces.append((n, row, 0, n, None))
            continue
        done = 0
        most = max(n, 1) if limits == (None, None) else _QUERIES
        for span in cut_spans(n, m, limits, most, apart.get(row, [])):
            if span.first > done:
                pieces.append((span.first - done, row, 0, 0, None))
            pieces.append((span.last - span.first, row, span.low, span.high, span))
            done = span.last
        if done < n:
            pieces.append((n - done, row, 0, 0, None))
    return pieces


def _lengths(q_offsets: HostInts, k_offsets: HostInts) -> tuple[list[int], list[int]]:
    n = (q_offsets[1:] - q_offsets[:-1]).tolist()
    return n, n if k_offsets is q_offsets else (k_offsets[1:] - k_offsets[:-1]).tolist()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: HostInts,
    k_offsets: HostInts,
    scale: float,
    limits: _Limits,
    with_lse: bool = True,
    rounded: bool = False,
    apart: dict[int, list[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H): 0 and -inf where a query sees no key; zeros beyond the last row.

    Without `with_lse` lse is of no size. With `rounded` o is in the dtype of q, and in the wide dtype otherwise.
    `apart` is what `not_finite` has found, once it was asked.
    """
    dtype, (total, heads, dim), (_, kv_heads, v_dim) = wide(q.dtype), q.shape, v.shape
    o = empty((total, heads, v_dim), q.dtype if rounded else dtype, q.device)
    lse = empty((total if with_lse else 0, heads), dtype, q.device)
    ns, ms = _lengths(q_offsets, k_offsets)
    used, used_k = int(q_offsets[-1]), int(k_offsets[-1])
    shape = _Shape.of(heads, kv_heads, max(dim, v_dim), dtype)
    pieces = _pieces(ns, ms, limits, shape, apart or {})
    queries = [piece[0] for piece in pieces]
    # All views at once: one by one they would take longer than what a short row has to be computed.
    ready_q, ready_k, ready_v = shape.ready(q, used), shape.ready(k, used_k), shape.ready(v, used_k)
    qs, *kvs = ready_q.split_with_sizes(queries, 2), ready_k.split_with_sizes(ms, 2), ready_v.split_with_sizes(ms, 2)
    ks, vs = map(list, kvs)
    as_they_are = ready_q.dtype == ready_k.dtype == ready_v.dtype == dtype
    ys, zs = _Joined(o, used), _Joined(lse, min(used, len(lse)))
    for (some, row, low, high, span), x in zip(pieces, qs, strict=True):
        if low == high:
            y = shape.filled(some, 0, lse)
            z = shape.filled(some, -_INF, lse)[..., 0]
        else:
            if not as_they_are:
                x = x.to(dtype)
                ks[row], vs[row] = ks[row].to(dtype), vs[row].to(dtype)
            kr, vr = ks[row], vs[row]
            if high - low < ms[row]:
                kr, vr = kr.narrow(2, low, high - low), vr.narrow(2, low, high - low)
            if span is None:
                y, z = _fwd(x, kr, vr, 0.0, True, scale=scale)
            else:
                mask = _mask(span, ns[row], ms[row], limits, dtype)
                y, z = _fwd(x, kr, vr, 0.0, False, attn_mask=mask, scale=scale)
        ys.add(y)
        if with_lse:
            zs.add(z)
    ys.finish()
    zs.finish()
    if apart is None and limits != (None, None) and not witnesses_finite(o, queries):
        apart = not_finite(k, v, k_offsets, limits)
        if apart:
            return forward(q, k, v, q_offsets, k_offsets, scale, limits, with_lse, rounded, apart)
    return o, lse


class _Joined:
    """What is computed for the used tokens of out (T, heads, ...), part by part and in order; 0 beyond.

    Parts of a large tensor are written at once: their memory serves those that come after, and is in the cache.
    """

    def __init__(self, out: Tensor, used: int) -> None:
        if used < out.shape[0]:
            out[used:] = 0
            out = out[:used]
        self.out, self.done = out, 0
        self.parts: list[Tensor] = []
        # Takes (1, H, n, ...) or (K, H / K, n, ...), with as many features as out, or more.
        self.add: Callable[[Tensor], None] = self._write if out.numel() > _LARGE else self.parts.append

    def _write(self, part: Tensor) -> None:
        part = part.transpose(1, 2)  # as the kernel leaves it in memory: token by token
        self._of(part).narrow(1, self.done, part.shape[1]).copy_(self._cut(part))
        self.done += part.shape[1]

    def finish(self) -> None:
        """Write what was not written at once."""
        if self.parts:
            parts = [x.transpose(1, 2) for x in self.parts]
            first = parts[0]
            if self._cut(first) is not first:
                parts = [self._cut(x) for x in parts]
            if first.dtype == self.out.dtype:
                torch.cat(parts, 1, out=self._of(first))
            else:
                self._of(first).copy_(torch.cat(parts, 1))

    def _cut(self, part: Tensor) -> Tensor:
        more = part.ndim == 4 and part.shape[3] > self.out.shape[2]
        return part[..., : self.out.shape[2]] if more else part

    def _of(self, part: Tensor) -> Tensor:
        if part.shape[0] == 1:
            return self.out.unsqueeze(0)
        return self.out.unflatten(1, (part.shape[0], -1)).transpose(0, 1)


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
    apart: dict[int, list[int]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; `apart` as in the forward.

    The kernel knows no gradient of the LSE, which adds grad_lse to <grad_o, v[j]>: v gets one more feature, of ones,
    and grad_o beside it grad_lse, while o has 0 there.
    """
    (_, heads, dim), (_, kv_heads, v_dim) = q.shape, v.shape
    dq, dk, dv = (empty(tuple(x.shape), x.dtype, x.device) for x in (q, k, v))
    ns, ms = _lengths(q_offsets, k_offsets)
    used, used_k = int(q_offsets[-1]), int(k_offsets[-1])
    shape = _Shape.of(heads, kv_heads, max(dim, v_dim if grad_lse is None else v_dim + 1), lse.dtype)
    pieces = _pieces(ns, ms, limits, shape, apart or {})
    queries = [piece[0] for piece in pieces]
    more = grad_lse is not None
    ready_g, ready_v = shape.ready(grad_o, used, copy=more), shape.ready(v, used_k, copy=more)
    if grad_lse is not None:
        ready_g[..., v_dim] = shape.by_heads(grad_lse[:used])
        ready_v[:, : 1 if shape.group > 1 else heads, :, v_dim] = 1  # the memory of every head of the group
    ready_q, ready_k = shape.ready(q, used), shape.ready(k, used_k)
    as_they_are = ready_g.dtype == ready_q.dtype == ready_k.dtype == ready_v.dtype == lse.dtype
    of_queries = (ready_g, ready_q, shape.ready(o, used), shape.by_heads(lse[:used]))
    gs, qs, os, ls = (x.split_with_sizes(queries, 2) for x in of_queries)
    ks, vs = (list(x.split_with_sizes(ms, 2)) for x in (ready_k, ready_v))
    given = list(zip(pieces, gs, qs, os, ls, strict=True))
    dqs, dks, dvs = _Joined(dq, used), _Joined(dk, used_k), _Joined(dv, used_k)
    begin = 0
    for row, m in enumerate(ms):
        end = begin
        while end < len(pieces) and pieces[end][1] == row:
            end += 1
        mine: list[Tensor] = []
        dkr, dvr = None, None
        for (n, _, low, high, span), gp, qp, op, lp in reversed(
            given[begin:end]
        ):  # the last sees what any of them does
            if low == high:
                mine.append(shape.filled(n, 0, lse))
                continue
            if not as_they_are:
                gp, qp = gp.to(lse.dtype), qp.to(lse.dtype)
                ks[row], vs[row] = ks[row].to(lse.dtype), vs[row].to(lse.dtype)
            kr, vr = ks[row], vs[row]
            whole = low == 0 and high == m
            if not whole:
                kr, vr = kr.narrow(2, low, high - low), vr.narrow(2, low, high - low)
            mask = None if span is None else _mask(span, ns[row], m, limits, lse.dtype)
            x, y, z = _bwd(gp, qp, kr, vr, op, lp, 0.0, span is None, attn_mask=mask, scale=scale)
            mine.append(x)
            if whole and dkr is None:
                dkr, dvr = y, z
                continue
            if dkr is None or dvr is None:
                dkr, dvr = shape.filled(m, 0, lse), shape.filled(m, 0, lse)
            dkr.narrow(2, low, high - low).add_(y)
            dvr.narrow(2, low, high - low).add_(z)
        begin = end
        for x in reversed(mine):
            dqs.add(x)
        for sums, total in ((dks, dkr), (dvs, dvr)):
            if m:
                sums.add(_summed(shape.filled(m, 0, lse) if total is None else total, shape.group))
    for sums in (dqs, dks, dvs):
        sums.finish()
    if apart is None and limits != (None, None) and not witnesses_finite(dq, queries):
        apart = not_finite(k, v, k_offsets, limits)
        if apart:
            return backward(grad_o, grad_lse, q, k, v, o, lse, q_offsets, k_offsets, scale, limits, apart)
    return dq, dk, dv


def _summed(x: Tensor, group: int) -> Tensor:
    """(K, G, m, D) to (1, K, m, D), added up over the group in order."""
    if group == 1:
        return x
    total = x[:, 0]
    for head in range(1, group):
        total = total + x[:, head]
    return total.unsqueeze(0)
