"""Planning of bins: the same bins as the textbook's loops, nothing lost, nothing doubled, and what bad input gets."""

import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scree
from expect import raises
from scree.data import _fitting, _tiers, plan_bins

ALGORITHMS = ("bfd", "ffd", "wrapped", "split")
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def tiers():
    """The state of a process that has planned nothing yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fitting, "TIERS", _tiers.Tiers())
        yield


def textbook(lengths, capacity, best):
    """Return the bins of best or first fit decreasing as lists of lengths: one loop over sequences, one over bins."""
    rooms, bins = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            bins.append([])
            fitting = [len(bins) - 1]
        chosen = min(fitting, key=lambda b: (rooms[b], b)) if best else fitting[0]
        rooms[chosen] -= length
        bins[chosen].append(length)
    return bins


def pieces_of(plan):
    """Return (sequence, start, length) of every piece."""
    return list(zip(plan.bins.values.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))


def check(plan, lengths, capacity):
    """Require that every token of every sequence that was not dropped is in exactly one bin, and no bin is over-full."""
    assert (plan.fills <= capacity).all()
    assert plan.fills.sum() == plan.n_tokens
    covered = {}
    for row, start, length in pieces_of(plan):
        covered.setdefault(row, []).append((start, length))
    assert sorted([*covered, *plan.dropped.tolist()]) == list(range(len(lengths)))
    for row, parts in covered.items():
        at = 0
        for start, length in sorted(parts):
            assert start == at
            at += length
        assert at == lengths[row]
    assert plan.n_split == sum(len(parts) > 1 for parts in covered.values())


def bins_of(lengths, capacity, algo, **options):
    """Plan, and return the bins as lists of lengths."""
    plan = plan_bins(lengths, capacity, algo, **options)
    check(plan, lengths, capacity)
    return [[lengths[row] for row in bin_.tolist()] for bin_ in plan]


@pytest.mark.parametrize(("algo", "best"), [("bfd", True), ("ffd", False)])
@PROPERTY
@given(data=st.data())
def test_the_bins_are_the_textbooks(algo, best, data):
    capacity = data.draw(st.integers(1, 40))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    assert bins_of(lengths, capacity, algo) == textbook(lengths, capacity, best)


@pytest.mark.parametrize("algo", ["bfd", "ffd"])
def test_the_bins_are_the_textbooks_on_many_lengths(algo):
    lengths = np.clip(np.random.default_rng(1).lognormal(4, 1, 1500), 1, 700).astype(int).tolist()
    assert bins_of(lengths, 700, algo) == textbook(lengths, 700, algo == "bfd")


@pytest.mark.parametrize("algo", ALGORITHMS)
@PROPERTY
@given(data=st.data())
def test_nothing_is_lost_or_doubled(algo, data):
    capacity = data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=25))
    seed = data.draw(st.none() | st.integers(0, 3))
    too_long = data.draw(st.sampled_from(["split", "drop"]))
    plan = plan_bins(lengths, capacity, algo, seed, too_long=too_long)
    check(plan, lengths, capacity)
    assert plan.dropped.tolist() == [i for i, n in enumerate(lengths) if n > capacity and too_long == "drop"]
    assert plan.capacity == capacity
    if plan.n_bins:
        assert plan.efficiency == pytest.approx(plan.n_tokens / (plan.n_bins * capacity))


@PROPERTY
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=25), capacity=st.integers(1, 12))
def test_wrapped_leaves_room_in_the_last_bin_only(lengths, capacity):
    plan = plan_bins(lengths, capacity, "wrapped")
    assert plan.n_bins == max(math.ceil(sum(lengths) / capacity), 1)
    assert (plan.fills[:-1] == capacity).all()
    assert plan.bins.values.tolist() == sorted(plan.bins.values.tolist())


@PROPERTY
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_split_cuts_only_what_is_too_long(lengths):
    plan = plan_bins(lengths, 10, "split")
    assert plan.n_split == sum(n > 10 for n in lengths)
    pieces = [n for n in lengths for n in [10] * (n // 10) + [n % 10] if n]
    assert plan.n_bins == len(textbook(pieces, 10, best=True))


def test_the_plan_is_tight_on_log_normal_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 20_000), 1, 8192).astype(np.int64)
    at_best = math.ceil(lengths.sum() / 8192)
    for algo in ("bfd", "ffd"):
        assert plan_bins(lengths, 8192, algo).n_bins <= at_best + 1


def test_a_million_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1, 1_000_000), 1, 8192).astype(np.int64)
    plan = plan_bins(lengths, 8192, seed=0)
    assert plan.efficiency > 0.999
    assert np.array_equal(np.sort(plan.bins.values), np.arange(len(lengths)))


def steps_of(monkeypatch, lengths, capacity, algo):
    """Return how many steps the planner took."""
    taken = []
    take = _fitting.take_steps
    monkeypatch.setattr(_fitting, "take_steps", lambda *given: taken.append(take(*given)) or taken[-1])
    plan_bins(lengths, capacity, algo, implementation="numpy")
    monkeypatch.undo()
    return len(taken[0]) // 3


@pytest.mark.parametrize("algo", ["bfd", "ffd"])
def test_steps_do_not_grow_with_equal_lengths(monkeypatch, algo):
    assert steps_of(monkeypatch, np.full(100_000, 3), 100, algo) <= 2
    lengths = np.random.default_rng(3).integers(1, 30, 1000)
    once, often = (steps_of(monkeypatch, np.tile(lengths, times), 300, algo) for times in (10, 1000))
    assert often < 3 * once


@pytest.mark.parametrize("algo", ["bfd", "ffd"])
def test_one_bin_takes_a_run_of_distinct_lengths_in_one_step(monkeypatch, algo):
    assert steps_of(monkeypatch, np.arange(1, 200), 200 * 200, algo) == 1


@PROPERTY
@given(data=st.data())
def test_room_and_lengths_may_be_larger_than_32_bits(data):
    unit = 1 << data.draw(st.sampled_from([0, 16, 33, 44]))
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=30))
    small = plan_bins(lengths, 20)
    large = plan_bins([n * unit for n in lengths], 20 * unit)
    assert pieces_of(large) == [(row, 0, n * unit) for row, _, n in pieces_of(small)]
    assert large.bins.offsets.tolist() == small.bins.offsets.tolist()


@pytest.mark.engines
class TestCompiled:
    """The same bins, whatever takes the steps."""

    @pytest.mark.parametrize("algo", ALGORITHMS)
    @PROPERTY
    @given(data=st.data())
    def test_the_bins_are_the_same(self, algo, data):
        capacity = data.draw(st.integers(1, 40))
        lengths = data.draw(st.lists(st.integers(0, 60), max_size=60))
        seed = data.draw(st.none() | st.integers(0, 3))
        plain, compiled = (
            plan_bins(lengths, capacity, algo, seed, too_long="split", implementation=name)
            for name in ("numpy", "numba")
        )
        assert pieces_of(plain) == pieces_of(compiled)
        assert plain.bins.offsets.tolist() == compiled.bins.offsets.tolist()

    @pytest.mark.parametrize("algo", ["bfd", "ffd"])
    @pytest.mark.parametrize(("mean", "capacity"), [(4, 700), (6, 8192), (13, 1 << 22)])
    def test_on_many_lengths(self, algo, mean, capacity):
        lengths = np.clip(np.random.default_rng(1).lognormal(mean, 1, 20_000), 0, capacity).astype(np.int64)
        plain, compiled = (plan_bins(lengths, capacity, algo, implementation=name) for name in ("numpy", "numba"))
        assert pieces_of(plain) == pieces_of(compiled)

    @pytest.mark.parametrize(("algo", "best"), [("bfd", True), ("ffd", False)])
    @PROPERTY
    @given(data=st.data())
    def test_the_bins_are_the_textbooks(self, algo, best, data):
        capacity = data.draw(st.integers(1, 40))
        lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
        assert bins_of(lengths, capacity, algo, implementation="numba") == textbook(lengths, capacity, best)

    def test_lengths_that_cannot_be_written_to(self):
        lengths = np.array([5, 3, 8, 2, 6])[::1]
        lengths.flags.writeable = False
        plans = [plan_bins(given_, 8, implementation="numba") for given_ in (lengths, lengths.repeat(2)[::2])]
        assert [[row.tolist() for row in plan] for plan in plans] == [[[2], [4, 3], [0, 1]]] * 2

    @pytest.mark.parametrize("capacity", [1 << 61, 1 << 62, (1 << 63) - 1, 1 << 70])
    def test_room_beyond_64_bits(self, capacity):
        for lengths in ([3, 0, 5], [1 << 40, 3]):
            plans = [plan_bins(lengths, capacity, implementation=name) for name in ("numpy", "numba")]
            assert [[row.tolist() for row in plan] for plan in plans] == [
                [np.argsort(np.negative(lengths), kind="stable").tolist()]
            ] * 2

    @pytest.mark.parametrize("algo", ["bfd", "ffd", "split"])
    def test_a_process_goes_over_to_numba(self, monkeypatch, algo):
        monkeypatch.setattr(_tiers, "COMPILE_AFTER", 100)
        monkeypatch.setattr(_fitting, "TIERS", _tiers.Tiers())
        lengths = np.random.default_rng(4).integers(0, 30, 60)
        wanted = pieces_of(plan_bins(lengths, 64, algo, implementation="numpy"))
        went_over = []
        for _ in range(4):
            assert pieces_of(plan_bins(lengths, 64, algo)) == wanted
            went_over.append(_fitting.TIERS.fit is not None)
        assert went_over == [False, False, True, True]
        assert _fitting.TIERS.planned == 120

    def test_where_numba_was_asked_for_it_is_there_for_all(self, monkeypatch):
        monkeypatch.setattr(_fitting, "TIERS", _tiers.Tiers())
        plan_bins([3], 8, implementation="numba")
        monkeypatch.setattr(_fitting, "take_steps", None)
        assert plan_bins([3, 4], 8).n_bins == 1


PROGRAM = """
    import resource, sys
    import numpy as np
    import scree
    if "full" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # as on a disk without room
    plan = scree.data.plan_bins(np.array([5, 3, 8, 2, 6]), 8, implementation="numba")
    from scree.data import _fitting_numba
    hits = _fitting_numba.fit.stats.cache_hits
    print(scree.__file__, [row.tolist() for row in plan] == [[2], [4, 3], [0, 1]], sum(hits.values()))
