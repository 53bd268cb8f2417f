"""Batches by tokens: full, fair to every rank, and the same again after an interruption."""

import functools
import json
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scree
from expect import raises
from scree.data import token_batches

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)
LENGTHS = np.random.default_rng(0).integers(1, 50, 200)


@PROPERTY
@given(data=st.data())
def test_every_sequence_comes_once_and_no_batch_is_too_large(data):
    world = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=world, max_size=60))
    seed, shuffle = data.draw(st.integers(0, 3)), data.draw(st.booleans())
    ranks = [token_batches(lengths, 20, shuffle, seed, rank=r, world_size=world) for r in range(world)]
    for _ in range(2):
        counts = [len(rank) for rank in ranks]
        batches = [list(rank) for rank in ranks]
        assert len(set(counts)) == 1
        assert [len(b) for b in batches] == counts
        all_rows = functools.reduce(operator.iadd, functools.reduce(operator.iadd, batches, []), [])
        assert set(all_rows) == set(range(len(lengths)))
        if len(all_rows) > len(lengths):
            assert all(len(batch) == 1 for rank in batches for batch in rank)
            assert len(all_rows) - len(lengths) < world
        assert all(batch and sum(lengths[i] for i in batch) <= 20 for rank in batches for batch in rank)


@PROPERTY
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_a_batch_takes_what_fits(lengths):
    batches = list(token_batches(lengths, 20, shuffle=False))
    assert functools.reduce(operator.iadd, batches, []) == list(range(len(lengths)))
    for batch, following in zip(batches, batches[1:], strict=False):
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > 20


def test_ranks_with_batches_of_one_sequence_stay_in_step():
    ranks = [list(token_batches([1, 20, 1, 20], 20, shuffle=False, rank=r, world_size=3)) for r in range(3)]
    assert ranks == [[[0], [3]], [[1], [0]], [[2], [1]]]


def test_epochs_differ_and_can_be_chosen():
    batches = token_batches(LENGTHS, 100)
    first, second = list(batches), list(batches)
    assert batches.epoch == 2
    assert first != second
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(token_batches(LENGTHS, 100, seed=1)) != first
    plain = token_batches(LENGTHS, 100, shuffle=False)
    assert list(plain) == list(plain)


@pytest.mark.parametrize("done", [0, 1, 7, 20])
@pytest.mark.parametrize("world", [1, 3])
def test_it_resumes_within_an_epoch(done, world):
    def make(rank):
        return token_batches(LENGTHS, 80, world_size=world, rank=rank)

    rest, states = [], []
    for rank in range(world):
        whole = make(rank)
        list(whole)  # epoch 0
        running = iter(whole)
        for _ in range(done):
            next(running)
        states.append(whole.state_dict())
        rest.append([*running, *whole])  # to the end of epoch 1, and epoch 2
    assert all(state == states[0] for state in states)
    state = json.loads(json.dumps(states[0]))
    for rank in range(world):
        resumed = make(rank)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(state["epoch"])
        assert [*resumed, *resumed] == rest[rank]


def test_state_with_the_batches_that_were_trained_on():
    batches = token_batches(LENGTHS, 100)
    expected = list(batches)
    batches.set_epoch(0)
    running = iter(batches)
    for _ in range(5):
        next(running)
    state = batches.state_dict(done=3)
    batches.load_state_dict(state)
    assert list(batches) == expected[3:]
    with raises(ValueError, "done: got 999; needs 0 to"):
        batches.state_dict(done=999)


def test_an_epoch_that_was_finished_resumes_with_the_next():
    batches = token_batches(LENGTHS, 100)
    state = batches.state_dict(done=len(batches))
    fresh = token_batches(LENGTHS, 100)
    fresh.load_state_dict(state)
    assert fresh.epoch == 1
    list(batches)
    assert list(fresh) == list(batches)


def test_another_epoch_forgets_the_place():
    batches = token_batches(LENGTHS, 100)
    state = batches.state_dict(done=3)
    batches.load_state_dict(state)
    batches.set_epoch(4)
    assert list(batches) == _epoch(4)


