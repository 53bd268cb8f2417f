"""Norms over the last axis, token by token."""

from __future__ import annotations

from ..._array import Array
from ..._backends import Backend, Dense
from .. import _contract
from .._rows import used_only


def varlen_layernorm(arr: Array, weight: Dense | None = None, bias: Dense | None = None, eps: float = 1e-5) -> Array:
    """Compute `scree.kernels.varlen_layernorm`: (x - mean) / sqrt(mean((x - mean)**2) + eps) * weight + bias."""
    eps = _contract.norm("varlen_layernorm", arr, {"weight": weight, "bias": bias}, eps)
    xp = arr._xp
    x = used_only(arr, xp.upcast(arr.values))
    x = x - _mean(xp, x)
    y = x * _rsqrt(xp, _mean(xp, x * x) + eps)
    if weight is not None:
        y = y * xp.upcast(weight)
    if bias is not None:
        y = y + xp.upcast(bias)
    return arr.with_values(xp.cast_like(used_only(arr, y), arr.values))


def varlen_rmsnorm(arr: Array, weight: Dense | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`: x / sqrt(mean(x**2) + eps) * weight."""
    eps = _contract.norm("varlen_rmsnorm", arr, {"weight": weight}, eps)
    xp = arr._xp
    x = used_only(arr, xp.upcast(arr.values))
    y = x * _rsqrt(xp, _mean(xp, x * x) + eps)
    if weight is not None:
        y = y * xp.upcast(weight)
    return arr.with_values(xp.cast_like(used_only(arr, y), arr.values))


def _rsqrt(xp: Backend, x: Dense) -> Dense:
    return 1.0 / xp.sqrt(x)


def _mean(xp: Backend, x: Dense) -> Dense:
    """The mean over the last axis, (..., 1): the sum by halves, in elementwise additions.

    How a framework's own sum groups its terms may depend on how many tokens there are, and with it a token's last bit;
    and a compiler may turn a division by a broadcast number into a product for some shapes. Products stay products.
    """
    n = features = x.shape[-1]
    while n > 1:
        half = (n + 1) // 2
        folded = x[..., : n - half] + x[..., half:n]
        x = xp.concat([folded, x[..., n - half : half]], x.ndim - 1) if n % 2 else folded
        n = half
    return x * (1.0 / max(features, 1))
