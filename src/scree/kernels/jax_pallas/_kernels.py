"""The kernels, one program a tile of one row and one head.

Tokens of a tile that belong to another row are loaded as zeros, so that not even a NaN in them counts, and what a
program adds up, it adds up in an order that its own row decides. Scores are kept in powers of 2::

    s = scale * q k^T          t = tanh(s / c), s = c * t    with softcap c
    p = 2^(s log2(e) - m)      o = p v / l                   lse = (m + log2(l)) ln(2)
    ds = p * (g v^T + pull) * (1 - t**2)                     with pull = g_lse - <g, o>
    dq = scale * ds k          dk = scale * ds^T q           dv = p^T g

The products of halves are added up in float32, with p and ds rounded to the halves' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._launch import launch as run

LOG2E, _LN2 = math.log2(math.e), math.log(2.0)
_INF = float("inf")
Ref = Any
Sides = tuple[int | None, int | None]


class Options(NamedTuple):
    """What is fixed for a program: options of the op, the group of query heads to a key head, rows and step of tiles.

    And whether it is interpreted, by what knows no instruction of a GPU.
    """

    scale: float
    left: int | None
    right: int | None
    softcap: float | None
    group: int
    rows: int
    step: int
    interpret: bool = False


class _Place(NamedTuple):
    """A tile: where it begins in memory and in its row, the row's length, and the same of the other side's row."""

    begin: Dense
    first: Dense
    length: Dense
    other: Dense
    other_length: Dense


def _place(tiles: Ref, heads: int) -> tuple[_Place, Dense]:
    """The tile and the head of this program: all heads of a tile run side by side."""
    number, head = lax.div(pl.program_id(0), heads), lax.rem(pl.program_id(0), heads)
    return _Place(*(tiles[number, field] for field in range(5))), head


def _load(x: Ref, begin: Dense, count: int, inside: Dense | None, head: Dense) -> Dense:
    """(count, width) of x (T, H, D) from a token on, zeros where not `inside` and beyond D; width is a power of 2."""
    dim = x.shape[2]
    width = width_of(dim)
    mask = None if inside is None else jnp.broadcast_to(inside[:, None], (count, width))
    if width != dim:
        columns = jnp.broadcast_to((jnp.arange(width) < dim)[None, :], (count, width))
        mask = columns if mask is None else mask & columns
    part = x.at[pl.ds(begin, count), head, pl.ds(0, width)]
    return plgpu.load(part, mask=mask, other=None if mask is None else 0.0)


def _store(x: Ref, begin: Dense, inside: Dense, head: Dense, value: Dense) -> None:
    count, width = value.shape
    mask = inside[:, None] & (jnp.arange(width) < x.shape[2])[None, :]
    plgpu.store(x.at[pl.ds(begin, count), head, pl.ds(0, width)], value.astype(x.dtype), mask=mask)


def _load_numbers(x: Ref, begin: Dense, count: int, inside: Dense, head: Dense) -> Dense:
    """(count,) of x (H, T)."""
    return plgpu.load(x.at[head, pl.ds(begin, count)], mask=inside, other=0.0)


def width_of(dim: int) -> int:
    """The power of 2 that holds a head, 16 at least: what the matrix units take."""
    return max(16, 1 << (dim - 1).bit_length())


def _dot(a: Dense, b: Dense, contract: tuple[int, int]) -> Dense:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    left, right = contract
    return lax.dot_general(
        a, b, (((left,), (right,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _whole(x: Dense, size: int) -> Dense:
    """How many whole tiles of `size` lie before x; 0 where x is negative."""
    return lax.div(jnp.maximum(x, 0), size)


class _Steps(NamedTuple):
    """The steps that a tile takes: from `begin` to `end`, of which `plain_begin` to `plain_end` need no mask."""

    begin: Dense
    plain_begin: Dense
    plain_end: Dense
    end: Dense

    def run(self, step: Callable[[bool, Dense, Any], Any], state: Any) -> Any:
        for masked, a, b in (
            (True, self.begin, self.plain_begin),
            (False, self.plain_begin, self.plain_end),
            (True, self.plain_end, self.end),
        ):
            if a is not b:
                state = lax.fori_loop(a, b, lambda j, x, masked=masked: step(masked, j, x), state)
        return state


def _steps(sides: Sides, place: _Place, tile: int, step: int) -> _Steps:
    """Which steps along the other side a tile has to take.

    Place x of the tile's side meets the places from x + shift - left to x + shift + right of the other.
    """
    left, right = sides
    m, shift = place.other_length, place.other_length - place.length
    low, high = jnp.zeros_like(m), m
    last = jnp.minimum(place.first + tile, place.length) - 1
    if left is not None:
        low = jnp.clip(place.first + shift - left, 0, m)
    if right is not None:
        high = jnp.clip(last + shift + right + 1, 0, m)
    begin = lax.div(low, step)
    end = jnp.where(high > low, lax.div(high + (step - 1), step), begin)
    plain_begin, plain_end = begin, _whole(m, step)
    if right is not None:
        plain_end = jnp.minimum(plain_end, _whole(place.first + shift + right + 1, step))
    if left is not None:
        plain_begin = _whole(place.first + (tile - 1) + shift - left + (step - 1), step)
        plain_begin = jnp.minimum(jnp.maximum(plain_begin, begin), end)
    plain_end = jnp.minimum(jnp.maximum(plain_end, plain_begin), end)
    return _Steps(begin, plain_begin, plain_end, end)


def _seen(sides: Sides, place: _Place, tile: int, start: Dense, step: int) -> Dense:
    """(tile, step): which places of the other side, from `start` on, each of the tile meets."""
    here = (place.first + jnp.arange(tile) + (place.other_length - place.length))[:, None]
    there = (start + jnp.arange(step))[None, :]
    seen = jnp.broadcast_to(there < place.other_length, (tile, step))
    left, right = sides
    if right is not None:
        seen &= there <= here + right
    if left is not None:
        seen &= there >= here - left
    return seen


def _exp2(options: Options, x: Dense) -> Dense:
    """2^x, 0 below 2^-126: the instruction alone, where XLA's own has three more for what lies below."""
    if options.interpret:
        return jnp.exp2(x)
    (y,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return y


def _factor(options: Options) -> float:
    """What `_scores` has to be multiplied by to be s log2(e): a product that the difference to the largest has for free."""
    return options.scale * LOG2E if options.softcap is None and options.scale > 0 else 1.0


def _scores(options: Options, a: Dense, b: Dense) -> tuple[Dense, Dense | None]:
    """s log2(e) over `_factor`, and with a softcap t."""
    s = _dot(a, b, (1, 1))
    if options.softcap is None:
        return (s if options.scale > 0 else s * (options.scale * LOG2E)), None
    t = jnp.tanh(s * (options.scale / options.softcap))
    return t * (options.softcap * LOG2E), t


def forward(options: Options, tiles: Ref, q: Ref, k: Ref, v: Ref, *more: Ref) -> None:
    """o and lse of a tile of queries."""
    *sinks, o_ref, lse_ref = more
    rows, step = options.rows, options.step
    place, head = _place(tiles, q.shape[1])
    kv_head = lax.div(head, options.group)
    inside = place.first + jnp.arange(rows) < place.length
    mine = _load(q, place.begin, rows, inside, head)
    sides, factor = (options.left, options.right), _factor(options)

    def of_step(masked: bool, j: Dense, state: tuple[Dense, Dense, Dense]) -> tuple[Dense, Dense, Dense]:
        o, top, l = state
        start = j * step
        there = start + jnp.arange(step) < place.other_length if masked else None
        s, _ = _scores(options, mine, _load(k, place.other + start, step, there, kv_head))
        if masked:
            s = jnp.where(_seen(sides, place, rows, start, step), s, -_INF)
        higher = jnp.maximum(top, s.max(1) * factor)
        finite = jnp.where(higher == -_INF, 0.0, higher)
        p, shrink = _exp2(options, s * factor - finite[:, None]), _exp2(options, top - finite)
        value = _load(v, place.other + start, step, there, kv_head)
        o = o * shrink[:, None] + _dot(p.astype(value.dtype), value, (1, 0))
        return o, higher, l * shrink + p.sum(1)

    zeros = jnp.zeros(rows, jnp.float32)
    state = jnp.zeros((rows, width_of(v.shape[2])), jnp.float32), zeros - _INF, zeros
    o, top, l = _steps(sides, place, rows, step).run(of_step, state)
    none = l == 0
    l = jnp.where(none, 1.0, l)
    o = o / l[:, None]
    lse = jnp.where(none, -_INF, (top + jnp.log2(l)) * _LN2)
    for sink_ref in sinks:
        sink = jnp.full((rows,), sink_ref[head], jnp.float32)
        largest = jnp.maximum(lse, sink)
        largest = jnp.where(largest == -_INF, 0.0, largest)
        both = largest + jnp.log(jnp.exp(lse - largest) + jnp.exp(sink - largest))
        o = o * jnp.exp(lse - jnp.where(both == -_INF, 0.0, both))[:, None]
        lse = both
    _store(o_ref, place.begin, inside, head, o)
    plgpu.store(lse_ref.at[head, pl.ds(place.begin, rows)], lse, mask=inside)


def backward_q(
    options: Options,
    tiles: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    g: Ref,
    o: Ref,
    lse: Ref,
    g_lse: Ref,
    dq_ref: Ref,
    pull_ref: Ref,
) -> None:
    """dq and pull of a tile of queries; lse is in powers of 2, and +inf where a query sees no key.

    The sums of pull are made here because XLA adds up in an order that depends on how many rows there are.
    """
    rows, step = options.rows, options.step
    place, head = _place(tiles, q.shape[1])
    kv_head = lax.div(head, options.group)
    inside = place.first + jnp.arange(rows) < place.length
    mine, grad = (_load(x, place.begin, rows, inside, head) for x in (q, g))
    top, add = (_load_numbers(x, place.begin, rows, inside, head) for x in (lse, g_lse))
    out = _load(o, place.begin, rows, inside, head)
    add = add - (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(1)
    plgpu.store(pull_ref.at[head, pl.ds(place.begin, rows)], add, mask=inside)
    top, add = top[:, None], add[:, None]
    sides, factor = (options.left, options.right), _factor(options)

    def of_step(masked: bool, j: Dense, dq: Dense) -> Dense:
        start = j * step
        there = start + jnp.arange(step) < place.other_length if masked else None
        key, value = (_load(x, place.other + start, step, there, kv_head) for x in (k, v))
        s, t = _scores(options, mine, key)
        p = _exp2(options, s * factor - top)
        if masked:
            p = jnp.where(_seen(sides, place, rows, start, step), p, 0.0)
        ds = p * (_dot(grad, value, (1, 1)) + add)
        if t is not None:
            ds = ds * (1.0 - t * t)
        return dq + _dot(ds.astype(key.dtype), key, (1, 0))

    dq = jnp.zeros((rows, width_of(q.shape[2])), jnp.float32)
    dq = _steps(sides, place, rows, step).run(of_step, dq)
    _store(dq_ref, place.begin, inside, head, dq * options.scale)


def backward_kv(
    options: Options, tiles: Ref, q: Ref, k: Ref, v: Ref, g: Ref, lse: Ref, pull: Ref, dk_ref: Ref, dv_ref: Ref
) -> None:
    """dk and dv of a tile of keys, from all query heads that read it, one after the other."""
    rows, step = options.rows, options.step
    place, kv_head = _place(tiles, k.shape[1])
    inside = place.first + jnp.arange(rows) < place.length
    key, value = (_load(x, place.begin, rows, inside, kv_head) for x in (k, v))
    sides, factor = (options.right, options.left), _factor(options)  # seen from the keys

    def of_head(number: Dense, state: tuple[Dense, Dense]) -> tuple[Dense, Dense]:
        head = kv_head * options.group + number

        def of_step(masked: bool, j: Dense, state: tuple[Dense, Dense]) -> tuple[Dense, Dense]:
            dk, dv = state
            start = j * step
            there = start + jnp.arange(step) < place.other_length
            mine, grad = (_load(x, place.other + start, step, there if masked else None, head) for x in (q, g))
            top, add = (_load_numbers(x, place.other + start, step, there, head)[None, :] for x in (lse, pull))
            s, t = _scores(options, key, mine)  # (keys, queries)
            p = _exp2(options, s * factor - top)
            if masked:
                p = jnp.where(_seen(sides, place, rows, start, step), p, 0.0)
            dv = dv + _dot(p.astype(grad.dtype), grad, (1, 0))
            ds = p * (_dot(value, grad, (1, 1)) + add)
            if t is not None:
                ds = ds * (1.0 - t * t)
            return dk + _dot(ds.astype(mine.dtype), mine, (1, 0)), dv

        return _steps(sides, place, rows, step).run(of_step, state)

    state = (
        jnp.zeros((rows, width_of(k.shape[2])), jnp.float32),
        jnp.zeros((rows, width_of(v.shape[2])), jnp.float32),
    )
    if options.group == 1:
        dk, dv = of_head(jnp.zeros((), jnp.int32), state)
    else:
        dk, dv = lax.fori_loop(0, options.group, of_head, state)
    _store(dk_ref, place.begin, inside, kv_head, dk * options.scale)
    _store(dv_ref, place.begin, inside, kv_head, dv)


class Launch(NamedTuple):
    """What a kernel is compiled for beside its options."""

    heads: int
    warps: int
    stages: int
    interpret: bool


def call(kernel: Callable[..., None], options: Options, launch: Launch, out: Any, tiles: Dense, *given: Dense) -> Any:
    """Launch a kernel, a program for every tile and head."""

    def bound(*refs: Ref) -> None:
        kernel(options, *refs)

    programs, how = tiles.shape[0] * launch.heads, {"warps": launch.warps, "stages": launch.stages}
    name = f"attention_{kernel.__name__}"
    return run(bound, name, out, programs, tiles, *given, **how, interpret=launch.interpret)
