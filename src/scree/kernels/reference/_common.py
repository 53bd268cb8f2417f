"""What the reference ops share: the rows of an Array, and putting them together again."""

from __future__ import annotations

from collections.abc import Sequence

from ..._array import Array
from ..._backends import Dense
from ..._layout import moved_from_front, moved_to_front


def rows_of(op: str, arr: Array) -> list[Dense]:
    """The sequences, the ragged axis first, in float32 or wider. Copies offsets on a device to the host, once.

    Of no sequences, one empty one, so that a result always has its place in the gradient's graph.
    """
    xp = arr._xp
    values = xp.upcast(moved_to_front(xp, arr.values, arr.ragged_dim))
    return xp.split(values, arr._host_offsets(op), 0) or [values[:0]]


def joined(arr: Array, rows: Sequence[Dense], features: tuple[int, ...]) -> Dense:
    """Join rows (n_i, *features) to (T, *features), with zeros where no sequence is (`with_capacity`)."""
    xp = arr._xp
    spare = arr.total_length - int(arr._host_offsets("joining")[-1])
    return xp.concat([*rows, xp.full((spare, *features), 0, rows[0])], 0)


def back_on(arr: Array, result: Dense) -> Array:
    """Put a result (T, *features), computed with the ragged axis first, on the structure and dtype of `arr`."""
    xp = arr._xp
    return arr.with_values(xp.cast_like(moved_from_front(xp, result, arr.ragged_dim), arr.values))
