"""The ops on ragged data: one call each for every framework, answered by the best implementation that can serve it.

`implementation=` forces one by name. `scree.kernels.reference` has the slow, obviously right version of each op.
"""

from . import reference, triton
from ._api import (
    varlen_attention,
    varlen_layernorm,
    varlen_reduce,
    varlen_rmsnorm,
    varlen_rope,
    varlen_softmax,
)

__all__ = [
    "reference",
    "triton",
    "varlen_attention",
    "varlen_layernorm",
    "varlen_reduce",
    "varlen_rmsnorm",
    "varlen_rope",
    "varlen_softmax",
]
