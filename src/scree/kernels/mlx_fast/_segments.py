"""Softmax and reductions along the ragged axis, rows of one length together."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..._array import Array
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from .._rows import alike, unlike
from ._common import in_order, separate, taken, wide

_INF = float("inf")


def _flat(arr: Array) -> mx.array:
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return x.reshape(x.shape[0], math.prod(arr.feature_shape))


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`, rows of one length together."""
    x, offsets = _flat(arr), arr._host_offsets("varlen_softmax")
    parts, places = [mx.zeros((0, x.shape[1]), x.dtype)], [offsets[:0]]
    for rows in alike(offsets, x.shape[1]):
        part = wide(taken(x, rows.starts, rows.length))
        y = mx.softmax(part, axis=1).astype(x.dtype)
        some, where = separate(y, rows, rows.tokens())
        parts += some
        places += where
    used = int(offsets[-1])
    if used == 0 or x.shape[1] == 0:
        return arr.with_values(arr.values * 0 if used == 0 else arr.values)
    y = in_order(parts[1:], places[1:], used)
    if used < x.shape[0]:
        y = mx.concatenate([y, mx.zeros((x.shape[0] - used, x.shape[1]), x.dtype)], 0)
    y = y.reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


# Of (G, n, F), (G, F) each.


def _logsumexp(x: mx.array) -> mx.array:
    top = mx.max(x, axis=1, keepdims=True)
    top = mx.where(mx.abs(top) < _INF, top, mx.zeros_like(top))
    s = mx.sum(mx.exp(x - top), axis=1)
    none = s == 0
    return mx.where(none, mx.full((), -_INF, x.dtype), mx.log(mx.where(none, mx.ones_like(s), s)) + top[:, 0])


_REDUCE: dict[str, Callable[[mx.array], mx.array]] = {
    "sum": lambda x: mx.sum(x, axis=1).astype(x.dtype),
    "mean": lambda x: mx.sum(x, axis=1) / x.shape[1],
    "max": lambda x: mx.max(x, axis=1),
    "min": lambda x: mx.min(x, axis=1),
    "logsumexp": _logsumexp,
}


def _of_nothing(op: str, dtype: str) -> float | int | bool:
    if op == "sum":
        return 0
    if op == "mean":
        return float("nan")
    if dtype == "bool":
        return op == "min"
    if is_integer(dtype):
        return integer_limits(dtype)[op == "min"]
    return _INF if op == "min" else -_INF


def varlen_reduce(arr: Array, op: str) -> mx.array:
    """Compute `scree.kernels.varlen_reduce`, rows of one length together."""
    xp, x, offsets = arr._xp, _flat(arr), arr._host_offsets("varlen_reduce")
    empty = (offsets[1:] == offsets[:-1]).nonzero()[0]
    parts, places = [], []
    if len(empty) or not arr.batch_size:
        nothing = xp.full((len(empty), x.shape[1]), _of_nothing(op, xp.dtype_name(x)), x)
        parts.append(nothing)
        places.append(empty)
    single = unlike(np.diff(offsets), x.shape[1]) & (x.shape[1] > 0)
    starts, stops, batch = offsets[:-1].tolist(), offsets[1:].tolist(), x[None]
    parts += [
        _REDUCE[op](wide(batch[:, starts[row] : stops[row]])).astype(x.dtype) for row in np.flatnonzero(single).tolist()
    ]
    places += [*np.flatnonzero(single)[:, None]]
    for rows in alike(offsets, x.shape[1], only_short=True):
        if single[rows.numbers[0]]:
            continue
        parts.append(_REDUCE[op](wide(taken(x, rows.starts, rows.length))).astype(x.dtype))
        places.append(rows.numbers)
    if x.shape[1] == 0:
        return mx.zeros((arr.batch_size, *arr.feature_shape), x.dtype)
    return in_order(parts, places, arr.batch_size).reshape(arr.batch_size, *arr.feature_shape)
