"""Attention by BLAS, some queries of a row at a time against the keys that they see; short rows of one length together.

Products are cut into tiles that are too small for BLAS to share out among threads of its own: to start those and to wait
for them takes longer than such a product, and all that NumPy does in between would stay on one thread. Here threads
share out the blocks instead. Memory beside the result is, for each thread, that of one block of scores and of some heads
of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray, HostInts
from .._options import AttentionOptions
from .._rows import Span, pairs_alike, spans, visible
from ._common import Scratch, wide
from ._threads import available, share

_QUERIES = 64  # at a time: of a causal row, half as many keys are computed and hidden
_TILE = 1 << 19  # multiplications: OpenBLAS computes a product of fewer on the thread that asks for it
_SCORES = 1 << 19  # elements of a block of scores: threads that call often wait for Python's lock
_TASK = 1 << 22  # scores of a row that are one task, as long as they are those of several heads
_WORTH_THREADS = 1 << 21  # scores of a call: below, threads wait for Python's lock longer than they compute
_INF = float("inf")

_Weigh = Callable[[HostArray, HostArray], HostArray]


class _Task(NamedTuple):
    """Rows that are computed together, and of them some key heads, and each ``step``-th span from ``first`` on."""

    numbers: HostInts
    n: int
    m: int
    heads: slice
    first: int = 0
    step: int = 1


class _Memory:
    """What a thread uses again from block to block."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.q, self.k, self.v, self.scores, self.parts, self.o = (Scratch(dtype) for _ in range(6))


def _gathered(x: HostArray, starts: list[int], n: int, heads: slice, memory: Scratch, scale: float = 1.0) -> HostArray:
    """Some heads of the tokens (n, heads, D) of rows of x as (heads, G, n, D), in the wide dtype, times `scale`."""
    out = memory.take((heads.stop - heads.start, len(starts), n, x.shape[2]))
    for i, start in enumerate(starts):
        out[:, i] = x[start : start + n, heads].transpose(1, 0, 2)
    if scale != 1.0:
        out *= out.dtype.type(scale)
    return out


