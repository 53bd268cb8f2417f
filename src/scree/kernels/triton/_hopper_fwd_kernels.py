"""Attention forward for Hopper (sm_90), in Gluon: a warp that copies, and warpgroups that multiply.

Each program takes tiles from a shared counter until there are none. One warp fetches the blocks of queries, keys and
values of its tiles, and those of the next tile while the last one is finished; each of the warpgroups computes 64
queries of the tile, and overlaps the scores of one block with the values of the block before (FlashAttention-3).
"""

import triton
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
from ._tiles_kernels import ABSENT, SPARE

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
TOP = gl.constexpr(2**30)
FAR = gl.constexpr(2**34)
ROWS = gl.constexpr(64)
FIELDS = gl.constexpr(8)
MOST = gl.constexpr(0x7FFF0000)

# Triton 3.8 renamed both.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _ragged_descriptor(ptr, stride_t, width, BLOCK: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """A descriptor whose boxes end where the caller says that a sequence ends (see `_ragged`).

    The address of an element is ``A * (FAR - stride) + B * stride + C * stride + D`` in 64 bits, which wrap around:
    A = TOP takes away what C = TOP - length + row has too much, and B = start + length is free of bounds; so the
    bounds of C, which end at TOP, are those of the sequence.
    """
    far: gl.constexpr = FAR
    return tma.make_tensor_descriptor(
        ptr, [MOST, MOST, TOP, width], [far - stride_t, stride_t, stride_t, 1], [1, 1, BLOCK, WIDTH], LAYOUT
    )


@gluon.jit
def _load(desc, start, length, row, column, barrier, to):
    """Rows `row` and on of the sequence; zeros beyond its length, whatever lies there in memory."""
    _tma_load(desc, [TOP, start + length, TOP - length + row, column], barrier, to)


@gluon.jit
def _barrier_sync(NAME: gl.constexpr, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(
        "{ bar.sync " + NAME + ", " + THREADS + "; mov.u32 $0, 0; }", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _barrier_arrive(NAME: gl.constexpr, THREADS: gl.constexpr):
    gl.inline_asm_elementwise(
        "{ bar.arrive " + NAME + ", " + THREADS + "; mov.u32 $0, 0; }", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _hold(x):
    """x, of four elements a thread and none negative, behind a branch that nothing is moved across and none takes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred negative;
        .reg .f32 least;
        min.f32 least, $4, $5;
        min.f32 least, least, $6;
        min.f32 least, least, $7;
        setp.lt.f32 negative, least, 0f00000000;
        @negative nanosleep.u32 0;
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        }""",
        "=r,=r,=r,=r,r,r,r,r", [x], dtype=gl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _read(memory, place):
    return gl.max(memory.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _write(memory, place, value, WARPS: gl.constexpr):
    memory.index(place).store(gl.full([1], value, gl.int32, layout=gl.BlockedLayout([1], [32], [WARPS], [0])))


@gluon.jit
def _sum(p, EIGHT: gl.constexpr):
    """Sums along a row, EIGHT of them, so that no thread needs another's; the rows' own sums if EIGHT is 1."""
    if EIGHT == 1:
        return gl.sum(p, 1)
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // EIGHT, EIGHT]), 1)


@gluon.jit
def _scores(
    s, at, low, high, scale, softcap,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Scores as they go into the maximum; -inf where a row does not see a column."""
    if SOFTCAP:
        x = s * (scale / softcap)
        s = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + gl.exp2(x * (2.0 * LOG2E))))
    elif SCALED:
        s = s * (scale * LOG2E)
    if LEFT or RIGHT:
        cols = gl.expand_dims(gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)), 0)
        if RIGHT:
            s = gl.where(cols < gl.expand_dims(high - at, 1), s, float("-inf"))
        if LEFT:
            s = gl.where(cols >= gl.expand_dims(low - at, 1), s, float("-inf"))
    return s


@gluon.jit
def _probabilities(s, top, scale, PLAIN: gl.constexpr):
    """(p, factor on what was summed before, new maximum), all in base 2. PLAIN scores are not scaled yet."""
    if PLAIN:
        new_top = gl.maximum(top, gl.max(s, 1) * (scale * LOG2E))
        finite = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s * (scale * LOG2E) - gl.expand_dims(finite, 1))
    else:
        new_top = gl.maximum(top, gl.max(s, 1))
        finite = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s - gl.expand_dims(finite, 1))
    return p, gl.exp2(top - finite), new_top


