"""Norms over the last axis, some tokens at a time, so that what one pass reads the next still finds in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..._array import Array
from ..._backends._protocol import HostArray
from .._rows import used_only
from ._common import wide

_BLOCK = 1 << 18  # elements of a block of tokens: smaller ones cost more calls than the second-level cache is worth


def _blocks(arr: Array, weights: tuple[HostArray | None, ...], norm: Callable[..., None]) -> Array:
    """Call norm(x, y, *weights) on blocks (R, M) of tokens, where y is to be filled; all in the wide dtype."""
    x = used_only(arr, arr.values)
    flat = x.reshape(-1, x.shape[-1]) if x.size else x.reshape(0, x.shape[-1])
    dtype = np.result_type(wide(x), *(wide(w) for w in weights if w is not None))
    given = [None if w is None else w.astype(dtype, copy=False) for w in weights]
    out = np.empty(flat.shape, x.dtype)
    step = max(1, _BLOCK // max(x.shape[-1], 1))
    for t in range(0, len(flat), step):
        part = flat[t : t + step].astype(dtype, copy=False)
        y = out[t : t + step] if out.dtype == dtype else np.empty(part.shape, dtype)
        norm(part, y, *given)
        if y.dtype != out.dtype:
            out[t : t + step] = y
    return arr.with_values(used_only(arr, out.reshape(x.shape)))


def _scale(x: HostArray, eps: float) -> HostArray:
    """1 / sqrt(mean(x**2) + eps), (R, 1)."""
    mean = np.einsum("ij,ij->i", x, x)
    mean *= x.dtype.type(1.0 / x.shape[1])
    mean += x.dtype.type(eps)
    np.sqrt(mean, out=mean)
    return np.reciprocal(mean, out=mean)[:, None]


def varlen_rmsnorm(arr: Array, weight: HostArray | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`, block by block."""

    def norm(x: HostArray, y: HostArray, w: HostArray | None) -> None:
        np.multiply(x, _scale(x, eps), out=y)
        if w is not None:
            y *= w

    return _blocks(arr, (weight,), norm)


def varlen_layernorm(
    arr: Array, weight: HostArray | None = None, bias: HostArray | None = None, eps: float = 1e-5
) -> Array:
    """Compute `scree.kernels.varlen_layernorm`, block by block."""

    def norm(x: HostArray, y: HostArray, w: HostArray | None, b: HostArray | None) -> None:
        mean: Any = np.add.reduce(x, axis=1, keepdims=True)
        mean *= x.dtype.type(1.0 / x.shape[1])
        np.subtract(x, mean, out=y)
        y *= _scale(y, eps)
        if w is not None:
            y *= w
        if b is not None:
            y += b

    return _blocks(arr, (weight, bias), norm)
