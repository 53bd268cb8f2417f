"""The kernel of the rotary embedding: some tokens of one row, whose places are neighbours in the tables, in some heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._launch import launch, like
from ._segment_kernels import parts_of, segment

_TILE, _TOKENS = 4096, 16  # elements of half a tile, and its tokens at most
Ref = Any


class Options(NamedTuple):
    """What the kernel is compiled for.

    Attributes
    ----------
    interleaved : bool
    start : int
        Of all rows, beside what each has of its own.
    each, spare : bool
        Whether rows have a start of their own, and whether tokens may belong to none.
    back : bool
        Whether it turns in the other direction.
    """

    interleaved: bool
    start: int
    each: bool
    spare: bool
    back: bool = False


def turn(options: Options, x: Ref, cos: Ref, sin: Ref, offsets: Ref, *refs: Ref) -> None:
    """Turn the pairs of x, (T, heads, 2, D / 2) or interleaved (T, heads, D / 2, 2).

    y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s; 0 for tokens of no row, NaN where a table has no such place.
    """
    *each, y = refs
    (total, heads, *pairs), rows = x.shape, offsets.shape[0] - 1
    dim = pairs[0] if options.interleaved else pairs[1]
    tokens, some, width = _cut(heads, dim)
    across = -(-heads // some)
    place = segment(offsets, lax.div(pl.program_id(0), across), total, tokens)
    head = lax.rem(pl.program_id(0), across) * some
    token = jnp.arange(tokens, dtype=place.tokens.dtype)
    position = place.number * tokens + token + options.start
    for ref in each:
        position = position + ref[jnp.minimum(place.row, rows - 1)].astype(position.dtype)
    there, known = token < place.tokens, (position >= 0) & (position < cos.shape[0])
    within = jnp.arange(width) < dim
    mask = (there & known)[:, None] & within[None, :]
    of_row = jnp.clip(position, 0, cos.shape[0] - 1)[:, None]
    column = jnp.broadcast_to(jnp.arange(width)[None, :], (tokens, width))
    c, s = (
        jnp.where(
            known[:, None],
            plgpu.load(table.at[jnp.broadcast_to(of_row, (tokens, width)), column], mask=mask, other=0.0).astype(
                jnp.float32
            ),
            float("nan"),
        )[:, None, :]
        for table in (cos, sin)
    )
    if options.back:
        s = -s
    heads_there = (head + jnp.arange(some) < heads)[None, :, None]
    mask = there[:, None, None] & heads_there & within[None, None, :]
    at, columns = (pl.ds(place.start, tokens), pl.ds(head, some)), pl.ds(0, width)
    which = [jnp.full((), i, jnp.int32) for i in (0, 1)]  # arrays, which the interpreter of Pallas wants
    halves = [(*at, columns, i) if options.interleaved else (*at, i, columns) for i in which]
    x1, x2 = (plgpu.load(x.at[half], mask=mask, other=0.0).astype(jnp.float32) for half in halves)
    used = place.row < rows if options.spare else True
    for half, made in zip(halves, (x1 * c - x2 * s, x2 * c + x1 * s), strict=True):
        plgpu.store(y.at[half], jnp.where(used, made, 0.0).astype(y.dtype), mask=mask)


def _cut(heads: int, half: int) -> tuple[int, int, int]:
    """Tokens, heads and the width of half a tile, powers of 2."""
    width = 1 << max(half - 1, 0).bit_length()
    tokens = min(_TOKENS, max(1, _TILE // width))
    return tokens, min(1 << (heads - 1).bit_length(), max(1, _TILE // (tokens * width))), width


def call(options: Options, x: Dense, offsets: Dense, *given: Any, interpret: bool) -> Dense:
    """Launch the kernel on x (T, heads, D) and the tables; then each row's start, if there is one."""
    total, heads, dim = x.shape
    tokens, some, _ = _cut(heads, dim // 2)
    cos, sin, *each = given

    def bound(*refs: Ref) -> None:
        turn(options, *refs)

    x = x.reshape(total, heads, *((dim // 2, 2) if options.interleaved else (2, dim // 2)))
    programs = parts_of(total, len(offsets) - 1, tokens) * -(-heads // some)
    given = x, cos, sin, offsets, *each
    y = launch(bound, "rope", like(x), programs, *given, warps=4, stages=1, interpret=interpret)
    return y.reshape(total, heads, dim)
