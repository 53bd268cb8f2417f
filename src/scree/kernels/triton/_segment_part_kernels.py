"""What the kernels of softmax and the reductions are made of: places, reading, folding and mapping; see `_segment_kernels`."""

import triton
import triton.language as tl

PARTS = tl.constexpr(512)
"""In how many parts a sequence is cut at most."""


@triton.jit
def _offset(offsets_ptr, i, total, mask):
    """offsets[i], inside the values whatever it says."""
    found = tl.load(offsets_ptr + i, mask=mask, other=0).to(tl.int64)
    return tl.where(i == 0, 0, tl.minimum(tl.maximum(found, 0), total))


@triton.jit
def _bounds(offsets_ptr, row, rows, total, OP: tl.constexpr):
    """Where sequences begin, and their lengths: -1 for none. What gives zeros beyond the last one is sequence `rows`."""
    start = _offset(offsets_ptr, row, total, row <= rows)
    stop = tl.where(row < rows, _offset(offsets_ptr, row + 1, total, row < rows), total)
    last = rows if OP == 0 or OP >= 6 else rows - 1
    return start, tl.where(row <= last, tl.maximum(stop - start, 0), -1)


@triton.jit
def _parts(length, PART: tl.constexpr):
    """The tokens of a part, and how many parts there are: the last one takes along what remains."""
    wide = tl.cdiv(length, PARTS * PART).to(tl.int32)
    parts = tl.maximum((length // PART).to(tl.int32) // tl.maximum(wide, 1), 1)
    return wide.to(tl.int64) * PART, parts


@triton.jit
def _places(
    row,
    start,
    mine,
    first,
    total,
    cols,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Where the first LANES tokens of rows lie, (L, R, 1, C), their results, (1, R, 1, C), and which are there."""
    col = tl.arange(0, BLOCK)[None, None, None, :]
    lane = tl.arange(0, LANES)[:, None, None, None].to(tl.int64)
    if OUTER:
        within = first + col < cols
        place = start * INNER + ((first + col) // INNER * (total * INNER) + (first + col) % INNER)
    else:
        within = first + col < INNER  # of which the compiler sees how far it is the same for neighbours
        place = start * INNER + first + col
    return place + lane * INNER, row * cols + first + col, within & mine


@triton.jit
def _exp(x):
    """In float32 what the hardware has: tl.exp would take care of subnormal numbers, too."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * 1.4426950408889634)


@triton.jit
def _read(
    x_ptr,
    dy_ptr,
    y_ptr,
    place,
    side,
    within,
    left,
    length,
    OP: tl.constexpr,
    INNER: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A tile of what is mapped, the gradient beside it, what is folded; how far it lies behind `place`, and its mask."""
    step = tl.arange(0, STEPS)[None, None, :, None]
    mask = (step * LANES + tl.arange(0, LANES)[:, None, None, None] < left) & within
    if STEPS * LANES * INNER < 2**31:
        ahead = step * (LANES * INNER)
    else:
        ahead = step.to(tl.int64) * (LANES * INNER)
    if OP == 7 or OP == 8:
        x = tl.full(mask.shape, 1.0, ACC)
    else:
        x = tl.load(x_ptr + place + ahead, mask=mask, other=PADDING).to(ACC)
    dy = x
    folded = x
    if OP == 6:
        dy = tl.load(dy_ptr + place + ahead, mask=mask, other=0).to(ACC)
        folded = x * dy
    elif OP >= 7:
        dy = tl.load(dy_ptr + side, mask=within, other=0).to(ACC)
        if OP == 8:
            dy = dy / length.to(ACC)
        elif OP >= 9:
            y = tl.load(y_ptr + side, mask=within, other=0).to(ACC)
            if OP == 11:
                x = tl.where(y == float("-inf"), 0.0, _exp(x - y))
            else:
                x = tl.where(mask & ((x == y) | ((x != x) & (y != y))), 1.0, 0.0).to(ACC)
            folded = x
    return x, dy, folded, ahead, mask


@triton.jit
def _finite(top):
    return tl.where((top == float("-inf")) | (top == float("inf")), 0.0, top)


@triton.jit
def _along(x, HOW: tl.constexpr, WHOLE: tl.constexpr):
    """The sum (0), maximum (1) or minimum (2) along axis 2, or axes 2 and 0."""
    if HOW == 0:
        x = tl.sum(x, axis=2, keep_dims=True)
        x = tl.sum(x, axis=0, keep_dims=True) if WHOLE else x
        x = x + 0.0 if x.dtype.is_floating() else x  # the sum of -0.0, too, is the same with padding and without
    elif HOW == 1:
        x = tl.max(x, axis=2, keep_dims=True)
        x = tl.max(x, axis=0, keep_dims=True) if WHOLE else x
    else:
        x = tl.min(x, axis=2, keep_dims=True)
        x = tl.min(x, axis=0, keep_dims=True) if WHOLE else x
    return x


@triton.jit
def _folded(top, total, tops, totals, OP: tl.constexpr, WHOLE: tl.constexpr):
    """Fold what comes next to the state so far: the greatest (or the sum, or least), and the sum of exp(x - greatest)."""
    if OP == 0 or OP == 5:
        before = top
        top = tl.maximum(before, _along(tops, 1, WHOLE))
        total = total * _exp(before - _finite(top)) + _along(totals * _exp(tops - _finite(top)), 0, WHOLE)
    elif OP == 3 or OP == 4:
        more = _along(tops, 1 if OP == 3 else 2, WHOLE)
        if tops.dtype.is_floating():
            more = tl.where(_along((tops != tops).to(tl.int32), 1, WHOLE) != 0, float("nan"), more)
        if OP == 3:
            top = tl.maximum(top, more, propagate_nan=tl.PropagateNan.ALL)
        else:
            top = tl.minimum(top, more, propagate_nan=tl.PropagateNan.ALL)
    else:
        top += _along(tops, 0, WHOLE)
    return top, total


@triton.jit
def _mapped(x, dy, top, total, there, OP: tl.constexpr):
    """The softmax or the gradient of a tile, and zeros beyond the last sequence."""
    if OP == 0:
        x = _exp(x - _finite(top)) * tl.where(top == float("inf"), float("nan"), 1.0 / total)
    elif OP == 6:
        x = x * (dy - top)
    elif OP == 9 or OP == 10:
        x = tl.where(x != 0, dy / top, 0.0)
    else:
        x = x * dy
    return tl.where(there, x, 0.0)


@triton.jit
def _result(top, total, length, OP: tl.constexpr, NOTHING: tl.constexpr, ACC: tl.constexpr):
    """The reduction of whole sequences."""
    if OP == 2:
        top = top / length.to(ACC)
    elif OP == 5:
        top = tl.where(total == 0, float("-inf"), tl.log(total) + _finite(top))
    return tl.where(length == 0, tl.full((), NOTHING, ACC), top)
