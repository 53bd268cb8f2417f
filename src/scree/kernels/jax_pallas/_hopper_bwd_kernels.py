"""Attention backward on Hopper: names and formulas are those of `_kernels`, and how it is done stands in `_hopper_parts`.

A step has all its products under way as early as can be, and waits for each when it is needed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _hopper_parts as parts
from ._hopper_parts import HALF, PART, STAGES, TILE, Parts, Ref
from ._kernels import LOG2E, Options, _steps

_SUMS = tuple[Parts, Parts]


def backward_q(
    options: Options,
    tiles: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    g: Ref,
    o: Ref,
    top: Ref,
    g_lse: Ref,
    dq_ref: Ref,
    pull_ref: Ref,
) -> None:
    """dq and pull of a tile of queries; top is lse in powers of 2, and +inf where a query sees no key."""
    (_, heads, dim), step, dtype = q.shape, options.step, q.dtype
    sides, factor, number_of_parts = (options.left, options.right), options.scale * LOG2E, dim // PART

    def run(q_sm: Ref, g_sm: Ref, k_sm: Ref, v_sm: Ref, o_sm: Ref, top_sm: Ref, pull_sm: Ref, barriers: Any) -> None:
        given, (k_ready, v_ready), (k_free, v_free) = barriers
        tile, head = parts.tile_of(tiles, heads)
        place, group = tile.place, lax.axis_index("group")
        steps = _steps(sides, place, TILE, step)
        begin, count = parts.half_of(place, group)

        def compute() -> None:
            first, slots, barrier = place.begin + begin, pl.ds(tile.slot + begin, HALF), given.at[group]
            for source, memory in ((q, q_sm), (g, g_sm)):
                parts.copy(source, first, head, memory, group, barrier)
            plgpu.copy_gmem_to_smem(o.at[pl.ds(first, HALF), head], o_sm.at[group], barrier)
            for source, memory in ((top, top_sm), (g_lse, pull_sm)):
                plgpu.copy_gmem_to_smem(source.at[head, slots], memory.at[group], barrier)
            plgpu.barrier_wait(barrier)
            mine, grad = q_sm[1].at[group], g_sm[1].at[group]
            highest, pull = (parts.load(x.at[group], parts.ROWS) for x in (top_sm, pull_sm))
            for part in range(number_of_parts):
                out = parts.load(o_sm.at[group, :, pl.ds(part * PART, PART)], tiled=False)
                product = parts.load(grad.at[part]).astype(jnp.float32) * out.astype(jnp.float32)
                pull = pull - product.sum(axis=1)
            pull_sm[group] = pull
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(pull_sm.at[group], pull_ref.at[head, slots])

            def of_step(masked: bool, j: Dense, dq: Parts) -> Parts:
                slot = parts.slot_of(j - steps.begin)
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                key, value = k_sm[1].at[slot], v_sm[1].at[slot]

                def weights(s: Ref, dp: Ref) -> tuple[Dense, Dense]:
                    parts.multiply_turned(s, mine, key)
                    parts.multiply_turned(dp, grad, value)
                    x = plgpu.wgmma_accumulator_load(s, wait_n=number_of_parts)
                    p = jnp.exp2(x * factor - parts.along(highest, x.shape))
                    return p, plgpu.wgmma_accumulator_load(dp)

                p, dp = pl.run_scoped(weights, *(parts.ACC((HALF, step), jnp.float32) for _ in range(2)))
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (dp + parts.along(pull, p.shape))
                if masked:
                    ds = jnp.where(parts.seen_of(sides, place, begin, j * step, step), ds, 0.0)
                    parts.clean(key, place.other_length - j * step)
                add = lambda accs: parts.multiply(accs, ds.astype(dtype), key)  # noqa: E731
                dq = parts.run_state(add)(tuple(parts.ACC.init(x) for x in dq))
                plgpu.barrier_arrive(k_free.at[slot])
                return tuple(dq)

            dq = steps.run(of_step, parts.zeros(dim))
            dq = tuple(x * options.scale for x in dq)
            parts.store(dq, o_sm.at[group], dq_ref, first, count, head)

        def fetch() -> None:
            parts.fetch_keys(options, steps, place, head, (k, v), (k_sm, v_sm), (k_ready, v_ready), (k_free, v_free))

        parts.roles(place.first < place.length, group, compute, fetch)

    parts.scoped(
        run,
        *(parts.memory_of(2, HALF, dim, dtype) for _ in range(2)),
        *(parts.memory_of(STAGES, step, dim, dtype) for _ in range(2)),
        plgpu.SMEM((2, HALF, dim), dtype),
        *(parts.numbers_of(HALF, 2) for _ in range(2)),
        parts.barriers(2 * number_of_parts + 3, number_of_parts),
    )


def backward_kv(
    options: Options, tiles: Ref, q: Ref, k: Ref, v: Ref, g: Ref, top: Ref, pull: Ref, dk_ref: Ref, dv_ref: Ref
) -> None:
    """dk and dv of a tile of keys, from all query heads that read it, one after the other."""
    (_, kv_heads, dim), step, dtype = k.shape, options.step, q.dtype
    sides = options.right, options.left  # seen from the keys
    factor, number_of_parts, shape = options.scale * LOG2E, dim // PART, (HALF, step)

    def run(k_sm: Ref, v_sm: Ref, q_sm: Ref, g_sm: Ref, out_sm: Ref, top_sm: Ref, pull_sm: Ref, barriers: Any) -> None:
        given, (q_ready, g_ready), free = barriers
        tile, kv_head = parts.tile_of(tiles, kv_heads)
        place, group = tile.place, lax.axis_index("group")
        steps = _steps(sides, place, TILE, step)
        each = steps.end - steps.begin
        begin, count = parts.half_of(place, group)

        def compute() -> None:
            for source, memory in ((k, k_sm), (v, v_sm)):
                parts.copy(source, place.begin + begin, kv_head, memory, group, given.at[group])
            plgpu.barrier_wait(given.at[group])
            key, value = k_sm[1].at[group], v_sm[1].at[group]

            def of_step(number: Dense, masked: bool, j: Dense, state: _SUMS) -> _SUMS:
                slot = parts.slot_of(number * each + j - steps.begin)
                plgpu.barrier_wait(q_ready.at[slot])
                plgpu.barrier_wait(g_ready.at[slot])
                mine, grad = q_sm[1].at[slot], g_sm[1].at[slot]

                def of_queries(memory: Ref) -> Dense:  # late, for there are no registers to keep it in
                    return parts.along(parts.load(memory.at[slot], parts.COLUMNS), shape, 1)

                def add(accs: Any) -> None:
                    s_acc, dp_acc, dk, dv = accs
                    parts.multiply_turned(s_acc, key, mine)  # (keys, queries)
                    parts.multiply_turned(dp_acc, value, grad)
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=number_of_parts)
                    p = jnp.exp2(s * factor - of_queries(top_sm))
                    seen = parts.seen_of(sides, place, begin, j * step, step) if masked else None
                    if seen is not None:
                        p = jnp.where(seen, p, 0.0)
                        for memory in (mine, grad):
                            parts.clean(memory, place.other_length - j * step)
                    parts.multiply(dv, p.astype(dtype), grad)
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=number_of_parts)
                    ds = p * (dp + of_queries(pull_sm))
                    if seen is not None:
                        ds = jnp.where(seen, ds, 0.0)
                    parts.multiply(dk, ds.astype(dtype), mine)

                none = parts.full(shape, 0.0)
                _, _, dk, dv = parts.run_state(add)(jax.tree.map(parts.ACC.init, (none, none, *state)))
                for barrier in free:
                    plgpu.barrier_arrive(barrier.at[slot])
                return tuple(dk), tuple(dv)

            def of_head(number: Dense, state: _SUMS) -> _SUMS:
                return steps.run(lambda masked, j, sums: of_step(number, masked, j, sums), state)

            state = parts.zeros(dim), parts.zeros(dim)
            if options.group == 1:
                dk, dv = of_head(jnp.int32(0), state)
            else:
                dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(options.group), of_head, state)
            for ref, sums in ((dv_ref, dv), (dk_ref, tuple(x * options.scale for x in dk))):
                parts.store(sums, out_sm.at[group], ref, place.begin + begin, count, kv_head)

        def bring(number: Dense, slot: Dense, which: int) -> None:
            source, memory, numbers, numbers_sm, ready = (
                (q, q_sm, top, top_sm, q_ready),
                (g, g_sm, pull, pull_sm, g_ready),
            )[which]
            head = kv_head * options.group + lax.div(number, each)
            start = (steps.begin + lax.rem(number, each)) * step
            parts.copy(source, place.other + start, head, memory, slot, ready.at[slot])
            some = numbers.at[head, pl.ds(tile.other_slot + start, step)]
            plgpu.copy_gmem_to_smem(some, numbers_sm.at[slot], ready.at[slot])

        parts.roles(place.first < place.length, group, compute, lambda: parts.fetch(each * options.group, free, bring))

    parts.scoped(
        run,
        *(parts.memory_of(2, HALF, dim, dtype) for _ in range(2)),
        *(parts.memory_of(STAGES, step, dim, dtype) for _ in range(2)),
        plgpu.SMEM((2, HALF, dim), dtype),
        *(parts.numbers_of(step, STAGES) for _ in range(2)),
        parts.barriers(2 * number_of_parts, number_of_parts + 1),
    )
