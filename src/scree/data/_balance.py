"""Sharing sequences out among ranks so that all take equally long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _offsets
from .._array import Array
from .._backends import Dense
from .._backends._protocol import HostInts
from ._planning import at_least_one, host_lengths

Floats = NDArray[np.float64]

# Differencing keeps a sum a rank for every sequence; with more sequences than this, longest first is as even.
_MOST_DIFFERENCED = 1 << 15  # sequences * ranks


@dataclass(frozen=True)
class Balance:
    """Sequences shared out among ranks, as `balance` makes it.

    Attributes
    ----------
    ranks : Array of (N,), integer, NumPy
        Row r lists the sequences of rank r, in rising order.
    linear, quadratic : array of (n_ranks,), int64 and float64
        Of each rank: its tokens, and the sum of its squared lengths.
    cost : array of (n_ranks,), float64
        The two, weighted.
    """

    ranks: Array
    linear: HostInts
    quadratic: Floats
    cost: Floats

    @property
    def imbalance(self) -> float:
        """How much longer than the average the slowest rank takes: largest by mean cost, less 1; 0 without a cost."""
        return _imbalance(self.cost)

    @property
    def linear_imbalance(self) -> float:
        """The same for the tokens alone."""
        return _imbalance(self.linear)

    @property
    def quadratic_imbalance(self) -> float:
        """The same for the squared lengths alone."""
        return _imbalance(self.quadratic)

    def __len__(self) -> int:
        return self.ranks.batch_size

    def __getitem__(self, rank: int) -> HostInts:
        """The sequences of one rank."""
        return self.ranks[rank]

    def __repr__(self) -> str:
        return (
            f"Balance(n_ranks={len(self)}, imbalance={self.imbalance:.2%}, linear_imbalance={self.linear_imbalance:.2%}, "
            f"quadratic_imbalance={self.quadratic_imbalance:.2%})"
        )


def balance(lengths: Sequence[int] | Dense | Array, n_ranks: int, cost: tuple[float, float] = (1.0, 0.0)) -> Balance:
    """Share sequences out among ranks so that the costliest rank costs as little as possible.

    A sequence of n tokens costs ``cost[0] * n + cost[1] * n**2``: what a transformer does for each token, and what
    attention does for each pair. With hidden size M and an MLP of 4 M, a layer takes 24 M**2 multiply-adds a token and
    4 M a pair (half of that if causal), so that ``cost=(1, 1 / (6 * M))`` is its shape.

    Parameters
    ----------
    lengths : list of int, array of (N,), integer, or Array
        The lengths of the sequences; of an Array, those of its rows.
    n_ranks : int
        How many ranks there are.
    cost : pair of float
        The weights of n and of n**2, each 0 or more, not both 0.

    Returns
    -------
    Balance
        The sequences of each rank, and the imbalance of the whole, the linear and the quadratic part.

    Raises
    ------
    TypeError, ValueError
        An argument is not as described.

    Notes
    -----
    The better of two: the costliest first, each to the rank with the least (within 4/3 of the best there is), and
    the largest differencing method of Karmarkar and Karp for N * n_ranks up to 2**15. O(N log N), and n_ranks times that.

    References
    ----------
    Karmarkar and Karp, The differencing method of set partitioning, 1982.

    Examples
    --------
    >>> import scree
    >>> shared = scree.data.balance([9, 7, 5, 3], n_ranks=2)
    >>> [rows.tolist() for rows in shared.ranks], shared.imbalance
    ([[0, 3], [1, 2]], 0.0)
    """
    sizes = host_lengths("balance", lengths)
    ranks = at_least_one("n_ranks", n_ranks)
    a, b = _weights(cost)
    squares = sizes.astype(np.float64) ** 2
    costs = a * sizes + b * squares
    owner = _longest_first(costs, ranks)
    if ranks > 1 and 0 < len(sizes) * ranks <= _MOST_DIFFERENCED:
        other = _differencing(costs, ranks)
        if _loads(other, costs, ranks).max() < _loads(owner, costs, ranks).max():
            owner = other
    members = np.argsort(owner, kind="stable")
    offsets = _offsets.from_lengths(np.bincount(owner, minlength=ranks))
    return Balance(
        Array(members, offsets),
        _loads(owner, sizes, ranks).astype(np.int64),
        _loads(owner, squares, ranks),
        _loads(owner, costs, ranks),
    )


def _loads(owner: HostInts, weights: NDArray[Any], ranks: int) -> Floats:
    return np.bincount(owner, weights, ranks).astype(np.float64, copy=False)


def _weights(cost: Any) -> tuple[float, float]:
    if not isinstance(cost, (tuple, list)) or len(cost) != 2:
        raise TypeError(f"cost: got {cost!r}; needs a pair, the weights of n and of n**2")
    weights: list[float] = []
    for i, weight in enumerate(cost):
        if isinstance(weight, bool) or not isinstance(weight, (int, float, np.integer, np.floating)):
            raise TypeError(f"cost[{i}]: got {weight!r}; needs a number")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"cost[{i}]: got {weight!r}; needs a finite number of 0 or more")
        weights.append(float(weight))
    if weights == [0.0, 0.0]:
        raise ValueError("cost: got (0, 0); needs a weight above 0 for n or for n**2")
    return weights[0], weights[1]


def _imbalance(loads: NDArray[Any]) -> float:
    mean = float(loads.mean())
    return float(loads.max()) / mean - 1.0 if mean else 0.0


def _longest_first(costs: Floats, ranks: int) -> HostInts:
    """The rank of each sequence: the costliest first, each to the rank with the least cost, then the fewest, so far."""
    owner = np.zeros(len(costs), np.int64)
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    values = costs.tolist()
    for i in np.argsort(-costs, kind="stable").tolist():
        load, count, rank = loads[0]
        owner[i] = rank
        heapreplace(loads, (load + values[i], count + 1, rank))
    return owner


def _differencing(costs: Floats, ranks: int) -> HostInts:
    """The rank of each sequence by largest differencing.

    A partial solution has a load a rank, sorted. The two whose loads spread most are joined, the largest loads of one
    with the smallest of the other, until one is left.
    """
    trees: list[Any] = []  # for each partial solution: for each rank, None, a sequence, or a pair of such
    heap: list[tuple[float, int, list[float]]] = []
    for i, value in enumerate(costs.tolist()):
        heap.append((-value, i, [value] + [0.0] * (ranks - 1)))
        trees.append([i] + [None] * (ranks - 1))
    heapify(heap)
    while len(heap) > 1:
        _, i, a = heappop(heap)
        _, j, b = heappop(heap)
        left, right = trees[i], trees[j]
        joined = sorted(
            ((x + y, n) for n, (x, y) in enumerate(zip(a, reversed(b), strict=True))), key=lambda pair: -pair[0]
        )
        trees[j] = None
        trees[i] = [(left[n], right[ranks - 1 - n]) for _, n in joined]
        loads = [load for load, _ in joined]
        heappush(heap, (loads[-1] - loads[0], i, loads))
    owner = np.zeros(len(costs), np.int64)
    for rank, tree in enumerate(trees[heap[0][1]]):
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            if isinstance(node, tuple):
                waiting.extend(node)
            elif node is not None:
                owner[node] = rank
    return owner
