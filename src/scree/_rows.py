"""Which rows an index means."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _backends, _check
from ._backends._protocol import HostInts


def is_number(key: Any) -> bool:
    """Whether an index is one integer. A single bool is none, also where it would pass for one."""
    if type(key) is int:
        return True
    if not hasattr(key, "__index__") or isinstance(key, (bool, np.bool_)) or getattr(key, "ndim", 0) != 0:
        return False
    xp = _backends.find_backend(key)
    return xp is None or xp.dtype_name(key) != "bool"


def number(row: int, batch_size: int) -> int:
    """Return a row number counted from the front, or raise IndexError."""
    if not -batch_size <= row < batch_size:
        raise IndexError(f"row {row} of an Array with batch_size {batch_size}")
    return row % batch_size


def numbers(key: Any, batch_size: int) -> HostInts:
    """Return the row numbers, counted from the front, that a list, an integer array or a bool mask chooses."""
    xp = _backends.find_backend(key)
    if isinstance(key, (tuple, str, bytes, bool, np.bool_)) or key is None or key is Ellipsis:
        raise TypeError(f"indexing: got {key!r}; an Array is indexed by rows only: an int, a slice, a list, or a mask")
    if xp is not None and not (_check.is_integer(xp.dtype_name(key)) or xp.dtype_name(key) == "bool"):
        raise TypeError(f"indexing: got dtype {xp.dtype_name(key)}; needs integers or bools")
    chosen = np.asarray(key if xp is None else xp.to_host(key))
    if chosen.dtype == np.bool_:
        if chosen.shape != (batch_size,):
            raise IndexError(f"indexing: the bool mask has shape {chosen.shape}; needs ({batch_size},)")
        return np.flatnonzero(chosen)
    rows = _check.host_ints(key if xp is None else chosen, "indexing")
    outside = (rows < -batch_size) | (rows >= batch_size)
    if outside.any():
        raise IndexError(f"row {rows[outside.argmax()]} of an Array with batch_size {batch_size}")
    return np.where(rows < 0, rows + batch_size, rows)
