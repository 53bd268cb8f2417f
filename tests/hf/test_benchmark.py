"""The benchmark of models: every way runs the same sequences, and is right or said to leak before it is timed."""

import copy
import importlib
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import zoo

import scree
from scree import kernels

pytestmark = pytest.mark.hf

MODULES = ("bench_huggingface", "huggingface_ways", "huggingface_collator", "bench_cuda", "measure")
LENGTHS = (9, 2, 30, 4, 17, 8)


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in [
        name for name, module in sys.modules.items() if "/benchmarks/" in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


def work(bench, name, places=40):
    rows = bench.bench_huggingface._tokens(LENGTHS, zoo.VOCABULARY)
    return bench.bench_huggingface.Work(name, copy.deepcopy(zoo.make(name)), rows, places, ("forward", "training step"))


def test_batches_fill_the_places_and_leave_no_sequence_out(bench):
    ways = bench.huggingface_ways.ways("cpu")
    places = {}
    for name, way in ways.items():
        batches = list(way.batches(LENGTHS, 40))
        assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
        of_rows = [[LENGTHS[i] for i in batch] for batch in batches]
        places[name] = [sum(rows) if way.packed else max(rows) * len(rows) for rows in of_rows]
        assert max(places[name]) <= 40
    assert places["padded sdpa"] == places["padded eager"] == places["scree on padded batches"] == [18, 30, 34, 8]
    assert places["padded sdpa, sorted"] == [36, 17, 30]
    assert places["scree packed, collator"] == places["packed sdpa, position_ids"] == [11, 34, 25]
    assert list(ways["padded sdpa"].batches([3, 50, 3], 40)) == [[0], [1], [2]]  # longer than a batch may be


@pytest.mark.parametrize("op", ["forward", "training step"])
def test_every_way_gives_the_same(bench, op):
    errors = bench.bench_huggingface._errors(work(bench, "llama"), op, bench.huggingface_ways.ways("cpu"), "cpu")
    assert errors["padded eager"] == 0
    assert max(errors.values()) < 1e-5, errors


def test_a_leak_is_found(bench):
    if not zoo.FIVE:
        pytest.skip("BERT of transformers 4 cannot be packed")
    bert = work(bench, "bert")
    rows = list(bench.bench_huggingface._measure(bert, "forward", 0.001, "cpu", time.process_time))
    assert [row["impl"] for row in rows if row["leaks"]] == ["packed sdpa, position_ids"]
    assert all(row["tokens"] == sum(LENGTHS) <= row["places"] and row["ms"] > 0 for row in rows)


def test_wrong_results_of_ours_are_not_timed(bench, monkeypatch):
    real = kernels.varlen_attention
    monkeypatch.setattr(kernels, "varlen_attention", lambda *a, **options: real(*a, **options) * 1.001)
    ways = bench.huggingface_ways.ways("cpu")
    with pytest.raises(
        SystemExit, match=r"scree packed, collator, forward, llama: relative error .*; at most 1\.0e-04"
    ):
        bench.bench_huggingface._errors(work(bench, "llama"), "forward", ways, "cpu")


def test_what_runs_out_of_memory_is_left_out(bench, monkeypatch):
    real = bench.bench_huggingface._peak
    calls = []

    def full(run, device):
        calls.append(run)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        return real(run, device)

    monkeypatch.setattr(bench.bench_huggingface, "_peak", full)
    rows = list(bench.bench_huggingface._measure(work(bench, "llama"), "forward", 0.001, "cpu", time.process_time))
    assert [(row["impl"], row["left_out"]) for row in rows if "left_out" in row] == [("padded eager", "out of memory")]


def test_flash_attention_of_torch_as_an_attention_function(bench, monkeypatch):
    """On the CPU PyTorch has none: in its place is a function with its arguments."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert (window_size, enable_gqa, max_q, max_k) == ((-1, 0), True, 30, 30)
        q, k, v = (scree.from_cu_seqlens(x, cu) for x, cu in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k)))
        return kernels.varlen_attention(q, k, v, True, scale=scale).values

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    ways = bench.huggingface_ways.ways("cuda")
    name = "packed FlashAttention-2 (torch varlen_attn)"
    one = work(bench, "llama", places=sum(LENGTHS))
    want = bench.bench_huggingface._outputs(one, ways["padded eager"], "cpu")
    got = bench.bench_huggingface._outputs(one, ways[name], "cpu")
    assert bench.bench_huggingface._distance(got, want) < 1e-5
