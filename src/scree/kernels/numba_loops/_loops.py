"""The loops: contiguous arrays, one thread, and for a row the same instructions whatever stands beside it.

Where the order of a sum may be changed, so that it is computed in vectors, it is by the length of the loop alone.
"""

# pyright: basic, reportMissingModuleSource=false
from __future__ import annotations

import numba
import numpy as np

_CHUNK = 128  # terms of a sum that are added up one after the other
_RUN = 4096  # features of a token that are
_VECTORS = {"reassoc", "nsz", "contract"}  # NaN and infinities are what they are


@numba.njit(nogil=True, cache=True)
def add(x, offsets, part, out):
    """Add the tokens (T, F) of each row to out (B, F), in chunks, so that no sum is a long row of additions.

    `part` is memory for one chunk's sum, (F,).
    """
    features = x.shape[1]
    for row in range(len(offsets) - 1):
        for chunk in range(offsets[row], offsets[row + 1], _CHUNK):
            for f in range(features):
                part[f] = x[chunk, f]
            for t in range(chunk + 1, min(chunk + _CHUNK, offsets[row + 1])):
                for f in range(features):
                    part[f] += x[t, f]
            for f in range(features):
                out[row, f] += part[f]


@numba.njit(nogil=True, cache=True)
def largest(x, offsets, out):
    """Find the largest token (T, F) of each row, or NaN; out (B, F) begins with what is never larger."""
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            for f in range(x.shape[1]):
                value, top = x[t, f], out[row, f]
                out[row, f] = value if (value > top or value != value) else top


@numba.njit(nogil=True, cache=True)
def smallest(x, offsets, out):
    """Find the smallest token, as `largest` does the largest."""
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            for f in range(x.shape[1]):
                value, low = x[t, f], out[row, f]
                out[row, f] = value if (value < low or value != value) else low


@numba.njit(nogil=True, cache=True)
def shift(x, offsets, top, out):
    """Subtract from each token (T, F) what its row has in top (B, F)."""
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            for f in range(x.shape[1]):
                out[t, f] = x[t, f] - top[row, f]


@numba.njit(nogil=True, cache=True, fastmath=_VECTORS)
def rmsnorm(x, weight, eps, out):
    """Divide each token (R, M) by the root of its mean square, and multiply by weight (M,)."""
    features = x.shape[1]
    one = x.dtype.type(1)
    for t in range(x.shape[0]):
        total = x.dtype.type(0)
        for run in range(0, features, _RUN):
            part = x.dtype.type(0)
            for f in range(run, min(run + _RUN, features)):
                part += x[t, f] * x[t, f]
            total += part
        scale = one / np.sqrt(total / x.dtype.type(features) + eps)
        for f in range(features):
            out[t, f] = x[t, f] * scale * weight[f]


@numba.njit(nogil=True, cache=True, fastmath=_VECTORS)
def layernorm(x, weight, bias, eps, out):
    """Normalise each token (R, M) to mean 0 and variance 1, times weight (M,), plus bias (M,)."""
    features = x.shape[1]
    zero, one, count = x.dtype.type(0), x.dtype.type(1), x.dtype.type(features)
    for t in range(x.shape[0]):
        mean = zero
        for run in range(0, features, _RUN):
            part = zero
            for f in range(run, min(run + _RUN, features)):
                part += x[t, f]
            mean += part
        mean /= count
        total = zero
        for run in range(0, features, _RUN):
            part = zero
            for f in range(run, min(run + _RUN, features)):
                d = x[t, f] - mean
                part += d * d
            total += part
        scale = one / np.sqrt(total / count + eps)
        for f in range(features):
            out[t, f] = (x[t, f] - mean) * scale * weight[f] + bias[f]


@numba.njit(nogil=True, cache=True)
def rope(x, cos, sin, offsets, start, interleaved, out):
    """Rotate the pairs of each token (T, H, D) by the angles at its place plus start (B,)."""
    half = x.shape[2] // 2
    for row in range(len(offsets) - 1):
        for t in range(offsets[row], offsets[row + 1]):
            place = t - offsets[row] + start[row]
            for head in range(x.shape[1]):
                if interleaved:
                    for f in range(half):
                        x1, x2, c, s = x[t, head, 2 * f], x[t, head, 2 * f + 1], cos[place, f], sin[place, f]
                        out[t, head, 2 * f] = x1 * c - x2 * s
                        out[t, head, 2 * f + 1] = x2 * c + x1 * s
                else:
                    for f in range(half):
                        x1, x2, c, s = x[t, head, f], x[t, head, half + f], cos[place, f], sin[place, f]
                        out[t, head, f] = x1 * c - x2 * s
                        out[t, head, half + f] = x2 * c + x1 * s
