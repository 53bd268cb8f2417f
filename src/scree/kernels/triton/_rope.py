"""Rotary position embedding: launching its kernel, and its place in PyTorch's autograd and compilers."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.autograd import Function

from ... import _offsets
from ..._array import Array
from ..._backends import load
from . import _rope_kernels as kernels
from ._launch import Launcher, device_number, is_plain
from ._segment_launch import Known
from ._segment_launch import forward as reduce_segments
from ._views import FLOATING, Once, like, once, specialised, under_functorch, why_not_differentiable, wide

_LAUNCHERS: dict[Any, Launcher] = {}


def why_not(op: str, arr: Array, cos: torch.Tensor, sin: torch.Tensor, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    for x in (cos, sin):
        if x.dtype not in FLOATING:
            return f"it takes no tables of dtype {x.dtype}"
    return why_not_differentiable(arr.values, cos, sin)


def varlen_rope(
    arr: Array, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False, start: Any = None
) -> Array:
    """Compute `scree.kernels.varlen_rope`."""
    x, offsets = arr._values, arr._offsets
    starts = start if isinstance(start, torch.Tensor) else None
    begin = start if isinstance(start, int) else 0
    if not is_plain(x, cos, sin, offsets, starts):
        record = _Transformed.apply if under_functorch() else torch.ops.scree.rope_fwd
        y = record(x, cos, sin, offsets, starts, begin, interleaved, False)
    elif torch.is_grad_enabled() and (x.requires_grad or cos.requires_grad or sin.requires_grad):
        y = _Rope.apply(x, cos, sin, (offsets, starts, begin, interleaved))
    else:
        y = _forward(x, cos, sin, offsets, starts, begin, interleaved, False)
    return Array._make(y, offsets, 0, arr._structure)


def tile(heads: int, half: int) -> tuple[int, int, int]:
    """Tokens and heads of a program, and its warps."""
    block = min(triton.next_power_of_2(heads), max(1, 2048 // half))
    return max(1, min(16, 2048 // (block * half))), block, 4


def _forward(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor | None,
    begin: int,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    y = like(x)
    if y.numel() == 0:
        return y
    tokens, dim = x.shape[0], x.shape[-1]
    heads = y.numel() // (tokens * dim)
    stride_t, stride_h = heads * dim, dim
    if not x.is_contiguous():
        if x.ndim == 3 and x.stride(2) == 1:
            stride_t, stride_h = x.stride(0), x.stride(1)
        else:
            x = x.contiguous()
    device = device_number(x)
    key = (
        device, x.dtype, cos.dtype, sin.dtype, offsets.dtype, None if starts is None else starts.dtype, heads, dim,
        specialised(stride_t), specialised(stride_h), interleaved, inverse,
    )  # fmt: skip
    half = triton.next_power_of_2(dim // 2)
    size, block, warps = tile(heads, half)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {
            "H": heads,
            "D": dim,
            "INTERLEAVED": interleaved,
            "INVERSE": inverse,
            "STARTS": starts is not None,
            "ACC": wide(x.dtype),
            "TOKENS": size,
            "HEADS": block,
            "HALF": half,
        }
        # Which products become one operation with their sum would depend on the strides, and so would the bits.
        exact: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
        launch = _LAUNCHERS[key] = Launcher(kernels._rope_fwd_kernel, device, constants, **exact)
    rows, blocks = offsets.shape[0] - 1, -(-heads // block)
    tensors = (x, cos.contiguous(), sin.contiguous(), offsets, offsets if starts is None else starts.contiguous(), y)
    scalars = (blocks, tokens, rows, rows.bit_length(), cos.shape[0], begin, stride_t, stride_h)
    launch((blocks * -(-tokens // size), 1, 1), tensors, scalars)
    return y


class _Rope(Function):
    """The kernel to autograd, which looks at each argument: `how` is (offsets, starts, begin, interleaved)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, how: tuple[Any, ...]) -> torch.Tensor:
        offsets, starts, begin, interleaved = how
        ctx.how = begin, interleaved
        ctx.save_for_backward(x if cos.requires_grad or sin.requires_grad else None, cos, sin, offsets, starts)
        return _forward(x, cos, sin, offsets, starts, begin, interleaved, False)

    @staticmethod
    @once
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, cos, sin, offsets, starts = ctx.saved_tensors
        begin, interleaved = ctx.how
        dx = _forward(dy, cos, sin, offsets, starts, begin, interleaved, True) if ctx.needs_input_grad[0] else None
        tables = (None, None)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            tables = _table_gradients(x, dy, cos, sin, offsets, starts, begin, interleaved)
        return dx, *tables, None


