"""Norms over the last axis, some tokens at a time, so that what one pass reads the next still finds in the cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._array import Array
from .._rows import used_only
from ._common import Operator, empty, wide

_BLOCK = 1 << 19  # elements of a block of tokens: small for the cache, and large beside the cost of waking threads
_RECYCLED = 1 << 25  # bytes: torch gets less than this from what malloc had before, and pays for no new pages


def _step(features: int) -> int:
    return max(2, _BLOCK // max(features, 1))


def _at_once(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch's kernel may as well go over all tokens: nothing is converted, and its results lie in warm memory."""
    return x.dtype == dtype and x.numel() * x.element_size() < _RECYCLED


def _sum(x: Tensor) -> Tensor:
    """Sum over the last axis of (R, M), (R, 1): one token is summed beside itself, as torch would split it up alone."""
    if x.shape[0] == 1:
        return torch.cat((x, x)).sum(-1, keepdim=True)[:1]
    return x.sum(-1, keepdim=True)


def _rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x**2) + eps), (R, 1)."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()


def _dtype(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    dtype = wide(x.dtype)
    for weight in weights:
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


def _wide(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.to(dtype)


def _rmsnorm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dtype = _dtype(x, weight)
    w = _wide(weight, dtype)
    out = empty(tuple(x.shape), x.dtype, x.device)
    step = _step(x.shape[1])
    for t in range(0, x.shape[0], step):
        part = x[t : t + step].to(wide(x.dtype))
        r, y = _rms(part, eps), out[t : t + step]
        if w is None and y.dtype == part.dtype:
            torch.mul(part, r, out=y)
        elif w is None:
            y.copy_(part * r)
        elif y.dtype == dtype:
            torch.mul(part, r, out=y)
            y.mul_(w)
        else:
            y.copy_((part * r).to(dtype).mul_(w))
    return out


def _rmsnorm_bwd(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, of_weight: bool) -> tuple[Tensor, Tensor]:
    """y = x * r * w: dx = r * (g w) - x * r**3 * mean(g w x), dw = sum of g x r over the tokens, if it is asked for."""
    dtype = _dtype(x, weight)
    w = _wide(weight, dtype)
    dx = empty(tuple(x.shape), x.dtype, x.device)
    dw = x.new_zeros(x.shape[1] if of_weight else 0, dtype=dtype)
    step = _step(x.shape[1])
    for t in range(0, x.shape[0], step):
        part, g = x[t : t + step].to(dtype), grad[t : t + step].to(dtype)
        r = _rms(x[t : t + step].to(wide(x.dtype)), eps).to(dtype)
        y = part * r
        if of_weight:
            dw += (g * y).sum(0)
        if w is not None:
            g = g * w
        pull = _sum(g * y).mul_(1.0 / x.shape[1])
        dx[t : t + step] = torch.sub(g, y.mul_(pull)).mul_(r)
    return dx, dw if weight is None else dw.to(weight.dtype)


def _layernorm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and 1 / sqrt(var + eps) of each token, (R, 1), for the backward."""
    dtype = _dtype(x, weight, bias)
    w, b = _wide(weight, dtype), _wide(bias, dtype)
    if _at_once(x, dtype):
        return torch.native_layer_norm(x, x.shape[1:], w, b, eps)
    out = empty(tuple(x.shape), x.dtype, x.device)
    mean, rstd = (x.new_empty((x.shape[0], 1), dtype=dtype) for _ in range(2))
    step = _step(x.shape[1])
    for t in range(0, x.shape[0], step):
        some = slice(t, t + step)
        out[some], mean[some], rstd[some] = torch.native_layer_norm(x[some].to(dtype), x.shape[1:], w, b, eps)
    return out, mean, rstd


def _layernorm_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dw and db where they are asked for: PyTorch's kernel goes over all tokens once more for them."""
    dtype = _dtype(x, weight, bias)
    w, b = _wide(weight, dtype), _wide(bias, dtype)
    dw = x.new_zeros(x.shape[1] if of_weight else 0, dtype=dtype)
    db = x.new_zeros(x.shape[1] if of_bias else 0, dtype=dtype)
    wanted = [True, of_weight, of_bias]
    backward = torch.ops.aten.native_layer_norm_backward
    if _at_once(x, dtype):
        dx, d_w, d_b = backward(grad, x, x.shape[1:], mean, rstd, w, b, wanted)
        dw, db = d_w if of_weight else dw, d_b if of_bias else db
    else:
        dx = empty(tuple(x.shape), x.dtype, x.device)
        step = _step(x.shape[1])
        for t in range(0, x.shape[0], step):
            some = slice(t, t + step)
            part, g = x[some].to(dtype), grad[some].to(dtype)
            dx[some], d_w, d_b = backward(g, part, x.shape[1:], mean[some], rstd[some], w, b, wanted)
            if of_weight:
                dw += d_w
            if of_bias:
                db += d_b
    return dx, dw if weight is None else dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


rmsnorm_bwd = Operator(
    "varlen_rmsnorm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, float eps, bool of_weight) -> (Tensor, Tensor)",
    _rmsnorm_bwd,
)
layernorm_bwd = Operator(
    "varlen_layernorm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool of_weight, bool of_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _layernorm_bwd,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _rmsnorm_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_weight = ctx.needs_input_grad[1]
    dx, dw = rmsnorm_bwd(grad.contiguous(), x, weight, ctx.eps, of_weight)
    return dx, dw if of_weight else None, None


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _layernorm_grads(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    of_weight, of_bias = ctx.needs_input_grad[1:3]
    dx, dw, db = layernorm_bwd(grad.contiguous(), x, weight, bias, mean, rstd, of_weight, of_bias)
    return dx, dw if of_weight else None, db if of_bias else None, None


rmsnorm = Operator(
    "varlen_rmsnorm",
    "(Tensor x, Tensor? weight, float eps) -> Tensor",
    _rmsnorm,
    keep=_keep,
    backward=_rmsnorm_grads,
)
layernorm = Operator(
    "varlen_layernorm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _layernorm,
    keep=_keep_statistics,
    backward=_layernorm_grads,
)


@rmsnorm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x)


@layernorm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], 1), dtype=_dtype(x, weight, bias)) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _like(weight: Tensor | None, x: Tensor, wanted: bool) -> Tensor:
    if weight is None or not wanted:
        return x.new_empty((0,), dtype=wide(x.dtype) if weight is None else weight.dtype)
    return torch.empty_like(weight)


@rmsnorm_bwd.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, of_weight: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _like(weight, x, of_weight)


@layernorm_bwd.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _like(weight, x, of_weight), _like(bias, x, of_bias)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def varlen_rmsnorm(arr: Array, weight: Tensor | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`, block by block."""
    x = used_only(arr, arr.values)
    y = rmsnorm(_tokens(x), weight, eps).reshape(x.shape)
    return arr.with_values(used_only(arr, y))


def varlen_layernorm(arr: Array, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Array:
    """Compute `scree.kernels.varlen_layernorm`, block by block."""
    x = used_only(arr, arr.values)
    y = layernorm(_tokens(x), weight, bias, eps)[0].reshape(x.shape)
    return arr.with_values(used_only(arr, y))
