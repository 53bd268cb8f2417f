"""Attention tile by tile over the packed axis, skipping those tiles that share no sequence.

A tile of queries meets the tiles of keys that any of its queries sees, in the order of the keys::

    s = scale * q k^T                       t = tanh(s / c), s = c * t    with softcap c
    m' = max(m, max_j s)   p = exp(s - m')  l' = l exp(m - m') + sum_j p  o' = o exp(m - m') + p v

and in the backward, with the LSE kept and delta[i] = <g[i], o[i]>::

    p = exp(s - lse)   ds = p * (g v^T - delta + g_lse) * (1 - t**2)      dq += ds k   dk += ds^T q   dv += p^T g

Tokens of a tile that belong to another row are zeros before any arithmetic, and what they give is 0. Nothing is copied
into another layout as a whole: a tile is turned when it is read.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._array import Array
from .._options import AttentionOptions
from ._tiles import Tile, at, longer, put, safe, tiles_of

_TILE = 64  # tokens: XLA cuts the scores of more in two for its threads, and waits for both
_INF = float("inf")
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def attend(q: Array, k: Array, v: Array, sinks: Dense | None, options: AttentionOptions) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, tile by tile."""
    o, lse = _compute(q.values, k.values, v.values, q.offsets, k.offsets, sinks, compiled_for(options))
    out = q.with_values(o)
    return (out, q.with_values(lse)) if options.return_lse else out


def compiled_for(options: AttentionOptions) -> AttentionOptions:
    """The options without what makes no other program here, so that none is compiled twice."""
    return options._replace(causal=False, window_size=options.sides, return_lse=False, deterministic=True)


@partial(jax.jit, static_argnames="options")
def _compute(
    q: Dense, k: Dense, v: Dense, q_offsets: Dense, k_offsets: Dense, sinks: Dense | None, options: AttentionOptions
) -> tuple[Dense, Dense]:
    if q_offsets.shape[0] == 1 or q.shape[0] == 0:
        nothing = jnp.sum(q) + jnp.sum(k) + jnp.sum(v)  # keeps a place for the gradient, which is 0
        o = jnp.zeros((*q.shape[:2], v.shape[2]), q.dtype) + 0 * nothing.astype(q.dtype)
        return o, jnp.zeros(q.shape[:2], jnp.float32)
    q_offsets, k_offsets = safe(q_offsets, q.shape[0]), safe(k_offsets, k.shape[0])
    o, lse = _attend(options, q, k, v, sinks, q_offsets, k_offsets)
    used = jnp.arange(q.shape[0]) < q_offsets[-1]
    return o, jnp.where(used[:, None], lse, 0).astype(jnp.float32)


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


def _pair(options: AttentionOptions, tile: Tile, q_offsets: Dense, k_offsets: Dense) -> _Pair:
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


def _seen(options: AttentionOptions, pair: _Pair, j: Dense) -> Dense:
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


class _Tokens:
    """Tokens (T, H, ..) of which tiles are read, as (K, H / K * tokens, ..) and float32 or wider, zeros beyond the row."""

    def __init__(self, x: Dense, kv_heads: int) -> None:
        self.x, self.kv_heads = x if len(x) >= _TILE else longer(x, 0, _TILE - len(x)), kv_heads
        self.limit = len(self.x) - _TILE
        self.end = longer(self.x[self.limit :], 0, _TILE)  # what a tile is read from that ends behind the last token

    def tile(self, start: Dense, inside: Dense) -> Dense:
        most = at(self.x, 0, jnp.minimum(start, self.limit), _TILE)
        rest = at(self.end, 0, jnp.maximum(start - self.limit, 0), _TILE)
        part = jnp.where(start > self.limit, rest, most)
        part = jnp.where(inside.reshape(-1, *(1,) * (part.ndim - 1)), part, 0)
        part = part.astype(jnp.promote_types(part.dtype, jnp.float32))
        heads = jnp.moveaxis(part.reshape(_TILE, self.kv_heads, -1, *part.shape[2:]), 0, 2)
        return heads.reshape(self.kv_heads, -1, *part.shape[2:])

    def keys(self, pair: _Pair, j: Dense) -> Dense:
        """The j-th tile of keys of the row of a pair."""
        return self.tile(pair.k_start + j * _TILE, _inside(j * _TILE, pair.m))


