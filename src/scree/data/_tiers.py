"""When compiled code takes over from NumPy: never for the sake of one plan, always before many."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Literal

import numpy as np

from .._backends._protocol import HostInts
from ..bridges._handover import library

COMPILE_AFTER = 10_000_000
"""Lengths that a process plans with NumPy before it turns to numba, which takes about as long to compile."""

Fit = Callable[[HostInts, int, int, bool], tuple[HostInts, HostInts]]


class Tiers:
    """The choice between NumPy and numba in one process: the results are the same, bit for bit.

    Attributes
    ----------
    planned : int
        The lengths that NumPy planned because nobody asked for anything else.
    fit : function or None
        `_fitting_numba.fit`, once it is compiled or loaded.
    failed : bool
        Whether numba was turned to and cannot be had.
    """

    def __init__(self) -> None:
        self.planned = 0
        self.fit: Fit | None = None
        self.failed = False

    def choose(self, n: int, implementation: Literal["numpy", "numba"] | None) -> Fit | None:
        """Return the compiled steps, or None for NumPy's, to plan `n` lengths.

        Raises
        ------
        ImportError
            numba is asked for, and is missing.
        """
        if implementation == "numpy":
            return None
        if self.fit is None and (implementation == "numba" or (self.planned >= COMPILE_AFTER and not self.failed)):
            try:
                self.fit = compiled()
            # OSError: a shared library of numba's that cannot be loaded.
            except (ImportError, OSError):
                if implementation == "numba":
                    raise
                self.failed = True
        if self.fit is None:
            self.planned += n
        return self.fit


def compiled() -> Fit:
    """Return `_fitting_numba.fit`, compiled: in seconds the first time on a machine, then from what numba left on disk."""
    library("plan_bins", "numba", "numba")
    fit: Fit = import_module("._fitting_numba", __package__).fit
    try:
        fit(np.ones(1, np.int64), 1, 1, True)
    except OSError:  # it is compiled, but cannot be kept: the disk is full, say
        fit(np.ones(1, np.int64), 1, 1, True)
    return fit


TIERS = Tiers()
