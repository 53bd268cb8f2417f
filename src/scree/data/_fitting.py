"""Best fit and first fit decreasing, in few steps.

Sequences of equal length are interchangeable, and so are bins with equal room: a whole group of bins is filled at once
where the sequences of one length suffice for several. Where they do not, one bin takes what follows in a run, across
lengths, until the next one does not fit or a bin that was too full for longer ones has its turn again; the run's end is
a bisection of the running total. A bin that took all it can of one length has less than half of its room left, so that
it is touched at most log2(capacity) times, and the number of steps depends on the distinct lengths and on the bins that
differ instead of the sequences.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from heapq import heappop, heappush
from importlib import import_module

import numpy as np

from .._backends._protocol import HostInts

_COUNTED = 1 << 20  # below this length the compiled steps sort by counting


def fit_decreasing(
    lengths: HostInts, longest: int, capacity: int, best: bool, compiled: bool
) -> tuple[HostInts, HostInts]:
    """Put the longest first, each into the bin with the least room that suffices (`best`) or the first with room enough.

    Among equally good bins it is the first one, among equal lengths the first sequence. Empty sequences go into bin 0.
    None is above `longest`, and that not above the capacity.

    Returns
    -------
    members : array of (N,), int64
        The sequences, bin after bin, in the order in which they came into it.
    fill : array of (n_bins,), int64
        How many are in each bin.
    """
    if len(lengths) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if compiled and longest < _COUNTED:
        plain = lengths.flags.c_contiguous and lengths.flags.writeable  # others would be compiled for once more
        fit = import_module("._fitting_numba", __package__).fit
        return fit(lengths if plain else lengths.copy(), longest, capacity, best)
    order = stable_order(longest - lengths, longest)
    sizes = lengths[order]
    is_last = np.empty(len(sizes), np.bool_)  # of a length
    np.not_equal(sizes[1:], sizes[:-1], out=is_last[:-1])
    is_last[-1] = True
    ends = is_last.nonzero()[0]
    falling = sizes[ends]
    ends += 1
    amounts = ends.copy()
    amounts[1:] -= ends[:-1]
    totals = (falling * amounts).cumsum()
    steps = take_steps(falling.tolist(), (-falling).tolist(), ends.tolist(), totals.tolist(), capacity, best)
    first, width, each = np.array(steps, np.int64).reshape(-1, 3).T
    moves = int(width.sum())
    if moves > len(first):
        inner = np.arange(moves) - np.repeat(width.cumsum() - width, width)
        first, each = np.repeat(first, width) + inner, np.repeat(each, width)
    by_bin = stable_order(first, moves)
    each = each.copy()
    moved = each[by_bin]
    shift = (each.cumsum() - each)[by_bin] - (moved.cumsum() - moved)
    members = order[np.repeat(shift, moved) + np.arange(len(order))]
    return members, np.bincount(first, each).astype(np.int64)  # float64 on the way, exact below 2**53


def take_steps(
    falling: Sequence[int], rising: Sequence[int], ends: Sequence[int], totals: Sequence[int], capacity: int, best: bool
) -> list[int]:
    """Fill bins with sequences of falling distinct lengths; the same code runs as it is and compiled by numba.

    `rising` are the lengths below zero; `ends` and `totals` the sequences and the tokens up to and with each length.
    Returns triples, end to end, in the order of the sequences: the first bin of a group, how many bins, how many
    sequences into each.
    """
    # Numba learns from a list what it holds.
    able = [(0, 0, 0, 0)]  # (what is asked first, first bin, bins, room): hold the length at hand
    later = [(0, 0, 0)]  # (-room, first bin, bins): hold shorter ones
    steps = [0]
    able.clear()
    later.clear()
    steps.clear()
    end = len(falling) - (falling[-1] == 0)
    shortest = falling[end - 1]
    n_bins = at = done = placed = 0
    while at < end:
        length = falling[at]
        while len(later) > 0 and later[0][0] <= -length:
            negative, first, count = heappop(later)
            heappush(able, (-negative if best else first, first, count, -negative))
        left = ends[at] - placed
        if len(able) > 0:
            _, first, count, room = heappop(able)
        else:
            first, room = n_bins, capacity
            count = -(-left // (room // length))
            n_bins += count
        each = room // length
        if left > each:  # of one length, into bins that are alike
            full = min(count, left // each)
            steps.extend((first, full, each))
            placed += full * each
            done += full * each * length
            spare = room - each * length
            at += left == full * each
        else:  # into one bin, until the next one does not fit, or until another bin has its turn
            full, before, limit, turn = 1, placed, done + room, end
            if len(later) > 0:
                turn = bisect_left(rising, later[0][0], at + 1, end)
            at = bisect_right(totals, limit, at + 1, end)
            if turn <= at:
                at = turn
                placed, done = ends[at - 1], totals[at - 1]
            else:
                part = (limit - totals[at - 1]) // falling[at]
                placed, done = ends[at - 1] + part, totals[at - 1] + part * falling[at]
            steps.extend((first, 1, placed - before))
            spare = limit - done
        if spare >= shortest:
            heappush(later, (-spare, first, full))
        if full < count:
            heappush(able, (room if best else first + full, first + full, count - full, room))
    if end < len(falling):
        steps.extend((0, 1, ends[end] - placed))
    return steps


def stable_order(keys: HostInts, top: int) -> HostInts:
    """The stable order that sorts integers from 0 to `top`; NumPy sorts 16-bit ones by their digits, in one pass."""
    if top < 1 << 16:
        return np.argsort(keys.astype(np.uint16), kind="stable")
    if top >= 1 << 32:
        return np.argsort(keys, kind="stable")
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
