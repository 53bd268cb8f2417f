"""What the ops on PyTorch's CPU kernels share: memory, host offsets and dtypes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..._backends._protocol import HostInts

_LARGE = 1 << 20  # bytes
_LINE = 64  # bytes: to where torch itself aligns what it allocates


def host(offsets: Tensor) -> HostInts:
    """The offsets, which are on the CPU, as NumPy sees them."""
    return offsets.detach().numpy()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or wider where the values are."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory; large memory from NumPy, which asks the kernel for huge pages where torch does not."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    memory = np.empty(size + _LINE, np.uint8)
    skip = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[skip : skip + size]).view(dtype).view(shape)
