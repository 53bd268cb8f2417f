"""One row at a time through the kernel behind `scaled_dot_product_attention` on the CPU, forward and backward.

The kernel's matrix products come out of MKL, whose last bits depend on where in memory a matrix begins: a row begins
where torch itself would have put it alone. For the same reason rows are not stacked: which thread computes a row, in
which of its buffers, would be another.

Under a causal mask the kernel multiplies each query with whole blocks of 512 keys, most of which a row of that length
hides: such a row goes in span by span, each with the keys that it sees. The loops over such rows, and over those without
a mask, are in `_loops`; rows with a mask of their own are computed here.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, visible
from . import _loops
from ._common import empty, wide
from ._hidden import cut_spans, not_finite, witnesses_finite

_Limits = tuple[int | None, int | None]
_CAUSAL: _Limits = (None, 0)
_LINE = 64  # bytes
_QUERIES = 512  # of a span with a mask, whose memory is this times the keys
_SPANS = (64, 96)  # queries of a span of a causal row: where a query takes much to compute, and where it takes little
_MUCH = 128  # heads times their features and exponentials, for every thread
_EXPONENTIAL = 32  # features that take as long as the exponential of a score
_SPLIT_MAX = 1024  # tokens of a row that is cut into spans
_LARGE = 1 << 20  # elements
_INF = float("inf")

# Quicker to call than the same in torch.ops, and than what wraps it there.
_fwd: Any = torch._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateImportUsage]
_bwd: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._op
# What autograd keeps of every view takes as long as the view, and nothing here is differentiated but as a whole.
_BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd  # pyright: ignore[reportPrivateUsage]


class _Shape(NamedTuple):
    """What rows are made ready for the kernel in: its heads, (1, H) or with grouped queries (K, H / K), and features."""

    kv_heads: int
    group: int
    width: int

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(heads: int, kv_heads: int, features: int, dtype: torch.dtype) -> _Shape:
        """So many features as begin every token at a cache line, and with it every row."""
        step = _LINE // math.gcd(_LINE, kv_heads * wide(dtype).itemsize)
        return _Shape(kv_heads, heads // kv_heads, -(-features // step) * step)

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

    def place(self, out: Tensor, used: int) -> Tensor:
        """Where what the kernel gives goes in out (T, heads, ...), which becomes 0 beyond the used tokens."""
        if used < out.shape[0]:
            out[used:] = 0
            out = out[:used]
        return self.by_heads(out)

    def zeros(self, tokens: int, like: Tensor) -> Tensor:
        """(1, H, tokens, width) or (K, H / K, tokens, width), as the kernel would have given it."""
        outer, heads = (1, self.kv_heads) if self.group == 1 else (self.kv_heads, self.group)
        return like.new_zeros((outer, tokens, heads, self.width)).transpose(1, 2)


@functools.lru_cache(maxsize=2)
def _corner(dtype: torch.dtype) -> Tensor:
    """The mask of the last queries of a causal row: those of its spans are parts of it."""
    most = max(_SPANS) + max(_SPANS) // 2  # of the last span, which takes in what would be less than half a span
    with torch.inference_mode(False), torch.no_grad():
        hidden = torch.full((most, most), -_INF, dtype=dtype).triu_(1)
        return torch.cat([torch.zeros(most, _SPLIT_MAX - most, dtype=dtype), hidden], 1)


def _mask(span: Span, n: int, m: int, limits: _Limits, dtype: torch.dtype) -> Tensor | None:
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


def _is_simple(limits: _Limits, n: int | list[int], m: int | list[int]) -> bool:
    """Whether `_loops` have rows, or a row, of so many queries and keys: all are seen, or what is causal."""
    return limits == (None, None) or (limits == _CAUSAL and n == m)


_Part = tuple[int, int, "Span | None"]
"""Queries of a row that are one call, the first and the number of them; no span where they see no key."""


def _parts(n: int, m: int, limits: _Limits, keys: list[int]) -> list[_Part]:
    """Cut the queries of a row, in order; those of one part see each of the keys all, or see it none."""
    parts: list[_Part] = []
    done = 0
    for span in cut_spans(n, m, limits, _QUERIES, keys):
        if span.first > done:
            parts.append((done, span.first - done, None))
        parts.append((span.first, span.last - span.first, span))
        done = span.last
    if done < n:
        parts.append((done, n - done, None))
    return parts


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
    loop = _loops.scripted(_loops.forward)
    how = limits == _CAUSAL, _span(shape), _corner(dtype), scale
    calls = ns
    with _BelowAutograd():
        qs, ks, vs = shape.ready(q, used), shape.ready(k, used_k), shape.ready(v, used_k)
        os, sums = shape.place(o, used), shape.place(lse, used) if with_lse else None
        if not apart and _is_simple(limits, ns, ms):
            loop(qs, ks, vs, os, sums, ns, ms, *how)
        else:
            calls = []
            split = (x.split_with_sizes(y, 2) for x, y in ((qs, ns), (ks, ms), (vs, ms), (os, ns)))
            lses = [None] * len(ns) if sums is None else sums.split_with_sizes(ns, 2)
            for row, (qr, kr, vr, out, z) in enumerate(zip(*split, lses, strict=True)):
                n, m, keys = ns[row], ms[row], apart.get(row, []) if apart else []
                if not keys and _is_simple(limits, n, m):
                    loop(qr, kr, vr, out, z, [n], [m], *how)
                    calls.append(n)
                    continue
                of_row = (qr.to(dtype), kr.to(dtype), vr.to(dtype), out, z)
                calls += _masked(*of_row, scale, limits, keys)
        if apart is None and limits != (None, None) and not witnesses_finite(o, calls):
            apart = not_finite(k, v, k_offsets, limits)
            if apart:
                return forward(q, k, v, q_offsets, k_offsets, scale, limits, with_lse, rounded, apart)
    return o, lse


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    scale: float,
    limits: _Limits,
    keys: list[int],
) -> list[int]:
    """Write o and lse of one row, part by part, each with a mask of its own; the numbers of queries of the parts."""
    n, m = q.shape[2], k.shape[2]
    parts = _parts(n, m, limits, keys)
    for first, some, span in parts:
        out = o.narrow(2, first, some)
        if span is None:
            out.zero_()
            if lse is not None:
                lse.narrow(2, first, some).fill_(-_INF)
            continue
        seen = (2, span.low, span.high - span.low)
        mask = _mask(span, n, m, limits, q.dtype)
        of_part = q.narrow(2, first, some), k.narrow(*seen), v.narrow(*seen)
        y, z = _fwd(*of_part, 0.0, False, attn_mask=mask, scale=scale)
        out.copy_(y[..., : o.shape[3]])
        if lse is not None:
            lse.narrow(2, first, some).copy_(z)
    return [some for _, some, _ in parts]


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
    dtype, (_, heads, dim), (_, kv_heads, v_dim) = lse.dtype, q.shape, v.shape
    dq, dk, dv = (empty(tuple(x.shape), x.dtype, x.device) for x in (q, k, v))
    ns, ms = _lengths(q_offsets, k_offsets)
    used, used_k = int(q_offsets[-1]), int(k_offsets[-1])
    shape = _Shape.of(heads, kv_heads, max(dim, v_dim if grad_lse is None else v_dim + 1), dtype)
    loop = _loops.scripted(_loops.backward)
    how = limits == _CAUSAL, _span(shape), _corner(dtype), scale
    calls = ns
    more = grad_lse is not None
    with _BelowAutograd():
        gs, vs = shape.ready(grad_o, used, copy=more), shape.ready(v, used_k, copy=more)
        if grad_lse is not None:
            gs[..., v_dim] = shape.by_heads(grad_lse[:used])
            vs[:, : 1 if shape.group > 1 else heads, :, v_dim] = 1  # the memory of every head of the group
        of_queries = gs, shape.ready(q, used), shape.ready(o, used), shape.by_heads(lse[:used]), shape.place(dq, used)
        summed = shape._replace(group=1)  # over the group
        of_keys = shape.ready(k, used_k), vs, summed.place(dk, used_k), summed.place(dv, used_k)
        if not apart and _is_simple(limits, ns, ms):
            loop(*of_queries, *of_keys, ns, ms, *how)
        else:
            calls = []
            split = [x.split_with_sizes(ns, 2) for x in of_queries] + [x.split_with_sizes(ms, 2) for x in of_keys]
            for row, of_row in enumerate(zip(*split, strict=True)):
                n, m, keys = ns[row], ms[row], apart.get(row, []) if apart else []
                if not keys and _is_simple(limits, n, m):
                    loop(*of_row, [n], [m], *how)
                    calls.append(n)
                else:
                    calls += _masked_backward(of_row, shape, scale, limits, keys)
        if apart is None and limits != (None, None) and not witnesses_finite(dq, calls):
            apart = not_finite(k, v, k_offsets, limits)
            if apart:
                return backward(grad_o, grad_lse, q, k, v, o, lse, q_offsets, k_offsets, scale, limits, apart)
    return dq, dk, dv


def _masked_backward(
    of_row: tuple[Tensor, ...], shape: _Shape, scale: float, limits: _Limits, keys: list[int]
) -> list[int]:
    """Write dq, dk and dv of one row, as `_masked`."""
    g, q, o, lse, dq, k, v, dk, dv = of_row  # as the loops take them
    n, m, dtype = q.shape[2], k.shape[2], lse.dtype
    g, q, k, v = g.to(dtype), q.to(dtype), k.to(dtype), v.to(dtype)
    parts = _parts(n, m, limits, keys)
    sums: list[Tensor] = []
    for first, some, span in reversed(parts):  # under a causal mask the last sees what any of them does
        out = dq.narrow(2, first, some)
        if span is None:
            out.zero_()
            continue
        seen = (2, span.low, span.high - span.low)
        of_part = (x.narrow(2, first, some) for x in (g, q))
        of_keys = k.narrow(*seen), v.narrow(*seen)
        rest = o.narrow(2, first, some), lse.narrow(2, first, some)
        mask = _mask(span, n, m, limits, dtype)
        x, *both = _bwd(*of_part, *of_keys, *rest, 0.0, False, attn_mask=mask, scale=scale)
        out.copy_(x[..., : dq.shape[3]])
        if not sums and span.high - span.low == m:
            sums = both
            continue
        sums = sums or [shape.zeros(m, lse), shape.zeros(m, lse)]
        for total, y in zip(sums, both, strict=True):
            total.narrow(*seen).add_(y)
    for out, total in zip((dk, dv), sums or [shape.zeros(m, lse)] * 2, strict=True):
        out.copy_((_loops.summed(total) if shape.group > 1 else total)[..., : out.shape[3]])
    return [some for _, some, _ in parts]
