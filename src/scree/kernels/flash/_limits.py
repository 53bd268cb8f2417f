"""What the implementations have in common: what none of them serves, and how they want their arguments."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..._array import Array
from .._options import AttentionOptions

_INT32 = 2**31


def refusal(q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> str | None:
    """Say what speaks against a call for all of them, from metadata alone."""
    if sinks is not None:
        return "it takes no sinks"
    if options.return_lse:
        return "its LSE has no gradient"
    if options.scale <= 0:
        return f"it looks for the largest score before it scales; needs a scale of more than 0, got {options.scale:g}"
    for name, arr in (("q", q), ("k", k)):
        if arr._structure.spare:
            return f"it leaves what lies beyond the last sequence unwritten, and {name} has a capacity"
        if arr.batch_size == 0 or arr.total_length == 0:
            return f"it needs a token, {name} has none"
        if arr.total_length >= _INT32:
            return f"its offsets are int32, {name} has {arr.total_length} tokens"
        if arr.values.stride(-1) != 1:
            return f"it needs a dense last axis, that of {name} has stride {arr.values.stride(-1)}"
    if torch._C._are_functorch_transforms_active():
        return "it has no rules for torch.func's transformations"
    if torch.compiler.is_compiling():
        return "it asks the host for the longest length, which breaks the graph"
    return None


def head_dims(q: Array, v: Array, most: int) -> str | None:
    """Say what speaks against the head dims."""
    dim, v_dim = q.values.shape[2], v.values.shape[2]
    for name, width in (("q", dim), ("v", v_dim)):
        if width % 8 or not 8 <= width <= most:
            return f"its head_dim is a multiple of 8 up to {most}, {name} has {width}"
    if dim != v_dim:
        return f"q and v need the same head_dim, got {dim} and {v_dim}"
    return None


def imported(package: str, kept: dict[str, Any]) -> Any:
    """`flash_attn_varlen_func` of a package, tried but once; or a text that says why there is none."""
    if "function" not in kept:
        try:
            kept["function"] = importlib.import_module(package).flash_attn_varlen_func
        except (ImportError, OSError, AttributeError) as error:  # OSError: a shared library that does not load
            kept["function"] = f"{package} cannot be imported: {error}"
    return kept["function"]


def arguments(q: Array, k: Array) -> tuple[Tensor, Tensor, int, int]:
    """cu_seqlens of q and k, int32, and the longest length of each, which may wait for the device."""
    return q.offsets.to(torch.int32), k.offsets.to(torch.int32), q.max_length, k.max_length


def window(options: AttentionOptions, no_limit: Any) -> tuple[Any, Any]:
    """How many keys to the left and to the right, with what the other library means by no limit."""
    left, right = options.sides
    return (no_limit if left is None else left), (no_limit if right is None else right)


def output(q: Array, result: Any) -> Array:
    """The Array of what a function returned, which may have more than the output."""
    return q.with_values(result[0] if isinstance(result, tuple) else result)
