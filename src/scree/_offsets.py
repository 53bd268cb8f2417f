"""Integer arithmetic on offsets: what is known of them on the host, and ids and positions on any device."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _check
from ._backends import Backend, Dense
from ._backends._protocol import HostInts

_INT32_END = 2**31


class Structure:
    """What the host knows of one offsets array. Every Array that has these offsets shares one Structure.

    Attributes
    ----------
    host : array of (B + 1,), integer, or None
        The offsets on the host; None while nobody has asked for them on a device.
    min_length, max_length : int or None
        The shortest and the longest row. `max_length` may be an upper bound that the caller vouched for.
    spare : bool
        Whether the ragged axis may be longer than `offsets[-1]` (`with_capacity`). Static under every trace.
    derived : dict
        What an implementation works out from the offsets once, for all layers: tile maps, and the like.
    """

    __slots__ = ("_longest", "derived", "host", "max_length", "min_length", "spare")

    def __init__(
        self,
        host: HostInts | None = None,
        *,
        min_length: int | None = None,
        max_length: int | None = None,
        spare: bool = False,
    ) -> None:
        self.host = host
        self.min_length = min_length
        self.max_length = max_length
        self.spare = spare
        self.derived: dict[Any, Any] = {}
        self._longest: int | None = None

    def longest(self, host: HostInts) -> int:
        """The length of the longest row in the offsets on the host, found once; 0 for B = 0."""
        if self._longest is None:
            self._longest = int((host[1:] - host[:-1]).max()) if len(host) > 1 else 0
        return self._longest

    def measure(self, host: HostInts) -> None:
        """Fill in what the offsets on the host tell; an upper bound on the longest row, where given, stays."""
        self.host = host
        self.min_length = int((host[1:] - host[:-1]).min()) if len(host) > 1 else 0
        if self.max_length is None:
            self.max_length = self.longest(host)


def from_lengths(lengths: HostInts) -> HostInts:
    """Offsets of rows of these lengths: (B + 1,), int32 where the total fits and int64 beyond."""
    offsets = np.empty(len(lengths) + 1, np.int64)
    offsets[0] = 0
    np.cumsum(lengths, out=offsets[1:])
    return narrow(offsets)


def narrow(offsets: HostInts) -> HostInts:
    """The same offsets as int32 where the last one fits, otherwise as int64."""
    return offsets.astype(np.int32 if offsets[-1] < _INT32_END else np.int64, copy=False)


def signed(offsets: HostInts) -> HostInts:
    """The same offsets as int32 or int64: NumPy would make floats of unsigned and signed integers together."""
    return offsets if offsets.dtype == np.int32 or offsets.dtype == np.int64 else offsets.astype(np.int64)


def wide(xp: Backend, offsets: Dense, end: int) -> Dense:
    """The same offsets, on any device, as integers that hold every number from -`end` to `end`."""
    if end >= _INT32_END:
        return xp.astype(offsets, "int64")
    return offsets if xp.dtype_name(offsets) in ("int32", "int64") else xp.astype(offsets, "int32")


def gather_index(starts: HostInts, offsets: HostInts) -> HostInts:
    """For every token of rows that begin at `starts` in a source: its place there. (T,)."""
    lengths = np.diff(offsets)
    return np.arange(offsets[-1], dtype=offsets.dtype) + np.repeat(starts - offsets[:-1], lengths).astype(offsets.dtype)


def host_segment_ids(offsets: HostInts, total: int) -> HostInts:
    """For each of `total` tokens the number of its row; B for tokens beyond the last row. (total,)."""
    batch_size = len(offsets) - 1
    lengths = np.empty(batch_size + 1, np.int64)
    np.subtract(offsets[1:], offsets[:-1], out=lengths[:-1])
    lengths[-1] = total - int(offsets[-1])
    return np.repeat(np.arange(batch_size + 1, dtype=_id_dtype(total)), lengths)


def host_position_ids(offsets: HostInts, total: int) -> HostInts:
    """For each of `total` tokens its place within its row; 0 beyond the last row. (total,)."""
    used = int(offsets[-1])
    positions = np.arange(total, dtype=_id_dtype(total))
    positions[:used] -= np.repeat(offsets[:-1].astype(positions.dtype), np.diff(offsets))
    positions[used:] = 0
    return positions


def _id_dtype(total: int) -> type[np.integer[Any]]:
    return np.int32 if total < _INT32_END else np.int64


def segment_ids(xp: Backend, offsets: Dense, total: int) -> Dense:
    """`host_segment_ids` on the device of the offsets, without waiting for it."""
    tokens = xp.arange(total, offsets)
    if offsets.shape[0] == 1:
        return tokens - tokens
    return xp.cast_like(xp.searchsorted(offsets[1:], tokens), tokens)


def position_ids(xp: Backend, offsets: Dense, total: int) -> Dense:
    """`host_position_ids` on the device of the offsets, without waiting for it."""
    tokens = xp.arange(total, offsets)
    if offsets.shape[0] == 1 or total == 0:
        return tokens - tokens
    # Beyond the last row the segment is B, whose offset is offsets[-1].
    starts = xp.cast_like(xp.take(offsets, segment_ids(xp, offsets, total), 0), tokens)
    return xp.where(tokens < offsets[-1], tokens - starts, tokens - tokens)


def shifted_positions(xp: Backend, positions: Dense, offsets: Dense, start: int | Dense, *, spare: bool) -> Dense:
    """Positions counted from `start` (one for all rows, or (B,)) instead of 0; those beyond the last row stay 0."""
    total = positions.shape[0]
    if total == 0 or offsets.shape[0] == 1:
        return positions
    if isinstance(start, int):
        moved = positions + start
    else:
        rows = segment_ids(xp, offsets, total)
        last = offsets.shape[0] - 2
        moved = positions + xp.cast_like(xp.take(start, xp.where(rows > last, rows * 0 + last, rows), 0), positions)
    return xp.where(is_used(xp, offsets, total), moved, positions) if spare else moved


def is_used(xp: Backend, offsets: Dense, total: int) -> Dense:
    """For each of `total` tokens whether it belongs to a row. (total,), bool."""
    return xp.arange(total, offsets) < offsets[-1]


def validate(xp: Backend, offsets: Dense, total: int, spare: bool) -> HostInts:
    """Copy the offsets to the host and check them in full."""
    host = xp.to_host(offsets)
    _check.host_offsets(host, total, spare)
    return signed(host)
