"""Softmax and reductions along the ragged axis.

Tokens of many features are reduced over the middle axis of (G, n, F), rows of one length together; tokens of few are
turned round first, so that every row of a feature is one run of memory for `reduceat`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray, HostInts
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from .._rows import BLOCK, Rows, alike
from ._common import wide

_FEW = 16  # features
_CHUNK = 128  # terms of a sum that are added up one after the other
_INF = float("inf")


def _flat(arr: Array) -> HostArray:
    """The values as (T, F), contiguous, the ragged axis first."""
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return np.ascontiguousarray(x.reshape(x.shape[0], math.prod(arr.feature_shape)))


def _tokens(rows: Rows, x: HostArray) -> HostArray:
    """The tokens of these rows of x (T, F): (G, n, F), a view where they lie together."""
    first, last = int(rows.starts[0]), int(rows.starts[-1]) + rows.length
    some = x[first:last] if rows.adjacent else x.take(rows.tokens(), axis=0)
    return some.reshape(len(rows.starts), rows.length, x.shape[1])


def _columns(rows: Rows, features: int) -> int:
    """How many columns to compute at a time: for a long row, what stays in the cache; a matter of its own shape."""
    return features if rows.short else max(_FEW, BLOCK // rows.length // _FEW * _FEW)


def _sum(x: HostArray) -> HostArray:
    """Sum over the middle axis of (G, n, F), (G, F): in chunks, so that no sum is a long row of additions."""
    n = x.shape[1]
    if n <= _CHUNK or x.shape[2] == 1:
        return np.add.reduce(x, axis=1, dtype=x.dtype)
    whole = n // _CHUNK * _CHUNK
    parts = np.stack([np.add.reduce(x[:, i : i + _CHUNK], axis=1, dtype=x.dtype) for i in range(0, whole, _CHUNK)], 1)
    total = _sum(parts)
    return total + np.add.reduce(x[:, whole:], axis=1, dtype=x.dtype) if whole < n else total


def _runs(offsets: HostInts, tokens: int) -> Iterator[tuple[HostInts, slice, HostInts]]:
    """Go through the rows that are not empty, about so many tokens at a time: numbers, tokens, where each begins."""
    lengths = np.diff(offsets)
    numbers = np.flatnonzero(lengths)
    starts = offsets[:-1][numbers].astype(np.int64)
    i = 0
    while i < len(numbers):
        j = max(i + 1, int(np.searchsorted(starts, starts[i] + tokens, side="right")) - 1)
        if j >= len(numbers) - 1:
            j = len(numbers)
        stop = int(offsets[numbers[j - 1] + 1])
        yield numbers[i:j], slice(int(starts[i]), stop), starts[i:j] - starts[i]
        i = j


def _turned(x: HostArray, tokens: slice) -> HostArray:
    """(F, tokens) in the wide dtype, contiguous."""
    return np.ascontiguousarray(x[tokens].T.astype(wide(x), copy=False))


def _spread(x: HostArray, lengths: HostInts) -> HostArray:
    """(F, G) to (F, tokens): NumPy repeats along one axis alone faster than along the last of two."""
    return np.repeat(x[0], lengths)[None] if len(x) == 1 else np.repeat(x, lengths, axis=1)


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax` in blocks."""
    x, offsets = _flat(arr), arr._host_offsets("varlen_softmax")
    out = np.empty(x.shape, x.dtype)
    out[int(offsets[-1]) :] = 0
    with np.errstate(invalid="ignore"):  # of inf - inf, which is NaN as it should
        (_softmax_few if x.shape[1] < _FEW else _softmax_many)(x, offsets, out)
    y = out.reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


