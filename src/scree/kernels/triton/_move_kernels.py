"""The kernels that move tokens: padding, unpadding by a mask, and gathering rows.

A token is F elements that lie side by side, so a sequence is one run of memory, and a tile is part of a run, or some
short runs whole. What is not moved is written in the same pass. Elements are moved as they are, bit for bit.
"""

import triton
import triton.language as tl


@triton.jit
def _bounds(offsets_ptr, row, there, total):
    """Where sequences begin and end, inside the values whatever the offsets say."""
    start = tl.load(offsets_ptr + row, mask=there, other=0).to(tl.int64)
    stop = tl.load(offsets_ptr + row + 1, mask=there, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), total)
    return start, tl.minimum(tl.maximum(stop, start), total)


@triton.jit(do_not_specialize=["tiles", "rows", "total", "width", "fill", "nan"])
def _pad_fwd_kernel(
    x_ptr,
    offsets_ptr,
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
    LEFT: tl.constexpr,
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
    first = start
    if LEFT:
        first = stop - width
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


@triton.jit(do_not_specialize=["tiles", "rows", "total", "width"])
def _pad_bwd_kernel(
    dy_ptr,
    offsets_ptr,
    dx_ptr,
    tiles: "i32",
    rows: "i64",
    total: "i64",
    width: "i64",
    F: tl.constexpr,
    LEFT: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same tiles the other way; a sequence that was too long gets 0."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    start, stop = _bounds(offsets_ptr, row, there, total)
    first = start
    if LEFT:
        first = stop - width
    at = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    target = first[:, None] * F + at[None, :]
    valid = (target >= start[:, None] * F) & (target < stop[:, None] * F) & (at < width * F)[None, :]
    reads = valid
    if CHECK:
        reads = valid & (stop - start <= width)[:, None]
    dy = tl.load(dy_ptr + row[:, None] * (width * F) + at[None, :], mask=reads, other=0)
    tl.store(dx_ptr + target, dy, mask=valid)


@triton.jit(do_not_specialize=["width"])
def _rank_kernel(
    mask_ptr,
    rank_ptr,
    counts_ptr,
    width: "i64",
    IS_BOOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each place of a row how many places before it are kept, -1 where it is not kept; and how many are in all.

    A row with a value that is neither 0 nor 1 counts -2**30.
    """
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row * width
    rank_ptr += row * width
    count = tl.full((), 0, tl.int32)
    odd = tl.full((), 0, tl.int32)
    for begin in range(0, width, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        m = tl.load(mask_ptr + place, mask=place < width, other=0)
        if IS_BOOL:
            keep = (m != 0).to(tl.int32)
        else:
            keep = (m == 1).to(tl.int32)
            odd = tl.maximum(odd, tl.max(((m != 1) & (m != 0)).to(tl.int32), axis=0))
        rank = count + tl.cumsum(keep, axis=0) - keep
        tl.store(rank_ptr + place, tl.where(keep != 0, rank, -1), mask=place < width)
        count += tl.sum(keep, axis=0)
    if row == 0:
        tl.store(counts_ptr, 0)
    tl.store(counts_ptr + 1 + row, tl.where(odd != 0, -(2**30), count))


@triton.jit(do_not_specialize=["columns", "places", "width"])
def _unpad_fwd_kernel(
    x_ptr,
    rank_ptr,
    offsets_ptr,
    y_ptr,
    columns: "i32",
    places: "i64",
    width: "i64",
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tiles of padded places, each token to where its row begins plus its rank."""
    pid = tl.program_id(0)
    place = (pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(rank_ptr + place, mask=place < places, other=-1)
    keep = rank >= 0
    token = tl.load(offsets_ptr + place // width, mask=keep, other=0).to(tl.int64) + rank
    mask = keep[:, None] & (col < F)[None, :]
    x = tl.load(x_ptr + place[:, None] * F + col[None, :], mask=mask)
    tl.store(y_ptr + token[:, None] * F + col[None, :], x, mask=mask)


@triton.jit(do_not_specialize=["columns", "places", "width"])
def _unpad_bwd_kernel(
    dy_ptr,
    rank_ptr,
    offsets_ptr,
    dx_ptr,
    columns: "i32",
    places: "i64",
    width: "i64",
    F: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    place = (pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(rank_ptr + place, mask=place < places, other=-1)
    keep = rank >= 0
    token = tl.load(offsets_ptr + place // width, mask=keep, other=0).to(tl.int64) + rank
    within = (col < F)[None, :]
    dy = tl.load(dy_ptr + token[:, None] * F + col[None, :], mask=keep[:, None] & within, other=0)
    tl.store(dx_ptr + place[:, None] * F + col[None, :], dy, mask=(place < places)[:, None] & within)


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
