"""What the kernels for memory-bound ops share: how a tensor lies in memory, and who cannot be served."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._C._functorch as functorch
import triton.language as tl
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that the floating kernels load and store."""


def like(x: torch.Tensor) -> torch.Tensor:
    """Memory for a contiguous tensor like x, in as little time as PyTorch takes."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def flat(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a tensor (size,), in as little time as PyTorch takes."""
    return torch.empty_strided((size,), (1,), dtype=dtype, device=device)


class Rows(NamedTuple):
    """The rows of a tensor along its last axis, which is dense.

    `layout` 0 is one behind the other, 1 at one stride, and 2 at ``(r // inner) * stride_outer + (r % inner) * stride``
    for row r.
    """

    layout: int
    number: int
    inner: int
    stride_outer: int
    stride: int


def rows_of(x: torch.Tensor) -> Rows | None:
    """How the rows of x lie, or None where that takes more than two strides, or where the last axis is not dense."""
    shape = x.shape
    features = shape[-1]
    count = x.numel() // features if features else 0
    if x.is_contiguous():
        return Rows(0, count, 1, 0, features)
    strides = x.stride()
    if features > 1 and strides[-1] != 1:
        return None
    axes: list[tuple[int, int]] = []  # (size, stride), the last one first, those that are one in memory joined
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, stride))
    if len(axes) <= 1:
        return Rows(1, count, 1, 0, axes[0][1] if axes else features)
    if len(axes) == 2:
        return Rows(2, count, axes[0][0], axes[1][1], axes[0][1])
    return None


def specialised(stride: int) -> int:
    """What of a stride a kernel is specialised for, which has to be in a Launcher's key: 0, 1 or 16."""
    return 1 if stride == 1 else 0 if stride % 16 else 16


def wide(dtype: torch.dtype) -> Any:
    """The dtype to compute in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class Once(Function):
    """A function for torch.func whose gradient is refused: the gradient of a gradient."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(
            "scree.kernels: Triton's kernels are differentiable once; implementation='reference' is twice"
        )


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a gradient be computed that has none itself: PyTorch's `once_differentiable` where that makes a difference."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def gradient(ctx: Any, *grads: torch.Tensor) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return gradient


def under_functorch() -> bool:
    """Whether a transformation of torch.func looks on, rather than a compiler."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_dual(x: torch.Tensor) -> bool:
    """Whether x carries a tangent of forward-mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def why_not_differentiable(*tensors: torch.Tensor | None) -> str | None:
    """Say which of PyTorch's transformations looks on that the kernels have no rule for."""
    if torch.compiler.is_compiling():
        return None
    if under_functorch():
        for level in functorch.get_interpreter_stack() or ():
            if level.key() != functorch.TransformType.Grad:
                return "it has no rule for torch.func's vmap, jvp and functionalize"
    if any(x is not None and is_dual(x) for x in tensors):
        return "it has no rule for forward-mode differentiation"
    return None
