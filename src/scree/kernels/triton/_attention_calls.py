"""Calls of attention that were made before: what they are kept under, and launching them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._options import FlatOptions
from . import _tiles
from ._launch import Launcher
from ._tiles import Kept


class Call(NamedTuple):
    """A forward call that was made before with these offsets, in the same shapes: what is left is to launch it."""

    launch: Launcher
    grid: tuple[int, int, int]
    tiles: torch.Tensor
    scalars: tuple[int | float, ...]
    like_q: bool  # O lies in memory as q does
    o_shape: tuple[int, int, int]
    lse_shape: tuple[int, int]


def places(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: tuple[Any, ...]) -> Any:
    """What a forward call is kept under beyond its offsets; `given` stands for shapes, dtypes, devices and options."""
    q_at, k_at, v_at = q.data_ptr(), k.data_ptr(), v.data_ptr()
    odd = (q_at & 15, k_at & 15, v_at & 15) if (q_at | k_at | v_at) & 15 else 0
    return given, q.stride(), k.stride(), v.stride(), odd


def facts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, with_lse: bool, given: tuple[Any, ...]) -> Any:
    """What a forward call is kept under beyond its offsets; `given` are the options, in any form."""
    about = (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(), with_lse, given,
    )  # fmt: skip
    return places(q, k, v, about)


Given = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""dO, the LSE's gradient, q, k, v, o and LSE."""

Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Memory for dQ, dK and dV, contiguous."""

Backward = Callable[[Given, Grads], torch.Tensor]
"""Launches a backward that was planned, and returns delta (H, T)."""


def backward_facts(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    options: FlatOptions,
) -> Any:
    """What a backward is kept under beyond its offsets.

    Strides and places of all tensors count: hooks of autograd may have moved those that the forward saved.
    """
    odd = (do.data_ptr() & 15) << 4 | o.data_ptr() & 15
    ordered = torch.are_deterministic_algorithms_enabled()
    of_dlse = None if dlse is None else dlse.dtype
    return facts(q, k, v, True, (options, do.stride(), o.stride(), do.dtype, o.dtype, of_dlse, odd, ordered))


def again(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    kept: Kept | None,
    with_lse: bool,
    same: Any,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`forward`, where it was called before under the facts `same`; else None."""
    call: Call | None = _tiles.recall(kept, same, cu_q, cu_k)
    return None if call is None else launch(call, q, k, v, sinks, with_lse)


def launch(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    launch, grid, tiles, scalars, like_q, o_shape, lse_shape = call
    o = torch.empty_like(q) if like_q else q.new_empty(o_shape)
    lse = o.new_empty(lse_shape, dtype=torch.float32) if with_lse else o
    launch(grid, (q, k, v, o if sinks is None else sinks, tiles, o, lse), scalars)
    return o, lse
