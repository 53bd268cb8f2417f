"""Attention backward for Hopper (sm_90), in Gluon: a warp that copies, and two warpgroups that multiply.

Each program has a tile of 128 keys and walks over the queries that see it, of all heads that share the keys. Each
warpgroup keeps the dK and dV of 64 keys in registers, and computes the scores transposed, so that the probabilities come
out of one product as the next one wants them. The gradients of the scores of both warpgroups go through shared memory;
each warpgroup multiplies all of them with one half of the columns of K, and has the copy engine add that to dQ in memory:
in float32, in no fixed order (FlashAttention-3, algorithm 3). A kernel before it prepares the rows, one after it rounds.
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
from ._tiles_kernels import ABSENT

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of each group
BLOCK_N = gl.constexpr(128)
NEVER = gl.constexpr(2**30)
SLOTS = gl.constexpr(4)  # for dS in shared memory
LINE = gl.constexpr(256)  # elements of dQ that the copy engine sees as a row

# Triton 3.8 renamed it.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


if hasattr(tma, "async_atomic_add"):  # since Triton 3.8
    _tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @gl._core.builtin
    def _tma_add(desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def _add(acc_desc, dq_sm, at, dq, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr):
    """Have dq added from place `at` on, in the order in which the threads hold it (see `_in_order`)."""
    x = gl.reshape(dq, [BLOCK_M // 16, 2, 8, WIDTH // 8, 4, 2])
    x = gl.permute(x, (0, 3, 2, 4, 1, 5))
    dq_sm.store(gl.reshape(x, [BLOCK_M * WIDTH // LINE, LINE]))
    fence_async_shared()
    _tma_add(acc_desc, [(at // LINE).to(gl.int32), 0], dq_sm)


@gluon.jit
def _multiply_dq(k_half, ds_sm, ds_full, count, D: gl.constexpr, BLOCK_M: gl.constexpr, DQ_LAYOUT: gl.constexpr):
    """Issue dQ of block ``count - 1``, once both warpgroups have left its dS in shared memory."""
    slot = (count + SLOTS - 1) % SLOTS
    mbarrier.wait(ds_full.index(slot), ((count + SLOTS - 1) // SLOTS & 1) ^ 1)
    zeros = gl.zeros([BLOCK_M, D // 2], gl.float32, layout=DQ_LAYOUT)
    return warpgroup_mma(ds_sm.index(slot).permute((1, 0)), k_half, zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    dk, dv, k, v, k_half, memory, barriers, acc_desc, dq_at, count, at, low, scale,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The queries from `at`; and dQ of the queries before, at `dq_at`.

    One step later, because dS of the other warpgroup is there by then: so one can multiply while the other computes.
    With four places for dS a warpgroup is never too early to write: that both have written two steps ago, for which
    it waited one step ago, means that the other one is done with what was written four steps ago.
    """
    _, _, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm = memory
    _, _, q_full, do_full, q_empty, do_empty, ds_full = barriers
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
    tma.store_wait(0)
    dv = warpgroup_mma_wait(2, deps=(dv,))
    mbarrier.arrive(do_empty.index(stage), count=1)
    dk = warpgroup_mma_wait(1, deps=(dk,))
    mbarrier.arrive(q_empty.index(stage), count=1)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    if count > 0:
        _add(acc_desc, dq_sm.index(GROUP), dq_at, dq, BLOCK_M, D // 2)
    return dk, dv


@gluon.jit
def _place(tiles_ptr, slots, INNER: gl.constexpr):
    """The tile and the head of this program, as `_tile` and `_work` have them."""
    program = gl.program_id(0)
    outer = program // INNER
    head = outer // slots * INNER + program % INNER
    kind, k_start, k_length, q_start, q_length, block, row = _tile(tiles_ptr, outer % slots)
    if kind == ABSENT:
        k_start = k_start * 0
        k_length = 0
        q_start = k_start
        q_length = 0
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
    memory, barriers, arguments,
    GROUP: gl.constexpr, SHARED: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: keys ``64 * GROUP`` to ``64 * GROUP + 64`` of the tile."""
    k_sm, v_sm, _q, _do, _l, _d, ds_sm, dq_sm = memory
    k_full, v_full, _qf, _df, _qe, _de, ds_full = barriers
    (
        tiles_ptr,
        acc_desc,
        dk_ptr,
        dv_ptr,
        stride_dk_t,
        stride_dk_h,
        stride_dv_t,
        stride_dv_h,
        slots,
        slots_q,
        scale,
        right,
    ) = arguments
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16]
    )
    a_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=a_layout, k_width=2)
    head, k_start, k_length, q_start, q_length, block, row = _place(tiles_ptr, slots, INNER)
    begin, middle, end = _steps(block, k_length, q_length, right, BLOCK_M, HAS_RIGHT)
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
    dq_at = (head * 0).to(gl.int64)
    if begin < end:
        mbarrier.wait(k_full, 0)
        mbarrier.wait(v_full, 0)
    for member in range(SHARED):
        tile = (head * SHARED + member).to(gl.int64) * slots_q + q_start // BLOCK_M + row
        member_at = tile * (BLOCK_M * D) + GROUP * (BLOCK_M * D // 2)
        for at in range(begin, middle, BLOCK_M):
            dk, dv = _step(
                dk, dv, k, v, k_half, memory, barriers, acc_desc, dq_at, count, at, low, scale_2,
                GROUP, D, BLOCK_M, STAGES, True, s_layout, p_layout, dq_layout,
            )  # fmt: skip
            dq_at = member_at + at * D
            count += 1
        for at in range(middle, end, BLOCK_M):
            dk, dv = _step(
                dk, dv, k, v, k_half, memory, barriers, acc_desc, dq_at, count, at, low, scale_2,
                GROUP, D, BLOCK_M, STAGES, False, s_layout, p_layout, dq_layout,
            )  # fmt: skip
            dq_at = member_at + at * D
            count += 1
    tma.store_wait(0)
    if count > 0:
        dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, dq_layout)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _add(acc_desc, dq_sm.index(GROUP), dq_at, dq, BLOCK_M, D // 2)
        tma.store_wait(0)
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
def _copy(
    memory, barriers, arguments,
    SHARED: gl.constexpr, INNER: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The warp that copies: fetches what the others need, in the order of their use."""
    k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, _, _dq = memory
    k_full, v_full, q_full, do_full, q_empty, do_empty, _ds = barriers
    (
        q_desc,
        k_desc,
        v_desc,
        do_desc,
        rows_desc,
        tiles_ptr,
        stride_q_h,
        stride_k_h,
        stride_v_h,
        stride_do_h,
        slots,
        slots_q,
        right,
    ) = arguments
    head, _s, k_length, q_start, q_length, block, row = _place(tiles_ptr, slots, INNER)
    begin, _m, end = _steps(block, k_length, q_length, right, BLOCK_M, HAS_RIGHT)
    if begin < end:
        mbarrier.expect(k_full, k_desc.block_type.nbytes)
        _tma_load(k_desc, [block * BLOCK_N, (head * stride_k_h).to(gl.int32)], k_full, k_sm)
        mbarrier.expect(v_full, v_desc.block_type.nbytes)
        _tma_load(v_desc, [block * BLOCK_N, (head * stride_v_h).to(gl.int32)], v_full, v_sm)
    count = 0
    for member in range(SHARED):
        q_head = head * SHARED + member
        tile = (q_head * slots_q + q_start // BLOCK_M + row).to(gl.int32)
        for at in range(begin, end, BLOCK_M):
            stage = count % STAGES
            free = (count // STAGES & 1) ^ 1
            part = (tile + at // BLOCK_M) * 2
            mbarrier.wait(q_empty.index(stage), free)
            mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            _tma_load(q_desc, [at, (q_head * stride_q_h).to(gl.int32)], q_full.index(stage), q_sm.index(stage))
            _tma_load(rows_desc, [part, 0], q_full.index(stage), lse_sm.index(stage))
            full = do_full.index(stage)
            mbarrier.wait(do_empty.index(stage), free)
            mbarrier.expect(full, do_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            _tma_load(do_desc, [at, (q_head * stride_do_h).to(gl.int32)], full, do_sm.index(stage))
            _tma_load(rows_desc, [part + 1, 0], full, delta_sm.index(stage))
            count += 1


@gluon.jit(do_not_specialize=["slots", "slots_q", "scale", "right"])
def _hopper_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, acc_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32", right: "i32",
    SHARED: gl.constexpr, HEADS: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; and dQ, unscaled, added to `acc`.

    `rows` is (H, slots_q, 2, BLOCK_M), as `_hopper_bwd_rows_kernel` leaves it; `acc`, (H, slots_q, BLOCK_M * D).
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    _h, k_start, k_length, q_start, q_length, _b, _r = _place(tiles_ptr, slots, INNER)
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
    memory = (k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm)
    barriers = (k_full, v_full, q_full, do_full, q_empty, do_empty, ds_full)
    copied = (
        q_desc, k_desc, v_desc, do_desc, rows_desc, tiles_ptr, stride_q_h, stride_k_h, stride_v_h, stride_do_h,
        slots, slots_q, right,
    )  # fmt: skip
    multiplied = (
        tiles_ptr, acc_desc, dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
        slots, slots_q, scale, right,
    )  # fmt: skip
    gl.warp_specialize([
        (_multiply, (memory, barriers, multiplied, 0, SHARED, INNER, D, BLOCK_M, STAGES, HAS_RIGHT)),
        (_multiply, (memory, barriers, multiplied, 1, SHARED, INNER, D, BLOCK_M, STAGES, HAS_RIGHT)),
        (_copy, (memory, barriers, copied, SHARED, INNER, BLOCK_M, STAGES, HAS_RIGHT)),
    ], [4, 1], [240, 24])  # fmt: skip
