"""Attention backward for Hopper (sm_90) where keys are masked, in Gluon: programs that stay for several tiles.

As many programs as there are multiprocessors take tiles of 128 keys until none is left, the costliest first. Of each tile a
program walks over the queries that see it, of all heads that share the keys, the last ones first: two warpgroups multiply
(`_step`), two warps fetch, two more have the copy engine add up dQ in memory, in float32. What the next tile needs is
fetched while this one's dK and dV are written. A kernel before it prepares the rows, one after it rounds.

A program takes a tile while it has another one at hand, and finishes them in the order in which it took them. So of all
blocks of keys that are taken and not finished, the one taken first is worked on; and it waits for none that was taken later.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from ._hopper_bwd_add_kernels import LINE, _add, _done
from ._hopper_bwd_dq_kernels import DONE, TURNS, _divisor
from ._hopper_bwd_fetch_kernels import FIELDS, TILES, _follow_and_fetch, _take_and_fetch, _told
from ._hopper_bwd_steps_kernels import BLOCK_N, LOG2E, NEVER, ROWS, SLOTS, _leave, _multiply_dq, _step, _steps
from ._hopper_fwd_copy_kernels import _ragged
from ._hopper_fwd_kernels import _store
from ._tiles_kernels import ABSENT
from ._tiles_kernels import ROWS as PRESENT

READERS = gl.constexpr(5)  # of a tile: all but the warp that takes it


@gl._core.builtin
def _seen_as(memory, shape, layout, _semantic=None):
    """Shared memory in another shape and layout. Triton gave the method a name of its own after 3.6."""
    see = getattr(memory, "reinterpret", None) or memory._reinterpret
    return see(memory.dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def _again(x):
    """The same number, but the compiler does not see that.

    What follows from it is then worked out at each step. Places that the loop over tiles would keep are kept in plain
    registers, from which ptxas moves each operand of each product to uniform ones.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _operands(
    k_sm, v_sm, q_sm, do_sm, count, GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):
    """What a step multiplies: K and V of the warpgroup's keys, its columns of K, Q and dO."""
    only = _again(0)
    k = k_sm.index(only).reshape([BLOCK_N, D]).slice(GROUP * ROWS, ROWS, 0)
    v = v_sm.index(only).reshape([BLOCK_N, D]).slice(GROUP * ROWS, ROWS, 0)
    k_half = k_sm.index(0).reshape([BLOCK_N, D]).slice(GROUP * (D // 2), D // 2, 1)
    stage = count & STAGES - 1
    return k, v, k_half, q_sm.index(stage).reshape([BLOCK_M, D]), do_sm.index(stage).reshape([BLOCK_M, D])


@gluon.jit
def _multiply(
    memory, barriers, of_tiles, of_keys, arguments,
    GROUP: gl.constexpr, SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: keys ``64 * GROUP`` to ``64 * GROUP + 64`` of every tile."""
    k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm, tile_sm = memory
    of_steps = (lse_sm, delta_sm, ds_sm, dq_sm)
    _q_full, _do_full, _q_empty, _do_empty, ds_full, dq_full, dq_empty = barriers
    tile_full, tile_empty = of_tiles
    kv_full, kv_empty = of_keys
    dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, scale, right = arguments
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    a_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=a_layout, k_width=2)
    scale_2 = _divisor(scale) * LOG2E
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    dk_desc = _ragged(dk_ptr, stride_dk_t, ((HEADS - 1) * stride_dk_h + D).to(gl.int32), ROWS, D // 2, layout)
    dv_desc = _ragged(dv_ptr, stride_dv_t, ((HEADS - 1) * stride_dv_h + D).to(gl.int32), ROWS, D // 2, layout)
    out_sm = _seen_as(ds_sm, [SLOTS * 2, 1, 1, ROWS, D // 2], layout)
    turn = 0
    fetched = 0  # tiles that needed their keys
    count = 0
    mbarrier.wait(tile_full.index(0), 0)
    kind, block, head, k_start, k_length, _s, q_length, _r = _told(tile_sm, 0, 4)
    while kind != ABSENT:
        begin, middle, end = _steps(block, k_length, q_length, right, BLOCK_M, True)
        cols = block * BLOCK_N + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        low = gl.where(cols < k_length, cols + (q_length - k_length - right), NEVER)  # the first query that sees a key
        dk = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
        dv = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
        before = count
        if begin < end:
            mbarrier.wait(kv_full.index(0), fetched & 1)
            mbarrier.wait(kv_full.index(1), fetched & 1)
        tma.store_wait(0)  # the copy of dK reads from where dS goes
        for _ in range((end - middle) // BLOCK_M * SHARED):
            operands = _operands(k_sm, v_sm, q_sm, do_sm, count, GROUP, D, BLOCK_M, STAGES)
            dk, dv = _step(
                dk, dv, operands, of_steps, barriers, count, before, 0, low, scale_2,
                GROUP, D, BLOCK_M, STAGES, False, True, s_layout, p_layout, dq_layout,
            )  # fmt: skip
            count += 1
        for at in range(middle - BLOCK_M, begin - 1, -BLOCK_M):
            for _ in range(SHARED):
                operands = _operands(k_sm, v_sm, q_sm, do_sm, count, GROUP, D, BLOCK_M, STAGES)
                dk, dv = _step(
                    dk, dv, operands, of_steps, barriers, count, before, at, low, scale_2,
                    GROUP, D, BLOCK_M, STAGES, True, True, s_layout, p_layout, dq_layout,
                )  # fmt: skip
                count += 1
        if count > before:
            mbarrier.arrive(kv_empty.index(1), count=1)
        k_half = k_sm.index(0).reshape([BLOCK_N, D]).slice(GROUP * (D // 2), D // 2, 1)
        dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, True, dq_layout)
        # Once more from memory: registers are scarce in the loops.
        slot = turn % TILES
        kind, block, head, k_start, k_length, _s, q_length, _r = _told(tile_sm, slot, 4)
        mbarrier.arrive(tile_empty.index(slot), count=1)
        first = block * BLOCK_N + GROUP * ROWS
        # Nobody reads these two places for dS any more, nor writes there, but this warpgroup in its next two steps.
        left = out_sm.index((count & SLOTS - 1) * 2 + GROUP)
        others = out_sm.index((count + 1 & SLOTS - 1) * 2 + GROUP)
        _write(dv_desc, dv.to(k_sm.dtype), left, others, k_start, k_length, first, (head * stride_dv_h).to(gl.int32), D)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        if count > before:
            mbarrier.arrive(kv_empty.index(0), count=1)
            _leave(dq_sm.index(GROUP), dq_full, dq_empty.index(GROUP), dq, count, GROUP, BLOCK_M, D // 2)
            fetched += 1
        tma.store_wait(0)  # the copy of dV reads from where dK goes
        _write(
            dk_desc, (dk * scale).to(k_sm.dtype), left, others, k_start, k_length, first, (head * stride_dk_h).to(gl.int32), D
        )  # fmt: skip
        turn += 1
        mbarrier.wait(tile_full.index(turn % TILES), turn // TILES & 1)
        kind, block, head, k_start, k_length, _s, q_length, _r = _told(tile_sm, turn % TILES, 4)
    tma.store_wait(0)


@gluon.jit
def _write(desc, x, left, right, start, length, row, column, D: gl.constexpr):
    """Have x copied to memory, from `left` and `right`, in shared memory: what of its rows lies within the sequence."""
    a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, D // 2]), (0, 2, 1)))
    left.reshape([ROWS, D // 2]).store(a)
    right.reshape([ROWS, D // 2]).store(b)
    fence_async_shared()
    _store(desc, start, length, row, column, left)
    _store(desc, start, length, row, column + D // 2, right)


@gluon.jit
def _follow_and_add(
    tile_sm, of_tiles, dq, sums,
    TURN: gl.constexpr, SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """A warp that has every other dQ added, from the first on, TURN 0, or from the second, 1."""
    tile_full, tile_empty = of_tiles
    dq_sm, dq_full, dq_empty = dq
    acc_ptr, turns_ptr, slots_q, right = sums
    layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    shape = [HEADS * SHARED * slots_q * (BLOCK_M * D // LINE), LINE]
    acc_desc = tma.make_tensor_descriptor(acc_ptr, shape, [LINE, 1], [BLOCK_M * D // 2 // LINE, LINE], layout)
    turn = 0
    count = 0
    mbarrier.wait(tile_full.index(0), 0)
    kind, block, head, _s, k_length, q_start, q_length, row = _told(tile_sm, 0, 1)
    while kind != ABSENT:
        mbarrier.arrive(tile_empty.index(turn % TILES), count=1)
        begin, _m, end = _steps(block, k_length, q_length, right, BLOCK_M, True)
        tile = head * SHARED * slots_q + q_start // BLOCK_M + row  # of the first head of the group
        added = (acc_desc, turns_ptr, tile, slots_q, block, begin, end)
        count = _add(dq_sm, dq_full, dq_empty, added, count, TURN, SHARED, D, BLOCK_M, ORDERED)
        if kind == PRESENT:
            _done(turns_ptr + (head * slots_q + row).to(gl.int64) * TURNS + DONE)
        turn += 1
        mbarrier.wait(tile_full.index(turn % TILES), turn // TILES & 1)
        kind, block, head, _s, k_length, q_start, q_length, row = _told(tile_sm, turn % TILES, 1)


@gluon.jit(do_not_specialize=["slots", "slots_q", "scale", "right"])
def _hopper_bwd_stay_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, acc_ptr, turns_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32", right: "i32",
    SHARED: gl.constexpr, HEADS: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; and dQ, unscaled, added to `acc`.

    `rows` is (H, slots_q, 2, BLOCK_M), as `_hopper_bwd_rows_kernel` leaves it, and `turns`, (H, slots_q, TURNS), zeros;
    `acc`, (H, slots_q, BLOCK_M * D), need not be.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    dq_sm = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M * D // 2 // LINE, LINE], rows_layout)
    k_sm = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, D], layout)
    v_sm = gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, D], layout)
    q_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], layout)
    do_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], layout)
    lse_sm = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_layout)
    delta_sm = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_layout)
    ds_sm = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, BLOCK_M], ds_layout)
    tile_sm = gl.allocate_shared_memory(gl.int32, [TILES * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    one: gl.constexpr = mbarrier.MBarrierLayout()
    tile_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], one)
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], one)
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    kv_empty = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], one)
    dq_full = gl.allocate_shared_memory(gl.int64, [4, 1], one)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    for i in gl.static_range(TILES):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=READERS)
    for i in gl.static_range(2):
        mbarrier.init(kv_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=2)
        mbarrier.init(dq_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ds_full.index(i), count=2)
    for i in gl.static_range(4):
        mbarrier.init(dq_full.index(i), count=1)
    memory = (k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm, tile_sm)
    barriers = (q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty)
    of_tiles = (tile_full, tile_empty)
    of_keys = (kv_full, kv_empty)
    of_q = (q_full, q_empty, kv_full.index(0), kv_empty.index(0))
    of_do = (do_full, do_empty, kv_full.index(1), kv_empty.index(1))
    across = slots_q.to(gl.int32)
    queries = (q_ptr, k_ptr, rows_ptr, stride_q_t, stride_q_h, stride_k_t, stride_k_h, across, right)
    outputs = (do_ptr, v_ptr, rows_ptr, stride_do_t, stride_do_h, stride_v_t, stride_v_h, across, right)
    taken = (tiles_ptr, turns_ptr, slots)
    sums = (acc_ptr, turns_ptr, across, right)
    dq = (dq_sm, dq_full, dq_empty)
    multiplied = (dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, scale, right)
    gl.warp_specialize([
        (_multiply, (memory, barriers, of_tiles, of_keys, multiplied, 0, SHARED, HEADS, D, BLOCK_M, STAGES)),
        (_multiply, (memory, barriers, of_tiles, of_keys, multiplied, 1, SHARED, HEADS, D, BLOCK_M, STAGES)),
        (_take_and_fetch, (
            q_sm, lse_sm, k_sm.index(0), tile_sm, of_q, of_tiles, queries, taken,
            SHARED, HEADS, INNER, D, BLOCK_M, STAGES,
        )),
        (_follow_and_fetch, (
            do_sm, delta_sm, v_sm.index(0), tile_sm, of_do, of_tiles, outputs, SHARED, HEADS, D, BLOCK_M, STAGES,
        )),
        (_follow_and_add, (tile_sm, of_tiles, dq, sums, 0, SHARED, HEADS, D, BLOCK_M, ORDERED)),
        (_follow_and_add, (tile_sm, of_tiles, dq, sums, 1, SHARED, HEADS, D, BLOCK_M, ORDERED)),
    ], [4, 1, 1, 1, 1], [240, 24, 24, 24, 24])  # fmt: skip
