"""The kernels of softmax and the reductions: rows are cut into parts of `PART` tokens that begin where the row begins.

A program has one part, in some columns. Part k of row r is number ``offsets[r] // PART + r + k``: this leaves enough
room for the parts of every row, grows with r, and needs no sum over the rows before, so that a program finds its part by
a search in the offsets alone. Behind the rows comes one more, of the tokens that belong to none.

`fold` leaves the state of every part, and `result` or `spread` join those of a row in their order, so that a row's own
length decides in which order it is added up, and nothing else does. A state is (top, sum), of which an op may need one:

    op          folded                      result              spread
    softmax     max(x), sum(exp(x - max))                       exp(x - top) / sum
    d softmax   sum(y g)                                        y (g - sum)
    logsumexp   max(x), sum(exp(x - max))   log(sum) + top
    max, min    max(x), min(x)              top
    d max, min  sum(x == top)                                   g / sum where x == top
    others                                                      g, g / length, g exp(x - logsumexp)

Offsets may hold anything: what they say is cut to what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array as Dense
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ._launch import launch

PART = 128  # tokens
_SEARCHED = 256  # places that a step of the search looks at
_TILE, _COLUMNS, _TOKENS = 4096, 128, 128  # elements of a tile, of which so many columns and tokens at most
_JOINED = 8  # states of parts that are loaded at once
_INF, _NAN = float("inf"), float("nan")
Ref = Any


class Cut(NamedTuple):
    """Tokens and columns of a tile, which follow from the features alone, and how many tiles lie side by side."""

    tokens: int
    columns: int
    across: int


def cut_of(features: int) -> Cut:
    """How a program cuts tokens of so many features."""
    columns = min(_COLUMNS, 1 << (features - 1).bit_length())
    return Cut(min(_TOKENS, _TILE // columns), columns, -(-features // columns))


class Segment(NamedTuple):
    """A part of a row: the row and its bounds; where the part begins, how many tokens it has, and its number in the row."""

    row: Dense
    begin: Dense
    end: Dense
    start: Dense
    tokens: Dense
    number: Dense

    @property
    def length(self) -> Dense:
        """Tokens of the row."""
        return self.end - self.begin


def _bound(offsets: Ref, row: Dense, total: int) -> Dense:
    return jnp.minimum(jnp.maximum(offsets[row], 0), total)


def _row(offsets: Ref, row: Dense, total: int) -> tuple[Dense, Dense]:
    """Bounds of a row, or of what is behind the last one."""
    rows = offsets.shape[0] - 1
    begin = _bound(offsets, row, total)
    end = jnp.where(row < rows, _bound(offsets, jnp.minimum(row + 1, rows), total), total)
    return begin, jnp.maximum(end, begin)


def segment(offsets: Ref, number: Dense, total: int, part: int) -> Segment:
    """Find the part with a number, by a search that looks at hundreds of offsets at once."""
    rows = offsets.shape[0] - 1
    number = number.astype(offsets.dtype)
    row, wide = jnp.zeros_like(number), min(_SEARCHED, 1 << rows.bit_length())
    stride = 1
    while stride * wide <= rows:
        stride *= wide
    while stride:
        some = row + jnp.arange(wide, dtype=offsets.dtype) * stride
        bounds = plgpu.load(offsets.at[jnp.minimum(some, rows)])
        first = lax.div(jnp.minimum(jnp.maximum(bounds, 0), total), part) + some
        before = ((first <= number) & (some <= rows)).astype(jnp.int32).sum().astype(offsets.dtype)
        row = jnp.minimum(row + jnp.maximum(before - 1, 0) * stride, rows)
        stride //= wide
    begin, end = _row(offsets, row, total)
    k = number - lax.div(begin, part) - row
    start = begin + k * part
    tokens = jnp.where((k >= 0) & (start >= begin), jnp.minimum(end - start, part), 0)
    return Segment(row, begin, end, start, jnp.maximum(tokens, 0), k)


def parts_of(total: int, rows: int, part: int) -> int:
    """How many numbers parts may have, the tokens behind the last row among them."""
    return total // part + rows + 1


def _load(x: Ref, begin: Dense, count: Dense | None, first: Dense, cut: Cut, other: float) -> Dense:
    """(tokens, columns) of x (T, F) in float32, `other` where there are none."""
    mask = jnp.broadcast_to((first + jnp.arange(cut.columns) < x.shape[1])[None, :], (cut.tokens, cut.columns))
    if count is not None:
        mask &= (jnp.arange(cut.tokens, dtype=count.dtype) < count)[:, None]
    part = x.at[pl.ds(begin, cut.tokens), pl.ds(first, cut.columns)]
    return plgpu.load(part, mask=mask, other=other).astype(jnp.float32)


def _load_row(x: Ref, row: Dense, first: Dense, cut: Cut) -> Dense:
    """(columns,) of a row of x (B, F)."""
    mask = first + jnp.arange(cut.columns) < x.shape[1]
    return plgpu.load(x.at[row, pl.ds(first, cut.columns)], mask=mask, other=0.0).astype(jnp.float32)


def _store_row(x: Ref, row: Dense, first: Dense, cut: Cut, value: Dense) -> None:
    mask = first + jnp.arange(cut.columns) < x.shape[1]
    plgpu.store(x.at[row, pl.ds(first, cut.columns)], value.astype(x.dtype), mask=mask)


def _steps(count: Dense, step: int, body: Callable[[Dense, Any], Any], state: Any) -> Any:
    return lax.fori_loop(jnp.zeros_like(count), lax.div(count + (step - 1), step), body, state)


class _Fold(NamedTuple):
    """How states are begun, given more tokens, joined, and made those of one row. `top` and `sum` may be empty."""

    op: str

    @property
    def extreme(self) -> str:
        """What the top is: max, min, or nothing."""
        return {"max": "max", "min": "min", "logsumexp": "max", "softmax": "max"}.get(self.op, "")

    @property
    def sums(self) -> bool:
        """Whether there is a sum."""
        return self.op not in ("max", "min")

    @property
    def nothing(self) -> float:
        """What changes no top, or no sum."""
        return {"max": -_INF, "min": _INF, "": 0.0}[self.extreme]

    @property
    def states(self) -> int:
        """How many numbers a state has for each column."""
        return bool(self.extreme) + self.sums

    def begin(self, shape: tuple[int, ...]) -> tuple[Dense, ...]:
        """The states of no tokens."""
        top = (jnp.full(shape, self.nothing, jnp.float32),) if self.extreme else ()
        return (*top, *((jnp.zeros(shape, jnp.float32),) if self.sums else ()))

    def further(self, a: Dense, b: Dense) -> Dense:
        """The larger or the smaller one; NaN where one is, which the GPU's own maximum leaves out."""
        return jnp.where((a > b if self.extreme == "max" else a < b) | (a != a), a, b)

    def joined(self, a: tuple[Dense, ...], b: tuple[Dense, ...]) -> tuple[Dense, ...]:
        """The states of both."""
        if not self.extreme:
            return (a[0] + b[0],)
        top = self.further(a[0], b[0])
        if not self.sums:
            return (top,)
        # Of both factors one is 1: infinities of one sign are equals.
        shrink = jnp.where(a[0] == b[0], 1.0, jnp.exp(-jnp.abs(a[0] - b[0])))
        return top, jnp.where(a[0] > b[0], a[1] + b[1] * shrink, a[1] * shrink + b[1])

    def together(self, state: tuple[Dense, ...]) -> tuple[Dense, ...]:
        """The state of all that lie along the first axis."""
        if not self.extreme:
            return (state[0].sum(0),)
        tops = state[0]
        top = tops.max(0) if self.extreme == "max" else tops.min(0)
        top = jnp.where((tops != tops).astype(jnp.int32).sum(0) > 0, _NAN, top)
        if not self.sums:
            return (top,)
        shrink = jnp.where(tops == top[None, :], 1.0, jnp.exp(tops - top[None, :]))
        return top, (state[1] * shrink).sum(0)


