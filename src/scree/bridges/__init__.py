"""Bridges: an Array in the form that another library knows, and back.

Each says whether it copies. What the host knows of an Array goes along; gradients do where both sides share an autograd.
The library at the other end is imported when the bridge is called.
"""

from ._arrow import from_arrow, to_arrow
from ._awkward import from_awkward, to_awkward
from ._dlpack import to_cupy, to_jax, to_mlx, to_numpy, to_torch
from ._hf_padded import from_hf_padded, to_hf_padded
from ._tensorflow import from_tensorflow, to_tensorflow
from ._torch_nested import from_torch_nested, to_torch_nested

__all__ = [
    "from_arrow",
    "from_awkward",
    "from_hf_padded",
    "from_tensorflow",
    "from_torch_nested",
    "to_arrow",
    "to_awkward",
    "to_cupy",
    "to_hf_padded",
    "to_jax",
    "to_mlx",
    "to_numpy",
    "to_tensorflow",
    "to_torch",
    "to_torch_nested",
]
