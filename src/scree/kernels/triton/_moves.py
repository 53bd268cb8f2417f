"""Moving tokens on a CUDA device: what `scree.to_padded`, `scree.from_padded` and the choice of rows run there.

`_padding` and `_layout` stand below the kernels and do not import them: the backend of PyTorch hands this module out
(`Backend.moves`), once it is loaded. Each move is the gradient of another one, so all are differentiable any number of
times.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch.autograd import Function

from ..._backends._protocol import HostInts
from ..._backends.torch import adopt_moves
from . import _move_launch as launch
from ._launch import INTERPRETED, is_plain
from ._views import is_dual


def hand_out() -> None:
    """Let the backend of PyTorch give this module to whoever moves tokens."""
    adopt_moves(sys.modules[__name__])


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels here can move these tensors: on a device, not traced, and not complex."""
    return is_plain(*tensors) and all(
        (x.is_cuda or INTERPRETED) and x.dtype.itemsize in launch.INTS and not x.is_complex() and not is_dual(x)
        for x in tensors
    )


def to_device(host: HostInts, like: torch.Tensor) -> torch.Tensor:
    """Bring integers from the host to the device of a tensor without waiting for it."""
    if not like.is_cuda:
        return torch.from_numpy(host.copy())
    pinned = torch.empty(host.shape, dtype=torch.int32 if host.dtype == np.int32 else torch.int64, pin_memory=True)
    pinned.numpy()[:] = host
    return pinned.to(like.device, non_blocking=True)


# Padding by offsets, and its inverse.


def pad(
    values: torch.Tensor, offsets: torch.Tensor, width: int, side: str, fill: Any, too_long: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread values (T, *F) over (B, width, *F); with it the mask.

    Parameters
    ----------
    too_long : float or None
        What rows hold that are longer than `width`; None where it is known that there are none, or that they are cut.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        return _Pad.apply(values, offsets, None, width, side, fill, too_long)
    return launch.pad(values, offsets, None, width, side, fill, too_long)


def unpad(padded: torch.Tensor, offsets: torch.Tensor, total: int, side: str) -> torch.Tensor:
    """Take the tokens back, (T, *F): 0 for those of no row, or of one that is longer than N."""
    return _unpad(padded, offsets, None, total, side)


def _unpad(
    padded: torch.Tensor, offsets: torch.Tensor, firsts: torch.Tensor | None, total: int, side: str
) -> torch.Tensor:
    if torch.is_grad_enabled() and padded.requires_grad:
        return _Unpad.apply(padded, offsets, firsts, total, side)
    return launch.unpad(padded, offsets, firsts, total, side)


class _Pad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        offsets: torch.Tensor,
        firsts: torch.Tensor | None,
        width: int,
        side: str,
        fill: Any,
        too_long: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        padded, mask = launch.pad(values, offsets, firsts, width, side, fill, too_long)
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(offsets, firsts)
        ctx.how = values.shape[0], side
        return padded, mask

    @staticmethod
    def backward(ctx: Any, dpadded: torch.Tensor, dmask: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_unpad(dpadded, *ctx.saved_tensors, *ctx.how), None, None, None, None, None, None)


class _Unpad(Function):
    @staticmethod
    def forward(
        ctx: Any, padded: torch.Tensor, offsets: torch.Tensor, firsts: torch.Tensor | None, total: int, side: str
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets, firsts)
        ctx.how = padded.shape[1], side, 0, 0.0
        return launch.unpad(padded, offsets, firsts, total, side)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_Pad.apply(dvalues, *ctx.saved_tensors, *ctx.how)[0], None, None, None, None)


# Unpadding by a mask.


def unpad_mask(padded: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, HostInts] | None:
    """Collect what a mask (B, N) keeps of padded (B, N, *F): the values, the offsets, and those on the host.

    None where the mask has a value that is neither 0 nor 1. Waits for the device once: until it has counted.
    """
    mask = mask if mask.is_contiguous() else mask.contiguous()
    offsets, firsts, report, wait = launch.count(mask)
    finish = None
    if not (torch.is_grad_enabled() and padded.requires_grad):
        finish = launch.plan_unpad(padded, offsets, firsts, "firsts")
    wait()
    holes, odd, total = report.item(0), report.item(1), report.item(-1)
    if odd:
        return None
    if holes:
        values = _take_places(padded, launch.places(mask, offsets, total))
    elif finish is not None:
        values = finish(total)
    else:
        values = _Unpad.apply(padded, offsets, firsts, total, "firsts")
    narrow = total < 2**31
    host = report[2:].astype(np.int32 if narrow else np.int64)  # a copy: that memory may be given to others
    return values, offsets.int() if narrow and offsets.dtype != torch.int32 else offsets, host


def _take_places(padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and padded.requires_grad:
        return _TakePlaces.apply(padded, places)
    return launch.take_places(padded, places)


class _TakePlaces(Function):
    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = padded.shape
        return launch.take_places(padded, places)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _PutPlaces.apply(dvalues, *ctx.saved_tensors, ctx.shape), None


class _PutPlaces(Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(places)
        return launch.put_places(values, places, shape)

    @staticmethod
    def backward(ctx: Any, dpadded: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _take_places(dpadded, *ctx.saved_tensors), None, None


# Gathering rows.


def take_rows(values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
    """Join the rows of values (T, *F) that begin at `starts` (R,); their lengths are those of `offsets` (R + 1,)."""
    if torch.is_grad_enabled() and values.requires_grad:
        return _Rows.apply(values, starts, offsets)
    return launch.take_rows(values, starts, offsets)


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
        ctx.how = starts, offsets, values.shape[0]
        return launch.take_rows(values, starts, offsets)

    @staticmethod
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_PutRows.apply(drows, *ctx.how), None, None)


class _PutRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, starts: HostInts, offsets: HostInts, total: int) -> torch.Tensor:
        ctx.how = starts, offsets
        return launch.put_rows(rows, starts, offsets, total)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_Rows.apply(dvalues, *ctx.how), None, None, None)
