"""Timing contenders side by side."""

from __future__ import annotations

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    seconds: float,
    most: int = 1001,
    clock: Callable[[], float] = time.perf_counter,
    least: int = 5,
) -> dict[str, dict[str, Any]]:
    """Run every contender once a round, `least` rounds or more, as the time allows; give medians and quartiles in ms.

    Each round has an order of its own, so that none always finds the caches and the memory that the same other one
    left. Results are freed outside of the timed span, before the next contender runs, and garbage is collected before the
    first round only. On a busy machine `time.process_time` is the clock that says more: what all threads of this process
    computed, waiting left out.
    """
    spent = {name: _seconds(run, time.perf_counter) for name, run in contenders.items()}  # warms up, and is not counted
    rounds = max(least, min(most, int(seconds / sum(spent.values()))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        order = list(contenders.items())
        shuffle = random.Random(0).shuffle  # noqa: S311
        for _ in range(rounds):
            shuffle(order)
            for name, run in order:
                times[name].append(_seconds(run, clock))
    finally:
        gc.enable()
    return {name: _summary(values) for name, values in times.items()}


def _seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    begun = clock()
    result = run()
    ended = clock()
    del result
    return ended - begun


def _summary(times: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(times, n=4)
    return {
        "ms": round(middle * 1e3, 5),
        "low": round(low * 1e3, 5),
        "high": round(high * 1e3, 5),
        "rounds": len(times),
    }


def processor() -> str:
    """The name of the processor, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
