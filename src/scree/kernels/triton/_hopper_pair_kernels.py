"""Attention backward for Hopper (sm_90) at head dim 64, in Gluon: dQ by tiles of queries, dK and dV by tiles of keys.

The same two passes as the portable kernels (FlashAttention-2, algorithm 2), so that each sum has one author. But here a
product runs while others are computed with: that of dO and V under the exponentials, that of the probabilities and dO
under the gradients of the scores. A program is one warpgroup, with so few registers that three or four share a
multiprocessor, and fill the gaps of each other. Copies to shared memory go by rows, each with its own condition: what lies
beyond a sequence is zeros there, whatever is in memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._attention_fwd_kernels import _span, _tile, _work
from ._tiles_kernels import ABSENT

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of a tile, and of a step
D = gl.constexpr(64)

# Later Tritons renamed these.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_ROWWISE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread
_LINE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def _places(stride):
    """Where the elements of a block of rows lie, from its first one."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, _ROWWISE))
    inner = gl.arange(0, D, layout=gl.SliceLayout(0, _ROWWISE))
    return gl.expand_dims(rows * stride.to(gl.int32), 1) + gl.expand_dims(inner, 0)


@gluon.jit
def _present(count):
    """Which of the rows of a block are among its first `count`."""
    return gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, _ROWWISE)) < count, 1)


@gluon.jit
def _copy(to, ptr, at, count, stride):
    """Have the rows from `at` on copied to shared memory: zeros from row `count` on."""
    _load(to, ptr + at * stride + _places(stride), mask=_present(count - at))


@gluon.jit
def _store(ptr, x, count, stride):
    """Store the first `count` rows of a block."""
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), _ROWWISE)
    gl.store(ptr + _places(stride), x, mask=_present(count))


@gluon.jit
def _anew(stride):
    """The same stride; but the compiler does not see that, and keeps nothing that follows from it in registers.

    So places are worked out again at each step, in less time than registers take that are moved to memory and back.
    """
    stride = gl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [stride], dtype=gl.int64, is_pure=False, pack=1)
    return gl.multiple_of(stride, 16)


@gluon.jit
def _arrived():
    """Wait until what was to be copied is there, for all threads, and the tensor cores may read it."""
    async_copy.wait_group(0)
    fence_async_shared()


@gluon.jit
def _fetch_keys(memory, pointers, stage, at, count):
    """Have the keys and values from `at` copied."""
    k_sm, v_sm = memory
    k_ptr, v_ptr, stride_k_t, stride_v_t = pointers
    _copy(k_sm.index(stage), k_ptr, at, count, _anew(stride_k_t))
    _copy(v_sm.index(stage), v_ptr, at, count, _anew(stride_v_t))
    async_copy.commit_group()


