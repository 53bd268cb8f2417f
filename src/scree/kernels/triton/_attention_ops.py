"""Attention on CUDA as operators of PyTorch's library, for compilers, exports and `torch.func`."""

from __future__ import annotations

from typing import Any

import torch

from .._options import FLAT_SCHEMA, FlatOptions
from . import _attention_launch as _launch


class Transformed(torch.autograd.Function):
    """The kernels to `torch.func`, which wants the context set up apart; slower to call than what autograd gets."""

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        options: FlatOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.scree.attention(q, k, v, sinks, cu_q, cu_k, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _setup_context(ctx, (*inputs[:6], *inputs[6]), output)

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        dq, dk, dv, dsinks = _TransformedBackward.apply(do, dlse, *saved, *ctx.flat)  # pyright: ignore[reportGeneralTypeIssues]
        return dq, dk, dv, None if saved[3] is None else dsinks, None, None, None


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return torch.ops.scree.attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(
            "varlen_attention: the gradient of the Triton kernels is not differentiable; implementation='reference' is"
        )


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor cu_q, Tensor cu_k"


@torch.library.custom_op("scree::attention", mutates_args=(), schema=f"({_INPUTS}, {FLAT_SCHEMA}) -> (Tensor, Tensor)")
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _launch.forward(q, k, v, sinks, cu_q, cu_k, FlatOptions(*flat), None)


@_attention_op.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    total, heads, _ = q.shape
    return q.new_empty((total, heads, v.shape[2])), q.new_empty((heads, total), dtype=torch.float32)


@torch.library.custom_op(
    "scree::attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dlse, {_INPUTS}, Tensor o, Tensor lse, {FLAT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward_op(
    do: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *flat: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = FlatOptions(*flat)
    dq, dk, dv, dsinks = _launch.backward(do, dlse, q, k, v, sinks, cu_q, cu_k, o, lse, options, None, None)
    return dq, dk, dv, q.new_empty(0) if dsinks is None else dsinks


@_attention_backward_op.register_fake
def _(
    do: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    return grads[0], grads[1], grads[2], q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, cu_q, cu_k, *ctx.flat = inputs
    ctx.save_for_backward(q, k, v, sinks, cu_q, cu_k, *output)


def _backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, sinks, cu_q, cu_k, o, lse = ctx.saved_tensors
    dq, dk, dv, dsinks = torch.ops.scree.attention_backward(do, dlse, q, k, v, sinks, cu_q, cu_k, o, lse, *ctx.flat)
    return dq, dk, dv, None if sinks is None else dsinks, None, None, *(None,) * len(ctx.flat)


_attention_op.register_autograd(_backward, setup_context=_setup_context)
