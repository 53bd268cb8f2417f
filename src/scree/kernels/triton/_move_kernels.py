"""The kernels that move tokens: padding, unpadding by a mask, and gathering rows.

A token is F elements that lie side by side, so a sequence is one run of memory, and a tile is part of a run, or some
short runs whole. What is not moved is written in the same pass. Elements are moved as they are, bit for bit.
"""

import triton
import triton.language as tl

from ._rope_kernels import _row_of


@triton.jit
def _bounds(offsets_ptr, row, there, total):
    """Where sequences begin and end, inside the values whatever the offsets say."""
    start = tl.load(offsets_ptr + row, mask=there, other=0).to(tl.int64)
    stop = tl.load(offsets_ptr + row + 1, mask=there, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    return start, tl.minimum(tl.maximum(stop, start), total)


@triton.jit
def _before(firsts_ptr, row, there, start, stop, width, SIDE: tl.constexpr):
    """How many places of its padded row come before a sequence: none, what is left, or what `firsts` says."""
    if SIDE == "right":
        return start * 0
    if SIDE == "left":
        return width - (stop - start)
    return tl.load(firsts_ptr + row, mask=there, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["tiles", "rows", "total", "width", "fill", "nan"])
def _pad_kernel(
    x_ptr,
    offsets_ptr,
    firsts_ptr,
    y_ptr,
    mask_ptr,
    tiles: "i32",
    rows: "i64",
    total: "i64",
    width: "i64",
    stride_x: "i64",
    fill: "i64",
    nan: "i64",
    F: tl.constexpr,
    SIDE: tl.constexpr,
    DENSE: tl.constexpr,
    CHECK: tl.constexpr,
    WORD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Tiles of the padded rows, and with them PLACES of the mask."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = (pid % tiles).to(tl.int64)
    there = row < rows
    start, stop = _bounds(offsets_ptr, row, there, total)
    first = start - _before(firsts_ptr, row, there, start, stop, width, SIDE)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    source = first[:, None] * F + at[None, :]
    inside = at < width * F
    valid = (source >= start[:, None] * F) & (source < stop[:, None] * F) & inside[None, :]
    if not DENSE:
        source = (first[:, None] + (at // F)[None, :]) * stride_x + (at % F)[None, :]
    x = tl.load(x_ptr + source, mask=valid).to(WORD, bitcast=True)
    y = tl.where(valid, x, tl.cast(fill, WORD))
    if CHECK:
        y = tl.where((stop - start > width)[:, None], tl.cast(nan, WORD), y)
    target = y_ptr + row[:, None] * (width * F) + at[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty, bitcast=True), mask=there[:, None] & inside[None, :])
    place = tile * PLACES + tl.arange(0, PLACES)
    token = first[:, None] + place[None, :]
    real = (token >= start[:, None]) & (token < stop[:, None])
    writes = there[:, None] & (place < width)[None, :]
    tl.store(mask_ptr + row[:, None] * width + place[None, :], real.to(tl.int8), mask=writes)


@triton.jit(do_not_specialize=["columns", "tokens", "rows", "steps", "width"])
def _unpad_kernel(
    x_ptr,
    offsets_ptr,
    firsts_ptr,
    y_ptr,
    columns: "i32",
    tokens: "i64",
    rows: "i64",
    steps: "i64",
    width: "i64",
    F: tl.constexpr,
    SIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse, by tiles of tokens, each of which looks up its place; 0 for one that has none, or in a row too long."""
    pid = tl.program_id(0)
    token = (pid // columns).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    col = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    row = _row_of(offsets_ptr, token, rows, steps)
    found = there & (row < rows)
    start, stop = _bounds(offsets_ptr, row, found, tokens)
    place = token - start + _before(firsts_ptr, row, found, start, stop, width, SIDE)
    found = found & (token >= start) & (token < stop) & (stop - start <= width) & (place >= 0) & (place < width)
    within = (col < F)[None, :]
    source = (row * width + place)[:, None] * F + col[None, :]
    x = tl.load(x_ptr + source, mask=found[:, None] & within, other=0)
    tl.store(y_ptr + token[:, None] * F + col[None, :], x, mask=there[:, None] & within)


@triton.jit(do_not_specialize=["width"])
def _count_kernel(
    mask_ptr,
    counts_ptr,
    firsts_ptr,
    width: "i64",
    IS_BOOL: tl.constexpr,
    INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many places of a row are kept, or -1 if its mask has other values than 0 and 1; and which one is the first.

    Where others lie between those that are kept, there is no first one: -1.
    """
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row * width
    keeps = tl.zeros((BLOCK,), INT)
    odd = tl.zeros((BLOCK,), tl.int32)
    low = tl.zeros((BLOCK,), INT) + width.to(INT)
    high = tl.full((BLOCK,), -1, INT)
    for begin in range(0, width, BLOCK):
        place = (begin + tl.arange(0, BLOCK)).to(INT)
        m = tl.load(mask_ptr + place, mask=place < width, other=0)
        keep = m != 0 if IS_BOOL else m == 1
        if not IS_BOOL:
            odd = odd | ((m != 0) & (m != 1)).to(tl.int32)
        keeps += keep.to(INT)
        low = tl.minimum(low, tl.where(keep, place, width.to(INT)))
        high = tl.maximum(high, tl.where(keep, place, -1))
    count = tl.sum(keeps, 0)
    first = tl.min(low, 0)
    run = tl.max(high, 0) - first + 1 == count
    tl.store(counts_ptr + row, tl.where(tl.max(odd, 0) != 0, -1, count))
    tl.store(firsts_ptr + row, tl.where(count == 0, 0, tl.where(run, first, -1)))


@triton.jit(do_not_specialize=["rows"])
def _offsets_kernel(
    counts_ptr,
    firsts_ptr,
    offsets_ptr,
    report_ptr,
    rows: "i64",
    BLOCK: tl.constexpr,
):
    """Add the counts up to offsets, there and on the host: in `report` behind how many rows have holes or odd masks."""
    total = tl.full((), 0, tl.int64)
    holes = tl.full((), 0, tl.int32)
    odd = tl.full((), 0, tl.int32)
    tl.store(offsets_ptr, total.to(offsets_ptr.dtype.element_ty))
    tl.store(report_ptr + 2, total)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        there = row < rows
        count = tl.load(counts_ptr + row, mask=there, other=0).to(tl.int64)
        first = tl.load(firsts_ptr + row, mask=there, other=0)
        stop = total + tl.cumsum(count, 0)
        tl.store(offsets_ptr + row + 1, stop.to(offsets_ptr.dtype.element_ty), mask=there)
        tl.store(report_ptr + row + 3, stop, mask=there)
        total += tl.sum(count, 0)
        holes += tl.sum((first < 0).to(tl.int32), 0)
        odd += tl.sum((count < 0).to(tl.int32), 0)
    tl.store(report_ptr, holes.to(tl.int64))
    tl.store(report_ptr + 1, odd.to(tl.int64))


@triton.jit(do_not_specialize=["width"])
def _places_kernel(
    mask_ptr,
    offsets_ptr,
    places_ptr,
    width: "i64",
    BLOCK: tl.constexpr,
):
    """For each token where it is in the padded batch, by a mask that may have holes."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(offsets_ptr + row).to(tl.int64)
    for begin in range(0, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        keep = (tl.load(mask_ptr + row * width + place, mask=place < width, other=0) != 0).to(tl.int32)
        rank = tl.cumsum(keep, 0) - keep
        tl.store(places_ptr + target + rank, row * width + place, mask=keep != 0)
        target += tl.sum(keep, 0)


@triton.jit(do_not_specialize=["columns", "tokens"])
def _by_places_kernel(
    x_ptr,
    places_ptr,
    y_ptr,
    columns: "i32",
    tokens: "i64",
    F: tl.constexpr,
    PUT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take tokens y from their places in x, or put them there."""
    pid = tl.program_id(0)
    token = (pid // columns).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    col = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (col < F)[None, :]
    here = x_ptr + tl.load(places_ptr + token, mask=token < tokens, other=0)[:, None] * F + col[None, :]
    there = y_ptr + token[:, None] * F + col[None, :]
    if PUT:
        tl.store(here, tl.load(there, mask=mask), mask=mask)
    else:
        tl.store(there, tl.load(here, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["tiles", "rows"])
def _rows_fwd_kernel(
    x_ptr,
    starts_ptr,
    offsets_ptr,
    y_ptr,
    tiles: "i32",
    rows: "i64",
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of the result: the run of the source that begins at its start."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    source = tl.load(starts_ptr + row, mask=there, other=0)
    target = tl.load(offsets_ptr + row, mask=there, other=0)
    length = tl.load(offsets_ptr + row + 1, mask=there, other=0) - target
    at = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at[None, :] < length[:, None] * F
    x = tl.load(x_ptr + source[:, None] * F + at[None, :], mask=mask)
    tl.store(y_ptr + target[:, None] * F + at[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["tiles", "rows"])
def _rows_bwd_kernel(
    dy_ptr,
    starts_ptr,
    lengths_ptr,
    lists_ptr,
    places_ptr,
    dx_ptr,
    tiles: "i32",
    rows: "i64",
    F: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a row of the source: the sum over the rows that were made of it, in their order."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    at = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.load(lengths_ptr + row) * F
    total = tl.zeros((BLOCK,), ACC)
    for i in range(tl.load(lists_ptr + row), tl.load(lists_ptr + row + 1)):
        total += tl.load(dy_ptr + tl.load(places_ptr + i) * F + at, mask=mask, other=0).to(ACC)
    target = dx_ptr + tl.load(starts_ptr + row) * F + at
    tl.store(target, total.to(dx_ptr.dtype.element_ty), mask=mask)