@gluon.jit
def _dq_step(
    dq, q_sm, do_sm, memory, pointers, lse, delta, at, end, k_length, high, count, scale,
    MASKED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The keys from `at`; those of the next step are fetched meanwhile."""
    k_sm, v_sm = memory
    stage = count % 2
    _arrived()
    _fetch_keys(memory, pointers, 1 - stage, at + ROWS, gl.where(at + ROWS < end, k_length, 0))
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(q_sm, k_sm.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(do_sm, v_sm.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - gl.expand_dims(lse, 1))
    if MASKED:
        cols = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT)), 0)
        p = gl.where(cols < gl.expand_dims(high - at, 1), p, 0.0)
    p, dp = warpgroup_mma_wait(0, deps=(p, dp))  # p too, so that it is computed before
    ds = (p * (dp - gl.expand_dims(delta, 1))).to(k_sm.dtype)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2))
    dq = warpgroup_mma(ds, k_sm.index(stage), dq, is_async=True)
    return warpgroup_mma_wait(0, deps=(dq,))


@gluon.jit(do_not_specialize=["total_q", "slots", "scale", "right"])
def _hopper_pair_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, tiles_ptr, dq_ptr, delta_ptr, rows_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", stride_do_t: "i64", stride_do_h: "i64", stride_dq_t: "i64", stride_dq_h: "i64",
    total_q: "i64", slots: "i32", scale: "fp32", right: "i32",
    GROUP: gl.constexpr, INNER: gl.constexpr, HAS_RIGHT: gl.constexpr, DLSE: gl.constexpr,
):  # fmt: skip
    """dQ, ``delta = sum(o * do) - dlse`` in `delta` (H, T), and for the other kernel the aligned `rows`.

    `rows` is (H, slots, 2, 64): of every tile the LSE in base 2, filled up with +inf, and delta.
    """
    gdc_launch_dependents()
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    sums: gl.constexpr = gl.SliceLayout(1, _ROWWISE)
    index, head = _work(slots, INNER)
    kind, q_start, q_length, k_start, k_length, block, row = _tile(tiles_ptr, index)
    if kind == ABSENT:
        return
    begin, _, all_end, end = _span(block, q_length, k_length, -1, right, ROWS, ROWS, False, HAS_RIGHT)
    q_sm = gl.allocate_shared_memory(dtype, [ROWS, D], shared)
    do_sm = gl.allocate_shared_memory(dtype, [ROWS, D], shared)
    k_sm = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    v_sm = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    base = q_start + block.to(gl.int64) * ROWS
    left_over = q_length - block * ROWS
    _copy(do_sm, do_ptr + base * stride_do_t + head * stride_do_h, 0, left_over, stride_do_t)
    async_copy.commit_group()
    pointers = (
        k_ptr + k_start * stride_k_t + head // GROUP * stride_k_h,
        v_ptr + k_start * stride_v_t + head // GROUP * stride_v_h,
        stride_k_t, stride_v_t,
    )  # fmt: skip
    _copy(q_sm, q_ptr + base * stride_q_t + head * stride_q_h, 0, left_over, stride_q_t)
    _fetch_keys((k_sm, v_sm), pointers, 0, begin, gl.where(begin < end, k_length, 0))
    o = gl.load(
        o_ptr + base * stride_o_t + head * stride_o_h + _places(stride_o_t), mask=_present(left_over), other=0.0
    )
    local = gl.arange(0, ROWS, layout=sums)
    there = local < left_over
    across = head * total_q + base
    lse = gl.load(lse_ptr + across + local, mask=there, other=float("inf"))
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    async_copy.wait_group(1)
    delta = gl.sum(o.to(gl.float32) * do_sm.load(_ROWWISE).to(gl.float32), 1)
    if DLSE:
        delta -= gl.load(dlse_ptr + across + local, mask=there, other=0.0)
    gl.store(delta_ptr + across + local, delta, mask=there)
    aligned = rows_ptr + (head * slots + q_start // ROWS + row + block) * (2 * ROWS)
    gl.store(aligned + local, lse)
    gl.store(aligned + ROWS + local, delta)

    lse = gl.convert_layout(lse, gl.SliceLayout(1, layout))
    delta = gl.convert_layout(delta, gl.SliceLayout(1, layout))
    rows = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    high = gl.zeros_like(rows) + k_length  # the first key that a query does not see
    if HAS_RIGHT:
        high = gl.minimum(high, rows + (k_length - q_length + right + 1))
    dq = gl.zeros([ROWS, D], gl.float32, layout=layout)
    count = 0
    for at in range(begin, all_end, ROWS):
        dq = _dq_step(
            dq, q_sm, do_sm, (k_sm, v_sm), pointers, lse, delta, at, end, k_length, high, count, scale * LOG2E,
            False, layout,
        )  # fmt: skip
        count += 1
    for at in range(all_end, end, ROWS):
        dq = _dq_step(
            dq, q_sm, do_sm, (k_sm, v_sm), pointers, lse, delta, at, end, k_length, high, count, scale * LOG2E,
            True, layout,
        )  # fmt: skip
        count += 1
    async_copy.wait_group(0)  # the zeros of the step that never comes: others use that memory now
    _store(dq_ptr + base * stride_dq_t + head * stride_dq_h, dq * scale, left_over, stride_dq_t)


@gluon.jit
def _copy_queries(memory, pointers, stage, turn, at, there):
    """Have the queries from `at` of the head of this turn copied, and dO."""
    q_sm, do_sm, _lse_sm, _delta_sm = memory
    q_ptr, do_ptr, _rows_ptr, stride_q_t, stride_q_h, stride_do_t, stride_do_h, _rows_of_a_head = pointers
    _copy(q_sm.index(stage), q_ptr + turn * stride_q_h, at, there, _anew(stride_q_t))
    _copy(do_sm.index(stage), do_ptr + turn * stride_do_h, at, there, _anew(stride_do_t))


@gluon.jit
def _copy_rows(memory, pointers, stage, turn, at, there):
    """Have the LSE and delta of those queries copied: of a whole tile, unless there is none."""
    _q_sm, _do_sm, lse_sm, delta_sm = memory
    rows_ptr, rows_of_a_head = pointers[2], pointers[7]
    rows_ptr += turn * rows_of_a_head + at * 2
    line = gl.arange(0, ROWS, layout=_LINE)
    present = line < gl.where(there > 0, ROWS, 0)
    _load(lse_sm.index(stage), rows_ptr + line, mask=present)
    _load(delta_sm.index(stage), rows_ptr + ROWS + line, mask=present)


@gluon.jit
def _fetch_own(k_sm, v_sm, pointers, base, head, count):
    """Have the keys and values of a tile copied."""
    k_ptr, v_ptr, stride_k_t, stride_k_h, stride_v_t, stride_v_h = pointers
    stride = _anew(stride_k_t)
    _copy(k_sm, k_ptr + base * stride + head * stride_k_h, 0, count, stride)
    stride = _anew(stride_v_t)
    _copy(v_sm, v_ptr + base * stride + head * stride_v_h, 0, count, stride)
    async_copy.commit_group()


@gluon.jit
def _dkv_step(
    dk, dv, k_sm, v_sm, memory, pointers, turn, at, begin, end, q_length, low, count, scale,
    TURNS: gl.constexpr, MASKED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The queries from `at`, scores transposed (keys, queries); those of the next step are fetched meanwhile."""
    q_sm, do_sm, lse_sm, delta_sm = memory
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    line: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    stage = count % 2
    _arrived()
    last = at + ROWS >= end
    next_at = gl.where(last, begin, at + ROWS)
    next_turn = gl.where(last, turn + 1, turn)
    there = gl.where(next_turn < TURNS, q_length, 0)
    _copy_queries(memory, pointers, 1 - stage, next_turn, next_at, there)
    _copy_rows(memory, pointers, 1 - stage, next_turn, next_at, there)
    async_copy.commit_group()
    q = q_sm.index(stage)
    do = do_sm.index(stage)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(k_sm, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_sm, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - gl.expand_dims(lse_sm.index(stage).load(line), 0))
    if MASKED:
        rows = gl.expand_dims(gl.arange(0, ROWS, layout=line), 0)
        p = gl.where(rows >= gl.expand_dims(low - at, 1), p, 0.0)
    pb = gl.convert_layout(p.to(k_sm.dtype), operand)
    p, dp = warpgroup_mma_wait(0, deps=(p, dp))  # p too, so that it is computed before
    dv = warpgroup_mma(pb, do, dv, is_async=True)
    ds = p * (dp - gl.expand_dims(delta_sm.index(stage).load(line), 0))
    ds = gl.convert_layout(ds.to(k_sm.dtype), operand)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    return warpgroup_mma_wait(0, deps=(dk, dv))


@gluon.jit(do_not_specialize=["slots", "slots_q", "scale", "right"])
def _hopper_pair_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32", right: "i32",
    GROUP: gl.constexpr, INNER: gl.constexpr, HEADS: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; the map is that of the keys.

    A program takes HEADS heads in turn, and fetches for the next one while it ends the one before.
    """
    TURNS: gl.constexpr = HEADS * GROUP
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    index, head = _work(slots, INNER)
    head *= HEADS
    kind, k_start, k_length, q_start, q_length, block, row = _tile(tiles_ptr, index)
    if kind == ABSENT:
        gdc_wait()  # so that this kernel never ends before the one that it follows
        return
    begin, all_begin, _, end = _span(block, k_length, q_length, right, -1, ROWS, ROWS, HAS_RIGHT, False)
    k_sm = gl.allocate_shared_memory(dtype, [ROWS, D], shared)
    v_sm = gl.allocate_shared_memory(dtype, [ROWS, D], shared)
    q_sm = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    do_sm = gl.allocate_shared_memory(dtype, [2, ROWS, D], shared)
    lse_sm = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
    delta_sm = gl.allocate_shared_memory(gl.float32, [2, ROWS], plain)
    memory = (q_sm, do_sm, lse_sm, delta_sm)
    pointers = (
        q_ptr + q_start * stride_q_t + head * GROUP * stride_q_h,
        do_ptr + q_start * stride_do_t + head * GROUP * stride_do_h,
        rows_ptr + (head * GROUP * slots_q + q_start // ROWS + row) * (2 * ROWS),
        stride_q_t, stride_q_h, stride_do_t, stride_do_h, slots_q * (2 * ROWS),
    )  # fmt: skip
    own = (k_ptr, v_ptr, stride_k_t, stride_k_h, stride_v_t, stride_v_h)
    # The first query that sees a key. Queries beyond the last have an LSE of +inf.
    low = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) + (q_length - k_length - right)
    scale_2 = scale * LOG2E
    count = 0
    there = gl.where(begin < end, q_length, 0)
    _copy_queries(memory, pointers, 0, 0, begin, there)
    base = k_start + block.to(gl.int64) * ROWS
    _fetch_own(k_sm, v_sm, own, base, head, k_length - block * ROWS)
    gdc_wait()  # for `rows`: this kernel starts, and fetches the rest, before the one that writes them ends
    _copy_rows(memory, pointers, 0, 0, begin, there)
    async_copy.commit_group()
    for mine in range(HEADS):
        dk = gl.zeros([ROWS, D], gl.float32, layout=layout)
        dv = gl.zeros([ROWS, D], gl.float32, layout=layout)
        for turn in range(mine * GROUP, mine * GROUP + GROUP):
            if HAS_RIGHT:
                for at in range(begin, gl.minimum(all_begin, end), ROWS):
                    dk, dv = _dkv_step(
                        dk, dv, k_sm, v_sm, memory, pointers, turn, at, begin, end, q_length, low, count, scale_2,
                        TURNS, True, layout,
                    )  # fmt: skip
                    count += 1
            for at in range(all_begin, end, ROWS):
                dk, dv = _dkv_step(
                    dk, dv, k_sm, v_sm, memory, pointers, turn, at, begin, end, q_length, low, count, scale_2,
                    TURNS, False, layout,
                )  # fmt: skip
                count += 1
        # The tile is read again: what it says would otherwise fill registers all through the loops.
        _kind, k_start, k_length, _start, _length, block, _row = _tile(tiles_ptr, index)
        base = k_start + block.to(gl.int64) * ROWS
        left_over = k_length - block * ROWS
        if HEADS > 1:
            _barrier()  # all are done with this head
            _fetch_own(k_sm, v_sm, own, base, head + mine + 1, gl.where(mine + 1 < HEADS, left_over, 0))
        else:
            async_copy.wait_group(0)  # the zeros of the step that never comes: others use that memory now
        stride = _anew(stride_dk_t)
        _store(dk_ptr + base * stride + (head + mine) * stride_dk_h, dk * scale, left_over, stride)
        stride = _anew(stride_dv_t)
        _store(dv_ptr + base * stride + (head + mine) * stride_dv_h, dv, left_over, stride)
