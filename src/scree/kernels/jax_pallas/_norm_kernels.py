"""The kernels of the norms: rows of features, some of them in a program, in registers, so that values are read once.

A row is one token of one head. With c the value less its mean (layernorm), or the value (rmsnorm), r = 1 / sqrt(mean(c**2)
+ eps), u = c r and h = g * weight::

    y = u * weight + bias      dx = r * (h - mean(h) - u * mean(h * u))      dweight = sum g u      dbias = sum g

where rmsnorm has neither mean(h) nor a bias. The sums of dweight and dbias are made for as many groups of rows as there
are programs, and then over the groups, in their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._launch import launch

_TILE = 4096  # elements of a tile
_MOST_ROWS = 32  # of one
_PROGRAMS = 528  # that share the rows of a backward with sums
_GROUPS, _COLUMNS = 32, 64  # of a tile of their sums
Ref = Any


class Options(NamedTuple):
    """What a kernel is compiled for.

    Attributes
    ----------
    eps : float
    centred : bool
    rows, features : int
    trail, tokens : int
        So many rows make a token, and so many tokens a step along the axes before the ragged one.
    weight, bias, spare : bool
        Whether there are such, and whether tokens may belong to no sequence.
    sums : bool
        Whether a backward has to find dweight and dbias as well.
    """

    eps: float
    centred: bool
    rows: int
    features: int
    trail: int
    tokens: int
    weight: bool
    bias: bool
    spare: bool
    sums: bool = False

    @property
    def width(self) -> int:
        """The power of 2 that holds a row."""
        return 1 << max(self.features - 1, 1).bit_length()

    @property
    def tile(self) -> int:
        """Rows that a program has at once."""
        return min(_MOST_ROWS, max(1, _TILE // self.width))

    @property
    def blocks(self) -> int:
        """How many tiles there are."""
        return -(-self.rows // self.tile)

    @property
    def programs(self) -> int:
        """How many programs of a backward share them."""
        return min(self.blocks, _PROGRAMS) if self.sums else self.blocks

    @property
    def warps(self) -> int:
        """Of a program."""
        return 4 if self.width * self.tile <= _TILE else 8


class _Rows(NamedTuple):
    """Some rows: the first, and which of them are there, belong to a sequence, and have a feature."""

    first: Dense
    there: Dense
    real: Dense
    within: Dense


def _rows(options: Options, offsets: Ref | None, block: Dense) -> _Rows:
    first = block * options.tile
    row = first + jnp.arange(options.tile)
    there = row < options.rows
    real = there
    if offsets is not None:
        token = lax.rem(lax.div(row, options.trail), options.tokens)
        real = there & (token < offsets[offsets.shape[0] - 1])
    within = (jnp.arange(options.width) < options.features)[None, :]
    return _Rows(first, there, real, within)


def _load(options: Options, x: Ref, rows: _Rows) -> Dense:
    mask = rows.real[:, None] & rows.within
    return plgpu.load(x.at[pl.ds(rows.first, options.tile), pl.ds(0, options.width)], mask=mask, other=0.0).astype(
        jnp.float32
    )


def _store(options: Options, x: Ref, rows: _Rows, value: Dense) -> None:
    mask = rows.there[:, None] & rows.within
    value = jnp.where(rows.real[:, None], value, 0.0).astype(x.dtype)
    plgpu.store(x.at[pl.ds(rows.first, options.tile), pl.ds(0, options.width)], value, mask=mask)


def _vector(options: Options, x: Ref) -> Dense:
    """(1, width) of x (features,)."""
    mask = jnp.arange(options.width) < options.features
    return plgpu.load(x.at[pl.ds(0, options.width)], mask=mask, other=0.0).astype(jnp.float32)[None, :]


def _statistics(options: Options, x: Dense, within: Dense) -> tuple[Dense, Dense]:
    """c and r, (rows, width) and (rows, 1)."""
    each = 1.0 / options.features
    if options.centred:
        x = jnp.where(within, x - (x.sum(1) * each)[:, None], 0.0)
    return x, (1.0 / jnp.sqrt((x * x).sum(1) * each + options.eps))[:, None]


def _optional(options: Options, refs: tuple[Ref, ...], *which: bool) -> tuple[Any, ...]:
    """The references that are there, and None in place of others."""
    left = iter(refs)
    return (*(next(left) if there else None for there in which), *left)


def forward(options: Options, x: Ref, *refs: Ref) -> None:
    """y of some rows."""
    weight, bias, offsets, y = _optional(options, refs, options.weight, options.bias, options.spare)
    rows = _rows(options, offsets, pl.program_id(0))
    c, r = _statistics(options, _load(options, x, rows), rows.within)
    u = c * r
    if weight is not None:
        u = u * _vector(options, weight)
    if bias is not None:
        u = u + _vector(options, bias)
    _store(options, y, rows, u)


def backward(options: Options, x: Ref, grad: Ref, *refs: Ref) -> None:
    """dx of some rows, and the sums of their dweight and dbias; what the forward knew of x is found again."""
    weight, offsets, dx, *sums = _optional(options, refs, options.weight, options.spare)
    scale = None if weight is None else _vector(options, weight)
    each = 1.0 / options.features

    def of_block(i: Dense | int, done: tuple[Dense, ...]) -> tuple[Dense, ...]:
        rows = _rows(options, offsets, pl.program_id(0) + i * options.programs)
        g = _load(options, grad, rows)
        c, r = _statistics(options, _load(options, x, rows), rows.within)
        u = c * r
        h = g if scale is None else g * scale
        along = (h * u).sum(1)[:, None] * each
        of_h = h - h.sum(1)[:, None] * each if options.centred else h
        _store(options, dx, rows, r * (of_h - u * along))
        more = (*((g * u,) if options.weight else ()), *((g,) if options.bias else ()))
        return tuple(a + b for a, b in zip(done, more, strict=True)) if sums else done

    nothing = jnp.zeros((options.tile, options.width), jnp.float32)
    begin = tuple(nothing for _ in sums)
    turns = -(-options.blocks // options.programs)
    done = lax.fori_loop(0, turns, of_block, begin) if turns > 1 else of_block(0, begin)
    for ref, value in zip(sums, done, strict=True):
        mask = jnp.arange(options.width) < options.features
        plgpu.store(ref.at[pl.program_id(0), pl.ds(0, options.width)], value.sum(0), mask=mask)


def added(options: Options, parts: Ref, out: Ref) -> None:
    """Add up (programs, features) over the programs, in some columns."""
    first = pl.program_id(0) * _COLUMNS
    columns = (first + jnp.arange(_COLUMNS) < options.features)[None, :]

    def of_step(i: Dense, done: Dense) -> Dense:
        mask = (i * _GROUPS + jnp.arange(_GROUPS) < options.programs)[:, None] & columns
        return done + plgpu.load(parts.at[pl.ds(i * _GROUPS, _GROUPS), pl.ds(first, _COLUMNS)], mask=mask, other=0.0)

    zeros = jnp.zeros((_GROUPS, _COLUMNS), jnp.float32)
    done = lax.fori_loop(0, -(-options.programs // _GROUPS), of_step, zeros).sum(0)
    plgpu.store(out.at[pl.ds(first, _COLUMNS)], done.astype(out.dtype), mask=columns[0])


def columns_of(options: Options) -> int:
    """How many programs `added` has."""
    return -(-options.features // _COLUMNS)


def call(kernel: Callable[..., None], options: Options, out: Any, programs: int, *given: Any, interpret: bool) -> Any:
    """Launch a kernel."""

    def bound(*refs: Ref) -> None:
        kernel(options, *refs)

    given = tuple(x for x in given if x is not None)
    how = {"warps": options.warps, "stages": 1}
    return launch(bound, f"norm_{kernel.__name__}", out, programs, *given, **how, interpret=interpret)
