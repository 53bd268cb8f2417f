"""Norms over the last axis by `mx.fast`."""

from __future__ import annotations

import mlx.core as mx

from ..._array import Array
from .._rows import used_only
from ._common import wide


def varlen_rmsnorm(arr: Array, weight: mx.array | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm` by `mx.fast.rms_norm`."""
    x = wide(used_only(arr, arr.values))
    y = x if 0 in x.shape else mx.fast.rms_norm(x, None, eps)
    return _finished(arr, y, weight, None)


def varlen_layernorm(
    arr: Array, weight: mx.array | None = None, bias: mx.array | None = None, eps: float = 1e-5
) -> Array:
    """Compute `scree.kernels.varlen_layernorm` by `mx.fast.layer_norm`."""
    x = wide(used_only(arr, arr.values))
    y = x if 0 in x.shape else mx.fast.layer_norm(x, None, None, eps)
    return _finished(arr, y, weight, bias)


def _finished(arr: Array, y: mx.array, weight: mx.array | None, bias: mx.array | None) -> Array:
    y = y if weight is None else y * wide(weight)
    y = y if bias is None else y + wide(bias)
    return arr.with_values(used_only(arr, y.astype(arr.values.dtype)))
