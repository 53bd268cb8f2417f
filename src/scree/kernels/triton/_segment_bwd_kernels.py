"""The kernels behind the gradients of softmax and the reductions: see `_segment_kernels`, whose two ways they go.

x is the result of the softmax, or the input of a reduction, whose result and its gradient are (B, C).
"""

import triton
import triton.language as tl

from ._segment_kernels import _idle, _owner, _runs, _side, _tile


@triton.jit
def _gradient(x_ptr, dy_ptr, y_ptr, base, source, mask, side, within, length, OP: tl.constexpr, ACC: tl.constexpr):
    """What dx is made of: the values, and the gradient beside them; their products, or the values, are summed."""
    if OP == 0:
        x = tl.load(x_ptr + base + source, mask=mask, other=0).to(ACC)
        dy = tl.load(dy_ptr + base + source, mask=mask, other=0).to(ACC)
        summed = x * dy
    else:
        dy = tl.load(dy_ptr + side, mask=within, other=0).to(ACC)
        if OP == 1 or OP == 2:
            x = tl.full(mask.shape, 1.0, ACC)
            if OP == 2:
                x = x / length.to(ACC)
        else:
            x = tl.load(x_ptr + base + source, mask=mask, other=0).to(ACC)
            y = tl.load(y_ptr + side, mask=within, other=0).to(ACC)
            if OP == 5:
                x = tl.where(y == float("-inf"), 0.0, tl.exp(x - y))
            else:
                x = tl.where(mask & ((x == y) | ((x != x) & (y != y))), 1.0, 0.0).to(ACC)
        summed = x
    return x, dy, summed


@triton.jit
def _dx(x, dy, total, OP: tl.constexpr):
    if OP == 0:
        dx = x * (dy - total)
    elif OP == 3 or OP == 4:
        dx = tl.where(x != 0, dy / total, 0.0)
    else:
        dx = x * dy
    return dx


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns"])
def _short_bwd_kernel(
    x_ptr,
    dy_ptr,
    y_ptr,
    offsets_ptr,
    dx_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    length, side, within, source, mask = _runs(
        offsets_ptr, pid, columns, rows, total, cols, INNER, OUTER, ROWS, SHORT, BLOCK
    )
    x, dy, summed = _gradient(x_ptr, dy_ptr, y_ptr, 0, source, mask, side, within, length, OP, ACC)
    dx = _dx(x, dy, tl.sum(summed, axis=1, keep_dims=True), OP)
    tl.store(dx_ptr + source, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns", "steps"])
def _chunk_bwd_kernel(
    x_ptr,
    dy_ptr,
    y_ptr,
    offsets_ptr,
    dx_ptr,
    totals_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    steps: "i64",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    ACC: tl.constexpr,
    SHORT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    JOINED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Chunk by chunk; with JOINED those of longer sequences, whose sums (B, C) are there already."""
    pid = tl.program_id(0)
    group = (pid // columns).to(tl.int64) * GROUP
    if GROUP > 1:
        if _idle(offsets_ptr, group, rows, total, steps, CHUNK if JOINED else SHORT, GROUP, CHUNK):
            return
    for i in range(GROUP):
        slot = group + i
        row, start, stop, chunk = _owner(offsets_ptr, slot, rows, total, steps, CHUNK)
        beyond = row == rows
        if beyond:
            start = tl.maximum(start, (slot - rows) * CHUNK)
            stop = tl.minimum(stop, (slot - rows + 1) * CHUNK)
            chunk = chunk * 0
        length = stop - start
        if JOINED:
            mine = (length > CHUNK) & (chunk * CHUNK < length) & (row < rows)
        else:
            mine = beyond | ((length > SHORT) & (chunk * CHUNK < length))
        if mine:
            first = (pid % columns).to(tl.int64) * BLOCK
            side, within = _side(row, cols, first, INNER, OUTER, BLOCK)
            base, source, mask = _tile(start, length, chunk, first, total, within, INNER, OUTER, CHUNK, BLOCK)
            target = dx_ptr + base + source
            if beyond:
                tl.store(target, tl.zeros((1, CHUNK, BLOCK), dx_ptr.dtype.element_ty), mask=mask)
            else:
                x, dy, summed = _gradient(x_ptr, dy_ptr, y_ptr, base, source, mask, side, within, length, OP, ACC)
                if JOINED:
                    sum_ = tl.load(totals_ptr + side, mask=within, other=1)
                else:
                    sum_ = tl.sum(summed, axis=1, keep_dims=True)
                unfinished = length < 0
                if (OP == 0 or OP == 3 or OP == 4) and not JOINED:
                    unfinished = length > CHUNK
                if unfinished:
                    partial, _ = _side(slot, cols, first, INNER, OUTER, BLOCK)
                    tl.store(totals_ptr + partial, sum_, mask=within)
                else:
                    dx = _dx(x, dy, sum_, OP)
                    tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=mask)
