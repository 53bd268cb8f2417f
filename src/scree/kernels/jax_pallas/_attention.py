"""Where each tile lies is worked out on the device; then one kernel forward, and two backward.

On Hopper halves at head dim 128 have the kernels of `_hopper`; all else has those of `_kernels`, by Pallas's Triton
backend, which waits for every product where it is made. Where a program is compiled for another device than an NVIDIA
GPU, it is the tiles of `jax_xla` that it computes with.

Of the tiles of `_HALF` that were timed on an H200, these were the fastest forward: 227 TFLOP/s on 16 rows of ~760 tokens
at head dim 64, where 128 queries or 128 keys a step gave 150 to 216, and 406 on 4 rows of 8192 at 128, where 128 keys in
three stages gave 407 and all others less.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array as Dense

from ..._array import Array
from .._options import AttentionOptions
from ..jax_xla import _attention as portable
from ..jax_xla._tiles import safe
from . import _hopper, _kernels, _where
from ._kernels import Launch, Options
from ._launch import like
from ._table import Rows, rows_of, table_of

INTERPRET = False  # the tests' switch: Pallas's interpreter, which needs no GPU
_INF = float("inf")
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


class _Cut(NamedTuple):
    """How a kernel cuts its work.

    Attributes
    ----------
    rows, step : int
        Tokens of a tile, and of the other side a step: what bits depend on, so they follow from dtype and head dim.
    warps, stages : int
        Of a program; of loads in flight.
    """

    rows: int
    step: int
    warps: int
    stages: int


# kernel -> (widest head dim, cut)
_HALF = {
    "forward": ((64, _Cut(64, 64, 4, 3)), (128, _Cut(128, 64, 8, 4)), (256, _Cut(64, 32, 4, 2))),
    "backward_q": ((64, _Cut(64, 32, 4, 3)), (128, _Cut(128, 64, 8, 3)), (256, _Cut(64, 32, 8, 2))),
    "backward_kv": ((64, _Cut(64, 32, 4, 3)), (128, _Cut(64, 64, 4, 2)), (256, _Cut(64, 32, 8, 2))),
}
# Where a program has 99 KiB of shared memory, each within it as Triton compiles it for 8.9.
_HALF_IN_LITTLE = {
    "forward": ((64, _Cut(64, 64, 4, 3)), (128, _Cut(128, 64, 8, 3)), (256, _Cut(64, 32, 4, 2))),
    "backward_q": ((64, _Cut(64, 32, 4, 3)), (128, _Cut(128, 64, 8, 2)), (256, _Cut(64, 32, 8, 1))),
    "backward_kv": ((64, _Cut(64, 32, 4, 3)), (128, _Cut(64, 64, 4, 2)), (256, _Cut(32, 32, 4, 2))),
}
_SINGLE = {
    "forward": ((64, _Cut(32, 32, 4, 1)), (128, _Cut(32, 32, 8, 1)), (256, _Cut(16, 16, 4, 1))),
    "backward_q": ((64, _Cut(32, 32, 4, 1)), (128, _Cut(32, 32, 8, 1)), (256, _Cut(16, 16, 8, 1))),
    "backward_kv": ((64, _Cut(32, 32, 4, 1)), (128, _Cut(32, 32, 8, 1)), (256, _Cut(32, 16, 8, 1))),
}


def _little() -> bool:
    """Whether a program of JAX's first GPU has no more than 99 KiB of shared memory; others have 160 KiB and more.

    So the CUDA programming guide says for compute capabilities 8.6, 8.9 and 12. Where there is no GPU, Pallas compiles for
    Hopper.
    """
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return capability in ("8.6", "8.9") or capability.startswith("12.")


def _cut(kernel: str, q: Dense, v: Dense) -> _Cut:
    width = max(q.shape[2], v.shape[2])
    halves = _HALF_IN_LITTLE if _little() else _HALF
    table = (halves if q.dtype.itemsize == 2 else _SINGLE)[kernel]
    return next(cut for widest, cut in table if width <= widest)


class _Fixed(NamedTuple):
    """What a program is compiled for."""

    options: AttentionOptions
    interpret: bool


def attend(q: Array, k: Array, v: Array, sinks: Dense | None, options: AttentionOptions) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, in one pass over the tiles that any query sees."""
    fixed = _Fixed(portable.compiled_for(options), INTERPRET)
    o, lse = _compute(q.values, k.values, v.values, q.offsets, k.offsets, sinks, fixed, options.return_lse)
    out = q.with_values(o)
    return (out, q.with_values(lse)) if options.return_lse else out


@partial(jax.jit, static_argnames=("fixed", "return_lse"))
def _compute(
    q: Dense,
    k: Dense,
    v: Dense,
    q_offsets: Dense,
    k_offsets: Dense,
    sinks: Dense | None,
    fixed: _Fixed,
    return_lse: bool,
) -> tuple[Dense, Dense | None]:
    if q_offsets.shape[0] == 1 or 0 in (*q.shape, *k.shape, *v.shape):  # nothing that a kernel could be given
        return portable._compute(q, k, v, q_offsets, k_offsets, sinks, fixed.options)
    q_offsets, k_offsets = (safe(offsets, len(x)).astype(jnp.int32) for offsets, x in ((q_offsets, q), (k_offsets, k)))
    o, lse = _attend(fixed, q, k, v, sinks, q_offsets, k_offsets)
    if not return_lse:
        return o, None
    return o, jnp.where(_used(q_offsets, len(q))[:, None], lse.T, 0)


