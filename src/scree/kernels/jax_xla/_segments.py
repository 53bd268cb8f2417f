"""Softmax and reductions along the ragged axis.

With p = exp(x - top), top the largest of a row, l the sum of p over it, and <> sums over a row::

    softmax     y = p r, r = 1 / l   dx = y * (g - <g y>)
    logsumexp   y = log(l) + top     dx = g p / l

What is made of tokens on the way to a sum is made anew in the backward, and kept nowhere. Spreading values over the
tokens of their rows and adding up the tokens of rows are each other's derivative, so that no gradient is scattered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._array import Array
from ..._layout import moved_from_front, moved_to_front
from ._fold import Arrays, fold, row_of_tokens, taken
from ._tiles import safe

_INF = float("inf")
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def _wide(x: Dense) -> Dense:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@partial(_custom_vjp, nondiff_argnums=(2,))
def _spread(values: Dense, offsets: Dense, total: int) -> Dense:
    """Give each token the values (B, F) of its row, (T, F); 0 beyond the last row."""
    if offsets.shape[0] == 1:
        return jnp.zeros((total, values.shape[1]), values.dtype)
    places, row = row_of_tokens(offsets, total)
    return jnp.where((places < offsets[-1])[:, None], taken(values, row), 0)


def _spread_fwd(values: Dense, offsets: Dense, total: int) -> tuple[Dense, Dense]:
    return _spread(values, offsets, total), offsets


def _spread_bwd(total: int, offsets: Dense, grad: Dense) -> tuple[Dense, None]:
    return _sum(_wide, (grad,), (), offsets).astype(grad.dtype), None


_spread.defvjp(_spread_fwd, _spread_bwd)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _sum(of_token: Callable[..., Dense], tokens: Arrays, of_row: Arrays, offsets: Dense) -> Dense:
    """Add up of_token(*tokens, *of_row) over the tokens of each row, (B, F)."""
    return fold("sum", of_token, tokens, of_row, offsets) + 0.0  # no sum of nothing is -0.0


def _sum_fwd(
    of_token: Callable[..., Dense], tokens: Arrays, of_row: Arrays, offsets: Dense
) -> tuple[Dense, tuple[Arrays, Arrays, Dense]]:
    return _sum(of_token, tokens, of_row, offsets), (tokens, of_row, offsets)


def _sum_bwd(
    of_token: Callable[..., Dense], kept: tuple[Arrays, Arrays, Dense], grad: Dense
) -> tuple[Arrays, Arrays, None]:
    tokens, of_row, offsets = kept
    total = len(tokens[0])
    spread = tuple(_spread(x, offsets, total) for x in of_row)
    _, pull = jax.vjp(of_token, *tokens, *spread)
    used = _used(offsets, total)  # what is beyond the last row may be anything, and 0 * NaN is no 0
    grads = tuple(jnp.where(used, x, 0) for x in pull(_spread(grad, offsets, total)))
    rows = tuple(_sum(_wide, (x,), (), offsets).astype(x.dtype) for x in grads[len(tokens) :])
    return grads[: len(tokens)], rows, None


_sum.defvjp(_sum_fwd, _sum_bwd)


def _used(offsets: Dense, total: int) -> Dense:
    """(total, 1), bool: which tokens belong to a row."""
    return (jnp.arange(total, dtype=offsets.dtype) < offsets[-1])[:, None]


@partial(_custom_vjp, nondiff_argnums=(0,))
def _extreme(op: str, x: Dense, offsets: Dense) -> Dense:
    """The largest or the smallest token of each row, (B, F), float32 or wider; equals share the gradient."""
    return fold(op, _wide, (x,), (), offsets)


def _extreme_fwd(op: str, x: Dense, offsets: Dense) -> tuple[Dense, Arrays]:
    out = _extreme(op, x, offsets)
    return out, (x, out, offsets)


def _extreme_bwd(op: str, kept: Arrays, grad: Dense) -> tuple[Dense, None]:
    x, out, offsets = kept
    share = grad / jnp.maximum(_sum(_equals, (x,), (out,), offsets), 1)
    won = _equals(x, _spread(out, offsets, len(x)))
    return (won * _spread(share, offsets, len(x))).astype(x.dtype), None


def _equals(x: Dense, y: Dense) -> Dense:
    return jnp.equal(_wide(x), y).astype(y.dtype)


_extreme.defvjp(_extreme_fwd, _extreme_bwd)


def _exponential(x: Dense, top: Dense) -> Dense:
    return jnp.exp(_wide(x) - top)


def _flat(arr: Array) -> Dense:
    """The values as (T, F), the ragged axis first."""
    x = moved_to_front(arr._xp, arr.values, arr.ragged_dim)
    return x.reshape(x.shape[0], math.prod(arr.feature_shape))


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax` from the largest and the sum of each row."""
    y = _softmax(_flat(arr), arr.offsets).reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


