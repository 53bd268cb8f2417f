"""Attention tile by tile over the packed axis, skipping those tiles that share no sequence.

A tile of queries meets the tiles of keys that any of its queries sees, in the order of the keys::

    s = scale * q k^T                       t = tanh(s / c), s = c * t    with softcap c
    m' = max(m, max_j s)   p = exp(s - m')  l' = l exp(m - m') + sum_j p  o' = o exp(m - m') + p v

and in the backward, with the LSE kept and delta[i] = <g[i], o[i]>::

    p = exp(s - lse)   ds = p * (g v^T - delta + g_lse) * (1 - t**2)      dq += ds k   dk += ds^T q   dv += p^T g

Tokens of a tile that belong to another row are zeros before any arithmetic, and what they give is 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._array import Array
from .._rows import sides
from ._tiles import Tile, at, longer, put, safe, tiles_of

_TILE = 128  # tokens
_INF = float("inf")
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


class _Options(NamedTuple):
    scale: float
    left: int | None
    right: int | None
    softcap: float | None


def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    scale: float,
    window_size: tuple[int | None, int | None],
    softcap: float | None,
    sinks: Dense | None,
    return_lse: bool,
    deterministic: bool,
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, tile by tile."""
    options = _Options(scale, *sides(causal, window_size), softcap)
    o, lse = _compute(q.values, k.values, v.values, q.offsets, k.offsets, sinks, options)
    out = q.with_values(o)
    return (out, q.with_values(lse)) if return_lse else out


@partial(jax.jit, static_argnames="options")
def _compute(
    q: Dense, k: Dense, v: Dense, q_offsets: Dense, k_offsets: Dense, sinks: Dense | None, options: _Options
) -> tuple[Dense, Dense]:
    if q_offsets.shape[0] == 1 or q.shape[0] == 0:
        nothing = jnp.sum(q) + jnp.sum(k) + jnp.sum(v)  # keeps a place for the gradient, which is 0
        o = jnp.zeros((*q.shape[:2], v.shape[2]), q.dtype) + 0 * nothing.astype(q.dtype)
        return o, jnp.zeros(q.shape[:2], jnp.float32)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_offsets, k_offsets = safe(q_offsets, q.shape[0]), safe(k_offsets, k.shape[0])
    kv_heads = k.shape[1]
    # (K, G, T, D) and (K, T, D): a tile of a head is one run of memory
    by_heads = jnp.moveaxis(q.astype(dtype), 0, 1).reshape(kv_heads, -1, q.shape[0], q.shape[2])
    keys, values = (jnp.moveaxis(x.astype(dtype), 0, 1) for x in (k, v))
    sink = None if sinks is None else sinks.astype(dtype).reshape(kv_heads, -1)
    o, lse = _attend(options, by_heads, keys, values, sink, q_offsets, k_offsets)
    o = jnp.moveaxis(o.reshape(q.shape[1], q.shape[0], -1), 0, 1)
    lse = jnp.moveaxis(lse.reshape(q.shape[1], q.shape[0]), 0, 1)
    used = jnp.arange(q.shape[0]) < q_offsets[-1]
    return o.astype(q.dtype), jnp.where(used[:, None], lse, 0).astype(jnp.float32)


