"""Softmax and reductions along the ragged axis: rows of one length together, long rows one by one.

Sums run along the middle axis of (G, n, F), which torch adds up column by column, the same way for every G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._array import Array
from ..._backends._protocol import HostInts
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from .._rows import TOGETHER, Rows, alike, unlike
from ._common import Operator, empty, host, offsets_of, on, wide

_INF = float("inf")
_PASSES, _WIDE = 16, 512  # tokens of many features that are compared at once
_SPLIT = 1 << 17  # elements: a longer row is computed some columns at a time


def _tokens(rows: Rows, x: Tensor, index: Tensor | None) -> Tensor:
    """The tokens of these rows of x (T, F): (G, n, F), a view where they lie together."""
    some = x[int(rows.starts[0]) : int(rows.starts[-1]) + rows.length] if index is None else x.index_select(0, index)
    return some.view(len(rows.starts), rows.length, -1)


def _index(rows: Rows, x: Tensor) -> Tensor | None:
    return None if rows.adjacent else on(x, rows.tokens())


def _columns(length: int, features: int) -> int:
    """How many columns of a row to compute at a time: a matter of the row's own shape."""
    if length * features <= _SPLIT:
        return max(features, 1)
    return max(16, _SPLIT // length // 16 * 16)


def _by_columns(fn: Callable[..., Tensor], columns: int, out: Tensor, *given: Tensor) -> None:
    """out[...] = fn(*given), some columns (the last axis) at a time, in the wide dtype."""
    dtype = wide(given[0].dtype)
    for c in range(0, out.shape[-1], columns):
        parts = (x[..., c : c + columns].to(dtype).contiguous() for x in given)
        out[..., c : c + columns] = fn(*parts)


def _by_rows(x: Tensor, lengths: list[int]) -> Sequence[Tensor]:
    """Views of the rows of x (T, F), all at once: one by one they take longer than what is done with a short row."""
    return x[: sum(lengths)].split(lengths)


def _long(bounds: HostInts, features: int) -> list[int]:
    """The rows that are computed alone, in the order of memory."""
    return np.flatnonzero(np.diff(bounds).astype(np.int64) * features > TOGETHER).tolist()


def _each(
    offsets: Tensor,
    fn: Callable[..., Tensor],
    dtype: torch.dtype,
    tokens: tuple[Tensor, ...],
    values: tuple[Tensor, ...] = (),
    alone: Callable[..., Any] | None = None,
) -> Tensor:
    """Apply fn to the tokens (T, F) of each row and to its values (B, F): (T, F), zeros beyond the last row.

    ``alone(out, *given)`` may compute long rows, (n, F) and (F,), where all is in the wide dtype.
    """
    x, bounds = tokens[0], host(offsets)
    out = empty(tuple(x.shape), dtype, x.device)
    out[int(bounds[-1]) :] = 0
    if dtype != wide(x.dtype) or any(y.dtype != dtype for y in (*tokens, *values)):
        alone = None
    if alone is not None:
        lengths = np.diff(bounds).tolist()
        rows_of = [_by_rows(y, lengths) for y in (out, *tokens)] + [v.unbind() for v in values]
        for row in _long(bounds, x.shape[1]):
            alone(*(views[row] for views in rows_of))
    for rows in alike(bounds, x.shape[1], only_short=alone is not None):
        index = _index(rows, x)
        given = [_tokens(rows, y, index) for y in tokens]
        numbers = on(x, rows.numbers)
        given += [v.index_select(0, numbers)[:, None] for v in values]
        if not rows.short:
            _by_columns(fn, _columns(rows.length, x.shape[1]), _tokens(rows, out, None), *given)
            continue
        y = fn(*(part.to(wide(x.dtype)) for part in given))
        if index is None:
            _tokens(rows, out, None).copy_(y)
        else:
            out.index_copy_(0, index, y.reshape(-1, out.shape[1]).to(dtype))
    return out


# Softmax: (G, n, F) each. torch's own takes one pass, but its last bit depends on how columns fall to threads: it is
# for rows that are computed alone.


def _softmax(x: Tensor) -> Tensor:
    p = torch.sub(x, x.amax(1, keepdim=True)).exp_()
    return p.div_(p.sum(1, keepdim=True))


def _softmax_bwd(g: Tensor, y: Tensor) -> Tensor:
    gy = g * y
    return gy.sub_(y * gy.sum(1, keepdim=True))


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
    """Compute `scree.kernels.varlen_softmax` with rows of one length together."""
    y = softmax(_flat(arr), offsets_of("varlen_softmax", arr)).to(
        arr.dtype
    )  # rounded here: the backward needs it as it was
    y = y.reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


# Reductions: (G, n, F) to (G, F).


def _logsumexp(x: Tensor) -> Tensor:
    top = x.amax(1, keepdim=True)
    top = torch.where(top.abs() < _INF, top, torch.zeros_like(top))
    return torch.sub(x, top).exp_().sum(1).log_().add_(top[:, 0])


_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1, dtype=x.dtype),
    "mean": lambda x: x.sum(1, dtype=x.dtype) / x.shape[1],
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
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


