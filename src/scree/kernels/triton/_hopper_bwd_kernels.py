"""Attention backward for Hopper (sm_90) where all keys are seen, in Gluon: a program for each tile of 128 keys.

It walks over the queries, of all heads that share the keys, the last ones first: two warpgroups multiply (`_step`), two warps
fetch, two more have the copy engine add up dQ in memory, in float32. A kernel before it prepares the rows, one after it
rounds. Where tiles differ in length, programs that stay for several are faster (`_hopper_bwd_stay_kernels.py`); here not.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents

from ._hopper_bwd_add_kernels import LINE, _add, _done, _take
from ._hopper_bwd_dq_kernels import DONE, TURNS, _divisor
from ._hopper_bwd_steps_kernels import BLOCK_N, LOG2E, NEVER, ROWS, SLOTS, _leave, _multiply_dq, _place, _step, _steps
from ._hopper_fwd_copy_kernels import _tma_load
from ._tiles_kernels import ABSENT
from ._tiles_kernels import ROWS as PRESENT


@gluon.jit
def _multiply(
    memory, barriers, work, arguments,
    GROUP: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: keys ``64 * GROUP`` to ``64 * GROUP + 64`` of the tile."""
    k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm = memory
    of_steps = (lse_sm, delta_sm, ds_sm, dq_sm)
    k_full, v_full, q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty = barriers
    of_queries = (q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty)
    head, block, _tile, begin, middle, end = work
    dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, k_start, k_length, scale = arguments
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
    k = k_sm.slice(GROUP * ROWS, ROWS, 0)
    v = v_sm.slice(GROUP * ROWS, ROWS, 0)
    k_half = k_sm.slice(GROUP * (D // 2), D // 2, 1)
    dk = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
    dv = gl.zeros([ROWS, D], gl.float32, layout=a_layout)
    scale_2 = _divisor(scale) * LOG2E
    operands = (k, v, k_half, q_sm, do_sm)
    count = 0
    if begin < end:
        mbarrier.wait(k_full, 0)
        mbarrier.wait(v_full, 0)
    for _ in range((end - middle) // BLOCK_M * SHARED):
        dk, dv = _step(
            dk, dv, operands, of_steps, of_queries, count, 0, 0, low, scale_2,
            GROUP, D, BLOCK_M, STAGES, False, False, s_layout, p_layout, dq_layout,
        )  # fmt: skip
        count += 1
    for at in range(middle - BLOCK_M, begin - 1, -BLOCK_M):
        for _ in range(SHARED):
            dk, dv = _step(
                dk, dv, operands, of_steps, of_queries, count, 0, at, low, scale_2,
                GROUP, D, BLOCK_M, STAGES, True, False, s_layout, p_layout, dq_layout,
            )  # fmt: skip
            count += 1
    if count > 0:
        dq = _multiply_dq(k_half, ds_sm, ds_full, count, D, BLOCK_M, False, dq_layout)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _leave(dq_sm.index(GROUP), dq_full, dq_empty.index(GROUP), dq, count, GROUP, BLOCK_M, D // 2)
    first = block * BLOCK_N + GROUP * ROWS
    base = k_start + first
    dv_ptr += base * stride_dv_t + head * stride_dv_h
    dk_ptr += base * stride_dk_t + head * stride_dk_h
    _write(dv_ptr, stride_dv_t, dv.to(k.dtype), v, k_length - first, D)
    _write(dk_ptr, stride_dk_t, (dk * scale).to(k.dtype), v, k_length - first, D)


@gluon.jit
def _write(ptr, stride_t, x, room, length, D: gl.constexpr):
    """Write the first `length` rows of x in whole lines; `room`, in shared memory, is where they are put together."""
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    room.store(x)
    x = room.load(lines)
    rows = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, lines)), 1)
    inner = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, lines)), 0)
    gl.store(ptr + rows * stride_t + inner, x, mask=rows < length)


@gluon.jit
def _describe(ptr, start, length, stride_t, stride_h, HEADS: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr):
    """What the copy engine has to know of the rows of one sequence: it fetches zeros for those beyond them.

    To write that to memory and have the copy engine see it takes long, so each warp does so for what it fetches.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], ptr.dtype.element_ty)
    return tma.make_tensor_descriptor(
        ptr + start * stride_t, [length, ((HEADS - 1) * stride_h + D).to(gl.int32)], [stride_t, 1], [BLOCK, D], layout
    )


@gluon.jit
def _fetch(
    x_sm, row_sm, full, empty, work, arguments,
    WHICH: gl.constexpr, SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches Q and LSE, WHICH 0, or dO and delta, 1, in the order of their use."""
    head, _block, tile, begin, _m, end = work
    ptr, rows_ptr, stride_t, stride_h, start, length, slots_q = arguments
    layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    desc = _describe(ptr, start, length, stride_t, stride_h, HEADS * SHARED, BLOCK_M, D)
    shape = [HEADS * SHARED * slots_q * 2, BLOCK_M]
    rows_desc = tma.make_tensor_descriptor(rows_ptr, shape, [BLOCK_M, 1], [1, BLOCK_M], layout)
    count = 0
    for at in range(end - BLOCK_M, begin - 1, -BLOCK_M):
        part = (tile + at // BLOCK_M) * 2 + WHICH
        for member in range(SHARED):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), desc.block_type.nbytes + rows_desc.block_type.nbytes)
            column = ((head * SHARED + member) * stride_h).to(gl.int32)
            _tma_load(desc, [at, column], full.index(stage), x_sm.index(stage))
            _tma_load(rows_desc, [part, 0], full.index(stage), row_sm.index(stage))
            part += slots_q * 2
            count += 1


