"""`scree bench` and its contests: that every contender computes the same, what is printed, what bad input gets."""

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest

from scree import bench
from scree.bench import _contest, _work

pytest.importorskip("typer")
pytest.importorskip("rich")

from rich.console import Console
from typer.testing import CliRunner

import conftest
from scree._cli import _bench
from scree._cli._commands import app

pytestmark = [
    pytest.mark.no_poison,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # PyTorch's own
]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Make every workload small, and leave out what needs a compiler of C++."""
    monkeypatch.setattr(_work, "TOKENS", (7, 120, 128))
    monkeypatch.setattr(_work, "HEADS", ((3, 12, 2, 8), (4, 20, 2, 16)))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERMINAL_WIDTH", "240")
    monkeypatch.chdir(tmp_path)


def scree_(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


HERE = [name for name in bench.FRAMEWORKS if name in conftest.HERE]


@pytest.mark.parametrize("framework", HERE)
def test_all_contenders_of_every_contest_compute_the_same(framework):
    found = bench.contests(framework)
    names = [(contest.op, contest.work) for contest in found]
    assert len(set(names)) == len(names)
    assert {contest.framework for contest in found} == {framework}
    assert any(contest.quick for contest in found)
    for contest in found:
        if framework == "jax" and not contest.quick and contest.op != "attention step":
            continue  # a program more for each contender: the quick ones and a gradient are enough
        contenders = contest.make()
        assert next(iter(contenders)) == "scree"
        assert len(contenders) > 1
        _contest.check(contenders)
        assert contest.flops > 0 or contest.nbytes > 0


def test_new_lengths_are_new_at_each_call_and_of_one_total():
    work = _work.Heads(5, 20, 2, 8)
    assert len({tuple(lengths) for lengths in work.others}) == len(work.others) == _work.BATCHES
    assert {sum(lengths) for lengths in work.others} == {sum(work.lengths)}


def test_a_contender_that_computes_something_else_is_named():
    with pytest.raises(AssertionError, match="wrong"):
        _contest.check({"scree": lambda: np.ones(3), "right": lambda: np.ones(3), "wrong": lambda: np.zeros(3)})


def test_a_row_for_the_floor_and_one_for_each_contender():
    contest = bench.Contest("op", "numpy", "work", 100.0, 0, True, lambda: {"scree": list, "peer": list})
    rows = list(bench.measure(contest, bench.Rates(50.0, lambda size: 0.0), 0.0))
    assert [row["impl"] for row in rows] == ["floor", "scree", "peer"]
    assert rows[0]["ms"] == 2.0
    assert all(row["low"] <= row["ms"] <= row["high"] for row in rows[1:])
    assert all(row["rounds"] == 5 for row in rows[1:])


def test_an_unknown_framework_lists_the_known():
    with pytest.raises(ValueError, match="contests: framework is 'cupy'; needs one of numpy, torch, jax, mlx"):
        bench.contests("cupy")


def test_bench_prints_a_chart_and_a_table_and_saves_the_rows(tmp_path):
    done = scree_("--framework", "numpy", "--quick", "--seconds", "0", "--output", "out.json")
    assert done.exit_code == 0, done.output
    for words in (
        "numpy: attention, 3 x ~12 x 2 x 8",
        "matmul a sequence",
        "█",
        "fastest other",
        "scree /",
        "floor",
    ):
        assert words in done.output
    saved = json.loads((tmp_path / "out.json").read_text())
    assert {row["op"] for row in saved["rows"]} == {"attention", "softmax", "sum", "rmsnorm"}
    assert saved["versions"]["numpy"] == np.__version__
    assert "Saved out.json." in done.output


def test_without_quick_there_is_more():
    done = scree_("--framework", "numpy", "--seconds", "0")
    assert done.exit_code == 0, done.output
    for words in ("attention, new lengths", "layernorm", "rope", "4 x ~20 x 2 x 16"):
        assert words in done.output
    assert "--quick: without it" not in done.output


def test_a_framework_that_is_named_twice_is_measured_once(tmp_path):
    done = scree_("--framework", "numpy", "--framework", "numpy", "--quick", "--seconds", "0", "--output", "out.json")
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len({(row["op"], row["impl"]) for row in rows}) == len(rows)


def test_chart_and_table_fit_into_80_columns_and_keep_every_word():
    facts = {"framework": "torch", "op": "attention step, new lengths", "work": "16 x ~512 x 8 x 64"}
    ms = {"floor": 70.95, "scree": 22307.14, "SDPA padded, is_causal": 22059.74}
    rows = [{**facts, "impl": name, "ms": value} for name, value in ms.items()]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_bench._chart(rows))
    console.print(_bench._table(rows))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in ("attention step, new", "16 x ~512 x 8 x 64", "22307.14 ms", "22059.74 ms", "1.01", "70.95 ms"):
        assert words in text.partition("fastest other")[2]


def made_up(ms):
    """Return rows as measure gives them, of one contest."""
    facts = {"framework": "numpy", "op": "sum", "work": "w"}
    return [{**facts, "impl": name, "ms": value} for name, value in ms.items()]


def test_the_notes_count_the_rows_that_are_ahead():
    rows = made_up({"floor": 0.1, "scree": 1.0, "a": 2.0, "b": 4.0})
    text = "\n".join(_bench._notes(rows, ["jax is not installed"], quick=False, busy=0.0))
    assert "in 1 of 1 rows; it takes 0.50 of its time" in text
    assert "Left out: jax is not installed" in text
    assert "load of this machine" not in text
    assert "The load of this machine was 99.0" in "\n".join(_bench._notes(rows, [], quick=False, busy=99.0))


def test_the_notes_name_the_packages_of_missing_peers(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = made_up({"floor": 0.1, "scree": 1.0, "a": 2.0})
    assert "Left out: numba loops: pip install numba" in list(_bench._notes(rows, [], quick=False, busy=0.0))


def test_frameworks_that_are_missing_are_left_out_and_said(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: real(name) if name == "numpy" else None)
    done = scree_("--quick", "--seconds", "0")
    assert done.exit_code == 0, done.output
    assert 'Left out: torch is not installed: pip install "scree[torch]"' in done.output
    done = scree_("--framework", "torch")
    assert done.exit_code == 1
    assert done.output == 'scree bench: torch is not installed: pip install "scree[torch]"\n'


def test_a_framework_that_cannot_be_imported_is_one_sentence(monkeypatch):
    def broken(name):
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "contests", broken)
    done = scree_("--framework", "mlx")
    assert done.exit_code == 1
    assert 'mlx cannot be imported (libmlx.so: cannot open shared object file): pip install "scree[mlx]"' in done.output


def test_bench_fails_where_a_contender_differs(monkeypatch):
    contenders = {"scree": lambda: np.ones(3), "by hand": lambda: np.zeros(3)}
    contest = bench.Contest("sum", "numpy", "w", 1.0, 0, True, lambda: contenders)
    monkeypatch.setattr(bench, "contests", lambda name: [contest])
    done = scree_("--framework", "numpy")
    assert done.exit_code == 1
    assert "scree bench: numpy, sum: a contender computes something else than scree:" in done.output
    assert "by hand" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--framework", "tensorfolw"], "--framework: got 'tensorfolw'; needs one of numpy, torch, jax, mlx"),
        (["--output", "no/such/folder/a.json"], "needs a folder that exists"),
        (["--output", "folder.json"], "'folder.json'; is a folder; needs a file"),
        (["--output", "times.csv"], "'times.csv'; needs a name that ends in .json"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "inf"], "--seconds: got inf; needs a number"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, says, monkeypatch, tmp_path):
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(bench, "contests", lambda name: pytest.fail("work began"))
    done = scree_(*arguments)
    assert done.exit_code == 2
    assert says in done.output


@pytest.mark.parametrize("finished", [0, 2])
def test_stopped_by_the_user_prints_what_was_measured(finished, monkeypatch):
    calls = []

    def measure(contest, rates, seconds):
        calls.append(contest)
        facts = {"op": contest.op, "framework": contest.framework, "work": contest.work}
        yield {**facts, "impl": "floor", "ms": 0.5}
        if len(calls) > finished:
            raise KeyboardInterrupt
        yield {**facts, "impl": "scree", "ms": 1.0}
        yield {**facts, "impl": "by hand", "ms": 2.0}

    monkeypatch.setattr(bench, "measure", measure)
    result = scree_("--quick", "--framework", "numpy", "--seconds", "0")
    assert result.exit_code == 130
    if finished:
        assert "no slower than the fastest other in 2 of 2 rows" in " ".join(result.stdout.split())
        assert "scree bench: stopped after 2 of 4 rows" in result.stderr
    else:
        assert "scree bench: stopped before the first row was measured" in result.stderr


def two_of_each(monkeypatch, took):
    """Two contests for NumPy and two for torch, each of which takes so many seconds; return what they were given."""
    now, given = [0.0], []

    def contests(name):
        return [bench.Contest(op, name, "w", 1.0, 0, True, dict) for op in ("sum", "max")]

    def measure(contest, rates, seconds):
        given.append((contest.framework, contest.op, seconds))
        now[0] += took
        facts = {"op": contest.op, "framework": contest.framework, "work": contest.work}
        yield from ({**facts, "impl": name, "ms": 1.0} for name in ("floor", "scree", "peer"))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name)
    monkeypatch.setattr(bench, "contests", contests)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "measured_rates", lambda: None)
    monkeypatch.setattr(_bench.time, "monotonic", lambda: now[0])
    return given


def test_a_short_run_ends_in_time_and_says_what_it_left_out(monkeypatch):
    given = two_of_each(monkeypatch, took=25.0)
    done = scree_("--quick", "--framework", "numpy", "--framework", "torch")
    assert done.exit_code == 0, done.output
    assert [name[:2] for name in given] == [("numpy", "sum"), ("torch", "sum"), ("numpy", "max")]
    words = " ".join(done.output.split())
    assert "Left out, as 75 seconds were over: torch max. With --seconds 0.5 all rows are measured" in words
    assert "in 3 of 3 rows" in words
    table = done.output.partition("fastest other")[2]
    assert table.index("max") < table.index("torch")  # by framework, whatever the order was


def test_what_time_there_is_is_shared_among_the_rows(monkeypatch):
    given = two_of_each(monkeypatch, took=24.9)
    assert scree_("--quick", "--framework", "numpy", "--framework", "torch").exit_code == 0
    np.testing.assert_allclose([each for *_, each in given], [0.5, 0.5, 0.5, 75 - 3 * 24.9])


@pytest.mark.parametrize("arguments", [["--quick", "--seconds", "0.5"], ["--seconds", "0.5"], []], ids=str)
def test_rows_that_are_asked_for_are_never_left_out(monkeypatch, arguments):
    given = two_of_each(monkeypatch, took=1000.0)
    done = scree_(*arguments, "--framework", "numpy", "--framework", "torch")
    assert done.exit_code == 0, done.output
    assert len(given) == 4
    assert {each for *_, each in given} == {0.5 if arguments else _bench.SECONDS}
    assert "were over" not in done.output
