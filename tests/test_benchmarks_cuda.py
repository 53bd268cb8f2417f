"""The benchmark of the CUDA kernels, without a device: which rows it makes, and what the table says of them."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parent.parent
MODULES = ("bench_cuda", "cuda_attention", "cuda_memory", "cuda_moves", "cuda_table", "cuda_timing", "measure")
CUDA = {"device": "NVIDIA H200", "driver": "1", "system": "s", "versions": {"torch": "2"}, "commit": "c" * 40}


class _OnTheCpu(torch.overrides.TorchFunctionMode):
    """Makes what is meant for a CUDA device on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


class _Event:
    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    synchronize = record

    def elapsed_time(self, end):
        return 2.0


class _Generator:
    """One on the CPU, whatever the device. A class: annotations name it."""

    real = torch.Generator

    def __new__(cls, device="cpu"):
        return cls.real()


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, and a device that is none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("synchronize", "empty_cache", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch, "Generator", _Generator)
    with _OnTheCpu():
        yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_workloads_are_the_ones_that_were_measured_before(bench):
    tokens = [sum(work[1]) for work in bench.cuda_attention.WORKS]
    assert tokens == [12160, 26137, 32768, 16384, 82929]
    headline = bench.cuda_attention.Work("headline", *bench.cuda_attention.WORKS[0][1:])
    assert headline.flops == pytest.approx(0.2026e-3 * 131e12, rel=0.01)


def small(bench, monkeypatch, causal=True):
    monkeypatch.setattr(bench.cuda_attention, "WORKS", [("tiny", (3, 1, 4), (4, 2, 8), torch.float16, causal)])
    monkeypatch.setattr(bench.cuda_attention, "ours", dict)
    by_hand = bench.cuda_attention.pad_and_unpad
    monkeypatch.setattr(bench.cuda_attention, "PEERS", {"padded": by_hand, "dense": bench.cuda_attention.dense_cudnn})
    return list(bench.cuda_attention.cases(quick=True))


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_right_is_timed_and_what_fails_is_left_out(bench, monkeypatch, causal):
    clock = bench.cuda_timing.Clock(rounds=3, group_ms=1.0)
    cases = small(bench, monkeypatch, causal)
    assert [case.op for case in cases] == [
        "attention forward",
        "attention backward",
        "attention forward and backward",
    ]
    for case in cases:
        dense, padded = bench.cuda_timing.rows(case, clock, print)
        assert dense == {
            "op": case.op,
            "work": "tiny, 8 tokens",
            "impl": "dense",
            "left_out": "ValueError: the lengths differ",
        }
        assert set(padded) == {"op", "work", "impl", "ms", "low", "high", "tflops", "host_us", "err"}
        assert 0 < padded["err"] < 2e-3
        (check,) = (row for row in bench.cuda_timing.rows(case, None, print) if "err" in row)
        assert set(check) == {"op", "work", "impl", "err"}


def test_a_wrong_result_is_not_timed(bench, monkeypatch):
    right, *_ = small(bench, monkeypatch)
    right.want = lambda: right.contenders["padded"]()[0]().float() * 1.01
    reasons = {row["impl"]: row.get("left_out") for row in bench.cuda_timing.rows(right, None, print)}
    assert reasons["padded"].startswith("ValueError: its relative error is")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_infinite(bench, bad):
    assert bench.cuda_timing.relative_error(torch.tensor([bad, 1.0]), torch.ones(2)) == float("inf")
    assert bench.cuda_timing.relative_error((torch.ones(2),), torch.ones(2)) == 0.0