@gluon.jit
def _fetch_and_add(
    x_sm, full, dq, work, arguments, sums,
    TURN: gl.constexpr, SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    ORDERED: gl.constexpr,
):  # fmt: skip
    """The warp that fetches K, TURN 0, or V, 1, and then has every other dQ added."""
    head, block, tile, begin, _m, end = work
    ptr, stride_t, stride_h, start, length = arguments
    acc_ptr, turns_ptr, done_ptr, slots_q = sums
    dq_sm, dq_full, dq_empty = dq
    if begin < end:
        desc = _describe(ptr, start, length, stride_t, stride_h, HEADS, BLOCK_N, D)
        mbarrier.expect(full, desc.block_type.nbytes)
        _tma_load(desc, [block * BLOCK_N, (head * stride_h).to(gl.int32)], full, x_sm)
    layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    shape = [HEADS * SHARED * slots_q * (BLOCK_M * D // LINE), LINE]
    acc_desc = tma.make_tensor_descriptor(acc_ptr, shape, [LINE, 1], [BLOCK_M * D // 2 // LINE, LINE], layout)
    added = (acc_desc, turns_ptr, tile, slots_q, block, begin, end)
    _add(dq_sm, dq_full, dq_empty, added, gl.to_tensor(0), TURN, SHARED, D, BLOCK_M, ORDERED)
    if length > 0:
        _done(done_ptr)


@gluon.jit(do_not_specialize=["slots", "slots_q", "scale"])
def _hopper_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, acc_ptr, turns_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32",
    SHARED: gl.constexpr, HEADS: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; and dQ, unscaled, added to `acc`.

    `rows` is (H, slots_q, 2, BLOCK_M), as `_hopper_bwd_rows_kernel` leaves it, and `turns`, (H, slots_q, TURNS), zeros;
    `acc`, (H, slots_q, BLOCK_M * D), need not be.
    """
    gdc_launch_dependents()
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    head, place = _place(gl.program_id(0), tiles_ptr, slots, HEADS, INNER, SHARED > 1)
    kind, k_start, k_length, q_start, q_length, block, row = place
    if kind == ABSENT:
        k_start = k_start * 0
        k_length = 0
        q_start = k_start
        q_length = 0
    if kind == PRESENT:  # in the map too no block of a sequence is costlier than the one before
        block = _take(turns_ptr, row, head, slots_q)
    begin, middle, end = _steps(block, k_length, q_length, -1, BLOCK_M, False)
    tile = (head * SHARED * slots_q + q_start // BLOCK_M + row).to(gl.int32)  # of the first head of the group
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
    dq_full = gl.allocate_shared_memory(gl.int64, [4, 1], one)
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
    for i in gl.static_range(4):
        mbarrier.init(dq_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(dq_empty.index(i), count=1)
    memory = (k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, ds_sm, dq_sm)
    barriers = (k_full, v_full, q_full, do_full, q_empty, do_empty, ds_full, dq_full, dq_empty)
    work = (head, block, tile, begin, middle, end)
    across = slots_q.to(gl.int32)
    queries = (q_ptr, rows_ptr, stride_q_t, stride_q_h, q_start, q_length, across)
    outputs = (do_ptr, rows_ptr, stride_do_t, stride_do_h, q_start, q_length, across)
    keys = (k_ptr, stride_k_t, stride_k_h, k_start, k_length)
    values = (v_ptr, stride_v_t, stride_v_h, k_start, k_length)
    sums = (acc_ptr, turns_ptr, turns_ptr + (head * slots_q + row) * TURNS + DONE, across)
    dq = (dq_sm, dq_full, dq_empty)
    multiplied = (
        dk_ptr, dv_ptr, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h, k_start, k_length, scale,
    )  # fmt: skip
    gl.warp_specialize([
        (_multiply, (memory, barriers, work, multiplied, 0, SHARED, D, BLOCK_M, STAGES)),
        (_multiply, (memory, barriers, work, multiplied, 1, SHARED, D, BLOCK_M, STAGES)),
        (_fetch, (q_sm, lse_sm, q_full, q_empty, work, queries, 0, SHARED, HEADS, D, BLOCK_M, STAGES)),
        (_fetch, (do_sm, delta_sm, do_full, do_empty, work, outputs, 1, SHARED, HEADS, D, BLOCK_M, STAGES)),
        (_fetch_and_add, (k_sm, k_full, dq, work, keys, sums, 0, SHARED, HEADS, D, BLOCK_M, ORDERED)),
        (_fetch_and_add, (v_sm, v_full, dq, work, values, sums, 1, SHARED, HEADS, D, BLOCK_M, ORDERED)),
    ], [4, 1, 1, 1, 1], [240, 24, 24, 24, 24])  # fmt: skip
