"""Attention on NVIDIA GPUs from JAX, by kernels that are written in Pallas and compiled by its Triton backend.

JAX calls that backend deprecated. A JAX without it is said to be one, and `jax_xla` answers there.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax

from ..._array import Array
from .._options import AttentionOptions

__all__ = ["attend"]

_WIDEST = 256


def attend(
    q: Array, k: Array, v: Array, sinks: jax.Array | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`; Pallas is imported where it is used first."""
    from . import _attention

    return _attention.attend(q, k, v, sinks, options)


def why_not(op: str, q: Array, k: Array, v: Array, *args: Any) -> str | None:
    """Say what speaks against computing this call here, from metadata alone."""
    widest = max(q.values.shape[2], v.values.shape[2])
    if widest > _WIDEST:
        return f"serves head dims up to {_WIDEST}, got {widest}"
    return why_not_here()


def why_not_here() -> str | None:
    """Say why JAX's first device cannot run the kernels."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and JAX's default backend is {jax.default_backend()}"
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0"))
    if not device.device_kind.startswith("NVIDIA") or int(capability.split(".")[0]) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, got {device.device_kind} of {capability}"
    if not _has_triton():
        return f"needs Pallas's Triton backend with load, store and CompilerParams, which JAX {jax.__version__} lacks"
    return None


def _has_triton() -> bool:
    if find_spec("jax.experimental.pallas.triton") is None:
        return False
    from jax.experimental.pallas import triton

    return all(hasattr(triton, name) for name in ("load", "store", "CompilerParams"))
