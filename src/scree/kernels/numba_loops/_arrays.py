"""Arrays made ready for the loops, and their results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray
from ..._check import integer_limits, is_integer
from ..._layout import moved_to_front
from .._options import AttentionOptions
from .._rows import used_only
from ..numpy_blas import by_blocks
from ..numpy_blas._common import wide
from . import _loops

_INF = float("inf")


def attend(
    q: Array, k: Array, v: Array, sinks: HostArray | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """As `scree.kernels.varlen_attention`."""
    return by_blocks(q, k, v, sinks, options, _weigh)


def _weigh(s: HostArray, top: HostArray) -> HostArray:
    total = np.empty(top.shape, top.dtype)
    _loops.weigh(s.reshape(-1, s.shape[-1]), top.reshape(-1), total.reshape(-1))
    return total


def reduce(arr: Array, op: str) -> HostArray:
    """(B, *features)."""
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    flat = np.ascontiguousarray(x.reshape(x.shape[0], math.prod(arr.feature_shape)), wide(x))
    offsets = arr._host_offsets("varlen_reduce").astype(np.int64, copy=False)
    with np.errstate(invalid="ignore", divide="ignore"):  # of 0 / 0 and log(0), which are what they should be
        out = _reduced(flat, offsets, op)
    return out.reshape(arr.batch_size, *arr.feature_shape).astype(x.dtype, copy=False)


def _reduced(x: HostArray, offsets: HostArray, op: str) -> HostArray:
    shape = len(offsets) - 1, x.shape[1]
    if op in ("max", "min"):
        out = np.full(shape, _of_nothing(op, x.dtype), x.dtype)
        loop = _loops.largest if op == "max" else _loops.smallest
        loop(x.view(np.uint8), offsets, out.view(np.uint8)) if x.dtype.kind == "b" else loop(x, offsets, out)
        return out
    if op == "logsumexp":
        top = _reduced(x, offsets, "max")
        top = np.where(np.isfinite(top), top, x.dtype.type(0))
        p = np.empty_like(x)
        _loops.shift(x, offsets, top, p)
        used = p[: offsets[-1]]
        np.exp(used, out=used)
        return np.log(_reduced(p, offsets, "sum")) + top
    out = np.zeros(shape, x.dtype)
    _loops.add(x, offsets, np.empty(x.shape[1], x.dtype), out)
    return out / np.diff(offsets).astype(x.dtype)[:, None] if op == "mean" else out


def _of_nothing(op: str, dtype: np.dtype[Any]) -> float | int | bool:
    if dtype.kind == "b":
        return op == "min"
    if is_integer(dtype.name):
        return integer_limits(dtype.name)[op == "min"]
    return _INF if op == "min" else -_INF


def _tokens(arr: Array, weights: tuple[HostArray | None, ...]) -> tuple[HostArray, list[HostArray]]:
    """The values as (R, M) and what to multiply and to add, (M,) each; all in the widest of their dtypes."""
    x = used_only(arr, arr.values)
    features = x.shape[-1]
    dtype: Any = np.result_type(*(wide(y) for y in (x, *weights) if y is not None))
    flat = x.reshape(-1, features) if x.size else x.reshape(0, features)
    vectors = [
        np.full(features, neutral, dtype) if w is None else np.ascontiguousarray(w, dtype)
        for w, neutral in zip(weights, (1, 0), strict=False)
    ]
    return np.ascontiguousarray(flat, dtype), vectors


def _finished(arr: Array, y: HostArray) -> Array:
    out = y.reshape(arr.values.shape).astype(arr.values.dtype, copy=False)
    return arr.with_values(used_only(arr, out))


def rmsnorm(arr: Array, weight: HostArray | None, eps: float) -> Array:
    """As `scree.kernels.varlen_rmsnorm`."""
    x, (w,) = _tokens(arr, (weight,))
    y = np.empty_like(x)
    _loops.rmsnorm(x, w, x.dtype.type(eps), y)
    return _finished(arr, y)


def layernorm(arr: Array, weight: HostArray | None, bias: HostArray | None, eps: float) -> Array:
    """As `scree.kernels.varlen_layernorm`."""
    x, (w, b) = _tokens(arr, (weight, bias))
    y = np.empty_like(x)
    _loops.layernorm(x, w, b, x.dtype.type(eps), y)
    return _finished(arr, y)


def rope(arr: Array, cos: HostArray, sin: HostArray, interleaved: bool, start: int | HostArray) -> Array:
    """As `scree.kernels.varlen_rope`."""
    values = arr.values
    if not values.size:
        return arr
    dtype: Any = np.result_type(*map(wide, (values, cos, sin)))
    x = np.ascontiguousarray(values.reshape(len(values), -1, values.shape[-1]), dtype)
    offsets = arr._host_offsets("varlen_rope").astype(np.int64, copy=False)
    first = np.broadcast_to(np.asarray(start, np.int64), (arr.batch_size,))
    y = np.empty_like(x)
    y[offsets[-1] :] = 0
    cos, sin = (np.ascontiguousarray(table, dtype) for table in (cos, sin))
    _loops.rope(x, cos, sin, offsets, np.ascontiguousarray(first), interleaved, y)
    return arr.with_values(y.reshape(values.shape).astype(values.dtype, copy=False))
