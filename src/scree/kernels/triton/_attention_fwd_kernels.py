"""Attention forward: one program a tile of queries and head, walking over the blocks of keys that the tile sees."""

import triton
import triton.language as tl

from ._tiles_kernels import ABSENT, FIELDS, SPARE

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tile(tiles_ptr, index):
    """A tile of the map: (kind, start, length, other_start, other_length, block, row); 64 bits for what is multiplied."""
    entry = tiles_ptr + index.to(tl.int64) * FIELDS
    start = tl.load(entry).to(tl.int64)
    length = tl.load(entry + 1).to(tl.int32)
    other_start = tl.load(entry + 2).to(tl.int64)
    other_length = tl.load(entry + 3).to(tl.int32)
    block = tl.load(entry + 4).to(tl.int32)
    kind = tl.load(entry + 5).to(tl.int32)
    row = tl.load(entry + 6).to(tl.int64)
    return kind, start, length, other_start, other_length, block, row


@triton.jit
def _work(slots, INNER: tl.constexpr):
    """Which tile and which head a program works on: INNER heads of a tile side by side, then the next tile."""
    program = tl.program_id(0)
    outer = program // INNER
    return outer % slots, (outer // slots * INNER + program % INNER).to(tl.int64)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))


@triton.jit
def _visible(
    rows, at, shift, col_count, left, right,
    STEP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Which of the columns `at` to ``at + STEP`` each row sees, its own place being ``row + shift``: (rows, STEP).

    Without BOUNDED the columns from `col_count` on are not looked at.
    """
    cols = tl.arange(0, STEP)[None, :]
    if HAS_RIGHT:
        high = rows + (shift + right + 1)
        if BOUNDED:
            high = tl.minimum(high, col_count)
        seen = cols < (high - at)[:, None]
        if HAS_LEFT:
            seen = seen & (cols >= (rows + (shift - left) - at)[:, None])
        return seen
    if HAS_LEFT:
        seen = cols >= (rows + (shift - left) - at)[:, None]
        if BOUNDED:
            seen = seen & (cols < col_count - at)
        return seen
    return (cols < col_count - at) & (rows == rows)[:, None]


@triton.jit
def _span(
    block, length, other_length, left, right,
    BLOCK: tl.constexpr, STEP: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Which places of the other side a tile of rows sees: (begin, all_begin, all_end, end).

    From `begin` (a multiple of STEP) to `end` at least one row sees something; from `all_begin` to `all_end`, both
    multiples of STEP, every row sees everything.
    """
    shift = other_length - length
    first = block * BLOCK + shift
    last = tl.minimum(block * BLOCK + BLOCK, length) - 1 + shift
    begin = 0
    end = other_length
    all_begin = 0
    all_end = other_length
    if HAS_LEFT:
        begin = tl.maximum(first - left, 0) // STEP * STEP
        all_begin = tl.maximum((last - left + STEP - 1) // STEP * STEP, begin)
    if HAS_RIGHT:
        end = tl.minimum(end, last + right + 1)
        all_end = tl.minimum(all_end, first + right + 1)
    all_end = tl.maximum(all_end, 0) // STEP * STEP
    all_begin = tl.minimum(all_begin, tl.maximum((end + STEP - 1) // STEP * STEP, begin))
    return begin, all_begin, tl.maximum(all_end, all_begin), end


@triton.jit
def _load_block(ptr, desc, at, count, stride, inner, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
                TMA: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Rows `at` to ``at + BLOCK`` of one head, zeros beyond `count` rows: those are another sequence's."""
    if TMA:
        return desc.load([at, 0])
    rows = tl.arange(0, BLOCK)
    pointers = ptr + at * stride + rows[:, None] * stride + inner[None, :]
    if MASKED:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(pointers, mask=(at + rows < count)[:, None], other=0.0)
        return tl.load(pointers, mask=(at + rows < count)[:, None] & (inner < WIDTH)[None, :], other=0.0)
    if WIDTH == BLOCK_WIDTH:
        return tl.load(pointers)
    return tl.load(pointers, mask=(inner < WIDTH)[None, :], other=0.0)


@triton.jit
def _fwd_blocks(
    o, total, top, q, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, begin, end, shift, k_length,
    left, right, scale, softcap,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `begin` to `end` in blocks; MASKED where some row does not see all of them."""
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    for at in tl.range(begin, end, BLOCK_N):
        k = _load_block(k_ptr, k_desc, at, k_length, stride_k_t, inner, BLOCK_N, D, BLOCK_D, TMA, MASKED)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * LOG2E * _tanh(s * (scale / softcap))
        elif SCALED:
            s = s * (scale * LOG2E)
        if MASKED:
            seen = _visible(rows, at, shift, k_length, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT, True)
            s = tl.where(seen, s, float("-inf"))
        if SOFTCAP or SCALED:
            new_top = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.math.exp2(s - finite[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.math.exp2(s * (scale * LOG2E) - finite[:, None])
        keep = tl.math.exp2(top - finite)
        total = total * keep + tl.sum(p, 1)
        o = o * keep[:, None]
        v = _load_block(v_ptr, v_desc, at, k_length, stride_v_t, inner_v, BLOCK_N, D_V, BLOCK_D_V, TMA, MASKED)
        o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
        top = new_top
    return o, total, top


@triton.jit(do_not_specialize=["total_q", "slots", "scale", "softcap", "left", "right"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, tiles_ptr, o_ptr, lse_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", total_q: "i64", slots: "i32", scale: "fp32", softcap: "fp32", left: "i32", right: "i32",
    GROUP: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys (FlashAttention-2, algorithm 1), the LSE in `lse` (H, T).

    Scores are kept in base 2: ``top`` is the maximum so far of s * log2(e), ``total`` the sum of 2 ** (s * log2(e) - top).
    """
    index, head = _work(slots, INNER)
    kind, q_start, q_length, k_start, k_length, block, _ = _tile(tiles_ptr, index)
    if kind == ABSENT:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    there = rows < q_length
    base = q_start + block.to(tl.int64) * BLOCK_M
    local = tl.arange(0, BLOCK_M)
    q = tl.load(
        q_ptr + base * stride_q_t + head * stride_q_h + local[:, None] * stride_q_t + inner[None, :],
        mask=there[:, None] & (inner < D)[None, :], other=0.0,
    )  # fmt: skip
    k_ptr += k_start * stride_k_t + head // GROUP * stride_k_h
    v_ptr += k_start * stride_v_t + head // GROUP * stride_v_h
    if TMA:  # the hardware reads zeros beyond the shape, which ends with the sequence
        k_desc = tl.make_tensor_descriptor(k_ptr, [k_length, D], [stride_k_t, 1], [BLOCK_N, BLOCK_D])
        v_desc = tl.make_tensor_descriptor(v_ptr, [k_length, D_V], [stride_v_t, 1], [BLOCK_N, BLOCK_D_V])
    else:
        k_desc = k_ptr
        v_desc = v_ptr

    o = tl.zeros([BLOCK_M, BLOCK_D_V], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.zeros([BLOCK_M], tl.float32) + sink
        total = tl.zeros([BLOCK_M], tl.float32) + tl.where(sink == float("-inf"), 0.0, 1.0)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    shift = k_length - q_length
    begin, all_begin, all_end, end = _span(block, q_length, k_length, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if WHOLE:
        o, total, top = _fwd_blocks(
            o, total, top, q, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, begin, end, shift, k_length,
            left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, PRECISION, TMA, True,
        )  # fmt: skip
    else:
        if HAS_LEFT:
            o, total, top = _fwd_blocks(
                o, total, top, q, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows,
                begin, tl.minimum(all_begin, end), shift, k_length,
                left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, PRECISION, TMA, True,
            )  # fmt: skip
        o, total, top = _fwd_blocks(
            o, total, top, q, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows,
            all_begin, all_end, shift, k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, PRECISION, TMA, False,
        )  # fmt: skip
        o, total, top = _fwd_blocks(
            o, total, top, q, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows,
            all_end, end, shift, k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, SCALED, PRECISION, TMA, True,
        )  # fmt: skip

    none = total == 0
    o = o / tl.where(none, 1.0, total)[:, None]
    if LSE:
        lse = (tl.where(none, 0.0, top) + tl.math.log2(tl.where(none, 1.0, total))) * LN2
        lse = tl.where(kind == SPARE, 0.0, tl.where(none, float("-inf"), lse))
        tl.store(lse_ptr + head * total_q + base + local, lse, mask=there)
    tl.store(
        o_ptr + base * stride_o_t + head * stride_o_h + local[:, None] * stride_o_t + inner_v[None, :],
        o.to(o_ptr.dtype.element_ty), mask=there[:, None] & (inner_v < D_V)[None, :],
    )  # fmt: skip
