"""Softmax and the reductions along the ragged axis, and their place in PyTorch's autograd and compilers."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from ..._array import Array
from ._launch import is_plain
from ._segment_launch import OPS, Known, backward, forward, known
from ._views import Once, once, under_functorch, why_not_differentiable

_READS_VALUES = (3, 4, 5)  # the reductions whose gradient looks at the values


def why_not(op: str, arr: Array, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    return why_not_differentiable(arr.values)


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`."""
    return Array._make(_segments(0, arr), arr._offsets, arr._ragged_dim, arr._structure)


def varlen_reduce(arr: Array, op: str) -> torch.Tensor:
    """Compute `scree.kernels.varlen_reduce`."""
    return _segments(OPS[op], arr)


def _segments(op: int, arr: Array) -> torch.Tensor:
    x, offsets = arr._values, arr._offsets
    if not is_plain(x, offsets):
        record = _Transformed.apply if under_functorch() else torch.ops.scree.segments_fwd
        return record(op, x, offsets, arr._ragged_dim)
    if x.requires_grad and torch.is_grad_enabled():
        return _Segments.apply(x, (op, offsets, arr._ragged_dim, known(arr)))
    return forward(op, x, offsets, arr._ragged_dim, known(arr))


class _Segments(Function):
    """The kernels to autograd, which looks at each argument: `how` is (op, offsets, ragged_dim, lengths)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, how: tuple[int, torch.Tensor, int, Known]) -> torch.Tensor:
        op, offsets, ragged_dim, lengths = how
        y = forward(op, x, offsets, ragged_dim, lengths)
        ctx.how = op, ragged_dim, lengths, x.shape
        ctx.save_for_backward(y if op == 0 else x if op in _READS_VALUES else None, y, offsets)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, offsets = ctx.saved_tensors
        op, ragged_dim, lengths, shape = ctx.how
        if x is None:  # its shape is all that counts
            x = dy.new_empty(()).expand(shape)
        return backward(op, x, y, dy, offsets, ragged_dim, lengths), None


# Where a compiler or a transformation looks on.


@torch.library.custom_op("scree::segments_fwd", mutates_args=())
def _segments_fwd(op: int, x: torch.Tensor, offsets: torch.Tensor, ragged_dim: int) -> torch.Tensor:
    return forward(op, x, offsets, ragged_dim, Known())


@_segments_fwd.register_fake
def _segments_fwd_fake(op: int, x: torch.Tensor, offsets: torch.Tensor, ragged_dim: int) -> torch.Tensor:
    if op == 0:
        return x.new_empty(x.shape)
    return x.new_empty((offsets.shape[0] - 1, *x.shape[:ragged_dim], *x.shape[ragged_dim + 1 :]))


@torch.library.custom_op("scree::segments_bwd", mutates_args=())
def _segments_bwd(
    op: int, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor, ragged_dim: int
) -> torch.Tensor:
    return backward(op, x, y, dy, offsets, ragged_dim, Known())


@_segments_bwd.register_fake
def _segments_bwd_fake(
    op: int, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor, ragged_dim: int
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.op, x, offsets, ctx.ragged_dim = inputs
    ctx.save_for_backward(output if ctx.op == 0 else x, output, offsets)


def _gradients(ctx: Any, compute: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    return (
        None,
        compute(ctx.op, ctx.saved_tensors[0], ctx.saved_tensors[1], dy, ctx.saved_tensors[2], ctx.ragged_dim),
        None,
        None,
    )


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, torch.ops.scree.segments_bwd, dy)


_segments_fwd.register_autograd(_differentiate, setup_context=_keep)


class _Transformed(Function):
    """The operator for torch.func, which does not take its gradients from operators."""

    forward = staticmethod(_segments_fwd)
    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, _TransformedGradient.apply, dy)


class _TransformedGradient(Once):
    forward = staticmethod(_segments_bwd)
