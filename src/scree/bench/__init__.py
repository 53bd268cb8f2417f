"""What `scree bench` measures: the kernels on the CPU, JAX and MLX, beside what people write by hand there today.

A contest is one op on one workload with one framework; its contenders are ours, and every peer that is installed. Each
module here has the contests of one framework, and imports it: `contests` is how to come by them.
"""

from __future__ import annotations

from ._contest import Contest, Rates, measure, measured_rates
from ._frameworks import FRAMEWORKS, contests, rates
from ._timing import interleaved, processor

__all__ = [
    "FRAMEWORKS",
    "Contest",
    "Rates",
    "contests",
    "interleaved",
    "measure",
    "measured_rates",
    "processor",
    "rates",
]
