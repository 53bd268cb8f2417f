"""Attention forward on Hopper (sm_90): which calls its own kernel serves, and launching it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from . import _tiles
from ._launch import INTERPRETED, Launcher, capability, processors

if TYPE_CHECKING:
    from ._attention_launch import Options, _Facts
    from ._tiles import Kept

_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
_MOST_ROWS = 1 << 30  # a box of the copy engine counts its rows up to here
_MOST_COLUMNS = 1 << 31


class Config(NamedTuple):
    """How the kernel cuts its work: warpgroups of 64 rows, places of the other side a step, and stages of loads."""

    groups: int
    step: int
    stages: int
    pingpong: bool
    eight: int = 8
    tied: bool = True
    late: bool = False
    merge: bool = False
    unroll: bool = False
    tiles: int = 2


_CONFIGS = {128: Config(2, 128, 2, False), 64: Config(2, 128, 2, False)}
_LAUNCHERS: dict[Any, Launcher] = {}


def serves(facts: _Facts, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether this call has a kernel here, faster than the portable one."""
    if (
        not facts.tma
        or facts.head_dim != facts.v_dim
        or facts.head_dim not in _CONFIGS
        or not _GLUON
        or INTERPRETED
        or capability(facts.device) != (9, 0)
    ):
        return False
    return _reaches(q) and _reaches(k) and _reaches(v)


def _reaches(x: torch.Tensor) -> bool:
    """Whether 32 bits count the rows of x, and the elements of a row from its first head to its last."""
    rows, heads, width = x.shape
    stride_t, stride_h, _ = x.stride()
    return (
        rows < _MOST_ROWS
        and (heads - 1) * stride_h + width < _MOST_COLUMNS
        and stride_t & 7 == 0
        and stride_h & 7 == 0
        and stride_t > 0
        and x.data_ptr() & 15 == 0
    )


def forward(
    facts: _Facts,
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
    total, heads, _ = q.shape
    total_k, _, v_dim = v.shape
    config = _CONFIGS[v_dim]
    left, right, scale, softcap = options
    key = (facts, heads)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        launch = _LAUNCHERS[key] = _launcher(facts, heads, config)
    tile_map = _tiles.of(kept, cu_q, cu_k, total, total_k, 64 * config.groups, left, right)
    o = torch.empty((total, heads, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, total), dtype=torch.float32, device=q.device)
    items = tile_map.slots * heads
    launch(
        (min(items, processors(facts.device)), 1, 1),
        (q, k, v, lse if sinks is None else sinks.contiguous(), tile_map.tiles, tile_map.counters, o, lse),
        (
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], heads * v_dim, v_dim, total, tile_map.slots, items,
            scale, softcap, left, right,
        ),
    )  # fmt: skip
    return o, lse


def _launcher(facts: _Facts, heads: int, config: Config) -> Launcher:
    from ._hopper_fwd_kernels import _hopper_fwd_kernel  # Gluon, which older Tritons lack

    constants = {
        "HEADS": heads,
        "SHARED": facts.group,
        "INNER": facts.inner,
        "D": facts.head_dim,
        "D_V": facts.v_dim,
        "GROUPS": config.groups,
        "BLOCK_N": config.step,
        "TILES": config.tiles,
        "STAGES": config.stages,
        "HAS_LEFT": facts.has_left,
        "HAS_RIGHT": facts.has_right,
        "SOFTCAP": facts.softcap,
        "SCALED": facts.scaled,
        "SINKS": facts.extra,
        "PINGPONG": config.pingpong,
        "EIGHT": config.eight,
        "TIED": config.tied,
        "LATE": config.late,
        "MERGE": config.merge,
        "UNROLL": config.unroll,
    }
    return Launcher(_hopper_fwd_kernel, facts.device, constants, workspace=True, num_warps=4, enable_fp_fusion=True)
