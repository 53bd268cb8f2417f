"""Attention forward on Hopper (sm_90): which calls a kernel of its own serves, and what that kernel is compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from ._launch import INTERPRETED, Launcher, capability, device_number

if TYPE_CHECKING:
    from .._options import FlatOptions

_MOST_ROWS = 1 << 30  # a box of the copy engine counts its rows up to here
_MOST_COLUMNS = 1 << 31
_MOST_TILES = 1 << 30
_ROWS = 128  # of a tile


class Config(NamedTuple):
    """How the kernel cuts its work.

    Attributes
    ----------
    step : int
        Keys a step: what a result depends on, bit for bit.
    tiles, stages : int
        Tiles whose queries, and blocks whose keys and values, are in shared memory at once.
    brief : bool
        Whether half of a tile's first block is left out where no row sees it, which changes no bit, and sums are divided
        by and their logarithms taken approximately: less of what a tile takes besides its steps. Not measured at 128.
        Then short sequences also have the next tile asked for ahead, with the same bits.
    """

    step: int
    tiles: int
    stages: int
    brief: bool


CONFIGS = {64: Config(128, 4, 4, True), 128: Config(128, 2, 2, False)}
_LAUNCHERS: dict[Any, Launcher] = {}


def plan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    options: FlatOptions,
    batch: int,
    long: bool,
    short: bool,
    with_lse: bool,
) -> tuple[Launcher, int] | None:
    """The launcher of this call's kernel, and how many rows its tiles have; None if no kernel here serves the call."""
    if INTERPRETED or why_not(q, k, v, options, batch) is not None:
        return None
    device, config = device_number(q), CONFIGS[q.shape[2]]
    ahead = short and config.brief
    odd = [(stride % 16, stride == 1) for x in (q, k, v) for stride in x.stride()[:2]]
    facts = (
        device, config, long, ahead, with_lse, q.dtype, None if sinks is None else sinks.dtype, q.shape[1:], k.shape[1],
        options.left < 0, options.right < 0, options.softcap > 0, options.scale <= 0, tuple(odd),
    )  # fmt: skip
    launch = _LAUNCHERS.get(facts)
    if launch is None:
        constants = _constants(q, k, sinks, options, config, long, ahead, with_lse)
        launch = _LAUNCHERS[facts] = _launcher(device, constants)
    return launch, _ROWS


_HAS_GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def has_gluon() -> bool:
    """Whether this Triton has the language of the kernels for Hopper."""
    return _HAS_GLUON


def why_not(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: FlatOptions, batch: int) -> str | None:
    """Say what speaks against the kernel for Hopper: a reason for the portable one."""
    if capability(device_number(q)) != (9, 0):
        return "its instructions are those of sm_90"
    if not has_gluon():
        return f"Gluon, its language, came with Triton 3.6; this is {triton.__version__}"
    if q.dtype.itemsize != 2:
        return f"it multiplies 16-bit numbers, not {q.dtype}"
    if q.shape[2] != v.shape[2] or q.shape[2] not in CONFIGS:
        return f"it has head dims {list(CONFIGS)}, the same of q and v, not {q.shape[2]} and {v.shape[2]}"
    if options.left >= 0 and options.softcap > 0:
        return "a window with a limit to the left and a softcap together take more registers than there are"
    if q.shape[0] == 0 or k.shape[0] == 0:
        return "there is no memory for the copy engine to look at"
    if not (reaches(q) and reaches(k) and reaches(v)):
        return "the copy engine needs rows at multiples of 16 bytes, and 32 bits to count them and the places in them"
    if (q.shape[0] // _ROWS + batch + 1) * q.shape[1] >= _MOST_TILES:
        return f"it counts tiles up to {_MOST_TILES}"
    return None


def reaches(x: torch.Tensor) -> bool:
    """Whether the copy engine can look at all of x (T, H, D)."""
    rows, heads, width = x.shape
    stride_t, stride_h, _ = x.stride()
    return (
        rows < _MOST_ROWS
        and (heads - 1) * stride_h + width < _MOST_COLUMNS
        and 0 < stride_t < _MOST_COLUMNS
        and stride_t % 8 == stride_h % 8 == x.data_ptr() % 16 == 0
    )


def _constants(
    q: torch.Tensor,
    k: torch.Tensor,
    sinks: torch.Tensor | None,
    options: FlatOptions,
    config: Config,
    long: bool,
    ahead: bool,
    with_lse: bool,
) -> dict[str, Any]:
    _, heads, width = q.shape
    group = heads // k.shape[1]
    return {
        "HEADS": heads,
        "SHARED": group,
        "INNER": group if long else heads,
        "D": width,
        "D_V": width,
        "BLOCK_N": config.step,
        "TILES": config.tiles,
        "STAGES": config.stages,
        "HAS_LEFT": options.left >= 0,
        "HAS_RIGHT": options.right >= 0,
        "SOFTCAP": options.softcap > 0,
        "SCALED": options.scale <= 0,
        "SINKS": sinks is not None,
        "LSE": with_lse,
        "BRIEF": config.brief,
        "AHEAD": ahead,
    }


def _launcher(device: int, constants: dict[str, Any]) -> Launcher:
    from ._hopper_fwd_kernels import _hopper_fwd_kernel  # in a language that older Tritons do not have

    return Launcher(_hopper_fwd_kernel, device, constants, workspace=True, num_warps=4, enable_fp_fusion=True)
