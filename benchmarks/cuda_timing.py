"""Timing work on a CUDA device: all contenders of one case side by side, their results compared first."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Thunk = Callable[[], Any]

# The relative error (Frobenius norm against float32) beyond which a contender is not timed.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


@dataclass
class Case:
    """One op on one workload.

    Attributes
    ----------
    amount : float
        Floating-point operations ("tflops") or bytes that have to move ("tbs").
    want : function
        The right results, tensors in float32 or wider.
    contenders : dict
        Name -> what prepares its calls: one for each of the input sets that are used in turn.
    tensors : dict
        Name -> what prepares one call of the same through the function that takes tensors and `cu_seqlens`, whose time
        on the host is reported beside.
    """

    op: str
    work: str
    unit: str
    amount: float
    dtype: torch.dtype
    want: Callable[[], Any]
    contenders: dict[str, Callable[[], list[Thunk]]]
    tensors: dict[str, Callable[[], Thunk]] = field(default_factory=dict)


class Clock:
    """Events around groups of launches, which begin when the device has waited long enough for the host to be ahead."""

    def __init__(self, rounds: int, group_ms: float) -> None:
        self.rounds = rounds
        self.group_ms = group_ms
        self._cycles_per_ms = 1.0
        self._cycles_per_ms = 2e7 / self._span(lambda: torch.cuda._sleep(20_000_000), 1, 0.0)

    def measure(self, contenders: dict[str, list[Thunk]]) -> dict[str, dict[str, Any]]:
        """Give the medians and quartiles of several rounds, each in an order of its own; ms on the device, us on the host."""
        host = {name: host_us(thunks[0]) for name, thunks in contenders.items()}
        sizes: dict[str, int] = {}
        for name, thunks in contenders.items():
            one = self._span(_turns(thunks, 3), 3, host[name] * 3e-3)
            sizes[name] = max(3, min(200, int(min(self.group_ms / one, 1.5 * self.group_ms / (host[name] * 1e-3)))))
        times: dict[str, list[float]] = {name: [] for name in contenders}
        order = list(contenders.items())
        shuffle = random.Random(0).shuffle
        for _ in range(self.rounds):
            shuffle(order)
            for name, thunks in order:
                count = sizes[name]
                times[name].append(self._span(_turns(thunks, count), count, host[name] * count * 1e-3))
        return {name: summary(values) | {"host_us": round(host[name], 1)} for name, values in times.items()}

    def _span(self, run: Thunk, count: int, head_start_ms: float) -> float:
        """The milliseconds of each of `count` calls that `run` makes."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if head_start_ms:
            torch.cuda._sleep(int(min(1.2 * head_start_ms + 0.05, 50.0) * self._cycles_per_ms))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count


def _turns(thunks: list[Thunk], count: int) -> Thunk:
    """Make the calls in turn, and keep the last results, so that neither inputs nor outputs are found in the cache."""

    def run() -> None:
        kept: deque[Any] = deque(maxlen=len(thunks) + 1)
        for i in range(count):
            kept.append(thunks[i % len(thunks)]())

    return run


def summary(times: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"ms": round(middle, 5), "low": round(low, 5), "high": round(high, 5)}


def host_us(thunk: Thunk, calls: int = 40) -> float:
    """The median time in which Python issues one call, the queue of the device never full."""
    times: list[float] = []
    for i in range(calls):
        if i % 8 == 0:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        result = thunk()
        times.append(time.perf_counter() - begun)
        del result
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def relative_error(got: Any, want: Any) -> float:
    """The largest of |got - want| / |want| (Frobenius norms) over corresponding tensors; inf where one is not finite."""
    got = got if isinstance(got, (tuple, list)) else (got,)
    want = want if isinstance(want, (tuple, list)) else (want,)
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"a result of shape {tuple(a.shape)}, where {tuple(b.shape)} is right")
        error = ((a.detach().to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)).item()
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def rows(case: Case, clock: Clock | None, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Check every contender, then time those that are right; with no clock, only check."""
    about = {"op": case.op, "work": case.work}
    want = case.want()
    ready: dict[str, list[Thunk]] = {}
    errors: dict[str, float] = {}
    for name, prepare in case.contenders.items():
        begun = time.perf_counter()
        try:
            thunks = prepare()
            for _ in range(2):
                error = relative_error(thunks[0](), want)
            torch.cuda.synchronize()
            if not error <= LIMITS[case.dtype]:
                raise ValueError(f"its relative error is {error:.1e}")
        # A peer may fail in any way, and the others are timed all the same.
        except Exception as problem:  # noqa: BLE001
            yield {**about, "impl": name, "left_out": " ".join(f"{type(problem).__name__}: {problem}".split())[:160]}
            continue
        ready[name], errors[name] = thunks, error
        if (seconds := time.perf_counter() - begun) > 5:
            say(f"    {name}: {seconds:.0f} s until its first results")
    if clock is None:
        yield from ({**about, "impl": name, "err": float(f"{errors[name]:.2e}")} for name in ready)
        return
    measured = clock.measure(ready) if ready else {}
    for name, times in measured.items():
        row = {**about, "impl": name, **times}
        row[case.unit] = round(case.amount / (times["ms"] * 1e9), 4 if case.unit == "tbs" else 1)
        if name in case.tensors:
            row["host_us_tensors"] = round(host_us(case.tensors[name]()), 1)
        yield {**row, "err": float(f"{errors[name]:.2e}")}
