"""Attention backward for Hopper (sm_90), in Gluon: two warpgroups multiply, a warp fetches, two more add up dQ.

Each program has a tile of 128 keys and walks over the queries that see it, of all heads that share the keys, the last
ones first. Each warpgroup keeps the dK and dV of 64 keys in registers, and computes the scores transposed, so that the
probabilities come out of one product as the next one wants them. The gradients of the scores of both warpgroups go through
shared memory; each warpgroup multiplies all of them with one half of the columns of K, and a warp has the copy engine add
that to dQ in memory, in float32 (FlashAttention-3, algorithm 3). A kernel before it prepares the rows, one after it rounds.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._attention_fwd_kernels import _span, _tile
from ._hopper_bwd_add_kernels import LINE, _add, _take
from ._tiles_kernels import ABSENT
from ._tiles_kernels import ROWS as PRESENT

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of each group
BLOCK_N = gl.constexpr(128)
NEVER = gl.constexpr(2**30)
SLOTS = gl.constexpr(4)  # for dS in shared memory

# Triton 3.8 renamed it.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _leave(dq_sm, dq_full, dq_empty, dq, count, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr):
    """Leave dq of block ``count - 1`` to be added, in the order in which the threads hold it (see `_in_order`)."""
    x = gl.reshape(dq, [BLOCK_M // 16, 2, 8, WIDTH // 8, 4, 2])
    x = gl.permute(x, (0, 3, 2, 4, 1, 5))
    mbarrier.wait(dq_empty, count & 1)
    dq_sm.store(gl.reshape(x, [BLOCK_M * WIDTH // LINE, LINE]))
    fence_async_shared()
    mbarrier.arrive(dq_full, count=1)


@gluon.jit
def _multiply_dq(k_half, ds_sm, ds_full, count, D: gl.constexpr, BLOCK_M: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """Issue dQ of block ``count - 1``, once both warpgroups have left its dS in shared memory."""
    slot = (count + SLOTS - 1) % SLOTS
    mbarrier.wait(ds_full.index(slot), ((count + SLOTS - 1) // SLOTS & 1) ^ 1)
    zeros = gl.zeros([BLOCK_M, D // 2], gl.float32, layout=DQ_LAYOUT)
    return warpgroup_mma(ds_sm.index(slot).permute((1, 0)), k_half, zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    dk, dv, k, v, k_half, memory, barriers, count, at, low, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The queries from `at`; and dQ of the block before.

    One step later, because dS of the other warpgroup is there by then: so one can multiply while the other computes.
    With four places for dS a warpgroup is never too early to write: that both have written two steps ago, for which
    it waited one step ago, means that the other one is done with what was written four steps ago.
    """
    _, _, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm = memory
    _, _, q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty = barriers
    stage = count % STAGES
    phase = count // STAGES & 1
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(q_full.index(stage), phase)
    s = warpgroup_mma(k, q_sm.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(stage), phase)
    dp = warpgroup_mma(v, do_sm.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    lse = lse_sm.index(stage).load(S_LAYOUT)
    p = gl.exp2(s * scale - lse)
    if MASKED:
        rows = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_LAYOUT)), 0)
        p = gl.where(rows >= gl.expand_dims(low - at, 1), p, 0.0)
    pb = gl.convert_layout(p.to(k.dtype), P_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    dv = warpgroup_mma(pb, do_sm.index(stage), dv, is_async=True)
    delta = delta_sm.index(stage).load(S_LAYOUT)
    ds = (p * (dp - delta)).to(k.dtype)
    slot = count % SLOTS
    ds_sm.index(slot).slice(GROUP * ROWS, ROWS, 0).store(ds)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(slot), count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q_sm.index(stage), dk, is_async=True)
    dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, DQ_LAYOUT)
    dv = warpgroup_mma_wait(2, deps=(dv,))
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk = warpgroup_mma_wait(1, deps=(dk,))
    mbarrier.arrive(q_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    if count > 0:
        _leave(dq_sm.index(GROUP), dq_full.index(GROUP), dq_empty.index(GROUP), dq, count, BLOCK_M, D // 2)
    return dk, dv


@gluon.jit
def _place(tiles_ptr, turns_ptr, slots, slots_q, INNER: gl.constexpr, ORDERED: gl.constexpr):
    """The head and the tile of this program: as the map has them or, if ORDERED, the next one of that sequence."""
    program = gl.program_id(0)
    outer = program // INNER
    head = outer // slots * INNER + program % INNER
    kind, k_start, k_length, q_start, q_length, block, row = _tile(tiles_ptr, outer % slots)
    if kind == ABSENT:
        k_start = k_start * 0
        k_length = 0
        q_start = k_start
        q_length = 0
    if ORDERED:
        if kind == PRESENT:  # in the map too no block of a sequence is costlier than the one before
            block = _take(turns_ptr, row, head, slots_q)
    return head, k_start, k_length, q_start, q_length, block, row


@gluon.jit
def _steps(block, k_length, q_length, right, BLOCK_M: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """(begin, middle, end): every key is seen by every query from `middle` on; all three are multiples of BLOCK_M."""
    begin, middle, _, end = _span(block, k_length, q_length, right, -1, BLOCK_N, BLOCK_M, HAS_RIGHT, False)
    end = (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    if block * BLOCK_N + BLOCK_N > k_length:
        middle = end
    return begin, gl.minimum(middle, end), end


@gluon.jit
def _multiply(
    memory, barriers, work, arguments,
    GROUP: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: keys ``64 * GROUP`` to ``64 * GROUP + 64`` of the tile."""
    k_sm, v_sm, _q, _do, _l, _d, ds_sm, dq_sm = memory
    k_full, v_full, _qf, _df, _qe, _de, ds_full, dq_full, dq_empty = barriers
    head, block, _tile, begin, middle, end = work
    dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, k_start, k_length, q_length, scale, right = (
        arguments
    )
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    a_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=a_layout, k_width=2)
    cols = block * BLOCK_N + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
    low = gl.where(cols < k_length, 0, NEVER)  # the first query that sees a key
    if HAS_RIGHT:
        low = gl.where(cols < k_length, cols + (q_length - k_length - right), NEVER)
    k = k_sm.slice(GROUP * ROWS, ROWS, 0)
    v = v_sm.slice(GROUP * ROWS, ROWS, 0)
    k_half = k_sm.slice(GROUP * (D // 2), D // 2, 1)
    dk = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
    dv = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
    scale_2 = scale * LOG2E
    count = 0
    if begin < end:
        mbarrier.wait(k_full, 0)
        mbarrier.wait(v_full, 0)
    for _ in range((end - middle) // BLOCK_M * SHARED):
        dk, dv = _step(
            dk, dv, k, v, k_half, memory, barriers, count, 0, low, scale_2,
            GROUP, D, BLOCK_M, STAGES, False, s_layout, p_layout, dq_layout,
        )  # fmt: skip
        count += 1
    for at in range(middle - BLOCK_M, begin - 1, -BLOCK_M):
        for _ in range(SHARED):
            dk, dv = _step(
                dk, dv, k, v, k_half, memory, barriers, count, at, low, scale_2,
                GROUP, D, BLOCK_M, STAGES, True, s_layout, p_layout, dq_layout,
            )  # fmt: skip
            count += 1
    if count > 0:
        dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, dq_layout)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _leave(dq_sm.index(GROUP), dq_full.index(GROUP), dq_empty.index(GROUP), dq, count, BLOCK_M, D // 2)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, a_layout))
    inner = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, a_layout)), 0)
    first = block * BLOCK_N + GROUP * ROWS
    mask = gl.expand_dims(rows < k_length - first, 1)
    rows = gl.expand_dims(rows, 1)
    base = k_start + first
    dk_ptr += base * stride_dk_t + head * stride_dk_h
    dv_ptr += base * stride_dv_t + head * stride_dv_h
    gl.store(dv_ptr + rows * stride_dv_t + inner, dv.to(k.dtype), mask=mask)
    gl.store(dk_ptr + rows * stride_dk_t + inner, (dk * scale).to(k.dtype), mask=mask)


@gluon.jit
def _fetch(
    memory, barriers, work, arguments,
    SHARED: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches what the others need, in the order of their use."""
    k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, _, _dq = memory
    k_full, v_full, q_full, do_full, q_empty, do_empty, _ds, _qf, _qe = barriers
    head, block, tile, begin, _m, end = work
    q_desc, k_desc, v_desc, do_desc, rows_desc, stride_q_h, stride_k_h, stride_v_h, stride_do_h, slots_q = arguments
    if begin < end:
        mbarrier.expect(k_full, k_desc.block_type.nbytes)
        _tma_load(k_desc, [block * BLOCK_N, (head * stride_k_h).to(gl.int32)], k_full, k_sm)
        mbarrier.expect(v_full, v_desc.block_type.nbytes)
        _tma_load(v_desc, [block * BLOCK_N, (head * stride_v_h).to(gl.int32)], v_full, v_sm)
    count = 0
    for at in range(end - BLOCK_M, begin - 1, -BLOCK_M):
        part = (tile + at // BLOCK_M) * 2
        for member in range(SHARED):
            q_head = head * SHARED + member
            stage = count % STAGES
            free = (count // STAGES & 1) ^ 1
            mbarrier.wait(q_empty.index(stage), free)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            _tma_load(q_desc, [at, (q_head * stride_q_h).to(gl.int32)], q_full.index(stage), q_sm.index(stage))
            _tma_load(rows_desc, [part, 0], q_full.index(stage), lse_sm.index(stage))
            full = do_full.index(stage)
            mbarrier.wait(do_empty.index(stage), free)
            mbarrier.expect(full, do_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            _tma_load(do_desc, [at, (q_head * stride_do_h).to(gl.int32)], full, do_sm.index(stage))
            _tma_load(rows_desc, [part + 1, 0], full, delta_sm.index(stage))
            part += slots_q * 2
            count += 1


@gluon.jit(do_not_specialize=["slots", "slots_q", "scale", "right"])
def _hopper_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, acc_ptr, turns_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32", right: "i32",
    SHARED: gl.constexpr, HEADS: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; and dQ, unscaled, added to `acc`.

    `rows` is (H, slots_q, 2, BLOCK_M), as `_hopper_bwd_rows_kernel` leaves it; `acc`, (H, slots_q, BLOCK_M * D), and
    `turns`, (H, slots_q, TURNS), zeros.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    head, k_start, k_length, q_start, q_length, block, row = _place(
        tiles_ptr, turns_ptr, slots, slots_q, INNER, ORDERED
    )
    begin, middle, end = _steps(block, k_length, q_length, right, BLOCK_M, HAS_RIGHT)
    tile = (head * SHARED * slots_q + q_start // BLOCK_M + row).to(gl.int32)  # of the first head of the group
    q_desc = tma.make_tensor_descriptor(
        q_ptr + q_start * stride_q_t, [q_length, ((HEADS * SHARED - 1) * stride_q_h + D).to(gl.int32)],
        [stride_q_t, 1], [BLOCK_M, D], q_layout,
    )  # fmt: skip
    do_desc = tma.make_tensor_descriptor(
        do_ptr + q_start * stride_do_t, [q_length, ((HEADS * SHARED - 1) * stride_do_h + D).to(gl.int32)],
        [stride_do_t, 1], [BLOCK_M, D], q_layout,
    )  # fmt: skip
    k_desc = tma.make_tensor_descriptor(
        k_ptr + k_start * stride_k_t, [k_length, ((HEADS - 1) * stride_k_h + D).to(gl.int32)],
        [stride_k_t, 1], [BLOCK_N, D], k_layout,
    )  # fmt: skip
    v_desc = tma.make_tensor_descriptor(
        v_ptr + k_start * stride_v_t, [k_length, ((HEADS - 1) * stride_v_h + D).to(gl.int32)],
        [stride_v_t, 1], [BLOCK_N, D], k_layout,
    )  # fmt: skip
    rows_desc = tma.make_tensor_descriptor(
        rows_ptr, [(HEADS * SHARED * slots_q * 2).to(gl.int32), BLOCK_M],
        [BLOCK_M, 1], [1, BLOCK_M], rows_layout,
    )  # fmt: skip
    acc_desc = tma.make_tensor_descriptor(
        acc_ptr, [(HEADS * SHARED * slots_q * (BLOCK_M * D // LINE)).to(gl.int32), LINE],
        [LINE, 1], [BLOCK_M * D // 2 // LINE, LINE], rows_layout,
    )  # fmt: skip
    dq_sm = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M * D // 2 // LINE, LINE], rows_layout)
    k_sm = gl.allocate_shared_memory(dtype, [BLOCK_N, D], k_layout)
    v_sm = gl.allocate_shared_memory(dtype, [BLOCK_N, D], k_layout)
    q_sm = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_layout)
    do_sm = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D], q_layout)
    lse_sm = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_layout)
    delta_sm = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], rows_layout)
    ds_sm = gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, BLOCK_M], ds_layout)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    do_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], one)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    k_full = kv_full.index(0)
    v_full = kv_full.index(1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(do_empty.index(i), count=2)
    for i in gl.static_range(SLOTS):
        mbarrier.init(ds_full.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    memory = (k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm)
    barriers = (k_full, v_full, q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty)
    work = (head, block, tile, begin, middle, end)
    across = slots_q.to(gl.int32)
    fetched = (q_desc, k_desc, v_desc, do_desc, rows_desc, stride_q_h, stride_k_h, stride_v_h, stride_do_h, across)
    multiplied = (
        dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, k_start, k_length, q_length, scale, right,
    )  # fmt: skip
    added = (acc_desc, turns_ptr, tile, across, block, begin, end)
    gl.warp_specialize([
        (_multiply, (memory, barriers, work, multiplied, 0, SHARED, D, BLOCK_M, STAGES, HAS_RIGHT)),
        (_multiply, (memory, barriers, work, multiplied, 1, SHARED, D, BLOCK_M, STAGES, HAS_RIGHT)),
        (_fetch, (memory, barriers, work, fetched, SHARED, BLOCK_M, STAGES)),
        (_add, (dq_sm.index(0), dq_full.index(0), dq_empty.index(0), added, 0, SHARED, D, BLOCK_M, ORDERED)),
        (_add, (dq_sm.index(1), dq_full.index(1), dq_empty.index(1), added, 1, SHARED, D, BLOCK_M, ORDERED)),
    ], [4, 1, 1, 1], [240, 24, 24, 24])  # fmt: skip
