"""The host's side of the Metal kernel: its sizes, its grid, and a gradient that another room computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..._array import Array
from .. import mlx_fast
from .._options import AttentionOptions
from ._source import HEADER, INPUTS, LANES, OUTPUTS, ROWS, SOURCE


def attend(
    q: Array, k: Array, v: Array, sinks: mx.array | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`; offsets stay on the device, but for a gradient."""

    def by_rows(q_values: mx.array, k_values: mx.array, v_values: mx.array, *sink: mx.array) -> list[mx.array]:
        arrays = q.with_values(q_values), k.with_values(k_values), v.with_values(v_values)
        pair: Any = mlx_fast.attend(*arrays, sink[0] if sink else None, options._replace(return_lse=True))
        return [pair[0].values, pair[1].values]

    values = [q.values, k.values, v.values] + ([] if sinks is None else [sinks])
    if not (q.batch_size and q.values.size and k.values.size):
        out, lse = by_rows(*values)
    else:
        out, lse = _with_gradient_of(
            by_rows,
            lambda *given: _launch(*given, offsets=(q.offsets, k.offsets), options=options),
        )(*values)
    return (q.with_values(out), q.with_values(lse)) if options.return_lse else q.with_values(out)


def _with_gradient_of(slow: Callable[..., list[mx.array]], fast: Callable[..., list[mx.array]]) -> Any:
    """Compute `fast`, and the gradients of `slow`."""
    made = mx.custom_function(fast)
    made.vjp(lambda primals, cotangents, _: tuple(mx.vjp(slow, list(primals), list(cotangents))[1]))
    return made


@functools.cache
def _kernel() -> Any:
    # The body counts on infinities, which Metal's compiler keeps as MLX calls it: its math mode is "safe".
    return mx.fast.metal_kernel(
        name="scree_varlen_attention",
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        source=SOURCE,
        header=HEADER,
    )


def _launch(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    sinks: mx.array | None = None,
    *,
    offsets: tuple[mx.array, mx.array],
    options: AttentionOptions,
) -> list[mx.array]:
    (tokens, heads, dim), (keys, kv_heads, v_dim) = q.shape, v.shape
    far = tokens + keys  # beyond every place: no limit
    left, right = (far if side is None else min(side, far) for side in options.sides)
    sizes = mx.array([tokens, keys, offsets[0].size - 1, heads, kv_heads, left, right], mx.int64)
    factors = mx.array([options.scale, options.softcap or 0.0], mx.float32)
    sinks = mx.full((heads,), -float("inf")) if sinks is None else sinks.astype(mx.float32)
    return _kernel()(
        inputs=[q, k, v, *offsets, sinks, sizes, factors],
        template=[("T", q.dtype), ("D", dim), ("D_V", v_dim), ("ROWS", ROWS)],
        grid=(LANES, -(-tokens // ROWS), heads),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(tokens, heads, v_dim), (tokens, heads)],
        output_dtypes=[q.dtype, mx.float32],
    )
