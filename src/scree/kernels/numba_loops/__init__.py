"""Reductions, norms, rotary embedding and attention on NumPy by loops that numba compiles, where numba is installed.

The loops run on the thread that calls them: numba's threads must not be used from two threads at once, nor after a fork.
Attention is that of the room `numpy_blas`, threads included, but for the weights, which are computed in one pass.

The loops are compiled at the first call of a kind, and numba keeps them on disk. Numba itself is not imported before
that.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..._array import Array
from ..._backends._protocol import HostArray
from .._options import AttentionOptions

_KEPT: dict[str, Any] = {}  # "arrays": the module that calls the loops, or what went wrong with its import


def _loaded() -> Any:
    if "arrays" not in _KEPT:
        try:
            _KEPT["arrays"] = importlib.import_module("._arrays", __name__)
        # OSError: a shared library of numba's that cannot be loaded. RuntimeError: no folder to keep its results in.
        except (ImportError, OSError, RuntimeError) as error:
            _KEPT["arrays"] = f"numba cannot be imported: {error}"
    return _KEPT["arrays"]


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    arrays = _loaded()
    return arrays if isinstance(arrays, str) else None


def attend(
    q: Array, k: Array, v: Array, sinks: HostArray | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, block by block."""
    return _loaded().attend(q, k, v, sinks, options)


def varlen_reduce(arr: Array, op: str) -> HostArray:
    """Compute `scree.kernels.varlen_reduce` by loops over the tokens."""
    return _loaded().reduce(arr, op)


def varlen_rmsnorm(arr: Array, weight: HostArray | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm` token by token."""
    return _loaded().rmsnorm(arr, weight, eps)


def varlen_layernorm(
    arr: Array, weight: HostArray | None = None, bias: HostArray | None = None, eps: float = 1e-5
) -> Array:
    """Compute `scree.kernels.varlen_layernorm` token by token."""
    return _loaded().layernorm(arr, weight, bias, eps)


def varlen_rope(arr: Array, cos: HostArray, sin: HostArray, *, interleaved: bool, start: int | HostArray) -> Array:
    """Compute `scree.kernels.varlen_rope` token by token."""
    return _loaded().rope(arr, cos, sin, interleaved, start)
