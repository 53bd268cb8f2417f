"""Rotary position embedding in one pass; its backward is the rotation by the opposite angles."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense

from ..._array import Array
from ..._offsets import is_used, position_ids, shifted_positions

_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def varlen_rope(arr: Array, cos: Dense, sin: Dense, *, interleaved: bool = False, start: Any = None) -> Array:
    """Compute `scree.kernels.varlen_rope` in one pass over the tokens."""
    if arr.values.size == 0:
        return arr
    begin = 0 if start is None else start
    each, one = (None, begin) if isinstance(begin, int) else (begin, 0)
    y = _turned(arr, cos, sin, each, one=one, interleaved=interleaved)
    return arr.with_values(y)


@partial(jax.jit, static_argnames=("one", "interleaved"))
def _turned(arr: Array, cos: Dense, sin: Dense, each: Dense | None, *, one: int, interleaved: bool) -> Dense:
    xp, x, spare = arr._xp, arr.values, arr._structure.spare
    places = position_ids(xp, arr.offsets, arr.total_length)
    places = shifted_positions(xp, places, arr.offsets, one if each is None else each, spare=spare)
    axes = tuple(range(1, x.ndim - 1))
    c, s = (jnp.expand_dims(_looked_up(table, places), axes) for table in (cos, sin))
    y = _rotate(interleaved, x, c, s)
    if not spare:
        return y
    used = is_used(xp, arr.offsets, arr.total_length)
    return jnp.where(used.reshape(-1, *(1,) * (x.ndim - 1)), y, 0)


def _looked_up(table: Dense, places: Dense) -> Dense:
    """table[places], (T, D/2), in float32 or wider; NaN where a place lies outside."""
    wide = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    beyond = jnp.where(places < 0, table.shape[0], places)
    return jnp.take(wide, beyond, axis=0, mode="fill", fill_value=jnp.nan)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _rotate(interleaved: bool, x: Dense, c: Dense, s: Dense) -> Dense:
    """y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s; c and s are (T, ..1.., D/2)."""
    x1, x2 = _pairs(interleaved, x)
    return _joined(interleaved, x1 * c - x2 * s, x2 * c + x1 * s).astype(x.dtype)


def _pairs(interleaved: bool, x: Dense) -> tuple[Dense, Dense]:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _joined(interleaved: bool, y1: Dense, y2: Dense) -> Dense:
    if not interleaved:
        return jnp.concatenate([y1, y2], -1)
    return jnp.stack([y1, y2], -1).reshape(*y1.shape[:-1], -1)


def _rotate_fwd(interleaved: bool, x: Any, c: Any, s: Any) -> tuple[Dense, tuple[Any, ...]]:
    kept = x.value if c.perturbed or s.perturbed else None  # which would stay in memory for the backward
    return _rotate(interleaved, x.value, c.value, s.value), (kept, c.value, s.value)


def _rotate_bwd(interleaved: bool, kept: tuple[Any, ...], grad: Any) -> tuple[Dense | None, ...]:
    x, c, s = kept
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None
    dx = _rotate(interleaved, grad, c, -s)
    if x is None:
        return dx, None, None
    x1, x2 = _pairs(interleaved, x)
    g1, g2 = _pairs(interleaved, grad)
    heads = tuple(range(1, grad.ndim - 1))
    dc, ds = g1 * x1 + g2 * x2, g2 * x1 - g1 * x2
    return dx, dc.sum(heads, keepdims=True), ds.sum(heads, keepdims=True)


_rotate.defvjp(_rotate_fwd, _rotate_bwd, symbolic_zeros=True)