def _epoch(number):
    batches = token_batches(LENGTHS, 100)
    batches.set_epoch(number)
    return list(batches)


def test_a_new_iteration_begins_the_epoch_again():
    batches = token_batches(LENGTHS, 100)
    first = next(iter(batches))
    assert next(iter(batches)) == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": LENGTHS + 1}, ("state: lengths is",)),
        ({"max_tokens": 101}, ("state: max_tokens is 100, but here it is 101",)),
        ({"shuffle": False}, ("state: shuffle is True, but here it is False",)),
        ({"seed": 3}, ("state: seed is 0, but here it is 3",)),
        ({"world_size": 2}, ("state: world_size is 1, but here it is 2",)),
    ],
)
def test_a_state_of_other_batches_is_refused(change, words):
    state = token_batches(LENGTHS, 100).state_dict()
    with raises(ValueError, *words):
        token_batches(**{"lengths": LENGTHS, "max_tokens": 100, **change}).load_state_dict(state)


def test_a_state_that_is_none_is_refused():
    batches = token_batches(LENGTHS, 100)
    with raises(ValueError, "state: it has no 'version'"):
        batches.load_state_dict({})
    with raises(ValueError, "state: version is 0"):
        batches.load_state_dict({**batches.state_dict(), "version": 0})
    with raises(ValueError, "state: done is 1000; needs 0 to"):
        batches.load_state_dict({**batches.state_dict(), "done": 1000})


def test_what_is_too_long_is_dropped_and_listed():
    batches = token_batches([5, 30, 6, 40], 20, too_long="drop")
    assert batches.dropped.tolist() == [1, 3]
    assert sorted(functools.reduce(operator.iadd, batches, [])) == [0, 2]


def test_no_sequences():
    batches = token_batches([], 20, world_size=4)
    assert (len(batches), list(batches)) == (0, [])


def test_an_array_of_every_framework(xp):
    arr = scree.pack([xp.array(np.ones(n), "float32") for n in (5, 3, 8)])
    assert list(token_batches(arr, 8, shuffle=False)) == [[0, 1], [2]]


def test_a_dataloader_takes_it_as_its_batch_sampler():
    data = pytest.importorskip("torch.utils.data")
    rows = [np.full(n, i) for i, n in enumerate(LENGTHS.tolist())]
    batches = token_batches(LENGTHS, 100)
    loader = data.DataLoader(rows, batch_sampler=batches, collate_fn=lambda samples: [int(s[0]) for s in samples])
    assert len(loader) == len(batches)
    assert list(loader) == list(token_batches(LENGTHS, 100))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"lengths": [5, 30, 40], "max_tokens": 20},
            ValueError,
            ("lengths[1]: got 30, above max_tokens=20; 2 of 3 are",),
        ),
        ({"lengths": [5], "max_tokens": 0}, ValueError, ("max_tokens: got 0; needs 1 or more",)),
        ({"lengths": [5], "max_tokens": "9"}, TypeError, ("max_tokens: got '9'; needs an integer",)),
        ({"lengths": [5], "max_tokens": 9, "seed": -1}, ValueError, ("seed: got -1; needs 0 or more",)),
        ({"lengths": [5], "max_tokens": 9, "rank": 1}, ValueError, ("rank: got 1; needs 0 <= rank < 1",)),
        ({"lengths": [5], "max_tokens": 9, "world_size": 0}, ValueError, ("world_size: got 0; needs 1 or more",)),
        ({"lengths": [5], "max_tokens": 9, "world_size": 2}, ValueError, ("world_size: got 2; needs at most 1",)),
        ({"lengths": [5], "max_tokens": 9, "too_long": "split"}, ValueError, ("too_long: got 'split'; needs one of",)),
        ({"lengths": [-5], "max_tokens": 9}, ValueError, ("lengths[0]: got -5",)),
    ],
)
def test_bad_arguments(arguments, error, words):
    with raises(error, *words):
        token_batches(**arguments)
    if "seed" in arguments:
        with raises(ValueError, "epoch: got -1; needs 0 or more"):
            token_batches([1], 1).set_epoch(-1)
