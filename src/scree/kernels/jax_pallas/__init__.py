"""The ops on NVIDIA GPUs from JAX, by kernels that are written in Pallas and compiled by its Triton backend.

JAX calls that backend deprecated. A JAX without it is said to be one, and `jax_xla` answers there.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax
from jax import Array as Dense

from ..._array import Array
from .._options import AttentionOptions

__all__ = ["attend", "varlen_layernorm", "varlen_reduce", "varlen_rmsnorm", "varlen_rope", "varlen_softmax"]

_WIDEST, _WIDEST_TOKEN, _MOST_TOKENS = 256, 8192, 2**31


def attend(
    q: Array, k: Array, v: Array, sinks: jax.Array | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`; Pallas is imported where it is used first."""
    from . import _attention

    return _attention.attend(q, k, v, sinks, options)


def varlen_layernorm(*args: Any, **options: Any) -> Array:
    """Compute `scree.kernels.varlen_layernorm`."""
    from ._norm import varlen_layernorm as norm

    return norm(*args, **options)


def varlen_rmsnorm(*args: Any, **options: Any) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`."""
    from ._norm import varlen_rmsnorm as norm

    return norm(*args, **options)


def varlen_rope(*args: Any, **options: Any) -> Array:
    """Compute `scree.kernels.varlen_rope`."""
    from ._rope import varlen_rope as rope

    return rope(*args, **options)


def varlen_softmax(*args: Any, **options: Any) -> Array:
    """Compute `scree.kernels.varlen_softmax`."""
    from ._segments import varlen_softmax as softmax

    return softmax(*args, **options)


def varlen_reduce(*args: Any, **options: Any) -> Dense:
    """Compute `scree.kernels.varlen_reduce`."""
    from ._segments import varlen_reduce as reduce

    return reduce(*args, **options)


def why_not(op: str, arr: Array, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here, from metadata alone."""
    others = (*args, *options.values())
    most = max(a.total_length for a in (arr, *others) if isinstance(a, Array))
    if most >= _MOST_TOKENS:
        return f"serves fewer than 2**31 tokens, got {most}"
    if any(getattr(x, "ndim", 0) and str(x.dtype) == "float64" for x in others):
        return f"serves {arr.values.dtype} beside no float64"
    if op == "varlen_attention":
        widest = max(arr.values.shape[2], args[1].values.shape[2])
        if widest > _WIDEST:
            return f"serves head dims up to {_WIDEST}, got {widest}"
    elif op in ("varlen_layernorm", "varlen_rmsnorm", "varlen_rope") and arr.values.shape[-1] > _WIDEST_TOKEN:
        return f"serves up to {_WIDEST_TOKEN} features, got {arr.values.shape[-1]}"
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