def attend(
    q: Array, k: Array, v: Array, sinks: HostArray | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, block by block."""
    return by_blocks(q, k, v, sinks, options, _weigh)


def by_blocks(
    q: Array,
    k: Array,
    v: Array,
    sinks: HostArray | None,
    options: AttentionOptions,
    weigh: _Weigh,
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention` with weights that are computed elsewhere.

    ``weigh(s, top)`` puts exp(s - top) into s (..., keys), contiguous, and returns its sums (..., 1), as top is.
    """
    op = "varlen_attention"
    limits, scale, softcap, return_lse = options.sides, options.scale, options.softcap, options.return_lse
    (total, heads, dim), (_, kv_heads, v_dim) = q.values.shape, v.values.shape
    group = heads // kv_heads
    q_offsets, k_offsets = q._host_offsets(op), k._host_offsets(op)
    dtype = wide(q.values)
    o = np.zeros((total, heads, v_dim), q.values.dtype)
    lse = np.zeros((total if return_lse else 0, heads), np.float32)
    lse[: int(q_offsets[-1])] = -_INF if sinks is None else sinks.astype(np.float32)  # where no key is seen
    sink = None if sinks is None else sinks.astype(dtype).reshape(kv_heads, group, 1, 1, 1)
    triangle = _triangle(dtype)
    tile = max(8, (_TILE - 1) // (_QUERIES * max(dim, v_dim)) // 8 * 8)  # keys

    def compute(tasks: Iterator[_Task]) -> None:
        memory = _Memory(dtype)
        for numbers, n, m, mine, first, step in tasks:
            starts, k_starts = q_offsets[numbers].tolist(), k_offsets[numbers].tolist()
            of_q = slice(mine.start * group, mine.stop * group)
            qr = _gathered(q.values, starts, n, of_q, memory.q, scale)
            qr = qr.reshape(-1, group, len(starts), n, dim)
            kr = _gathered(k.values, k_starts, m, mine, memory.k)
            vr = _gathered(v.values, k_starts, m, mine, memory.v)
            broken = _broken(vr)
            for span in list(spans(n, m, *limits, _QUERIES))[first::step]:
                keys = slice(span.low, span.high)
                given = qr[..., span.first : span.last, :], kr[:, :, keys], vr[:, :, keys]
                bounds = _bounds(span, n, m, *limits, triangle)
                sunk = None if sink is None else sink[mine]
                y, total, z = _block(*given, bounds, broken, softcap, sunk, return_lse, tile, memory, weigh)
                for i, start in enumerate(starts):
                    place = slice(start + span.first, start + span.last)
                    target = o[place, of_q].reshape(y.shape[3], *y.shape[:2], v_dim).transpose(1, 2, 0, 3)
                    np.divide(y[:, :, i], total[:, :, i], out=target, casting="unsafe")
                    if return_lse and z is not None:
                        lse[place, of_q] = z[:, :, i].reshape(-1, y.shape[3]).T

    tasks, threads = _tasks(q_offsets, k_offsets, kv_heads, group)
    share(tasks, compute, threads)
    out = q.with_values(o)
    return (out, q.with_values(lse)) if return_lse else out


def _tasks(q_offsets: HostInts, k_offsets: HostInts, kv_heads: int, group: int) -> tuple[list[_Task], int]:
    """What there is to compute, most first, and on how many threads."""
    rows = [some for some in pairs_alike(q_offsets, k_offsets, kv_heads * group, _SCORES) if some[2]]
    rows.sort(key=lambda some: -len(some[0]) * some[1] * some[2])
    scores = kv_heads * group * sum(len(numbers) * n * m for numbers, n, m in rows)
    threads = available() if scores >= _WORTH_THREADS else 1
    tasks: list[_Task] = []
    for numbers, n, m in rows:
        # A matter of n and m alone: where in memory the matrices of a head begin may show in the last bit.
        size = kv_heads
        if len(numbers) == 1:
            size = min(max(1, _SCORES // (group * min(n, _QUERIES) * m)), max(1, _TASK // (group * n * m)))
        blocks = -(-kv_heads // size)
        cuts = [kv_heads * i // blocks for i in range(blocks + 1)]
        much = len(numbers) * n * m * kv_heads * group * threads > scores
        turns = threads if blocks < threads and n > _QUERIES and much else 1
        heads = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        tasks += [_Task(numbers, n, m, some, first, turns) for some in heads for first in range(turns)]
    return tasks, min(threads, max(len(tasks), 1))


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


def _broken(v: HostArray) -> list[int]:
    """The rows of v (K', G, m, D_v) that have a value which a weight of 0 does not take away: NaN or infinite."""
    sums = np.add.reduce(v, axis=(0, 2, 3))
    return [i for i in np.flatnonzero(~np.isfinite(sums)).tolist() if not np.isfinite(v[:, i]).all()]


def _tiles(x: HostArray, size: int) -> Iterator[HostArray]:
    """Cut (..., keys, D) into tiles (..., tiles, size, D), and into one (..., 1, rest, D) of the rest."""
    keys, dim = x.shape[-2:]
    whole = keys // size * size
    if whole:
        yield x[..., :whole, :].reshape(*x.shape[:-2], -1, size, dim)
    if whole < keys:
        yield x[..., None, whole:, :]


def _block(
    q: HostArray,
    k: HostArray,
    v: HostArray,
    bounds: HostArray | None,
    broken: list[int],
    softcap: float | None,
    sink: HostArray | None,
    with_lse: bool,
    tile: int,
    memory: _Memory,
    weigh: _Weigh,
) -> tuple[HostArray, HostArray, HostArray | None]:
    """What o is times its divisor (K', G', G, queries, D_v), that and lse (K', G', G, queries, 1), of some key heads K'.

    q is (K', G', G, queries, D), k (K', G, keys, D) and v (K', G, keys, D_v).
    """
    s = memory.scores.take((*q.shape[:-1], k.shape[-2]))  # (K', G', G, queries, keys)
    across = tile // _QUERIES * _QUERIES or tile  # spans end where such a tile does
    by_tile = [x.swapaxes(-1, -2) for x in _tiles(s.swapaxes(-1, -2), across)]  # (K', G', G, tiles, queries, tile)
    for part, keys in zip(by_tile, _tiles(k[:, None], across), strict=True):
        np.matmul(q[..., None, :, :], keys.swapaxes(-1, -2), out=part)
    if softcap is not None:
        s /= s.dtype.type(softcap)
        np.tanh(s, out=s)
        s *= s.dtype.type(softcap)
    if bounds is not None:
        last = s[..., s.shape[-1] - bounds.shape[1] :]
        np.fmin(last, bounds, out=last)  # in one pass; a NaN that is hidden is gone, and one that is seen leaves inf
    top = np.maximum.reduce(s, axis=-1, keepdims=True)
    total = weigh(s, top)
    by_tile = [x.swapaxes(-1, -2) for x in _tiles(s.swapaxes(-1, -2), tile)]
    count = sum(part.shape[-3] for part in by_tile)
    parts = memory.parts.take((*q.shape[:-2], count, q.shape[-2], v.shape[-1]))
    at = 0
    for part, values in zip(by_tile, _tiles(v[:, None], tile), strict=True):
        np.matmul(part, values, out=parts[..., at : at + part.shape[-3], :, :])
        at += part.shape[-3]
    o = parts[..., 0, :, :]
    if count > 1:
        o = np.add.reduce(parts, axis=-3, out=memory.o.take(o.shape))
    if bounds is not None:
        for i in broken:
            _add_seen(s[:, :, i], v[:, None, i], bounds, o[:, :, i])
    if not with_lse and sink is None:
        return o, total, None
    lse = np.log(total) + top
    if sink is None:
        return o, total, lse
    both = np.logaddexp(lse, sink)
    o *= np.exp(lse - both)
    return o, total, both


def _weigh(s: HostArray, top: HostArray) -> HostArray:
    s -= top
    np.exp(s, out=s)
    return np.add.reduce(s, axis=-1, keepdims=True)


def _add_seen(p: HostArray, v: HostArray, bounds: HostArray, o: HostArray) -> None:
    """Compute o (..., queries, D_v) from p (..., queries, keys) again, without the values (..., keys, D_v) not seen."""
    first = p.shape[-1] - bounds.shape[1]
    for i, bound in enumerate(bounds):
        seen = np.concatenate([np.arange(first), first + np.flatnonzero(bound > 0)])
        np.matmul(p[..., i : i + 1, :].take(seen, -1), v.take(seen, -2), out=o[..., i : i + 1, :])
