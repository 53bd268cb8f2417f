"""Which tile of which sequence each program works on, found on the device from the offsets alone."""

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)  # integers a tile: a sector of 32 bytes where they are int32

ABSENT = tl.constexpr(0)  # no tile: the grid is an upper bound
ROWS = tl.constexpr(1)  # rows of a sequence
SPARE = tl.constexpr(2)  # rows that belong to no sequence, where a kernel writes zeros
WHOLE = tl.constexpr(3)  # rows of a sequence that a program takes whole, with its rows of the other side


@triton.jit
def _slot(cu_ptr, i, BLOCK: tl.constexpr):
    """The first slot of sequence i: no sequence needs more slots than lie between its own and the next one's."""
    return tl.load(cu_ptr + i).to(tl.int64) // BLOCK + i


@triton.jit
def _tile_of(
    slot, cu_ptr, other_ptr, batch, total, left, right, halvings,
    BLOCK: tl.constexpr, OTHER: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BUCKETS: tl.constexpr,
    SMALL: tl.constexpr,
):  # fmt: skip
    """For each slot its tile, and the bucket of its cost: the larger, the more blocks of the other side it sees."""
    low = tl.zeros_like(slot)
    high = low + batch  # the last one stands for what lies beyond offsets[-1]
    for _ in range(halvings):
        middle = (low + high + 1) // 2
        fits = _slot(cu_ptr, middle, BLOCK) <= slot
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    spare = low == batch
    start = tl.load(cu_ptr + low).to(tl.int64)
    stop = tl.where(spare, total, tl.load(cu_ptr + tl.minimum(low + 1, batch)).to(tl.int64))
    block = slot - (start // BLOCK + low)
    length = stop - start
    other_start = tl.load(other_ptr + low).to(tl.int64)
    other_length = tl.load(other_ptr + tl.minimum(low + 1, batch)).to(tl.int64) - other_start

    first = block * BLOCK + other_length - length
    last = tl.minimum(block * BLOCK + BLOCK, length) - 1 + other_length - length
    begin = tl.zeros_like(first)
    end = other_length
    if HAS_LEFT:
        begin = tl.maximum(begin, first - left)
    if HAS_RIGHT:
        end = tl.minimum(end, last + right + 1)
    cost = tl.maximum(end // OTHER - begin // OTHER + 1, 1)
    there = (block >= 0) & (block * BLOCK < length)
    kind = tl.where(spare, SPARE, ROWS)
    if SMALL != 0:
        most: tl.constexpr = SMALL if SMALL > 0 else -SMALL
        whole = (length > 0) & (length <= most) & (other_length > 0) & (other_length <= most) & (low < batch)
        there = there & ~(whole & (SMALL < 0))
        kind = tl.where(whole, WHOLE, kind)
        # Before all others: their programs wait for no other kernel.
        cost = tl.where(whole, cost * ((tl.minimum(length, most) + BLOCK - 1) // BLOCK) + BUCKETS // 4, cost)
    half: tl.constexpr = BUCKETS // 2
    bucket = tl.where(cost < half, cost, tl.minimum(half + (cost - half) // 16, BUCKETS - 1))
    bucket = tl.where(there, tl.where(spare, 1, bucket), 0)
    kind = tl.where(there, kind, ABSENT)
    return low, start, length, other_start, tl.where(spare, 0, other_length), block, kind, bucket


@triton.jit
def _are_bad(cu_ptr, i, batch, total):
    """Whether offsets i and i + 1 do not start at 0, fall, or go past the end."""
    inside = i <= batch
    this = tl.load(cu_ptr + i, mask=inside, other=0).to(tl.int64)
    following = tl.load(cu_ptr + i + 1, mask=i < batch, other=0).to(tl.int64)
    bad = (this < 0) | (this > total) | ((i == 0) & (this != 0)) | ((i < batch) & (following < this))
    return inside & bad


@triton.jit(do_not_specialize=["total", "other_total", "batch", "slots", "left", "right", "halvings"])
def _count_tiles_kernel(
    cu_ptr, other_ptr, counts_ptr,
    total: "i64", other_total: "i64", batch: "i32", slots: "i32", left: "i32", right: "i32", halvings: "i32",
    BLOCK: tl.constexpr, OTHER: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BUCKETS: tl.constexpr, LANES: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Count the tiles of each cost in ``counts[:BUCKETS]``; raise ``counts[2 * BUCKETS]`` if the offsets are bad."""
    slot = tl.program_id(0) * LANES + tl.arange(0, LANES)
    bad = _are_bad(cu_ptr, slot, batch, total) | _are_bad(other_ptr, slot, batch, other_total)
    tl.atomic_max(counts_ptr + 2 * BUCKETS + tl.zeros_like(slot), bad.to(tl.int32), mask=bad)
    _, _, _, _, _, _, _, bucket = _tile_of(
        slot.to(tl.int64), cu_ptr, other_ptr, batch, total, left, right, halvings,
        BLOCK, OTHER, HAS_LEFT, HAS_RIGHT, BUCKETS, SMALL,
    )  # fmt: skip
    tl.atomic_add(counts_ptr + bucket, tl.full([LANES], 1, tl.int32), mask=slot < slots)


@triton.jit(do_not_specialize=["total", "batch", "slots", "left", "right", "halvings"])
def _place_tiles_kernel(
    cu_ptr, other_ptr, counts_ptr, tiles_ptr,
    total: "i64", batch: "i32", slots: "i32", left: "i32", right: "i32", halvings: "i32",
    BLOCK: tl.constexpr, OTHER: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BUCKETS: tl.constexpr, LANES: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Write each tile at its place, the costliest first; tiles of equal cost in any order."""
    slot = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = slot < slots
    row, start, length, other_start, other_length, block, kind, bucket = _tile_of(
        slot.to(tl.int64), cu_ptr, other_ptr, batch, total, left, right, halvings,
        BLOCK, OTHER, HAS_LEFT, HAS_RIGHT, BUCKETS, SMALL,
    )  # fmt: skip
    bad = tl.load(counts_ptr + 2 * BUCKETS) != 0
    if bad:  # nothing in the offsets can be relied on: all rows get zeros
        row = tl.zeros_like(start)
        start = row
        length = start + total
        other_start = start
        other_length = start
        block = slot.to(tl.int64)
        kind = tl.where(block * BLOCK < total, SPARE, ABSENT)
        place = slot
    else:
        count = tl.load(counts_ptr + tl.arange(0, BUCKETS))
        costlier = tl.sum(count) - tl.cumsum(count)
        rank = tl.atomic_add(counts_ptr + BUCKETS + bucket, tl.full([LANES], 1, tl.int32), mask=inside)
        place = tl.gather(costlier, bucket.to(tl.int32), 0) + rank
    entry = tiles_ptr + place.to(tl.int64) * FIELDS
    integer = tiles_ptr.dtype.element_ty
    tl.store(entry, start.to(integer), mask=inside)
    tl.store(entry + 1, length.to(integer), mask=inside)
    tl.store(entry + 2, other_start.to(integer), mask=inside)
    tl.store(entry + 3, other_length.to(integer), mask=inside)
    tl.store(entry + 4, block.to(integer), mask=inside)
    tl.store(entry + 5, kind.to(integer), mask=inside)
    tl.store(entry + 6, row.to(integer), mask=inside)
    counters = tiles_ptr + tl.cast(slots, tl.int64) * FIELDS + tl.arange(0, FIELDS)
    tl.store(counters, tl.zeros([FIELDS], integer), mask=tl.program_id(0) == 0)
