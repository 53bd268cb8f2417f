"""The page of benchmarks says what was measured: it is made from the saved results, and by nothing else."""

import importlib.util
import json
import sys
from pathlib import Path

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
    for name in ("measure", "bench_data"):
        sys.modules.pop(name, None)


def test_the_page_is_made_from_the_results(run):
    assert run.PAGE.read_text() == run.page()


def test_every_row_has_what_it_measured(run):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        for measured in json.loads(path.read_text()).values():
            assert len(measured["commit"]) == 40
            assert measured["changed"] is False
            assert measured["versions"]["scree"]
            assert all(row.get("left_out") or row["ms"] >= 0 for row in measured["rows"])


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
