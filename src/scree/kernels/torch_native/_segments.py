"""Softmax and reductions along the ragged axis: the rows that are short together, long rows of a softmax one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._array import Array
from ..._backends._protocol import HostInts
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from ._common import Operator, empty, host, offsets_of, on, wide
from ._together import Group, Together, long_rows, parts

_INF = float("inf")


def _each(
    offsets: Tensor,
    fn: Callable[..., Tensor],
    dtype: torch.dtype,
    tokens: tuple[Tensor, ...],
    values: tuple[Tensor, ...] = (),
    alone: Callable[..., Any] | None = None,
    *,
    alone_in_halves: bool = False,
) -> Tensor:
    """Apply fn to a group of rows, their tokens (T, F) and their values (B, F): (T, F), zeros beyond the last row.

    ``alone(out, *given)`` may compute long rows, (n, F) and (F,): in the wide dtype, where out is of it, or all as they are
    in halves if it computes in float32 by itself.
    """
    x, bounds, inner = tokens[0], host(offsets), wide(tokens[0].dtype)
    out = empty(tuple(x.shape), dtype, x.device)
    used = int(bounds[-1])
    out[used:] = 0
    if not x.shape[1]:
        return out
    if dtype != inner and not alone_in_halves:
        alone = None
    if alone is not None and (numbers := long_rows(bounds, x.shape[1])):
        # All views at once: one by one they take longer than what is done with a short row.
        lengths = np.diff(bounds).tolist()
        rows_of = [y[:used].split(lengths) for y in (out, *tokens)] + [v.unbind() for v in values]
        for row in numbers:
            given = [views[row] for views in rows_of]
            alone(*given if x.dtype == dtype else (y.to(inner) for y in given))
    for part in parts(bounds, x, short=alone is not None):
        given = [part.of_tokens(y, inner) for y in tokens] + [part.of_rows(v, inner) for v in values]
        part.write_tokens(out, fn(part.group, *given))
    return out


# torch's own softmax takes one pass, but its last bit depends on how columns fall to threads: it is for rows that are
# computed alone.


def _softmax(rows: Group, x: Tensor) -> Tensor:
    p = torch.sub(x, rows.spread(rows.extreme(x, "amax"))).exp_()
    return p.div_(rows.spread(rows.sum(p)))


def _softmax_bwd(rows: Group, g: Tensor, y: Tensor) -> Tensor:
    gy = g * y
    return gy.sub_(y * rows.spread(rows.sum(gy)))


def _softmax_alone(out: Tensor, x: Tensor) -> None:
    torch.softmax(x, 0, out=out)


def _softmax_bwd_alone(out: Tensor, g: Tensor, y: Tensor) -> None:
    torch.ops.aten._softmax_backward_data.out(g, y, 0, y.dtype, grad_input=out)


softmax_bwd = Operator(
    "varlen_softmax_backward",
    "(Tensor grad, Tensor y, Tensor offsets) -> Tensor",
    lambda grad, y, offsets: _each(offsets, _softmax_bwd, y.dtype, (grad.contiguous(), y), alone=_softmax_bwd_alone),
)


def _keep_softmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


softmax = Operator(
    "varlen_softmax",
    "(Tensor x, Tensor offsets) -> Tensor",
    lambda x, offsets: _each(offsets, _softmax, wide(x.dtype), (x,), alone=_softmax_alone),
    plain=lambda x, offsets: _each(offsets, _softmax, x.dtype, (x,), alone=_softmax_alone, alone_in_halves=True),
    keep=_keep_softmax,
    backward=lambda ctx, grad: (softmax_bwd(grad, *ctx.saved_tensors), None),
)


@softmax.register_fake
def _(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=wide(x.dtype))


@softmax_bwd.register_fake
def _(grad: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return torch.empty_like(y)


def _flat(arr: Array) -> Tensor:
    """The values as (T, F), contiguous, the ragged axis first."""
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return x.reshape(x.shape[0], math.prod(arr.feature_shape)).contiguous()


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax` with short rows together."""
    y = softmax(_flat(arr), offsets_of("varlen_softmax", arr)).to(
        arr.dtype
    )  # rounded here: the backward needs it as it was
    y = y.reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


# Reductions of the tokens of a group of rows to (G, F).


def _finite(top: Tensor) -> Tensor:
    """What to subtract from the exponents of a row: 0 where nothing can be."""
    return torch.where(top.abs() < _INF, top, torch.zeros_like(top))


def _logsumexp(rows: Group, x: Tensor) -> Tensor:
    top = _finite(rows.extreme(x, "amax"))
    return rows.sum(torch.sub(x, rows.spread(top)).exp_()).log_().add_(top)


