"""Softmax and reductions along the ragged axis, rows of one length together."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..._array import Array
from ..._backends._protocol import HostInts
from ..._backends.mlx import exp
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from .._rows import alike, unlike
from ._common import HALVES, in_order, separate, taken, wide

_INF = float("inf")


def _flat(arr: Array) -> mx.array:
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return x.reshape(x.shape[0], math.prod(arr.feature_shape))


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`, rows of one length together."""
    x, offsets = _flat(arr), arr._host_offsets("varlen_softmax")
    parts, places = [mx.zeros((0, x.shape[1]), x.dtype)], [offsets[:0]]
    for rows in alike(offsets, x.shape[1]):
        y = _softmax(wide(taken(x, rows.starts, rows.length))).astype(x.dtype)
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


def _softmax(x: mx.array) -> mx.array:
    """Along the second axis, as `mx.softmax` computes it there."""
    p = exp(x - mx.stop_gradient(mx.max(x, axis=1, keepdims=True)))
    return p / mx.sum(p, axis=1, keepdims=True)


def _logsumexp(x: mx.array) -> mx.array:
    top = mx.max(x, axis=1, keepdims=True)
    top = mx.where(mx.abs(top) < _INF, top, mx.zeros_like(top))
    s = mx.sum(exp(x - top), axis=1, keepdims=True)
    none = s == 0
    return mx.where(none, mx.full((), -_INF, x.dtype), mx.log(mx.where(none, mx.ones_like(s), s)) + top)


# Of (G, n, F), (G, 1, F) each; a sum of integers may be wider.
_REDUCE: dict[str, Callable[[mx.array], mx.array]] = {
    "sum": lambda x: mx.sum(x, axis=1, keepdims=True),
    "mean": lambda x: mx.sum(x, axis=1, keepdims=True) / x.shape[1],
    "max": lambda x: mx.max(x, axis=1, keepdims=True),
    "min": lambda x: mx.min(x, axis=1, keepdims=True),
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
    if x.shape[1] == 0:
        return mx.zeros((arr.batch_size, *arr.feature_shape), x.dtype)
    of_row = _REDUCE[op]
    parts, places = [], []
    single = unlike(np.diff(offsets), x.shape[1])
    alone = np.flatnonzero(single)
    if len(alone):
        own = _rows_alone(x, offsets, alone)
        own = [wide(row) for row in own] if x.dtype in HALVES else own
        parts.append(mx.concatenate([of_row(row) for row in own], 1)[0].astype(x.dtype))
        places.append(alone)
    for rows in alike(offsets, x.shape[1], only_short=True) if len(alone) < arr.batch_size else ():
        if single[rows.numbers[0]]:
            continue
        parts.append(of_row(wide(taken(x, rows.starts, rows.length)))[:, 0].astype(x.dtype))
        places.append(rows.numbers)
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if len(empty) or not arr.batch_size:
        parts.append(xp.full((len(empty), x.shape[1]), _of_nothing(op, xp.dtype_name(x)), x))
        places.append(empty)
    return in_order(parts, places, arr.batch_size).reshape(arr.batch_size, *arr.feature_shape)


def _rows_alone(x: mx.array, offsets: HostInts, numbers: HostInts) -> list[mx.array]:
    """The rows of these numbers, (1, n, F) each; cut all rows at once where that is less to say than each cut."""
    if 2 * len(numbers) >= len(offsets):
        rows = mx.split(x[None], offsets[1:].tolist(), 1)
        return [rows[i] for i in numbers.tolist()]
    return [x[None, a:b] for a, b in zip(offsets[numbers].tolist(), offsets[numbers + 1].tolist(), strict=True)]
