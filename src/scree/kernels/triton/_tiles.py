"""Tile maps: for every program of a kernel over ragged rows, the tile it works on, the costliest first.

A map is built on the device by two small kernels, without the host knowing a length, and kept with the offsets, so
that all layers share it. How many tiles there can be follows from shapes alone: ``T // BLOCK + B + 1``.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

from ._launch import INTERPRETED, Launcher, current_stream, device_number
from ._tiles_kernels import _count_tiles_kernel, _place_tiles_kernel

FIELDS = 8
_BUCKETS = 1024
_LANES = 256

_LAUNCHERS: dict[Any, tuple[Launcher, Launcher]] = {}


class TileMap(NamedTuple):
    """The tiles of the rows of one side of an attention.

    Attributes
    ----------
    tiles : tensor of (slots, 8), int32 (int64 where an index needs it)
        A tile each: start and length of its sequence, start and length of the sequence on the other side, number of
        the tile in its sequence, kind, and number of the sequence.
    slots : int
        The size of the grid.
    counters : tensor of (2,), int32
        Zeros before and after each kernel that takes its tiles from a counter. A map is used on one stream only, so no
        two such kernels run at once.
    """

    tiles: torch.Tensor
    slots: int
    counters: torch.Tensor


def build(
    offsets: torch.Tensor, other: torch.Tensor, total: int, other_total: int, block: int, left: int, right: int
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
    """
    batch = offsets.shape[0] - 1
    slots = total // block + batch + 1
    wide = max(total, other_total) + block >= 2**31
    device = device_number(offsets)
    key = (device, offsets.dtype, other.dtype, block, left >= 0, right >= 0, wide)
    launchers = _LAUNCHERS.get(key)
    if launchers is None:
        constants = {
            "BLOCK": block, "OTHER": 64, "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0,
            "BUCKETS": _BUCKETS, "LANES": _LANES,
        }  # fmt: skip
        launchers = _LAUNCHERS[key] = (
            Launcher(_count_tiles_kernel, device, constants, num_warps=4),
            Launcher(_place_tiles_kernel, device, constants, num_warps=4),
        )
    counts = torch.zeros(2 * _BUCKETS + 8, dtype=torch.int32, device=offsets.device)
    tiles = torch.empty((slots, FIELDS), dtype=torch.int64 if wide else torch.int32, device=offsets.device)
    scalars = (batch, slots, left, right, batch.bit_length())
    count, place = launchers
    count((-(-max(slots, batch + 1) // _LANES), 1, 1), (offsets, other, counts), (total, other_total, *scalars))
    place((-(-slots // _LANES), 1, 1), (offsets, other, counts, tiles), (total, *scalars))
    return TileMap(tiles, slots, counts[2 * _BUCKETS + 4 :])


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
) -> TileMap:
    """Return the map that is kept with the offsets, or build it and keep it.

    Nothing is kept while a CUDA graph is captured: the graph has to build the map again from the offsets of each
    replay. A map is used on the stream that built it only, and not again once the offsets were written to.
    """
    if kept is None:
        return build(offsets, other, total, other_total, block, left, right)
    stream = 0
    if not INTERPRETED:
        if torch.cuda.is_current_stream_capturing():
            return build(offsets, other, total, other_total, block, left, right)
        stream = current_stream(offsets.get_device())
    same = other is offsets
    key = (0 if same else id(other), stream, total, other_total, block, left, right)
    version = _version(offsets)
    found: _Kept | None = kept.get(key)
    if found is not None and found.version == version:
        if same or (found.other is not None and found.other() is other and found.other_version == _version(other)):
            return found.map
    built = build(offsets, other, total, other_total, block, left, right)
    kept[key] = _Kept(built, version, None if same else weakref.ref(other), _version(other))
    return built


class _Kept(NamedTuple):
    map: TileMap
    version: int
    other: weakref.ref[torch.Tensor] | None
    other_version: int


def _version(x: torch.Tensor) -> int:
    """How often a tensor was written to; inference tensors do not tell, and an Array's offsets are immutable."""
    return -1 if x.is_inference() else x._version
