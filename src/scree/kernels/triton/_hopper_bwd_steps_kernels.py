"""A step of the attention backward for Hopper: 64 queries by 128 keys, the part of one of two warpgroups.

Each warpgroup keeps the dK and dV of 64 keys in registers, and computes the scores transposed, so that the probabilities
come out of one product as the next one wants them. The gradients of the scores of both warpgroups go through shared
memory; each warpgroup multiplies all of them with one half of the columns of K, and leaves that to be added to dQ
(FlashAttention-3, algorithm 3).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._attention_fwd_kernels import _span, _tile
from ._hopper_bwd_add_kernels import LINE

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of each group
BLOCK_N = gl.constexpr(128)
NEVER = gl.constexpr(2**30)
SLOTS = gl.constexpr(4)  # for dS in shared memory


@gluon.jit
def _turn(count, PLACES: gl.constexpr, STAYS: gl.constexpr):
    """(place, phase) of use `count` of places in turn.

    The same numbers either way. By masks, a loop over tiles leaves the compiler fewer of them to keep in registers.
    """
    if STAYS:
        place = count & PLACES - 1
        phase = (count & PLACES) // PLACES
    else:
        place = count % PLACES
        phase = count // PLACES & 1
    return place, phase


@gluon.jit
def _of(x, stage, STAYS: gl.constexpr):
    """x of a stage, or x if a kernel whose programs stay found it already: the other is 1% faster by looking each time."""
    if STAYS:
        found = x
    else:
        found = x.index(stage)
    return found


@gluon.jit
def _leave(dq_sm, dq_full, dq_empty, dq, count, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr):
    """Leave dq of block ``count - 1`` to be added, in the order in which the threads hold it (see `_in_order`)."""
    x = gl.reshape(dq, [BLOCK_M // 16, 2, 8, WIDTH // 8, 4, 2])
    x = gl.permute(x, (0, 3, 2, 4, 1, 5))
    mbarrier.wait(dq_empty, count & 1)
    dq_sm.store(gl.reshape(x, [BLOCK_M * WIDTH // LINE, LINE]))
    fence_async_shared()
    mbarrier.arrive(dq_full.index(2 * GROUP + (count + 1 & 1)), count=1)


@gluon.jit
def _multiply_dq(
    k_half, ds_sm, ds_full, count,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAYS: gl.constexpr, DQ_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Issue dQ of block ``count - 1``, once both warpgroups have left its dS in shared memory."""
    slot, phase = _turn(count + SLOTS - 1, SLOTS, STAYS)
    mbarrier.wait(ds_full.index(slot), phase ^ 1)
    zeros = gl.zeros([BLOCK_M, D // 2], gl.float32, layout=DQ_LAYOUT)
    return warpgroup_mma(ds_sm.index(slot).permute((1, 0)), k_half, zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    dk, dv, operands, memory, barriers, count, before, at, low, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    STAYS: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The queries from `at`, and keys ``64 * GROUP`` to ``64 * GROUP + 64`` of the tile; and dQ of the block before, which is left to be added while dK is multiplied.

    One step later, because dS of the other warpgroup is there by then: so one can multiply while the other computes.
    With four places for dS a warpgroup is never too early to write: that both have written two steps ago, for which
    it waited one step ago, means that the other one is done with what was written four steps ago.

    S and dP are added to what `rows` holds, ``-lse / scale`` and ``-delta``, so that no other registers have to.
    The first wait has theirs written before either product begins: otherwise ptxas lets one wait for the other.
    A program has made `before` steps before this tile: their dQ is left already.
    """
    k, v, k_half, q, do = operands
    lse_sm, delta_sm, ds_sm, dq_sm = memory
    q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty = barriers
    stage, phase = _turn(count, STAGES, STAYS)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(q_full.index(stage), phase)
    s = zeros + lse_sm.index(stage).load(S_LAYOUT)
    mbarrier.wait(do_full.index(stage), phase)
    dp = zeros + delta_sm.index(stage).load(S_LAYOUT)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    s = warpgroup_mma(k, _of(q, stage, STAYS).permute((1, 0)), s, is_async=True)
    dp = warpgroup_mma(v, _of(do, stage, STAYS).permute((1, 0)), dp, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale)
    if MASKED:
        rows = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT)), 0)
        p = gl.where(rows >= gl.expand_dims(low - at, 1), p, 0.0)
    pb = gl.convert_layout(p.to(k.dtype), P_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(pb, _of(do, stage, STAYS), dv, is_async=True)
    ds = (p * dp).to(k.dtype)
    slot, _phase = _turn(count, SLOTS, STAYS)
    ds_sm.index(slot).slice(GROUP * ROWS, ROWS, 0).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(slot), count=1)
    dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, STAYS, DQ_LAYOUT)
    dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), _of(q, stage, STAYS), dk, is_async=True)
    dv = warpgroup_mma_wait(2, deps=(dv,))
    mbarrier.arrive(do_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(1, deps=(dq,))
    if count > before:
        _leave(dq_sm.index(GROUP), dq_full, dq_empty.index(GROUP), dq, count, GROUP, BLOCK_M, D // 2)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(q_empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _place(index, tiles_ptr, slots, HEADS: gl.constexpr, INNER: gl.constexpr, HALVES: gl.constexpr):
    """The head and the tile that come at this place of the order: INNER heads of a tile side by side, then the next tile.

    With HALVES, the costlier half of the tiles of all heads comes first: otherwise long ones of the last heads start late.
    """
    first = slots * 0
    count = slots
    if HALVES:
        count = slots // 2
        if index >= count * HEADS:
            index -= count * HEADS
            first = count
            count = slots - count
    outer = index // INNER
    return outer // count * INNER + index % INNER, _tile(tiles_ptr, first + outer % count)


@gluon.jit
def _steps(block, k_length, q_length, right, BLOCK_M: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """(begin, middle, end): every key is seen by every query from `middle` on; all three are multiples of BLOCK_M."""
    begin, middle, _, end = _span(block, k_length, q_length, right, -1, BLOCK_N, BLOCK_M, HAS_RIGHT, False)
    end = (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if block * BLOCK_N + BLOCK_N > k_length:
        middle = end
    return begin, gl.minimum(middle, end), end
