"""What the fast rooms share about rows on the host: which may be computed together, and which keys a query sees.

How a row is computed may depend on its own length and on the features, and never on the rows beside it: that is what
makes its bits those that it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .._array import Array
from .._backends import Dense
from .._backends._protocol import HostArray, HostInts
from .._offsets import is_used

TOGETHER = 1 << 14  # elements: rows of no more are computed with others of their length
BLOCK = 1 << 16  # elements of such rows at a time: they stay in the second-level cache


class Rows(NamedTuple):
    """Some rows of one length.

    Attributes
    ----------
    numbers : array of (G,), integer
    starts : array of (G,), integer
        Where each begins along the ragged axis.
    length : int
        More than 0.
    short : bool
        Whether others of this length may be computed with them.
    """

    numbers: HostInts
    starts: HostInts
    length: int
    short: bool

    @property
    def adjacent(self) -> bool:
        """Whether the rows lie one behind the other."""
        return int(self.starts[-1] - self.starts[0]) == self.length * (len(self.starts) - 1)

    def tokens(self) -> HostInts:
        """The place of every token of these rows along the ragged axis: (G * length,)."""
        return (self.starts[:, None] + np.arange(self.length, dtype=np.int64)).reshape(-1)


def alike(offsets: HostInts, features: int, *, only_short: bool = False) -> Iterator[Rows]:
    """Go through the rows that are not empty: short ones with others of their length, every other one alone."""
    starts = offsets[:-1].astype(np.int64)
    lengths = (offsets[1:] - offsets[:-1]).astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    first = int(np.searchsorted(ordered, 1))
    last = int(np.searchsorted(ordered, TOGETHER // max(features, 1), side="right")) if only_short else len(order)
    if first >= last or not features:
        return
    cuts = [first, *(np.flatnonzero(np.diff(ordered[first:last])) + first + 1).tolist(), last]
    for a, b in zip(cuts, cuts[1:], strict=False):
        length = int(ordered[a])
        size = length * features
        step = BLOCK // size if size <= TOGETHER else 1
        for i in range(a, b, step):
            some = order[i : min(i + step, b)]
            yield Rows(some, starts[some], length, size <= TOGETHER)


def unlike(lengths: HostInts, features: int) -> HostArray:
    """(B,), bool: rows that are not empty and that none is computed with: long ones, and those of a length of their own."""
    short = lengths <= TOGETHER // max(features, 1)
    if not short.any():
        return lengths > 0
    return (lengths > 0) & ~(short & (np.bincount(lengths[short])[lengths * short] > 1))


def pairs_alike(q: HostInts, k: HostInts, heads: int, most: int) -> Iterator[tuple[HostInts, int, int]]:
    """Go through the rows that have queries: (numbers, n, m); short ones of one n and m together, to `most` scores."""
    n, m = (np.diff(x).astype(np.int64) for x in (q, k))
    kinds = n * (int(m.max(initial=0)) + 1) + m
    order = np.argsort(kinds, kind="stable")
    order = order[n[order] > 0]
    cuts = np.flatnonzero(np.diff(kinds[order])) + 1
    for numbers in np.split(order, cuts) if len(order) else ():
        some_n, some_m = int(n[numbers[0]]), int(m[numbers[0]])
        size = heads * some_n * max(some_m, 1)
        step = max(1, most // size) if size <= TOGETHER else 1
        for i in range(0, len(numbers), step):
            yield numbers[i : i + step], some_n, some_m


class Span(NamedTuple):
    """Queries ``first`` to ``last`` of a row, and the keys ``low`` to ``high`` beyond which none of them sees any."""

    first: int
    last: int
    low: int
    high: int


def spans(n: int, m: int, left: int | None, right: int | None, most: int) -> Iterator[Span]:
    """Cut the queries of one row that see any key into spans of at most `most`.

    Query i of n stands at p = i + m - n, and sees the keys from p - left to p + right.
    """
    shift = m - n
    begin = 0 if right is None else max(0, -right - shift)
    end = n if left is None else min(n, m + left - shift)
    for first in range(begin, end, most):
        last = min(first + most, end)
        low = 0 if left is None else max(0, first + shift - left)
        high = m if right is None else min(m, last + shift + right)
        if low < high:
            yield Span(first, last, low, high)


def visible(span: Span, n: int, m: int, left: int | None, right: int | None) -> np.ndarray | None:
    """(queries, keys), bool: which keys of the span each of its queries sees; None where all see all."""
    places = np.arange(span.first, span.last)[:, None] + (m - n)
    keys = np.arange(span.low, span.high)[None, :]
    seen: np.ndarray | None = None
    if right is not None and span.high - 1 > span.first + m - n + right:
        seen = keys <= places + right
    if left is not None and span.low < span.last - 1 + m - n - left:
        seen = keys >= places - left if seen is None else seen & (keys >= places - left)
    return seen


def places(offsets: HostInts, start: int | HostInts) -> HostInts:
    """The place of every token in its row, plus `start`, one for all rows or (B,): (T,), int64."""
    lengths = np.diff(offsets)
    first = np.broadcast_to(np.asarray(start, np.int64), lengths.shape) - offsets[:-1]
    return np.arange(int(offsets[-1]), dtype=np.int64) + np.repeat(first, lengths)


def used_only(arr: Array, x: Dense) -> Dense:
    """x with zeros in place of the tokens that belong to no sequence, so that they neither count nor get a gradient.

    `x` has the ragged axis where `arr` has it.
    """
    xp = arr._xp
    if not arr._structure.spare:
        return x
    used = is_used(xp, arr.offsets, arr.total_length)
    shape = tuple(-1 if i == arr.ragged_dim else 1 for i in range(x.ndim))
    return xp.where(used.reshape(shape), x, xp.full((), 0, x))