def _written(x: Dense, start: Dense, part: Dense, inside: Dense) -> Dense:
    """x (T, H, ..) with the tile (K, H / K * _TILE, ..) from `start` on, 0 where not inside of the row.

    A tile that ends behind its row writes into the next one, whose own tile comes later.
    """
    heads = jnp.moveaxis(part.reshape(len(part), -1, _TILE, *part.shape[2:]), 2, 0)
    rows = heads.reshape(_TILE, *x.shape[1:]).astype(x.dtype)
    each = (-1, *(1,) * (x.ndim - 1))
    rows = jnp.where(inside.reshape(each), rows, 0)
    begin = jnp.minimum(start, len(x) - _TILE)
    moved = at(jnp.concatenate([jnp.zeros_like(rows), rows]), 0, _TILE - (start - begin), _TILE)
    before = (jnp.arange(_TILE) < start - begin).reshape(each)
    return put(x, 0, begin, jnp.where(before, at(x, 0, begin, _TILE), moved))


def _scores(options: AttentionOptions, q: Dense, k: Dense) -> tuple[Dense, Dense | None]:
    """s, (K, G * _TILE, _TILE), and with a softcap t."""
    s = _dot(q, k, (2, 2)) * options.scale
    if options.softcap is None:
        return s, None
    t = jnp.tanh(s * (1.0 / options.softcap))
    return options.softcap * t, t


