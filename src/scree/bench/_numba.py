"""Plain loops for numba, as one would write them by hand: rows, or tokens, in parallel."""

# pyright: basic, reportMissingModuleSource=false
from __future__ import annotations

from typing import Any

import numba
import numpy as np


@numba.njit(parallel=True, fastmath=True)
def softmax(x: Any, offsets: Any, out: Any) -> Any:
    """Softmax along each row of (T, F)."""
    for row in numba.prange(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        if a == b:
            continue
        top = x[a].copy()
        for t in range(a + 1, b):
            for f in range(x.shape[1]):
                top[f] = max(top[f], x[t, f])
        total = np.zeros_like(top)
        for t in range(a, b):
            for f in range(x.shape[1]):
                e = np.exp(x[t, f] - top[f])
                out[t, f] = e
                total[f] += e
        for t in range(a, b):
            for f in range(x.shape[1]):
                out[t, f] /= total[f]
    return out


@numba.njit(parallel=True, fastmath=True)
def add(x: Any, offsets: Any, out: Any) -> Any:
    """Add up each row of (T, F) into zeros (B, F)."""
    for row in numba.prange(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            for f in range(x.shape[1]):
                out[row, f] += x[t, f]
    return out


@numba.njit(parallel=True, fastmath=True)
def largest(x: Any, offsets: Any, out: Any) -> Any:
    """Find the largest of each row of (T, F), beginning with -inf (B, F)."""
    for row in numba.prange(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            for f in range(x.shape[1]):
                out[row, f] = max(out[row, f], x[t, f])
    return out


@numba.njit(parallel=True, fastmath=True)
def rmsnorm(x: Any, weight: Any, eps: Any, out: Any) -> Any:
    """Normalise each token of (T, F)."""
    for t in numba.prange(x.shape[0]):
        total = np.float32(0)
        for f in range(x.shape[1]):
            total += x[t, f] * x[t, f]
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for f in range(x.shape[1]):
            out[t, f] = x[t, f] * scale * weight[f]
    return out


@numba.njit(parallel=True, fastmath=True)
def layernorm(x: Any, weight: Any, bias: Any, eps: Any, out: Any) -> Any:
    """Normalise each token of (T, F)."""
    for t in numba.prange(x.shape[0]):
        mean = np.float32(0)
        for f in range(x.shape[1]):
            mean += x[t, f]
        mean /= np.float32(x.shape[1])
        total = np.float32(0)
        for f in range(x.shape[1]):
            d = x[t, f] - mean
            total += d * d
        scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[1]) + eps)
        for f in range(x.shape[1]):
            out[t, f] = (x[t, f] - mean) * scale * weight[f] + bias[f]
    return out
