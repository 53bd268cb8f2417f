"""Rows of one length out of an MLX array, and their results put back in order."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ..._backends._protocol import HostArray, HostInts
from .._rows import Rows

HALVES = (mx.float16, mx.bfloat16)
_CUT = 1 << 12  # elements of a row


def wide(x: mx.array) -> mx.array:
    """The values in float32 or wider; integers and bools as they are."""
    return x.astype(mx.float32) if x.dtype in HALVES else x


def of_host(data: HostArray) -> mx.array:
    """Bring bools to MLX, whose types do not know that it takes them from NumPy."""
    given: Any = data
    return mx.array(given)


def taken(x: mx.array, starts: HostInts, length: int) -> mx.array:
    """The tokens (T, ...) of rows that begin at `starts`: (G, length, ...)."""
    first = int(starts[0])
    if int(starts[-1]) - first == length * (len(starts) - 1):
        return x[first : first + length * len(starts)].reshape(len(starts), length, *x.shape[1:])
    index = starts[:, None] + np.arange(length)
    return mx.take(x, mx.array(index.astype(np.int32 if x.shape[0] < 2**31 else np.int64)), axis=0)


def in_order(parts: list[mx.array], places: list[HostInts], total: int) -> mx.array:
    """Join parts (t_i, ...), whose tokens belong at `places`, in the order of the places: (total, ...)."""
    first = np.array([place[0] if len(place) else -1 for place in places])
    order = np.argsort(first, kind="stable")
    parts, places = [parts[i] for i in order], [places[i] for i in order]  # rows that were alone need no more
    joined = parts[0] if len(parts) == 1 else mx.concatenate(parts, 0)
    flat = np.concatenate(places)
    if np.array_equal(flat, np.arange(total)):
        return joined
    inverse = np.empty(total, np.int64)
    inverse[flat] = np.arange(total)
    return mx.take(joined, mx.array(inverse.astype(np.int32 if total < 2**31 else np.int64)), axis=0)


def separate(part: mx.array, rows: Rows, places: HostInts) -> tuple[list[mx.array], list[HostInts]]:
    """Cut what was computed for rows of many features together, (G, n, ...): a copy of it costs more than the cuts."""
    if len(rows.starts) == 1 or rows.adjacent or rows.length * math.prod(part.shape[2:]) < _CUT:
        return [part.reshape(-1, *part.shape[2:])], [places]
    return list(part), list(places.reshape(len(rows.starts), -1))
