"""Attention sequence by sequence, without padding: by `scaled_dot_product_attention`'s kernel on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._array import Array
from ..._backends._protocol import HostInts
from .._options import FLAT_SCHEMA, AttentionOptions, FlatOptions
from . import _dense, _flash
from ._common import Operator, host, offsets_of, wide

_Grads = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _has_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu"


def _is_dense(q: Tensor, scale: float, softcap: float) -> bool:
    """Whether the CPU's flash kernel does not serve: under its own causal mask it multiplies -inf by the scale."""
    return softcap > 0 or scale <= 0 or not _has_kernel(q)


def _bounds(q_offsets: Tensor, k_offsets: Tensor) -> tuple[HostInts, HostInts]:
    bounds = host(q_offsets)
    return bounds, bounds if k_offsets is q_offsets else host(k_offsets)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    sinks: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor]:
    return _compute(q, k, v, *_bounds(q_offsets, k_offsets), sinks, FlatOptions(*flat), differentiable=True)


def _plain(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sinks, *flat = rest
    return _compute(q, k, v, *_bounds(q_offsets, k_offsets), sinks, FlatOptions(*flat), differentiable=False)


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: HostInts,
    k_bounds: HostInts,
    sinks: Tensor | None,
    options: FlatOptions,
    *,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """o (T, H, D_v) and lse (T, H), in the wide dtype; zeros beyond the last row.

    o may be in the dtype of q where no backward reads it, and lse is of no size where neither the caller nor the backward reads it.
    """
    limits, scale, softcap = options.sides, options.scale, options.softcap
    bounds = q_bounds, k_bounds
    if _is_dense(q, scale, softcap):
        o, lse = _dense.forward(q, k, v, *bounds, scale, limits, softcap)
    else:
        lse_is_read = options.return_lse or differentiable or sinks is not None
        rounded = not differentiable and sinks is None  # else it is read once more
        o, lse = _flash.forward(q, k, v, *bounds, scale, limits, lse_is_read, rounded)
    if sinks is not None:
        used = int(bounds[0][-1])
        inner = lse[:used]
        whole = torch.logaddexp(inner, sinks.to(lse.dtype))
        o[:used] *= torch.sub(inner, whole).exp_()[..., None]
        lse[:used] = whole
    return o, lse


def _backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    sinks: Tensor | None,
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, and dsinks (of no size without sinks)."""
    options = FlatOptions(*flat)
    limits, scale, softcap = options.sides, options.scale, options.softcap
    bounds = _bounds(q_offsets, k_offsets)
    g_lse = grad_lse if options.return_lse else None
    if _is_dense(q, scale, softcap):
        dq, dk, dv = _dense.backward(grad_o, g_lse, q, k, v, o, lse, *bounds, scale, limits, softcap)
    else:
        dq, dk, dv = _flash.backward(grad_o, g_lse, q, k, v, o, lse, *bounds, scale, limits)
    if sinks is None:
        return dq, dk, dv, lse.new_empty((0,))
    used = int(bounds[0][-1])
    pull = -(grad_o[:used].to(o.dtype) * o[:used]).sum(-1)
    if g_lse is not None:
        pull += g_lse[:used]
    weight = torch.sub(sinks.to(lse.dtype), lse[:used]).exp_()
    return dq, dk, dv, weight.mul_(pull).sum(0).to(sinks.dtype)


_INPUTS = "Tensor q, Tensor k, Tensor v"
_REST = f"Tensor q_offsets, Tensor k_offsets, Tensor? sinks, {FLAT_SCHEMA}"

attention_bwd = Operator(
    "varlen_attention_backward",
    f"(Tensor grad_o, Tensor grad_lse, {_INPUTS}, Tensor o, Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_offsets, k_offsets, sinks, *ctx.flat = inputs
    ctx.save_for_backward(q, k, v, *output, q_offsets, k_offsets, sinks)


def _grads(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = attention_bwd(grad_o, grad_lse, *tensors, sinks, *ctx.flat)
    return (dq, dk, dv, None, None, None if sinks is None else dsinks, *(None,) * len(ctx.flat))


attention = Operator(
    "varlen_attention",
    f"({_INPUTS}, {_REST}) -> (Tensor, Tensor)",
    _forward,
    plain=_plain,
    keep=_keep,
    backward=_grads,
)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype, (total, heads, _) = wide(q.dtype), q.shape
    return q.new_empty((total, heads, v.shape[2]), dtype=dtype), q.new_empty((total, heads), dtype=dtype)


@attention_bwd.register_fake
def _(
    grad_o: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[2]
    dsinks = lse.new_empty((0,)) if sinks is None else torch.empty_like(sinks)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def attend(
    q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, one sequence after the other, each without its neighbours' memory."""
    op = "varlen_attention"
    q_offsets = offsets_of(op, q)
    k_offsets = q_offsets if k.offsets is q.offsets else offsets_of(op, k)
    return _arrays(q, options, *attention(q.values, k.values, v.values, q_offsets, k_offsets, sinks, *options.flat()))


def bind(options: AttentionOptions) -> Callable[..., tuple[Array, Array] | Array]:
    """`attend` with options, for Arrays on the same offsets that no compiler and no transformation sees."""
    flat = options.flat()

    def call(q: Array, k: Array, v: Array, sinks: Tensor | None) -> tuple[Array, Array] | Array:
        of_q, of_k, of_v = q._values, k._values, v._values
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (of_q, of_k, of_v, sinks)):
            return attend(q, k, v, sinks, options)
        bounds = q._host_offsets("varlen_attention")
        return _arrays(q, options, *_compute(of_q, of_k, of_v, bounds, bounds, sinks, flat, differentiable=False))

    return call


def _arrays(q: Array, options: AttentionOptions, o: Tensor, lse: Tensor) -> tuple[Array, Array] | Array:
    o = o if o.dtype == q._values.dtype else o.to(q._values.dtype)
    out = Array._make(o, q._offsets, q._ragged_dim, q._structure)
    return (out, q.with_values(lse.to(torch.float32))) if options.return_lse else out
