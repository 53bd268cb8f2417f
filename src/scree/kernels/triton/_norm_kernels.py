"""The kernels of the norms over the last axis: each row of M features on its own.

A row is one token of one head: rows are numbered in memory order, whatever the axes before the last one are. Tiles are
ROWS x BLOCK with BLOCK >= M, in registers, so that values are read once; wider rows go in chunks. `stats` holds for
each row 1 / sqrt(variance + eps), and behind them, where the norm is centred, the means.
"""

import triton
import triton.language as tl


@triton.jit
def _starts(row, inner, stride_outer, stride, M: tl.constexpr, LAYOUT: tl.constexpr):
    """Where rows begin: one behind the other (0), or at one stride (1), or at two (2)."""
    if LAYOUT == 0:
        return row * M
    if LAYOUT == 1:
        return row * stride
    return (row // inner) * stride_outer + (row % inner) * stride


@triton.jit
def _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE: tl.constexpr):
    """Which rows are there, and belong to a sequence: `trail` rows make a token, `tokens` tokens a lead."""
    there = row < rows
    if SPARE:
        used = tl.load(offsets_ptr + batch_size).to(tl.int64)
        return there & ((row // trail) % tokens < used)
    return there


@triton.jit
def _inverse_root(x):
    if x.dtype == tl.float64:
        root = 1.0 / tl.sqrt(x)
    else:
        root = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))
    return root


_PER_CALL = ["rows", "inner", "batch_size", "trail", "tokens"]


@triton.jit(do_not_specialize=_PER_CALL)
def _norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    offsets_ptr,
    rows: "i64",
    inner: "i64",
    stride_x_outer: "i64",
    stride_x: "i64",
    batch_size: "i64",
    trail: "i64",
    tokens: "i64",
    M: tl.constexpr,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPARE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    there = row < rows
    real = _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE)
    within = (col < M)[None, :]
    start = _starts(row, inner, stride_x_outer, stride_x, M, LAYOUT)
    x = tl.load(x_ptr + start[:, None] + col[None, :], mask=real[:, None] & within, other=0.0).to(ACC)
    # asked for before the sums wait for x
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < M, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=col < M, other=0.0).to(ACC)[None, :]
    if CENTERED:
        mean = tl.sum(x, axis=1) * (1.0 / M)
        x = tl.where(within, x - mean[:, None], 0.0)
        if SAVE:
            tl.store(stats_ptr + rows + row, mean, mask=there)
    rstd = _inverse_root(tl.sum(x * x, axis=1) * (1.0 / M) + EPS)
    if SAVE:
        tl.store(stats_ptr + row, rstd, mask=there)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= weight
    if HAS_BIAS:
        y += bias
    if SPARE:
        y = tl.where(real[:, None], y, 0.0)
    target = y_ptr + row[:, None] * M + col[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=there[:, None] & within)


