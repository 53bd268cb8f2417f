"""The steps of `_fitting`, compiled."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from .._backends._protocol import HostInts
from . import _fitting

_take_steps = njit(cache=True)(_fitting.take_steps)


@overload(bisect_left)
def bisect_left_compiled(a: Any, x: Any, lo: Any, hi: Any) -> Any:
    """Give numba the code of Python's bisect_left."""

    def bisect(a: Any, x: Any, lo: Any, hi: Any) -> Any:
        while lo < hi:
            middle = (lo + hi) // 2
            if a[middle] < x:
                lo = middle + 1
            else:
                hi = middle
        return lo

    return bisect


@overload(bisect_right)
def bisect_right_compiled(a: Any, x: Any, lo: Any, hi: Any) -> Any:
    """Give numba the code of Python's bisect_right."""

    def bisect(a: Any, x: Any, lo: Any, hi: Any) -> Any:
        while lo < hi:
            middle = (lo + hi) // 2
            if a[middle] <= x:
                lo = middle + 1
            else:
                hi = middle
        return lo

    return bisect


@njit(cache=True)
def fit(lengths: HostInts, longest: int, capacity: int, best: bool) -> tuple[HostInts, HostInts]:
    """Do what `fit_decreasing` does, for one sequence or more."""
    amounts = np.zeros(longest + 1, np.int64)
    for i in range(len(lengths)):
        amounts[lengths[i]] += 1
    distinct = 0
    for length in range(longest + 1):
        distinct += amounts[length] > 0
    falling = np.empty(distinct, np.int64)
    rising, ends, totals = np.empty_like(falling), np.empty_like(falling), np.empty_like(falling)
    at = tokens = end = 0
    for length in range(longest, -1, -1):
        amount = amounts[length]
        if amount > 0:
            amounts[length] = end  # now where those of this length begin in the order
            end += amount
            tokens += amount * length
            falling[at], rising[at], ends[at], totals[at] = length, -length, end, tokens
            at += 1
    order = np.empty(len(lengths), np.int64)
    for i in range(len(lengths)):
        order[amounts[lengths[i]]] = i
        amounts[lengths[i]] += 1
    steps = _take_steps(falling, rising, ends, totals, capacity, best)
    fill = np.zeros(2 * tokens // capacity + 2, np.int64)  # all bins but one are more than half full
    n_bins = 0
    for s in range(0, len(steps), 3):
        n_bins = max(n_bins, steps[s] + steps[s + 1])
        for b in range(steps[s], steps[s] + steps[s + 1]):
            fill[b] += steps[s + 2]
    begin = np.empty(n_bins, np.int64)
    at = 0
    for b in range(n_bins):
        begin[b] = at
        at += fill[b]
    members = np.empty(len(lengths), np.int64)
    at = 0
    for s in range(0, len(steps), 3):
        for b in range(steps[s], steps[s] + steps[s + 1]):
            for _ in range(steps[s + 2]):
                members[begin[b]] = order[at]
                begin[b] += 1
                at += 1
    return members, fill[:n_bins]