@jax.jit
def _softmax(values: Dense, offsets: Dense) -> Dense:
    return _normalised(values, safe(offsets, len(values)))


@_custom_vjp
def _normalised(x: Dense, offsets: Dense) -> Dense:
    """Softmax of the tokens (T, F) of each row; 0 beyond the last row."""
    return _normalised_fwd(x, offsets)[0]


def _normalised_fwd(x: Dense, offsets: Dense) -> tuple[Dense, Arrays]:
    top = lax.stop_gradient(_extreme("max", x, offsets))
    l = _sum(_exponential, (x,), (top,), offsets)
    r = 1 / jnp.where(l == 0, 1, l)  # a product: XLA divides in another way where there is one row only
    return _probabilities(x, top, r, offsets).astype(x.dtype), (x, top, r, offsets)


def _probability(x: Dense, top: Dense, r: Dense) -> Dense:
    return _exponential(x, top) * r


def _probabilities(x: Dense, top: Dense, r: Dense, offsets: Dense) -> Dense:
    used = _used(offsets, len(x))
    top, r = (_spread(part, offsets, len(x)) for part in (top, r))
    return jnp.where(used, _probability(jnp.where(used, x, 0), top, r), 0)


def _normalised_bwd(kept: Arrays, grad: Dense) -> tuple[Dense, None]:
    x, top, r, offsets = kept
    along = _sum(_weighted, (x, grad), (top, r), offsets)
    g = jnp.where(_used(offsets, len(x)), _wide(grad), 0)
    dx = _probabilities(x, top, r, offsets) * (g - _spread(along, offsets, len(x)))
    return dx.astype(x.dtype), None


def _weighted(x: Dense, grad: Dense, top: Dense, r: Dense) -> Dense:
    return _wide(grad) * _probability(x, top, r)


_normalised.defvjp(_normalised_fwd, _normalised_bwd)


def varlen_reduce(arr: Array, op: str) -> Dense:
    """Compute `scree.kernels.varlen_reduce` of the tokens of each row."""
    return _reduce(_flat(arr), arr.offsets, op=op).reshape(arr.batch_size, *arr.feature_shape)


@partial(jax.jit, static_argnames="op")
def _reduce(values: Dense, offsets: Dense, *, op: str) -> Dense:
    offsets = safe(offsets, len(values))
    if not jnp.issubdtype(values.dtype, jnp.floating):
        x = values.astype(jnp.int8) if values.dtype == jnp.bool_ else values
        out = fold(op, lambda x: x, (x,), (), offsets)
        return out > 0 if values.dtype == jnp.bool_ else out
    if op in ("max", "min"):
        return _extreme(op, values, offsets).astype(values.dtype)
    if op == "logsumexp":
        top = lax.stop_gradient(_extreme("max", values, offsets))
        top = jnp.where(jnp.abs(top) < _INF, top, 0)
        l = _sum(_exponential, (values,), (top,), offsets)
        none = l == 0
        return jnp.where(none, -_INF, jnp.log(jnp.where(none, 1, l)) + top).astype(values.dtype)
    out = _sum(_wide, (values,), (), offsets)
    if op == "mean":
        lengths = (offsets[1:] - offsets[:-1])[:, None]
        out = jnp.where(lengths > 0, out / jnp.maximum(lengths, 1).astype(out.dtype), jnp.nan)
    return out.astype(values.dtype)