def test_one_half_is_saved_beside_the_other(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.measure, "RESULTS", tmp_path)
    attention, memory = ({"op": op, "work": "w", "impl": "scree"} for op in ("attention forward", "rope forward"))
    bench.bench_cuda.save("nvidia-h200", CUDA | {"rows": [memory]}, "memory", None)
    bench.bench_cuda.save("nvidia-h200", CUDA | {"rows": [attention]}, "attention", None)
    saved = json.loads((tmp_path / "nvidia-h200.json").read_text())["cuda"]
    assert saved["rows"] == [attention, memory]
    bench.bench_cuda.save("nvidia-h200", CUDA | {"commit": "d" * 40, "rows": [attention]}, "attention", None)
    assert json.loads((tmp_path / "nvidia-h200.json").read_text())["cuda"]["rows"] == [attention]


def test_the_file_is_named_after_the_device(bench):
    assert bench.bench_cuda.slug("NVIDIA H200") == "nvidia-h200"
    assert bench.bench_cuda.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100"
    assert bench.bench_cuda.device()["device"] == "NVIDIA H200"


def test_the_table(bench):
    def row(op, impl, ms, **more):
        return {
            "op": op,
            "work": "w",
            "impl": impl,
            "ms": ms,
            "low": ms,
            "high": ms,
            "host_us": 9.0,
            "err": 1e-3,
        } | more

    rows = [
        row("attention forward", "scree triton", 0.5, tflops=400.0, host_us_tensors=7.0),
        row("attention forward", "slow", 2.0, tflops=100.0),
        row("attention forward", "fast", 1.0, tflops=200.0),
        row("rope forward", "scree triton", 2.0, tbs=2.0),
        {"op": "rope forward", "work": "w", "impl": "quack", "left_out": "not installed"},
        row("reduce", "peer", 1.0, tbs=1.0),
    ]
    measured = CUDA | {"changed": False, "ceilings": {"copy_tbs": 4.0, "matmul_tflops": 800.0}, "rows": rows}
    text = bench.cuda_table.table(measured)
    assert (
        "| 500.0 us | 500.0 us to 500.0 us | 400 TFLOP/s | 50% | 0.50 | 9 us (7 us) | 1.0e-03 | fast 1.00 ms, slow"
        in text
    )
    assert "| 2.00 ms | 2.00 ms to 2.00 ms | 2.00 TB/s | 50% |  | 9 us |" in text
    assert "| reduce | w | none |" in text
    assert "- quack: not installed (rope forward, w)" in text


def test_every_op_that_moves_memory_has_peers_that_are_right(bench, monkeypatch):
    for module in (bench.cuda_memory, bench.cuda_moves):
        monkeypatch.setattr(module, "HEADLINE", (3, 1, 5))
        monkeypatch.setattr(module, "log_normal", lambda *_, **__: (3, 1, 5))
        monkeypatch.setattr(module, "compiled", module.plain)
    monkeypatch.setattr(bench.cuda_memory, "COLD", 1e4)
    found = {}
    for case in bench.cuda_memory.cases(quick=True):
        rows = list(bench.cuda_timing.rows(case, None, print))
        found.setdefault(case.op, [row["impl"] for row in rows if "err" in row])
        for row in rows:
            assert "err" in row or "No module" in row["left_out"] or "NotImplementedError" in row["left_out"], row
    assert {op.split()[0] for op in found} == {
        "rmsnorm",
        "layernorm",
        "softmax",
        "reduce",
        "rope",
        "to_padded",
        "from_padded",
    }
    assert all(found.values())


@pytest.mark.triton
def test_the_row_of_the_portable_kernels_refuses_hopper_s_own_and_fails_where_nobody_asks(bench):
    from scree.kernels.triton import _hopper, _hopper_bwd, _hopper_pair

    modules = (_hopper, _hopper_bwd, _hopper_pair)
    before = [module.why_not for module in modules]
    run = bench.cuda_attention.without_hopper(lambda: [module.why_not(1, 2) for module in modules])
    assert run() == ["these are the portable kernels"] * 3
    with pytest.raises(RuntimeError, match="were not what ran"):
        bench.cuda_attention.without_hopper(lambda: 1)()
    assert [module.why_not for module in modules] == before
