"""FlashAttention-4, the package `flash_attn.cute`, for Hopper and Blackwell. It compiles at the first call of a kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._array import Array
from .._options import AttentionOptions
from ._limits import arguments, head_dims, imported, output, refusal, window

_WIDEST = {9: 256, 10: 128, 11: 128}  # major capability -> head dim
_TESTED = (64, 128, 192, 256)
_PACKAGE = "flash_attn.cute"
_KEPT: dict[str, Any] = {}


def why_not(op: str, q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> str | None:
    """Say what speaks against computing this call here."""
    against = refusal(q, k, v, sinks, options) or head_dims(q, v, max(_WIDEST.values()))
    if against is not None:
        return against
    if (width := q.values.shape[2]) not in _TESTED:
        return f"its gradients are wrong at some head dims (8 and 72, say); it serves {_TESTED} here, q has {width}"
    major, minor = torch.cuda.get_device_capability(q.values.device)
    if major not in _WIDEST:
        return f"it is for sm_90, sm_100 and sm_110, this device is sm_{major}{minor}"
    function = imported(_PACKAGE, _KEPT)
    return function if isinstance(function, str) else head_dims(q, v, _WIDEST[major])


def attend(q: Array, k: Array, v: Array, sinks: Tensor | None, options: AttentionOptions) -> Array:
    """Compute `scree.kernels.varlen_attention` by FlashAttention-4."""
    left, right = window(options, None)
    whole = (left, right) == (None, 0)
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = arguments(q, k)
    result = imported(_PACKAGE, _KEPT)(
        q.values,
        k.values,
        v.values,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=options.scale,
        causal=whole,
        window_size=(None, None) if whole else (left, right),
        softcap=options.softcap or 0.0,
    )
    return output(q, result)
