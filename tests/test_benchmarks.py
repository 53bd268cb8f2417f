"""The page of benchmarks says what was measured: it is made from the saved results, and by nothing else."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(monkeypatch):
    """The module benchmarks/run.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("run", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("measure", "bench_data", "cuda_table", "data_table", "huggingface_table", "summary"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("part", ["core", "data", "cpu", "jax", "cuda", "huggingface"])
def test_every_part_takes_its_arguments(run, monkeypatch, capsys, part):
    if part in ("cuda", "huggingface"):
        pytest.importorskip("torch")
    assert set(run.TABLES) == {"core", "data", "cpu", "jax", "cuda", "huggingface"}
    monkeypatch.setattr(sys, "argv", ["run.py", part, "--help"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 0
    assert "--seconds" in capsys.readouterr().out


def test_what_a_part_measured_is_saved(run, monkeypatch, tmp_path):
    measured = {
        "op": "pack",
        "framework": "numpy",
        "work": "2 x 3",
        "impl": "scree",
        "ms": 1.0,
        "low": 1.0,
        "high": 1.0,
    }
    saved = {}
    part = SimpleNamespace(PACKAGES=("scree",), SEQUENCES=(2,), rows=lambda sizes, seconds: iter([measured]))
    monkeypatch.setitem(sys.modules, "bench_core", part)  # which itself imports every peer
    monkeypatch.setattr(run.measure, "save", lambda name, part, found: saved.update({(name, part): found["rows"]}))
    monkeypatch.setitem(run.TABLES, "core", lambda found: "the table")
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["run.py", "core"])
    run.main()
    assert saved == {(run.DEVICE, "core"): [measured]}
    assert "# Benchmarks" in run.PAGE.read_text()


def test_the_page_is_made_from_the_results(run):
    assert run.PAGE.read_text() == run.page()


def test_every_row_has_what_it_measured(run):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for measured in json.loads(path.read_text()).values():
            assert len(measured["commit"]) == 40
            assert measured["changed"] is False
            assert measured["versions"]["scree"]
            assert all(row.get("left_out") or row["ms"] >= 0 for row in measured["rows"])


def test_the_table_of_models_says_what_is_met_left_out_and_leaks(run):
    def row(impl, ms, places, leaks=False, **others):
        times = {"ms": ms, "low": ms, "high": ms, "rounds": 3, "peak": 2 * 10**9}
        return {"op": "forward", "work": "w", "impl": impl, "tokens": 100, "places": places, "err": 1e-7} | (
            {"leaks": leaks, **times, **others}
        )

    def drawn(ours):
        rows = [row("scree packed", ours, 100), row("padded sdpa", 4000.0, 400), row("packed sdpa", 900.0, 100, True)]
        rows.append(
            {k: v for k, v in row("padded eager", 1.0, 400).items() if k != "ms"} | {"left_out": "out of memory"}
        )
        rows += [
            {"op": "collate", "work": "c", "impl": name, "ms": ms, "low": ms, "high": ms}
            for name, ms in (("ours", 1.0), ("theirs", 4.0))
        ]
        measured = {"versions": {}, "changed": False, "device": "", "system": "", "commit": "c", "rows": rows}
        return run.TABLES["huggingface"](measured | {"goal": 0.9, "clock": "process_time"})

    table = drawn(1111.0)
    assert "Medians of interleaved rounds, processor time." in table
    assert "| 1.111 | 1.111 to 1.111 | 90 | 2.00 GB | 100 | 1e-07 | 3.60 | 3.60 met |" in table
    assert "| 3.59 | 3.60 missed |" in drawn(1114.0)
    assert "| padded sdpa | 4.000 | 4.000 to 4.000 | 25 | 2.00 GB | 400 | 1e-07 | 1.00 |  |" in table
    assert "| 1e-07 leaks | 4.44 |  |" in table
    assert "| padded eager | left out: out of memory |" in table
    assert "| c | theirs | 4.000 ms | 4.000 to 4.000 ms | 4.00 |" in table


def test_the_table_says_when_a_goal_is_missed(run):
    def row(impl, ms, compiled=False):
        return {"op": "pack", "framework": "numpy", "work": "w", "impl": impl, "ms": ms, "low": ms, "high": ms} | {
            "compiled": compiled
        }

    def drawn(ours, best):
        rows = [row("copy floor", 0.1), row("scree", ours), row("by hand", best), row("numba rows", 0.01, True)]
        measured = {"versions": {}, "changed": False, "device": "", "system": "", "commit": "c", "rows": rows}
        return run.table(measured).splitlines()[-1]

    assert "| met |" in drawn(0.110, 0.101)
    assert "| missed |" in drawn(0.112, 0.101)
    assert "| met |" in drawn(2.09, 2.0)
    assert "| missed |" in drawn(2.11, 2.0)
    assert "numba rows" in drawn(2.0, 2.0)


def test_the_summary_names_the_mean_the_worst_and_what_is_slower(run):
    def row(op, work, impl, ms, **others):
        return {"op": op, "framework": "numpy", "work": work, "impl": impl, "ms": ms, "compiled": False} | others

    rows = []
    for op, work, ours, peer in (("sum", "a", 1.0, 4.0), ("max", "b", 2.0, 2.0), ("rope", "c", 0.3, 0.1)):
        rows += [row(op, work, "floor", 0.01), row(op, work, "scree", ours), row(op, work, "scree, option", 0.02)]
        rows += [
            row(op, work, "by hand", peer),
            row(op, work, "slow", 9.0),
            row(op, work, "numba", 0.01, compiled=True),
        ]
    model = {"op": "forward", "work": "w", "tokens": 100, "leaks": False}
    models = [
        model | {"impl": "scree packed", "ms": 10.0, "places": 100},
        model | {"impl": "padded sdpa", "ms": 40.0, "places": 300},
        model | {"impl": "sorted", "ms": 20.0, "places": 150},
        model | {"impl": "leaky", "ms": 5.0, "places": 100, "leaks": True},
        {"op": "collate", "work": "c", "impl": "ours", "ms": 1.0},
    ]
    text = "\n".join(run.summary.summary({"box": {"cpu": {"rows": rows}, "huggingface": {"rows": models}}}))
    assert (
        "no longer in 2 of 3 workloads. In the mean it is slower in [norms, rope, numpy](#cpu-box) on box (3.00)."
        in text
    )
    assert "| [softmax, reductions, numpy](#cpu-box) | **0.50** | 2 of 2 | 1.00, +0.0 us: max, b |" in text
    assert "| [norms, rope, numpy](#cpu-box) | **3.00** | 0 of 1 | 3.00, +200.0 us: rope, c |" in text
    assert "| [forward, w](#huggingface-box), box | 3.00 | **4.00** | 2.00 (sorted) |" in text


def test_an_operation_that_the_summary_does_not_know_is_an_error(run):
    rows = [{"op": "sort", "work": "a", "impl": impl, "ms": 1.0} for impl in ("scree", "by hand")]
    with pytest.raises(ValueError, match="'sort'"):
        run.summary.summary({"box": {"cpu": {"rows": rows}}})