def fold(op: str, total: int, cut: Cut, offsets: Ref, *refs: Ref) -> None:
    """States (S * parts, F) of every part, from x, or what the op needs in its place."""
    *tokens, states = refs
    place, first = _place(offsets, total, cut)
    way = _Fold(op)
    row = jnp.minimum(place.row, offsets.shape[0] - 2)
    best = _load_row(tokens[1], row, first, cut)[None, :] if op == "equals" else None

    def of_step(j: Dense, state: tuple[Dense, ...]) -> tuple[Dense, ...]:
        done = j * cut.tokens
        x, *more = (
            _load(t, place.start + done, place.tokens - done, first, cut, way.nothing)
            for t in (tokens[:1] if op == "equals" else tokens)
        )
        if op == "product":
            return (state[0] + x * more[0],)
        if best is not None:
            there = (jnp.arange(cut.tokens, dtype=done.dtype) < place.tokens - done)[:, None]
            return (state[0] + jnp.where(there & (x == best), 1.0, 0.0),)
        return way.joined(state, (x, jnp.where(x == -_INF, 0.0, 1.0)) if way.states == 2 else (x,))

    state = _steps(place.tokens, cut.tokens, of_step, way.begin((cut.tokens, cut.columns)))
    parts = states.shape[0] // way.states
    for i, part in enumerate(way.together(state)):
        _store_row(states, i * parts + _number(cut), first, cut, part)


def _number(cut: Cut) -> Dense:
    return lax.div(pl.program_id(0), cut.across)


def _first(cut: Cut) -> Dense:
    return lax.rem(pl.program_id(0), cut.across) * cut.columns


def _place(offsets: Ref, total: int, cut: Cut) -> tuple[Segment, Dense]:
    return segment(offsets, _number(cut), total, PART), _first(cut)


