"""Launching the kernels that move tokens: which tiles, and what is allocated for the result.

The side of a padded row is "right", "left", or "firsts": each row begins where `firsts` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..._backends._protocol import HostInts
from . import _move_kernels as kernels
from ._launch import Launcher, device_number

INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes an element -> what travels in place of a dtype that Triton does not know."""

_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_KNOWN = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64, *INTS.values(), torch.uint8))
_ROOM = 8192  # bytes of a tile: 64 on the way for each of 128 threads

_LAUNCHERS: dict[Any, Launcher] = {}


def _words(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in _KNOWN else x.view(INTS[x.dtype.itemsize])


def _features(shape: torch.Size, lead: int) -> int:
    size = 1
    for n in shape[lead:]:
        size *= n
    return size


def _run_tile(size: int, itemsize: int) -> tuple[int, int]:
    """Runs and elements of a tile for runs of at most `size` elements."""
    room = _ROOM // itemsize
    block = min(room, triton.next_power_of_2(max(size, 1)))
    return min(64, room // block), block


def _token_tile(features: int, itemsize: int) -> tuple[int, int]:
    """Tokens and features of a tile."""
    block = min(_ROOM // itemsize, triton.next_power_of_2(max(features, 1)))
    return max(1, min(1024, _ROOM // itemsize // block)), block


_FILLS: dict[tuple[str, torch.dtype], int] = {}


def _bits(value: Any, dtype: torch.dtype) -> int:
    """The bits of a number in a dtype, as a signed integer."""
    key = (repr(value), dtype)
    found = _FILLS.get(key)
    if found is None:
        word = torch.full((1,), value, dtype=dtype).view(INTS[dtype.itemsize])
        found = _FILLS[key] = int(word.numpy()[0])
    return found


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


def pad(
    values: torch.Tensor,
    offsets: torch.Tensor,
    firsts: torch.Tensor | None,
    width: int,
    side: str,
    fill: Any,
    too_long: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded (B, width, *F) from values (T, *F), and the mask."""
    rows, shape, dtype = offsets.shape[0] - 1, values.shape, values.dtype
    padded = torch.empty((rows, width, *shape[1:]), dtype=dtype, device=values.device)
    mask = torch.empty((rows, width), dtype=torch.bool, device=values.device)
    if mask.numel() == 0:
        return padded, mask
    features = _features(shape, 1)
    stride = _token_stride(values, features)
    if stride is None:
        values, stride = values.contiguous(), features
    runs, block = _run_tile(width * features, dtype.itemsize)
    device, check = device_number(values), too_long is not None
    dense = stride == features or shape[0] <= 1
    key = ("pad", device, dtype, offsets.dtype, features, side, dense, dense or stride % 16, check, runs, block,
           None if firsts is None else firsts.dtype)  # fmt: skip
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {
            "F": features,
            "SIDE": side,
            "DENSE": dense,
            "CHECK": check,
            "WORD": _WORDS[dtype.itemsize],
            "ROWS": runs,
            "BLOCK": block,
            "PLACES": triton.next_power_of_2(triton.cdiv(block, max(features, 1))),
        }
        launch = _LAUNCHERS[key] = Launcher(kernels._pad_kernel, device, constants, num_warps=4)
    tiles = max(1, -(-width * features // block), -(-width // block) if features == 0 else 0)
    bits = _bits(fill, dtype), _bits(too_long, dtype) if check else 0
    launch(
        (tiles * -(-rows // runs), 1, 1),
        (_words(values), offsets, offsets if firsts is None else firsts, _words(padded), mask.view(torch.int8)),
        (tiles, rows, shape[0], width, features if dense else stride, *bits),
    )
    return padded, mask


def unpad(
    padded: torch.Tensor, offsets: torch.Tensor, firsts: torch.Tensor | None, total: int, side: str
) -> torch.Tensor:
    """The inverse: values (T, *F), 0 for tokens of no row, or of one that is longer than the padded ones."""
    return plan_unpad(padded, offsets, firsts, side)(total)


def plan_unpad(
    padded: torch.Tensor, offsets: torch.Tensor, firsts: torch.Tensor | None, side: str
) -> Callable[[int], torch.Tensor]:
    """All of `unpad` that can be done before the number of tokens is known."""
    rows, width, *shape = padded.shape
    padded = padded if padded.is_contiguous() else padded.contiguous()
    features, device, dtype = _features(padded.shape, 2), device_number(padded), padded.dtype
    tokens, block = _token_tile(features, dtype.itemsize)
    key = ("unpad", device, dtype, offsets.dtype, features, side, None if firsts is None else firsts.dtype)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {"F": features, "SIDE": side, "TOKENS": tokens, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._unpad_kernel, device, constants, num_warps=4)
    columns, steps, place = -(-features // block), rows.bit_length(), padded.device
    given = _words(padded), offsets, offsets if firsts is None else firsts

    def finish(total: int) -> torch.Tensor:
        values = torch.empty((total, *shape), dtype=dtype, device=place)
        if columns == 0:
            return values
        launch((columns * -(-total // tokens), 1, 1), (*given, _words(values)), (columns, total, rows, steps, width))
        return values

    return finish


# By a mask.


def count(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, HostInts, Callable[[], None]]:
    """Count what each row of a mask (B, N) keeps.

    Returns
    -------
    offsets : tensor of (B + 1,), int32 or int64
    firsts : tensor of (B,)
        The first place that a row keeps; -1 where it keeps others than those that follow.
    report : array of (B + 3,), int64
        On the host, once it was waited for: how many rows have such holes, how many have values other than 0 and 1, and
        the offsets.
    wait : function
    """
    (rows, width), device, kind = mask.shape, device_number(mask), mask.dtype
    dtype = torch.int32 if rows * width < 2**31 else torch.int64
    offsets = torch.empty(rows + 1, dtype=dtype, device=mask.device)
    counts, firsts = torch.empty((2, rows), dtype=dtype, device=mask.device)
    # The device writes to the host's memory itself, which takes less time than having it copied.
    report = torch.empty(rows + 3, dtype=torch.int64, pin_memory=mask.is_cuda)
    block = min(4096, triton.next_power_of_2(max(width, 16)))
    key = ("count", device, kind, dtype, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {
            "IS_BOOL": kind == torch.bool,
            "INT": tl.int32 if dtype == torch.int32 else tl.int64,
            "BLOCK": block,
        }
        warps = max(1, block // 512)
        launch = _LAUNCHERS[key] = Launcher(kernels._count_kernel, device, constants, num_warps=warps)
    launch((rows, 1, 1), (_words(mask), counts, firsts), (width,))
    block = min(4096, triton.next_power_of_2(max(rows, 1)))
    key = ("offsets", device, dtype, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        warps = max(1, block // 256)
        launch = _LAUNCHERS[key] = Launcher(kernels._offsets_kernel, device, {"BLOCK": block}, num_warps=warps)
    launch((1, 1, 1), (counts, firsts, offsets, report), (rows,))
    wait = torch.cuda.current_stream(device).synchronize if mask.is_cuda else _wait_for_nothing
    return offsets, firsts, report.numpy(), wait


def _wait_for_nothing() -> None: ...


def places(mask: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
    """For each token that a mask (B, N) keeps its place among B * N: (T,), int64."""
    (rows, width), device = mask.shape, device_number(mask)
    found = torch.empty(total, dtype=torch.int64, device=mask.device)
    block = min(2048, triton.next_power_of_2(max(width, 16)))
    key = ("locate", device, mask.dtype, offsets.dtype, block)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        launch = _LAUNCHERS[key] = Launcher(kernels._places_kernel, device, {"BLOCK": block}, num_warps=4)
    launch((rows, 1, 1), (_words(mask), offsets, found), (width,))
    return found


def take_places(padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values (T, *F) at places (T,) of padded (B, N, *F)."""
    values = torch.empty((len(places), *padded.shape[2:]), dtype=padded.dtype, device=padded.device)
    _by_places(padded.contiguous(), places, values, False)
    return values


def put_places(values: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Padded of a shape (B, N, *F), with values (T, *F) at places (T,), and 0 elsewhere."""
    padded = torch.zeros(shape, dtype=values.dtype, device=values.device)
    _by_places(padded, places, values.contiguous(), True)
    return padded


def _by_places(padded: torch.Tensor, places: torch.Tensor, values: torch.Tensor, put: bool) -> None:
    if values.numel() == 0:
        return
    features, device, total = _features(values.shape, 1), device_number(values), values.shape[0]
    tokens, block = _token_tile(features, values.dtype.itemsize)
    key = ("places", device, values.dtype, features, put)
    launch = _LAUNCHERS.get(key)
    if launch is None:
        constants = {"F": features, "PUT": put, "TOKENS": tokens, "BLOCK": block}
        launch = _LAUNCHERS[key] = Launcher(kernels._by_places_kernel, device, constants, num_warps=4)
    columns = -(-features // block)
    launch((columns * -(-total // tokens), 1, 1), (_words(padded), places, _words(values)), (columns, total))


# Gathering rows.


def _on_device(like: torch.Tensor, *parts: HostInts) -> list[torch.Tensor]:
    """Integers from the host, as int64, in one copy."""
    joined = torch.from_numpy(np.concatenate(parts, dtype=np.int64)).to(like.device, non_blocking=True)
    return list(joined.split([len(part) for part in parts]))


def take_rows(values: torch.Tensor, starts: HostInts, offsets: HostInts) -> torch.Tensor:
    """Rows of values (T, *F) that begin at `starts` (R,), as long as `offsets` (R + 1,) say, joined."""
    out = torch.empty((int(offsets[-1]), *values.shape[1:]), dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    values = values.contiguous()
    features = _features(values.shape, 1)
    size = int((offsets[1:] - offsets[:-1]).max()) * features
    runs, block = _run_tile(size, values.dtype.itemsize)
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


def put_rows(rows: torch.Tensor, starts: HostInts, offsets: HostInts, total: int) -> torch.Tensor:
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
    _, block = _run_tile(size, rows.dtype.itemsize)
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
