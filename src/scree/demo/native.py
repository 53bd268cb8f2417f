"""The few dense operations of a transformer, as a user of each framework would call them.

scree has no matrix product, no GELU and no padded attention: what runs on dense arrays is the framework's own.
`NATIVE` is the only list of frameworks here; a framework is imported when its entry is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Dense: TypeAlias = Any
"""A dense array of a framework."""


class Native(NamedTuple):
    """One framework's own operations, all in float32.

    Attributes
    ----------
    asarray : callable
        A NumPy array to the framework's own array.
    linear : callable
        x (..., I), weight (O, I), bias (O,) to x @ weight.T + bias (..., O).
    gelu : callable
        x * (1 + erf(x / sqrt(2))) / 2, exact to the rounding of float32.
    layernorm : callable
        x, weight, bias, eps: over the last axis.
    attention : callable
        q, k, v (B, N, H, D) and mask (B, N), true at the keys that are tokens, to (B, N, H, D).
    default_texts : int
        How many texts take about a minute on two CPU cores.
    compiles_shapes : bool
        Whether every new shape costs a compilation, so that batches had better have one shape.
    """

    asarray: Callable[[NDArray[Any]], Dense]
    linear: Callable[[Dense, Dense, Dense], Dense]
    gelu: Callable[[Dense], Dense]
    layernorm: Callable[[Dense, Dense, Dense, float], Dense]
    attention: Callable[[Dense, Dense, Dense, Dense], Dense]
    default_texts: int
    compiles_shapes: bool = False


def _numpy() -> Native:
    def linear(x: Dense, weight: Dense, bias: Dense) -> Dense:
        y = np.matmul(x, weight.T)
        y += bias
        return y

    def layernorm(x: Dense, weight: Dense, bias: Dense, eps: float) -> Dense:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(eps)) * weight + bias

    def attention(q: Dense, k: Dense, v: Dense, mask: Dense) -> Dense:
        q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))  # (B, H, N, D)
        scores = q @ np.swapaxes(k, 2, 3) * np.float32(1 / math.sqrt(q.shape[-1]))
        scores = np.where(mask[:, None, None, :], scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.swapaxes(weights @ v, 1, 2)

    return Native(np.asarray, linear, _gelu_numpy, layernorm, attention, default_texts=500)


def _torch() -> Native:
    import torch
    from torch.nn import functional as F

    def layernorm(x: Dense, weight: Dense, bias: Dense, eps: float) -> Dense:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def attention(q: Dense, k: Dense, v: Dense, mask: Dense) -> Dense:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)

    return Native(torch.tensor, F.linear, F.gelu, layernorm, attention, default_texts=1500)


def _jax() -> Native:
    import jax
    import jax.numpy as jnp

    def linear(x: Dense, weight: Dense, bias: Dense) -> Dense:
        return jnp.matmul(x, weight.T, precision=jax.lax.Precision.HIGHEST) + bias

    def gelu(x: Dense) -> Dense:
        return jax.nn.gelu(x, approximate=False)

    def layernorm(x: Dense, weight: Dense, bias: Dense, eps: float) -> Dense:
        return jax.nn.standardize(x, epsilon=eps) * weight + bias

    def attention(q: Dense, k: Dense, v: Dense, mask: Dense) -> Dense:
        with jax.default_matmul_precision("highest"):
            return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])

    # The attention of the packed way compiles a program for every length of a text.
    return Native(
        jnp.asarray,
        jax.jit(linear),
        gelu,
        jax.jit(layernorm),
        jax.jit(attention),
        default_texts=64,
        compiles_shapes=True,
    )


def _mlx() -> Native:
    import mlx.core as mx

    def linear(x: Dense, weight: Dense, bias: Dense) -> Dense:
        return mx.addmm(bias, x, weight.T)

    def gelu(x: Dense) -> Dense:
        return x * (1 + mx.erf(x * (1 / math.sqrt(2)))) * 0.5

    def attention(q: Dense, k: Dense, v: Dense, mask: Dense) -> Dense:
        q, k, v = (mx.swapaxes(x, 1, 2) for x in (q, k, v))  # (B, H, N, D)
        scale = 1 / math.sqrt(q.shape[-1])
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask[:, None, None, :])
        return mx.swapaxes(attended, 1, 2)

    # MLX is made for Apple's GPUs: elsewhere its matrix products are those of a plain BLAS on one core.
    default_texts = 48 if mx.default_device() == mx.cpu else 1500
    return Native(mx.array, linear, gelu, mx.fast.layer_norm, attention, default_texts)


NATIVE: dict[str, Callable[[], Native]] = {"torch": _torch, "jax": _jax, "mlx": _mlx, "numpy": _numpy}
"""Framework -> a function that imports it and returns its operations; in the order in which they are preferred."""

# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4, the coefficients of x^0, x^2, ...: a rational minimax fit whose largest
# relative error is 2.5e-8. Beyond 4 erf is 1 in float32.
_ERF_P = (1.12837914, 0.193546041, 0.0531018817, 0.00388338829, 0.0002845673, 1.98677986e-06)
_ERF_Q = (1.0, 0.504858268, 0.115350411, 0.0152073387, 0.00118558268, 3.74202228e-05)
_BLOCK = 1 << 14  # values: the temporaries of a block stay in the cache of a core


def erf(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the error function in float32, to a relative error below 5e-7: NumPy has none.

    Notes
    -----
    x P(x^2) / Q(x^2) with x clipped to [-4, 4].
    """
    x = np.clip(x, np.float32(-4), np.float32(4))
    z = x * x
    above, below = (_polynomial(z, coefficients) for coefficients in (_ERF_P, _ERF_Q))
    above *= x
    above /= below
    return above


def _polynomial(z: NDArray[np.float32], coefficients: tuple[float, ...]) -> NDArray[np.float32]:
    y = z * np.float32(coefficients[-1])
    for c in coefficients[-2:0:-1]:
        y += np.float32(c)
        y *= z
    y += np.float32(coefficients[0])
    return y


def _gelu_numpy(x: NDArray[np.float32]) -> NDArray[np.float32]:
    flat = x.reshape(-1)
    y = np.empty_like(flat)
    for start in range(0, len(flat), _BLOCK):
        block = flat[start : start + _BLOCK]
        half = erf(block * np.float32(1 / math.sqrt(2)))
        half += np.float32(1)
        half *= block
        np.multiply(half, np.float32(0.5), out=y[start : start + _BLOCK])
    return y.reshape(x.shape)
