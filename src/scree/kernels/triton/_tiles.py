"""Tile maps: for every program of a kernel over ragged rows, the tile it works on, the costliest first.

A map is built on the device by two small kernels, without the host knowing a length, and kept with the offsets, so
that all layers share it. How many tiles there can be follows from shapes alone: ``T // BLOCK + B + 1``.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from ._launch import INTERPRETED, Launcher, capture_number, current_stream, device_number
from ._tiles_kernels import _count_tiles_kernel, _place_tiles_kernel

FIELDS = 8
_BUCKETS = 1024
_LANES = 256
_MOST_KEPT = 256

_LAUNCHERS: dict[Any, tuple[Launcher, Launcher]] = {}


class TileMap(NamedTuple):
    """The tiles of the rows of one side of an attention.

    Attributes
    ----------
    tiles : tensor of (slots + 1, 8), int32 (int64 where an index needs it)
        A tile each: start and length of its sequence, start and length of the sequence on the other side, number of
        the tile in its sequence, kind, and number of the sequence. The last row is zeros before and after each kernel:
        counters for one that takes its tiles as it goes. A map is used on one stream only, so no two do so at once.
    slots : int
        The size of the grid.
    """

    tiles: torch.Tensor
    slots: int


def build(
    offsets: torch.Tensor,
    other: torch.Tensor,
    total: int,
    other_total: int,
    block: int,
    left: int,
    right: int,
    small: int = 0,
) -> TileMap:
    """Build the map of the rows at `offsets`, in tiles of `block`.

    Parameters
    ----------
    offsets, other : tensor of (B + 1,), integer
        Of these rows, and of the rows that they see. Bad ones (that do not start at 0, fall, or go past the end) give
        a map by which every row gets zeros.
    total, other_total : int
        How many rows there are on each side.
    left, right : int
        How many places to each side of its own a row sees; -1 for all.
    small : int
        If not 0, the tiles of sequences that have from 1 to so many rows on each side are of a kind of their own, or left
        out where the number is negative.
    """
    offsets, other = offsets.contiguous(), other.contiguous()
    batch = offsets.shape[0] - 1
    slots = total // block + batch + 1
    wide = max(total, other_total) + block >= 2**31
    device = device_number(offsets)
    key = (device, offsets.dtype, other.dtype, block, left >= 0, right >= 0, wide, small)
    launchers = _LAUNCHERS.get(key)
    if launchers is None:
        constants = {
            "BLOCK": block, "OTHER": 64, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "BUCKETS": _BUCKETS, "LANES": _LANES, "SMALL": small,
        }  # fmt: skip
        launchers = _LAUNCHERS[key] = (
            Launcher(_count_tiles_kernel, device, constants, num_warps=4),
            Launcher(_place_tiles_kernel, device, constants, num_warps=4),
        )
    counts = torch.zeros(2 * _BUCKETS + 1, dtype=torch.int32, device=offsets.device)
    tiles = torch.empty((slots + 1, FIELDS), dtype=torch.int64 if wide else torch.int32, device=offsets.device)
    scalars = (batch, slots, left, right, batch.bit_length())
    count, place = launchers
    count((-(-max(slots, batch + 1) // _LANES), 1, 1), (offsets, other, counts), (total, other_total, *scalars))
    place((-(-slots // _LANES), 1, 1), (offsets, other, counts, tiles), (total, *scalars))
    return TileMap(tiles, slots)


Kept = dict[Any, Any]
"""What is kept with one offsets array: a `Structure.derived`, or what stands in for it."""


def of(
    kept: Kept | None,
    offsets: torch.Tensor,
    other: torch.Tensor,
    total: int,
    other_total: int,
    block: int,
    left: int,
    right: int,
    small: int = 0,
) -> TileMap:
    """Return the map that is kept with the offsets, or build it and keep it.

    A map is used on the stream that built it only, and not again once the offsets were written to.
    """
    key = (total, other_total, block, left, right, small)
    found: TileMap | None = recall(kept, key, offsets, other)
    if found is None:
        found = build(offsets, other, total, other_total, block, left, right, small)
        keep(kept, key, offsets, other, found)
    return found


class _Entry(NamedTuple):
    value: Any
    version: int
    other: weakref.ref[torch.Tensor] | None
    other_version: int


def _key(facts: Any, offsets: torch.Tensor, other: torch.Tensor) -> Any:
    """Under what to keep something; None where it cannot be kept.

    What is worked out while a CUDA graph is captured is worked out again by every replay, from the offsets of then: it
    may serve the rest of that capture, and nothing else.
    """
    stream = 0 if INTERPRETED else current_stream(offsets.get_device())
    capture = capture_number(stream)
    if capture is None:
        return None
    return facts, capture, stream, 0 if other is offsets else id(other)


def recall(kept: Kept | None, facts: Any, offsets: torch.Tensor, other: torch.Tensor) -> Any:
    """What was kept under these facts, on this stream, for these two offsets as they still are; None otherwise."""
    if kept is None:
        return None
    entry: _Entry | None = kept.get(_key(facts, offsets, other))
    if entry is None:
        return None
    value, version, its_other, other_version = entry
    if version >= 0 and version != offsets._version:
        return None
    if its_other is None or (its_other() is other and (other_version < 0 or other_version == other._version)):
        return value
    return None


def keep(kept: Kept | None, facts: Any, offsets: torch.Tensor, other: torch.Tensor, value: Any) -> None:
    """Keep what was worked out from two offsets."""
    key = None if kept is None else _key(facts, offsets, other)
    if kept is None or key is None:
        return
    if len(kept) >= _MOST_KEPT:  # shapes that change at every call with the same offsets
        kept.clear()
    same = other is offsets
    kept[key] = _Entry(value, _version(offsets), None if same else weakref.ref(other), _version(other))


def _version(x: torch.Tensor) -> int:
    """How often a tensor was written to; inference tensors do not tell, and an Array's offsets are immutable."""
    return -1 if x.is_inference() else x._version