def _state(op: str, states: Ref, row: Dense, begin: Dense, length: Dense, first: Dense, cut: Cut) -> tuple[Dense, ...]:
    """The state of a row, from those of its parts."""
    way = _Fold(op)
    base, count = lax.div(begin, PART) + row, lax.div(length + (PART - 1), PART)
    several, parts = Cut(_JOINED, cut.columns, cut.across), states.shape[0] // way.states
    neutral = (way.nothing, 0.0) if way.extreme else (0.0,)

    def of_step(j: Dense, state: tuple[Dense, ...]) -> tuple[Dense, ...]:
        done = j * several.tokens
        some = tuple(
            _load(states, i * parts + base + done, count - done, first, several, neutral[i]) for i in range(way.states)
        )
        return way.joined(state, some)

    return way.together(_steps(count, several.tokens, of_step, way.begin((several.tokens, cut.columns))))


def result(op: str, total: int, cut: Cut, offsets: Ref, states: Ref, out: Ref) -> None:
    """The result (B, F) of every row, from the states of its parts."""
    row, first = _number(cut).astype(offsets.dtype), _first(cut)
    begin, end = _row(offsets, row, total)
    length = end - begin
    state = _state(op, states, row, begin, length, first, cut)
    if op == "mean":
        value = jnp.where(length > 0, state[0] / jnp.maximum(length, 1).astype(jnp.float32), _NAN)
    elif op == "logsumexp":
        top, l = state
        none = l == 0
        value = jnp.where(none, top, jnp.log(jnp.where(none, 1.0, l)) + top)
    else:
        value = state[0]
    _store_row(out, row, first, cut, value)


def spread(op: str, total: int, cut: Cut, offsets: Ref, *refs: Ref) -> None:
    """What an op makes of every token, (T, F), from tokens, what is of its row, and the states of the row's parts."""
    *given, out = refs
    place, first = _place(offsets, total, cut)
    rows = offsets.shape[0] - 1
    row = jnp.minimum(place.row, rows - 1)
    tokens, of_row, states = split(op, given)
    numbers = [_load_row(x, row, first, cut)[None, :] for x in of_row]
    if states:
        numbers += [x[None, :] for x in _state(FOLDED[op], states[0], place.row, place.begin, place.length, first, cut)]
    if op == "mean":
        numbers = [numbers[0] / jnp.maximum(place.length, 1).astype(jnp.float32)]

    def of_step(j: Dense, _: Dense) -> Dense:
        done = j * cut.tokens
        begin, left = place.start + done, place.tokens - done
        some = [_load(x, begin, left, first, cut, 0.0) for x in tokens]
        made = jnp.where(place.row < rows, _made(op, some, numbers, cut), 0.0)
        mask = (jnp.arange(cut.tokens, dtype=left.dtype) < left)[:, None]
        mask &= (first + jnp.arange(cut.columns) < out.shape[1])[None, :]
        plgpu.store(out.at[pl.ds(begin, cut.tokens), pl.ds(first, cut.columns)], made.astype(out.dtype), mask=mask)
        return j

    _steps(place.tokens, cut.tokens, of_step, jnp.zeros_like(place.tokens))


# spread's op -> how many arrays of tokens and of rows it gets, and what it is that was folded, if anything
_GIVEN = {
    "softmax": (1, 0),
    "d softmax": (2, 0),
    "sum": (0, 1),
    "mean": (0, 1),
    "max": (1, 2),
    "min": (1, 2),
    "logsumexp": (1, 2),
}
FOLDED = {"softmax": "softmax", "d softmax": "product", "max": "equals", "min": "equals"}


def split(op: str, given: Any) -> tuple[Any, Any, Any]:
    """The arrays of tokens, those of rows, and the states among what `spread` is given."""
    a, b = _GIVEN[op]
    return given[:a], given[a : a + b], given[a + b :]


def _made(op: str, tokens: list[Dense], numbers: list[Dense], cut: Cut) -> Dense:
    if op == "softmax":
        top, l = numbers
        r = 1.0 / jnp.where(jnp.abs(top) < _INF, l, _NAN)  # of infinities
        return jnp.exp(tokens[0] - top) * r
    if op == "d softmax":
        y, g = tokens
        return y * (g - numbers[0])
    if op in ("max", "min"):
        best, g, count = numbers
        return jnp.where(tokens[0] == best, g / jnp.maximum(count, 1.0), 0.0)
    if op == "logsumexp":
        lse, g = numbers
        return jnp.exp(tokens[0] - jnp.where(lse == -_INF, 0.0, lse)) * g
    return jnp.broadcast_to(numbers[0], (cut.tokens, cut.columns))


def call(
    kernel: Callable[..., None], op: str, out: Any, programs: int, cut: Cut, total: int, *given: Any, interpret: bool
) -> Any:
    """Launch a kernel: so many programs for each group of columns."""

    def bound(*refs: Ref) -> None:
        kernel(op, total, cut, *refs)

    name = f"{kernel.__name__}_{op.replace(' ', '_')}"
    return launch(bound, name, out, programs * cut.across, *given, warps=4, stages=2, interpret=interpret)