"""


@pytest.mark.engines
def test_compiled_code_is_kept_where_the_package_cannot_be_written_to(tmp_path):
    package = tmp_path / "site" / "scree"
    shutil.copytree(Path(scree.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "data" / "__pycache__").touch()  # a file where the folder should be: not even root can write into it

    def run(home, *arguments):
        environment = {
            name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "PYTHONPATH")
        }
        told = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments], capture_output=True, text=True, timeout=180,
            env=environment | {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(home), "XDG_CACHE_HOME": f"{home}/cache"},
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        file, right, hits = told.stdout.split()
        assert (Path(file).parent, right) == (package, "True")
        return int(hits)

    home = tmp_path / "home"
    assert run(home, "full") == 0
    assert not list(home.rglob("*.nbc"))
    assert [run(home), run(home)] == [0, 1]
    assert list((home / "cache" / "numba").rglob("*.nbc"))
    assert run("/dev/null") == 0


def test_without_numba_the_process_stays_with_numpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(_tiers, "COMPILE_AFTER", 5)
    monkeypatch.setattr(_fitting, "TIERS", _tiers.Tiers())
    tried = []
    ask = _tiers.compiled
    monkeypatch.setattr(_tiers, "compiled", lambda: tried.append(1) or ask())
    for _ in range(4):
        assert plan_bins([3, 4, 5], 8).n_bins == 2
    assert len(tried) == 1


def test_compiled_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(_fitting, "TIERS", _tiers.Tiers())
    with raises(ImportError, "plan_bins: needs numba", 'pip install "scree[numba]"'):
        plan_bins([3], 8, implementation="numba")
    with raises(ValueError, "implementation: got 'c'; needs one of 'numpy', 'numba'"):
        plan_bins([3], 8, implementation="c")


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_seed_draws_another_plan_of_the_same_worth(algo):
    lengths = np.random.default_rng(2).integers(1, 30, 300)
    plain = plan_bins(lengths, 64, algo)
    first, again, other = (plan_bins(lengths, 64, algo, seed) for seed in (0, 0, 1))
    assert pieces_of(first) == pieces_of(again)
    assert pieces_of(first) != pieces_of(other)
    assert first.n_bins == plain.n_bins
    fills = first.fills.tolist()
    assert algo == "wrapped" or fills != sorted(fills, reverse=True)


def test_edges():
    empty = plan_bins([], 8)
    assert (len(empty), empty.efficiency, empty.n_tokens, list(empty)) == (0, 1.0, 0, [])
    for algo in ALGORITHMS:
        nothing = plan_bins([0, 0], 8, algo)
        assert [row.tolist() for row in nothing] == [[0, 1]]
        assert nothing.efficiency == 0.0
        assert [row.tolist() for row in plan_bins([8, 0], 8, algo)] == [[0, 1]]
        assert plan_bins([9], 8, algo, too_long="drop").n_bins == 0


@pytest.mark.parametrize("kind", [list, np.int32, np.uint8])
def test_lengths_of_every_kind(kind):
    lengths = [5, 3, 8, 2, 6]
    given_ = lengths if kind is list else np.array(lengths, kind)
    assert [row.tolist() for row in plan_bins(given_, 8)] == [[2], [4, 3], [0, 1]]


def test_lengths_of_every_framework(xp):
    arr = scree.pack([xp.array(np.ones(n), "float32") for n in (5, 3, 8)])
    assert [row.tolist() for row in plan_bins(arr, 8)] == [[2], [0, 1]]
    assert [row.tolist() for row in plan_bins(arr.lengths, 8)] == [[2], [0, 1]]


def test_repr_says_what_was_cut_and_dropped():
    assert repr(plan_bins([9, 3], 8, "split")) == "Plan(split, capacity=8, n_bins=2, efficiency=0.7500, 1 cut)"
    assert (
        repr(plan_bins([9, 4], 8, too_long="drop")) == "Plan(bfd, capacity=8, n_bins=1, efficiency=0.5000, 1 dropped)"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([9, 3, 12], 8), ValueError, ("lengths[0]: got 9, above the capacity of 8; 2 of 3 are", "too_long='split'")),
        (([3], 8, "split", None, "error"), None, ()),
        (([9], 8, "wrapped", None, "error"), ValueError, ("lengths[0]: got 9",)),
        (([3, -1], 8), ValueError, ("lengths[1]: got -1; needs 0 or more",)),
        (([3.5], 8), TypeError, ("lengths: got float64; needs integers",)),
        (([[3]], 8), ValueError, ("lengths: got shape (1, 1); needs one axis",)),
        (("abc", 8), TypeError, ("lengths: got str; needs a list of integers",)),
        ((iter([3]), 8), TypeError, ("lengths: got list_iterator; needs a list",)),
        ((None, 8), TypeError, ("lengths: got NoneType",)),
        (
            ([1 << 62] * 2, 1 << 62),
            ValueError,
            ("lengths: got lengths up to 4611686018427387904; needs such that sum",),
        ),
        (([3], 0), ValueError, ("capacity: got 0; needs 1 or more",)),
        (([3], 8.0), TypeError, ("capacity: got 8.0; needs an integer",)),
        (([3], True), TypeError, ("capacity: got True; needs an integer",)),
        (([3], 8, "best"), ValueError, ("algo: got 'best'; needs one of 'bfd', 'ffd', 'wrapped', 'split'",)),
        (([3], 8, "bfd", -1), ValueError, ("seed: got -1; needs 0 or more",)),
        (([3], 8, "bfd", "x"), TypeError, ("seed: got 'x'; needs an integer",)),
        (([3], 8, "bfd", None, "cut"), ValueError, ("too_long: got 'cut'; needs one of 'error', 'split', 'drop'",)),
    ],
)
def test_bad_arguments(arguments, error, words):
    *positional, too_long = arguments if len(arguments) == 5 else (*arguments, None)
    if error is None:
        assert plan_bins(*positional, too_long=too_long).n_bins == 1
        return
    with raises(error, *words):
        plan_bins(*positional, too_long=too_long)
