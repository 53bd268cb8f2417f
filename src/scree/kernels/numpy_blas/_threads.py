"""Work that is shared out among threads, each of which computes in NumPy, where Python's lock is not held."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

_Task = TypeVar("_Task")

_MOST = 2
"""More wait for Python's lock: for 16 sequences of ~512 with 8 heads of 64, on 16 processors, two threads took 60 ms, four
70 to 77, eight 157, and one with those of BLAS 105 to 130."""
_LIMITS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")  # what BLAS looks at


def available() -> int:
    """How many threads to compute on: one a processor of this process, or as many as BLAS is told to use."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = (os.environ.get(name, "") for name in _LIMITS)
    return min(processors, _MOST, *(int(number) for number in told if number.isdecimal() and int(number) > 0))


def share(tasks: list[_Task], work: Callable[[Iterator[_Task]], None], threads: int) -> None:
    """Call `work` on so many threads, this one among them, each with an iterator over what no other has taken.

    This one takes the first tasks first, and the others the last ones: threads that all have small tasks at a time, and
    so many calls, wait for Python's lock. The threads end with the call, so that a fork later on misses none.
    """
    waiting = deque(tasks)

    def taken(take: Callable[[], _Task]) -> Iterator[_Task]:
        while waiting:
            try:
                task = take()
            except IndexError:  # another thread was faster
                return
            yield task

    if threads <= 1:
        work(taken(waiting.popleft))
        return
    told: dict[str, Any] = {**np.geterr(), "call": np.geterrcall()}

    def alike() -> None:
        with np.errstate(**told):  # what holds here, which NumPy keeps with a thread, or with a context
            work(taken(waiting.pop))

    with ThreadPoolExecutor(threads - 1, "scree") as pool:
        others = [pool.submit(alike) for _ in range(threads - 1)]
        try:
            work(taken(waiting.popleft))
        finally:
            waiting.clear()  # where this one was stopped, the others stop too
        for other in others:
            other.result()