@triton.jit(do_not_specialize=_PER_CALL)
def _norm_fwd_wide_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    offsets_ptr,
    rows: "i64",
    inner: "i64",
    stride_x_outer: "i64",
    stride_x: "i64",
    batch_size: "i64",
    trail: "i64",
    tokens: "i64",
    M: tl.constexpr,
    EPS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPARE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program, read again for each step: from the cache, where it still is."""
    row = tl.program_id(0).to(tl.int64)
    real = _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE)
    x_ptr += _starts(row, inner, stride_x_outer, stride_x, M, LAYOUT)
    y_ptr += row * M
    mean = tl.full((), 0.0, ACC)
    if CENTERED:
        total = tl.zeros((BLOCK,), ACC)
        for begin in range(0, M, BLOCK):
            col = begin + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + col, mask=real & (col < M), other=0.0).to(ACC)
        mean = tl.sum(total) * (1.0 / M)
        if SAVE:
            tl.store(stats_ptr + rows + row, mean)
    total = tl.zeros((BLOCK,), ACC)
    for begin in range(0, M, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, mask=real & (col < M), other=0.0).to(ACC)
        x = tl.where(col < M, x - mean, 0.0)
        total += x * x
    rstd = _inverse_root(tl.sum(total) * (1.0 / M) + EPS)
    if SAVE:
        tl.store(stats_ptr + row, rstd)
    for begin in range(0, M, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, mask=real & (col < M), other=0.0).to(ACC)
        y = (x - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + col, mask=col < M, other=0.0).to(ACC)
        if HAS_BIAS:
            y += tl.load(bias_ptr + col, mask=col < M, other=0.0).to(ACC)
        if SPARE:
            y = tl.where(real, y, 0.0)
        tl.store(y_ptr + col, y.to(y_ptr.dtype.element_ty), mask=col < M)


@triton.jit(do_not_specialize=_PER_CALL)
def _norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    offsets_ptr,
    dx_ptr,
    dparts_ptr,
    rows: "i64",
    inner: "i64",
    stride_x_outer: "i64",
    stride_x: "i64",
    batch_size: "i64",
    trail: "i64",
    tokens: "i64",
    M: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPARE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Tiles of rows, dealt out in turn; the sums over rows stay in registers, and each program writes its own."""
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    within = (col < M)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < M, other=0.0).to(ACC)[None, :]
    if NEEDS_WEIGHT:
        dweight = tl.zeros((ROWS, BLOCK), ACC)
    if NEEDS_BIAS:
        dbias = tl.zeros((ROWS, BLOCK), ACC)
    for tile in tl.range(part, tl.cdiv(rows, ROWS), parts, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        real = _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE)
        mask = real[:, None] & within
        start = _starts(row, inner, stride_x_outer, stride_x, M, LAYOUT)
        x = tl.load(x_ptr + start[:, None] + col[None, :], mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + row[:, None] * M + col[None, :], mask=mask, other=0.0).to(ACC)
        rstd = tl.load(stats_ptr + row, mask=real, other=0.0)
        if CENTERED:
            mean = tl.load(stats_ptr + rows + row, mask=real, other=0.0)
            x -= mean[:, None]
        x *= rstd[:, None]
        if NEEDS_WEIGHT:
            dweight += dy * x
        if NEEDS_BIAS:
            dbias += dy
        if NEEDS_X:
            if HAS_WEIGHT:
                dy *= weight
            along = tl.sum(dy * x, axis=1) * (1.0 / M)
            dx = dy - x * along[:, None]
            if CENTERED:
                dx -= (tl.sum(dy, axis=1) * (1.0 / M))[:, None]
            dx *= rstd[:, None]
            target = dx_ptr + row[:, None] * M + col[None, :]
            tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=(row < rows)[:, None] & within)
    if NEEDS_WEIGHT:
        tl.store(dparts_ptr + part * M + col, tl.sum(dweight, axis=0), mask=col < M)
        dparts_ptr += parts.to(tl.int64) * M
    if NEEDS_BIAS:
        tl.store(dparts_ptr + part * M + col, tl.sum(dbias, axis=0), mask=col < M)


