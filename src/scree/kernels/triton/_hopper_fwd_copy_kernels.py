"""The warp of attention forward for Hopper that copies, in Gluon: it takes tiles and fetches what they need."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ._attention_fwd_kernels import _span, _tile
from ._tiles_kernels import ABSENT
from ._tiles_kernels import FIELDS as TILE_FIELDS

GROUPS = gl.constexpr(2)  # that multiply
ROWS = gl.constexpr(64)  # of a tile, for each of them
BLOCK_M = gl.constexpr(128)
FIELDS = gl.constexpr(6)  # of a tile, in shared memory
END = gl.constexpr(2**30)
FAR = gl.constexpr(2**34)
UNBOUNDED = gl.constexpr(0x7FFF0000)

_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # as Triton 3.8 calls it


@gluon.jit
def _ragged(ptr, stride_t, columns, BLOCK: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Describe (T, columns) to the copy engine so that each box can end with a sequence: beyond, it reads zeros.

    Its element (a, b, c, d) is at ``a * (FAR - stride_t) + b * stride_t + c * stride_t + d``, in 64 bits that wrap
    around. Row r of a sequence is asked for at a = END, b = start + length, c = END - length + r: the terms with END
    cancel, what is left is ``(start + r) * stride_t``, and c is within its bound, END, as long as r < length.
    """
    far: gl.constexpr = FAR
    return tma.make_tensor_descriptor(
        ptr, [UNBOUNDED, UNBOUNDED, END, columns], [far - stride_t, stride_t, stride_t, 1], [1, 1, BLOCK, WIDTH], LAYOUT
    )


@gluon.jit
def _load(desc, start, length, row, column, barrier, to):
    _tma_load(desc, [END, start + length, END - length + row, column], barrier, to)


@gluon.jit
def _write(memory, place, value):
    """Write a number for the other warps, from the copying one."""
    memory.index(place).store(gl.full([1], value, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _read(memory, place, WARPS: gl.constexpr):
    """A number that the copying warp wrote, for so many warps."""
    return gl.max(memory.index(place).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def _taken(counters):
    """Ask for the number of a tile, in one lane, with 0 in the others: whose places differ, or it is waited for."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    number = gl.atomic_add(counters + lane, gl.full_like(lane, 1), mask=lane == 0, sem="relaxed")
    return gl.where(lane == 0, number.to(gl.int32), 0)


@gluon.jit
def _work(tiles_ptr, index, slots, HEADS: gl.constexpr, INNER: gl.constexpr):
    """The head and the tile of a number."""
    outer = index // INNER
    head = index % INNER
    if INNER != HEADS:
        head += outer // slots * INNER
        outer = outer % slots
    return head, _tile(tiles_ptr, outer)


@gluon.jit
def _copy(
    memory, barriers, arguments,
    HEADS: gl.constexpr, SHARED: gl.constexpr, INNER: gl.constexpr, BLOCK_N: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The warp that copies: takes tiles, tells the others which, and fetches what they need in the order of their use."""
    q_sm, k_sm, v_sm, _, tile_sm = memory
    tile_full, tile_empty, k_full, k_empty, v_full, v_empty = barriers
    q_desc, k_desc, v_desc, tiles_ptr, stride_q_h, stride_k_h, stride_v_h, slots, left, right = arguments
    turn = 0
    count = 0
    counters = tiles_ptr + slots.to(gl.int64) * TILE_FIELDS
    index = gl.program_id(0)
    if AHEAD:
        taken = _taken(counters)
        head, tile = _work(tiles_ptr, index, slots, HEADS, INNER)
    while index < slots * HEADS:
        if AHEAD:  # the next tile, and the number of the one after it, are on their way while this one is copied
            following = gl.num_programs(0) + gl.max(taken, 0)
            taken = _taken(counters)
            next_head, next_tile = _work(tiles_ptr, gl.minimum(following, slots * HEADS - 1), slots, HEADS, INNER)
        else:
            head, tile = _work(tiles_ptr, index, slots, HEADS, INNER)
        kind, q_from, q_length, k_from, k_length, block, _row = tile
        if kind != ABSENT:
            slot = turn % TILES
            q_start = q_from.to(gl.int32)
            k_start = k_from.to(gl.int32)
            mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
            _write(tile_sm, slot * FIELDS, kind)
            _write(tile_sm, slot * FIELDS + 1, q_start)
            _write(tile_sm, slot * FIELDS + 2, q_length)
            _write(tile_sm, slot * FIELDS + 3, k_length)
            _write(tile_sm, slot * FIELDS + 4, block)
            _write(tile_sm, slot * FIELDS + 5, head)
            full = tile_full.index(slot)
            mbarrier.arrive(full, count=1)
            mbarrier.expect(full, GROUPS * q_desc.block_type.nbytes)
            q_column = (head * stride_q_h).to(gl.int32)
            for group in gl.static_range(GROUPS):
                to = q_sm.index(slot * GROUPS + group)
                _load(q_desc, q_start, q_length, block * BLOCK_M + group * ROWS, q_column, full, to)
            begin, _a, _b, end = _span(block, q_length, k_length, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
            steps = gl.maximum((end - begin + BLOCK_N - 1) // BLOCK_N, 1)
            k_column = (head // SHARED * stride_k_h).to(gl.int32)
            v_column = (head // SHARED * stride_v_h).to(gl.int32)
            for i in range(steps):
                at = begin + (steps - 1 - i) * BLOCK_N
                stage = count % STAGES
                free = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), free)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                _load(k_desc, k_start, k_length, at, k_column, k_full.index(stage), k_sm.index(stage))
                mbarrier.wait(v_empty.index(stage), free)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                _load(v_desc, k_start, k_length, at, v_column, v_full.index(stage), v_sm.index(stage))
                count += 1
            turn += 1
        if AHEAD:
            index = following
            head = next_head
            tile = next_tile
        else:
            index = gl.num_programs(0) + gl.atomic_add(counters, 1, sem="relaxed").to(gl.int32)
    slot = turn % TILES
    mbarrier.wait(tile_empty.index(slot), (turn // TILES & 1) ^ 1)
    _write(tile_sm, slot * FIELDS, ABSENT)
    mbarrier.arrive(tile_full.index(slot), count=2)
    if gl.atomic_add(counters + 1, 1) == gl.num_programs(0) - 1:  # all have taken their last: ready for the next launch
        gl.store(counters, 0)
        gl.store(counters + 1, 0)
