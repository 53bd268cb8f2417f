"""The loops: contiguous arrays, one thread, and for a row the same instructions whatever stands beside it.

Where the order of a sum may be changed, so that it is computed in vectors, it is by the length of the loop alone.
"""

# pyright: basic, reportMissingModuleSource=false
from __future__ import annotations

import numba
import numpy as np

_CHUNK = 128  # terms of a sum that are added up one after the other
_RUN = 4096  # features of a token that are
_LOWEST = np.float32(-87.33654)  # whose exponential is the least normal number
_LOG2_E = np.float32(1.442695)
_LN_2, _LN_2_REST = (
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)  # ln 2 in two parts: products with the first are exact
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


@numba.njit(nogil=True, cache=True, fastmath={"nsz", "contract"})
def _exp(x):
    """exp(x) of a float32, to two units in the last place; 0 where it is no normal number, and for x above 0 undefined.

    It is 2^n * exp(d) with d = x - n * ln 2, at most ln 2 / 2, and a polynomial for exp(d): in vectors, as a call of exp
    would not be. The order of the subtractions matters here.
    """
    inside = x if x > _LOWEST else _LOWEST  # not NaN, which is no integer
    n = np.floor(inside * _LOG2_E + np.float32(0.5))
    d = (_LOWEST if x < _LOWEST else x) - n * _LN_2
    d -= n * _LN_2_REST
    p = np.float32(0.00138145399)
    p = p * d + np.float32(0.00836874513)
    p = p * d + np.float32(0.0416683908)
    p = p * d + np.float32(0.166665204)
    p = p * d + np.float32(0.499999934)
    e = p * d * d + d + np.float32(1)
    e *= np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # the bits of 2^n
    return np.float32(0) if x <= _LOWEST else e


@numba.njit(nogil=True, cache=True, fastmath=_VECTORS)
def weigh(s, top, total):
    """Put exp(s - top) into the scores s (R, keys), float32, and its sums into total (R,); top is (R,)."""
    for row in range(s.shape[0]):
        part = np.float32(0)
        for key in range(s.shape[1]):
            e = _exp(s[row, key] - top[row])
            s[row, key] = e
            part += e
        total[row] = part
