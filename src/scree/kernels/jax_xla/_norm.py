"""Norms over the last axis, whose statistics the CPU takes from blocks of a few tokens that stay in its cache.

Sums go element by element, sixteenth onto sixteenth, so that how many tokens there are changes no token's bits; tokens
that no sequence has are computed like all others, and left out at the end, for the same reason. With c
the value less its mean (layernorm), or the value (rmsnorm), r = 1 / sqrt(mean(c**2) + eps) and u = c r::

    y = u * weight + bias          h = g * weight
    dx = r * (h - mean(h) - u * mean(h * u))      dweight = sum_t g u      dbias = sum_t g

where rmsnorm has neither mean(h) nor a bias.

What does not serve on the CPU: XLA's own sums for all tokens at once share the cores, but have other code below 4096
elements, and XLA's library (YNNPACK) gets what is made of the sums as well from 4096 tokens on, where a product and a sum
are rounded twice, and not once; even alone, with more tokens of zeros, they give one lone token another gradient. These
sums for all tokens at once are held up by memory. Loops over halves of the tokens run one after the other, as they share
the memory of what is between. And y written block by block was no faster.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense
from jax import lax

from ..._array import Array
from ..._offsets import is_used

_BLOCK = 16  # tokens
_FOLD = 16  # parts that are added up at once
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def varlen_layernorm(arr: Array, weight: Dense | None = None, bias: Dense | None = None, eps: float = 1e-5) -> Array:
    """Compute `scree.kernels.varlen_layernorm` from blocks of tokens."""
    return arr.with_values(_normed(arr.values, weight, bias, _used(arr), eps=eps, centred=True))


def varlen_rmsnorm(arr: Array, weight: Dense | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm` from blocks of tokens."""
    return arr.with_values(_normed(arr.values, weight, None, _used(arr), eps=eps, centred=False))


def _used(arr: Array) -> Dense | None:
    """(.., T, ..), bool: which tokens belong to a sequence, where not all do."""
    if not arr._structure.spare:
        return None
    used = is_used(arr._xp, arr.offsets, arr.total_length)
    return used.reshape(tuple(-1 if i == arr.ragged_dim else 1 for i in range(arr.values.ndim)))


@partial(jax.jit, static_argnames=("eps", "centred"))
def _normed(
    values: Dense, weight: Dense | None, bias: Dense | None, used: Dense | None, *, eps: float, centred: bool
) -> Dense:
    if values.size == 0:
        return values
    features = values.shape[-1]
    if used is not None:
        used = jnp.broadcast_to(used, (*values.shape[:-1], 1)).reshape(-1, 1)
    y = _norm(eps, centred, values.reshape(-1, features), weight, bias, used)
    return y.reshape(values.shape)


