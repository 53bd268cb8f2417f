"""What attention's kernels for Hopper are made of: tiles in shared memory, products that nobody has to wait for, and roles.

They are written for Pallas's Mosaic GPU backend. A program has a tile of 128 tokens of one row and one head. Two
warpgroups compute with 64 of them each; a third has the copy engine bring the other side, a step at a time, into one of
two places, and waits until both are done with it.

The copy engine copies boxes of fixed size. What it brings beyond a row is another row's: scores with that are masked, and
where a product would add it up, both warpgroups write zeros over it first, so that not even a NaN in it counts. Results
are written in boxes of 64, 32, 16, ... rows, as many as there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ._kernels import Options, Sides, _Place, _Steps
from ._launch import numbers_of_32_bits

TILE, HALF, STAGES = 128, 64, 2
PART = 64  # columns that the copy engine and the products have in one piece
_LAYOUT = plgpu.Layout.WGMMA
ROWS, COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)  # a number for each row of a product, or column
_COMPUTE, _FETCH = 232, 40  # registers of a thread
ACC = plgpu.WGMMAAccumulatorRef
run_state: Any = pl.run_state  # whose types lose that an accumulator comes out as an array
Ref = Any
Pair = tuple[Ref, Ref]
Parts = tuple[Dense, ...]  # (rows, PART) each


class Tile(NamedTuple):
    """A tile, where its results of one number a token lie (`slot`), and where those of the other side's row begin."""

    place: _Place
    slot: Dense
    other_slot: Dense


def tile_of(tiles: Ref, heads: int) -> tuple[Tile, Dense]:
    """The tile and the head of this program: all tiles of a head run side by side, and find its other side in the cache."""
    program, most = lax.axis_index("program"), jnp.int32(tiles.shape[0])
    head, number = lax.div(program, most), lax.rem(program, most)
    *place, slot, other_slot = (tiles[number, field] for field in range(7))
    return Tile(_Place(*place), slot * TILE, other_slot * TILE), head


def half_of(place: _Place, group: Dense) -> tuple[Dense, Dense]:
    """Where the half of a warpgroup begins within the tile, and how many tokens of the row it has."""
    begin = group * HALF
    return begin, jnp.clip(place.length - place.first - begin, 0, HALF)


def slot_of(step: Dense) -> Dense:
    """The place in shared memory of a step."""
    return lax.rem(step, jnp.int32(STAGES))


def memory_of(number: int, rows: int, dim: int, dtype: Any) -> Any:
    """Shared memory (number, dim / PART, rows, PART): as it is copied to, and as products read it.

    These are the same bytes in the same order: PART columns are one column of tiles of 8 rows. But what is copied to tiles
    has to begin with a tile in the array, too, and rows begin anywhere.
    """
    shape, swizzle = (number, dim // PART, rows, PART), plgpu.SwizzleTransform(128)
    tiled = plgpu.TilingTransform((8, PART)), swizzle
    return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=(swizzle,)), plgpu.SMEM(shape, dtype, transforms=tiled))


def copy(source: Ref, begin: Dense, head: Dense, memory: Ref, number: Dense, barrier: Ref) -> None:
    """Begin to copy tokens of x (T, H, D); the barrier gets an arrival for each part."""
    _, parts, rows, _ = memory[0].shape
    for part in range(parts):
        columns = pl.ds(part * PART, PART)
        plgpu.copy_gmem_to_smem(source.at[pl.ds(begin, rows), head, columns], memory[0].at[number, part], barrier)


def clean(memory: Ref, count: Dense) -> None:
    """Write zeros over the rows of memory (parts, rows, PART) from `count` on, where there are any.

    Two warpgroups may do so at once, and while the other one's products read it: they write what is there, or zeros.
    """
    parts, rows, _ = memory.shape

    @pl.when(count < rows)
    def _() -> None:
        for part, begin in itertools.product(range(parts), range(0, rows, HALF)):
            piece = memory.at[part, pl.ds(begin, HALF)]
            inside = _iota((HALF, PART), 0) + begin < count
            zeros = plgpu.layout_cast(jnp.zeros((HALF, PART), memory.dtype), _LAYOUT)
            piece[...] = jnp.where(inside, plgpu.load(piece, (), layout=_LAYOUT), zeros)
        plgpu.commit_smem()


def store(sums: Parts, memory: Ref, out: Ref, begin: Dense, count: Dense, head: Dense) -> None:
    """Write `count` rows to out (T, H, D) through shared memory (HALF, D), and wait for it."""
    for part, x in enumerate(sums):
        memory[:, part * PART : (part + 1) * PART] = x.astype(memory.dtype)
    plgpu.commit_smem()
    at: Any = 0
    size = HALF
    while size:

        @pl.when(count & size != 0)
        def _(at: Any = at, size: int = size) -> None:
            plgpu.copy_smem_to_gmem(memory.at[pl.ds(at, size)], out.at[pl.ds(begin + at, size), head])

        at, size = at + (count & size), size // 2
    plgpu.wait_smem_to_gmem(0)