_REDUCE: dict[str, Callable[[Group, Tensor], Tensor]] = {
    "sum": lambda rows, x: rows.sum(x),
    "mean": lambda rows, x: rows.sum(x) / rows.count(x),
    "max": lambda rows, x: rows.extreme(x, "amax"),
    "min": lambda rows, x: rows.extreme(x, "amin"),
    "logsumexp": _logsumexp,
}


def _of_nothing(op: str, dtype: torch.dtype) -> float | int | bool:
    if op == "sum":
        return 0
    if op == "mean":
        return float("nan")
    if dtype == torch.bool:
        return op == "min"
    name = str(dtype).removeprefix("torch.")
    if is_integer(name):
        return integer_limits(name)[op == "min"]
    return _INF if op == "min" else -_INF


def _reduce(x: Tensor, offsets: Tensor, op: str) -> Tensor:
    bounds = host(offsets)
    halves = x.is_floating_point() and x.dtype != wide(x.dtype)
    at_once = ("sum", "max", "min") if halves else ("sum", "mean", "max", "min")
    if x.device.type == "cpu" and x.is_floating_point() and op in at_once:
        rows, used = Together(bounds), x[: int(bounds[-1])]
        return rows.sum_of_halves(used) if halves and op == "sum" else _REDUCE[op](rows, used)
    out = x.new_full((len(bounds) - 1, x.shape[1]), _of_nothing(op, x.dtype))
    dtype = wide(x.dtype) if x.is_floating_point() else x.dtype
    for part in parts(bounds, x):
        part.write_rows(out, _REDUCE[op](part.group, part.of_tokens(x, dtype)))
    return out


def _share(rows: Group, x: Tensor, g: Tensor, top: Tensor) -> Tensor:
    """Share a gradient among the tokens that are the largest (or the smallest)."""
    won = (x == rows.spread(top)).to(x.dtype)
    return won.mul_(rows.spread(g / rows.sum(won).clamp_(min=1)))


def _share_alone(out: Tensor, x: Tensor, g: Tensor, top: Tensor) -> None:
    won = torch.eq(x, top, out=out)
    won.mul_(g / won.sum(0).clamp_(min=1))


def _logsumexp_bwd(rows: Group, x: Tensor, g: Tensor) -> Tensor:
    p = torch.sub(x, rows.spread(_finite(rows.extreme(x, "amax")))).exp_()
    s = rows.sum(p)
    return p.mul_(rows.spread(g / torch.where(s == 0, torch.ones_like(s), s)))


def _spread(grad: Tensor, x: Tensor, bounds: HostInts, op: str) -> Tensor:
    """Give each token the gradient of the sum, or of the mean, of its row."""
    lengths = np.diff(bounds)
    if op == "mean":
        each = on(x, np.maximum(lengths, 1).astype(np.int64))[:, None]
        grad = (grad.to(wide(x.dtype)) / each).to(x.dtype)
    out = empty(tuple(x.shape), x.dtype, x.device)
    used = int(bounds[-1])
    out[used:] = 0
    row = np.repeat(np.arange(len(lengths)), lengths)
    torch.index_select(grad, 0, on(x, row), out=out[:used])
    return out


def _reduce_bwd(grad: Tensor, x: Tensor, out: Tensor, offsets: Tensor, op: str) -> Tensor:
    if op in ("sum", "mean"):
        return _spread(grad, x, host(offsets), op)
    if op == "logsumexp":
        return _each(offsets, _logsumexp_bwd, x.dtype, (x,), (grad,))
    return _each(offsets, _share, x.dtype, (x,), (grad, out), _share_alone)


reduce_bwd = Operator(
    "varlen_reduce_backward",
    "(Tensor grad, Tensor x, Tensor out, Tensor offsets, str op) -> Tensor",
    _reduce_bwd,
)


def _keep_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, ctx.op = inputs
    ctx.save_for_backward(x, output, offsets)


reduce = Operator(
    "varlen_reduce",
    "(Tensor x, Tensor offsets, str op) -> Tensor",
    _reduce,
    keep=_keep_reduce,
    backward=lambda ctx, grad: (reduce_bwd(grad, *ctx.saved_tensors, ctx.op), None, None),
)


@reduce.register_fake
def _(x: Tensor, offsets: Tensor, op: str) -> Tensor:
    return x.new_empty((offsets.shape[0] - 1, x.shape[1]))


@reduce_bwd.register_fake
def _(grad: Tensor, x: Tensor, out: Tensor, offsets: Tensor, op: str) -> Tensor:
    return torch.empty_like(x)


def varlen_reduce(arr: Array, op: str) -> Tensor:
    """Compute `scree.kernels.varlen_reduce` with all rows together."""
    return reduce(_flat(arr), offsets_of("varlen_reduce", arr), op).reshape(arr.batch_size, *arr.feature_shape)