def _each_head(seen: Dense, s: Dense) -> Dense:
    """(_TILE, _TILE) for every head: (1, G * _TILE, _TILE)."""
    return jnp.tile(seen, (s.shape[1] // _TILE, 1))[None]


def _logits(sinks: Dense, kv_heads: int, dtype: Any) -> Dense:
    """(K, G * _TILE, 1): the sink of every query of a tile."""
    return jnp.repeat(sinks.astype(dtype).reshape(kv_heads, -1), _TILE, axis=1)[..., None]


@partial(_custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: AttentionOptions, q: Dense, k: Dense, v: Dense, sinks: Dense | None, q_offsets: Dense, k_offsets: Dense
) -> tuple[Dense, Dense]:
    """o (T, H, D_v) and lse (T, H); 0 and -inf (or the sink) where a query sees no key."""
    total, heads, _ = q.shape
    kv_heads, rows = k.shape[1], heads // k.shape[1] * _TILE
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    tiles = tiles_of(q_offsets, _TILE)
    queries, keys, values = (_Tokens(x, kv_heads) for x in (q, k, v))

    def of_queries(i: Dense, done: tuple[Dense, Dense]) -> tuple[Dense, Dense]:
        pair = _pair(options, tiles.tile(i), q_offsets, k_offsets)
        inside = _inside(pair.tile.number * _TILE, pair.n)
        mine = queries.tile(pair.tile.start, inside)

        def of_keys(j: Dense, state: tuple[Dense, Dense, Dense]) -> tuple[Dense, Dense, Dense]:
            o, top, l = state
            s, _ = _scores(options, mine, keys.keys(pair, j))
            s = jnp.where(_each_head(_seen(options, pair, j), s), s, -_INF)
            higher = jnp.maximum(top, s.max(-1, keepdims=True))
            finite = jnp.where(higher == -_INF, 0, higher)
            p, shrink = jnp.exp(s - finite), jnp.exp(top - finite)
            o = o * shrink + _dot(p, values.keys(pair, j), (2, 1))
            return o, higher, l * shrink + p.sum(-1, keepdims=True)

        o = jnp.zeros((kv_heads, rows, v.shape[2]), dtype)
        top, l = jnp.full((kv_heads, rows, 1), -_INF, dtype), jnp.zeros((kv_heads, rows, 1), dtype)
        o, top, l = lax.fori_loop(pair.first, pair.last, of_keys, (o, top, l))
        none = l == 0
        o = o / jnp.where(none, 1, l)
        lse = jnp.where(none, -_INF, jnp.log(jnp.where(none, 1, l)) + jnp.where(none, 0, top))
        if sinks is not None:
            both = jnp.logaddexp(lse, _logits(sinks, kv_heads, dtype))
            o, lse = o * jnp.exp(lse - both), both
        out, all_lse = done
        return (
            _written(out, pair.tile.start, o, inside),
            _written(all_lse, pair.tile.start, lse[..., 0], inside),
        )

    room = max(total, _TILE)
    done = jnp.zeros((room, heads, v.shape[2]), q.dtype), jnp.zeros((room, heads), dtype)
    o, lse = lax.fori_loop(jnp.zeros_like(tiles.all()), tiles.all(), of_queries, done)
    return o[:total], lse[:total]


def _forward(options: AttentionOptions, *given: Dense) -> tuple[tuple[Dense, Dense], tuple[Any, ...]]:
    o, lse = _attend(options, *given)
    return (o, lse), (*given, o, lse)


def _backward(options: AttentionOptions, kept: tuple[Any, ...], grads: tuple[Dense, Dense]) -> tuple[Any, ...]:
    q, k, v, sinks, q_offsets, k_offsets, o, lse = kept
    grad_o, grad_lse = grads
    total, heads, dim = q.shape
    kv_heads, rows = k.shape[1], heads // k.shape[1] * _TILE
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    tiles = tiles_of(q_offsets, _TILE)
    lse = jnp.where(lse == -_INF, 0, lse)
    queries, of_o, of_lse, of_grad, of_grad_lse = (_Tokens(x, kv_heads) for x in (q, o, lse, grad_o, grad_lse))
    keys, values = _Tokens(k, kv_heads), _Tokens(v, kv_heads)

    def of_queries(i: Dense, done: tuple[Dense, ...]) -> tuple[Dense, ...]:
        pair = _pair(options, tiles.tile(i), q_offsets, k_offsets)
        inside = _inside(pair.tile.number * _TILE, pair.n)
        mine, g, out = (x.tile(pair.tile.start, inside) for x in (queries, of_grad, of_o))
        top, pull = (x.tile(pair.tile.start, inside)[..., None] for x in (of_lse, of_grad_lse))
        pull = pull - (g * out).sum(-1, keepdims=True)

        def of_keys(j: Dense, state: tuple[Dense, Dense, Dense]) -> tuple[Dense, Dense, Dense]:
            dq, dk, dv = state
            key, value = keys.keys(pair, j), values.keys(pair, j)
            s, t = _scores(options, mine, key)
            p = jnp.where(_each_head(_seen(options, pair, j), s), jnp.exp(s - top), 0)
            ds = p * (_dot(g, value, (2, 2)) + pull) * options.scale
            if t is not None:
                ds = ds * (1 - t * t)

            def added(x: Dense, part: Dense) -> Dense:
                begin = pair.k_start + j * _TILE
                # What follows the row in this tile is of another one, and 0 * NaN is no 0.
                part = jnp.where(_inside(j * _TILE, pair.m)[:, None, None], jnp.moveaxis(part, 0, 1), 0)
                return put(x, 0, begin, at(x, 0, begin, _TILE) + part)

            dk, dv = added(dk, _dot(ds, mine, (1, 1))), added(dv, _dot(p, g, (1, 1)))
            return dq + _dot(ds, key, (2, 1)), dk, dv

        dq = jnp.zeros((kv_heads, rows, dim), dtype)
        dq, dk, dv = lax.fori_loop(pair.first, pair.last, of_keys, (dq, done[1], done[2]))
        dq = _written(done[0], pair.tile.start, dq, inside)
        if sinks is None:
            return dq, dk, dv
        each = jnp.exp(_logits(sinks, kv_heads, dtype) - top) * pull
        each = jnp.where(inside, each.reshape(heads, _TILE), 0)
        return dq, dk, dv, done[3] + each.sum(-1)

    of_sinks = () if sinks is None else (jnp.zeros((heads,), dtype),)
    of_keys = (jnp.zeros((len(x) + _TILE, *x.shape[1:]), dtype) for x in (k, v))
    zeros = (jnp.zeros((max(total, _TILE), *q.shape[1:]), q.dtype), *of_keys, *of_sinks)
    dq, dk, dv, *of_sinks = lax.fori_loop(jnp.zeros_like(tiles.all()), tiles.all(), of_queries, zeros)
    dsinks = None if sinks is None else of_sinks[0].astype(sinks.dtype)
    dk, dv = (x[: len(k)].astype(like.dtype) for x, like in ((dk, k), (dv, v)))
    return dq[:total], dk, dv, dsinks, None, None


_attend.defvjp(_forward, _backward)