def full(shape: tuple[int, ...], value: float, layout: Any = _LAYOUT) -> Dense:
    """An array of one number, float32."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(dim: int) -> Parts:
    """Sums (HALF, dim) before anything is added."""
    return tuple(full((HALF, PART), 0.0) for _ in range(dim // PART))


def load(memory: Ref, layout: Any = _LAYOUT, *, tiled: bool = True) -> Dense:
    """What is in shared memory."""
    return plgpu.load(memory, (), layout=layout, optimized=tiled)


def along(x: Dense, shape: tuple[int, ...], axis: int = 0) -> Dense:
    """A number for each row (axis 0) or column as an array of that shape."""
    return lax.broadcast_in_dim(x, shape, [axis])


def scaled(sums: Parts, by: Dense) -> Parts:
    """Each row times its number."""
    return tuple(x * along(by, x.shape) for x in sums)


def _iota(shape: tuple[int, int], axis: int) -> Dense:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_LAYOUT)


def seen_of(sides: Sides, place: _Place, begin: Dense, start: Dense, step: int) -> Dense:
    """(HALF, step): which places of the other side, from `start` on, each token of this half meets."""
    shape = HALF, step
    left, right = sides
    there = _iota(shape, 1) + start
    seen = there < place.other_length
    if left is not None or right is not None:
        here = _iota(shape, 0) + (place.first + begin + place.other_length - place.length)
        if right is not None:
            seen &= there <= here + right
        if left is not None:
            seen &= there >= here - left
    return seen


def multiply_turned(acc: Ref, a: Ref, b: Ref) -> None:
    """Begin ``acc += a b^T`` of memory (parts, rows, PART), in a group of products a part."""
    for part in range(a.shape[0]):
        plgpu.wgmma(acc, a.at[part], b.at[part].transpose((1, 0)))


def multiply(accs: tuple[Ref, ...], a: Dense, b: Ref) -> None:
    """Begin ``accs += a b``, part by part."""
    for part, acc in enumerate(accs):
        plgpu.wgmma(acc, a, b.at[part])


def roles(exists: Dense, group: Dense, compute: Callable[[], None], fetch: Callable[[], None]) -> None:
    """Have two warpgroups compute and the third fetch; none does anything where there is no such tile."""

    @pl.when(exists & (group < 2))
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE, action="increase")
        compute()

    @pl.when(exists & (group == 2))
    def _() -> None:
        plgpu.set_max_registers(_FETCH, action="decrease")
        fetch()


def fetch(steps: Dense, free: Pair, bring: Callable[[Dense, Dense, int], None]) -> None:
    """``bring(step, slot, which)`` each of so many steps, as soon as both warpgroups have freed the place."""

    @pl.loop(0, steps)
    def _(step: Dense) -> None:
        slot = slot_of(step)
        for which, barrier in enumerate(free):

            @pl.when(step >= STAGES)
            def _(barrier: Ref = barrier) -> None:
                plgpu.barrier_wait(barrier.at[slot])

            bring(step, slot, which)


def fetch_keys(
    options: Options, steps: _Steps, place: _Place, head: Dense, sources: Pair, memory: Pair, ready: Pair, free: Pair
) -> None:
    """Bring the steps of k and v that a tile of queries takes."""
    kv_head = lax.div(head, jnp.int32(options.group))

    def bring(number: Dense, slot: Dense, which: int) -> None:
        begin = place.other + (steps.begin + number) * options.step
        copy(sources[which], begin, kv_head, memory[which], slot, ready[which].at[slot])

    fetch(steps.end - steps.begin, free, bring)


def barriers(copies_of_mine: int, copies_of_step: int) -> tuple[Any, Any, Any]:
    """What is waited for: my half, each of two arrays of the other side in each place, and either of them to be free."""
    given = plgpu.Barrier(num_arrivals=copies_of_mine, num_barriers=2)
    ready = plgpu.Barrier(num_arrivals=copies_of_step, num_barriers=STAGES)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=STAGES)
    return given, (ready, ready), (free, free)


def call(kernel: Callable[..., None], options: Options, heads: int, out: Any, tiles: Dense, *given: Dense) -> Any:
    """Launch a kernel, a program for every tile and head."""

    def body(*refs: Ref) -> None:
        with numbers_of_32_bits():  # here too: under vmap it is traced once more, by JAX
            kernel(options, *refs)

    body.__name__ = f"scree_attention_{kernel.__name__}_hopper"
    how = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
    with numbers_of_32_bits():
        return plgpu.kernel(
            body,
            out_type=out,
            grid=(tiles.shape[0] * heads,),
            grid_names=("program",),
            num_threads=3,
            thread_name="group",
            compiler_params=how,
        )(tiles, *given)


def scoped(run: Callable[..., None], *memory: Any) -> None:
    """Run with memory and barriers that all warpgroups share."""
    pl.run_scoped(run, *memory, collective_axes="group")


def numbers_of(rows: int, number: int) -> Any:
    """Shared memory for one number a token."""
    return plgpu.SMEM((number, rows), jnp.float32)
