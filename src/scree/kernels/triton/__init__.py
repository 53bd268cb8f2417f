"""The fast kernels for CUDA devices, in Triton: one source for NVIDIA from sm_80 on, and for AMD.

The names are here everywhere. Without PyTorch, Triton or a GPU, calling one says what is missing and how to install it.
The ``_triton`` functions take tensors and `cu_seqlens`; those with the names of the front door are what
`scree.kernels` calls.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import _backends
from ..._array import Array
from ..._backends import Backend
from .._options import AttentionOptions

if TYPE_CHECKING:
    import torch

__all__ = [
    "varlen_attention",
    "varlen_attention_triton",
    "varlen_layernorm",
    "varlen_layernorm_triton",
    "varlen_reduce",
    "varlen_rmsnorm",
    "varlen_rmsnorm_triton",
    "varlen_rope",
    "varlen_softmax",
]

# op -> the module here that launches its kernels
_HOSTS = {
    "varlen_attention": "_attention",
    "varlen_layernorm": "_norm",
    "varlen_reduce": "_segments",
    "varlen_rmsnorm": "_norm",
    "varlen_rope": "_rope",
    "varlen_softmax": "_segments",
}

_LOADED: dict[str, Any] = {}


def attend(
    q: Array, k: Array, v: Array, sinks: torch.Tensor | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, whose arguments were checked."""
    return _host("varlen_attention").attend(q, k, v, sinks, options)


def varlen_attention(q: Array, k: Array, v: Array, causal: bool = False, **options: Any) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`."""
    return _host("varlen_attention").varlen_attention(q, k, v, causal, **options)


def varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool = False,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Attend within each sequence of packed tensors, as `scree.kernels.varlen_attention` does for Arrays.

    Parameters
    ----------
    q : tensor of (T, H, D), float16, bfloat16 or float32, on a CUDA device
        Any strides: a view of a joint QKV tensor is not copied where its last axis is dense.
    k, v : tensor of (T_k, K, D) and (T_k, K, D_v)
        Of the same dtype; H is a multiple of K; D and D_v up to 256.
    cu_seqlens : tensor of (B + 1,), integer
        Sequence i of q is ``q[cu_seqlens[i]:cu_seqlens[i + 1]]``. Never copied to the host. Where it does not start
        at 0, falls, or goes past T, the result is zero throughout.
    causal, scale, window_size, softcap, sinks
        As in `scree.kernels.varlen_attention`.
    cu_seqlens_k : tensor of (B + 1,), integer, optional
        Of k and v, where they are not q's.
    return_lse : bool
        Return the LSE too.
    deterministic : bool
        False lets the gradient of q be added up in no fixed order where that is faster: on Hopper, head dim 128 in 16
        bits, without softcap or a window to the left.

    Returns
    -------
    o : tensor of (T, H, D_v), in the dtype of q
        Zero for tokens beyond ``cu_seqlens[-1]``.
    lse : tensor of (T, H), float32
        Only with `return_lse`.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit; it is named, with what it got and what it needs.
    NotImplementedError
        Triton or a CUDA device is missing, or the kernel does not serve the dtype or the head dim.

    Notes
    -----
    Differentiable in q, k, v and sinks; unless `deterministic` is False two runs give the same bits, and a row does not
    depend, bit for bit, on what it is batched with. Where each program works is kept with `cu_seqlens`, so that all layers share it.

    References
    ----------
    Dao, "FlashAttention-2", 2023, algorithms 1 and 2.
    """
    return _host("varlen_attention").varlen_attention_triton(
        q, k, v, cu_seqlens, causal, cu_seqlens_k, scale, window_size, softcap, sinks, return_lse, deterministic
    )


def varlen_layernorm(
    arr: Array, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> Array:
    """Compute `scree.kernels.varlen_layernorm`."""
    return _host("varlen_layernorm").varlen_layernorm(arr, weight, bias, eps)


def varlen_layernorm_triton(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise a tensor over its last axis: `scree.kernels.varlen_layernorm` for who holds tensors.

    Parameters
    ----------
    x : tensor of (T, ..., M), float16, bfloat16, float32 or float64
        On a CUDA device. Strided views are read where they lie, if the last axis is dense.
    weight, bias : tensor of (M,), optional
    eps : float

    Returns
    -------
    tensor of (T, ..., M)
        Contiguous, in the dtype of `x`; differentiable in `x`, `weight` and `bias`, once.
    """
    return _host("varlen_layernorm").varlen_layernorm_triton(x, weight, bias, eps)


def varlen_rmsnorm(arr: Array, weight: torch.Tensor | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`."""
    return _host("varlen_rmsnorm").varlen_rmsnorm(arr, weight, eps)


def varlen_rmsnorm_triton(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Divide the rows of a tensor by their root mean square: `scree.kernels.varlen_rmsnorm` for who holds tensors.

    Parameters
    ----------
    x : tensor of (T, ..., M), float16, bfloat16, float32 or float64
        On a CUDA device. Strided views are read where they lie, if the last axis is dense.
    weight : tensor of (M,), optional
    eps : float

    Returns
    -------
    tensor of (T, ..., M)
        Contiguous, in the dtype of `x`; differentiable in `x` and `weight`, once.
    """
    return _host("varlen_rmsnorm").varlen_rmsnorm_triton(x, weight, eps)


def varlen_reduce(arr: Array, op: str) -> torch.Tensor:
    """Compute `scree.kernels.varlen_reduce`."""
    return _host("varlen_reduce").varlen_reduce(arr, op)


def varlen_rope(arr: Array, cos: torch.Tensor, sin: torch.Tensor, **options: Any) -> Array:
    """Compute `scree.kernels.varlen_rope`."""
    return _host("varlen_rope").varlen_rope(arr, cos, sin, **options)


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`."""
    return _host("varlen_softmax").varlen_softmax(arr)


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here: what is not installed, or what the kernel does not serve."""
    missing = _missing()
    return missing if missing is not None else _host(op).why_not(op, *args, **options)


def bind(op: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that computes an op of arrays like these, with these options, in little time on the host."""
    host = _host(op)
    special = getattr(host, "bind", None)
    return functools.partial(getattr(host, op), **options) if special is None else special(arrays, options)


def _missing() -> str | None:
    """What has to be installed before any kernel can run, or None."""
    if _LOADED:
        return None
    if importlib.util.find_spec("torch") is None:
        return "it needs PyTorch, which is not installed: pip install 'scree[torch]'"
    if importlib.util.find_spec("triton") is None:
        return "it needs Triton, which is not installed: pip install triton (it comes with PyTorch for CUDA and ROCm)"
    return None


def _host(op: str) -> Any:
    """The module that launches the kernels of an op."""
    found = _LOADED.get(op)
    if found is None:
        _load()
        found = _LOADED[op]
    return found


def _load() -> None:
    missing = _missing()
    if missing is not None:
        raise NotImplementedError(f"scree.kernels.triton: {missing}")
    for op, name in _HOSTS.items():
        _LOADED[op] = importlib.import_module(f".{name}", __name__)
    moves = importlib.import_module("._moves", __name__)
    moves.hand_out()


def _load_for(backend: Backend) -> None:
    """Load with PyTorch where it was built for GPUs: a compiler that traces the first call cannot import."""
    if backend.NAME != "torch" or _missing() is not None:
        return
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        _load()


_backends.on_load(_load_for)
