"""Steps of the attention backward for Hopper (sm_90) at head dim 64, in Gluon: copies to shared memory, and products.

A product runs while others are computed with: that of dO and V under the exponentials, that of the probabilities and dO
under the gradients of the scores. Copies go by rows, each with its own condition: what lies beyond a sequence is zeros in
shared memory, whatever is in memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(64)  # of a tile, and of a step
D = gl.constexpr(64)

# Later Tritons renamed these.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

_ROWWISE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread


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
def _add_dq(
    dq, q_sm, do_sm, k_sm, v_sm, lse, delta, at, high, scale, MASKED: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """What the keys from `at` add to dQ of a block of queries."""
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(q_sm, k_sm.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(do_sm, v_sm.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - gl.expand_dims(lse, 1))
    if MASKED:
        cols = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT)), 0)
        p = gl.where(cols < gl.expand_dims(high - at, 1), p, 0.0)
    p, dp = warpgroup_mma_wait(0, deps=(p, dp))  # p too, so that it is computed before
    ds = (p * (dp - gl.expand_dims(delta, 1))).to(k_sm.dtype)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2))
    dq = warpgroup_mma(ds, k_sm, dq, is_async=True)
    return warpgroup_mma_wait(0, deps=(dq,))


@gluon.jit
def _add_dkv(
    dk, dv, k_sm, v_sm, q_sm, do_sm, lse_sm, delta_sm, at, low, scale, MASKED: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """What the queries from `at` add to dK and dV of a block of keys: scores are transposed (keys, queries)."""
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    line: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(k_sm, q_sm.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_sm, do_sm.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - gl.expand_dims(lse_sm.load(line), 0))
    if MASKED:
        rows = gl.expand_dims(gl.arange(0, ROWS, layout=line), 0)
        p = gl.where(rows >= gl.expand_dims(low - at, 1), p, 0.0)
    pb = gl.convert_layout(p.to(k_sm.dtype), operand)
    p, dp = warpgroup_mma_wait(0, deps=(p, dp))  # p too, so that it is computed before
    dv = warpgroup_mma(pb, do_sm, dv, is_async=True)
    ds = p * (dp - gl.expand_dims(delta_sm.load(line), 0))
    ds = gl.convert_layout(ds.to(k_sm.dtype), operand)
    dk = warpgroup_mma(ds, q_sm, dk, is_async=True)
    return warpgroup_mma_wait(0, deps=(dk, dv))
