"""Sharing out among ranks: nothing lost, close to the best there is, and both parts of the cost reported."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scree
from expect import raises
from scree.data import balance

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def best_there_is(costs, ranks):
    """Return the smallest possible cost of the costliest rank, by trying every way."""
    return min(
        max(sum(c for c, r in zip(costs, owners, strict=True) if r == rank) for rank in range(ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )


@PROPERTY
@given(
    lengths=st.lists(st.integers(0, 60), max_size=7),
    ranks=st.integers(1, 3),
    cost=st.sampled_from([(1, 0), (0, 1), (1, 0.1), (2.5, 1e-3)]),
)
def test_it_is_close_to_the_best(lengths, ranks, cost):
    shared = balance(lengths, ranks, cost)
    assert sorted(shared.ranks.values.tolist()) == list(range(len(lengths)))
    costs = [cost[0] * n + cost[1] * n**2 for n in lengths]
    for rank in range(ranks):
        rows = shared[rank].tolist()
        assert rows == sorted(rows)
        assert shared.linear[rank] == sum(lengths[i] for i in rows)
        assert shared.quadratic[rank] == sum(lengths[i] ** 2 for i in rows)
        assert shared.cost[rank] == pytest.approx(sum(costs[i] for i in rows))
    assert shared.cost.max() <= best_there_is(costs, ranks) * (4 / 3 - 1 / (3 * ranks)) + 1e-9


def test_differencing_finds_what_longest_first_does_not():
    # Longest first gives 8 + 5 + 4 and 7 + 6; the best is 15.
    assert balance([8, 7, 6, 5, 4], 2).cost.max() == 16


def test_the_imbalance_is_reported_for_each_part():
    shared = balance([10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2)
    assert shared.imbalance == shared.linear_imbalance == 0.0
    assert shared.quadratic_imbalance == pytest.approx(100 / 55 - 1)
    assert repr(shared) == "Balance(n_ranks=2, imbalance=0.00%, linear_imbalance=0.00%, quadratic_imbalance=81.82%)"


@pytest.mark.parametrize("cost", [(1, 0), (1, 1 / (6 * 1024)), (0, 1)])
@pytest.mark.parametrize("n", [512, 50_000])
def test_many_sequences_are_balanced_closely(cost, n):
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, n), 1, 4096).astype(np.int64)
    shared = balance(lengths, 8, cost)
    assert len(shared) == 8
    assert np.array_equal(np.sort(shared.ranks.values), np.arange(n))
    assert shared.imbalance < 0.01


def test_edges():
    none = balance([], 3)
    assert (len(none), none.imbalance, none.linear.tolist()) == (3, 0.0, [0, 0, 0])
    few = balance([5], 3)
    assert sorted(few.linear.tolist()) == [0, 0, 5]
    assert few.imbalance == 2.0
    assert [len(rows) for rows in balance([0] * 6, 3).ranks] == [2, 2, 2]
    assert balance([3, 4], 1).ranks[0].tolist() == [0, 1]


def test_an_array_of_every_framework(xp):
    arr = scree.pack([xp.array(np.ones(n), "float32") for n in (9, 7, 5, 3)])
    assert balance(arr, 2).imbalance == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1], 0), ValueError, ("n_ranks: got 0; needs 1 or more",)),
        (([1], 2.0), TypeError, ("n_ranks: got 2.0; needs an integer",)),
        (([-1], 2), ValueError, ("lengths[0]: got -1",)),
        (([1], 2, 3.0), TypeError, ("cost: got 3.0; needs a pair",)),
        (([1], 2, (1,)), TypeError, ("cost: got (1,); needs a pair",)),
        (([1], 2, (1, "x")), TypeError, ("cost[1]: got 'x'; needs a number",)),
        (([1], 2, (1, -1.0)), ValueError, ("cost[1]: got -1.0; needs a finite number of 0 or more",)),
        (([1], 2, (float("nan"), 1)), ValueError, ("cost[0]: got nan; needs a finite number",)),
        (([1], 2, (0, 0)), ValueError, ("cost: got (0, 0); needs a weight above 0",)),
    ],
)
def test_bad_arguments(arguments, error, words):
    with raises(error, *words):
        balance(*arguments)
