"""Softmax and reductions along the ragged axis, by trees over tiles of each row.

Wide tokens are taken tile by tile in a loop, narrow ones all at once by a gather; either way a row is a tree of
elementwise operations that begins where the row begins. The CPU adds up what a scatter brings in its order, and so does
the same for all but narrow tokens. Spreading values over the tokens of their rows and adding up
the tokens of rows are each other's derivative, so that no gradient is scattered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._array import Array
from ..._check import integer_limits, is_integer
from ..._layout import moved_from_front, moved_to_front
from ._tiles import at, longer, safe, tiles_of

_MIDDLING, _WIDE = 32, 64  # features
_LOOPED, _GATHERED, _SCATTERED = 128, 32, 512  # tokens of a tile
_INF = float("inf")
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates

_COMBINE: dict[str, Callable[[Dense, Dense], Dense]] = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def _neutral(op: str, dtype: Any) -> Any:
    """What changes nothing beside any value: -0.0 is what leaves the sign of a sum of zeros."""
    name = jnp.dtype(dtype).name
    if is_integer(name):
        return 0 if op == "sum" else integer_limits(name)[op == "min"]
    return {"sum": -0.0, "max": -_INF, "min": _INF}[op]


def _halved(op: str, x: Dense) -> Dense:
    """Combine along axis -2, whose size is a power of two, half with half."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = _COMBINE[op](x[..., :half, :], x[..., half:, :])
    return x[..., 0, :]


def _fold(op: str, x: Dense, offsets: Dense) -> Dense:
    """Combine the tokens (T, F) of each row, (B, F); the neutral value for an empty row."""
    if x.shape[0] == 0 or offsets.shape[0] == 1:
        return jnp.full((offsets.shape[0] - 1, x.shape[1]), _neutral(op, x.dtype), x.dtype)
    if x.shape[1] < _MIDDLING:
        return _gathered(op, x, offsets)
    by_tiles = partial(_looped if x.shape[1] >= _WIDE else _gathered, op)
    return lax.platform_dependent(x, offsets, cpu=partial(_scattered, op), default=by_tiles)


