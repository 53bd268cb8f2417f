"""The contests of each framework, whose module is imported only where they are asked for."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from ._contest import Contest, Rates, measured_rates

FRAMEWORKS = ("numpy", "torch", "jax", "mlx")


def contests(framework: str) -> list[Contest]:
    """Give the contests of one of `FRAMEWORKS`, which has to be installed. Nothing is computed yet.

    Raises
    ------
    ValueError
        There is no such framework here.
    ImportError
        The framework is not installed, or broken.
    """
    return _module(framework).contests()


def rates(framework: str, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure what the machine does: the framework's device where that is none that NumPy has, otherwise the CPU."""
    on_device = getattr(_module(framework), "device_rates", None)
    found = None if on_device is None else on_device(clock)
    return measured_rates(clock) if found is None else found


def _module(framework: str) -> Any:
    if framework not in FRAMEWORKS:
        raise ValueError(f"contests: framework is {framework!r}; needs one of {', '.join(FRAMEWORKS)}")
    return importlib.import_module(f"._{framework}", __package__)
