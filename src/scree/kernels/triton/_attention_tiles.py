"""How the attention kernels cut their work, by kernel, dtype and head dim."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton


class Tiles(NamedTuple):
    """How a kernel cuts its work.

    Attributes
    ----------
    rows : int
        Rows a program.
    step : int
        Places of the other side a step: what a result depends on, bit for bit, so it follows from dtype and head dim.
    warps, stages : int
        Of a program; of loads in flight.
    tma : bool
        Load by the copy engine where the device has one.
    whole : bool
        One masked loop, instead of one without masks between masked ones.
    registers : int, optional
        On Hopper, where no option needs more: at most so many a thread, for more programs on a multiprocessor.
    """

    rows: int
    step: int
    warps: int
    stages: int
    tma: bool = False
    whole: bool = False
    registers: int | None = None


class _Pair(NamedTuple):
    """Tiles for long sequences and for short ones, with the same step."""

    long: Tiles
    short: Tiles


def _both(*tiles: Any) -> _Pair:
    return _Pair(Tiles(*tiles), Tiles(*tiles))


# kernel -> (widest head dim, tiles)
_HALF = {
    "fwd": (
        (32, _Pair(Tiles(64, 64, 4, 3, True), Tiles(64, 64, 4, 3, False, True, 88))),
        (64, _Pair(Tiles(64, 32, 4, 3, False, False, 96), Tiles(64, 32, 4, 3, False, True, 80))),
        (128, _Pair(Tiles(64, 64, 4, 3, True), Tiles(64, 64, 4, 3, False, True))),
        (256, _both(128, 64, 8, 2, True)),
    ),
    "dq": (
        (32, _Pair(Tiles(64, 64, 4, 3, True), Tiles(64, 64, 4, 2, False, True))),
        (64, _Pair(Tiles(64, 32, 4, 3, False, False, 96), Tiles(64, 32, 4, 3, False, True, 96))),
        (128, _Pair(Tiles(128, 64, 8, 3, True), Tiles(64, 64, 4, 2, False, True))),
        (256, _both(128, 32, 8, 2, True)),
    ),
    "dkv": (
        (32, _Pair(Tiles(64, 32, 4, 3, True), Tiles(64, 32, 4, 3, False, True))),
        (64, _Pair(Tiles(64, 32, 4, 3, True), Tiles(64, 32, 4, 3, False, True))),
        (128, _both(64, 64, 4, 2, True)),
        (256, _both(64, 32, 8, 2, True, True)),
    ),
}
# Some of these spill; those that do not were measured to be no faster.
_SINGLE = {
    "fwd": ((64, _both(32, 32, 4, 1)), (128, _both(32, 32, 8, 1)), (256, _both(16, 16, 4, 1))),
    "dq": ((64, _both(32, 32, 4, 1)), (128, _both(32, 32, 8, 1)), (256, _both(16, 16, 8, 1))),
    "dkv": ((64, _both(32, 32, 4, 1)), (128, _both(32, 32, 8, 1)), (256, _both(32, 16, 8, 1))),
}
# Where operands lie in registers rather than in shared memory, tiles that leave enough of them.
_HALF_BEFORE_HOPPER = _HALF | {
    "fwd": (*_HALF["fwd"][:-1], (256, _both(64, 64, 8, 2))),
    "dq": (*_HALF["dq"][:-1], (256, _both(64, 32, 8, 2))),
    "dkv": (*_HALF["dkv"][:-2], (128, _both(64, 32, 8, 2)), (256, _both(64, 32, 8, 2))),
}
_HALF_AMD = _HALF_BEFORE_HOPPER | {
    "fwd": (*_HALF["fwd"][:-2], (128, _both(64, 32, 4, 1)), (256, _both(64, 32, 8, 1))),
    "dq": (*_HALF["dq"][:-2], (128, _both(64, 32, 4, 1)), (256, _both(64, 32, 8, 1))),
    "dkv": (*_HALF["dkv"][:-2], (128, _both(64, 32, 8, 1)), (256, _both(64, 32, 8, 1))),
}


def tiles_for(kernel: str, width: int, itemsize: int, short: bool, shared: int, capability: tuple[int, int]) -> Tiles:
    """The tiles of a kernel for head dims up to `width`, cut down to `shared` bytes of shared memory a program.

    `capability` is that of the device, (0, 0) for AMD.
    """
    half = _HALF if capability >= (9, 0) else _HALF_BEFORE_HOPPER if capability > (0, 0) else _HALF_AMD
    table = (half if itemsize == 2 else _SINGLE)[kernel]
    tiles = next(pair[short] for widest, pair in table if width <= widest)
    head = max(16, triton.next_power_of_2(width)) * itemsize  # bytes
    held = head if kernel == "fwd" else 2 * head  # q; or q and do, or k and v
    while tiles.rows * held + tiles.stages * tiles.step * 2 * head > shared:
        if tiles.stages > 1:
            tiles = tiles._replace(stages=tiles.stages - 1)
        elif tiles.rows > 64:
            tiles = tiles._replace(rows=tiles.rows // 2, warps=tiles.warps // 2)
        elif tiles.step > 16:
            tiles = tiles._replace(step=tiles.step // 2)
        elif tiles.rows > 16:
            tiles = tiles._replace(rows=tiles.rows // 2)
        else:
            break
    return tiles
