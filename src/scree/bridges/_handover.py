"""What the bridges share: finding the library at the other end, and the part of an Array that is handed over."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .._array import Array
from .._backends import Dense
from .._backends._protocol import HostArray

NUMBERS = frozenset(
    ["bool", "float16", "float32", "float64", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))]
)
"""The dtypes that every columnar format has."""


def library(op: str, module: str, extra: str) -> Any:
    """Import the library at the other end of the bridge `op`.

    Raises
    ------
    ImportError
        It cannot be imported; the message names the extra of scree that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise ImportError(
            f'{op}: needs {module}, which cannot be imported ({missing}); pip install "scree[{extra}]"'
        ) from missing


def concrete(op: str, arr: Array) -> None:
    """Refuse an Array of which a compiler or a transformation knows only the shapes."""
    if arr._xp.is_traced(arr.values) or arr._xp.is_traced(arr.offsets):
        raise NotImplementedError(
            f"{op}: the Array is traced by a compiler or a transformation, and another library needs its values; "
            "call this outside of the compiled function"
        )


def along_axis_0(op: str, arr: Array, form: str) -> None:
    """Refuse another `ragged_dim`, which the form at the other end has no place for."""
    if arr.ragged_dim != 0:
        raise ValueError(f"{op}: arr has ragged_dim {arr.ragged_dim}; needs 0, {form} has its features behind the rows")


def used_values(op: str, arr: Array) -> Dense:
    """Return the values that belong to a sequence: without the spare ones of `with_capacity`, as a view."""
    if not arr._structure.spare:
        return arr.values
    return arr._between(0, int(arr._host_offsets(op)[-1]))


def readable(x: HostArray) -> HostArray:
    """Return x as other libraries can read it: native byte order, aligned, no negative or odd strides.

    x itself where it is so already, otherwise a copy.
    """
    size = x.dtype.itemsize
    if x.dtype.isnative and x.flags.aligned and not any(stride < 0 or stride % size for stride in x.strides):
        return x
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="C")
