"""What padding costs on given lengths, for each way to make batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._backends._protocol import HostInts
from ._planning import Plan, generator, plan_bins

WINDOW = 50  # batches that are sorted together in bucketed batches, as Transformers' group_by_length has it


@dataclass(frozen=True)
class Strategy:
    """One way to make batches.

    Attributes
    ----------
    name, how : str
        What it is called, and what it does.
    places : int
        Token places computed on: tokens and padding.
    pairs : int
        Pairs of a query and a key that attention computes.
    """

    name: str
    how: str
    places: int
    pairs: int


@dataclass(frozen=True)
class Waste:
    """What `measure` found.

    Attributes
    ----------
    lengths : array of (N,), int64
    batch_size, capacity : int
    strategies : tuple of Strategy
        The first is what the others are compared with.
    plan : Plan
        The bins of the last one.
    """

    lengths: HostInts
    batch_size: int
    capacity: int
    strategies: tuple[Strategy, ...]
    plan: Plan

    @property
    def tokens(self) -> int:
        """The tokens in all."""
        return int(self.lengths.sum())

    @property
    def pairs(self) -> int:
        """The pairs of a query and a key that belong to the same sequence."""
        return _squares(self.lengths)

    def wasted(self, strategy: Strategy) -> int:
        """Places that hold no token."""
        return strategy.places - self.tokens

    def wasted_share(self, strategy: Strategy) -> float:
        """Places that hold no token, by all places."""
        return self.wasted(strategy) / strategy.places if strategy.places else 0.0

    def saved_places(self, strategy: Strategy) -> float:
        """The share of the places of the first strategy that this one does without."""
        return 1 - strategy.places / self.strategies[0].places if self.strategies[0].places else 0.0

    def saved_pairs(self, strategy: Strategy) -> float:
        """The share of the pairs of the first strategy that this one does without."""
        return 1 - strategy.pairs / self.strategies[0].pairs if self.strategies[0].pairs else 0.0


def measure(lengths: HostInts, batch_size: int, capacity: int | None = None, seed: int = 0) -> Waste:
    """Make batches of `batch_size` sequences in every way, and count the places and pairs of each.

    Without a capacity, bins hold the longest sequence.
    """
    room = capacity if capacity is not None else max(int(lengths.max(initial=1)), 1)
    shuffled = generator(seed).permutation(lengths)
    plan = plan_bins(lengths, room, "split")
    pieces = _squares(plan.lengths)
    strategies = (
        Strategy(
            "random", f"shuffled, {batch_size} a batch, each padded to its longest", *_padded(shuffled, batch_size)
        ),
        Strategy(
            "bucketed",
            f"shuffled, then sorted within every {WINDOW} batches, padded",
            *_padded(_bucketed(shuffled, batch_size), batch_size),
        ),
        Strategy("sorted", "sorted by length, padded", *_padded(np.sort(lengths), batch_size)),
        Strategy("packed", f"{batch_size} a batch, end to end: no padding", int(lengths.sum()), _squares(lengths)),
        Strategy("bins", f"packed into bins of {room:,}, best fit decreasing: one shape", plan.n_bins * room, pieces),
    )
    return Waste(lengths, batch_size, room, strategies, plan)


def _squares(lengths: HostInts) -> int:
    values, counts = np.unique(lengths, return_counts=True)
    return sum(n * n * count for n, count in zip(values.tolist(), counts.tolist(), strict=True))


def _bucketed(lengths: HostInts, batch_size: int) -> HostInts:
    window = WINDOW * batch_size
    return np.concatenate([np.sort(lengths[i : i + window]) for i in range(0, len(lengths), window)] or [lengths])


def _padded(lengths: HostInts, batch_size: int) -> tuple[int, int]:
    """The places, and the pairs, of batches in this order."""
    if len(lengths) == 0:
        return 0, 0
    starts = np.arange(0, len(lengths), batch_size)
    longest = np.maximum.reduceat(lengths, starts).tolist()
    rows = np.diff(np.append(starts, len(lengths))).tolist()
    places = sum(n * row for n, row in zip(longest, rows, strict=True))
    return places, sum(n * n * row for n, row in zip(longest, rows, strict=True))
