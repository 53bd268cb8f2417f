"""Combining the tokens of each row: sums, maxima and minima of what a function makes of a token.

On the CPU tokens are combined one after the other, and each time a tile of a row is full it is combined with those
before it: by a scatter, or, where rows are long and tokens wide, in loops over a few tokens that stay in its cache, so
that what is made of the tokens is never in memory as a whole. Both have the same order, and so the same bits. On other
devices, where a scatter has any order and each turn of a loop is waited for, tiles are gathered, all at once, and each is
a tree of elementwise operations; narrow tokens have that on the CPU as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._check import integer_limits, is_integer
from ._tiles import passed, tiles_of

_NARROW = 32  # features, below which tokens are gathered everywhere
_GATHERED, _IN_ORDER = 32, 512  # tokens of a tile
_BLOCK = 16  # tokens that are read at once, of so many features at most: XLA cuts more in two, and waits for both
_BLOCK_FEATURES = 1024
_LONG = 16  # tokens of a row on average, from which on blocks are faster than a scatter
_INF = float("inf")

_COMBINE: dict[str, Callable[[Dense, Dense], Dense]] = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
Arrays = tuple[Dense, ...]


def row_of_tokens(offsets: Dense, total: int) -> tuple[Dense, Dense]:
    """The place of every token and its row, (total,) both; the row is B for tokens beyond the last one."""
    return jnp.arange(total, dtype=offsets.dtype), passed(offsets[1:], total)


def taken(values: Dense, row: Dense) -> Dense:
    """The values (B, F) of the row of every token, (T, F); any that are there for tokens of none."""
    return jnp.take(values, row, axis=0, mode="clip")


def fold(op: str, of_token: Callable[..., Dense], tokens: Arrays, of_row: Arrays, offsets: Dense) -> Dense:
    """Combine of_token(*tokens, *of_row) over the tokens of each row, (B, F).

    Parameters
    ----------
    op : {"sum", "max", "min"}
    of_token : function
        Elementwise. It gets some tokens, and for each the values of its row.
    tokens : tuple of arrays of (T, F)
    of_row : tuple of arrays of (B, F)
    offsets : array of (B + 1,), integer
        None points outside of the tokens, and none falls.

    Returns
    -------
    array of (B, F)
        For an empty row what changes nothing beside any value; -0.0 is that for a sum.
    """
    rows, (total, features) = offsets.shape[0] - 1, tokens[0].shape
    dtype = jnp.result_type(of_token(*(x[:0] for x in (*tokens, *of_row))))
    if total == 0 or rows == 0 or features == 0:
        return jnp.full((rows, features), _neutral(op, dtype), dtype)

    def at_once(way: Callable[..., Dense], tokens: Arrays, of_row: Arrays, offsets: Dense) -> Dense:
        if of_row:
            _, row = row_of_tokens(offsets, total)
            tokens = (*tokens, *(taken(x, row) for x in of_row))
        return way(op, of_token(*tokens), offsets)

    if features < _NARROW:
        return at_once(_gathered, tokens, of_row, offsets)
    on_cpu = partial(at_once, _scattered)
    # A scatter of what is there already is as fast as memory for sums.
    plain = op == "sum" and len(tokens) == 1 and not of_row
    if not plain and features >= _BLOCK_FEATURES // 4 and total >= max(_LONG * rows, _BLOCK):
        on_cpu = partial(_by_blocks, op, of_token, dtype)
    return lax.platform_dependent(tokens, of_row, offsets, cpu=on_cpu, default=partial(at_once, _gathered))


def _neutral(op: str, dtype: Any) -> Any:
    """What changes nothing beside any value: -0.0 is what leaves the sign of a sum of zeros."""
    name = jnp.dtype(dtype).name
    if is_integer(name):
        return 0 if op == "sum" else integer_limits(name)[op == "min"]
    return {"sum": -0.0, "max": -_INF, "min": _INF}[op]


def _by_blocks(
    op: str, of_token: Callable[..., Dense], dtype: Any, tokens: Arrays, of_row: Arrays, offsets: Dense
) -> Dense:
    rows, (total, features) = offsets.shape[0] - 1, tokens[0].shape
    combine, neutral = _COMBINE[op], jnp.asarray(_neutral(op, dtype), dtype)
    width = min(features, _BLOCK_FEATURES)
    parts = -(-features // width)  # the last one begins earlier, and has some features twice
    places = jnp.arange(_BLOCK, dtype=offsets.dtype)
    nothing = jnp.full((width,), neutral)

    def of_rows(i: Dense, out: Dense) -> Dense:
        b, feature = i // parts, jnp.minimum(i % parts * width, features - width)
        begin, end = offsets[b], offsets[b + 1]
        mine = tuple(lax.dynamic_slice(x, (b, feature), (1, width)) for x in of_row)

        def of_tiles(j: Dense, done: Dense) -> Dense:
            first = begin + j * _IN_ORDER
            last = jnp.minimum(first + _IN_ORDER, end)

            def of_blocks(k: Dense, part: Dense) -> Dense:
                wanted = first + k * _BLOCK
                start = jnp.minimum(wanted, total - _BLOCK)
                some = (lax.dynamic_slice(x, (start, feature), (_BLOCK, width)) for x in tokens)
                inside = (start + places >= wanted) & (start + places < last)
                made = jnp.where(inside[:, None], of_token(*some, *mine), neutral)
                made = lax.optimization_barrier(made)  # XLA's code for both at once is many times slower
                for token in range(_BLOCK):
                    part = combine(part, made[token])
                return part

            return combine(done, _loop(last - first, _BLOCK, of_blocks, nothing))

        done = _loop(end - begin, _IN_ORDER, of_tiles, nothing)
        return lax.dynamic_update_slice(out, done[None], (b, feature))

    start = jnp.full((rows, features), neutral)
    return lax.fori_loop(jnp.zeros_like(offsets[0]), jnp.full_like(offsets[0], rows * parts), of_rows, start)


def _loop(length: Dense, step: int, body: Callable[[Dense, Dense], Dense], state: Dense) -> Dense:
    return lax.fori_loop(jnp.zeros_like(length), (length + (step - 1)) // step, body, state)


def _scattered(op: str, x: Dense, offsets: Dense) -> Dense:
    """Combine the tokens of tiles, and then the tiles of rows, one after the other, which a scatter on the CPU does."""
    total, rows = x.shape[0], offsets.shape[0] - 1
    tiles = tiles_of(offsets, _IN_ORDER)
    most = total // _IN_ORDER + rows
    number, places = (jnp.arange(size, dtype=offsets.dtype) for size in (most, total))
    tile = tiles.tile(number)
    # Among the beginnings of tiles, as a search for the row would be followed by two gathers as long as itself.
    index = passed(jnp.where(number < tiles.all(), tile.start, offsets[-1]), total) - 1
    parts = _scatter(op, x, jnp.where(places < offsets[-1], index, most), most)
    return _scatter(op, parts, tile.row, rows)


def _scatter(op: str, x: Dense, index: Dense, count: int) -> Dense:
    """Combine x (T, F) by index, sorted, to (count, F); what has a larger index is left out."""
    target = jnp.full((count, x.shape[1]), _neutral(op, x.dtype), x.dtype).at[index]
    combine = {"sum": target.add, "max": target.max, "min": target.min}[op]
    return combine(x, mode="drop", indices_are_sorted=True)


def _halved(op: str, x: Dense) -> Dense:
    """Combine along axis -2, whose size is a power of two, half with half."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = _COMBINE[op](x[..., :half, :], x[..., half:, :])
    return x[..., 0, :]


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
