"""Launching the kernels of softmax and the reductions: which of them a batch needs, and with which tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..._array import Array
from . import _segment_bwd_kernels as gradients
from . import _segment_kernels as kernels
from ._launch import Launcher, device_number, processors
from ._views import wide

OPS = {"softmax": 0, "sum": 1, "mean": 2, "max": 3, "min": 4, "logsumexp": 5}
_SUMMED = (0, 3, 4)  # those whose gradient needs a sum over the tokens

_INF = float("inf")
_UNKNOWN = 2**62


class Known(NamedTuple):
    """What the host knows of the lengths: bounds, and whether every token lies in a sequence."""

    shortest: int = 0
    longest: int = _UNKNOWN
    covered: bool = False


def known(arr: Array) -> Known:
    """What is known of an Array without a look at the device."""
    structure = arr._structure
    host = structure.host
    if host is None or torch.compiler.is_compiling():
        return Known()
    if structure.min_length is None:
        structure.measure(host)
    return Known(structure.min_length or 0, structure.longest(host), int(host[-1]) == arr.total_length)


def tiles(inner: int) -> tuple[int, int, int, int]:
    """Columns of a tile, tokens of a chunk, tokens of a short sequence (0: none is short), and of those to a program."""
    block = min(64, triton.next_power_of_2(inner))
    short = 256 // block if block <= 16 else 0
    return block, 8192 // block, short, 16


class _Plan(NamedTuple):
    """The kernels of one op for one kind of values, and their tiles."""

    short: Launcher
    chunk: Launcher
    join: Launcher
    last: Launcher
    block: int
    chunk_size: int
    short_size: int
    rows: int
    acc: torch.dtype


_PLANS: dict[Any, _Plan] = {}


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
    if op in (1, 2):
        return (0 if op == 1 else float("nan")), 0
    if dtype.is_floating_point:
        return (_INF, _INF) if op == 4 else (-_INF, -_INF)
    if dtype == torch.bool:
        return int(op == 4), int(op == 4)
    limit = torch.iinfo(dtype).max if op == 4 else torch.iinfo(dtype).min
    return limit, limit


def _group(rows: int, shape: _Shape, device: int) -> int:
    """How many slots go to a program: several where most belong to short sequences, and enough programs remain."""
    block, chunk, _, _ = tiles(shape.inner)
    chunks = shape.total // chunk
    programs = (chunks + rows + 1) * -(-shape.outer * shape.inner // block)
    if rows < 4 * chunks:
        return 1
    return next((group for group in (32, 8) if programs >= 4 * group * processors(device)), 1)


def _plan(
    op: int, backward: bool, device: int, dtype: torch.dtype, others: tuple[Any, ...], shape: _Shape, group: int
) -> _Plan:
    key = (op, backward, device, dtype, others, shape.inner, shape.outer > 1, group)
    found = _PLANS.get(key)
    if found is not None:
        return found
    block, chunk, short, rows = tiles(shape.inner)
    nothing, padding = _limits(op, dtype)
    acc = wide(dtype) if dtype.is_floating_point else tl.int64
    place = {"INNER": shape.inner, "OUTER": shape.outer > 1}
    limits = {"NOTHING": nothing, "PADDING": padding}
    summed = {"PADDING": 0 if backward else padding, "ACC": acc, "CHUNK": chunk, "CHUNKS": max(16, 256 // block)}
    joining = {
        "OP": 1 if backward else op,
        "RAW": backward or op == 0,
        **place,
        **summed,
        "BLOCK": block,
        "GROUP": group,
    }
    short_tile = {"ACC": acc, "ROWS": rows, "SHORT": short or 1, "BLOCK": block}
    chunk_tile = {"ACC": acc, "SHORT": short, "CHUNK": chunk, "BLOCK": block}

    def launcher(kernel: Any, constants: dict[str, Any], warps: int = 8) -> Launcher:
        return Launcher(kernel, device, constants, num_warps=warps)

    if backward:
        first = launcher(gradients._short_bwd_kernel, {"OP": op, **place, **short_tile})
        middle = launcher(
            gradients._chunk_bwd_kernel, {"OP": op, **place, **chunk_tile, "JOINED": False, "GROUP": group}
        )
        last = launcher(gradients._chunk_bwd_kernel, {"OP": op, **place, **chunk_tile, "JOINED": True, "GROUP": group})
    else:
        first = launcher(kernels._short_fwd_kernel, {"OP": op, **place, **limits, **short_tile})
        middle = launcher(kernels._chunk_fwd_kernel, {"OP": op, **place, **limits, **chunk_tile, "GROUP": group})
        finish = {**place, "PADDING": padding, "ACC": acc, "CHUNK": chunk, "BLOCK": block, "GROUP": group}
        last = launcher(kernels._soften_kernel, finish)
    join = launcher(kernels._join_kernel, joining, warps=4)
    stats = torch.int64 if not dtype.is_floating_point else torch.float64 if dtype == torch.float64 else torch.float32
    found = _PLANS[key] = _Plan(first, middle, join, last, block, chunk, short, rows, stats)
    return found


def _integers(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def forward(op: int, x: torch.Tensor, offsets: torch.Tensor, ragged_dim: int, lengths: Known) -> torch.Tensor:
    """The softmax of x along its ragged axis, or its reduction, (B, *features)."""
    shape, rows = _shape(x, ragged_dim), offsets.shape[0] - 1
    features = (*x.shape[:ragged_dim], *x.shape[ragged_dim + 1 :])
    y = torch.empty(x.shape if op == 0 else (rows, *features), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = _integers(x.contiguous())
    device = device_number(x)
    group = _group(rows, shape, device)
    plan = _plan(op, False, device, y.dtype, (offsets.dtype,), shape, group)
    cols = shape.outer * shape.inner
    columns = -(-cols // plan.block)
    scalars, steps = (rows, shape.total, cols, columns), rows.bit_length()
    out = _integers(y)
    if plan.short_size and lengths.shortest <= plan.short_size:
        plan.short((columns * -(-rows // plan.rows), 1, 1), (x, offsets, out), scalars)
    if plan.short_size and lengths.longest <= plan.short_size and (lengths.covered or op != 0):
        return y
    slots = shape.total // plan.chunk_size + rows + 1
    long = lengths.longest > plan.chunk_size
    partial = torch.empty((2 if op in (0, 5) else 1, slots if long else 1, cols), dtype=plan.acc, device=x.device)
    tops, totals = partial[0], partial[-1]
    plan.chunk((-(-slots // group) * columns, 1, 1), (x, offsets, out, tops, totals), (*scalars, steps))
    if not long:
        return y
    if op != 0:
        plan.join((-(-rows // group) * columns, 1, 1), (tops, totals, offsets, out, tops), scalars)
        return y
    states = torch.empty((2, rows, cols), dtype=plan.acc, device=x.device)
    plan.join((-(-rows // group) * columns, 1, 1), (tops, totals, offsets, states[0], states[1]), scalars)
    plan.last((-(-slots // group) * columns, 1, 1), (x, offsets, out, states[0], states[1]), (*scalars, steps))
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
    shape, rows = _shape(x, ragged_dim), offsets.shape[0] - 1
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx
    x, y, dy = x.contiguous(), y.contiguous(), dy.contiguous()
    device = device_number(x)
    group = _group(rows, shape, device)
    plan = _plan(op, True, device, x.dtype, (offsets.dtype, y.dtype, dy.dtype), shape, group)
    cols = shape.outer * shape.inner
    columns = -(-cols // plan.block)
    scalars, steps = (rows, shape.total, cols, columns), rows.bit_length()
    if plan.short_size and lengths.shortest <= plan.short_size:
        plan.short((columns * -(-rows // plan.rows), 1, 1), (x, dy, y, offsets, dx), scalars)
    if lengths.longest <= plan.short_size and lengths.covered:
        return dx
    slots = shape.total // plan.chunk_size + rows + 1
    long = op in _SUMMED and lengths.longest > plan.chunk_size
    partial = torch.empty((slots if long else 1, cols), dtype=plan.acc, device=x.device)
    plan.chunk((-(-slots // group) * columns, 1, 1), (x, dy, y, offsets, dx, partial), (*scalars, steps))
    if long and rows:
        sums = torch.empty((rows, cols), dtype=plan.acc, device=x.device)
        plan.join((-(-rows // group) * columns, 1, 1), (partial, partial, offsets, sums, sums), scalars)
        plan.last((-(-slots // group) * columns, 1, 1), (x, dy, y, offsets, dx, sums), (*scalars, steps))
    return dx
