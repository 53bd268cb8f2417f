"""Attention's kernels for Hopper: which calls they serve, and what they are given.

Their LSE lies tile by tile, (H, tiles x 128), so that a box of it can be copied however many of its tokens there are.
"""

from __future__ import annotations

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax import Array as Dense

from .._options import AttentionOptions
from ..jax_xla._tiles import tiles_of
from ._kernels import Options
from ._launch import like
from ._table import Rows, rows_of, table_of

TILE, _FORWARD_STEP, _BACKWARD_STEP = 128, 128, 64  # tokens
_DIM = 128  # at 64 the kernels of Triton's backend are as fast, and compiled sooner
_FIRST, _BEFORE = (0, 10, 2), (0, 12)  # the versions of JAX whose Mosaic GPU backend the kernels are written for


def serves(options: AttentionOptions, q: Dense, k: Dense, v: Dense) -> bool:
    """Whether the kernels for Hopper compute this call. It may not depend on how many tokens there are: bits do."""
    like_it = q.shape[2] == v.shape[2] == _DIM and q.dtype.itemsize == 2 and q.dtype == k.dtype == v.dtype
    return like_it and options.softcap is None and options.scale > 0 and here()


def here() -> bool:
    """Whether JAX's first device is a Hopper, and this JAX has the Mosaic GPU backend that the kernels are written for."""
    if jax.default_backend() != "gpu" or str(getattr(jax.devices()[0], "compute_capability", "")) != "9.0":
        return False
    return _FIRST <= jax.__version_info__ < _BEFORE and find_spec("absl") is not None


def _roomy(x: Dense) -> Dense:
    """x with at least the tokens that are copied at once."""
    return x if len(x) >= TILE else jnp.pad(x, ((0, TILE - len(x)), (0, 0), (0, 0)))


def _of_tokens(x: Dense, rows: Rows) -> Dense:
    """(H, T) of what lies tile by tile."""
    bounds = tiles_of(rows.offsets, TILE).bounds
    token = jnp.arange(rows.total, dtype=rows.offsets.dtype)
    row = rows.of(rows.offsets, token)
    return x[:, token + (bounds * TILE - rows.offsets)[row]]


def _of_tiles(x: Dense, rows: Rows) -> Dense:
    """(H, tiles x 128) of (H, T); what lies beyond a row is that of some other token."""
    bounds, number = tiles_of(rows.offsets, TILE).bounds, jnp.arange(rows.tiles(TILE), dtype=rows.offsets.dtype)
    row = rows.of(bounds, number)
    begin = rows.offsets[row] + (number - bounds[row]) * TILE
    token = begin[:, None] + jnp.arange(TILE, dtype=begin.dtype)
    return x[:, jnp.clip(token, 0, rows.total - 1).reshape(-1)]


def attend(
    given: AttentionOptions, q: Dense, k: Dense, v: Dense, sinks: Dense | None, q_offsets: Dense, k_offsets: Dense
) -> tuple[Dense, Dense]:
    """o (T, H, D) and lse (H, T)."""
    from ._hopper_fwd_kernels import forward
    from ._hopper_parts import call

    (total, heads, _), rows, others = q.shape, rows_of(q_offsets, len(q)), rows_of(k_offsets, len(k))
    q, k, v = (_roomy(x) for x in (q, k, v))
    table = table_of(rows, others, given.sides, TILE)
    options = Options(given.scale, *given.sides, None, heads // k.shape[1], TILE, _FORWARD_STEP)
    out = [like(q), jax.ShapeDtypeStruct((heads, len(table) * TILE), jnp.float32)]
    more = () if sinks is None else (sinks.astype(jnp.float32),)
    o, lse = call(forward, options, heads, out, table, q, k, v, *more)
    return o[:total], _of_tokens(lse, rows)


def differentiate(
    given: AttentionOptions,
    q: Dense,
    k: Dense,
    v: Dense,
    q_offsets: Dense,
    k_offsets: Dense,
    o: Dense,
    top: Dense,
    g: Dense,
    g_lse: Dense,
) -> tuple[Dense, Dense, Dense, Dense]:
    """dq, dk, dv and pull (H, T); top (H, T) is lse in powers of 2, and +inf where a query sees no key."""
    from ._hopper_bwd_kernels import backward_kv, backward_q
    from ._hopper_parts import call

    (total, heads, _), (others, kv_heads, _) = q.shape, k.shape
    queries, keys = rows_of(q_offsets, total), rows_of(k_offsets, others)
    q, k, v, g, o = (_roomy(x) for x in (q, k, v, g, o))
    top, g_lse = _of_tiles(top, queries), _of_tiles(g_lse, queries)
    options = Options(given.scale, *given.sides, None, heads // kv_heads, TILE, _BACKWARD_STEP)
    table = table_of(queries, keys, given.sides, TILE)
    dq, pull = call(backward_q, options, heads, [like(q), like(top)], table, q, k, v, g, o, top, g_lse)
    left, right = given.sides
    table = table_of(keys, queries, (right, left), TILE)
    dk, dv = call(backward_kv, options, kv_heads, [like(k), like(v)], table, q, k, v, g, top, pull)
    return dq[:total], dk[:others], dv[:others], _of_tokens(pull, queries)
