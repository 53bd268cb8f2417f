"""How programs that stay take tiles of keys, in the attention backward for Hopper: two warps that fetch what they need.

One of them takes the tiles and tells all other warps which, in shared memory, one tile ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents

from ._hopper_bwd_add_kernels import _take
from ._hopper_bwd_dq_kernels import TAKEN
from ._hopper_bwd_steps_kernels import BLOCK_N, _place, _steps
from ._hopper_fwd_copy_kernels import _load, _ragged, _read, _tma_load, _write
from ._tiles_kernels import ABSENT
from ._tiles_kernels import ROWS as PRESENT

TILES = gl.constexpr(2)  # that are known to a program at once
FIELDS = gl.constexpr(8)  # of a tile, in shared memory


@gluon.jit
def _told(tile_sm, slot, WARPS: gl.constexpr):
    """What a tile is: (kind, block, head, start and length of its keys, and of their queries, number of the sequence)."""
    place = slot * FIELDS
    kind = _read(tile_sm, place, WARPS)
    block = _read(tile_sm, place + 1, WARPS)
    head = _read(tile_sm, place + 2, WARPS)
    k_start = _read(tile_sm, place + 3, WARPS)
    k_length = _read(tile_sm, place + 4, WARPS)
    q_start = _read(tile_sm, place + 5, WARPS)
    q_length = _read(tile_sm, place + 6, WARPS)
    row = _read(tile_sm, place + 7, WARPS)
    return kind, block, head, k_start, k_length, q_start, q_length, row


@gluon.jit
def _fetch(
    x_sm, row_sm, kv_sm, full, empty, kv_full, kv_empty, descs, tile, columns, count, fetched,
    WHICH: gl.constexpr, SHARED: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch of a tile K, then Q and LSE, WHICH 0, or V, then dO and delta, 1, in the order of their use."""
    desc, kv_desc, rows_desc = descs
    block, head, k_start, k_length, q_start, q_length, row = tile
    stride_h, kv_stride_h, slots_q, right = columns
    begin, _m, end = _steps(block, k_length, q_length, right, BLOCK_M, True)
    if begin < end:
        mbarrier.wait(kv_empty, (fetched & 1) ^ 1)
        mbarrier.expect(kv_full, kv_desc.block_type.nbytes)
        _load(kv_desc, k_start, k_length, block * BLOCK_N, (head * kv_stride_h).to(gl.int32), kv_full, kv_sm)
        fetched += 1
    first = (head * SHARED * slots_q + q_start // BLOCK_M + row) * 2 + WHICH
    for at in range(end - BLOCK_M, begin - 1, -BLOCK_M):
        part = first + at // BLOCK_M * 2
        for member in range(SHARED):
            stage = count & STAGES - 1
            mbarrier.wait(empty.index(stage), (count & STAGES) // STAGES ^ 1)
            mbarrier.expect(full.index(stage), desc.block_type.nbytes + rows_desc.block_type.nbytes)
            column = ((head * SHARED + member) * stride_h).to(gl.int32)
            _load(desc, q_start, q_length, at, column, full.index(stage), x_sm.index(stage))
            _tma_load(rows_desc, [part, 0], full.index(stage), row_sm.index(stage))
            part += slots_q * 2
            count += 1
    return count, fetched


@gluon.jit
def _describe(
    ptr, kv_ptr, rows_ptr, stride_t, stride_h, kv_stride_t, kv_stride_h, slots_q,
    SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """What the copy engine has to know of what `_fetch` fetches."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    desc = _ragged(ptr, stride_t, ((HEADS * SHARED - 1) * stride_h + D).to(gl.int32), BLOCK_M, D, layout)
    kv_desc = _ragged(kv_ptr, kv_stride_t, ((HEADS - 1) * kv_stride_h + D).to(gl.int32), BLOCK_N, D, layout)
    rows_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    shape = [HEADS * SHARED * slots_q * 2, BLOCK_M]
    rows_desc = tma.make_tensor_descriptor(rows_ptr, shape, [BLOCK_M, 1], [1, BLOCK_M], rows_layout)
    return desc, kv_desc, rows_desc


@gluon.jit
def _take_and_fetch(
    x_sm, row_sm, kv_sm, tile_sm, barriers, of_tiles, inputs, taken,
    SHARED: gl.constexpr, HEADS: gl.constexpr, INNER: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that takes tiles, tells the others which, and fetches K, Q and LSE.

    As a block of a sequence it takes the next one that nobody has, so blocks start in their order.
    """
    full, empty, kv_full, kv_empty = barriers
    tile_full, tile_empty = of_tiles
    ptr, kv_ptr, rows_ptr, stride_t, stride_h, kv_stride_t, kv_stride_h, slots_q, right = inputs
    tiles_ptr, turns_ptr, slots = taken
    descs = _describe(
        ptr, kv_ptr, rows_ptr, stride_t, stride_h, kv_stride_t, kv_stride_h, slots_q, SHARED, HEADS, D, BLOCK_M
    )  # fmt: skip
    columns = (stride_h, kv_stride_h, slots_q, right)
    turn = 0
    fetched = 0
    count = 0
    index = gl.program_id(0)
    while index < slots * HEADS:
        head, place = _place(index, tiles_ptr, slots, HEADS, INNER, SHARED > 1)
        kind, k_from, k_length, q_from, q_length, block, row = place
        if kind != ABSENT:
            if kind == PRESENT:  # in the map too no block of a sequence is costlier than the one before
                block = _take(turns_ptr, row, head, slots_q)
            k_start = k_from.to(gl.int32)
            q_start = q_from.to(gl.int32)
            slot = turn % TILES
            mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
            _write(tile_sm, slot * FIELDS, kind)
            _write(tile_sm, slot * FIELDS + 1, block)
            _write(tile_sm, slot * FIELDS + 2, head)
            _write(tile_sm, slot * FIELDS + 3, k_start)
            _write(tile_sm, slot * FIELDS + 4, k_length)
            _write(tile_sm, slot * FIELDS + 5, q_start)
            _write(tile_sm, slot * FIELDS + 6, q_length)
            _write(tile_sm, slot * FIELDS + 7, row.to(gl.int32))
            mbarrier.arrive(tile_full.index(slot), count=1)
            tile = (block, head, k_start, k_length, q_start, q_length, row.to(gl.int32))
            count, fetched = _fetch(
                x_sm, row_sm, kv_sm, full, empty, kv_full, kv_empty, descs, tile, columns, count, fetched,
                0, SHARED, BLOCK_M, STAGES,
            )  # fmt: skip
            turn += 1
        index = gl.num_programs(0) + gl.atomic_add(turns_ptr + TAKEN, 1, sem="relaxed")
    gdc_launch_dependents()
    slot = turn % TILES
    mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
    _write(tile_sm, slot * FIELDS, ABSENT)
    mbarrier.arrive(tile_full.index(slot), count=1)


@gluon.jit
def _follow_and_fetch(
    x_sm, row_sm, kv_sm, tile_sm, barriers, of_tiles, inputs,
    SHARED: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that fetches V, dO and delta."""
    full, empty, kv_full, kv_empty = barriers
    tile_full, tile_empty = of_tiles
    ptr, kv_ptr, rows_ptr, stride_t, stride_h, kv_stride_t, kv_stride_h, slots_q, right = inputs
    descs = _describe(
        ptr, kv_ptr, rows_ptr, stride_t, stride_h, kv_stride_t, kv_stride_h, slots_q, SHARED, HEADS, D, BLOCK_M
    )  # fmt: skip
    columns = (stride_h, kv_stride_h, slots_q, right)
    turn = 0
    fetched = 0
    count = 0
    mbarrier.wait(tile_full.index(0), 0)
    kind, block, head, k_start, k_length, q_start, q_length, row = _told(tile_sm, 0, 1)
    while kind != ABSENT:
        mbarrier.arrive(tile_empty.index(turn % TILES), count=1)
        tile = (block, head, k_start, k_length, q_start, q_length, row)
        count, fetched = _fetch(
            x_sm, row_sm, kv_sm, full, empty, kv_full, kv_empty, descs, tile, columns, count, fetched,
            1, SHARED, BLOCK_M, STAGES,
        )  # fmt: skip
        turn += 1
        mbarrier.wait(tile_full.index(turn % TILES), turn // TILES & 1)
        kind, block, head, k_start, k_length, q_start, q_length, row = _told(tile_sm, turn % TILES, 1)