def _dot(a: Dense, b: Dense, contract: tuple[int, int]) -> Dense:
    """Multiply (K, x, y) and (K, x, y) over the axes `contract`, head by head."""
    left, right = contract
    return lax.dot_general(a, b, (((left,), (right,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)


class _Pair(NamedTuple):
    """A tile of queries and the row that it is of."""

    tile: Tile
    n: Dense
    m: Dense
    k_start: Dense
    first: Dense
    last: Dense


def _pair(options: _Options, tile: Tile, q_offsets: Dense, k_offsets: Dense) -> _Pair:
    """Find the tiles of keys, from `first` to before `last` of the row, that any query of the tile sees."""
    n = q_offsets[tile.row + 1] - q_offsets[tile.row]
    m = k_offsets[tile.row + 1] - k_offsets[tile.row]
    low = tile.number * _TILE
    high = jnp.minimum(low + _TILE, n) - 1
    begin, end = jnp.zeros_like(m), m
    if options.left is not None:
        begin = jnp.clip(low + m - n - options.left, 0, m)
    if options.right is not None:
        end = jnp.clip(high + m - n + options.right + 1, 0, m)
    last = jnp.where(end > begin, (end + _TILE - 1) // _TILE, 0)
    return _Pair(tile, n, m, k_offsets[tile.row], begin // _TILE, last)


def _inside(start: Dense, length: Dense) -> Dense:
    """(_TILE,): which places of a tile that begins at `start` of its row belong to it."""
    return start + jnp.arange(_TILE, dtype=start.dtype) < length


def _seen(options: _Options, pair: _Pair, j: Dense) -> Dense:
    """(_TILE, _TILE): which keys of the j-th tile each query sees; none beyond the row."""
    places = jnp.arange(_TILE, dtype=j.dtype)
    i, key = pair.tile.number * _TILE + places[:, None], j * _TILE + places[None, :]
    seen = (i < pair.n) & (key < pair.m)
    aligned = i + pair.m - pair.n
    if options.right is not None:
        seen &= key <= aligned + options.right
    if options.left is not None:
        seen &= key >= aligned - options.left
    return seen


def _queries(x: Dense, pair: _Pair) -> Dense:
    """A tile of (K, G, T, ...) as (K, G * _TILE, ...), zeros beyond the row."""
    part = at(x, 2, pair.tile.start, _TILE)
    inside = _inside(pair.tile.number * _TILE, pair.n).reshape((1, 1, _TILE) + (1,) * (x.ndim - 3))
    return jnp.where(inside, part, 0).reshape(x.shape[0], -1, *x.shape[3:])


def _keys(x: Dense, pair: _Pair, j: Dense) -> Dense:
    """The j-th tile of the row's (K, T, D), zeros beyond the row."""
    part = at(x, 1, pair.k_start + j * _TILE, _TILE)
    return jnp.where(_inside(j * _TILE, pair.m)[None, :, None], part, 0)


def _scores(options: _Options, q: Dense, k: Dense) -> tuple[Dense, Dense | None]:
    """s, (K, G * _TILE, _TILE), and with a softcap t."""
    s = _dot(q, k, (2, 2)) * options.scale
    if options.softcap is None:
        return s, None
    t = jnp.tanh(s * (1.0 / options.softcap))
    return options.softcap * t, t


def _each_head(seen: Dense, s: Dense) -> Dense:
    """(_TILE, _TILE) for every head: (1, G * _TILE, _TILE)."""
    return jnp.tile(seen, (s.shape[1] // _TILE, 1))[None]


@partial(_custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: _Options, q: Dense, k: Dense, v: Dense, sinks: Dense | None, q_offsets: Dense, k_offsets: Dense
) -> tuple[Dense, Dense]:
    """o (K, G, T, D_v) and lse (K, G, T); 0 and -inf (or the sink) where a query sees no key."""
    kv_heads, group, total, _ = q.shape
    rows = group * _TILE
    tiles = tiles_of(q_offsets, _TILE)
    q, k, v = longer(q, 2, _TILE), longer(k, 1, _TILE), longer(v, 1, _TILE)

    def of_queries(i: Dense, done: tuple[Dense, Dense]) -> tuple[Dense, Dense]:
        pair = _pair(options, tiles.tile(i), q_offsets, k_offsets)
        mine = _queries(q, pair)

        def of_keys(j: Dense, state: tuple[Dense, Dense, Dense]) -> tuple[Dense, Dense, Dense]:
            o, top, l = state
            s, _ = _scores(options, mine, _keys(k, pair, j))
            s = jnp.where(_each_head(_seen(options, pair, j), s), s, -_INF)
            higher = jnp.maximum(top, s.max(-1, keepdims=True))
            finite = jnp.where(higher == -_INF, 0, higher)
            p, shrink = jnp.exp(s - finite), jnp.exp(top - finite)
            return o * shrink + _dot(p, _keys(v, pair, j), (2, 1)), higher, l * shrink + p.sum(-1, keepdims=True)

        o = jnp.zeros((kv_heads, rows, v.shape[2]), q.dtype)
        top, l = jnp.full((kv_heads, rows, 1), -_INF, q.dtype), jnp.zeros((kv_heads, rows, 1), q.dtype)
        o, top, l = lax.fori_loop(pair.first, pair.last, of_keys, (o, top, l))
        none = l == 0
        o = o / jnp.where(none, 1, l)
        lse = jnp.where(none, -_INF, jnp.log(jnp.where(none, 1, l)) + jnp.where(none, 0, top))
        o, lse = o.reshape(kv_heads, group, _TILE, -1), lse.reshape(kv_heads, group, _TILE)
        if sinks is not None:
            both = jnp.logaddexp(lse, sinks[..., None])
            o, lse = o * jnp.exp(lse - both)[..., None], both
        return put(done[0], 2, pair.tile.start, o), put(done[1], 2, pair.tile.start, lse)

    # A tile that ends behind its row writes into the next one, whose own tile comes later.
    o = jnp.zeros((kv_heads, group, total + _TILE, v.shape[2]), q.dtype)
    lse = jnp.full((kv_heads, group, total + _TILE), -_INF, q.dtype)
    o, lse = lax.fori_loop(jnp.zeros_like(tiles.all()), tiles.all(), of_queries, (o, lse))
    return o[:, :, :total], lse[:, :, :total]


def _forward(options: _Options, *given: Dense) -> tuple[tuple[Dense, Dense], tuple[Any, ...]]:
    o, lse = _attend(options, *given)
    return (o, lse), (*given, o, lse)


def _backward(options: _Options, kept: tuple[Any, ...], grads: tuple[Dense, Dense]) -> tuple[Any, ...]:
    q, k, v, sinks, q_offsets, k_offsets, o, lse = kept
    grad_o, grad_lse = grads
    kv_heads, group, total, dim = q.shape
    tiles = tiles_of(q_offsets, _TILE)
    lse = jnp.where(lse == -_INF, 0, lse)
    q, o, grad_o, lse, grad_lse = (longer(x, 2, _TILE) for x in (q, o, grad_o, lse, grad_lse))
    k, v = longer(k, 1, _TILE), longer(v, 1, _TILE)

    def of_queries(i: Dense, done: tuple[Dense, ...]) -> tuple[Dense, ...]:
        pair = _pair(options, tiles.tile(i), q_offsets, k_offsets)
        mine, g = _queries(q, pair), _queries(grad_o, pair)
        top = _queries(lse, pair)[..., None]
        pull = _queries(grad_lse, pair)[..., None] - (g * _queries(o, pair)).sum(-1, keepdims=True)

        def of_keys(j: Dense, state: tuple[Dense, Dense, Dense]) -> tuple[Dense, Dense, Dense]:
            dq, dk, dv = state
            key, value = _keys(k, pair, j), _keys(v, pair, j)
            s, t = _scores(options, mine, key)
            p = jnp.where(_each_head(_seen(options, pair, j), s), jnp.exp(s - top), 0)
            ds = p * (_dot(g, value, (2, 2)) + pull) * options.scale
            if t is not None:
                ds = ds * (1 - t * t)
            start = pair.k_start + j * _TILE
            # What follows the row in this tile is of another one, and 0 * NaN is no 0.
            inside = _inside(j * _TILE, pair.m)[None, :, None]
            dk = put(dk, 1, start, at(dk, 1, start, _TILE) + jnp.where(inside, _dot(ds, mine, (1, 1)), 0))
            dv = put(dv, 1, start, at(dv, 1, start, _TILE) + jnp.where(inside, _dot(p, g, (1, 1)), 0))
            return dq + _dot(ds, key, (2, 1)), dk, dv

        dq = jnp.zeros((kv_heads, group * _TILE, dim), q.dtype)
        dq, dk, dv = lax.fori_loop(pair.first, pair.last, of_keys, (dq, done[1], done[2]))
        dq = put(done[0], 2, pair.tile.start, dq.reshape(kv_heads, group, _TILE, dim))
        if sinks is None:
            return dq, dk, dv
        weight = jnp.exp(sinks[..., None] - top.reshape(kv_heads, group, _TILE))
        inside = _inside(pair.tile.number * _TILE, pair.n)
        each = jnp.where(inside, weight * pull.reshape(kv_heads, group, _TILE), 0)
        return dq, dk, dv, done[3] + each.sum(-1)

    zeros = tuple(jnp.zeros_like(x) for x in (q, k, v, sinks) if x is not None)
    done = lax.fori_loop(jnp.zeros_like(tiles.all()), tiles.all(), of_queries, zeros)
    dsinks = None if sinks is None else done[3]
    dq, dk, dv = done[0][:, :, :total], done[1][:, : kept[1].shape[1]], done[2][:, : kept[2].shape[1]]
    return dq, dk, dv, dsinks, None, None


_attend.defvjp(_forward, _backward)
