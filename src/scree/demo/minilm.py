"""all-MiniLM-L6-v2 without padding, written once for every framework.

Texts of any lengths go in as one `scree.Array`. What works token by token is `Array.map` and arithmetic; what needs to
know where a text begins and ends (attention, places, the mean) is an operation of scree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import scree
from scree.kernels import varlen_attention, varlen_layernorm, varlen_reduce

from .native import Dense, Native
from .pretrained import Layer, Linear, Model


def embed(tokens: scree.Array, model: Model, native: Native, seen: Callable[[Any], Any] = lambda x: x) -> Dense:
    """Embed a packed batch of texts.

    Parameters
    ----------
    tokens : Array of (T,), int32
        The tokens of B texts.
    model : Model
        Weights of the framework of `tokens`.
    native : Native
        That framework's operations.
    seen : callable, optional
        Called with each Array that an operation of the model returns, and returns it: a place to count them.

    Returns
    -------
    array of (B, M), float32
        One vector of length 1 a text.

    References
    ----------
    Wang et al. 2020, "MiniLM"; Devlin et al. 2019, "BERT"; Reimers and Gurevych 2019, "Sentence-BERT".
    """
    places = scree.position_ids(tokens)
    x = seen(tokens.map(lambda ids: model.words[ids] + model.places[places]))  # (T, M)
    x = seen(varlen_layernorm(x, *model.norm, eps=model.eps))
    for layer in model.layers:
        x = _encode(x, layer, model, native, seen)
    pooled = varlen_reduce(x, "mean")  # (B, M)
    return pooled / (pooled * pooled).sum(-1)[:, None] ** 0.5


def _encode(x: scree.Array, layer: Layer, model: Model, native: Native, seen: Callable[[Any], Any]) -> scree.Array:
    def linear(x: scree.Array, part: Linear) -> scree.Array:
        return seen(x.map(lambda values: native.linear(values, *part)))

    def heads(part: Linear) -> scree.Array:
        return linear(x, part).map(lambda values: values.reshape(values.shape[0], model.n_heads, -1))  # (T, H, D)

    attended = seen(varlen_attention(heads(layer.query), heads(layer.key), heads(layer.value)))
    attended = linear(attended.map(lambda values: values.reshape(values.shape[0], -1)), layer.attended)
    x = seen(varlen_layernorm(seen(x + attended), *layer.attended_norm, eps=model.eps))
    wide = seen(linear(x, layer.widened).map(native.gelu))
    return seen(varlen_layernorm(seen(x + linear(wide, layer.narrowed)), *layer.narrowed_norm, eps=model.eps))
