"""Memory and dtypes of the NumPy room."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..._backends._protocol import HostArray
from ..._check import is_floating

_LINE = 64  # bytes of a cache line


def wide(x: HostArray) -> np.dtype[Any]:
    """The dtype to compute in: float32, or wider where the values are; that of integers and bools. In native byte order."""
    if x.dtype.itemsize < 4 and is_floating(x.dtype.name):
        return np.dtype(np.float32)
    return x.dtype if x.dtype.isnative else x.dtype.newbyteorder("=")


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    """Uninitialised memory that begins at a cache line: where a matrix begins may show in the last bit of a product."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    memory = np.empty(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return memory[skip : skip + size].view(dtype).reshape(shape)


class Scratch:
    """Memory that is used again: aligned, and warm from the second time on."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._memory = aligned((0,), dtype)

    def take(self, shape: tuple[int, ...]) -> HostArray:
        """Give an array whose content is what was there before, and which the next call takes away again."""
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = aligned((max(size, 2 * len(self._memory)),), self._memory.dtype)
        return self._memory[:size].reshape(shape)
