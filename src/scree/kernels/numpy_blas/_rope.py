"""Rotary position embedding, some tokens at a time, so that what one product reads the next still finds in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray
from .._rows import places
from ._common import wide

_BLOCK = 1 << 17  # elements of a block of tokens


def _looked_up(table: HostArray, at: HostArray, inside: HostArray | None, dtype: np.dtype[Any]) -> HostArray:
    """table[at], (tokens, 1, D/2); NaN where `at` is outside of the table."""
    if not len(table):
        return np.full((len(at), 1, table.shape[1]), np.nan, dtype)
    found = table.take(at, axis=0).astype(dtype, copy=False)
    if inside is not None:
        found[~inside] = np.nan
    return found[:, None]


def _halves(x: HostArray, interleaved: bool) -> tuple[HostArray, HostArray]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def varlen_rope(arr: Array, cos: HostArray, sin: HostArray, *, interleaved: bool, start: int | HostArray) -> Array:
    """Compute `scree.kernels.varlen_rope`, block by block."""
    values = arr.values
    if not values.size:
        return arr
    dtype: Any = np.result_type(*map(wide, (values, cos, sin)))
    x = values.reshape(len(values), -1, values.shape[-1])
    at = places(arr._host_offsets("varlen_rope"), start)
    inside = (at >= 0) & (at < len(cos))
    whole, at = bool(inside.all()), np.where(inside, at, 0)
    out = np.empty(x.shape, x.dtype)
    out[len(at) :] = 0
    step = max(1, _BLOCK // max(x.shape[1] * x.shape[2], 1))
    product = np.empty((step, x.shape[1], x.shape[2] // 2), dtype)
    for t in range(0, len(at), step):
        some = slice(t, min(t + step, len(at)))
        c, s = (_looked_up(table, at[some], None if whole else inside[some], dtype) for table in (cos, sin))
        part = x[some].astype(dtype, copy=False)
        y = out[some] if out.dtype == dtype else np.empty(part.shape, dtype)
        (x1, x2), (y1, y2) = _halves(part, interleaved), _halves(y, interleaved)
        z = product[: len(part)]
        np.multiply(x1, c, out=y1)
        y1 -= np.multiply(x2, s, out=z)
        np.multiply(x2, c, out=y2)
        y2 += np.multiply(x1, s, out=z)
        if y.dtype != out.dtype:
            out[some] = y
    return arr.with_values(out.reshape(values.shape))
