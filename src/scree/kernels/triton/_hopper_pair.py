"""Attention backward on Hopper (sm_90) at head dim 64: which calls its pair of kernels serves, and launching those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _tiles
from ._attention_calls import Backward, Given, Grads
from ._hopper import has_gluon
from ._launch import INTERPRETED, Launcher, capability, device_number
from ._tiles import Kept

if TYPE_CHECKING:
    from .._options import FlatOptions

_WIDTH = 64
_ROWS = 64  # of a tile
_MOST_STRIDE = 1 << 24  # the places of a block are counted in 32 bits
_SMALL = 128  # rows, at most, of the sequences that a program takes whole where the mean is short
REGISTERS = {"dq": 128, "dkv": 168}
"""Of a thread: so that four programs, and three, run at once on a multiprocessor."""

_LAUNCHERS: dict[Any, tuple[Launcher, Launcher]] = {}


def why_not(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, do: torch.Tensor, options: FlatOptions
) -> str | None:
    """Say what speaks against the kernels for Hopper: a reason for the portable ones."""
    if INTERPRETED or capability(device_number(q)) != (9, 0):
        return "their instructions are those of sm_90"
    if not has_gluon():
        return "Gluon, their language, came with Triton 3.6"
    if q.dtype.itemsize != 2:
        return f"they multiply 16-bit numbers, not {q.dtype}"
    if not q.shape[2] == v.shape[2] == _WIDTH:
        return f"they have head dim {_WIDTH}, the same of q and v, not {q.shape[2]} and {v.shape[2]}"
    if options.left >= 0 or options.softcap > 0:
        return "they have no window to the left, and no softcap"
    if not all(map(_reaches, (q, k, v, o, do))):
        return "they copy 16 bytes at a time, from rows at multiples of 32 bytes, and not too far apart"
    return None


def _reaches(x: torch.Tensor) -> bool:
    """Whether the rows of x can be copied 16 bytes at a time: the compiler looks for multiples of 16 elements."""
    stride_t, stride_h, _ = x.stride()
    return stride_t % 16 == stride_h % 16 == x.data_ptr() % 16 == 0 and stride_t < _MOST_STRIDE


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
    short: bool,
) -> Backward:
    """What writes dQ, then dK and dV, each summed in a fixed order, and returns delta, for tensors like these.

    Nothing may be launched between the two: the second is there before the first ends, and waits for that alone.
    """
    total, heads, _ = q.shape
    total_k, kv_heads, _ = k.shape
    small = _SMALL if short and heads == kv_heads else 0
    q_map = _tiles.of(kept_q, cu_q, cu_k, total, total_k, _ROWS, options.left, options.right, -small)
    k_map = _tiles.of(kept_k, cu_k, cu_q, total_k, total, _ROWS, options.right, options.left, small)
    q_tiles, slots = q_map
    k_tiles, k_slots = k_map
    # Where rows are short, a program of the second takes two heads: more than its start keeps it busy.
    turns = 2 if short and options.right < 0 and kv_heads % 2 == 0 else 1
    first, second = _launchers(q, kv_heads, turns, options.right >= 0, dlse is not None, long, small > 0)
    first_grid, second_grid = (slots * heads, 1, 1), (k_slots * (kv_heads // turns), 1, 1)
    inputs, of_do = q.stride()[:2] + k.stride()[:2] + v.stride()[:2], do.stride()[:2]
    strides = (*inputs, *o.stride()[:2], *of_do, heads * _WIDTH, _WIDTH)
    of_first = (*strides, total, slots, options.scale, options.right)
    of_second = (*strides, *(kv_heads * _WIDTH, _WIDTH) * 2, k_slots, slots, total, options.scale, options.right)

    def launch(given: Given, grads: Grads) -> torch.Tensor:
        (do, dlse, q, k, v, o, lse), (dq, dk, dv) = given, grads
        delta = torch.empty_like(lse)
        rows = lse.new_empty((heads, slots, 2, _ROWS))
        inputs = (q, k, v, o, do, lse, lse if dlse is None else dlse)
        first(first_grid, (*inputs, q_tiles, dq, delta, rows), of_first)
        second(second_grid, (*inputs, rows, k_tiles, dq, dk, dv, delta), of_second)
        return delta

    return launch


def _launchers(
    q: torch.Tensor, kv_heads: int, turns: int, has_right: bool, has_dlse: bool, long: bool, wholes: bool
) -> tuple[Launcher, Launcher]:
    """What computes dQ, and what computes dK and dV of `turns` heads a program; made at the first call."""
    device, heads = device_number(q), q.shape[1]
    facts = (device, q.dtype, heads, kv_heads, turns, has_right, has_dlse, long, wholes)
    found = _LAUNCHERS.get(facts)
    if found is None:
        from . import _hopper_pair_kernels as kernels  # in a language that older Tritons do not have

        group = heads // kv_heads
        of_dq = {"GROUP": group, "INNER": group if long else heads, "HAS_RIGHT": has_right, "DLSE": has_dlse}
        of_dkv = {"GROUP": group, "INNER": 1 if long else kv_heads // turns, "HEADS": turns, "HAS_RIGHT": has_right}
        of_dkv |= {"DLSE": has_dlse, "WHOLES": wholes}
        flags: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
        found = _LAUNCHERS[facts] = (
            Launcher(kernels._hopper_pair_dq_kernel, device, of_dq, maxnreg=REGISTERS["dq"], **flags),
            Launcher(
                kernels._hopper_pair_dkv_kernel, device, of_dkv, maxnreg=REGISTERS["dkv"], launch_pdl=True, **flags
            ),
        )
    return found