def _scattered(op: str, x: Dense, offsets: Dense) -> Dense:
    """Combine the tokens of tiles, and then the tiles of rows, one after the other, which a scatter on the CPU does.

    On other devices its order is any.
    """
    total, rows = x.shape[0], offsets.shape[0] - 1
    tiles = tiles_of(offsets, _SCATTERED)
    number = jnp.arange(total // _SCATTERED + rows, dtype=offsets.dtype)
    tile = tiles.tile(number)
    starts = jnp.where(number < tiles.all(), tile.start, total)
    places = jnp.arange(total, dtype=offsets.dtype)
    index = jnp.searchsorted(starts, places, side="right") - 1
    parts = _scatter(op, x, jnp.where(places < offsets[-1], index, len(number)), len(number))
    return _scatter(op, parts, tile.row, rows)


def _scatter(op: str, x: Dense, index: Dense, count: int) -> Dense:
    """Combine x (T, F) by index, sorted, to (count, F); what has a larger index is left out."""
    target = jnp.full((count, x.shape[1]), _neutral(op, x.dtype), x.dtype).at[index]
    combine = {"sum": target.add, "max": target.max, "min": target.min}[op]
    return combine(x, mode="drop", indices_are_sorted=True)


def _looped(op: str, x: Dense, offsets: Dense) -> Dense:
    neutral = jnp.asarray(_neutral(op, x.dtype), x.dtype)
    tiles = tiles_of(offsets, _LOOPED)
    x = longer(x, 0, _LOOPED)

    def of_tile(i: Dense, done: Dense) -> Dense:
        tile = tiles.tile(i)
        inside = tile.start + jnp.arange(_LOOPED, dtype=tile.start.dtype) < offsets[tile.row + 1]
        part = jnp.where(inside[:, None], at(x, 0, tile.start, _LOOPED), neutral)
        return done.at[tile.row].set(_COMBINE[op](done[tile.row], _halved(op, part)))

    out = jnp.full((offsets.shape[0] - 1, x.shape[1]), neutral, x.dtype)
    return lax.fori_loop(jnp.zeros_like(tiles.all()), tiles.all(), of_tile, out)


def _gathered(op: str, x: Dense, offsets: Dense) -> Dense:
    neutral = jnp.asarray(_neutral(op, x.dtype), x.dtype)
    rows = offsets.shape[0] - 1
    for _ in range(max(1, math.ceil(math.log(max(x.shape[0], 2), _GATHERED) - 1e-9))):
        tiles = tiles_of(offsets, _GATHERED)
        most = x.shape[0] // _GATHERED + rows
        tile = tiles.tile(jnp.arange(most, dtype=offsets.dtype))
        row = jnp.minimum(tile.row, rows - 1)
        index = tile.start[:, None] + jnp.arange(_GATHERED, dtype=offsets.dtype)
        inside = (index < offsets[row + 1][:, None]) & (tile.row < rows)[:, None]
        part = jnp.take(x, index, axis=0, mode="clip")
        x = _halved(op, jnp.where(inside[..., None], part, neutral))
        offsets = tiles.bounds
    one = jnp.take(x, offsets[:-1], axis=0, mode="clip")
    return jnp.where((offsets[1:] > offsets[:-1])[:, None], one, neutral)


@partial(_custom_vjp, nondiff_argnums=(2,))
def _spread(values: Dense, offsets: Dense, total: int) -> Dense:
    """Give each token the values (B, F) of its row, (T, F); 0 beyond the last row."""
    if offsets.shape[0] == 1:
        return jnp.zeros((total, values.shape[1]), values.dtype)
    places = jnp.arange(total, dtype=offsets.dtype)
    row = jnp.searchsorted(offsets[1:], places, side="right")
    return jnp.where((places < offsets[-1])[:, None], jnp.take(values, row, axis=0, mode="clip"), 0)


@_custom_vjp
def _sum(x: Dense, offsets: Dense) -> Dense:
    """Add up the tokens (T, F) of each row, (B, F)."""
    return _fold("sum", x, offsets) + 0.0  # no sum of nothing is -0.0


def _spread_fwd(values: Dense, offsets: Dense, total: int) -> tuple[Dense, Dense]:
    return _spread(values, offsets, total), offsets


def _spread_bwd(total: int, offsets: Dense, grad: Dense) -> tuple[Dense, None]:
    return _sum(grad, offsets), None


def _sum_fwd(x: Dense, offsets: Dense) -> tuple[Dense, tuple[Dense, Dense]]:
    return _sum(x, offsets), (offsets, jnp.zeros((x.shape[0], 0)))


def _sum_bwd(kept: tuple[Dense, Dense], grad: Dense) -> tuple[Dense, None]:
    return _spread(grad, kept[0], kept[1].shape[0]), None


_spread.defvjp(_spread_fwd, _spread_bwd)
_sum.defvjp(_sum_fwd, _sum_bwd)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _extreme(op: str, x: Dense, offsets: Dense) -> Dense:
    """The largest or the smallest token of each row, (B, F); equals share the gradient."""
    return _fold(op, x, offsets)


def _extreme_fwd(op: str, x: Dense, offsets: Dense) -> tuple[Dense, tuple[Dense, ...]]:
    out = _extreme(op, x, offsets)
    return out, (x, out, offsets)


def _extreme_bwd(op: str, kept: tuple[Dense, ...], grad: Dense) -> tuple[Dense, None]:
    x, out, offsets = kept
    won = jnp.equal(x, _spread(out, offsets, x.shape[0])).astype(x.dtype)
    share = grad / jnp.maximum(_sum(won, offsets), 1)
    return won * _spread(share, offsets, x.shape[0]), None


_extreme.defvjp(_extreme_fwd, _extreme_bwd)


def _exponentials(x: Dense, offsets: Dense) -> tuple[Dense, Dense]:
    """exp(x - top), (T, F), and top, (B, F): the largest of each row where that is finite; 0 for unused tokens."""
    top = lax.stop_gradient(_extreme("max", x, offsets))
    top = jnp.where(jnp.abs(top) < _INF, top, 0)
    return jnp.exp(x - _spread(top, offsets, x.shape[0])), top


def _flat(arr: Array) -> Dense:
    """The values as (T, F), the ragged axis first."""
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return x.reshape(x.shape[0], math.prod(arr.feature_shape))


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax` by trees over tiles."""
    y = _softmax(_flat(arr), arr.offsets).reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


@jax.jit
def _softmax(values: Dense, offsets: Dense) -> Dense:
    total = values.shape[0]
    offsets = safe(offsets, total)
    used = (jnp.arange(total) < offsets[-1])[:, None]
    x = jnp.where(used, values.astype(jnp.promote_types(values.dtype, jnp.float32)), 0)
    top = lax.stop_gradient(_extreme("max", x, offsets))
    p = jnp.exp(x - _spread(top, offsets, total))
    l = _spread(_sum(p, offsets), offsets, total)
    return jnp.where(used, p / jnp.where(used, l, 1), 0).astype(values.dtype)


def varlen_reduce(arr: Array, op: str) -> Dense:
    """Compute `scree.kernels.varlen_reduce` by trees over tiles."""
    return _reduce(_flat(arr), arr.offsets, op=op).reshape(arr.batch_size, *arr.feature_shape)


@partial(jax.jit, static_argnames="op")
def _reduce(values: Dense, offsets: Dense, *, op: str) -> Dense:
    total = values.shape[0]
    offsets = safe(offsets, total)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        x = values.astype(jnp.int8) if values.dtype == jnp.bool_ else values
        out = _fold(op, x, offsets)
        return out > 0 if values.dtype == jnp.bool_ else out
    x = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    if op in ("max", "min"):
        return _extreme(op, x, offsets).astype(values.dtype)
    if op == "logsumexp":
        x = jnp.where((jnp.arange(total) < offsets[-1])[:, None], x, 0)
        p, top = _exponentials(x, offsets)
        s = _sum(p, offsets)
        none = s == 0
        return jnp.where(none, -_INF, jnp.log(jnp.where(none, 1, s)) + top).astype(values.dtype)
    out = _sum(x, offsets)
    if op == "mean":
        lengths = (offsets[1:] - offsets[:-1])[:, None]
        out = jnp.where(lengths > 0, out / jnp.maximum(lengths, 1).astype(x.dtype), jnp.nan)
    return out.astype(values.dtype)
