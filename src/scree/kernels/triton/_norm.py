"""Layer and RMS norm: launching their kernels, and their place in PyTorch's autograd and compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ..._array import Array
from ._launch import is_plain, refuse_device
from ._norm_launch import backward, forward
from ._views import FLOATING, Once, once, under_functorch, why_not_differentiable


def why_not(op: str, arr: Array, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    weights = [x for x in args if isinstance(x, torch.Tensor)]
    for x in weights:
        if x.dtype not in FLOATING:
            return f"it takes no weights of dtype {x.dtype}"
    return why_not_differentiable(arr.values, *weights)


def varlen_rmsnorm(arr: Array, weight: torch.Tensor | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`."""
    return _of_array(arr, weight, None, eps, False)


def varlen_layernorm(
    arr: Array, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> Array:
    """Compute `scree.kernels.varlen_layernorm`."""
    return _of_array(arr, weight, bias, eps, True)


def _of_array(arr: Array, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, centered: bool) -> Array:
    spare = arr._offsets if arr._structure.spare else None
    y = _norm(arr._values, weight, bias, spare, eps, centered, arr._ragged_dim)
    return Array._make(y, arr._offsets, arr._ragged_dim, arr._structure)


def varlen_rmsnorm_triton(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Compute `scree.kernels.triton.varlen_rmsnorm_triton`."""
    _check("varlen_rmsnorm_triton", x, {"weight": weight})
    return _norm(x, weight, None, None, eps, False, 0)


def varlen_layernorm_triton(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Compute `scree.kernels.triton.varlen_layernorm_triton`."""
    _check("varlen_layernorm_triton", x, {"weight": weight, "bias": bias})
    return _norm(x, weight, bias, None, eps, True, 0)


def _check(op: str, x: torch.Tensor, weights: dict[str, torch.Tensor | None]) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}; needs a tensor (T, ..., M)")
    refuse_device(op, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; needs (T, ..., M)")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: x has dtype {x.dtype}; needs float16, bfloat16, float32 or float64")
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(weight.shape)}; needs ({x.shape[-1]},), the last axis of x"
            )
        if weight.device != x.device:
            raise ValueError(f"{op}: {name} is on {weight.device}, x is on {x.device}; they must agree")
        if weight.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {weight.dtype}; needs float16, bfloat16, float32 or float64")


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    eps: float,
    centered: bool,
    ragged_dim: int,
) -> torch.Tensor:
    """Normalise over the last axis; `offsets` only where tokens may lie beyond the last sequence."""
    if not is_plain(x, weight, bias):
        record = _Transformed.apply if under_functorch() else torch.ops.scree.norm_fwd
        return record(x, weight, bias, offsets, eps, centered, ragged_dim)[0]
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad)
    ):
        return _Norm.apply(x, weight, bias, (offsets, eps, centered, ragged_dim))
    return forward(x, weight, bias, offsets, eps, centered, ragged_dim, False)[0]


class _Norm(Function):
    """The kernels to autograd, which looks at each argument: `how` is (offsets, eps, centered, ragged_dim)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, how: tuple[Any, ...]
    ) -> torch.Tensor:
        offsets, eps, centered, ragged_dim = how
        y, stats = forward(x, weight, bias, offsets, eps, centered, ragged_dim, True)
        ctx.save_for_backward(x, weight, stats, offsets)
        ctx.how = x.dtype if bias is None else bias.dtype, centered, ragged_dim
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, stats, offsets = ctx.saved_tensors
        bias_dtype, centered, ragged_dim = ctx.how
        needs = ctx.needs_input_grad[:3]
        return *backward(dy, x, weight, stats, offsets, bias_dtype, centered, ragged_dim, *needs), None


# Where a compiler or a transformation looks on: operators of PyTorch's, with their shapes and their gradients.


@torch.library.custom_op("scree::norm_fwd", mutates_args=())
def _norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    eps: float,
    centered: bool,
    ragged_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(x, weight, bias, offsets, eps, centered, ragged_dim, True)


@_norm_fwd.register_fake
def _norm_fwd_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    eps: float,
    centered: bool,
    ragged_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty((2 * rows if centered else rows,), dtype=dtype)


@torch.library.custom_op("scree::norm_bwd", mutates_args=())
def _norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    offsets: torch.Tensor | None,
    bias_dtype: torch.dtype,
    centered: bool,
    ragged_dim: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs = (needs_x, needs_weight, needs_bias)
    grads = backward(dy, x, weight, stats, offsets, bias_dtype, centered, ragged_dim, *needs)
    dx, dweight, dbias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dweight, dbias


@_norm_bwd.register_fake
def _norm_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    offsets: torch.Tensor | None,
    bias_dtype: torch.dtype,
    centered: bool,
    ragged_dim: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features = x.shape[-1]
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty((features if needs_weight else 0,), dtype=x.dtype if weight is None else weight.dtype),
        x.new_empty((features if needs_bias else 0,), dtype=bias_dtype),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, offsets, _, ctx.centered, ctx.ragged_dim = inputs
    ctx.save_for_backward(x, weight, output[1], offsets)
    ctx.bias_dtype = x.dtype if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: torch.Tensor, dstats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, torch.ops.scree.norm_bwd, dy)


def _gradients(ctx: Any, compute: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, stats, offsets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = compute(dy, x, weight, stats, offsets, ctx.bias_dtype, ctx.centered, ctx.ragged_dim, *needs)
    return (*(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None, None)


_norm_fwd.register_autograd(_differentiate, setup_context=_keep)


class _Transformed(Function):
    """The operator for torch.func, which does not take its gradients from operators."""

    forward = staticmethod(_norm_fwd)
    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dstats: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, _TransformedGradient.apply, dy)


class _TransformedGradient(Once):
    forward = staticmethod(_norm_bwd)
