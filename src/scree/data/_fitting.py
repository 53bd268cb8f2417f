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
from heapq import heappop, heappush, heapreplace
from typing import Literal

import numpy as np

from .._backends._protocol import HostInts
from ._tiers import TIERS

_COUNTED = 1 << 20  # below this length the compiled steps sort by counting
_ADDED = 1 << 62  # below this capacity they add in 64 bits


def fit_decreasing(
    lengths: HostInts, longest: int, capacity: int, best: bool, implementation: Literal["numpy", "numba"] | None
) -> tuple[HostInts, HostInts]:
    """Put the longest first, each into the bin with the least room that suffices (`best`) or the first with room enough.

    Among equally good bins it is the first one, among equal lengths the first sequence. Empty sequences go into bin 0.
    None is above `longest`, and that not above the capacity.

    Returns
    -------
    members : array of (N,), int64
        The sequences, bin after bin, in the order in which they came into it.
    offsets : array of (n_bins + 1,), int64
        Where in them each bin begins.

    Raises
    ------
    ImportError
        numba is asked for, and is missing.
    """
    served = longest < _COUNTED and capacity < _ADDED
    fit = TIERS.choose(len(lengths) if served else 0, implementation)
    if len(lengths) == 0:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    if fit is None or not served:
        return fit_by_numpy(lengths, longest, capacity, best)
    plain = lengths.flags.c_contiguous and lengths.flags.writeable  # others would be compiled for once more
    return fit(lengths if plain else lengths.copy(), longest, capacity, best)


def fit_by_numpy(lengths: HostInts, longest: int, capacity: int, best: bool) -> tuple[HostInts, HostInts]:
    """Do what `fit_decreasing` does, for one sequence or more: sort, take the steps, put the sequences in their bins."""
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
    fill = np.bincount(first, each)  # float64, exact below 2**53
    offsets = np.zeros(len(fill) + 1, np.int64)
    fill.cumsum(out=offsets[1:], dtype=np.int64)
    return members, offsets


def take_steps(
    falling: Sequence[int], rising: Sequence[int], ends: Sequence[int], totals: Sequence[int], capacity: int, best: bool
) -> list[int]:
    """Fill bins with sequences of falling distinct lengths.

    `rising` are the lengths below zero; `ends` and `totals` the sequences and the tokens up to and with each length.
    Returns triples, end to end, in the order of the sequences: the first bin of a group, how many bins, how many
    sequences into each.
    """
    able: list[tuple[int, int, int, int]] = []  # (what is asked first, first bin, bins, room): hold the length at hand
    later: list[tuple[int, int, int]] = []  # (-room, first bin, bins): hold shorter ones
    steps: list[int] = []
    end = len(falling) - (falling[-1] == 0)
    shortest = falling[end - 1]
    n_bins = at = done = placed = 0
    while at < end:
        below = rising[at]
        while later and later[0][0] <= below:
            negative, first, count = heappop(later)
            heappush(able, (-negative if best else first, first, count, -negative))
        left = ends[at] - placed
        opened = not able
        if opened:
            first, room = n_bins, capacity
            count = -(-left // (room // falling[at]))
            n_bins += count
        else:
            _, first, count, room = able[0]
        each = room // falling[at]
        if left > each:  # of one length, into bins that are alike
            full = min(count, left // each)
            placed += full * each
            done += full * each * falling[at]
            spare = room - each * falling[at]
            at += left == full * each
        else:  # into one bin, until the next one does not fit, or until another bin has its turn
            full, before, limit, turn = 1, placed, done + room, end
            at += 1
            if later:
                turn = bisect_left(rising, later[0][0], at, end)
            at = bisect_right(totals, limit, at, turn)
            placed, done = ends[at - 1], totals[at - 1]
            if at < turn:
                part = (limit - done) // falling[at]
                placed += part
                done += part * falling[at]
            each, spare = placed - before, limit - done
        steps += (first, full, each)
        if full == count:
            if not opened:
                heappop(able)
        else:
            rest = (room if best else first + full, first + full, count - full, room)
            heappush(able, rest) if opened else heapreplace(able, rest)
        if spare >= shortest:
            heappush(later, (-spare, first, full))
    if end < len(falling):
        steps += (0, 1, ends[end] - placed)
    return steps


def stable_order(keys: HostInts, top: int) -> HostInts:
    """The stable order that sorts integers from 0 to `top`; NumPy sorts 16-bit ones by their digits, in one pass."""
    if top < 1 << 16:
        return np.argsort(keys.astype(np.uint16), kind="stable")
    if top >= 1 << 32:
        return np.argsort(keys, kind="stable")
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    return order[np.argsort((keys >> 16).astype(np.uint16)[order], kind="stable")]
