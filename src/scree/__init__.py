"""Ragged arrays for every framework: one type for variable-length sequences, and the kernels that run on it."""

from . import bridges, data, kernels
from ._array import Array
from ._packing import (
    concat,
    from_cu_seqlens,
    from_lengths,
    pack,
    position_ids,
    segment_ids,
    unpack,
    with_capacity,
)
from ._padding import from_padded, to_padded
from ._plot import plot
from ._version import __version__

__all__ = [
    "Array",
    "__version__",
    "bridges",
    "concat",
    "data",
    "from_cu_seqlens",
    "from_lengths",
    "from_padded",
    "kernels",
    "pack",
    "plot",
    "position_ids",
    "segment_ids",
    "to_padded",
    "unpack",
    "with_capacity",
]
