"""The ops on MLX: rows of one length together, and `mx.fast` for the norms.

MLX differentiates what is written here; nothing looks at values, so all of it may be traced but the offsets.
"""

from __future__ import annotations

from typing import Any

from ..._array import CONCRETE_OFFSETS, Array
from ._attention import attend
from ._norm import varlen_layernorm, varlen_rmsnorm
from ._segments import varlen_reduce, varlen_softmax

__all__ = ["attend", "varlen_layernorm", "varlen_reduce", "varlen_rmsnorm", "varlen_softmax"]

_BY_LENGTH = ("varlen_attention", "varlen_reduce", "varlen_softmax")


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    if op in _BY_LENGTH and any(isinstance(a, Array) and a._is_opaque() for a in args):
        return f"it groups the sequences by length and {CONCRETE_OFFSETS}"
    return None