def _wide(x: Dense) -> Dense:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: Dense) -> Dense:
    """The mean over the last axis, (tokens, 1)."""
    n = features = x.shape[-1]
    while n > 1:
        parts = min(_FOLD, 1 << (n - 1).bit_length())
        n = -(-n // parts)
        x = jnp.pad(x, ((0, 0), (0, n * parts - x.shape[-1])))
        some = [x[:, i * n : (i + 1) * n] for i in range(parts)]
        while len(some) > 1:
            half = len(some) // 2
            some = [some[i] + some[half + i] for i in range(half)]
        x = some[0]
    return x * (1.0 / features)


def _by_blocks(
    fn: Callable[..., tuple[tuple[Dense, ...], tuple[Dense, ...]]], tokens: tuple[Dense | None, ...]
) -> tuple[tuple[Dense, ...], tuple[Dense, ...]]:
    """Give a function some tokens at a time; put together what it makes of each, and add up what it makes of all.

    `fn` gets (fresh, *tokens), where fresh, (tokens, 1), says which of them no call before has had.
    """
    total = len(_first(tokens))
    if total < _BLOCK:  # made as long as a block, so that there is but one program
        more = ((0, _BLOCK - total), (0, 0))
        each, added = _by_blocks(fn, tuple(None if x is None else jnp.pad(x, more) for x in tokens))
        return tuple(x[:total] for x in each), added

    def block(i: Dense) -> tuple[Dense, tuple[tuple[Dense, ...], tuple[Dense, ...]]]:
        start = jnp.minimum(i * _BLOCK, total - _BLOCK)
        fresh = (start + jnp.arange(_BLOCK) >= i * _BLOCK)[:, None]
        some = (None if x is None else lax.dynamic_slice_in_dim(x, start, _BLOCK, 0) for x in tokens)
        return start, fn(fresh, *some)

    def body(i: Dense, done: tuple[tuple[Dense, ...], tuple[Dense, ...]]) -> Any:
        start, (each, added) = block(i)
        put = (lax.dynamic_update_slice_in_dim(a, b, start, 0) for a, b in zip(done[0], each, strict=True))
        return tuple(put), tuple(a + b for a, b in zip(done[1], added, strict=True))

    each, added = jax.eval_shape(lambda: block(jnp.zeros((), jnp.int32))[1])
    begin = (
        tuple(jnp.zeros((total, *x.shape[1:]), x.dtype) for x in each),
        tuple(jnp.zeros(x.shape, x.dtype) for x in added),
    )
    # Behind barriers, so that one block is a loop as well, and what is computed from the results a pass of its own.
    count = lax.optimization_barrier(jnp.asarray(-(-total // _BLOCK), jnp.int32))
    return lax.optimization_barrier(lax.fori_loop(jnp.zeros_like(count), count, body, begin))


def _at_once(
    fn: Callable[..., tuple[tuple[Dense, ...], tuple[Dense, ...]]], tokens: tuple[Dense | None, ...]
) -> tuple[tuple[Dense, ...], tuple[Dense, ...]]:
    return fn(jnp.ones((len(_first(tokens)), 1), bool), *tokens)


def _first(tokens: tuple[Dense | None, ...]) -> Any:
    return tokens[0]


def _through(
    fn: Callable[..., tuple[tuple[Dense, ...], tuple[Dense, ...]]], *tokens: Dense | None
) -> tuple[tuple[Dense, ...], tuple[Dense, ...]]:
    return lax.platform_dependent(tokens, cpu=partial(_by_blocks, fn), default=partial(_at_once, fn))


def _masked(x: Dense, used: Dense | None) -> Dense:
    return x if used is None else jnp.where(used, x, 0)


@partial(_custom_vjp, nondiff_argnums=(0, 1))
def _norm(eps: float, centred: bool, x: Dense, weight: Dense | None, bias: Dense | None, used: Dense | None) -> Dense:
    """Tokens (N, M) normalised; `used`, (N, 1), says which of them count."""
    return _norm_fwd(eps, centred, x, weight, bias, used)[0]


def _norm_fwd(
    eps: float, centred: bool, x: Dense, weight: Dense | None, bias: Dense | None, used: Dense | None
) -> tuple[Dense, tuple[Any, ...]]:
    def of_block(_: Dense, x: Dense) -> tuple[tuple[Dense, ...], tuple[Dense, ...]]:
        x = _wide(x)
        if not centred:
            return (1.0 / lax.sqrt(_mean(x * x) + eps),), ()
        mean = _mean(x)
        c = x - mean
        return (mean, 1.0 / lax.sqrt(_mean(c * c) + eps)), ()

    stats, _ = _through(of_block, x)
    y = _unit(x, stats)
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    return _masked(y, used).astype(x.dtype), (x, weight, bias, used, stats)


def _unit(x: Dense, stats: tuple[Dense, ...]) -> Dense:
    """u, (N, M)."""
    *mean, r = stats
    x = _wide(x)
    return (x - mean[0] if mean else x) * r


def _norm_bwd(eps: float, centred: bool, kept: tuple[Any, ...], grad: Dense) -> tuple[Any, ...]:
    x, weight, bias, used, stats = kept
    scale = 1.0 if weight is None else _wide(weight)

    def of_block(
        fresh: Dense, x: Dense, grad: Dense, used: Dense | None, *stats: Dense
    ) -> tuple[tuple[Dense, ...], tuple[Dense, ...]]:
        u, g = _unit(x, stats), _wide(grad)
        h = g * scale
        means = (*((_mean(h),) if centred else ()), _mean(h * u))
        counts = fresh if used is None else fresh & used
        of_weight = () if weight is None else (jnp.where(counts, g * u, 0).sum(0),)
        of_bias = () if bias is None else (jnp.where(counts, g, 0).sum(0),)
        return means, (*of_weight, *of_bias)

    (*mean, along), added = _through(of_block, x, grad, used, *stats)
    h = _wide(grad) * scale
    dx = stats[-1] * ((h - mean[0] if centred else h) - _unit(x, stats) * along)
    vectors = iter(added)
    dweight, dbias = (None if p is None else next(vectors).astype(p.dtype) for p in (weight, bias))
    return _masked(dx, used).astype(x.dtype), dweight, dbias, None


_norm.defvjp(_norm_fwd, _norm_bwd)
