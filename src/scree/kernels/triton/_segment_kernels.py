"""The kernels of softmax and the reductions along the ragged axis.

Sequences of at most SHORT tokens go ROWS to a program. Longer ones are cut into chunks of CHUNK tokens, counted from
their own beginning, so that a result's bits depend on its sequence alone: a sequence of one chunk is finished where it
is loaded, the others leave the partial results of their chunks, which are combined in order. Chunks have numbered
slots: sequence i owns those from ``offsets[i] // CHUNK + i`` on, and finds itself by bisection. GROUP slots go to a
program, so that those of short sequences, where there is nothing to do, are passed over together.

Values are (outer, T, inner) in memory; the columns are outer x inner. What is loaded is (rows, tokens, columns).
OP is 0 softmax, 1 sum, 2 mean, 3 max, 4 min, 5 logsumexp; NOTHING is what an
empty sequence gives, PADDING what changes no result.
"""

import triton
import triton.language as tl


@triton.jit
def _offset(offsets_ptr, i, total, mask):
    """offsets[i], inside the values whatever it says."""
    found = tl.load(offsets_ptr + i, mask=mask, other=0).to(tl.int64)
    return tl.where(i == 0, 0, tl.minimum(tl.maximum(found, 0), total))


@triton.jit
def _owner(offsets_ptr, slot, rows, total, steps, CHUNK: tl.constexpr):
    """The sequence of a slot, its bounds, and the number of its chunk; `rows` for what lies beyond the last one."""
    low = slot * 0
    high = low + rows
    for _ in range(steps):
        middle = (low + high + 1) // 2
        own = _offset(offsets_ptr, middle, total, True) // CHUNK + middle <= slot
        low = tl.where(own, middle, low)
        high = tl.where(own, high, tl.maximum(middle - 1, low))
    start = _offset(offsets_ptr, low, total, True)
    stop = tl.maximum(_offset(offsets_ptr, low + 1, total, low < rows), start)
    chunk = slot - (start // CHUNK + low)
    return low, start, tl.where(low < rows, stop, total), chunk


@triton.jit
def _idle(offsets_ptr, first, rows, total, steps, LONGER: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Whether none of GROUP slots from `first` on belongs to a sequence of more than LONGER tokens, or lies beyond all."""
    row, start, stop, _ = _owner(offsets_ptr, first + tl.arange(0, GROUP), rows, total, steps, CHUNK)
    return tl.max(((row == rows) | (stop - start > LONGER)).to(tl.int32), 0) == 0


@triton.jit
def _columns(first, total, INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr):
    """Where columns lie within a token: what they have in common, and the rest, (1, 1, C), in 32 bits if that does."""
    col = tl.arange(0, BLOCK)
    if OUTER:
        col = first + col
        place = (col // INNER) * (total * INNER) + col % INNER
        first = first * 0
    else:
        place = col
    return first, place[None, None, :]


@triton.jit
def _side(row, cols, first, INNER: tl.constexpr, OUTER: tl.constexpr, BLOCK: tl.constexpr):
    """Where the result of a sequence lies, (1, 1, C), and which of its columns are there."""
    col = tl.arange(0, BLOCK)
    if OUTER:
        within = first + col < cols
    else:
        within = first + col < INNER  # of which the compiler sees how far it is the same for neighbours
    return row * cols + first + col[None, None, :], within[None, None, :]


@triton.jit
def _tile(
    start,
    length,
    chunk,
    first,
    total,
    within,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a chunk begins, where its elements lie from there, (1, K, C), and which of them are there."""
    shift, place = _columns(first, total, INNER, OUTER, BLOCK)
    at = tl.arange(0, CHUNK)
    there = at < tl.minimum(length - chunk * CHUNK, CHUNK).to(tl.int32)
    return (start + chunk * CHUNK) * INNER + shift, at[None, :, None] * INNER + place, there[None, :, None] & within


@triton.jit
def _runs(
    offsets_ptr,
    pid,
    columns,
    rows,
    total,
    cols,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of ROWS short sequences: lengths, where results and elements lie, and which are there."""
    row = (pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    start = _offset(offsets_ptr, row, total, there)
    length = tl.maximum(_offset(offsets_ptr, row + 1, total, there) - start, 0)
    there &= length <= SHORT
    first = (pid % columns).to(tl.int64) * BLOCK
    shift, place = _columns(first, total, INNER, OUTER, BLOCK)
    side, within = _side(row[:, None, None], cols, first, INNER, OUTER, BLOCK)
    within &= there[:, None, None]
    at = tl.arange(0, SHORT)
    mask = (at[None, :] < length.to(tl.int32)[:, None])[:, :, None] & within
    source = (start * INNER + shift)[:, None, None] + (at[None, :, None] * INNER + place)
    return length[:, None, None], side, within, source, mask


@triton.jit
def _finite(top):
    return tl.where((top == float("-inf")) | (top == float("inf")), 0.0, top)


@triton.jit
def _folded(tops, totals, OP: tl.constexpr):
    """Fold axis 1 of (R, K, C): the greatest value (or sum, greatest, least), and the sum of exp(x - greatest)."""
    if OP == 0 or OP == 5:
        top = tl.max(tops, axis=1, keep_dims=True)
        total = tl.sum(totals * tl.exp(tops - _finite(top)), axis=1, keep_dims=True)
    elif OP == 1 or OP == 2:
        top = tl.sum(tops, axis=1, keep_dims=True)
        total = top
    else:
        top = tl.max(tops, axis=1, keep_dims=True) if OP == 3 else tl.min(tops, axis=1, keep_dims=True)
        if tops.dtype.is_floating():
            top = tl.where(tl.max((tops != tops).to(tl.int32), axis=1, keep_dims=True) != 0, float("nan"), top)
        total = top
    return top, total


@triton.jit
def _loaded(source_ptr, mask, PADDING: tl.constexpr, ACC: tl.constexpr):
    x = tl.load(source_ptr, mask=mask, other=0).to(ACC)
    return tl.where(mask, x, tl.full((), PADDING, ACC))


@triton.jit
def _result(top, total, length, OP: tl.constexpr, NOTHING: tl.constexpr, ACC: tl.constexpr):
    """The reduction of whole sequences, from what `_folded` gives."""
    if OP == 2:
        top = top / length.to(ACC)
    if OP == 5:
        top = tl.where(total == 0, float("-inf"), tl.log(total) + _finite(top))
    return tl.where(length == 0, tl.full((), NOTHING, ACC), top)


@triton.jit
def _softened(x, top, total):
    return tl.where(top == float("inf"), float("nan"), tl.exp(x - _finite(top)) / total)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns"])
def _short_fwd_kernel(
    x_ptr,
    offsets_ptr,
    y_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    length, side, within, source, mask = _runs(
        offsets_ptr, pid, columns, rows, total, cols, INNER, OUTER, ROWS, SHORT, BLOCK
    )
    x = _loaded(x_ptr + source, mask, PADDING, ACC)
    top, sum_ = _folded(x, 1.0, OP)
    if OP == 0:
        y = _softened(x, top, sum_)
        tl.store(y_ptr + source, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        y = _result(top, sum_, length, OP, NOTHING, ACC)
        tl.store(y_ptr + side, y.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns", "steps"])
def _chunk_fwd_kernel(
    x_ptr,
    offsets_ptr,
    y_ptr,
    tops_ptr,
    totals_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    steps: "i64",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    SHORT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sequences of one chunk, the partial results of longer ones, and the zeros beyond the last."""
    pid = tl.program_id(0)
    group = (pid // columns).to(tl.int64) * GROUP
    if GROUP > 1:
        if _idle(offsets_ptr, group, rows, total, steps, SHORT if SHORT > 0 else -1, GROUP, CHUNK):
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
        mine = (length > SHORT) & (chunk * CHUNK < length)
        if OP == 0:
            mine |= beyond
        else:
            if SHORT == 0:
                mine |= chunk == 0
            mine &= row < rows
        if mine:
            first = (pid % columns).to(tl.int64) * BLOCK
            side, within = _side(row, cols, first, INNER, OUTER, BLOCK)
            base, source, mask = _tile(start, length, chunk, first, total, within, INNER, OUTER, CHUNK, BLOCK)
            target = y_ptr + base + source if OP == 0 else y_ptr + side
            if beyond:
                if OP == 0:
                    tl.store(target, tl.zeros((1, CHUNK, BLOCK), y_ptr.dtype.element_ty), mask=mask)
            else:
                x = _loaded(x_ptr + base + source, mask, PADDING, ACC)
                top, sum_ = _folded(x, 1.0, OP)
                if length > CHUNK:
                    partial, _ = _side(slot, cols, first, INNER, OUTER, BLOCK)
                    tl.store(tops_ptr + partial, top, mask=within)
                    if OP == 0 or OP == 5:
                        tl.store(totals_ptr + partial, sum_, mask=within)
                elif OP == 0:
                    y = _softened(x, top, sum_)
                    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)
                else:
                    y = _result(top, sum_, length, OP, NOTHING, ACC)
                    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns"])
def _join_kernel(
    tops_ptr,
    totals_ptr,
    offsets_ptr,
    y_ptr,
    sums_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    OP: tl.constexpr,
    RAW: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What the chunks of a longer sequence give together, CHUNKS at a time; with RAW not yet as a result."""
    pid = tl.program_id(0)
    group = (pid // columns).to(tl.int64) * GROUP
    if GROUP > 1:
        every = group + tl.arange(0, GROUP)
        starts = _offset(offsets_ptr, every, total, every < rows)
        lengths = _offset(offsets_ptr, every + 1, total, every < rows) - starts
        if tl.max(lengths, 0) <= CHUNK:
            return
    for i in range(GROUP):
        row = group + i
        start = _offset(offsets_ptr, row, total, row < rows)
        length = _offset(offsets_ptr, row + 1, total, row < rows) - start
        if length > CHUNK:
            first = (pid % columns).to(tl.int64) * BLOCK
            target, within = _side(row, cols, first, INNER, OUTER, BLOCK)
            slot = start // CHUNK + row
            chunks = tl.cdiv(length, CHUNK)
            top = tl.full((1, 1, BLOCK), PADDING, ACC)
            sum_ = tl.zeros((1, 1, BLOCK), ACC)
            for begin in range(0, chunks, CHUNKS):
                chunk = begin + tl.arange(0, CHUNKS)
                mask = (chunk < chunks)[None, :, None] & within
                side, _ = _side((slot + chunk)[None, :, None], cols, first, INNER, OUTER, BLOCK)
                tops = tl.load(tops_ptr + side, mask=mask, other=0)
                tops = tl.where(mask, tops, tl.full((), PADDING, ACC))
                if OP == 0 or OP == 5:
                    before = top
                    part, more = _folded(tops, tl.load(totals_ptr + side, mask=mask, other=0), OP)
                    top = tl.maximum(before, part)
                    sum_ = sum_ * tl.exp(before - _finite(top)) + more * tl.exp(part - _finite(top))
                else:
                    part, more = _folded(tops, tops, OP)
                    if OP == 1 or OP == 2:
                        top += part
                    elif OP == 3:
                        top = tl.maximum(top, part, propagate_nan=tl.PropagateNan.ALL)
                    else:
                        top = tl.minimum(top, part, propagate_nan=tl.PropagateNan.ALL)
            if not RAW:
                top = _result(top, sum_, length, OP, 0, ACC)
            tl.store(y_ptr + target, top.to(y_ptr.dtype.element_ty), mask=within)
            if RAW and OP == 0:
                tl.store(sums_ptr + target, sum_, mask=within)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns", "steps"])
def _soften_kernel(
    x_ptr,
    offsets_ptr,
    y_ptr,
    tops_ptr,
    totals_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    steps: "i64",
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The softmax of sequences of more than one chunk, whose maxima and sums (B, C) are there."""
    pid = tl.program_id(0)
    group = (pid // columns).to(tl.int64) * GROUP
    if GROUP > 1:
        if _idle(offsets_ptr, group, rows, total, steps, CHUNK, GROUP, CHUNK):
            return
    for i in range(GROUP):
        row, start, stop, chunk = _owner(offsets_ptr, group + i, rows, total, steps, CHUNK)
        length = stop - start
        if (row < rows) & (length > CHUNK) & (chunk * CHUNK < length):
            first = (pid % columns).to(tl.int64) * BLOCK
            side, within = _side(row, cols, first, INNER, OUTER, BLOCK)
            base, source, mask = _tile(start, length, chunk, first, total, within, INNER, OUTER, CHUNK, BLOCK)
            x = _loaded(x_ptr + base + source, mask, PADDING, ACC)
            top = tl.load(tops_ptr + side, mask=within, other=0)
            y = _softened(x, top, tl.load(totals_ptr + side, mask=within, other=1))
            tl.store(y_ptr + base + source, y.to(y_ptr.dtype.element_ty), mask=mask)
