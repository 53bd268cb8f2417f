"""Rows cut into tiles of a fixed size that begin where the row begins."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

_COMPARED = 1 << 16  # pairs of a tile and a row, up to which the CPU compares all
_ADDED = 128  # places that are added up at once


def row_of(bounds: Array, number: Array, compared: int) -> Array:
    """The row in which each number lies, of rows that begin and end at `bounds`; behind the last, how many rows there are.

    For several numbers a search is a loop of several kernels a turn: up to so many pairs, all are compared instead.
    """
    rows = bounds.shape[0] - 1
    method = "compare_all" if number.ndim and number.size * rows <= compared else "scan"
    return jnp.searchsorted(bounds[1:], number, side="right", method=method).astype(bounds.dtype)


def passed(bounds: Array, total: int) -> Array:
    """How many of the bounds (N,), sorted, each place below `total` lies at or behind: (total,).

    That of a search, and on the CPU, where a search turns for each of its halves, sums: along places, and over what was
    added up at once.
    """
    return lax.platform_dependent(bounds, cpu=partial(_counted, total), default=partial(_searched, total))


def _searched(total: int, bounds: Array) -> Array:
    places = jnp.arange(total, dtype=bounds.dtype)
    return jnp.searchsorted(bounds, places, side="right").astype(bounds.dtype)


def _counted(total: int, bounds: Array) -> Array:
    groups = -(-total // _ADDED)
    here = jnp.zeros((groups * _ADDED,), bounds.dtype).at[bounds].add(1, mode="drop", indices_are_sorted=True)
    within = lax.associative_scan(jnp.add, here.reshape(groups, _ADDED), axis=1)
    before = jnp.cumsum(within[:, -1], dtype=bounds.dtype) - within[:, -1]
    return (within + before[:, None]).reshape(-1)[:total]


class Tile(NamedTuple):
    """One tile: its row, its number in the row, and where it begins along the ragged axis."""

    row: Array
    number: Array
    start: Array


class Tiles(NamedTuple):
    """All tiles of all rows, row after row.

    Attributes
    ----------
    offsets : array of (B + 1,), integer
    bounds : array of (B + 1,), integer
        The tiles of row b are those from bounds[b] to bounds[b + 1].
    size : int
    """

    offsets: Array
    bounds: Array
    size: int

    def all(self) -> Array:
        """How many there are."""
        return self.bounds[-1]

    def tile(self, i: Array) -> Tile:
        """The i-th of them, or the i-th of several i."""
        row = row_of(self.bounds, i, _COMPARED).astype(i.dtype)
        number = i - self.bounds[row]
        return Tile(row, number, self.offsets[row] + number * self.size)


def tiles_of(offsets: Array, size: int) -> Tiles:
    """Cut rows with these offsets into tiles of `size` tokens, the last one of a row into what is left."""
    counts = (offsets[1:] - offsets[:-1] + (size - 1)) // size
    bounds = jnp.concatenate([jnp.zeros((1,), offsets.dtype), jnp.cumsum(counts, dtype=offsets.dtype)])
    return Tiles(offsets, bounds, size)


def at(x: Array, axis: int, start: Array, size: int) -> Array:
    """`size` entries of x along `axis`; x is long enough that none is missing."""
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: Array, axis: int, start: Array, part: Array) -> Array:
    """x with `part` in place of what is there."""
    return lax.dynamic_update_slice_in_dim(x, part, start, axis)


def longer(x: Array, axis: int, size: int) -> Array:
    """x with `size` zeros behind it along `axis`: the room of a tile that begins at the last token."""
    return jnp.pad(x, [(0, size if i == axis else 0) for i in range(x.ndim)])


def safe(offsets: Array, total: int) -> Array:
    """Offsets as int32, or int64 where the total needs it; none points outside, and none falls.

    Behind a barrier, so that a compiler that knows them does not follow them into the loops: XLA for GPUs fails there.
    """
    kept = jnp.clip(offsets.astype(jnp.int32 if total < 2**31 else jnp.int64), 0, total)
    return lax.optimization_barrier(lax.cummax(kept))
