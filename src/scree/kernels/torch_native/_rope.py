"""Rotary position embedding, some tokens at a time, so that what one product reads the next still finds in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._array import Array
from .._rows import places
from ._common import Operator, empty, host, offsets_of, on, wide

_BLOCK = 1 << 18  # elements of a block of tokens


def _dtype(x: Tensor, cos: Tensor, sin: Tensor) -> torch.dtype:
    return torch.promote_types(wide(x.dtype), torch.promote_types(cos.dtype, sin.dtype))


def _looked_up(table: Tensor, at: Tensor, outside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """table[at], (tokens, 1, D/2); NaN where `at` is outside of the table."""
    if not len(table):
        return table.new_full((len(at), 1, table.shape[1]), float("nan"), dtype=dtype)
    found = table.index_select(0, at).to(dtype).unsqueeze(1)
    return found if outside is None else found.masked_fill(outside[:, None, None], float("nan"))


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor,
    starts: Tensor | None,
    start: int,
    interleaved: bool,
    back: bool,
) -> Tensor:
    """x (T, H, D), rotated, or rotated back, in its dtype; zeros beyond the last row."""
    dtype = _dtype(x, cos, sin)
    at = places(host(offsets), start if starts is None else host(starts))
    inside = (at >= 0) & (at < len(cos))
    outside = None if inside.all() else on(x, ~inside)
    index = on(x, np.where(inside, at, 0))
    out = empty(tuple(x.shape), x.dtype, x.device)
    out[len(at) :] = 0
    step = max(1, _BLOCK // max(x.shape[1] * x.shape[2], 1))
    for t in range(0, len(at), step):
        some = slice(t, min(t + step, len(at)))
        hidden = None if outside is None else outside[some]
        c, s = (_looked_up(table, index[some], hidden, dtype) for table in (cos, sin))
        part = x[some].to(dtype)
        y = out[some] if out.dtype == dtype else torch.empty_like(part)
        (x1, x2), (y1, y2) = _halves(part, interleaved), _halves(y, interleaved)
        torch.mul(x1, c, out=y1).addcmul_(x2, s, value=1 if back else -1)
        torch.mul(x2, c, out=y2).addcmul_(x1, s, value=-1 if back else 1)
        if y.dtype != out.dtype:
            out[some] = y
    return out


def _tables(
    grad: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Tensor,
    starts: Tensor | None,
    start: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """dcos and dsin: at each place the sums of g1 x1 + g2 x2 and of g2 x1 - g1 x2 over its tokens and heads."""
    dtype = _dtype(x, cos, sin)
    at = places(host(offsets), start if starts is None else host(starts))
    tokens = np.flatnonzero((at >= 0) & (at < len(cos)))
    index, rows = on(x, at[tokens]), on(x, tokens)
    (g1, g2), (x1, x2) = (_halves(y.index_select(0, rows).to(dtype), interleaved) for y in (grad, x))
    dcos = cos.new_zeros(cos.shape, dtype=dtype).index_add_(0, index, (g1 * x1).addcmul_(g2, x2).sum(1))
    dsin = sin.new_zeros(sin.shape, dtype=dtype).index_add_(0, index, (g2 * x1).addcmul_(g1, x2, value=-1).sum(1))
    return dcos.to(cos.dtype), dsin.to(sin.dtype)


_REST = "Tensor cos, Tensor sin, Tensor offsets, Tensor? starts, SymInt start, bool interleaved"
_SCHEMA = f"(Tensor x, {_REST}, bool back) -> Tensor"
rope_bwd = Operator("varlen_rope_backward", _SCHEMA, _rope)
tables_bwd = Operator("varlen_rope_tables_backward", f"(Tensor grad, Tensor x, {_REST}) -> (Tensor, Tensor)", _tables)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *tensors, ctx.start, ctx.interleaved, _ = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, *tensors)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *rest = ctx.saved_tensors
    rest += ctx.start, ctx.interleaved
    dcos, dsin = (None, None) if x is None else tables_bwd(grad, x, *rest)
    return rope_bwd(grad, *rest, True), dcos, dsin, *(None,) * 5


rope = Operator("varlen_rope", _SCHEMA, _rope, keep=_keep, backward=_grads)


@rope.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@rope_bwd.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@tables_bwd.register_fake
def _(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return cos.new_empty(cos.shape), sin.new_empty(sin.shape)


def varlen_rope(arr: Array, cos: Tensor, sin: Tensor, *, interleaved: bool, start: int | Tensor) -> Array:
    """Compute `scree.kernels.varlen_rope`, block by block."""
    x = arr.values
    if not x.numel():
        return arr
    starts, first = (start, 0) if isinstance(start, Tensor) else (None, start)
    y = rope(
        x.reshape(x.shape[0], -1, x.shape[-1]),
        cos,
        sin,
        offsets_of("varlen_rope", arr),
        starts,
        first,
        interleaved,
        False,
    )
    return arr.with_values(y.reshape(x.shape))
