"""Launching the attention kernels: tiles for a head dim and a dtype, outputs, and what each kernel is compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from .._options import FlatOptions
from . import _attention_calls as _calls
from . import _hopper, _hopper_bwd, _hopper_pair, _tiles
from ._attention_bwd_kernels import _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from ._attention_fwd_kernels import _attention_fwd_kernel
from ._attention_tiles import Tiles, tiles_for
from ._launch import INTERPRETED, Launcher, capability, device_number, processors, shared_memory
from ._tiles import Kept
from ._views import like

WIDEST = 256


class _Facts(NamedTuple):
    """All that a kernel is compiled for, beyond the kernel itself."""

    device: int
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    has_left: bool
    has_right: bool
    softcap: bool
    scaled: bool
    extra: torch.dtype | None  # forward: of the sinks; dq: of the LSE's gradient
    lse: bool  # forward: whether to write it
    tma: bool
    odd_strides: int  # two bits for each stride: whether it is no multiple of 16, and whether it is 1
    regime: int


LONG, MEDIUM, SHORT = 0, 1, 2


def _regime(rows: int, offsets: torch.Tensor) -> int:
    """How to schedule, by the mean length of the sequences on the side that a program walks over.

    Of long sequences only the heads that share keys and values run side by side, which stay in the cache while the
    other tiles of the sequence need them; of shorter ones all heads do, since those of a token lie together in memory.
    """
    batch = offsets.shape[0] - 1
    return LONG if rows > 768 * batch else MEDIUM if rows > 256 * batch else SHORT


_KERNELS = {"fwd": _attention_fwd_kernel, "dq": _attention_bwd_dq_kernel, "dkv": _attention_bwd_dkv_kernel}
_LAUNCHERS: dict[tuple[str, _Facts], tuple[Launcher, Tiles]] = {}


def _launcher(kernel: str, facts: _Facts) -> tuple[Launcher, Tiles]:
    """The launcher of a kernel for these facts, made at the first call."""
    found = _LAUNCHERS.get((kernel, facts))
    if found is not None:
        return found
    width, itemsize, short = max(facts.head_dim, facts.v_dim), facts.dtype.itemsize, facts.regime == SHORT
    device = shared_memory(facts.device), capability(facts.device)
    tiles = tiles_for(kernel, width, itemsize, short, *device)
    group = facts.heads // facts.kv_heads
    programs, together = (facts.kv_heads, 1) if kernel == "dkv" else (facts.heads, group)
    constants: dict[str, Any] = {
        "GROUP": group,
        "INNER": together if facts.regime == LONG else programs,
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
        constants |= {"SCALED": facts.scaled, "SINKS": facts.extra is not None, "LSE": facts.lse}
    elif kernel == "dq":
        constants |= {"DLSE": facts.extra is not None}
    else:
        constants |= {"BLOCK_ROWS": tiles_for("dq", width, itemsize, short, *device).rows}
    tma = facts.tma and tiles.tma
    constants |= {"PRECISION": "ieee", "TMA": tma, "WHOLE": tiles.whole}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    if not INTERPRETED:
        options["enable_fp_fusion"] = True
        plain = not (facts.has_left or facts.softcap or facts.extra is not None)
        if tiles.registers is not None and plain and capability(facts.device) == (9, 0):
            options["maxnreg"] = tiles.registers
    made = Launcher(_KERNELS[kernel], facts.device, constants, workspace=tma, **options), tiles
    _LAUNCHERS[(kernel, facts)] = made
    return made


def _planned(
    kernel: str,
    q: torch.Tensor,
    v: torch.Tensor,
    options: FlatOptions,
    strides: tuple[int, ...],
    streamed: tuple[torch.Tensor, torch.Tensor],
    extra: torch.Tensor | None,
    regime: int,
    lse: bool = True,
) -> tuple[Launcher, Tiles]:
    """The launcher of a kernel for these tensors, looked up by what can be asked of them in little time.

    `strides` are those of all tensors that the kernel gets; `streamed`, the tensors that it walks over.
    """
    _, heads, head_dim = q.shape
    _, kv_heads, v_dim = v.shape
    at = streamed[0].data_ptr() & 15, streamed[1].data_ptr() & 15
    key = (
        kernel, device_number(q), q.dtype, heads, head_dim, kv_heads, v_dim, options, strides, at,
        None if extra is None else extra.dtype, regime, lse,
    )  # fmt: skip
    found = _PLANNED.get(key)
    if found is None:
        if len(_PLANNED) >= _MOST_PLANNED:  # options that change at every call
            _PLANNED.clear()
        found = _PLANNED[key] = _plan(kernel, q, v, options, strides, streamed, extra, regime, lse)
    return found


_PLANNED: dict[Any, tuple[Launcher, Tiles]] = {}
_MOST_PLANNED = 1024


def _plan(
    kernel: str,
    q: torch.Tensor,
    v: torch.Tensor,
    options: FlatOptions,
    strides: tuple[int, ...],
    streamed: tuple[torch.Tensor, torch.Tensor],
    extra: torch.Tensor | None,
    regime: int,
    lse: bool,
) -> tuple[Launcher, Tiles]:
    device = device_number(q)
    odd = sum((3 if s == 1 else 1) << 2 * i for i, s in enumerate(strides) if s % 16)
    facts = _Facts(
        device,
        q.dtype,
        q.shape[1],
        v.shape[1],
        q.shape[2],
        v.shape[2],
        options.left >= 0,
        options.right >= 0,
        options.softcap > 0,
        options.scale <= 0,
        None if extra is None else extra.dtype,
        lse,
        q.dtype.itemsize == 2 and capability(device)[0] >= 9 and all(_has_tma(x) for x in streamed),
        odd,
        regime,
    )
    return _launcher(kernel, facts)


def _has_tma(x: torch.Tensor) -> bool:
    """Whether the copy engine can read x: rows of 16 bytes or more at multiples of 16 bytes."""
    stride_t, stride_h, _ = x.stride()
    per_16_bytes = 16 // x.element_size()
    if x.data_ptr() % 16:
        return False
    return stride_t > 0 and stride_t % per_16_bytes == 0 and stride_h % per_16_bytes == 0 and x.shape[2] >= per_16_bytes


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
    options: FlatOptions,
    kept: Kept | None,
    with_lse: bool = True,
    same: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (T, H, D_v) in the dtype of q, and LSE (H, T), float32: every element is written.

    Without `with_lse` the second one is O again. What was prepared is kept under the facts `same`, for `again`.
    """
    if sinks is not None:
        sinks = sinks.contiguous()
    if same is None:
        same = _calls.facts(q, k, v, with_lse, (options, None if sinks is None else sinks.dtype))
    call: _calls.Call | None = _tiles.recall(kept, same, cu_q, cu_k)
    if call is None:
        dense = _rows_dense(q), _rows_dense(k), _rows_dense(v)
        if dense[0] is not q or dense[1] is not k or dense[2] is not v:
            return forward(*dense, sinks, cu_q, cu_k, options, kept, with_lse)
        call = _prepare(q, k, v, sinks, cu_q, cu_k, options, kept, with_lse)
        _tiles.keep(kept, same, cu_q, cu_k, call)
    return _calls.launch(call, q, k, v, sinks, with_lse)


