"""Attention backward on Hopper (sm_90): which calls kernels of their own serve, and launching those."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _tiles
from ._attention_calls import Backward, Given, Grads
from ._hopper import has_gluon, reaches
from ._launch import INTERPRETED, Launcher, capability, device_number, processors
from ._tiles import Kept

if TYPE_CHECKING:
    from .._options import FlatOptions

_MOST_TILES = 1 << 26  # the places of dQ are counted in 32 bits
_KEYS = 128  # of a tile


class Config(NamedTuple):
    """How the main kernel cuts its work.

    Attributes
    ----------
    step : int
        Queries a step.
    stages : int
        Blocks of queries in shared memory at once.
    """

    step: int
    stages: int


CONFIGS = {128: Config(64, 2)}
"""By head dim. At 64 the portable kernels are as fast, or faster."""

_LAUNCHERS: dict[Any, tuple[Launcher, Launcher, Launcher]] = {}


def why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, options: FlatOptions, batch: int
) -> str | None:
    """Say what speaks against the kernels for Hopper: a reason for the portable ones."""
    if INTERPRETED or capability(device_number(q)) != (9, 0):
        return "their instructions are those of sm_90"
    if not has_gluon():
        return "Gluon, their language, came with Triton 3.6"
    if q.dtype.itemsize != 2:
        return f"they multiply 16-bit numbers, not {q.dtype}"
    if q.shape[2] != v.shape[2] or q.shape[2] not in CONFIGS:
        return f"they have head dims {list(CONFIGS)}, the same of q and v, not {q.shape[2]} and {v.shape[2]}"
    if options.left >= 0 or options.softcap > 0:
        return "they have no window to the left, and no softcap"
    if q.shape[0] == 0 or k.shape[0] == 0:
        return "there is no memory for the copy engine to look at"
    if not (reaches(q) and reaches(k) and reaches(v) and reaches(do)):
        return "the copy engine needs rows at multiples of 16 bytes, and 32 bits to count them and the places in them"
    if (q.shape[0] // CONFIGS[q.shape[2]].step + batch + 1) * q.shape[1] >= _MOST_TILES:
        return f"they count tiles up to {_MOST_TILES}"
    return None


def plan(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    options: FlatOptions,
    kept_q: Kept | None,
    kept_k: Kept | None,
    long: bool,
) -> Backward:
    """What writes dQ, dK and dV, and returns delta, for tensors like these.

    dQ is added up in a fixed order only where the options, or PyTorch, say so. Nothing may be launched between the last
    two kernels: the last one is there before the main one ends, and in part waits for that alone.
    """
    from ._hopper_bwd_dq_kernels import TURNS  # older Tritons lack what it imports

    total, heads, width = q.shape
    kv_heads, step = k.shape[1], CONFIGS[width].step
    q_map = _tiles.of(kept_q, cu_q, cu_k, total, k.shape[0], step, options.left, options.right)
    k_map = _tiles.of(kept_k, cu_k, cu_q, k.shape[0], total, _KEYS, options.right, options.left)
    q_tiles, slots = q_map
    k_tiles, k_slots = k_map
    before, main, after = _launchers(q, k, v, o, do, dlse, options, long)
    stays = options.right >= 0
    programs = min(k_slots * kv_heads, processors(device_number(q))) if stays else k_slots * kv_heads
    grid, main_grid = (slots * heads, 1, 1), (programs, 1, 1)
    of_before = (*o.stride()[:2], *do.stride()[:2], total, slots, options.scale)
    inputs = (stride for x in (q, k, v, do) for stride in x.stride()[:2])
    grads_of_keys = (kv_heads * width, width) * 2
    of_main = (*inputs, *grads_of_keys, k_slots, slots, options.scale, *((options.right,) if stays else ()))
    of_after = (heads * width, width, slots, options.scale)

    def launch(given: Given, grads: Grads) -> torch.Tensor:
        (do, dlse, q, k, v, o, lse), (dq, dk, dv) = given, grads
        delta = torch.empty_like(lse)
        rows = lse.new_empty((heads, slots, 2, step))
        acc = lse.new_empty((heads, slots, step * width))
        turns = lse.new_empty((heads, slots, TURNS.value), dtype=torch.int32)
        before(grid, (o, do, lse, lse if dlse is None else dlse, q_tiles, delta, rows, turns), of_before)
        main(main_grid, (q, k, v, do, rows, k_tiles, acc, turns, dk, dv), of_main)
        after(grid, (acc, turns, q_tiles, dq), of_after)
        return delta

    return launch


def _together(kv_heads: int, shared: int, long: bool, ordered: bool) -> int:
    """How many heads of a tile run side by side, before those of the next tile.

    Of long sequences few do, as in the forward. But where dQ is added up in order, blocks of keys that start together
    queue up, each waiting for the one before it: with more heads fewer of them are in one queue.
    """
    if not long:
        return kv_heads
    return math.gcd(kv_heads, max(8 // shared, 1) if ordered else 2)


def _launchers(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    options: FlatOptions,
    long: bool,
) -> tuple[Launcher, Launcher, Launcher]:
    """What runs before, the main kernel, and what runs after; made at the first call.

    Where keys are masked, and tiles so of many lengths, the main kernel is the one whose programs stay for several of them.
    """
    device, (_, heads, width), kv_heads = device_number(q), q.shape, k.shape[1]
    config = CONFIGS[width]
    odd = tuple((stride % 16, stride == 1) for x in (q, k, v, o, do) for stride in x.stride()[:2])
    stays = options.right >= 0
    ordered = options.deterministic or torch.are_deterministic_algorithms_enabled()
    facts = (device, config, q.dtype, heads, kv_heads, width, stays, odd, dlse is not None, long, ordered)
    found = _LAUNCHERS.get(facts)
    if found is None:
        from . import _hopper_bwd_dq_kernels as others  # like the main ones, in what older Tritons do not have

        if stays:
            from ._hopper_bwd_stay_kernels import _hopper_bwd_stay_kernel as kernel
        else:
            from ._hopper_bwd_kernels import _hopper_bwd_kernel as kernel

        shared, together = heads // kv_heads, _together(kv_heads, heads // kv_heads, long, ordered)
        of_before = {"INNER": heads, "D": width, "BLOCK_M": config.step, "DLSE": dlse is not None}
        # Heads in the order in which the main kernel is done with them.
        of_after = {"SHARED": shared, "INNER": together * shared, "D": width, "BLOCK_M": config.step, "BLOCK_N": _KEYS}
        constants = {
            "SHARED": shared,
            "HEADS": kv_heads,
            "INNER": together,
            "D": width,
            "BLOCK_M": config.step,
            "STAGES": config.stages,
            "ORDERED": ordered,
        }
        flags: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
        found = _LAUNCHERS[facts] = (
            Launcher(others._hopper_bwd_rows_kernel, device, of_before, **flags),
            Launcher(kernel, device, constants, workspace=True, **flags),
            Launcher(others._hopper_bwd_dq_kernel, device, of_after, launch_pdl=True, **flags),
        )
    return found
