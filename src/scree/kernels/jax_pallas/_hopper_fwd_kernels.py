"""Attention forward on Hopper: names and formulas are those of `_kernels`, and how it is done stands in `_hopper_parts`.

The two warpgroups of a tile take turns: one has its products computed while the other computes exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import _hopper_parts as parts
from ._hopper_parts import HALF, PART, STAGES, TILE, Parts, Ref
from ._kernels import LOG2E, Options, _steps

_LN2 = math.log(2.0)
_INF = float("inf")


def forward(options: Options, tiles: Ref, q: Ref, k: Ref, v: Ref, *more: Ref) -> None:
    """o and lse of a tile of queries."""
    *sinks, o_ref, lse_ref = more
    (_, heads, dim), step, dtype = q.shape, options.step, q.dtype
    sides, factor = (options.left, options.right), options.scale * LOG2E

    def run(q_sm: Ref, k_sm: Ref, v_sm: Ref, o_sm: Ref, lse_sm: Ref, barriers: Any, turn: Ref) -> None:
        given, (k_ready, v_ready), (k_free, v_free) = barriers
        tile, head = parts.tile_of(tiles, heads)
        place, group = tile.place, lax.axis_index("group")
        steps = _steps(sides, place, TILE, step)
        begin, count = parts.half_of(place, group)

        def take_turns() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def of_step(masked: bool, j: Dense, state: tuple[Parts, Dense, Dense]) -> tuple[Parts, Dense, Dense]:
            o, top, l = state
            slot = parts.slot_of(j - steps.begin)
            key, value = k_sm[1].at[slot], v_sm[1].at[slot]

            def scores(acc: Ref) -> Dense:
                parts.multiply_turned(acc, q_sm[1].at[group], key)
                take_turns()
                return acc[...]

            s = pl.run_scoped(scores, parts.ACC((HALF, step), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                s = jnp.where(parts.seen_of(sides, place, begin, j * step, step), s, -_INF)
            higher = jnp.maximum(top, s.max(axis=1) * factor)
            finite = jnp.where(higher == -_INF, 0.0, higher)
            shrink = jnp.exp2(top - finite)
            p = jnp.exp2(s * factor - parts.along(finite, s.shape))
            o, l = parts.scaled(o, shrink), l * shrink + p.sum(axis=1)
            o, l, higher, p = lax.optimization_barrier((o, l, higher, p.astype(dtype)))  # all before the other's turn
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            if masked:
                parts.clean(value, place.other_length - j * step)
            plgpu.barrier_wait(turn)

            def weighted(accs: tuple[Ref, ...]) -> None:
                parts.multiply(accs, p, value)

                @pl.when(j + 1 < steps.end)
                def _() -> None:
                    plgpu.barrier_wait(k_ready.at[parts.slot_of(j + 1 - steps.begin)])

            o = parts.run_state(weighted)(tuple(parts.ACC.init(x) for x in o))
            plgpu.barrier_arrive(v_free.at[slot])
            return tuple(o), higher, l

        def compute() -> None:
            parts.copy(q, place.begin + begin, head, q_sm, group, given.at[group])
            plgpu.barrier_wait(given.at[group])

            @pl.when(steps.begin < steps.end)
            def _() -> None:
                plgpu.barrier_wait(k_ready.at[0])

            pl.when(group == 1)(take_turns)
            state = parts.zeros(dim), parts.full((HALF,), -_INF, parts.ROWS), parts.full((HALF,), 0.0, parts.ROWS)
            o, top, l = steps.run(of_step, state)
            pl.when(group == 0)(take_turns)
            l = jnp.where(l == 0, 1.0, l)
            o, lse = parts.scaled(o, 1.0 / l), top * _LN2 + jnp.log(l)  # -inf where a query sees no key
            for sink_ref in sinks:
                sink = sink_ref[head]
                largest = jnp.maximum(lse, sink)
                largest = jnp.where(largest == -_INF, 0.0, largest)
                both = largest + jnp.log(jnp.exp(lse - largest) + jnp.exp(sink - largest))
                o = parts.scaled(o, jnp.exp(lse - jnp.where(both == -_INF, 0.0, both)))
                lse = both
            lse_sm[group] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(lse_sm.at[group], lse_ref.at[head, pl.ds(tile.slot + begin, HALF)])
            parts.store(o, o_sm.at[group], o_ref, place.begin + begin, count, head)

        def fetch() -> None:
            parts.fetch_keys(options, steps, place, head, (k, v), (k_sm, v_sm), (k_ready, v_ready), (k_free, v_free))

        parts.roles(place.first < place.length, group, compute, fetch)

    parts.scoped(
        run,
        parts.memory_of(2, HALF, dim, dtype),
        parts.memory_of(STAGES, step, dim, dtype),
        parts.memory_of(STAGES, step, dim, dtype),
        plgpu.SMEM((2, HALF, dim), dtype),
        parts.numbers_of(HALF, 2),
        parts.barriers(dim // PART, dim // PART),
        plgpu.Barrier(num_arrivals=2),
    )
