"""Rotary position embedding, token by token."""

from __future__ import annotations

from typing import Any

from ... import _offsets
from ..._array import Array
from ..._backends import Backend, Dense
from .. import _contract
from .._rows import used_only


def varlen_rope(arr: Array, cos: Dense, sin: Dense, *, interleaved: bool = False, start: Any = None) -> Array:
    """Compute `scree.kernels.varlen_rope`: y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s."""
    begin = _contract.rope(arr, cos, sin, start)
    xp = arr._xp
    x = used_only(arr, xp.upcast(arr.values))
    if 0 in x.shape:
        return arr
    positions = _offsets.position_ids(xp, arr.offsets, arr.total_length)
    positions = _offsets.shifted_positions(xp, positions, arr.offsets, begin, spare=arr._structure.spare)
    c, s = (_looked_up(xp, xp.upcast(table), positions, x.ndim) for table in (cos, sin))  # (T, ..1.., D/2)
    if interleaved:
        x1, x2 = x[..., 0::2], x[..., 1::2]
    else:
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    if interleaved:
        y = xp.concat([y1[..., None], y2[..., None]], x.ndim).reshape(x.shape)
    else:
        y = xp.concat([y1, y2], x.ndim - 1)
    return arr.with_values(xp.cast_like(used_only(arr, y), arr.values))


def _looked_up(xp: Backend, table: Dense, positions: Dense, ndim: int) -> Dense:
    """table[positions], NaN where a position lies outside, with axes to broadcast over the heads."""
    if table.shape[0] == 0:
        angles = xp.full((positions.shape[0], table.shape[1]), float("nan"), table)
    else:
        inside = (positions >= 0) & (positions < table.shape[0])
        found = xp.take(table, xp.where(inside, positions, positions * 0), 0)
        angles = xp.where(inside[:, None], found, xp.full((), float("nan"), table))
    return angles.reshape(positions.shape[0], *(1,) * (ndim - 2), -1)
