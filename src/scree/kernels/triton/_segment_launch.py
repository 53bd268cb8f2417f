"""Launching the kernels of softmax and the reductions: which of them a batch needs, and with which tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._array import Array
from . import _segment_kernels as kernels
from ._launch import INTERPRETED, Launcher, capability, captures, current_stream, device_number, processors
from ._views import flat, like

OPS = {"softmax": 0, "sum": 1, "mean": 2, "max": 3, "min": 4, "logsumexp": 5}
GRADIENT = 6  # what the number of an op has more for its gradient
_UNFOLDED = (7, 8, 11)  # gradients that need no sum over the tokens

_INF = float("inf")
_UNKNOWN = 2**40
_EXACT: dict[str, Any] = {
    "enable_fp_fusion": False
}  # what becomes one operation depends on the tile, and so would the bits
_ACC = {torch.float32: tl.float32, torch.float64: tl.float64, torch.int64: tl.int64}


class Known(NamedTuple):
    """What the host knows of the lengths.

    `covered` is whether every token is certain to lie in a sequence, `full` whether it should, by what offsets mean.
    """

    longest: int = _UNKNOWN
    covered: bool = False
    full: bool = False


_NOTHING = Known()


def known(arr: Array) -> Known:
    """What is known of an Array without a look at the device."""
    if torch.compiler.is_compiling():
        return _NOTHING
    structure = arr._structure
    host, bound = structure.host, structure.max_length
    if host is not None:
        return Known(structure.longest(host), int(host[-1]) == arr.total_length, not structure.spare)
    return Known(_UNKNOWN if bound is None else bound, False, not structure.spare)


class Tiles(NamedTuple):
    """How many columns a program has, and how tokens are dealt out; see `_segment_kernels`."""

    block: int
    short: int  # tokens of a short sequence at most, of which a tile has at least four
    short_lanes: int
    tile: int  # elements of a tile of one warp
    medium: int  # tokens of a sequence of medium length at most
    lanes: int
    part: int  # tokens of a part of a long sequence
    part_tile: int
    part_lanes: int
    warps: int


def tiles(inner: int, size: int, acc_size: int, backward: bool) -> Tiles:
    """Tiles for values of `size` bytes that are computed with in numbers of `acc_size` bytes."""
    block = min(64, 128 // size, triton.next_power_of_2(inner))
    warps, warp = 8, 64 if torch.version.hip else 32
    at_once = warp * min(block, 16 // size)  # elements that a warp loads in one go
    return Tiles(
        block,
        short=256 // block,
        short_lanes=max(1, at_once // (4 * block)),
        tile=1024,
        medium=4096 // block,
        lanes=max(1, at_once // block),
        part=32768 // block,
        part_tile=8192 * 4 // acc_size // (2 if backward else 1),
        part_lanes=warps * at_once // block,
        warps=warps,
    )


class _Plan(NamedTuple):
    """The kernels of one op for one kind of values."""

    rows: Launcher
    parts: Launcher
    last: Launcher


_PLANS: dict[Any, _Plan] = {}


class _Way(NamedTuple):
    """What is launched for values of one shape.

    Attributes
    ----------
    grid, scalars
        Of the first kernel, and what all of them get.
    capacity : int
        The entries of the list at most; 0 where there is none.
    programs
        The grid of the kernels that work on the list.
    states : int
        Numbers of the type `acc` that those leave for each other; 0 where no sequence has several parts.
    """

    plan: _Plan
    grid: tuple[int, int, int]
    scalars: tuple[int, ...]
    acc: torch.dtype
    capacity: int
    programs: tuple[int, int, int]
    states: int


_WAYS: dict[Any, _Way] = {}
_MOST_WAYS = 1024


class _Shape(NamedTuple):
    """Values as (outer, total, inner)."""

    outer: int
    total: int
    inner: int


def _shape(x: torch.Tensor, ragged_dim: int) -> _Shape:
    outer = inner = 1
    for size in x.shape[:ragged_dim]:
        outer *= size
    for size in x.shape[ragged_dim + 1 :]:
        inner *= size
    return _Shape(outer, x.shape[ragged_dim], inner)


def _limits(op: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """What an empty sequence gives, and what changes no result."""
    if op in (1, 2) or op >= GRADIENT:
        return (float("nan") if op == 2 else 0), 0
    if dtype.is_floating_point:
        return (_INF, _INF) if op == 4 else (-_INF, -_INF)
    if dtype == torch.bool:
        return int(op == 4), int(op == 4)
    limit = torch.iinfo(dtype).max if op == 4 else torch.iinfo(dtype).min
    return limit, limit


def _together(rows: int, shape: _Shape, block: int, device: int) -> int:
    """How many sequences go to a program: more where they are short, but so that there is work for every processor."""
    for number, elements in ((64, 4096), (16, 8192), (4, 8192)):
        if number * shape.total * block <= elements * rows and rows >= number * 16 * processors(device):
            return number
    return 1


def _plan(
    op: int,
    device: int,
    dtype: torch.dtype,
    acc: torch.dtype,
    shape: _Shape,
    t: Tiles,
    rows: int,
    far: bool,
) -> _Plan:
    """Make the kernels with `rows` sequences a program and, if `far`, a list of the long ones."""
    nothing, padding = _limits(op, dtype)
    shared = {
        "OP": op,
        "INNER": shape.inner,
        "OUTER": shape.outer > 1,
        "NOTHING": nothing,
        "PADDING": padding,
        "ACC": _ACC[acc],
        "BLOCK": t.block,
    }
    warp = {
        "STEPS": t.tile // (t.lanes * t.block),
        "LANES": t.lanes,
        "NARROW": max(t.short // 8, t.short_lanes),
        "MIDDLE": max(t.short // 2, t.short_lanes),
        "SHORT": t.short,
        "SHORT_LANES": t.short_lanes,
        "TILE": t.tile,
        "ROWS": rows,
        "MEDIUM": t.medium,
        "PART": t.part,
        "LISTED": far,
    }
    # As measured on an H200, more programs are worth more than their registers here, and nothing spills for them.
    capped = op < GRADIENT and t.block == 1 and dtype.itemsize == 2 and capability(device) == (9, 0)
    cap: dict[str, Any] = {"maxnreg": 96} if capped else {}
    parts = {"STEPS": max(1, t.part_tile // (t.part_lanes * t.block)), "LANES": t.part_lanes, "PART": t.part}

    return _Plan(
        Launcher(kernels._rows_kernel, device, shared | warp, num_warps=1, **_EXACT, **cap),
        Launcher(kernels._list_kernel, device, shared | parts | {"LAST": False}, num_warps=t.warps, **_EXACT),
        Launcher(kernels._list_kernel, device, shared | parts | {"LAST": True}, num_warps=t.warps, **_EXACT),
    )


def _integers(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def forward(op: int, x: torch.Tensor, offsets: torch.Tensor, ragged_dim: int, lengths: Known) -> torch.Tensor:
    """The softmax of x along its ragged axis, or its reduction, (B, *features)."""
    if op == 0:
        y = like(x)
    else:
        shape = (offsets.shape[0] - 1, *x.shape[:ragged_dim], *x.shape[ragged_dim + 1 :])
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
    x = x if x.is_contiguous() else x.contiguous()
    _launch(op, (x, x, x), offsets, y, _shape(x, ragged_dim), lengths)
    return y


def backward(
    op: int,
    x: torch.Tensor,
    y: torch.Tensor,
    dy: torch.Tensor,
    offsets: torch.Tensor,
    ragged_dim: int,
    lengths: Known,
) -> torch.Tensor:
    """The gradient of `forward`: x is its result where that is a softmax, otherwise what it was given."""
    dx = like(x)
    if op in (1, 2):
        x = dx  # of which only the shape counts
    tensors = x.contiguous(), dy.contiguous(), y.contiguous()
    _launch(op + GRADIENT, tensors, offsets, dx, _shape(x, ragged_dim), lengths)
    return dx


def _launch(
    op: int, tensors: tuple[torch.Tensor, ...], offsets: torch.Tensor, out: torch.Tensor, shape: _Shape, known: Known
) -> None:
    """Compute `out` from (x, dy, y)."""
    if 0 in out.shape:
        return
    device = device_number(out)
    key = (op, device, out.dtype, offsets.dtype, tensors[1].dtype, tensors[2].dtype, offsets.shape[0], shape, known)
    way = _WAYS.get(key)
    if way is None:
        if len(_WAYS) >= _MOST_WAYS:  # totals that change at every call
            _WAYS.clear()
        way = _WAYS[key] = _way(*key)
    if out.dtype == torch.bool:
        tensors, out = tuple(map(_integers, tensors)), _integers(out)
    if not way.capacity:
        way.plan.rows(way.grid, (*tensors, offsets, out, offsets), way.scalars)
        return
    room = _take_room(device, way, out)
    given = (*tensors, offsets, out, room.entries)
    way.plan.rows(way.grid, given, way.scalars)
    given = (*given, room.states, room.following)
    way.plan.parts(way.programs, given, way.scalars)
    if way.states:
        way.plan.last(way.programs, given, way.scalars)
    if room.key is not None:
        _ROOMS[room.key] = room._replace(entries=room.following, following=room.entries)


def _way(
    op: int,
    device: int,
    dtype: torch.dtype,
    offsets: torch.dtype,
    dy: torch.dtype,
    y: torch.dtype,
    rows: int,
    shape: _Shape,
    known: Known,
) -> _Way:
    rows, cols = rows - 1, shape.outer * shape.inner
    acc = dtype if dtype == torch.float64 else torch.float32 if dtype.is_floating_point else torch.int64
    t = tiles(shape.inner, dtype.itemsize, acc.itemsize, op >= GRADIENT)
    columns = -(-cols // t.block)
    beyond = (op == 0 or op >= GRADIENT) and not known.covered  # what lies beyond the last sequence is one, too
    longest = shape.total if beyond and not known.full else min(known.longest, shape.total)
    far = longest > t.medium
    together = _together(rows + beyond, shape, t.block, device)
    cut = far and longest >= 2 * t.part and op not in _UNFOLDED
    if not cut and op not in _UNFOLDED:  # whatever the lengths are in truth: no parts, for which there are no states
        t = t._replace(part=_UNKNOWN)
    key = (op, device, dtype, offsets, dy, y, shape.inner, shape.outer > 1, together, far, cut)
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS[key] = _plan(op, device, dtype, acc, shape, t, together, far)
    capacity = shape.total // t.medium if far else 0
    return _Way(
        plan,
        (-(-(rows + beyond) // together) * columns, 1, 1),
        (rows, shape.total, cols, columns, capacity),
        acc,
        capacity,
        (min(capacity * columns, 8 * processors(device)), 1, 1),
        capacity * columns * 2 * t.block if cut else 0,
    )


class _Room(NamedTuple):
    """Memory between the kernels of one call: the list of long sequences, behind 4 counts in 32 bits, and states.

    The counts are zeros before a call: how many entries the list has, how many were taken, in two passes, and whether any
    sequence has several. A call puts zeros there for the `following` one.
    """

    key: Any
    entries: torch.Tensor
    following: torch.Tensor
    length: int
    states: torch.Tensor
    size: int


_ROOMS: dict[Any, _Room] = {}
_MOST_ROOM = 1 << 24  # bytes that are kept for a stream


def _take_room(device: int, way: _Way, out: torch.Tensor) -> _Room:
    """The memory that is kept for the stream, which nobody else has until it is put back; or fresh memory.

    A CUDA graph gets its own: it may be replayed on any stream, beside any other. So does the second of two threads on
    one stream. An error on the way loses it.
    """
    length, size = 2 + way.capacity, max(way.states, 1)
    key = None
    stream = 0 if INTERPRETED else current_stream(device)
    if not captures(stream) and 16 * length + way.acc.itemsize * size <= _MOST_ROOM:
        key = device, stream, way.acc
        found = _ROOMS.pop(key, None)
        if found is not None and found.length >= length and found.size >= size:
            return found
        length, size = triton.next_power_of_2(length), triton.next_power_of_2(size)
    entries = torch.zeros(length, dtype=torch.int64, device=out.device)
    return _Room(key, entries, torch.empty_like(entries), length, flat(size, way.acc, out.device), size)