@triton.jit(do_not_specialize=_PER_CALL)
def _norm_bwd_means_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    offsets_ptr,
    along_ptr,
    rows: "i64",
    inner: "i64",
    stride_x_outer: "i64",
    stride_x: "i64",
    batch_size: "i64",
    trail: "i64",
    tokens: "i64",
    M: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPARE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a wide row the means that its gradient needs: of dy * weight times the normalised x, and of dy * weight."""
    row = tl.program_id(0).to(tl.int64)
    real = _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE)
    x_ptr += _starts(row, inner, stride_x_outer, stride_x, M, LAYOUT)
    dy_ptr += row * M
    mean = tl.full((), 0.0, ACC)
    if CENTERED:
        mean = tl.load(stats_ptr + rows + row, mask=real, other=0.0)
    along = tl.zeros((BLOCK,), ACC)
    level = tl.zeros((BLOCK,), ACC)
    for begin in range(0, M, BLOCK):
        col = begin + tl.arange(0, BLOCK)
        mask = real & (col < M)
        x = tl.load(x_ptr + col, mask=mask, other=0.0).to(ACC) - mean
        dy = tl.load(dy_ptr + col, mask=mask, other=0.0).to(ACC)
        if HAS_WEIGHT:
            dy *= tl.load(weight_ptr + col, mask=col < M, other=0.0).to(ACC)
        along += tl.where(mask, dy * x, 0.0)
        level += dy
    rstd = tl.load(stats_ptr + row, mask=real, other=0.0)
    tl.store(along_ptr + row, tl.sum(along) * rstd * (1.0 / M))
    if CENTERED:
        tl.store(along_ptr + rows + row, tl.sum(level) * (1.0 / M))


@triton.jit(do_not_specialize=_PER_CALL)
def _norm_bwd_wide_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    stats_ptr,
    along_ptr,
    offsets_ptr,
    dx_ptr,
    dparts_ptr,
    rows: "i64",
    inner: "i64",
    stride_x_outer: "i64",
    stride_x: "i64",
    batch_size: "i64",
    trail: "i64",
    tokens: "i64",
    M: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPARE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of columns of wide rows, with the means of the rows known."""
    part = tl.program_id(0).to(tl.int64)
    parts = tl.num_programs(0)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = (col < M)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + col, mask=col < M, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), ACC)
    dbias = tl.zeros((ROWS, BLOCK), ACC)
    for tile in range(part, tl.cdiv(rows, ROWS), parts):
        row = tile * ROWS + tl.arange(0, ROWS)
        real = _belong(row, rows, offsets_ptr, batch_size, trail, tokens, SPARE)
        mask = real[:, None] & within
        start = _starts(row, inner, stride_x_outer, stride_x, M, LAYOUT)
        x = tl.load(x_ptr + start[:, None] + col[None, :], mask=mask, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + row[:, None] * M + col[None, :], mask=mask, other=0.0).to(ACC)
        rstd = tl.load(stats_ptr + row, mask=real, other=0.0)
        if CENTERED:
            x -= tl.load(stats_ptr + rows + row, mask=real, other=0.0)[:, None]
        x *= rstd[:, None]
        if NEEDS_WEIGHT:
            dweight += dy * x
        if NEEDS_BIAS:
            dbias += dy
        if NEEDS_X:
            if HAS_WEIGHT:
                dy *= weight
            dx = dy - x * tl.load(along_ptr + row, mask=real, other=0.0)[:, None]
            if CENTERED:
                dx -= tl.load(along_ptr + rows + row, mask=real, other=0.0)[:, None]
            dx *= rstd[:, None]
            target = dx_ptr + row[:, None] * M + col[None, :]
            tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=(row < rows)[:, None] & within)
    if NEEDS_WEIGHT:
        tl.store(dparts_ptr + part * M + col, tl.sum(dweight, axis=0), mask=col < M)
        dparts_ptr += parts.to(tl.int64) * M
    if NEEDS_BIAS:
        tl.store(dparts_ptr + part * M + col, tl.sum(dbias, axis=0), mask=col < M)


@triton.jit(do_not_specialize=["parts"])
def _norm_bwd_sum_kernel(
    dparts_ptr,
    dweight_ptr,
    dbias_ptr,
    parts: "i64",
    M: tl.constexpr,
    FIRST: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up what the programs of the backward pass wrote, always in the same order: of the weight (0), the bias (1) or both."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dparts_ptr += tl.program_id(1) * parts * M
    total = tl.zeros((ROWS, BLOCK), ACC)
    for begin in range(0, parts, ROWS):
        part = begin + tl.arange(0, ROWS)
        mask = (part < parts)[:, None] & (col < M)[None, :]
        total += tl.load(dparts_ptr + part[:, None] * M + col[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if tl.program_id(1) + FIRST == 0:
        tl.store(dweight_ptr + col, result.to(dweight_ptr.dtype.element_ty), mask=col < M)
    else:
        tl.store(dbias_ptr + col, result.to(dbias_ptr.dtype.element_ty), mask=col < M)
