"""Attention forward for Hopper (sm_90), in Gluon: a warp that copies, and two warpgroups that multiply.

As many programs as there are multiprocessors take tiles of 128 queries of a head until none is left. One warp of each
fetches the queries of the tile, then the keys and values that they see, block by block, the last one first; and those of
the next tile while the one at hand is finished. Two warpgroups compute 64 queries each, the scores of a block together
with the values of the block before (FlashAttention-3, algorithm 2).
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

from ._attention_fwd_kernels import _span
from ._hopper_fwd_copy_kernels import BLOCK_M, END, FIELDS, GROUPS, ROWS, _copy, _ragged, _read
from ._tiles_kernels import ABSENT, SPARE

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global  # as Triton 3.8 calls it


@gluon.jit
def _store(desc, start, length, row, column, source):
    _tma_store(desc, [END, start + length, END - length + row, column], source)


@gluon.jit
def _sums(p):
    """Eight sums along each row, so that no thread needs another's."""
    return gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def _approximate(INSTRUCTION: gl.constexpr, x):
    """1 / x or log2(x) by one instruction, to 22 bits, where x is neither near 0 nor near the largest number."""
    return gl.inline_asm_elementwise(INSTRUCTION + " $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _widened(p, like):
    """The columns of p, then zeros, in the shape and the layout of `like`, which is twice as wide."""
    layout: gl.constexpr = gl.reshape(like, [like.shape[0], 2, like.shape[1] // 2]).type.layout
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    p = gl.expand_dims(gl.convert_layout(p, gl.SliceLayout(1, layout)), 1)
    p = gl.where(gl.expand_dims(gl.expand_dims(half, 0), 2) == 0, p, 0.0)
    return gl.convert_layout(gl.reshape(p, like.shape), like.type.layout)


@gluon.jit
def _scores(
    s, at, low, high, scale, softcap,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Scores in base 2, or if that takes no more than a factor as they are; -inf where a row does not see a column.

    A row sees the columns from `low`, if LEFT, and those before `high`, if RIGHT.
    """
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
    """(p, factor for what was summed before, new maximum), in base 2; PLAIN scores still lack their factor."""
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
def _first(
    q, k, p, top, total, k_empty, at, low, high, scale, softcap,
    WIDTH: gl.constexpr, HAS_LEFT: gl.constexpr, SOFTCAP: gl.constexpr, SCALED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(p, top, total) after the block that comes first, of whose keys no row sees any from WIDTH on.

    Given are those after no block. What is not computed would add zeros, so the bits do not depend on WIDTH.
    """
    row_layout: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    s = gl.zeros([ROWS, WIDTH], gl.float32, layout=LAYOUT)
    s = warpgroup_mma(q, k.slice(0, WIDTH).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty, count=1)
    low = gl.convert_layout(low, row_layout)
    s = _scores(s, at, low, gl.convert_layout(high, row_layout), scale, softcap, SOFTCAP, SCALED, HAS_LEFT, True)
    new_p, _, new_top = _probabilities(s, gl.convert_layout(top, row_layout), scale, not (SOFTCAP or SCALED))
    new_total = gl.convert_layout(_sums(new_p), total.type.layout)
    if WIDTH != p.shape[1]:
        new_p = _widened(new_p, p)
    return new_p, gl.convert_layout(new_top, top.type.layout), new_total


@gluon.jit
def _step(
    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high, scale, softcap,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, SCALED: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
    O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The scores of block `count`, and the values of the block before, both at once."""
    stage = count % STAGES
    before = (count - 1) % STAGES
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=S_LAYOUT)
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    s = warpgroup_mma(q, k_sm.index(stage).reshape([BLOCK_N, D]).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
    o = warpgroup_mma(p, v_sm.index(before).reshape([BLOCK_N, D_V]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    s = _scores(s, at, low, high, scale, softcap, SOFTCAP, SCALED, LEFT, RIGHT)
    new_p, keep, top = _probabilities(s, top, scale, not (SOFTCAP or SCALED))
    sums = _sums(new_p)
    total = total * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, sums.type.layout)), 1) + sums
    new_p = gl.convert_layout(new_p.to(q.dtype), P_LAYOUT)
    o, new_p = warpgroup_mma_wait(0, deps=(o, new_p))
    mbarrier.arrive(v_empty.index(before), count=1)
    o = o * gl.expand_dims(gl.convert_layout(keep, gl.SliceLayout(1, O_LAYOUT)), 1)
    return o, new_p, top, total


@gluon.jit
def _multiply(
    memory, barriers, arguments,
    GROUP: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr, BRIEF: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """One of the warpgroups that multiply: rows ``64 * GROUP`` to ``64 * GROUP + 64`` of every tile."""
    q_sm, k_sm, v_sm, o_sm, tile_sm = memory
    tile_full, tile_empty, k_full, k_empty, v_full, v_empty = barriers
    o_desc, sinks_ptr, lse_ptr, stride_o_h, total_q, scale, softcap, left, right = arguments
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    half_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N // 2, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D_V, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    o_tile = o_sm.index(GROUP)
    turn = 0
    count = 0
    mbarrier.wait(tile_full.index(0), 0)
    kind = _read(tile_sm, 0, 4)
    while kind != ABSENT:
        slot = turn % TILES
        q = q_sm.index(slot * GROUPS + GROUP).reshape([ROWS, D])
        q_length = _read(tile_sm, slot * FIELDS + 2, 4)
        k_length = _read(tile_sm, slot * FIELDS + 3, 4)
        block = _read(tile_sm, slot * FIELDS + 4, 4)
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
        k = k_sm.index(stage).reshape([BLOCK_N, D])
        last = begin + (steps - 1) * BLOCK_N
        p = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout)
        top = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, s_layout))
        total = _sums(p)
        seen = last + BLOCK_N
        if BRIEF:
            seen = k_length
            if HAS_RIGHT:
                behind = gl.minimum(block * BLOCK_M + (GROUP + 1) * ROWS, q_length)
                seen = gl.minimum(seen, behind + (k_length - q_length + right))
        if seen - last > BLOCK_N // 2:
            p, top, total = _first(
                q, k, p, top, total, k_empty.index(stage), last, low, high, scale, softcap,
                BLOCK_N, HAS_LEFT, SOFTCAP, SCALED, s_layout,
            )  # fmt: skip
        else:
            p, top, total = _first(
                q, k, p, top, total, k_empty.index(stage), last, low, high, scale, softcap,
                BLOCK_N // 2, HAS_LEFT, SOFTCAP, SCALED, half_layout,
            )  # fmt: skip
        p = gl.convert_layout(p.to(q.dtype), p_layout)
        o = gl.zeros([ROWS, D_V], gl.float32, layout=o_layout)
        count += 1
        if HAS_RIGHT:  # without it only the last block, which comes first, can be masked
            for at in range(last - BLOCK_N, all_end - 1, -BLOCK_N):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high,
                    scale, softcap, HAS_LEFT, True, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        for at in range(gl.minimum(last, all_end) - BLOCK_N, all_begin - 1, -BLOCK_N):
            o, p, top, total = _step(
                o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high,
                scale, softcap, False, False, SOFTCAP, SCALED,
                GROUP, BLOCK_N, D, D_V, STAGES, o_layout, p_layout, s_layout,
            )  # fmt: skip
            count += 1
        if HAS_LEFT:
            for at in range(gl.minimum(last, all_begin) - BLOCK_N, begin - 1, -BLOCK_N):
                o, p, top, total = _step(
                    o, p, top, total, q, k_sm, v_sm, k_full, k_empty, v_full, v_empty, count, at, low, high,
                    scale, softcap, True, HAS_RIGHT, SOFTCAP, SCALED,
                    GROUP, BLOCK_N, D, D_V, STAGES, o_layout, p_layout, s_layout,
                )  # fmt: skip
                count += 1
        before = (count - 1) % STAGES
        mbarrier.wait(v_full.index(before), (count - 1) // STAGES & 1)
        o = warpgroup_mma(p, v_sm.index(before).reshape([BLOCK_N, D_V]), o, is_async=True)
        # Once more from memory: registers are scarce in the loops.
        kind = _read(tile_sm, slot * FIELDS, 4)
        q_start = _read(tile_sm, slot * FIELDS + 1, 4)
        q_length = _read(tile_sm, slot * FIELDS + 2, 4)
        row = _read(tile_sm, slot * FIELDS + 4, 4) * BLOCK_M + GROUP * ROWS
        head = _read(tile_sm, slot * FIELDS + 5, 4)
        mbarrier.arrive(tile_empty.index(slot), count=1)
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
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
        total = gl.where(none, 1.0, total)
        if BRIEF:
            rescale = rescale * _approximate("rcp.approx.ftz.f32", total)
            lse = (gl.where(none, 0.0, top) + _approximate("lg2.approx.ftz.f32", total)) * LN2
        else:
            rescale = rescale / total
            lse = (gl.where(none, 0.0, top) + gl.log2(total)) * LN2
        lse = gl.where(none, float("-inf"), lse)
        lse = gl.where(kind == SPARE, 0.0, lse)
        if LSE and not AHEAD:
            gl.store(lse_ptr + (head.to(gl.int64) * total_q + q_start) + rows, lse, mask=rows < q_length)
        tma.store_wait(0)  # the last tile's copy reads from where this one's goes
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, o_layout)), 1)
        o_tile.reshape([ROWS, D_V]).store(o.to(q.dtype))
        fence_async_shared()
        _store(o_desc, q_start, q_length, row, (head * stride_o_h).to(gl.int32), o_tile)
        if LSE and AHEAD:
            gl.store(lse_ptr + (head.to(gl.int64) * total_q + q_start) + rows, lse, mask=rows < q_length)
        turn += 1
        mbarrier.wait(tile_full.index(turn % TILES), turn // TILES & 1)
        kind = _read(tile_sm, turn % TILES * FIELDS, 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["total_q", "slots", "scale", "softcap", "left", "right"])
def _hopper_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, tiles_ptr, o_ptr, lse_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", total_q: "i64", slots: "i32", scale: "fp32", softcap: "fp32",
    left: "i32", right: "i32",
    HEADS: gl.constexpr, SHARED: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, D_V: gl.constexpr,
    BLOCK_N: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, SCALED: gl.constexpr, SINKS: gl.constexpr, LSE: gl.constexpr, BRIEF: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Online softmax over the keys, last block first; the LSE in `lse` (H, T)."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    q_desc = _ragged(q_ptr, stride_q_t, ((HEADS - 1) * stride_q_h + D).to(gl.int32), ROWS, D, layout)
    k_width = ((HEADS // SHARED - 1) * stride_k_h + D).to(gl.int32)
    k_desc = _ragged(k_ptr, stride_k_t, k_width, BLOCK_N, D, layout)
    v_width = ((HEADS // SHARED - 1) * stride_v_h + D_V).to(gl.int32)
    v_desc = _ragged(v_ptr, stride_v_t, v_width, BLOCK_N, D_V, layout)
    o_desc = _ragged(o_ptr, stride_o_t, ((HEADS - 1) * stride_o_h + D_V).to(gl.int32), ROWS, D_V, layout)
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
    copied = (q_desc, k_desc, v_desc, tiles_ptr, stride_q_h, stride_k_h, stride_v_h, slots, left, right)
    many: gl.constexpr = 232 if AHEAD else 240  # registers of a thread
    few: gl.constexpr = 32 if AHEAD else 24
    gl.warp_specialize([
        (_multiply, (
            memory, barriers, multiplied, 0, D, D_V, BLOCK_N, TILES, STAGES,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, LSE, BRIEF, AHEAD,
        )),
        (_multiply, (
            memory, barriers, multiplied, 1, D, D_V, BLOCK_N, TILES, STAGES,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, SINKS, LSE, BRIEF, AHEAD,
        )),
        (_copy, (memory, barriers, copied, HEADS, SHARED, INNER, BLOCK_N, TILES, STAGES, HAS_LEFT, HAS_RIGHT, AHEAD)),
    ], [4, 1], [many, few])  # fmt: skip
