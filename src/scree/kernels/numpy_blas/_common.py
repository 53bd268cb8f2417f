"""Memory and dtypes of the NumPy room."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..._backends._protocol import HostArray
from ..._check import is_floating

_LINE = 64  # bytes of a cache line


def wide(x: HostArray) -> np.dtype[Any]:
    """The dtype to compute in: float32, or wider where the values are; that of integers and bools."""
    return np.dtype(np.float32) if x.dtype.itemsize < 4 and is_floating(x.dtype.name) else x.dtype


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    """Uninitialised memory that begins at a cache line: where a matrix begins may show in the last bit of a product."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    memory = np.empty(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return memory[skip : skip + size].view(dtype).reshape(shape)
