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
import triton
import triton.language as tl
from torch.autograd import Function

from ..._backends._protocol import HostInts
from ..._backends.torch import adopt_moves, to_host
from . import _move_kernels as kernels
from ._launch import INTERPRETED, Launcher, device_number, is_plain
from ._views import is_dual

_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_KNOWN = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTS.values(), torch.uint8)
)  # to Triton; the others travel as integers

_LAUNCHERS: dict[Any, Launcher] = {}


def hand_out() -> None:
    """Let the backend of PyTorch give this module to whoever moves tokens."""
    adopt_moves(sys.modules[__name__])


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels here can move these tensors: on a device, not traced, and not complex."""
    return is_plain(*tensors) and all(
        (x.is_cuda or INTERPRETED) and x.dtype.itemsize in _INTS and not x.is_complex() and not is_dual(x)
        for x in tensors
    )


def _words(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in _KNOWN else x.view(_INTS[x.dtype.itemsize])


def _features(shape: torch.Size, lead: int) -> int:
    size = 1
    for n in shape[lead:]:
        size *= n
    return size


def _tile(size: int, itemsize: int) -> tuple[int, int]:
    """Runs and elements of a tile for runs of at most `size` elements: 64 bytes on the way for each of 128 threads."""
    room = 8192 // itemsize
    block = min(room, triton.next_power_of_2(max(size, 1)))
    return min(64, room // block), block


_FILLS: dict[tuple[str, torch.dtype], int] = {}


def _bits(value: Any, dtype: torch.dtype) -> int:
    """The bits of a number in a dtype, as a signed integer."""
    key = (repr(value), dtype)
    found = _FILLS.get(key)
    if found is None:
        word = torch.full((1,), value, dtype=dtype).view(_INTS[dtype.itemsize])
        found = _FILLS[key] = int(word.numpy()[0])
    return found


# Padding by offsets.


def pad(
    values: torch.Tensor,
    offsets: torch.Tensor,
    width: int,
    left: bool,
    fill: Any,
    too_long: float | None,
    covered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Spread values (T, *F) over (B, width, *F); with it the mask.

    Parameters
    ----------
    too_long : float or None
        What rows hold that are longer than `width`; None where it is known that there are none, or that they are cut.
    covered : bool
        Whether every token is known to lie in a row that is not too long, so that its gradient is written.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        return _Pad.apply(values, offsets, width, left, fill, too_long, covered)
    return _pad(values, offsets, width, left, fill, too_long)


def _pad(
    values: torch.Tensor, offsets: torch.Tensor, width: int, left: bool, fill: Any, too_long: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, shape, dtype = offsets.shape[0] - 1, values.shape, values.dtype
    padded = torch.empty((rows, width, *shape[1:]), dtype=dtype, device=values.device)
    mask = torch.empty((rows, width), dtype=torch.bool, device=values.device)
    if mask.numel() == 0:
        return padded, mask
    features = _features(shape, 1)
    stride = _token_stride(values, features)
    if stride is None:
        values, stride = values.contiguous(), features
    runs, block = _tile(width * features, dtype.itemsize)
    device, check = device_number(values), too_long is not None
    dense = stride == features or shape[0] <= 1
    key = ("pad", device, dtype, offsets.dtype, features, left, dense, dense or stride % 16, check, runs, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {
            "F": features,
            "LEFT": left,
            "DENSE": dense,
            "CHECK": check,
            "WORD": _WORDS[dtype.itemsize],
            "ROWS": runs,
            "BLOCK": block,
            "PLACES": triton.next_power_of_2(triton.cdiv(block, max(features, 1))),
        }
        launch = _LAUNCHERS[key] = Launcher(kernels._pad_fwd_kernel, device, constants, num_warps=4)
    tiles = max(1, -(-width * features // block), -(-width // block) if features == 0 else 0)
    launch(
        (tiles * -(-rows // runs), 1, 1),
        (_words(values), offsets, _words(padded), mask.view(torch.int8)),
        (
            tiles,
            rows,
            shape[0],
            width,
            features if dense else stride,
            _bits(fill, dtype),
            _bits(too_long, dtype) if check else 0,
        ),
    )
    return padded, mask


def _token_stride(values: torch.Tensor, features: int) -> int | None:
    """How far apart tokens of values (T, *F) lie, or None where their features do not lie side by side."""
    if values.is_contiguous():
        return features
    expected = 1
    for size, stride in zip(reversed(values.shape[1:]), reversed(values.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return None
        expected *= size
    return values.stride(0)


def _unpad_by_offsets(
    padded: torch.Tensor, offsets: torch.Tensor, total: int, left: bool, check: bool, covered: bool
) -> torch.Tensor:
    """The inverse of `pad`; 0 for what no row has."""
    rows, width = padded.shape[:2]
    make = torch.empty if covered else torch.zeros
    values = make((total, *padded.shape[2:]), dtype=padded.dtype, device=padded.device)
    features = _features(padded.shape, 2)
    if values.numel() == 0 or padded.numel() == 0:
        return values
    padded = padded.contiguous()
    runs, block = _tile(width * features, padded.dtype.itemsize)
    device = device_number(padded)
    key = ("unpad", device, padded.dtype, offsets.dtype, features, left, check, runs, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {"F": features, "LEFT": left, "CHECK": check, "ROWS": runs, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._pad_bwd_kernel, device, constants, num_warps=4)
    tiles = -(-width * features // block)
    tensors = (_words(padded), offsets, _words(values))
    launch((tiles * -(-rows // runs), 1, 1), tensors, (tiles, rows, total, width))
    return values


class _Pad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        offsets: torch.Tensor,
        width: int,
        left: bool,
        fill: Any,
        too_long: float | None,
        covered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        padded, mask = _pad(values, offsets, width, left, fill, too_long)
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(offsets)
        ctx.how = values.shape[0], left, too_long is not None, covered
        return padded, mask

    @staticmethod
    def backward(ctx: Any, dpadded: torch.Tensor, dmask: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (offsets,) = ctx.saved_tensors
        return (_UnpadByOffsets.apply(dpadded, offsets, *ctx.how), None, None, None, None, None, None)


class _UnpadByOffsets(Function):
    @staticmethod
    def forward(
        ctx: Any, padded: torch.Tensor, offsets: torch.Tensor, total: int, left: bool, check: bool, covered: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        ctx.how = padded.shape[1], left, 0, 0.0 if check else None, covered
        return _unpad_by_offsets(padded, offsets, total, left, check, covered)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (offsets,) = ctx.saved_tensors
        return (pad(dvalues, offsets, *ctx.how)[0], None, None, None, None, None)


# Unpadding by a mask.


def unpad(padded: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, HostInts] | None:
    """Collect what a mask (B, N) keeps of padded (B, N, *F): the values, the offsets, and those on the host.

    None where the mask has a value that is neither 0 nor 1. One copy to the host: the offsets.
    """
    rows, width = mask.shape
    mask = mask.contiguous()
    narrow = rows * width < 2**31
    ranks = torch.empty((rows, width), dtype=torch.int32, device=mask.device)
    counts = torch.empty(rows + 1, dtype=torch.int32, device=mask.device)
    device = device_number(mask)
    block = min(2048, triton.next_power_of_2(max(width, 16)))
    key = ("rank", device, mask.dtype, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {"IS_BOOL": mask.dtype == torch.bool, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._rank_kernel, device, constants, num_warps=4 if block > 512 else 1)
    if rows == 0:
        counts.zero_()
    launch((rows, 1, 1), (mask.view(torch.int8) if mask.dtype == torch.bool else mask, ranks, counts), (width,))
    offsets = torch.cumsum(counts, 0, dtype=torch.int32 if narrow else torch.int64)
    host: HostInts = to_host(offsets)
    if (host[1:] < host[:-1]).any():
        return None
    if not narrow and host[-1] < 2**31:
        offsets, host = offsets.int(), host.astype(np.int32)
    total = int(host[-1])
    if torch.is_grad_enabled() and padded.requires_grad:
        return _Unpad.apply(padded, ranks, offsets, total), offsets, host
    return _unpad(padded, ranks, offsets, total), offsets, host


def _by_ranks(name: str, x: torch.Tensor, y: torch.Tensor, ranks: torch.Tensor, offsets: torch.Tensor) -> None:
    features = _features(y.shape, 2 if name == "pad by ranks" else 1)
    block = min(8192 // y.dtype.itemsize, triton.next_power_of_2(features))
    runs = max(1, min(1024, 8192 // y.dtype.itemsize // block))
    device = device_number(y)
    key = (name, device, y.dtype, offsets.dtype, features)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        kernel = kernels._unpad_bwd_kernel if name == "pad by ranks" else kernels._unpad_fwd_kernel
        launch = _LAUNCHERS[key] = Launcher(kernel, device, {"F": features, "ROWS": runs, "BLOCK": block}, num_warps=4)
    columns, places = -(-features // block), ranks.numel()
    tensors = (_words(x), ranks, offsets, _words(y))
    launch((columns * -(-places // runs), 1, 1), tensors, (columns, places, ranks.shape[1]))


def _unpad(padded: torch.Tensor, ranks: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
    values = torch.empty((total, *padded.shape[2:]), dtype=padded.dtype, device=padded.device)
    if values.numel():
        _by_ranks("unpad by ranks", padded.contiguous(), values, ranks, offsets)
    return values


def _pad_by_ranks(values: torch.Tensor, ranks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    padded = torch.empty((*ranks.shape, *values.shape[1:]), dtype=values.dtype, device=values.device)
    if padded.numel():
        _by_ranks("pad by ranks", values.contiguous(), padded, ranks, offsets)
    return padded


class _Unpad(Function):
    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, ranks: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
        ctx.save_for_backward(ranks, offsets)
        return _unpad(padded, ranks, offsets, total)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_PadByRanks.apply(dvalues, *ctx.saved_tensors), None, None, None)


class _PadByRanks(Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, ranks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ranks, offsets)
        ctx.total = values.shape[0]
        return _pad_by_ranks(values, ranks, offsets)

    @staticmethod
    def backward(ctx: Any, dpadded: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_Unpad.apply(dpadded, *ctx.saved_tensors, ctx.total), None, None)


# Gathering rows.


def take_rows(values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
    """Join the rows of values (T, *F) that begin at `starts` (R,); their lengths are those of `offsets` (R + 1,)."""
    if torch.is_grad_enabled() and values.requires_grad:
        return _Rows.apply(values, starts, offsets)
    return _take_rows(values, starts, offsets)


def _on_device(like: torch.Tensor, *parts: HostInts) -> list[torch.Tensor]:
    """Integers from the host, as int64, in one copy."""
    joined = torch.from_numpy(np.concatenate(parts, dtype=np.int64)).to(like.device, non_blocking=True)
    return list(joined.split([len(part) for part in parts]))


def _take_rows(values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
    out = torch.empty((int(offsets[-1]), *values.shape[1:]), dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    values = values.contiguous()
    features = _features(values.shape, 1)
    size = int((offsets[1:] - offsets[:-1]).max()) * features
    runs, block = _tile(size, values.dtype.itemsize)
    device = device_number(values)
    key = ("rows", device, values.dtype, features, runs, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {"F": features, "ROWS": runs, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._rows_fwd_kernel, device, constants, num_warps=4)
    tiles, rows = -(-size // block), len(starts)
    tensors = (_words(values), *_on_device(values, starts, offsets), _words(out))
    launch((tiles * -(-rows // runs), 1, 1), tensors, (tiles, rows))
    return out


def _put_rows(rows: torch.Tensor, starts: HostInts, offsets: HostInts, total: int) -> torch.Tensor:
    """The transpose of `take_rows`: what was taken more than once is added up, in order; 0 where nothing was taken."""
    lengths = offsets[1:] - offsets[:-1]
    taken = np.flatnonzero(lengths)
    order = taken[np.argsort(starts[taken], kind="stable")]
    begins, first = np.unique(starts[order], return_index=True)
    sizes = lengths[order[first]]
    make = torch.empty if int(sizes.sum()) == total else torch.zeros
    values = make((total, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    if values.numel() == 0 or rows.numel() == 0:
        return values
    rows = rows.contiguous()
    features = _features(rows.shape, 1)
    size = int(sizes.max()) * features
    _, block = _tile(size, rows.dtype.itemsize)
    block = max(block, 128)
    device = device_number(rows)
    key = ("put", device, rows.dtype, features, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        wide = tl.float64 if rows.dtype == torch.float64 else tl.float32
        constants = {"F": features, "ACC": wide, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._rows_bwd_kernel, device, constants, num_warps=4)
    tiles, lists = -(-size // block), np.append(first, len(order))
    tensors = (rows, *_on_device(rows, begins, sizes, lists, offsets[:-1][order]), values)
    launch((tiles * len(begins), 1, 1), tensors, (tiles, len(begins)))
    return values


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
        ctx.how = starts, offsets, values.shape[0]
        return _take_rows(values, starts, offsets)

    @staticmethod
    def backward(ctx: Any, drows: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_PutRows.apply(drows, *ctx.how), None, None)


class _PutRows(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, starts: HostInts, offsets: HostInts, total: int) -> torch.Tensor:
        ctx.how = starts, offsets
        return _put_rows(rows, starts, offsets, total)

    @staticmethod
    def backward(ctx: Any, dvalues: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (_Rows.apply(dvalues, *ctx.how), None, None, None)
