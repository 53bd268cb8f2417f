"""FlashAttention-2 as PyTorch has it: `torch.nn.attention.varlen.varlen_attn`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import Tensor

from ..._array import Array
from .._options import AttentionOptions
from ._limits import arguments, head_dims, output, refusal, window

_WIDEST = 256
_KEPT: dict[str, Any] = {}


def _function() -> tuple[Any, tuple[str, ...]]:
    """`varlen_attn`, None where this PyTorch has none, and the names of its parameters."""
    if "function" not in _KEPT:
        try:
            _KEPT["function"] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except ImportError:
            _KEPT["function"] = None
        found = _KEPT["function"]
        _KEPT["parameters"] = () if found is None else tuple(inspect.signature(found).parameters)
    return _KEPT["function"], _KEPT["parameters"]


def why_not(op: str, q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> str | None:
    """Say what speaks against computing this call here."""
    if "window_size" not in _function()[1]:
        return "needs torch.nn.attention.varlen.varlen_attn with windows, of PyTorch 2.11 or newer"
    if options.softcap is not None:
        return "it takes no softcap"
    return head_dims(q, v, _WIDEST) or refusal(q, k, v, sinks, options)


def attend(q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> Array:
    """Compute `scree.kernels.varlen_attention` by PyTorch's own kernel."""
    function, parameters = _function()
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
    if q.values.shape[1] == k.values.shape[1]:
        grouped = {}
    tensors = q.values, k.values, v.values
    return output(
        q, function(*tensors, *arguments(q, k), scale=options.scale, window_size=window(options, -1), **grouped)
    )