def _table_gradients(
    x: torch.Tensor,
    dy: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor | None,
    begin: int,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens sorted by their position, and added up in that order: always the same sum."""
    xp: Any = load("torch")
    tokens, half = x.shape[0], x.shape[-1] // 2
    positions = _offsets.position_ids(xp, offsets, tokens)
    positions = _offsets.shifted_positions(xp, positions, offsets, begin if starts is None else starts, spare=True)
    used = _offsets.is_used(xp, offsets, tokens) & (positions >= 0)
    positions = torch.where(used, positions, cos.shape[0]).clamp(max=cos.shape[0])
    positions, order = torch.sort(positions.long(), stable=True)
    bounds = torch.searchsorted(positions, torch.arange(cos.shape[0] + 1, device=x.device))
    heads = math.prod(x.shape[1:-1])
    x, dy = (xp.upcast(t).reshape(tokens, heads, 2 * half) for t in (x, dy))
    if interleaved:
        x1, x2, dy1, dy2 = x[..., 0::2], x[..., 1::2], dy[..., 0::2], dy[..., 1::2]
    else:
        x1, x2, dy1, dy2 = x[..., :half], x[..., half:], dy[..., :half], dy[..., half:]
    along, across = (dy1 * x1 + dy2 * x2).sum(1), (dy2 * x1 - dy1 * x2).sum(1)
    both = torch.cat([along, across], 1).index_select(0, order)
    sums = reduce_segments(1, both, bounds, 0, Known())
    return sums[:, :half].to(cos.dtype), sums[:, half:].to(sin.dtype)


# Where a compiler or a transformation looks on.


@torch.library.custom_op("scree::rope_fwd", mutates_args=())
def _rope_fwd(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor | None,
    begin: int,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    return _forward(x, cos, sin, offsets, starts, begin, interleaved, inverse)


@_rope_fwd.register_fake
def _rope_fwd_fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("scree::rope_bwd", mutates_args=())
def _rope_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor | None,
    begin: int,
    interleaved: bool,
    needs_tables: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = _forward(dy, cos, sin, offsets, starts, begin, interleaved, True)
    if not needs_tables:
        return dx, cos.new_empty(0), sin.new_empty(0)
    dcos, dsin = _table_gradients(x, dy, cos, sin, offsets, starts, begin, interleaved)
    return dx, dcos.contiguous(), dsin.contiguous()


@_rope_bwd.register_fake
def _rope_bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor,
    starts: torch.Tensor | None,
    begin: int,
    interleaved: bool,
    needs_tables: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = cos.shape if needs_tables else (0,)
    return dy.new_empty(dy.shape), cos.new_empty(shape), sin.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, cos, sin, offsets, starts, *ctx.how, inverse = inputs
    if inverse:
        raise NotImplementedError("scree::rope_fwd: only the gradient turns back, and it is differentiable once")
    ctx.save_for_backward(x, cos, sin, offsets, starts)


def _gradients(ctx: Any, compute: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = compute(dy, *ctx.saved_tensors, *ctx.how, bool(needs[1] or needs[2]))
    return (*(g if needed else None for g, needed in zip(grads, needs, strict=True)), None, None, None, None, None)


def _differentiate(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, torch.ops.scree.rope_bwd, dy)


_rope_fwd.register_autograd(_differentiate, setup_context=_keep)


class _Transformed(Function):
    """The operator for torch.func, which does not take its gradients from operators."""

    forward = staticmethod(_rope_fwd)
    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients(ctx, _TransformedGradient.apply, dy)


class _TransformedGradient(Once):
    forward = staticmethod(_rope_bwd)