def _extreme(x: Tensor, out: Tensor, op: Callable[..., Tensor]) -> None:
    """Reduce (n, F) by amax or amin, whose order is free: fewer and longer passes are the faster."""
    n, features = x.shape
    if n >= 6 * _PASSES and features >= _WIDE:
        whole = n // _PASSES * _PASSES
        few = op(x[:whole].view(-1, _PASSES * features), 0).view(_PASSES, features)
        x = few if whole == n else torch.cat((few, x[whole:]))
    op(x, 0, out=out)


_ALONE: dict[str, Callable[..., Any]] = {
    "sum": lambda x, out: torch.sum(x, 0, out=out),
    "max": lambda x, out: _extreme(x, out, torch.amax),
    "min": lambda x, out: _extreme(x, out, torch.amin),
}


def _reduce(x: Tensor, offsets: Tensor, op: str) -> Tensor:
    bounds = host(offsets)
    lengths = np.diff(bounds)
    features = x.shape[1]
    out = x.new_full((len(lengths), features), _of_nothing(op, x.dtype))
    dtype = wide(x.dtype) if x.is_floating_point() else x.dtype
    alone = _ALONE.get(op) if x.dtype == dtype else None
    parts, outs = (_by_rows(x, lengths.tolist()), out.unbind()) if alone is not None else ((), ())
    if alone is not None:
        single = unlike(lengths, features)
        for row in np.flatnonzero(single).tolist():
            alone(parts[row], outs[row])
        if single[lengths > 0].all():
            return out
    for rows in alike(bounds, features, only_short=alone is not None):
        if alone is not None and len(rows.numbers) == 1:
            alone(parts[rows.numbers[0]], outs[rows.numbers[0]])  # what is left of a length goes alone too
            continue
        given = _tokens(rows, x, _index(rows, x))
        columns = features if op != "logsumexp" else _columns(rows.length, features)
        for c in range(0, features, columns):
            part = given[..., c : c + columns].to(dtype)
            y = _REDUCE[op](part).to(x.dtype)
            if len(rows.numbers) == 1:
                out[int(rows.numbers[0]), c : c + columns] = y[0]
            else:
                out[on(x, rows.numbers), c : c + columns] = y
    return out


def _share(g: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """Share a gradient among the tokens that are the largest (or the smallest)."""
    won = (x == out).to(x.dtype)
    return won.mul_(g / won.sum(1, keepdim=True).clamp_(min=1))


def _share_alone(out: Tensor, x: Tensor, g: Tensor, top: Tensor) -> None:
    won = torch.eq(x, top, out=out)
    won.mul_(g / won.sum(0).clamp_(min=1))


def _logsumexp_bwd(g: Tensor, x: Tensor) -> Tensor:
    top = x.amax(1, keepdim=True)
    p = torch.sub(x, torch.where(top.abs() < _INF, top, torch.zeros_like(top))).exp_()
    s = p.sum(1, keepdim=True)
    return p.mul_(g / torch.where(s == 0, torch.ones_like(s), s))


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
        return _each(offsets, lambda x, g: _logsumexp_bwd(g, x), x.dtype, (x,), (grad,))
    return _each(offsets, lambda x, g, o: _share(g, x, o), x.dtype, (x,), (grad, out), _share_alone)


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
    """Compute `scree.kernels.varlen_reduce` with rows of one length together."""
    return reduce(_flat(arr), offsets_of("varlen_reduce", arr), op).reshape(arr.batch_size, *arr.feature_shape)
