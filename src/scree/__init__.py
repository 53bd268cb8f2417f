"""Ragged arrays for every framework: one type for variable-length sequences, and the kernels that run on it."""

import importlib
from typing import TYPE_CHECKING, Any

from . import bridges, kernels
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

if TYPE_CHECKING:
    from . import data, hf

__all__ = [
    "Array",
    "__version__",
    "bridges",
    "concat",
    "data",
    "from_cu_seqlens",
    "from_lengths",
    "from_padded",
    "hf",
    "kernels",
    "pack",
    "plot",
    "position_ids",
    "segment_ids",
    "to_padded",
    "unpack",
    "with_capacity",
]


def __getattr__(name: str) -> Any:
    """Import `scree.data` and `scree.hf` when they are first asked for: programs that only compute do not wait for them."""
    if name in ("data", "hf"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "data", "hf"})