def _prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    options: FlatOptions,
    kept: Kept | None,
    with_lse: bool,
) -> _calls.Call:
    total, heads, width = q.shape
    total_k, _, v_dim = v.shape
    strides = q.stride()[:2] + k.stride()[:2] + v.stride()[:2]
    regime = _regime(total_k, cu_k)
    left, right, scale, softcap = options[:4]
    hopper = _hopper.plan(q, k, v, sinks, options, cu_q.shape[0] - 1, regime == LONG, regime == SHORT, with_lse)
    if hopper is not None:
        launch, rows = hopper
    else:
        launch, tiles = _planned("fwd", q, v, options, strides, (k, v), sinks, regime, with_lse)
        rows = tiles.rows
    tile_map, slots = _tiles.of(kept, cu_q, cu_k, total, total_k, rows, left, right)
    programs = slots * heads if hopper is None else min(slots * heads, processors(device_number(q)))
    scalars = (*strides, heads * v_dim, v_dim, total, slots, scale, softcap, left, right)
    like_q = v_dim == width and q.is_contiguous()
    return _calls.Call(launch, (programs, 1, 1), tile_map, scalars, like_q, (total, heads, v_dim), (heads, total))


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
    options: FlatOptions,
    kept_q: Kept | None,
    kept_k: Kept | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of q, k, v and sinks, contiguous, in their dtypes: every element is written.

    Unless the options say `deterministic`, dQ may be added up in no fixed order, where a kernel does so.
    """
    do = _rows_dense(torch.zeros_like(o) if do is None else do)
    if dlse is not None:
        dlse = dlse.contiguous()
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    dq, dk, dv = like(q), like(k), like(v)
    same = _calls.backward_facts(do, dlse, q, k, v, o, options)
    launch: _calls.Backward | None = _tiles.recall(kept_q, same, cu_q, cu_k)
    if launch is None:
        launch = _plan_backward(do, dlse, q, k, v, o, cu_q, cu_k, options, kept_q, kept_k)
        _tiles.keep(kept_q, same, cu_q, cu_k, launch)
    delta = launch((do, dlse, q, k, v, o, lse), (dq, dk, dv))
    dsinks = None
    if sinks is not None:  # the sink is a key without a value: its score has the gradient -p * delta
        dsinks = torch.exp(sinks.float()[:, None] - lse) * -delta
        dsinks = torch.where(delta == 0, 0.0, dsinks).sum(1).to(sinks.dtype)
    return dq, dk, dv, dsinks


def _plan_backward(
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
) -> _calls.Backward:
    """What computes the gradients of tensors like these, by the first kernels that serve them."""
    regime = _regime(max(q.shape[0], k.shape[0]), cu_k)
    given = (do, dlse, q, k, v, o, cu_q, cu_k, options, kept_q, kept_k)
    if _hopper_bwd.why_not(q, k, v, do, options, cu_q.shape[0] - 1) is None:
        return _hopper_bwd.plan(*given, regime == LONG)
    if _hopper_pair.why_not(q, k, v, o, do, options) is None:
        return _hopper_pair.plan(*given, regime == LONG, regime == SHORT)
    return _two_kernels(*given, regime)


def _two_kernels(
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
    regime: int,
) -> _calls.Backward:
    """What writes dQ, then dK and dV, each summed in a fixed order, and returns delta, for tensors like these."""
    total, heads, head_dim = q.shape
    total_k, kv_heads, v_dim = v.shape
    left, right, scale, softcap = options[:4]
    inputs = q.stride()[:2] + k.stride()[:2] + v.stride()[:2]

    strides = inputs + o.stride()[:2] + do.stride()[:2]
    of_dq, tiles = _planned("dq", q, v, options, strides, (k, v), dlse, regime)
    rows_of = tiles.rows
    q_tiles, slots = _tiles.of(kept_q, cu_q, cu_k, total, total_k, rows_of, left, right)
    dq_scalars = (*strides, heads * head_dim, head_dim, total, slots, scale, softcap, left, right)

    strides = inputs + do.stride()[:2]
    of_dkv, tiles = _planned("dkv", q, v, options, strides, (q, do), None, regime)
    k_tiles, k_slots = _tiles.of(kept_k, cu_k, cu_q, total_k, total, tiles.rows, right, left)
    strides = (*strides, kv_heads * head_dim, head_dim, kv_heads * v_dim, v_dim)
    dkv_scalars = (*strides, k_slots, slots, scale, softcap, left, right)
    dq_grid, dkv_grid = (slots * heads, 1, 1), (k_slots * kv_heads, 1, 1)

    def launch(given: _calls.Given, grads: _calls.Grads) -> torch.Tensor:
        (do, dlse, q, k, v, o, lse), (dq, dk, dv) = given, grads
        delta = torch.empty_like(lse)
        rows = lse.new_empty((heads, slots, 2, rows_of))
        tensors = (q, k, v, o, do, lse, lse if dlse is None else dlse, q_tiles, dq, delta, rows)
        of_dq(dq_grid, tensors, dq_scalars)
        of_dkv(dkv_grid, (q, k, v, do, rows, k_tiles, dk, dv), dkv_scalars)
        return delta

    return launch
