"""Launching the attention kernels: tiles for a head dim and a dtype, outputs, and what each kernel is compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from . import _hopper, _tiles
from ._attention_bwd_kernels import _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from ._attention_fwd_kernels import _attention_fwd_kernel
from ._launch import INTERPRETED, Launcher, capability, device_number
from ._tiles import Kept

WIDEST = 256
_NO_LIMIT = -1
_SHORT = 768  # tokens
_LONGEST = 1 << 30  # no window reaches further, and sums with it fit in 32 bits


class Options(NamedTuple):
    """The options of one attention, `causal` being a window that does not look to the right.

    Attributes
    ----------
    left, right : int
        The window; -1 for no limit.
    scale : float
    softcap : float
        0 for none.
    """

    left: int
    right: int
    scale: float
    softcap: float

    @classmethod
    def of(
        cls,
        causal: bool,
        scale: float | None,
        window_size: tuple[int | None, int | None],
        softcap: float | None,
        head_dim: int,
    ) -> Options:
        left, right = window_size
        return cls(
            _NO_LIMIT if left is None else min(left, _LONGEST),
            0 if causal else _NO_LIMIT if right is None else min(right, _LONGEST),
            head_dim**-0.5 if scale is None else scale,
            0.0 if softcap is None else softcap,
        )


class Tiles(NamedTuple):
    """How a kernel cuts its work: rows a program, places of the other side a step, warps, and stages of loads."""

    rows: int
    step: int
    warps: int
    stages: int
    tma: bool = True
    whole: bool = False
    rows_tma: bool = False
    registers: int | None = None


# (widest head dim up to, tiles). A result depends, bit for bit, on the step, and on nothing else here.
_HALF = {
    "fwd": ((64, Tiles(64, 64, 4, 3)), (128, Tiles(64, 64, 4, 3)), (256, Tiles(64, 32, 4, 2))),
    "dq": ((64, Tiles(64, 64, 4, 2)), (128, Tiles(64, 64, 4, 2)), (256, Tiles(64, 32, 8, 1))),
    "dkv": ((64, Tiles(64, 64, 4, 2)), (128, Tiles(64, 64, 4, 2)), (256, Tiles(64, 32, 8, 1))),
}
_SINGLE = {
    "fwd": ((64, Tiles(64, 32, 4, 1)), (128, Tiles(32, 32, 4, 1)), (256, Tiles(16, 16, 4, 1))),
    "dq": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(32, 16, 4, 1)), (256, Tiles(16, 16, 4, 1))),
    "dkv": ((64, Tiles(32, 32, 4, 1)), (128, Tiles(32, 16, 4, 1)), (256, Tiles(16, 16, 4, 1))),
}


def tiles_for(kernel: str, width: int, itemsize: int) -> Tiles:
    """The tiles of a kernel for head dims up to `width`."""
    table = (_HALF if itemsize == 2 else _SINGLE)[kernel]
    return next(tiles for widest, tiles in table if width <= widest)


class _Facts(NamedTuple):
    """All that a kernel is compiled for, beyond what follows from the strides."""

    device: int
    dtype: torch.dtype
    group: int
    inner: int
    head_dim: int
    v_dim: int
    has_left: bool
    has_right: bool
    softcap: bool
    scaled: bool
    extra: bool  # forward: sinks; dq: the LSE has a gradient
    tma: bool
    odd_strides: int  # two bits for each stride: whether it is no multiple of 16, and whether it is 1
    extra_dtype: torch.dtype | None


_LAUNCHERS: dict[tuple[str, _Facts], tuple[Launcher, Tiles]] = {}
_KERNELS = {"fwd": _attention_fwd_kernel, "dq": _attention_bwd_dq_kernel, "dkv": _attention_bwd_dkv_kernel}


def _launcher(kernel: str, facts: _Facts) -> tuple[Launcher, Tiles]:
    found = _LAUNCHERS.get((kernel, facts))
    if found is not None:
        return found
    itemsize = facts.dtype.itemsize
    width = max(facts.head_dim, facts.v_dim)
    tiles = tiles_for(kernel, width, itemsize)
    tma = facts.tma and tiles.tma
    constants: dict[str, Any] = {
        "GROUP": facts.group,
        "INNER": facts.inner,
        "D": facts.head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(facts.head_dim)),
        "D_V": facts.v_dim,
        "BLOCK_D_V": max(16, triton.next_power_of_2(facts.v_dim)),
        "BLOCK_M": tiles.step if kernel == "dkv" else tiles.rows,
        "BLOCK_N": tiles.rows if kernel == "dkv" else tiles.step,
        "HAS_LEFT": facts.has_left,
        "HAS_RIGHT": facts.has_right,
        "SOFTCAP": facts.softcap,
    }
    if kernel == "fwd":
        constants |= {"SCALED": facts.scaled, "SINKS": facts.extra}
    if kernel == "dq":
        constants |= {"DLSE": facts.extra}
    if kernel == "dkv":
        constants |= {"BLOCK_ROWS": tiles_for("dq", width, itemsize).rows}
    constants |= {"PRECISION": "ieee", "TMA": tma, "WHOLE": tiles.whole}
    if kernel == "dkv":
        constants |= {"ROWS_TMA": tma and tiles.rows_tma}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if not INTERPRETED:
        options |= {"enable_fp_fusion": True, "maxnreg": tiles.registers}
    made = Launcher(_KERNELS[kernel], facts.device, constants, workspace=tma, **options), tiles
    _LAUNCHERS[(kernel, facts)] = made
    return made


def _facts(
    q: torch.Tensor,
    heads: tuple[int, int],
    widths: tuple[int, int],
    options: Options,
    strides: tuple[int, ...],
    streamed: tuple[torch.Tensor, torch.Tensor],
    extra: torch.Tensor | None,
    inner: int,
) -> _Facts:
    """What a kernel is compiled for; `streamed` are the tensors that it walks over."""
    device = device_number(q)
    odd = 0
    bit = 1
    for stride in strides:
        if stride & 15:
            odd |= 3 * bit if stride == 1 else bit
        bit <<= 2
    return _Facts(
        device,
        q.dtype,
        heads[0] // heads[1],
        inner,
        widths[0],
        widths[1],
        options.left >= 0,
        options.right >= 0,
        options.softcap > 0,
        options.scale <= 0,
        extra is not None,
        q.dtype.itemsize == 2 and capability(device)[0] >= 9 and all(_has_tma(x) for x in streamed),
        odd,
        None if extra is None else extra.dtype,
    )


def _heads_side_by_side(heads: int, group: int, rows: int, offsets: torch.Tensor) -> int:
    """How many heads of a tile run at the same time.

    Of short sequences all: the heads of a token lie together in memory. Of long ones those that share keys and
    values, which stay in the cache while the other tiles of the sequence need them.
    """
    return heads if rows <= _SHORT * (offsets.shape[0] - 1) else group


def _has_tma(x: torch.Tensor) -> bool:
    """Whether the copy engine can read the heads of x: 16-byte rows at multiples of 16 bytes, at most 2 ** 31 apart."""
    per_16_bytes = 15 // x.element_size()
    stride_t, stride_h, _ = x.stride()
    return (
        stride_t & per_16_bytes == 0
        and stride_h & per_16_bytes == 0
        and x.data_ptr() & 15 == 0
        and x.shape[2] * x.element_size() >= 16
        and 0 < stride_t
    )


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last axis dense: x itself, or a copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    options: Options,
    kept: Kept | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (T, H, D_v) in the dtype of q, and LSE (H, T), float32: every element is written."""
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    total, heads, head_dim = q.shape
    total_k, kv_heads, v_dim = v.shape
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    inner = _heads_side_by_side(heads, heads // kv_heads, total_k, cu_k)
    facts = _facts(q, (heads, kv_heads), (head_dim, v_dim), options, strides, (k, v), sinks, inner)
    if _hopper.serves(facts, q, k, v):
        return _hopper.forward(facts, q, k, v, sinks, _contiguous(cu_q), _contiguous(cu_k), options, kept)
    launch, tiles = _launcher("fwd", facts)
    left, right, scale, softcap = options
    tile_map = _tiles.of(kept, _contiguous(cu_q), _contiguous(cu_k), total, total_k, tiles.rows, left, right)
    o = torch.empty((total, heads, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    sinks = lse if sinks is None else sinks.contiguous()
    launch(
        (tile_map.slots * heads, 1, 1),
        (q, k, v, sinks, tile_map.tiles, o, lse),
        (*strides, heads * v_dim, v_dim, total, tile_map.slots, scale, softcap, left, right),
    )
    return o, lse


def backward(
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    options: Options,
    kept_q: Kept | None,
    kept_k: Kept | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of q, k, v and sinks, contiguous, in their dtypes: every element is written."""
    do = _rows_dense(torch.zeros_like(o) if do is None else do)
    if dlse is not None:
        dlse = dlse.contiguous()
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    total, heads, head_dim = q.shape
    total_k, kv_heads, v_dim = v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    left, right, scale, softcap = options
    cu_q, cu_k = _contiguous(cu_q), _contiguous(cu_k)
    inputs = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])

    strides = (*inputs, *o.stride()[:2], *do.stride()[:2])
    inner = _heads_side_by_side(heads, heads // kv_heads, total_k, cu_k)
    facts = _facts(q, (heads, kv_heads), (head_dim, v_dim), options, strides, (k, v), dlse, inner)
    launch, tiles = _launcher("dq", facts)
    tile_map = _tiles.of(kept_q, cu_q, cu_k, total, total_k, tiles.rows, left, right)
    slots = tile_map.slots
    rows = torch.empty((heads, slots, 2, tiles.rows), dtype=torch.float32, device=q.device)
    launch(
        (slots * heads, 1, 1),
        (q, k, v, o, do, lse, lse if dlse is None else dlse, tile_map.tiles, dq, delta, rows),
        (*strides, heads * head_dim, head_dim, total, slots, scale, softcap, left, right),
    )

    strides = (*inputs, *do.stride()[:2])
    inner = _heads_side_by_side(kv_heads, 1, total, cu_q)
    facts = _facts(q, (heads, kv_heads), (head_dim, v_dim), options, strides, (q, do), None, inner)
    launch, tiles = _launcher("dkv", facts)
    tile_map = _tiles.of(kept_k, cu_k, cu_q, total_k, total, tiles.rows, right, left)
    launch(
        (tile_map.slots * kv_heads, 1, 1),
        (q, k, v, do, rows, tile_map.tiles, dk, dv),
        (*strides, kv_heads * head_dim, head_dim, kv_heads * v_dim, v_dim, tile_map.slots, slots, scale, softcap, left, right),
    )
    dsinks = None
    if sinks is not None:  # the sink is a key without a value: its score has the gradient -p * delta
        dsinks = torch.exp(sinks.float()[:, None] - lse) * -delta
        dsinks = torch.where(delta == 0, 0.0, dsinks).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _contiguous(offsets: torch.Tensor) -> torch.Tensor:
    return offsets if offsets.is_contiguous() else offsets.contiguous()
