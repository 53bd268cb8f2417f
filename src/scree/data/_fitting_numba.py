"""Best fit and first fit decreasing in the steps of `_fitting`, compiled: arrays in place of lists, tuples and heapq.

Groups of bins that are alike have numbers; a heap is an array of such numbers, ordered by `key` and then by `first`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from .._backends._protocol import HostInts


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, and keep that on disk: beside this file, in the user's cache, or, for want of both, not."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write to
        return njit()(function)


@njit()
def _push(heap: HostInts, size: int, group: int, key: HostInts, first: HostInts) -> None:
    at = size
    while at > 0:
        above = heap[(at - 1) // 2]
        if key[above] < key[group] or (key[above] == key[group] and first[above] < first[group]):
            break
        heap[at] = above
        at = (at - 1) // 2
    heap[at] = group


@njit()
def _pop(heap: HostInts, size: int, key: HostInts, first: HostInts) -> int:
    least, group, end, at = heap[0], heap[size - 1], size - 1, 0
    while 2 * at + 1 < end:
        child = 2 * at + 1
        below = heap[child]
        if child + 1 < end:
            other = heap[child + 1]
            if key[other] < key[below] or (key[other] == key[below] and first[other] < first[below]):
                child, below = child + 1, other
        if key[group] < key[below] or (key[group] == key[below] and first[group] < first[below]):
            break
        heap[at] = below
        at = child
    heap[at] = group
    return least


@njit()
def _take_steps(
    falling: HostInts, ends: HostInts, totals: HostInts, capacity: int, best: bool, steps: HostInts, most: int
) -> int:
    """Do what `_fitting.take_steps` does, into `steps` of (N, 3); return how many. There are at most `most` bins."""
    key, first, count, room = (
        np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most, np.int64)
    )  # fmt: skip
    able, later = np.empty(most, np.int64), np.empty(most, np.int64)
    n_able = n_later = n_groups = n_steps = n_bins = at = done = placed = 0
    end = len(falling) - (falling[-1] == 0)
    shortest = falling[end - 1]
    while at < end:
        length = falling[at]
        while n_later > 0 and room[later[0]] >= length:
            group = _pop(later, n_later, key, first)
            n_later -= 1
            key[group] = room[group] if best else first[group]
            _push(able, n_able, group, key, first)
            n_able += 1
        left = ends[at] - placed
        if n_able > 0:
            group = _pop(able, n_able, key, first)
            n_able -= 1
        else:
            group = n_groups
            n_groups += 1
            first[group], room[group] = n_bins, capacity
            count[group] = -(-left // (capacity // length))
            key[group] = capacity if best else n_bins
            n_bins += count[group]
        each = room[group] // length
        if left > each:
            full = min(count[group], left // each)
            placed += full * each
            done += full * each * length
            spare = room[group] - each * length
            at += left == full * each
        else:
            full, before, limit = 1, placed, done + room[group]
            low, turn = at + 1, end
            if n_later > 0:
                largest = room[later[0]]
                while low < turn:
                    middle = (low + turn) // 2
                    if falling[middle] > largest:
                        low = middle + 1
                    else:
                        turn = middle
            at, high = at + 1, turn
            while at < high:
                middle = (at + high) // 2
                if totals[middle] <= limit:
                    at = middle + 1
                else:
                    high = middle
            if at == turn:
                placed, done = ends[at - 1], totals[at - 1]
            else:
                part = (limit - totals[at - 1]) // falling[at]
                placed, done = ends[at - 1] + part, totals[at - 1] + part * falling[at]
            each, spare = placed - before, limit - done
        steps[n_steps, 0], steps[n_steps, 1], steps[n_steps, 2] = first[group], full, each
        n_steps += 1
        filled = group
        if full < count[group]:  # the rest of the group stays able
            filled = n_groups
            n_groups += 1
            first[filled], count[filled] = first[group], full
            first[group] += full
            count[group] -= full
            if not best:
                key[group] = first[group]
            _push(able, n_able, group, key, first)
            n_able += 1
        if spare >= shortest:
            room[filled], key[filled] = spare, -spare
            _push(later, n_later, filled, key, first)
            n_later += 1
    if end < len(falling):
        steps[n_steps, 0], steps[n_steps, 1], steps[n_steps, 2] = 0, 1, ends[end] - placed
        n_steps += 1
    return n_steps


@_kept
def fit(lengths: HostInts, longest: int, capacity: int, best: bool) -> tuple[HostInts, HostInts]:
    """Do what `fit_decreasing` does, for one sequence or more."""
    amounts = np.zeros(longest + 1, np.int64)
    for i in range(len(lengths)):
        amounts[lengths[i]] += 1
    distinct = 0
    for length in range(longest + 1):
        distinct += amounts[length] > 0
    falling, ends, totals = np.empty(distinct, np.int64), np.empty(distinct, np.int64), np.empty(distinct, np.int64)
    at = tokens = end = 0
    for length in range(longest, -1, -1):
        amount = amounts[length]
        if amount > 0:
            amounts[length] = end  # now where those of this length begin in the order
            end += amount
            tokens += amount * length
            falling[at], ends[at], totals[at] = length, end, tokens
            at += 1
    order = np.empty(len(lengths), np.int64)
    for i in range(len(lengths)):
        order[amounts[lengths[i]]] = i
        amounts[lengths[i]] += 1
    most = 2 * (tokens // capacity) + 3  # all bins but one are more than half full
    steps = np.empty((len(lengths), 3), np.int64)
    n_steps = _take_steps(falling, ends, totals, capacity, best, steps, most)
    fill = np.zeros(most, np.int64)
    n_bins = 0
    for s in range(n_steps):
        n_bins = max(n_bins, steps[s, 0] + steps[s, 1])
        for b in range(steps[s, 0], steps[s, 0] + steps[s, 1]):
            fill[b] += steps[s, 2]
    offsets = np.empty(n_bins + 1, np.int64)
    offsets[0] = 0
    for b in range(n_bins):
        offsets[b + 1] = offsets[b] + fill[b]
        fill[b] = offsets[b]  # now where the next one goes
    members = np.empty(len(lengths), np.int64)
    at = 0
    for s in range(n_steps):
        for b in range(steps[s, 0], steps[s, 0] + steps[s, 1]):
            for _ in range(steps[s, 2]):
                members[fill[b]] = order[at]
                fill[b] += 1
                at += 1
    return members, offsets
