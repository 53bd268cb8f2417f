"""Attention backward for Hopper (sm_90) at head dim 64, in Gluon: all gradients of a short sequence and a head.

A program has all that a sequence has of one head in shared memory, where the pair of kernels reads it once for each block
of the other side. Then it does what programs of both would do, one tile after another: the same products and sums in the
same order, so that the bits are the same and the host may choose either. Nothing in shared memory changes any more, so a
step has no copies and no barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ._attention_fwd_kernels import _span
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
    _places,
    _present,
    _store,
)

BLOCKS = gl.constexpr(2)  # of a sequence, at most: three programs run at once, as of the kernel that this is a part of


@gluon.jit
def _again(block):
    """The same number, but the compiler does not see that.

    Of two loops that find the same operands, ptxas (12.8) works out where those are before the first one only, and skips
    that with the loop.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [block], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fetch(memory, pointers, strides, q_length, k_length):
    """Have all blocks of a sequence and a head copied: dO, then the rest."""
    q_sm, k_sm, v_sm, do_sm = memory
    q_ptr, k_ptr, v_ptr, do_ptr = pointers
    stride_q_t, stride_k_t, stride_v_t, stride_do_t = strides
    for block in gl.static_range(BLOCKS):
        if block * ROWS < q_length:
            _copy(do_sm.index(block), do_ptr, block * ROWS, q_length, _anew(stride_do_t))
    async_copy.commit_group()
    for block in gl.static_range(BLOCKS):
        if block * ROWS < q_length:
            _copy(q_sm.index(block), q_ptr, block * ROWS, q_length, _anew(stride_q_t))
        if block * ROWS < k_length:
            _copy(k_sm.index(block), k_ptr, block * ROWS, k_length, _anew(stride_k_t))
            _copy(v_sm.index(block), v_ptr, block * ROWS, k_length, _anew(stride_v_t))
    async_copy.commit_group()


@gluon.jit
def _rows(o_ptr, lse_ptr, stride_o_t, q_length):
    """Load O and LSE, for each block: before the copies, which they would otherwise queue behind."""
    local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, _ROWWISE))
    rows = ()
    for block in gl.static_range(BLOCKS):
        left_over = q_length - block * ROWS
        places = block * ROWS * stride_o_t + _places(stride_o_t)
        o = gl.load(o_ptr + places, mask=_present(left_over), other=0.0)
        lse = gl.load(lse_ptr + (block * ROWS + local), mask=local < left_over, other=float("inf"))
        rows = rows + ((o, lse),)  # noqa: RUF005 (Gluon has no star)
    return rows


@gluon.jit
def _prepare(memory, rows, dlse_ptr, delta_ptr, q_length, DLSE: gl.constexpr):
    """Put LSE in base 2, +inf beyond the last query, and delta beside what is copied, and wait for that."""
    do_sm, lse_sm, delta_sm = memory
    local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, _ROWWISE))
    async_copy.wait_group(1)
    for block in gl.static_range(BLOCKS):
        if block * ROWS < q_length:
            there = local < q_length - block * ROWS
            o, lse = rows[block]
            delta = gl.sum(o.to(gl.float32) * do_sm.index(block).load(_ROWWISE).to(gl.float32), 1)
            if DLSE:
                delta -= gl.load(dlse_ptr + (block * ROWS + local), mask=there, other=0.0)
            gl.store(delta_ptr + (block * ROWS + local), delta, mask=there)
            lse_sm.index(block).store(gl.where(lse == float("-inf"), float("inf"), lse * LOG2E))
            delta_sm.index(block).store(delta)
    _arrived()
    _barrier()


