"""Where each tile of attention lies, worked out on the device.

Before the rows and behind them comes one more each, of the tokens that belong to no sequence, with nothing on the other
side: so their results are the zeros that they have to be.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array as Dense

from ..jax_xla._tiles import row_of, tiles_of
from ._kernels import Sides

_COMPARED = 1 << 26  # pairs of a tile and a row, up to which a GPU compares all


class Rows(NamedTuple):
    """The rows of one side of attention, those of no sequence too.

    Attributes
    ----------
    offsets : array of (rows + 1,), int32
        From 0 to `total`.
    total : int
    """

    offsets: Dense
    total: int

    @property
    def all(self) -> int:
        """How many there are."""
        return self.offsets.shape[0] - 1

    def tiles(self, size: int) -> int:
        """How many tiles of `size` there can be, for any offsets."""
        return self.total // size + self.all

    def of(self, bounds: Dense, number: Dense) -> Dense:
        """The row in which each of these numbers lies, of rows that begin and end at `bounds`."""
        return jnp.minimum(row_of(bounds, number, _COMPARED), self.all - 1)


def rows_of(offsets: Dense, total: int) -> Rows:
    """The rows with these offsets, which lie within the total and do not fall."""
    ends = (jnp.full((1,), x, offsets.dtype) for x in (0, total))
    first, last = ends
    return Rows(jnp.concatenate([first, offsets, last]), total)


def table_of(mine: Rows, other: Rows, sides: Sides, size: int) -> Dense:
    """(tiles, 7): of every tile of my side `begin, first, length, other, other_length, number, other_number`.

    That is where it begins in memory and in its row, the row's length, the same of the other side's row; its number in
    the order of memory, and that of the first tile of the other side's row. Those with the most to do come first.
    """
    offsets, number = mine.offsets, jnp.arange(mine.tiles(size), dtype=mine.offsets.dtype)
    bounds, other_bounds = (tiles_of(x.offsets, size).bounds for x in (mine, other))
    row = mine.of(bounds, number)
    first = (number - bounds[row]) * size
    length = offsets[row + 1] - offsets[row]
    used = (row > 0) & (row < mine.all - 1)
    m = jnp.where(used, other.offsets[row + 1] - other.offsets[row], 0)
    left, right = sides
    place = first + m - length
    low = 0 if left is None else jnp.clip(place - left, 0, m)
    high = m if right is None else jnp.clip(place + size + right, 0, m)
    work = jnp.where(first < length, high - low, -1)
    columns = offsets[row] + first, first, length, other.offsets[row], m, number, other_bounds[row]
    return jnp.stack(columns, 1)[jnp.argsort(-work)]
