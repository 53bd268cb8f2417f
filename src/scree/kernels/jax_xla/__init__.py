"""The ops on JAX with traced offsets and static shapes: one program for all raggedness of a shape, on any device.

Every row is computed in tiles of a fixed size that begin where the row begins, so that its bits do not depend on where
in the batch it stands; and the norms in blocks of tokens, as XLA rounds one token in another way for another number of them.
"""

from __future__ import annotations

from typing import Any

from ._attention import attend
from ._norm import varlen_layernorm, varlen_rmsnorm
from ._rope import varlen_rope
from ._segments import varlen_reduce, varlen_softmax

__all__ = ["attend", "varlen_layernorm", "varlen_reduce", "varlen_rmsnorm", "varlen_rope", "varlen_softmax"]


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here: nothing does."""
    return None