@gluon.jit
def _step(
    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high, scale, softcap,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, SCALED: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
    PINGPONG: gl.constexpr, EIGHT: gl.constexpr, TIED: gl.constexpr, LATE: gl.constexpr, MERGE: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of block `count`, and the values of the block before, both at once."""
    stage = count % STAGES
    before = (count - 1) % STAGES
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    if PINGPONG:
        if GROUP == 0:
            _barrier_sync("9", "256")
        else:
            _barrier_sync("10", "256")
    s = warpgroup_mma(q, k_sm.index(stage).reshape([BLOCK_N, D]).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
    o = warpgroup_mma(p, v_sm.index(before).reshape([BLOCK_N, D_V]), o, is_async=True)
    if PINGPONG:
        if GROUP == 0:
            _barrier_arrive("10", "256")
        else:
            _barrier_arrive("9", "256")
    s = warpgroup_mma_wait(1, deps=(s,))
    if not MERGE:
        mbarrier.arrive(k_empty.index(stage), count=1)
    s = _scores(s, at, low, high, scale, softcap, SOFTCAP, SCALED, LEFT, RIGHT)
    new_p, keep, top = _probabilities(s, top, scale, not (SOFTCAP or SCALED))
    sums = _sum(new_p, EIGHT)
    if EIGHT == 1:
        total = total * keep + sums
    else:
        total = total * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, sums.type.layout)), 1) + sums
    if LATE:
        total = _hold(total)
    new_p = gl.convert_layout(new_p.to(q.dtype), P_LAYOUT)
    if TIED:  # else the compiler waits for the values before it computes the probabilities
        o, new_p = warpgroup_mma_wait(0, deps=(o, new_p))
    else:
        o = warpgroup_mma_wait(0, deps=(o,))
    mbarrier.arrive(v_empty.index(before), count=1)
    if MERGE:
        mbarrier.arrive(k_empty.index(stage), count=1)
    o = o * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, O_LAYOUT)), 1)
    return o, new_p, top, total


@gluon.jit
def _multiply(
    memory, barriers, arguments,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, SINKS: gl.constexpr, PINGPONG: gl.constexpr, EIGHT: gl.constexpr, TIED: gl.constexpr, LATE: gl.constexpr, MERGE: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: rows ``64 * GROUP`` to ``64 * GROUP + 64`` of every tile."""
    q_sm, k_sm, v_sm, o_sm, tile_sm = memory
    tile_full, tile_empty, k_full, k_empty, v_full, v_empty = barriers
    o_desc, sinks_ptr, lse_ptr, stride_o_h, total_q, scale, softcap, left, right = arguments
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    o_tile = o_sm.index(GROUP)
    if PINGPONG:
        if GROUP == 1:
            _barrier_arrive("9", "256")
    turn = 0
    count = 0
    mbarrier.wait(tile_full.index(0), 0)
    kind = _read(tile_sm, 0)
    while kind != ABSENT:
        slot = turn % TILES
        q = q_sm.index(slot * GROUPS + GROUP).reshape([ROWS, D])
        q_start = _read(tile_sm, slot * FIELDS + 1)
        q_length = _read(tile_sm, slot * FIELDS + 2)
        k_length = _read(tile_sm, slot * FIELDS + 3)
        block = _read(tile_sm, slot * FIELDS + 4)
        head = _read(tile_sm, slot * FIELDS + 5)
        begin, all_begin, all_end, end = _span(
            block, q_length, k_length, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        steps = gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)
        rows = block * BLOCK_M + GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        high = k_length + gl.zeros_like(rows)
        low = gl.zeros_like(rows)
        if HAS_RIGHT:
            high = gl.minimum(high, rows + (k_length - q_length + right + 1))
        if HAS_LEFT:
            low = rows + (k_length - q_length - left)

        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), count // STAGES & 1)
        s = warpgroup_mma(
            q, k_sm.index(stage).reshape([BLOCK_N, D]).permute((1, 0)),
            gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout), use_acc=False, is_async=True,
        )  # fmt: skip
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        last = begin + (steps - 1) * BLOCK_N
        s = _scores(s, last, low, high, scale, softcap, SOFTCAP, SCALED, HAS_LEFT, True)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, s_layout))
        p, _, top = _probabilities(s, top, scale, not (SOFTCAP or SCALED))
        total = _sum(p, EIGHT)
        p = gl.convert_layout(p.to(q.dtype), p_layout)
        o = gl.zeros([ROWS, D_V], gl.float32, layout=o_layout)
        count += 1
        if HAS_RIGHT:  # without it only the last block, which comes first, can be masked
            for at in range(last - BLOCK_N, all_end - 1, -BLOCK_N):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high,
                    scale, softcap, HAS_LEFT, True, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        if UNROLL:
            clear = gl.maximum(gl.minimum(last, all_end) - all_begin, 0) // BLOCK_N
            for _i in range(clear // 2):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, last, low, high,
                    scale, softcap, False, False, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count + 1, last, low, high,
                    scale, softcap, False, False, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 2
            if clear % 2 == 1:
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, last, low, high,
                    scale, softcap, False, False, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        else:
            for at in range(gl.minimum(last, all_end) - BLOCK_N, all_begin - 1, -BLOCK_N):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, last, low, high,
                    scale, softcap, False, False, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        if HAS_LEFT:
            for at in range(gl.minimum(last, all_begin) - BLOCK_N, begin - 1, -BLOCK_N):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high,
                    scale, softcap, True, False, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, PINGPONG, EIGHT, TIED, LATE, MERGE, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        mbarrier.arrive(tile_empty.index(slot), count=1)
        before = (count - 1) % STAGES
        mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
        o = warpgroup_mma(p, v_sm.index(before).reshape([BLOCK_N, D_V]), o, is_async=True)
        if EIGHT != 1:
            total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, s_layout))
        rescale = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
        if SINKS:
            sink = gl.load(sinks_ptr + head).to(gl.float32) * LOG2E
            new_top = gl.maximum(top, sink)
            finite = gl.where(new_top == float("-inf"), 0.0, new_top)
            rescale = gl.exp2(top - finite)
            total = total * rescale + gl.exp2(sink - finite)
            top = new_top
        none = total == 0
        rescale = rescale / gl.where(none, 1.0, total)
        lse = (gl.where(none, 0.0, top) + gl.log2(gl.where(none, 1.0, total))) * LN2
        lse = gl.where(none, float("-inf"), lse)
        lse = gl.where(kind == SPARE, 0.0, lse)
        gl.store(lse_ptr + (head.to(gl.int64) * total_q + q_start) + rows, lse, mask=rows < q_length)
        tma.store_wait(0)  # the last tile's copy reads from where this one's goes
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, o_layout)), 1)
        o_tile.reshape([ROWS, D_V]).store(o.to(q.dtype))
        fence_async_shared()
        row = TOP - q_length + block * BLOCK_M + GROUP * ROWS
        _tma_store(o_desc, [TOP, q_start + q_length, row, (head * stride_o_h).to(gl.int32)], o_tile)
        turn += 1
        mbarrier.wait(tile_full.index(turn % TILES), turn // TILES & 1)
        kind = _read(tile_sm, turn % TILES * FIELDS)
    tma.store_wait(0)


@gluon.jit
def _copy(
    memory, barriers, arguments,
    SHARED: gl.constexpr, GROUPS: gl.constexpr, INNER: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The warp that copies: takes tiles, tells the others which, and fetches what they need in the order of their use."""
    q_sm, k_sm, v_sm, _, tile_sm = memory
    tile_full, tile_empty, k_full, k_empty, v_full, v_empty = barriers
    q_desc, k_desc, v_desc, tiles_ptr, counters_ptr, stride_q_h, stride_k_h, stride_v_h, slots, items, left, right = arguments
    BLOCK_M: gl.constexpr = ROWS * GROUPS
    turn = 0
    count = 0
    index = gl.program_id(0)
    while index < items:
        outer = index // INNER
        head = outer // slots * INNER + index % INNER
        kind, q_from, q_length, k_from, k_length, block, _row = _tile(tiles_ptr, outer % slots)
        if kind != ABSENT:
            slot = turn % TILES
            q_start = q_from.to(gl.int32)
            k_start = k_from.to(gl.int32)
            mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
            _write(tile_sm, slot * FIELDS, kind, WARPS)
            _write(tile_sm, slot * FIELDS + 1, q_start, WARPS)
            _write(tile_sm, slot * FIELDS + 2, q_length, WARPS)
            _write(tile_sm, slot * FIELDS + 3, k_length, WARPS)
            _write(tile_sm, slot * FIELDS + 4, block, WARPS)
            _write(tile_sm, slot * FIELDS + 5, head, WARPS)
            full = tile_full.index(slot)
            mbarrier.arrive(full, count=1)
            mbarrier.expect(full, GROUPS * q_desc.block_type.nbytes)
            q_column = (head * stride_q_h).to(gl.int32)
            for group in gl.static_range(GROUPS):
                to = q_sm.index(slot * GROUPS + group)
                _load(q_desc, q_start, q_length, block * BLOCK_M + group * ROWS, q_column, full, to)
            begin, _a, _b, end = _span(block, q_length, k_length, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
            steps = gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)
            k_column = (head // SHARED * stride_k_h).to(gl.int32)
            v_column = (head // SHARED * stride_v_h).to(gl.int32)
            for i in range(steps):
                at = begin + (steps - 1 - i) * BLOCK_N
                stage = count % STAGES
                free = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), free)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                _load(k_desc, k_start, k_length, at, k_column, k_full.index(stage), k_sm.index(stage))
                mbarrier.wait(v_empty.index(stage), free)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                _load(v_desc, k_start, k_length, at, v_column, v_full.index(stage), v_sm.index(stage))
                count += 1
            turn += 1
        index = gl.num_programs(0) + gl.atomic_add(counters_ptr, 1, sem="relaxed")
    slot = turn % TILES
    mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
    _write(tile_sm, slot * FIELDS, ABSENT, WARPS)
    mbarrier.arrive(tile_full.index(slot), count=2)
    if gl.atomic_add(counters_ptr + 1, 1) == gl.num_programs(0) - 1:  # all have taken their last: ready for the next launch
        gl.store(counters_ptr, 0)
        gl.store(counters_ptr + 1, 0)


@gluon.jit(do_not_specialize=["total_q", "slots", "items", "scale", "softcap", "left", "right"])
def _hopper_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, tiles_ptr, counters_ptr, o_ptr, lse_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", total_q: "i64", slots: "i32", items: "i32", scale: "fp32", softcap: "fp32",
    left: "i32", right: "i32",
    HEADS: gl.constexpr, SHARED: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, SINKS: gl.constexpr, PINGPONG: gl.constexpr, EIGHT: gl.constexpr, TIED: gl.constexpr, LATE: gl.constexpr, MERGE: gl.constexpr, UNROLL: gl.constexpr,
):  # fmt: skip
    """Online softmax over the keys, last block first; the LSE in `lse` (H, T)."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    q_desc = _ragged_descriptor(q_ptr, stride_q_t, ((HEADS - 1) * stride_q_h + D).to(gl.int32), ROWS, D, layout)
    k_width = ((HEADS // SHARED - 1) * stride_k_h + D).to(gl.int32)
    k_desc = _ragged_descriptor(k_ptr, stride_k_t, k_width, BLOCK_N, D, layout)
    v_width = ((HEADS // SHARED - 1) * stride_v_h + D_V).to(gl.int32)
    v_desc = _ragged_descriptor(v_ptr, stride_v_t, v_width, BLOCK_N, D_V, layout)
    o_desc = _ragged_descriptor(o_ptr, stride_o_t, ((HEADS - 1) * stride_o_h + D_V).to(gl.int32), ROWS, D_V, layout)
    q_sm = gl.allocate_shared_memory(dtype, [TILES * GROUPS, 1, 1, ROWS, D], layout)
    k_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], layout)
    v_sm = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D_V], layout)
    o_sm = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D_V], layout)
    tile_sm = gl.allocate_shared_memory(gl.int32, [TILES * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    one: gl.constexpr = mbarrier.MBarrierLayout()
    tile_full = gl.allocate_shared_memory(gl.int64, [TILES, 1], one)
    tile_empty = gl.allocate_shared_memory(gl.int64, [TILES, 1], one)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for i in gl.static_range(TILES):
        mbarrier.init(tile_full.index(i), count=2)
        mbarrier.init(tile_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    memory = (q_sm, k_sm, v_sm, o_sm, tile_sm)
    barriers = (tile_full, tile_empty, k_full, k_empty, v_full, v_empty)
    multiplied = (o_desc, sinks_ptr, lse_ptr, stride_o_h, total_q, scale, softcap, left, right)
    copied = (q_desc, k_desc, v_desc, tiles_ptr, counters_ptr, stride_q_h, stride_k_h, stride_v_h, slots, items, left, right)
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (
                memory, barriers, multiplied, 0, GROUPS, D, D_V, BLOCK_N, TILES, STAGES,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, PINGPONG, EIGHT, TIED, LATE, MERGE, UNROLL,
            )),
            (_multiply, (
                memory, barriers, multiplied, 1, GROUPS, D, D_V, BLOCK_N, TILES, STAGES,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, PINGPONG, EIGHT, TIED, LATE, MERGE, UNROLL,
            )),
            (_copy, (memory, barriers, copied, SHARED, GROUPS, INNER, BLOCK_N, TILES, STAGES, HAS_LEFT, HAS_RIGHT, 1)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                memory, barriers, multiplied, 0, GROUPS, D, D_V, BLOCK_N, TILES, STAGES,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, PINGPONG, EIGHT, TIED, LATE, MERGE, UNROLL,
            )),
            (_multiply, (
                memory, barriers, multiplied, 1, GROUPS, D, D_V, BLOCK_N, TILES, STAGES,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, PINGPONG, EIGHT, TIED, LATE, MERGE, UNROLL,
            )),
            (_multiply, (
                memory, barriers, multiplied, 2, GROUPS, D, D_V, BLOCK_N, TILES, STAGES,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, PINGPONG, EIGHT, TIED, LATE, MERGE, UNROLL,
            )),
            (_copy, (memory, barriers, copied, SHARED, GROUPS, INNER, BLOCK_N, TILES, STAGES, HAS_LEFT, HAS_RIGHT, 1)),
        ], [4, 4, 1], [160, 160, 32])  # fmt: skip
