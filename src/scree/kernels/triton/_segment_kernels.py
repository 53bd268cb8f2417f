"""The kernels of softmax and the reductions along the ragged axis, and of their gradients.

Each reads a sequence, folds it to a state per column, and gives that as its result or reads the sequence again, now with
the state, and maps it. What depends on the other sequences of a batch is only who does this, never how: a sequence's own
length decides in which order it is folded.

- A short one is one of several in a tile of one warp, that reads them once.
- One of medium length has that warp to itself.
- A long one is put on a list, in parts if it is very long, and programs of several warps take part after part from there.
  What the parts of one sequence were folded to is joined in order by those who then map it, or give the result.

Values are (outer, T, inner) in memory; the columns are outer x inner, of which a program has BLOCK. Tiles are (L, R, K, C):
token k * L + l of row r in column c. Triton deals their columns and lanes out to threads first, so that the folding of
axis 2 stays within a thread.
OP is 0 softmax, 1 sum, 2 mean, 3 max, 4 min, 5 logsumexp, and 6 more for the gradient of each. NOTHING is what an empty
sequence gives, PADDING what changes no result.
"""

import triton
import triton.language as tl

from ._segment_part_kernels import PARTS, _bounds, _folded, _mapped, _parts, _places, _read, _result


@triton.jit
def _at_once(
    x_ptr,
    dy_ptr,
    y_ptr,
    out_ptr,
    row,
    start,
    length,
    mine,
    first,
    rows,
    total,
    cols,
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sequences that fit in one tile, those that are `mine`."""
    place, side, within = _places(row, start, mine, first, total, cols, INNER, OUTER, BLOCK, LANES)
    x, dy, folded, ahead, mask = _read(
        x_ptr, dy_ptr, y_ptr, place, side, within, length.to(tl.int32), length, OP, INNER, PADDING, ACC, STEPS, LANES
    )
    none = tl.full((1, 1, 1, 1), PADDING, ACC)
    top, sum_ = _folded(none, tl.zeros((1, 1, 1, 1), ACC), folded, 1.0, OP, True)
    if OP == 0 or OP >= 6:
        y = _mapped(x, dy, top, sum_, row < rows, OP)
        tl.store(out_ptr + place + ahead, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        y = _result(top, sum_, length, OP, NOTHING, ACC)
        tl.store(out_ptr + side, y.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _short(
    x_ptr,
    dy_ptr,
    y_ptr,
    offsets_ptr,
    out_ptr,
    begin,
    first,
    rows,
    total,
    cols,
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The short ones of ROWS sequences, none of more than WIDTH tokens, as many at once as a tile holds."""
    FIT: tl.constexpr = TILE // (WIDTH * BLOCK)
    AT_ONCE: tl.constexpr = FIT if FIT < 16 else 16
    for i in range(0, ROWS, AT_ONCE):
        index = i + tl.arange(0, AT_ONCE)[None, :, None, None]
        start, length = _bounds(offsets_ptr, begin + index, rows, total, OP)
        mine = (index < ROWS) & (length >= 0) & (length <= SHORT)
        _at_once(
            x_ptr, dy_ptr, y_ptr, out_ptr, begin + index, start, length, mine, first, rows, total, cols,
            OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, WIDTH // LANES, LANES,
        )  # fmt: skip


@triton.jit
def _spread(
    x_ptr,
    dy_ptr,
    y_ptr,
    out_ptr,
    row,
    begin,
    tokens,
    length,
    top,
    sum_,
    first,
    rows,
    total,
    cols,
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Map tokens of a sequence that was folded to (top, sum_)."""
    place, side, within = _places(row, begin, True, first, total, cols, INNER, OUTER, BLOCK, LANES)
    for done in range(0, tokens, STEPS * LANES):
        here = place + done * INNER
        left = tl.minimum(tokens - done, STEPS * LANES).to(tl.int32)
        x, dy, _, ahead, mask = _read(
            x_ptr, dy_ptr, y_ptr, here, side, within, left, length, OP, INNER, PADDING, ACC, STEPS, LANES
        )
        y = _mapped(x, dy, top, sum_, row < rows, OP)
        tl.store(out_ptr + here + ahead, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _part(
    x_ptr,
    dy_ptr,
    y_ptr,
    out_ptr,
    state_ptr,
    row,
    begin,
    tokens,
    length,
    first,
    rows,
    total,
    cols,
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    CUT: tl.constexpr,
):
    """A sequence, or where CUT perhaps a part of one, whose state is then kept; that has more tokens than a tile."""
    TOKENS: tl.constexpr = STEPS * LANES
    if tokens <= TOKENS:
        _at_once(
            x_ptr, dy_ptr, y_ptr, out_ptr, row, begin, tokens, True, first, rows, total, cols,
            OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, STEPS, LANES,
        )  # fmt: skip
    else:
        place, side, within = _places(row, begin, True, first, total, cols, INNER, OUTER, BLOCK, LANES)
        top = tl.full((LANES, 1, 1, BLOCK), PADDING, ACC)
        sum_ = tl.zeros((LANES, 1, 1, BLOCK), ACC)
        if OP < 7 or OP == 9 or OP == 10:
            for done in range(0, tokens, TOKENS):
                left = tl.minimum(tokens - done, TOKENS).to(tl.int32)
                _, _, folded, _, _ = _read(
                    x_ptr, dy_ptr, y_ptr, place + done * INNER, side, within, left, length,
                    OP, INNER, PADDING, ACC, STEPS, LANES,
                )  # fmt: skip
                top, sum_ = _folded(top, sum_, folded, 1.0, OP, False)
        none = tl.full((1, 1, 1, 1), PADDING, ACC)
        top, sum_ = _folded(none, tl.zeros((1, 1, 1, 1), ACC), top, sum_, OP, True)
        whole = (tokens == length) | (row == rows) | (OP == 7 or OP == 8 or OP == 11)
        if whole:
            if OP == 0 or OP >= 6:
                _spread(
                    x_ptr, dy_ptr, y_ptr, out_ptr, row, begin, tokens, length, top, sum_, first, rows, total, cols,
                    OP, INNER, OUTER, PADDING, ACC, BLOCK, STEPS, LANES,
                )  # fmt: skip
            else:
                y = _result(top, sum_, length, OP, NOTHING, ACC)
                tl.store(out_ptr + side, y.to(out_ptr.dtype.element_ty), mask=within)
        elif CUT:
            col = tl.arange(0, BLOCK)[None, None, None, :]
            tl.store(state_ptr + col, top)
            if OP == 0 or OP == 5:
                tl.store(state_ptr + BLOCK + col, sum_)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns", "capacity"])
def _rows_kernel(
    x_ptr,
    dy_ptr,
    y_ptr,
    offsets_ptr,
    out_ptr,
    list_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    capacity: "i32",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    NARROW: tl.constexpr,
    MIDDLE: tl.constexpr,
    SHORT: tl.constexpr,
    SHORT_LANES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    MEDIUM: tl.constexpr,
    PART: tl.constexpr,
    LISTED: tl.constexpr,
):
    """ROWS sequences: the short ones together, those of medium length one by one; longer ones are put on the list.

    Without a list they are taken for medium ones, which nobody had reason to expect. The list begins behind 4 counts.
    """
    pid = tl.program_id(0)
    column = pid % columns
    first = column.to(tl.int64) * BLOCK
    begin = (pid // columns).to(tl.int64) * ROWS
    index = tl.arange(0, ROWS)
    _, lengths = _bounds(offsets_ptr, begin + index, rows, total, OP)
    longest = tl.max(lengths, 0)
    widest = tl.max(tl.where(lengths <= SHORT, lengths, -1), 0)
    if widest >= 0:
        if widest <= NARROW:
            _short(
                x_ptr, dy_ptr, y_ptr, offsets_ptr, out_ptr, begin, first, rows, total, cols,
                OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, NARROW, SHORT_LANES, SHORT, TILE, ROWS,
            )  # fmt: skip
        elif widest <= MIDDLE:
            _short(
                x_ptr, dy_ptr, y_ptr, offsets_ptr, out_ptr, begin, first, rows, total, cols,
                OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, MIDDLE, SHORT_LANES, SHORT, TILE, ROWS,
            )  # fmt: skip
        else:
            _short(
                x_ptr, dy_ptr, y_ptr, offsets_ptr, out_ptr, begin, first, rows, total, cols,
                OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, SHORT, SHORT_LANES, SHORT, TILE, ROWS,
            )  # fmt: skip
    if longest > SHORT:
        mine = lengths > SHORT
        if LISTED:
            counts_ptr = list_ptr.to(tl.pointer_type(tl.int32))
            list_ptr += 2
            mine = mine & (lengths <= MEDIUM)
            if (longest > MEDIUM) & (column == 0):
                _, parts = _parts(lengths, PART)
                parts = tl.where(lengths > MEDIUM, parts, 0)
                at = tl.cumsum(parts, 0) - parts
                at += tl.atomic_add(counts_ptr, tl.sum(parts, 0), sem="relaxed")
                fits = at + parts <= capacity
                most = tl.max(parts, 0)
                if most > 1:
                    tl.store(counts_ptr + 3, 1)
                for k in range(most):
                    entry = tl.where(fits, (begin + index) * PARTS + k, -1)
                    tl.store(list_ptr + at + k, entry, mask=(k < parts) & (at + k < capacity))
                mine = mine | ((lengths > MEDIUM) & (at + parts > capacity))  # of offsets that fall: done here
        i = tl.min(tl.where(mine, index, ROWS), 0)
        while i < ROWS:
            start, length = _bounds(offsets_ptr, begin + i, rows, total, OP)
            last = column + 1
            low = column
            if LISTED:
                if length > MEDIUM:
                    low = column * 0
                    last = columns
            for c in range(low, last):
                _part(
                    x_ptr, dy_ptr, y_ptr, out_ptr, out_ptr, begin + i, start, length, length, first + (c - column) * BLOCK,
                    rows, total, cols, OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, STEPS, LANES, False,
                )  # fmt: skip
            i = tl.min(tl.where(mine & (index > i), index, ROWS), 0)


@triton.jit(do_not_specialize=["rows", "total", "cols", "columns", "capacity"])
def _list_kernel(
    x_ptr,
    dy_ptr,
    y_ptr,
    offsets_ptr,
    out_ptr,
    list_ptr,
    states_ptr,
    next_ptr,
    rows: "i64",
    total: "i64",
    cols: "i64",
    columns: "i32",
    capacity: "i32",
    OP: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    NOTHING: tl.constexpr,
    PADDING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    PART: tl.constexpr,
    LAST: tl.constexpr,
):
    """What is on the list, part after part; with LAST those sequences whose parts have left their states.

    The counts of the next call's list, which nobody uses now, become zeros.
    """
    if not LAST:
        if tl.program_id(0) == 0:
            tl.store(next_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int64))
    counts_ptr = list_ptr.to(tl.pointer_type(tl.int32))
    list_ptr += 2
    count = tl.minimum(tl.load(counts_ptr), capacity) * columns  # in 32 bits: an item has thousands of elements
    if LAST:
        count *= tl.load(counts_ptr + 3)
    ticket_ptr = counts_ptr + (2 if LAST else 1)
    item = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while item < count:
        following = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
        entry = tl.load(list_ptr + item // columns)
        row = tl.maximum(entry, 0) // PARTS
        k = (tl.maximum(entry, 0) % PARTS).to(tl.int32)
        start, length = _bounds(offsets_ptr, row, rows, total, OP)
        size, parts = _parts(length, PART)
        begin = start + k * size
        tokens = tl.where(k < parts - 1, size, length - k * size)
        first = (item % columns).to(tl.int64) * BLOCK
        mine = entry >= 0
        if LAST:
            mine = mine & (parts > 1) & (row < rows)
            if OP < 6 and OP != 0:
                mine = mine & (k == 0)
        if mine:
            if LAST:
                part = tl.arange(0, 16)[:, None, None, None]
                col = tl.arange(0, BLOCK)[None, None, None, :]
                top = tl.full((1, 1, 1, BLOCK), PADDING, ACC)
                sum_ = tl.zeros((1, 1, 1, BLOCK), ACC)
                for j in range(0, parts, 16):
                    state_ptr = states_ptr + (item + (j + part - k) * columns).to(tl.int64) * (2 * BLOCK) + col
                    more = tl.load(state_ptr, mask=j + part < parts, other=PADDING)
                    its = more
                    if OP == 0 or OP == 5:
                        its = tl.load(state_ptr + BLOCK, mask=j + part < parts, other=0)
                    top, sum_ = _folded(top, sum_, more, its, OP, True)
                if OP == 0 or OP >= 6:
                    _spread(
                        x_ptr, dy_ptr, y_ptr, out_ptr, row, begin, tokens, length, top, sum_, first, rows, total, cols,
                        OP, INNER, OUTER, PADDING, ACC, BLOCK, STEPS, LANES,
                    )  # fmt: skip
                else:
                    _, side, within = _places(row, start, True, first, total, cols, INNER, OUTER, BLOCK, 1)
                    y = _result(top, sum_, length, OP, NOTHING, ACC)
                    tl.store(out_ptr + side, y.to(out_ptr.dtype.element_ty), mask=within)
            else:
                _part(
                    x_ptr, dy_ptr, y_ptr, out_ptr, states_ptr + item.to(tl.int64) * (2 * BLOCK), row, begin, tokens, length, first,
                    rows, total, cols, OP, INNER, OUTER, NOTHING, PADDING, ACC, BLOCK, STEPS, LANES, True,
                )  # fmt: skip
        item = following
