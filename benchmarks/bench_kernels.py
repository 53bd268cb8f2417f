"""The kernels on the CPU, JAX and MLX, beside their peers: what `scree bench` measures, kept."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from typing import Any

from scree import bench

PARTS = {"cpu": ("numpy", "torch", "mlx"), "jax": ("jax",)}
PACKAGES = ("numpy", "torch", "jax", "mlx", "scree")
PEERS = ("numba", "awkward")  # where they are installed
GOAL = 1.0
THREADS = os.environ.get("OMP_NUM_THREADS", "all")


def packages() -> tuple[str, ...]:
    """The packages whose versions are kept with the results."""
    return PACKAGES + tuple(name for name in PEERS if importlib.util.find_spec(name) is not None)


def device(part: str) -> dict[str, Any]:
    """The GPU that JAX has here, in place of the processor."""
    if part != "jax":
        return {}
    import jax

    return {"device": jax.devices()[0].device_kind} if jax.default_backend() == "gpu" else {}


def rows(part: str, seconds: float = 4.0, *, busy: bool = False) -> Iterator[dict[str, Any]]:
    """Time every contender of every op and workload; a dictionary each."""
    clock = time.process_time if busy else time.perf_counter
    for framework in PARTS[part]:
        rates = bench.rates(framework, clock)
        for contest in bench.contests(framework):
            yield from bench.measure(contest, rates, seconds, clock)
