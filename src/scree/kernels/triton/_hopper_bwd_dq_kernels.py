"""What runs around the attention backward for Hopper: before it, the rows; after it, dQ out of the sums."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ._attention_fwd_kernels import _tile
from ._tiles_kernels import ABSENT

TURNS = tl.constexpr(4)  # integers a tile of queries; the first says how many have added to its dQ, and of some tile,
NEXT = tl.constexpr(1)  # for a sequence and a head of keys, this one which block has no program yet,
DONE = tl.constexpr(2)  # and this one how many warps, two for each block, have added all that they add
TAKEN = tl.constexpr(3)  # and of the first tile, how many more tiles of keys than programs were taken
LEAST = tl.constexpr(1e-18)  # of the scale: LSE over it is far from the end of float32


@triton.jit
def _divisor(scale):
    """The scale, or LEAST where it is less: LSE can be divided by that, and the scores make no difference either way."""
    return tl.where(tl.abs(scale) < LEAST, LEAST, scale)


@triton.jit(do_not_specialize=["total_q", "slots", "scale"])
def _hopper_bwd_rows_kernel(
    o_ptr, do_ptr, lse_ptr, dlse_ptr, tiles_ptr, delta_ptr, rows_ptr, turns_ptr,
    stride_o_t: "i64", stride_o_h: "i64", stride_do_t: "i64", stride_do_h: "i64",
    total_q: "i64", slots: "i32", scale: "fp32",
    INNER: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """Before dQ is added up: ``delta = sum(o * do) - dlse``, and zeros in `turns`.

    The aligned `rows` get what the scores and their gradients start from: ``-lse / scale``, and ``-delta``.
    """
    program = tl.program_id(0)
    tl.store(turns_ptr + program.to(tl.int64) * TURNS + tl.arange(0, TURNS), tl.zeros([TURNS], tl.int32))
    outer = program // INNER
    head = (outer // slots * INNER + program % INNER).to(tl.int64)
    kind, q_start, q_length, _, _, block, row = _tile(tiles_ptr, outer % slots)
    if kind == ABSENT:
        return
    local = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, D)
    there = block * BLOCK_M + local < q_length
    base = q_start + block.to(tl.int64) * BLOCK_M
    do = tl.load(
        do_ptr + base * stride_do_t + head * stride_do_h + local[:, None] * stride_do_t + inner[None, :],
        mask=there[:, None], other=0.0,
    )  # fmt: skip
    o = tl.load(
        o_ptr + base * stride_o_t + head * stride_o_h + local[:, None] * stride_o_t + inner[None, :],
        mask=there[:, None], other=0.0,
    )  # fmt: skip
    across = head * total_q + base + local
    lse = tl.load(lse_ptr + across, mask=there, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + across, mask=there, other=0.0)
    tl.store(delta_ptr + across, delta, mask=there)
    tile = head * slots + q_start // BLOCK_M + row + block
    tl.store(rows_ptr + tile * (2 * BLOCK_M) + local, -lse / _divisor(scale))
    tl.store(rows_ptr + tile * (2 * BLOCK_M) + BLOCK_M + local, -delta)


@triton.jit
def _in_order(x, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """What `_add` wrote, as the matrix that it was."""
    x = tl.reshape(x, [BLOCK_M // 16, WIDTH // 8, 8, 4, 2, 2])
    return tl.reshape(tl.permute(x, (0, 4, 2, 1, 3, 5)), [BLOCK_M, WIDTH])


@triton.jit(do_not_specialize=["slots", "scale"])
def _hopper_bwd_dq_kernel(
    acc_ptr, turns_ptr, tiles_ptr, dq_ptr, stride_dq_t: "i64", stride_dq_h: "i64", slots: "i32", scale: "fp32",
    SHARED: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ from `acc`; zeros where no block of keys has added to it.

    Its programs start when the last ones of the main kernel have: what is done already is rounded beside those, and only
    the rest waits, for the whole kernel, whatever the offsets are.
    """
    program = tl.program_id(0)
    if program == tl.num_programs(0) - 1:
        gdc_wait()  # so that this kernel never ends before the one that it follows
    outer = program // INNER
    head = (outer // slots * INNER + program % INNER).to(tl.int64)
    kind, q_start, q_length, _, k_length, block, row = _tile(tiles_ptr, outer % slots)
    if kind == ABSENT:
        return
    done = tl.atomic_add(turns_ptr + (head // SHARED * slots + row) * TURNS + DONE, 0, sem="acquire")
    if done < (k_length + BLOCK_N - 1) // BLOCK_N * 2:
        gdc_wait()
    HALF: tl.constexpr = D // 2
    tile = head * slots + q_start // BLOCK_M + row + block
    local = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, HALF)
    mask = (block * BLOCK_M + local < q_length)[:, None]
    some = tl.load(turns_ptr + tile * TURNS) > 0
    base = q_start + block.to(tl.int64) * BLOCK_M
    dq_ptr += base * stride_dq_t + head * stride_dq_h
    for half in tl.static_range(2):
        at = acc_ptr + tile * (BLOCK_M * D) + half * (BLOCK_M * HALF)
        x = tl.load(at + tl.arange(0, BLOCK_M * HALF), mask=some, other=0.0)
        x = _in_order(x, BLOCK_M, HALF) * scale
        to = dq_ptr + half * HALF + local[:, None] * stride_dq_t + inner[None, :]
        tl.store(to, x.to(dq_ptr.dtype.element_ty), mask=mask)
