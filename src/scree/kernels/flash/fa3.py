"""FlashAttention-3, the package `flash_attn_interface`, for Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._array import Array
from .._options import AttentionOptions
from ._limits import arguments, head_dims, imported, output, refusal, window

_WIDEST = 256
_PACKAGE = "flash_attn_interface"
_KEPT: dict[str, Any] = {}


def why_not(op: str, q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> str | None:
    """Say what speaks against computing this call here."""
    against = head_dims(q, v, _WIDEST) or refusal(q, k, v, sinks, options)
    if against is not None:
        return against
    major, minor = torch.cuda.get_device_capability(q.values.device)
    if major != 9:
        return f"it is for Hopper (sm_90), this device is sm_{major}{minor}"
    function = imported(_PACKAGE, _KEPT)
    return function if isinstance(function, str) else None


def attend(q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> Array:
    """Compute `scree.kernels.varlen_attention` by FlashAttention-3."""
    left, right = window(options, -1)
    whole = (left, right) == (-1, 0)
    result = imported(_PACKAGE, _KEPT)(
        q.values,
        k.values,
        v.values,
        *arguments(q, k),
        softmax_scale=options.scale,
        causal=whole,
        window_size=(-1, -1) if whole else (left, right),
        softcap=options.softcap or 0.0,
    )
    return output(q, result)