@gluon.jit
def _dq_of_all(
    memory, dq_ptr, stride_dq_t, q_length, k_length, scale, right, HAS_RIGHT: gl.constexpr, LAYOUT: gl.constexpr
):
    """Compute dQ, one block of queries after another."""
    q_sm, k_sm, v_sm, do_sm, lse_sm, delta_sm = memory
    column: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    scale_2 = scale * LOG2E
    for block in range((q_length + ROWS - 1) // ROWS):
        begin, _, all_end, end = _span(block, q_length, k_length, -1, right, ROWS, ROWS, False, HAS_RIGHT)
        q = q_sm.index(block)
        do = do_sm.index(block)
        lse = lse_sm.index(block).load(column)
        delta = delta_sm.index(block).load(column)
        rows = block * ROWS + gl.arange(0, ROWS, layout=column)
        high = gl.zeros_like(rows) + k_length  # the first key that a query does not see
        if HAS_RIGHT:
            high = gl.minimum(high, rows + (k_length - q_length + right + 1))
        dq = gl.zeros([ROWS, D], gl.float32, layout=LAYOUT)
        for at in range(begin, all_end, ROWS):
            k = k_sm.index(at // ROWS)
            v = v_sm.index(at // ROWS)
            dq = _add_dq(dq, q, do, k, v, lse, delta, at, high, scale_2, False, LAYOUT)
        block = _again(block)
        q = q_sm.index(block)
        do = do_sm.index(block)
        for at in range(all_end, end, ROWS):
            k = k_sm.index(at // ROWS)
            v = v_sm.index(at // ROWS)
            dq = _add_dq(dq, q, do, k, v, lse, delta, at, high, scale_2, True, LAYOUT)
        stride = _anew(stride_dq_t)
        _store(dq_ptr + block * ROWS * stride, dq * scale, q_length - block * ROWS, stride)


@gluon.jit
def _dkv_of_all(memory, pointers, q_length, k_length, scale, right, HAS_RIGHT: gl.constexpr, LAYOUT: gl.constexpr):
    """Compute dK and dV, one block of keys after another."""
    dk_ptr, dv_ptr, stride_dk_t, stride_dv_t = pointers
    q_sm, k_sm, v_sm, do_sm, lse_sm, delta_sm = memory
    scale_2 = scale * LOG2E
    for block in range((k_length + ROWS - 1) // ROWS):
        begin, all_begin, _, end = _span(block, k_length, q_length, right, -1, ROWS, ROWS, HAS_RIGHT, False)
        k = k_sm.index(block)
        v = v_sm.index(block)
        low = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) + (q_length - k_length - right)
        dk = gl.zeros([ROWS, D], gl.float32, layout=LAYOUT)
        dv = gl.zeros([ROWS, D], gl.float32, layout=LAYOUT)
        if HAS_RIGHT:
            for at in range(begin, gl.minimum(all_begin, end), ROWS):
                i = at // ROWS
                dk, dv = _add_dkv(
                    dk, dv, k, v, q_sm.index(i), do_sm.index(i), lse_sm.index(i), delta_sm.index(i),
                    at, low, scale_2, True, LAYOUT,
                )  # fmt: skip
            block = _again(block)
            k = k_sm.index(block)
            v = v_sm.index(block)
        for at in range(all_begin, end, ROWS):
            i = at // ROWS
            dk, dv = _add_dkv(
                dk, dv, k, v, q_sm.index(i), do_sm.index(i), lse_sm.index(i), delta_sm.index(i),
                at, low, scale_2, False, LAYOUT,
            )  # fmt: skip
        stride = _anew(stride_dk_t)
        _store(dk_ptr + block * ROWS * stride, dk * scale, k_length - block * ROWS, stride)
        stride = _anew(stride_dv_t)
        _store(dv_ptr + block * ROWS * stride, dv, k_length - block * ROWS, stride)


@gluon.jit
def _whole(arguments, head, HAS_RIGHT: gl.constexpr, DLSE: gl.constexpr):
    """dQ, dK, dV and delta of one sequence and head."""
    pointers, strides_t, strides_h, of_rows, sequence, scale, right = arguments
    stride_q_t, stride_k_t, stride_v_t, stride_o_t, stride_do_t, stride_dq_t, stride_dk_t, stride_dv_t = strides_t
    q_start, q_length, k_start, k_length, total_q = sequence
    lse_ptr, dlse_ptr, delta_ptr = of_rows
    across = head * total_q + q_start
    q_ptr = pointers[0] + q_start * stride_q_t + head * strides_h[0]
    k_ptr = pointers[1] + k_start * stride_k_t + head * strides_h[1]
    v_ptr = pointers[2] + k_start * stride_v_t + head * strides_h[2]
    o_ptr = pointers[3] + q_start * stride_o_t + head * strides_h[3]
    do_ptr = pointers[4] + q_start * stride_do_t + head * strides_h[4]
    dq_ptr = pointers[5] + q_start * stride_dq_t + head * strides_h[5]
    dk_ptr = pointers[6] + k_start * stride_dk_t + head * strides_h[6]
    dv_ptr = pointers[7] + k_start * stride_dv_t + head * strides_h[7]
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    q_sm = gl.allocate_shared_memory(dtype, [BLOCKS, ROWS, D], shared)
    k_sm = gl.allocate_shared_memory(dtype, [BLOCKS, ROWS, D], shared)
    v_sm = gl.allocate_shared_memory(dtype, [BLOCKS, ROWS, D], shared)
    do_sm = gl.allocate_shared_memory(dtype, [BLOCKS, ROWS, D], shared)
    lse_sm = gl.allocate_shared_memory(gl.float32, [BLOCKS, ROWS], plain)
    delta_sm = gl.allocate_shared_memory(gl.float32, [BLOCKS, ROWS], plain)
    rows = _rows(o_ptr, lse_ptr + across, stride_o_t, q_length)
    strides = (stride_q_t, stride_k_t, stride_v_t, stride_do_t)
    _fetch((q_sm, k_sm, v_sm, do_sm), (q_ptr, k_ptr, v_ptr, do_ptr), strides, q_length, k_length)
    _prepare((do_sm, lse_sm, delta_sm), rows, dlse_ptr + across, delta_ptr + across, q_length, DLSE)
    memory = (q_sm, k_sm, v_sm, do_sm, lse_sm, delta_sm)
    _dq_of_all(memory, dq_ptr, stride_dq_t, q_length, k_length, scale, right, HAS_RIGHT, layout)
    pointers = (dk_ptr, dv_ptr, stride_dk_t, stride_dv_t)
    _dkv_of_all(memory, pointers, q_length, k_length, scale, right, HAS_RIGHT, layout)
