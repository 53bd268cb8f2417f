"""Launching the kernels of the norms: which tiles, how many programs, and what is added up after them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from . import _norm_kernels as kernels
from ._launch import Launcher, device_number, processors, shared_memory
from ._views import Rows, flat, like, rows_of, specialised, wide

_WIDE = 16384  # features: wider rows go in chunks forward ...
_WIDE_BACKWARD = 8192  # ... and backward, where the sums over rows are in registers too
_CHUNK = 4096


class _Backward(NamedTuple):
    """What the backward pass launches: the means of wide rows, the gradients, and the sums over programs."""

    means: Launcher | None
    launch: Launcher
    total: Launcher
    tile: int  # rows
    programs: int
    columns: int
    total_columns: int


_FORWARD: dict[Any, tuple[Launcher, int]] = {}
_BACKWARD: dict[Any, _Backward] = {}


def forward_tile(features: int, itemsize: int) -> tuple[int, int]:
    """Rows a program, and its warps: short rows stay within one warp, so that no sum has to wait for another."""
    block = triton.next_power_of_2(features)
    if block <= 1024:
        return min(512, (1024 if block <= 256 else 2048) // block), 1
    if block <= 4096:
        return 2, block // 512
    return 1, 4 if features <= 6144 and itemsize < 8 else block // 1024


def backward_tile(block: int, itemsize: int, room: int) -> tuple[int, int, int, int]:
    """Rows a program, its warps, the programs on a multiprocessor, and the stages of the pipeline.

    `room` is the shared memory: where it holds them, two tiles are on the way while the one before is worked on.
    """
    tile = max(block, 2048 if block <= 1024 else 4096 if block == 2048 or itemsize >= 4 else 8192)
    resident = max(1, 16384 // (tile * itemsize))
    stages = 3 if 4 * (tile + 256) * itemsize * resident <= room else 1
    warps = max(4, min(8, tile // 512)) * (2 if itemsize == 8 else 1)
    return min(512, tile // block), warps, resident, stages


def sum_tile(features: int) -> tuple[int, int, int]:
    """Programs and columns of a tile of what they wrote, and the warps that add it up."""
    return 128, min(16, triton.next_power_of_2(features)), 8


def _spare(x: torch.Tensor, offsets: torch.Tensor | None, ragged_dim: int) -> tuple[int, int, int]:
    """batch_size, trail and tokens of the kernels: which rows of x make a token."""
    if offsets is None:
        return 0, 1, 1
    trail = 1
    for size in x.shape[ragged_dim + 1 : -1]:
        trail *= size
    return offsets.shape[0] - 1, trail, x.shape[ragged_dim]


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """x with the place of its rows; a copy where those have no two strides."""
    rows = rows_of(x)
    if rows is None:
        x = x.contiguous()
        rows = Rows(0, x.numel() // x.shape[-1], 1, 0, x.shape[-1])
    return x, rows


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    offsets: torch.Tensor | None,
    eps: float,
    centered: bool,
    ragged_dim: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised values and, where they are to be saved, the stats (rows, or 2 x rows); else x in their place."""
    dtype, features = x.dtype, x.shape[-1]
    if x.is_contiguous():
        layout, rows, inner, stride_outer, stride = 0, x.numel() // features if features else 0, 1, 0, features
        y = torch.empty_like(x)
    else:
        x, (layout, rows, inner, stride_outer, stride) = _dense(x) if features else (x, Rows(0, 0, 1, 0, 0))
        y = like(x)
    stats = x
    if save:
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        stats = flat(2 * rows if centered else rows, stats_dtype, x.device)
    if rows == 0:
        return y, stats
    device = device_number(x)
    key = (
        device, features, dtype, eps, centered, save, layout, specialised(stride_outer), specialised(stride),
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        None if offsets is None else offsets.dtype,
    )  # fmt: skip
    found = _FORWARD.get(key)
    if found is None:
        found = _FORWARD[key] = _forward_launcher(*key)
    launch, tile = found
    launch(
        (-(-rows // tile), 1, 1),
        (
            x,
            x if weight is None else weight if weight.is_contiguous() else weight.contiguous(),
            x if bias is None else bias if bias.is_contiguous() else bias.contiguous(),
            y,
            stats,
            x if offsets is None else offsets,
        ),
        (rows, inner, stride_outer, stride, *_spare(x, offsets, ragged_dim)),
    )
    return y, stats


def _forward_launcher(
    device: int,
    features: int,
    dtype: torch.dtype,
    eps: float,
    centered: bool,
    save: bool,
    layout: int,
    _stride_outer: int,
    _stride: int,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    offsets: torch.dtype | None,
) -> tuple[Launcher, int]:
    block = triton.next_power_of_2(features)
    wide_rows = block > _WIDE
    if wide_rows:
        block, rows, warps = _CHUNK, 1, 8
    else:
        rows, warps = forward_tile(features, dtype.itemsize)
    constants = {
        "M": features,
        "EPS": eps,
        "CENTERED": centered,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "SAVE": save,
        "LAYOUT": layout,
        "SPARE": offsets is not None,
        "ACC": wide(dtype),
        "ROWS": rows,
        "BLOCK": block,
    }
    kernel = kernels._norm_fwd_wide_kernel if wide_rows else kernels._norm_fwd_kernel
    return Launcher(kernel, device, constants, num_warps=warps), rows


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    offsets: torch.Tensor | None,
    bias_dtype: torch.dtype,
    centered: bool,
    ragged_dim: int,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients that are needed, each in the dtype of what it belongs to."""
    dtype, device, features = x.dtype, device_number(x), x.shape[-1]
    weight_dtype = dtype if weight is None else weight.dtype
    dx = like(x) if needs_x else None
    dweight = flat(features, weight_dtype, x.device) if needs_weight else None
    dbias = flat(features, bias_dtype, x.device) if needs_bias else None
    if x.numel() == 0:
        return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
    x, (layout, rows, inner, stride_outer, stride) = _dense(x)
    if not dy.is_contiguous():
        dy = dy.contiguous()
    key = (
        device, features, dtype, centered, needs_x, needs_weight, needs_bias, layout,
        specialised(stride_outer), specialised(stride), None if weight is None else weight_dtype, bias_dtype, dy.dtype,
        None if offsets is None else offsets.dtype,
    )  # fmt: skip
    plan = _BACKWARD.get(key)
    if plan is None:
        plan = _BACKWARD[key] = _plan_backward(*key)
    if weight is None:
        weight = x
    elif not weight.is_contiguous():
        weight = weight.contiguous()
    if offsets is None:
        batch_size, trail, tokens, offsets = 0, 1, 1, x
    else:
        batch_size, trail, tokens = _spare(x, offsets, ragged_dim)
    scalars = (rows, inner, stride_outer, stride, batch_size, trail, tokens)
    programs = min(plan.programs, -(-rows // plan.tile))
    sums = needs_weight + needs_bias
    dparts = flat(sums * programs * features, stats.dtype, x.device) if sums else stats
    target = stats if dx is None else dx
    if plan.means is None:
        plan.launch((programs, 1, 1), (dy, x, weight, stats, offsets, target, dparts), scalars)
    else:
        along = flat(2 * rows if centered else rows, stats.dtype, x.device)
        plan.means((rows, 1, 1), (dy, x, weight, stats, offsets, along), scalars)
        plan.launch((programs, plan.columns, 1), (dy, x, weight, stats, along, offsets, target, dparts), scalars)
    if sums:
        outputs = (dparts, stats if dweight is None else dweight, stats if dbias is None else dbias)
        plan.total((plan.total_columns, sums, 1), outputs, (programs,))
    return dx, dweight, dbias


def _plan_backward(
    device: int,
    features: int,
    dtype: torch.dtype,
    centered: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    layout: int,
    _stride_outer: int,
    _stride: int,
    weight: torch.dtype | None,
    _bias: torch.dtype,
    dy: torch.dtype,
    offsets: torch.dtype | None,
) -> _Backward:
    block = triton.next_power_of_2(features)
    columns, means, stages = 1, None, {}
    common = {"M": features, "CENTERED": centered, "HAS_WEIGHT": weight is not None}
    needs = {"NEEDS_X": needs_x, "NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias}
    rest = {"LAYOUT": layout, "SPARE": offsets is not None, "ACC": wide(dtype)}
    kernel = kernels._norm_bwd_kernel
    if block > _WIDE_BACKWARD or block * dtype.itemsize > 4 * _WIDE_BACKWARD:
        kernel = kernels._norm_bwd_wide_kernel
        means = Launcher(kernels._norm_bwd_means_kernel, device, {**common, **rest, "BLOCK": _CHUNK}, num_warps=8)
        rows, block, warps = 4, _CHUNK // 4, 4
        columns = triton.cdiv(features, block)
        programs = max(1, 8 * processors(device) // columns)
    else:
        size = max(dtype.itemsize, dy.itemsize)
        rows, warps, resident, depth = backward_tile(block, size, shared_memory(device))
        programs, stages = resident * processors(device), {"STAGES": depth}
    tile = {"ROWS": rows, "BLOCK": block}
    launch = Launcher(kernel, device, {**common, **needs, **rest, **tile, **stages}, num_warps=warps)
    parts, width, sum_warps = sum_tile(features)
    summing = {"M": features, "FIRST": int(not needs_weight), "ACC": wide(dtype), "ROWS": parts, "BLOCK": width}
    total = Launcher(kernels._norm_bwd_sum_kernel, device, summing, num_warps=sum_warps)
    return _Backward(means, launch, total, rows, programs, columns, triton.cdiv(features, width))
