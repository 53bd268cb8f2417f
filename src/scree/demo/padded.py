"""The same model in the usual way: every text padded to the longest of its batch, and a mask for the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .native import Dense, Native
from .pretrained import Layer, Linear, Model


def pad(rows: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Put texts of tokens beneath each other, zeros behind the shorter ones.

    Returns
    -------
    ids : array of (B, N), int32
    mask : array of (B, N), float32
        1 at the tokens, 0 behind them.
    """
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros((len(rows), longest), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def embed(ids: Dense, mask: Dense, model: Model, native: Native, seen: Callable[[Any], Any] = lambda x: x) -> Dense:
    """Embed a padded batch of texts.

    Parameters
    ----------
    ids : array of (B, N), int32
        Tokens, with anything behind the last one of a text.
    mask : array of (B, N), float32
        1 at the tokens, 0 behind them.
    model : Model
        Weights of the framework of `ids`.
    native : Native
        That framework's operations.
    seen : callable, optional
        Called with each array that an operation of the model returns, and returns it: a place to count them.

    Returns
    -------
    array of (B, M), float32
        One vector of length 1 a text.
    """
    keep = mask != 0
    x = seen(model.words[ids] + model.places[: ids.shape[1]])  # (B, N, M)
    x = seen(native.layernorm(x, *model.norm, model.eps))
    for layer in model.layers:
        x = _encode(x, keep, layer, model, native, seen)
    pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]  # (B, M)
    return pooled / (pooled * pooled).sum(-1)[:, None] ** 0.5


def _encode(x: Dense, keep: Dense, layer: Layer, model: Model, native: Native, seen: Callable[[Any], Any]) -> Dense:
    def linear(x: Dense, part: Linear) -> Dense:
        return seen(native.linear(x, *part))

    def heads(part: Linear) -> Dense:
        return linear(x, part).reshape(*x.shape[:2], model.n_heads, -1)  # (B, N, H, D)

    attended = seen(native.attention(heads(layer.query), heads(layer.key), heads(layer.value), keep))
    attended = linear(attended.reshape(x.shape), layer.attended)
    x = seen(native.layernorm(seen(x + attended), *layer.attended_norm, model.eps))
    wide = seen(native.gelu(linear(x, layer.widened)))
    return seen(native.layernorm(seen(x + linear(wide, layer.narrowed)), *layer.narrowed_norm, model.eps))
