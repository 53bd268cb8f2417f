"""The slow, obviously right version of each op, written once for all frameworks.

Each loops over the sequences, with dense maths inside, in float32 or wider; nothing is tiled or fused, and no mask
ever spans two sequences. The ops that loop need concrete offsets; the norms and rope work token by token and do not.
"""

from __future__ import annotations

from typing import Any

from ..._array import CONCRETE_OFFSETS, Array
from ._attention import attend, varlen_attention
from ._norm import varlen_layernorm, varlen_rmsnorm
from ._reduce import varlen_reduce
from ._rope import varlen_rope
from ._softmax import varlen_softmax

__all__ = [
    "attend",
    "varlen_attention",
    "varlen_layernorm",
    "varlen_reduce",
    "varlen_rmsnorm",
    "varlen_rope",
    "varlen_softmax",
]

_LOOPING = ("varlen_attention", "varlen_reduce", "varlen_softmax")


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    if op in _LOOPING and any(isinstance(a, Array) and a._is_opaque() for a in args):
        return f"it loops over the sequences and {CONCRETE_OFFSETS}"
    return None
