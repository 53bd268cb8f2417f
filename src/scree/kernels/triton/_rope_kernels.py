"""The kernel of the rotary embedding: some tokens and heads a program, with positions found from the offsets."""

import triton
import triton.language as tl


@triton.jit
def _row_of(offsets_ptr, token, rows, steps):
    """The sequence that a token belongs to, by bisection; `rows` beyond the last one."""
    low = token * 0
    high = low + rows
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(offsets_ptr + middle).to(tl.int64) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, tl.maximum(middle - 1, low))
    return low


@triton.jit(do_not_specialize=["blocks", "tokens", "rows", "steps", "places", "start"])
def _rope_fwd_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    offsets_ptr,
    start_ptr,
    y_ptr,
    blocks: "i32",
    tokens: "i64",
    rows: "i64",
    steps: "i64",
    places: "i64",
    start: "i64",
    stride_x_t: "i64",
    stride_x_h: "i64",
    H: tl.constexpr,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    STARTS: tl.constexpr,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    pid = tl.program_id(0)
    token = (pid // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = (pid % blocks) * HEADS + tl.arange(0, HEADS)
    there = token < tokens
    row = _row_of(offsets_ptr, token, rows, steps)
    real = there & (row < rows)
    place = token - tl.load(offsets_ptr + row).to(tl.int64)
    if STARTS:
        place += tl.load(start_ptr + row, mask=real, other=0).to(tl.int64)
    else:
        place += start
    known = real & (place >= 0) & (place < places)
    col = tl.arange(0, HALF)
    angle = place[:, None] * (D // 2) + col[None, :]
    use = known[:, None] & (col < D // 2)[None, :]
    nan = float("nan")
    c = tl.where(known[:, None], tl.load(cos_ptr + angle, mask=use, other=0).to(ACC), nan)[:, None, :]
    s = tl.where(known[:, None], tl.load(sin_ptr + angle, mask=use, other=0).to(ACC), nan)[:, None, :]
    if INVERSE:
        s = -s
    source = token[:, None, None] * stride_x_t + head[None, :, None] * stride_x_h
    target = token[:, None, None] * (H * D) + head[None, :, None] * D
    mask = there[:, None, None] & (head < H)[None, :, None]
    loads = real[:, None, None] & (head < H)[None, :, None]
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(x_ptr + source + both, mask=loads & (both < D), other=0).to(ACC)
        x1, x2 = tl.split(tl.reshape(x, (TOKENS, HEADS, HALF, 2)))
    else:
        first = col[None, None, :]
        x1 = tl.load(x_ptr + source + first, mask=loads & (first < D // 2), other=0).to(ACC)
        x2 = tl.load(x_ptr + source + D // 2 + first, mask=loads & (first < D // 2), other=0).to(ACC)
    y1 = tl.where(real[:, None, None], x1 * c - x2 * s, 0.0)
    y2 = tl.where(real[:, None, None], x2 * c + x1 * s, 0.0)
    if INTERLEAVED:
        y = tl.reshape(tl.join(y1, y2), (TOKENS, HEADS, 2 * HALF))
        both = tl.arange(0, 2 * HALF)[None, None, :]
        tl.store(y_ptr + target + both, y.to(y_ptr.dtype.element_ty), mask=mask & (both < D))
    else:
        first = col[None, None, :]
        tl.store(y_ptr + target + first, y1.to(y_ptr.dtype.element_ty), mask=mask & (first < D // 2))
        tl.store(y_ptr + target + D // 2 + first, y2.to(y_ptr.dtype.element_ty), mask=mask & (first < D // 2))
