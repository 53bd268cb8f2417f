"""Attention backward in two kernels without atomics: dQ by tiles of queries, then dK and dV by tiles of keys.

Both compute the probabilities again from the LSE (FlashAttention-2, algorithm 2). Each gradient is summed by one program
in a fixed order, so that two runs give the same bits.
"""

import triton
import triton.language as tl

from ._attention_fwd_kernels import LOG2E, _load_block, _span, _tanh, _tile, _visible, _work
from ._tiles_kernels import ABSENT


@triton.jit
def _scores(
    s, lse, rows, at, shift, col_count, left, right, scale, softcap,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """From dot products: the probabilities, and the derivative of a score before the cap, over the scale.

    `lse` is in base 2, +inf where a row sees nothing, and broadcasts against s.
    """
    slope = s
    if SOFTCAP:
        t = _tanh(s * (scale / softcap))
        p = tl.math.exp2(softcap * LOG2E * t - lse)
        slope = 1.0 - t * t
    else:
        p = tl.math.exp2(s * (scale * LOG2E) - lse)
    if MASKED:
        seen = _visible(rows, at, shift, col_count, left, right, s.shape[1], HAS_LEFT, HAS_RIGHT, BOUNDED)
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def _dq_blocks(
    dq, q, do, lse, delta, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, begin, end, shift, k_length,
    left, right, scale, softcap,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    for at in tl.range(begin, end, BLOCK_N):
        k = _load_block(k_ptr, k_desc, at, k_length, stride_k_t, inner, BLOCK_N, D, BLOCK_D, TMA, MASKED)
        v = _load_block(v_ptr, v_desc, at, k_length, stride_v_t, inner_v, BLOCK_N, D_V, BLOCK_D_V, TMA, MASKED)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        p, slope = _scores(
            s, lse[:, None], rows, at, shift, k_length, left, right, scale, softcap,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, MASKED, True,
        )  # fmt: skip
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["total_q", "slots", "scale", "softcap", "left", "right"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, tiles_ptr, dq_ptr, delta_ptr, rows_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_o_t: "i64", stride_o_h: "i64", stride_do_t: "i64", stride_do_h: "i64",
    stride_dq_t: "i64", stride_dq_h: "i64", total_q: "i64", slots: "i32", scale: "fp32", softcap: "fp32", left: "i32", right: "i32",
    GROUP: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, DLSE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dQ, and ``delta = sum(o * do) - dlse`` in `delta` (H, T).

    For the other kernel it writes LSE and delta also to `rows` (H, slots, 2, BLOCK_M), where every tile is aligned and
    is filled up with an LSE of +inf.
    """
    index, head = _work(slots, INNER)
    kind, q_start, q_length, k_start, k_length, block, row = _tile(tiles_ptr, index)
    if kind == ABSENT:
        return
    local = tl.arange(0, BLOCK_M)
    rows = block * BLOCK_M + local
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    there = rows < q_length
    base = q_start + block.to(tl.int64) * BLOCK_M
    mask = there[:, None] & (inner < D)[None, :]
    mask_v = there[:, None] & (inner_v < D_V)[None, :]
    do = tl.load(
        do_ptr + base * stride_do_t + head * stride_do_h + local[:, None] * stride_do_t + inner_v[None, :],
        mask=mask_v, other=0.0,
    )  # fmt: skip
    o = tl.load(
        o_ptr + base * stride_o_t + head * stride_o_h + local[:, None] * stride_o_t + inner_v[None, :],
        mask=mask_v, other=0.0,
    )  # fmt: skip
    q = tl.load(
        q_ptr + base * stride_q_t + head * stride_q_h + local[:, None] * stride_q_t + inner[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    across = head * total_q + base + local
    lse = tl.load(lse_ptr + across, mask=there, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + across, mask=there, other=0.0)
    tl.store(delta_ptr + across, delta, mask=there)
    aligned = rows_ptr + (head * slots + q_start // BLOCK_M + row + block) * (2 * BLOCK_M) + local
    tl.store(aligned, lse)
    tl.store(aligned + BLOCK_M, delta)

    k_ptr += k_start * stride_k_t + head // GROUP * stride_k_h
    v_ptr += k_start * stride_v_t + head // GROUP * stride_v_h
    if TMA:
        k_desc = tl.make_tensor_descriptor(k_ptr, [k_length, D], [stride_k_t, 1], [BLOCK_N, BLOCK_D])
        v_desc = tl.make_tensor_descriptor(v_ptr, [k_length, D_V], [stride_v_t, 1], [BLOCK_N, BLOCK_D_V])
    else:
        k_desc = k_ptr
        v_desc = v_ptr
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    shift = k_length - q_length
    begin, all_begin, all_end, end = _span(block, q_length, k_length, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if WHOLE:
        dq = _dq_blocks(
            dq, q, do, lse, delta, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, begin, end, shift,
            k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
        )  # fmt: skip
    else:
        if HAS_LEFT:
            dq = _dq_blocks(
                dq, q, do, lse, delta, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows,
                begin, tl.minimum(all_begin, end), shift,
                k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
            )  # fmt: skip
        dq = _dq_blocks(
            dq, q, do, lse, delta, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, all_begin, all_end, shift,
            k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, False,
        )  # fmt: skip
        dq = _dq_blocks(
            dq, q, do, lse, delta, k_ptr, k_desc, v_ptr, v_desc, stride_k_t, stride_v_t, rows, all_end, end, shift,
            k_length, left, right, scale, softcap, BLOCK_N, D, BLOCK_D, D_V, BLOCK_D_V,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
        )  # fmt: skip
    tl.store(
        dq_ptr + base * stride_dq_t + head * stride_dq_h + local[:, None] * stride_dq_t + inner[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


@triton.jit
def _dkv_blocks(
    dk, dv, k, v, q_ptr, q_desc, do_ptr, do_desc, rows_ptr, stride_q_t, stride_do_t, cols, begin, end, shift,
    q_length, left, right, scale, softcap,
    BLOCK_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr, BLOCK_D_V: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    for at in tl.range(begin, end, BLOCK_M):
        q = _load_block(q_ptr, q_desc, at, q_length, stride_q_t, inner, BLOCK_M, D, BLOCK_D, TMA, MASKED)
        do = _load_block(do_ptr, do_desc, at, q_length, stride_do_t, inner_v, BLOCK_M, D_V, BLOCK_D_V, TMA, MASKED)
        aligned = at // BLOCK_ROWS * (2 * BLOCK_ROWS) + at % BLOCK_ROWS
        if TMA:
            lse = rows_ptr.load([aligned])
            delta = rows_ptr.load([aligned + BLOCK_ROWS])
        else:
            lse = tl.load(rows_ptr + aligned + tl.arange(0, BLOCK_M))
            delta = tl.load(rows_ptr + aligned + BLOCK_ROWS + tl.arange(0, BLOCK_M))
        s = tl.dot(k, q.T, input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        # seen from the keys, the window lies the other way round; rows beyond the last have an LSE of +inf
        p, slope = _scores(
            s, lse[None, :], cols, at, shift, q_length, right, left, scale, softcap,
            HAS_RIGHT, HAS_LEFT, SOFTCAP, MASKED and (HAS_LEFT or HAS_RIGHT), False,
        )  # fmt: skip
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["slots", "slots_q", "scale", "softcap", "left", "right"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, tiles_ptr, dk_ptr, dv_ptr,
    stride_q_t: "i64", stride_q_h: "i64", stride_k_t: "i64", stride_k_h: "i64", stride_v_t: "i64", stride_v_h: "i64",
    stride_do_t: "i64", stride_do_h: "i64", stride_dk_t: "i64", stride_dk_h: "i64", stride_dv_t: "i64",
    stride_dv_h: "i64", slots: "i32", slots_q: "i64", scale: "fp32", softcap: "fp32", left: "i32", right: "i32",
    GROUP: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, D_V: tl.constexpr,
    BLOCK_D_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_ROWS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of the group; the map is that of the keys.

    BLOCK_ROWS, the tile of the dQ kernel, is a multiple of BLOCK_M.
    """
    index, kv_head = _work(slots, INNER)
    kind, k_start, k_length, q_start, q_length, block, row = _tile(tiles_ptr, index)
    if kind == ABSENT:
        return
    local = tl.arange(0, BLOCK_N)
    cols = block * BLOCK_N + local
    inner = tl.arange(0, BLOCK_D)
    inner_v = tl.arange(0, BLOCK_D_V)
    there = cols < k_length
    base = k_start + block.to(tl.int64) * BLOCK_N
    mask = there[:, None] & (inner < D)[None, :]
    mask_v = there[:, None] & (inner_v < D_V)[None, :]
    k = tl.load(
        k_ptr + base * stride_k_t + kv_head * stride_k_h + local[:, None] * stride_k_t + inner[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_ptr + base * stride_v_t + kv_head * stride_v_h + local[:, None] * stride_v_t + inner_v[None, :],
        mask=mask_v, other=0.0,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D_V], tl.float32)
    shift = q_length - k_length
    begin, all_begin, all_end, end = _span(block, k_length, q_length, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
    if TMA and not HAS_LEFT:  # rows beyond the last have an LSE of +inf, and the hardware reads zeros for them
        all_end = tl.maximum(end, all_begin)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_base = q_ptr + q_start * stride_q_t + head * stride_q_h
        do_base = do_ptr + q_start * stride_do_t + head * stride_do_h
        rows_base = rows_ptr + (head * slots_q + q_start // BLOCK_ROWS + row) * (2 * BLOCK_ROWS)
        if TMA:
            q_desc = tl.make_tensor_descriptor(q_base, [q_length, D], [stride_q_t, 1], [BLOCK_M, BLOCK_D])
            do_desc = tl.make_tensor_descriptor(do_base, [q_length, D_V], [stride_do_t, 1], [BLOCK_M, BLOCK_D_V])
            extent = (q_length + BLOCK_ROWS - 1) // BLOCK_ROWS * (2 * BLOCK_ROWS)
            rows_base = tl.make_tensor_descriptor(rows_base, [extent], [1], [BLOCK_M])
        else:
            q_desc = q_base
            do_desc = do_base
        if WHOLE:
            dk, dv = _dkv_blocks(
                dk, dv, k, v, q_base, q_desc, do_base, do_desc, rows_base, stride_q_t, stride_do_t, cols,
                begin, end, shift, q_length, left, right, scale, softcap, BLOCK_ROWS, BLOCK_M, D, BLOCK_D, D_V, BLOCK_D_V,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
            )  # fmt: skip
        else:
            if HAS_RIGHT:
                dk, dv = _dkv_blocks(
                    dk, dv, k, v, q_base, q_desc, do_base, do_desc, rows_base, stride_q_t, stride_do_t, cols,
                    begin, tl.minimum(all_begin, end), shift, q_length, left, right, scale, softcap,
                    BLOCK_ROWS, BLOCK_M, D, BLOCK_D, D_V, BLOCK_D_V, HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
                )  # fmt: skip
            dk, dv = _dkv_blocks(
                dk, dv, k, v, q_base, q_desc, do_base, do_desc, rows_base, stride_q_t, stride_do_t, cols,
                all_begin, all_end, shift, q_length, left, right, scale, softcap,
                BLOCK_ROWS, BLOCK_M, D, BLOCK_D, D_V, BLOCK_D_V, HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, False,
            )  # fmt: skip
            if HAS_LEFT or not TMA:
                dk, dv = _dkv_blocks(
                    dk, dv, k, v, q_base, q_desc, do_base, do_desc, rows_base, stride_q_t, stride_do_t, cols,
                    all_end, end, shift, q_length, left, right, scale, softcap,
                    BLOCK_ROWS, BLOCK_M, D, BLOCK_D, D_V, BLOCK_D_V, HAS_LEFT, HAS_RIGHT, SOFTCAP, PRECISION, TMA, True,
                )  # fmt: skip
    # The tile is read again: what it says would otherwise fill registers all through the loops.
    _, k_start, k_length, _, _, block, _ = _tile(tiles_ptr, index)
    base = k_start + block.to(tl.int64) * BLOCK_N
    there = block * BLOCK_N + local < k_length
    tl.store(
        dk_ptr + base * stride_dk_t + kv_head * stride_dk_h + local[:, None] * stride_dk_t + inner[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty), mask=there[:, None] & (inner < D)[None, :],
    )  # fmt: skip
    tl.store(
        dv_ptr + base * stride_dv_t + kv_head * stride_dv_h + local[:, None] * stride_dv_t + inner_v[None, :],
        dv.to(dv_ptr.dtype.element_ty), mask=there[:, None] & (inner_v < D_V)[None, :],
    )  # fmt: skip
