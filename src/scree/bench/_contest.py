"""A contest: its contenders, checked against each other and then timed, and the floor below which none can go."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._backends import backend_of
from ._timing import interleaved

Contenders = Mapping[str, Callable[[], Any]]
OURS, FLOOR = "scree", "floor"


class Contest(NamedTuple):
    """One op on one workload with one framework.

    Attributes
    ----------
    op, framework, work : str
        What it is called.
    flops, nbytes : float
        What it has to compute, in multiplications and additions of matrices, and to read and write.
    quick : bool
        Whether a short run has it too.
    make : function
        Gives the contenders: ours is "scree", and comes first.
    """

    op: str
    framework: str
    work: str
    flops: float
    nbytes: int
    quick: bool
    make: Callable[[], Contenders]


class Rates(NamedTuple):
    """What the machine does in a millisecond: operations of NumPy's matrix product, and a copy of so many bytes."""

    flops: float
    copy: Callable[[int], float]

    def floor(self, contest: Contest) -> float:
        """The milliseconds that the contest takes at these rates."""
        return max(contest.flops / self.flops, self.copy(contest.nbytes // 2) if contest.nbytes else 0.0)


def measured_rates(clock: Callable[[], float] = time.perf_counter) -> Rates:
    """Measure what this machine does."""
    a = np.ones((1024, 1024), np.float32)
    product = interleaved({"matmul": lambda: a @ a}, 0.5, clock=clock)["matmul"]["ms"]

    @functools.cache
    def copy(size: int) -> float:
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        return interleaved({"copy": lambda: np.copyto(target, source)}, 0.2, clock=clock)["copy"]["ms"]

    return Rates(2 * 1024**3 / product, copy)


def measure(
    contest: Contest, rates: Rates, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Iterator[dict[str, Any]]:
    """Check the contenders and time them: a row for the floor, and one for each contender.

    Raises
    ------
    AssertionError
        A contender computes something else than ours; it is named.
    """
    contenders = contest.make()
    check(contenders)
    facts = {"op": contest.op, "framework": contest.framework, "work": contest.work}
    yield {**facts, "impl": FLOOR, "ms": round(rates.floor(contest), 5)}
    for name, times in interleaved(contenders, seconds, clock=clock).items():
        yield {**facts, "impl": name, "compiled": False, **times}


def _arrays(result: Any) -> list[tuple[np.ndarray, bool]]:
    """The arrays of a result, and whether they were halves, of which NumPy does not know all."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [(np.asarray(backend_of(part).upcast(part)), part.itemsize < 4) for part in parts]


def check(contenders: Contenders) -> None:
    """Refuse to time a contender that computes something else than ours."""
    want = _arrays(contenders[OURS]())
    for name, run in contenders.items():
        if name == OURS:
            continue
        for (a, half), (b, _) in zip(want, _arrays(run()), strict=True):
            rtol, atol = (3e-2, 3e-2) if half else (2e-3, 2e-4)
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol, err_msg=name)
