"""Attention on Apple GPUs, by a Metal kernel over the packed tokens. NOT RUN: nobody has run it on an Apple GPU yet.

What is tested is its arithmetic: the body of the kernel, compiled as C++ and run on the CPU. So it serves on request
alone, `implementation="mlx_metal"`. Its backward is that of `mlx_fast`.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..._array import Array
from ._attention import attend

__all__ = ["attend"]

_MOST = 256  # elements of a head that the lanes of a simdgroup hold in their registers


def why_not(op: str, q: Array, k: Array, v: Array, *args: Any) -> str | None:
    """Say what speaks against computing this call here."""
    if not mx.metal.is_available():
        return (
            "it is a Metal kernel for Apple GPUs, not run on any yet, and MLX has no Metal device here "
            "(mx.metal.is_available() is False)"
        )
    for name, arr in (("q", q), ("v", v)):
        if arr.values.shape[2] > _MOST:
            return f"its head dims go up to {_MOST}, {name} has {arr.values.shape[2]}"
    return None
