"""The ops on PyTorch's own kernels, of the CPU and of other devices for which there is nothing better.

Each is an operator of `torch.library` with a backward of its own, so that `torch.compile` and `torch.export` see one
opaque call whose offsets are known when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..._array import Array
from . import _attention
from ._attention import attend
from ._norm import varlen_layernorm, varlen_rmsnorm
from ._rope import varlen_rope
from ._segments import varlen_reduce, varlen_softmax

__all__ = ["attend", "varlen_layernorm", "varlen_reduce", "varlen_rmsnorm", "varlen_rope", "varlen_softmax"]

WHATEVER_LENGTHS = True  # attention is chosen here, and called, without a look at offsets or the number of tokens


def why_not(op: str, *args: Any, **options: Any) -> str | None:
    """Say what speaks against computing this call here."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "it has no rules for torch.func's transformations"
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    return None


def bind(op: str, arrays: tuple[Array, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """Return a function that computes an op of arrays like these, with these options, in little time on the host."""
    if op == "varlen_attention":
        return _attention.bind(**options)
    return functools.partial(globals()[op], **options)
