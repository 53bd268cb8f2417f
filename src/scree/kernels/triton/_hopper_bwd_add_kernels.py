"""How the attention backward for Hopper adds up dQ: two warps in turn, in a fixed order of the blocks or in none.

Of each tile of queries a counter says how many blocks of keys have added to its dQ: block j waits until that is j or,
in no order, until the first one is done. That one does not add, but stores, so nobody has to write zeros before.

No block waits in vain. It sees a tile only if all blocks before it do, as there is no window to the left, so each of
them adds to it. And each of them has a program that runs, and that comes to it: running programs take the blocks of a
sequence in their order, and finish what they took in the order in which they took it. Nor does it wait long: all walk
from the last query to the first, so one that starts later is behind.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ._hopper_bwd_dq_kernels import NEXT, TURNS

LINE = gl.constexpr(256)  # elements of dQ that the copy engine sees as a row

_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):  # since Triton 3.8
    _tma_add = tma.async_atomic_add
else:
    from triton._C.libtriton import ir

    @gl._core.builtin
    def _tma_add(desc, coord, src, _semantic=None):
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def _take(turns_ptr, sequence, head, slots_q):
    """Take the next block of keys of a sequence and a head; an integer of some tile of queries counts them."""
    return gl.atomic_add(turns_ptr + (head * slots_q + sequence) * TURNS + NEXT, 1, sem="relaxed")


@gluon.jit
def _await(turn_ptr, turn):
    """Wait until it is one's turn: all that was added before is in memory, and the copy engine may add to it."""
    gl.inline_asm_elementwise(
        """{
            .reg .pred first, early;
            .reg .b32 lane, seen;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            @!first bra done;
            again:
            ld.acquire.gpu.global.b32 seen, [$1];
            setp.lt.s32 early, seen, $2;
            @early bra again;
            done:
            bar.warp.sync 0xffffffff;
            fence.proxy.async;
            mov.b32 $0, lane;
        }""",
        "=r,l,r", [turn_ptr.to(gl.int64), turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_on(turn_ptr, turn):
    """Wait until what this warp had added is in memory, and say so: `tma.store_wait` only waits for it to be read."""
    gl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .b32 lane;
            cp.async.bulk.wait_group 0;
            bar.warp.sync 0xffffffff;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            @first st.release.gpu.global.b32 [$1], $2;
            mov.b32 $0, lane;
        }""",
        "=r,l,r", [turn_ptr.to(gl.int64), turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _done(done_ptr):
    """Count this warp, once all that it had added or stored is in memory: then dQ may be rounded."""
    gl.inline_asm_elementwise(
        """{
            .reg .pred first;
            .reg .b32 lane;
            cp.async.bulk.wait_group 0;
            bar.warp.sync 0xffffffff;
            mov.u32 lane, %laneid;
            setp.eq.u32 first, lane, 0;
            @first red.release.gpu.global.add.s32 [$1], 1;
            mov.b32 $0, lane;
        }""",
        "=r,l", [done_ptr.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _add(
    dq_sm, dq_full, dq_empty, arguments, count,
    TURN: gl.constexpr, SHARED: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, ORDERED: gl.constexpr,
):  # fmt: skip
    """A warp that has every other dQ added to those in memory, from the first on or, where TURN is 1, from the second.

    While one of the two warps waits for what it added to be in memory, the other one adds the next. `tile` is the one that
    holds query 0 of the first head of the group.
    """
    acc_desc, turns_ptr, tile, slots_q, block, begin, end = arguments
    LINES: gl.constexpr = BLOCK_M * D // 2 // LINE
    for at in range(end - BLOCK_M, begin - 1, -BLOCK_M):
        place = tile + at // BLOCK_M
        for _ in range(SHARED):
            if count % 2 == TURN:
                turn_ptr = turns_ptr + place * TURNS
                _await(turn_ptr, block if ORDERED else gl.minimum(block, 1))
                for half in gl.static_range(2):
                    mbarrier.wait(dq_full.index(2 * half + TURN), count // 2 & 1)
                    to = (place * 2 + half) * LINES
                    if block == 0:
                        _tma_store(acc_desc, [to, 0], dq_sm.index(half))
                    else:
                        _tma_add(acc_desc, [to, 0], dq_sm.index(half))
                for half in gl.static_range(2):
                    tma.store_wait(1 - half)
                    mbarrier.arrive(dq_empty.index(half), count=1)
                if ORDERED or block == 0:
                    _pass_on(turn_ptr, block + 1)
            place += slots_q
            count += 1
    return count