def _used(offsets: Dense, total: int) -> Dense:
    """(T,): which tokens belong to a sequence."""
    token = jnp.arange(total)
    return (token >= offsets[0]) & (token < offsets[-1])


def _launch(
    kernel: str,
    fixed: _Fixed,
    q: Dense,
    v: Dense,
    heads: int,
    group: int,
    rows: tuple[Rows, Rows],
    out: Any,
    *given: Any,
) -> Any:
    cut = _cut(kernel, q, v)
    given_ = fixed.options
    left, right = given_.sides
    of = (right, left) if kernel == "backward_kv" else (left, right)
    tiles = table_of(*rows, of, cut.rows)
    options = Options(given_.scale, left, right, given_.softcap, group, cut.rows, cut.step, fixed.interpret)
    launch = Launch(heads, cut.warps, cut.stages, fixed.interpret)
    return _kernels.call(getattr(_kernels, kernel), options, launch, out, tiles, *given)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _attend(
    fixed: _Fixed, q: Dense, k: Dense, v: Dense, sinks: Dense | None, q_offsets: Dense, k_offsets: Dense
) -> tuple[Dense, Dense]:
    """o (T, H, D_v) and lse (H, T)."""
    return _where.by_device(
        fixed.interpret, _kernel_forward, _tiles_forward, fixed, q, k, v, sinks, q_offsets, k_offsets
    )


def _forward(fixed: _Fixed, *given: Any) -> tuple[tuple[Dense, Dense], tuple[Any, ...]]:
    o, lse = _attend(fixed, *given)
    return (o, lse), (*given, o, lse)


def _backward(fixed: _Fixed, kept: tuple[Any, ...], grads: tuple[Dense, Dense]) -> tuple[Any, ...]:
    return (*_where.by_device(fixed.interpret, _kernel_backward, _tiles_backward, fixed, *kept, *grads), None, None)


_attend.defvjp(_forward, _backward)


def _kernel_forward(
    fixed: _Fixed, q: Dense, k: Dense, v: Dense, sinks: Dense | None, q_offsets: Dense, k_offsets: Dense
) -> tuple[Dense, Dense]:
    if not fixed.interpret and _hopper.serves(fixed.options, q, k, v):
        return _hopper.attend(fixed.options, q, k, v, sinks, q_offsets, k_offsets)
    total, heads, _ = q.shape
    out = (
        jax.ShapeDtypeStruct((total, heads, v.shape[2]), q.dtype),
        jax.ShapeDtypeStruct((heads, total), jnp.float32),
    )
    more = () if sinks is None else (sinks.astype(jnp.float32),)
    group, of = heads // k.shape[1], (rows_of(q_offsets, total), rows_of(k_offsets, len(k)))
    o, lse = _launch("forward", fixed, q, v, heads, group, of, out, q, k, v, *more)
    return o, lse


def _kernel_backward(
    fixed: _Fixed,
    q: Dense,
    k: Dense,
    v: Dense,
    sinks: Dense | None,
    q_offsets: Dense,
    k_offsets: Dense,
    o: Dense,
    lse: Dense,
    g: Dense,
    g_lse: Dense,
) -> tuple[Any, ...]:
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    top = jnp.where(lse == -_INF, _INF, lse * _kernels.LOG2E)
    if not fixed.interpret and _hopper.serves(fixed.options, q, k, v):
        dq, dk, dv, pull = _hopper.differentiate(fixed.options, q, k, v, q_offsets, k_offsets, o, top, g, g_lse)
    else:
        queries, keys = rows_of(q_offsets, len(q)), rows_of(k_offsets, len(k))
        of, out = (queries, keys), (like(q), like(lse))
        dq, pull = _launch("backward_q", fixed, q, v, heads, group, of, out, q, k, v, g, o, top, g_lse)
        of, out = (keys, queries), (like(k), like(v))
        dk, dv = _launch("backward_kv", fixed, q, v, kv_heads, group, of, out, q, k, v, g, top, pull)
    if sinks is None:
        return dq, dk, dv, None
    each = jnp.where(_used(q_offsets, len(q)), jnp.exp(sinks.astype(jnp.float32)[:, None] - lse) * pull, 0)
    return dq, dk, dv, each.sum(-1).astype(sinks.dtype)


def _tiles_forward(fixed: _Fixed, *given: Any) -> tuple[Dense, Dense]:
    o, lse = portable._attend(fixed.options, *given)
    return o, lse.T


def _tiles_backward(fixed: _Fixed, *given: Any) -> tuple[Any, ...]:
    *arrays, o, lse, g, g_lse = given
    return portable._backward(fixed.options, (*arrays, o, lse.T), (g, g_lse.T))[:4]