def _softmax_few(x: HostArray, offsets: HostInts, out: HostArray) -> None:
    for numbers, tokens, starts in _runs(offsets, BLOCK // max(x.shape[1], 1)):
        part = _turned(x, tokens)
        lengths = (offsets[numbers + 1] - offsets[numbers]).astype(np.int64)
        p = part - _spread(np.maximum.reduceat(part, starts, axis=1), lengths)
        np.exp(p, out=p)
        p /= _spread(np.add.reduceat(p, starts, axis=1), lengths)
        out[tokens] = p.T


def _softmax_many(x: HostArray, offsets: HostInts, out: HostArray) -> None:
    dtype = wide(x)
    for rows in alike(offsets, x.shape[1]):
        given = _tokens(rows, x)
        columns = _columns(rows, x.shape[1])
        for c in range(0, x.shape[1], columns):
            part = given[..., c : c + columns].astype(dtype, copy=False)
            p = part - np.maximum.reduce(part, axis=1, keepdims=True)
            np.exp(p, out=p)
            total = _sum(p)[:, None]
            if rows.adjacent:
                target = _tokens(rows, out)[..., c : c + columns]
                if out.dtype == dtype:
                    np.divide(p, total, out=target)
                else:
                    target[...] = p / total
            else:
                p /= total
                out[rows.tokens(), c : c + columns] = p.reshape(-1, p.shape[2])


# Reductions of (G, n, F) to (G, F), and of (F, tokens) by where the rows begin to (F, G).


def _logsumexp(x: HostArray) -> HostArray:
    top = np.maximum.reduce(x, axis=1)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    p = x - top[:, None]
    return np.log(_sum(np.exp(p, out=p))) + top


def _logsumexp_few(x: HostArray, starts: HostInts, lengths: HostInts) -> HostArray:
    top = np.maximum.reduceat(x, starts, axis=1)
    top = np.where(np.isfinite(top), top, x.dtype.type(0))
    p = x - _spread(top, lengths)
    return np.log(np.add.reduceat(np.exp(p, out=p), starts, axis=1)) + top


_MANY: dict[str, Callable[[HostArray], HostArray]] = {
    "sum": _sum,
    "mean": lambda x: _sum(x) / x.dtype.type(x.shape[1]),
    "max": lambda x: np.maximum.reduce(x, axis=1),
    "min": lambda x: np.minimum.reduce(x, axis=1),
    "logsumexp": _logsumexp,
}
_FEWER: dict[str, Callable[[HostArray, HostInts, HostInts], HostArray]] = {
    "sum": lambda x, starts, _: np.add.reduceat(x, starts, axis=1, dtype=x.dtype),
    "mean": lambda x, starts, n: np.add.reduceat(x, starts, axis=1, dtype=x.dtype) / n.astype(x.dtype),
    "max": lambda x, starts, _: np.maximum.reduceat(x, starts, axis=1),
    "min": lambda x, starts, _: np.minimum.reduceat(x, starts, axis=1),
    "logsumexp": _logsumexp_few,
}


def _of_nothing(op: str, dtype: np.dtype[Any]) -> float | int | bool:
    if op == "sum":
        return 0
    if op == "mean":
        return float("nan")
    if dtype.kind == "b":
        return op == "min"
    if is_integer(dtype.name):
        return integer_limits(dtype.name)[op == "min"]
    return _INF if op == "min" else -_INF


def varlen_reduce(arr: Array, op: str) -> HostArray:
    """Compute `scree.kernels.varlen_reduce` in blocks."""
    x, offsets = _flat(arr), arr._host_offsets("varlen_reduce")
    out = np.full((arr.batch_size, x.shape[1]), _of_nothing(op, x.dtype), x.dtype)
    with np.errstate(invalid="ignore", divide="ignore"):  # of inf - inf and log(0), which are what they should be
        if x.shape[1] < _FEW:
            one_pass = x.shape[1] == 1 and x.dtype == wide(x) and op != "logsumexp"
            for numbers, tokens, starts in _runs(offsets, len(x) if one_pass else BLOCK // max(x.shape[1], 1)):
                lengths = (offsets[numbers + 1] - offsets[numbers]).astype(np.int64)
                out[numbers] = _FEWER[op](_turned(x, tokens), starts, lengths).T
        else:
            for rows in alike(offsets, x.shape[1]):
                given = _tokens(rows, x)
                columns = _columns(rows, x.shape[1])
                for c in range(0, x.shape[1], columns):
                    part = given[..., c : c + columns].astype(wide(x), copy=False)
                    out[rows.numbers, c : c + columns] = _MANY[op](part)
    return out.reshape(arr.batch_size, *arr.feature_shape)
