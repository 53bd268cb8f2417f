"""Attention backward for Hopper (sm_90) at head dim 64, in Gluon: dQ by tiles of queries, dK and dV by tiles of keys.

The same two passes as the portable kernels (FlashAttention-2, algorithm 2), so that each sum has one author. But here a
program is one warpgroup, with so few registers that three or four share a multiprocessor, and fill the gaps of each other,
and products run beside other work. Where sequences are short, programs of the second kernel take some of them whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._attention_fwd_kernels import _span, _tile, _work
from ._hopper_pair_steps_kernels import (
    _ROWWISE,
    LOG2E,
    ROWS,
    D,
    _add_dkv,
    _add_dq,
    _anew,
    _arrived,
    _barrier,
    _copy,
    _load,
    _places,
    _present,
    _store,
)
from ._hopper_pair_whole_kernels import _whole
from ._tiles_kernels import ABSENT, WHOLE

_LINE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


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
    return _add_dq(
        dq, q_sm, do_sm, k_sm.index(stage), v_sm.index(stage), lse, delta, at, high, scale, MASKED, LAYOUT
    )  # fmt: skip


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
    local = gl.arange(0, ROWS, layout=sums)
    there = local < left_over
    across = head * total_q + base
    o = gl.load(
        o_ptr + base * stride_o_t + head * stride_o_h + _places(stride_o_t), mask=_present(left_over), other=0.0
    )
    lse = gl.load(lse_ptr + across + local, mask=there, other=float("inf"))
    if DLSE:
        dlse = gl.load(dlse_ptr + across + local, mask=there, other=0.0)
    pointers = (
        k_ptr + k_start * stride_k_t + head // GROUP * stride_k_h,
        v_ptr + k_start * stride_v_t + head // GROUP * stride_v_h,
        stride_k_t, stride_v_t,
    )  # fmt: skip
    if left_over > 0:  # always: so that ptxas leaves the loads above where they are, and does not wait for memory twice
        _copy(do_sm, do_ptr + base * stride_do_t + head * stride_do_h, 0, left_over, stride_do_t)
        async_copy.commit_group()
        _copy(q_sm, q_ptr + base * stride_q_t + head * stride_q_h, 0, left_over, stride_q_t)
        _fetch_keys((k_sm, v_sm), pointers, 0, begin, gl.where(begin < end, k_length, 0))
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    async_copy.wait_group(1)
    delta = gl.sum(o.to(gl.float32) * do_sm.load(_ROWWISE).to(gl.float32), 1)
    if DLSE:
        delta -= dlse
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
    """The queries from `at`; those of the next step are fetched meanwhile."""
    q_sm, do_sm, lse_sm, delta_sm = memory
    stage = count % 2
    _arrived()
    last = at + ROWS >= end
    next_at = gl.where(last, begin, at + ROWS)
    next_turn = gl.where(last, turn + 1, turn)
    there = gl.where(next_turn < TURNS, q_length, 0)
    _copy_queries(memory, pointers, 1 - stage, next_turn, next_at, there)
    _copy_rows(memory, pointers, 1 - stage, next_turn, next_at, there)
    async_copy.commit_group()
    return _add_dkv(
        dk, dv, k_sm, v_sm, q_sm.index(stage), do_sm.index(stage), lse_sm.index(stage), delta_sm.index(stage),
        at, low, scale, MASKED, LAYOUT,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["slots", "slots_q", "total_q", "scale", "right"])
def _hopper_pair_dkv_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, rows_ptr, tiles_ptr, dq_ptr, dk_ptr, dv_ptr, delta_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", stride_do_t: "i64", stride_do_h: "i64", stride_dq_t: "i64", stride_dq_h: "i64",
    stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64", stride_dv_h: "i64",
    slots: "i32", slots_q: "i64", total_q: "i64", scale: "fp32", right: "i32",
    GROUP: gl.constexpr, INNER: gl.constexpr, HEADS: gl.constexpr, HAS_RIGHT: gl.constexpr, DLSE: gl.constexpr,
    WHOLES: gl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; the map is that of the keys.

    A program takes HEADS heads in turn, and fetches for the next one while it ends the one before. With WHOLES there may be
    sequences in the map that it takes whole: it computes their dQ and delta, too, and the other kernel leaves them out.
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
    if WHOLES:
        if kind == WHOLE:
            arguments = (
                (q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr),
                (stride_q_t, stride_k_t, stride_v_t, stride_o_t, stride_do_t, stride_dq_t, stride_dk_t, stride_dv_t),
                (stride_q_h, stride_k_h, stride_v_h, stride_o_h, stride_do_h, stride_dq_h, stride_dk_h, stride_dv_h),
                (lse_ptr, dlse_ptr, delta_ptr), (q_start, q_length, k_start, k_length, total_q), scale, right,
            )  # fmt: skip
            if HEADS == 1:
                if block == 0:
                    _whole(arguments, head, HAS_RIGHT, DLSE)
            else:
                programs = (k_length + ROWS - 1) // ROWS  # one for each block of keys: they share the heads
                for mine in range(block * HEADS // programs, (block + 1) * HEADS // programs):
                    _whole(arguments, head + mine, HAS_RIGHT, DLSE)
            gdc_wait()
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
