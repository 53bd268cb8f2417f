"""Norms over the last axis: a kernel forward, one backward, and one that adds up what that leaves of the vectors."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense

from ..._array import Array
from ..jax_xla import _norm as portable
from . import _norm_kernels as kernels
from . import _where
from ._launch import like
from ._norm_kernels import Options

_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def varlen_layernorm(arr: Array, weight: Dense | None = None, bias: Dense | None = None, eps: float = 1e-5) -> Array:
    """Compute `scree.kernels.varlen_layernorm`."""
    return arr.with_values(_normed(arr, weight, bias, eps, True))


def varlen_rmsnorm(arr: Array, weight: Dense | None = None, eps: float = 1e-6) -> Array:
    """Compute `scree.kernels.varlen_rmsnorm`."""
    return arr.with_values(_normed(arr, weight, None, eps, False))


def _normed(arr: Array, weight: Dense | None, bias: Dense | None, eps: float, centred: bool) -> Dense:
    shape, dim = arr.values.shape, arr.ragged_dim
    if arr.values.size == 0:
        return arr.values
    spare = arr._structure.spare
    facts = {"rows": math.prod(shape[:-1]), "features": shape[-1], "trail": math.prod(shape[dim + 1 : -1])}
    here = {"weight": weight is not None, "bias": bias is not None, "spare": spare}
    options = Options(eps, centred, **facts, tokens=shape[dim], **here)
    offsets = arr.offsets.astype(jnp.int32) if spare else None
    return _flat(arr.values, weight, bias, offsets, options=options)


@partial(jax.jit, static_argnames="options")
def _flat(values: Dense, weight: Dense | None, bias: Dense | None, offsets: Dense | None, *, options: Options) -> Dense:
    return _norm(options, values.reshape(options.rows, -1), weight, bias, offsets).reshape(values.shape)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _norm(options: Options, x: Dense, weight: Dense | None, bias: Dense | None, offsets: Dense | None) -> Dense:
    """(rows, features) normalised."""
    return _where.run(_forward_kernels, _forward_portable, options, (x, weight, bias), offsets)


def _norm_fwd(options: Options, *given: Any) -> tuple[Dense, Any]:
    x, *others = given
    weight, bias, offsets = (None if p is None else p.value for p in others)
    x = x.value
    sums = any(p is not None and p.perturbed for p in given[1:3])
    return _norm(options, x, weight, bias, offsets), (x, weight, bias, offsets, x[:0] if sums else None)


def _norm_bwd(options: Options, kept: Any, grad: Any) -> tuple[Dense | None, ...]:
    x, weight, bias, offsets, sums = kept
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    options = options._replace(sums=sums is not None)
    found = _where.run(_backward_kernels, _backward_portable, options, (x, weight, bias, grad), offsets)
    return (*found, None)


_norm.defvjp(_norm_fwd, _norm_bwd, symbolic_zeros=True)


def _launch(kernel: Any, options: Options, out: Any, programs: int, *given: Any) -> Any:
    return kernels.call(kernel, options, out, programs, *given, interpret=_where.INTERPRET)


def _forward_kernels(options: Options, arrays: tuple[Any, ...], offsets: Dense | None) -> Dense:
    x = arrays[0]
    return _launch(kernels.forward, options, like(x), options.blocks, *arrays, offsets)


def _backward_kernels(
    options: Options, arrays: tuple[Any, ...], offsets: Dense | None
) -> tuple[Dense, Dense | None, Dense | None]:
    x, weight, bias, grad = arrays
    part = jax.ShapeDtypeStruct((options.programs, options.features), jnp.float32)
    vectors = [p for p in (weight, bias) if p is not None] if options.sums else []
    out = (like(x), *(part for _ in vectors))
    dx, *parts = _launch(kernels.backward, options, out, options.programs, x, grad, weight, offsets)
    columns = kernels.columns_of(options)
    sums = iter([_launch(kernels.added, options, like(p), columns, x) for p, x in zip(vectors, parts, strict=True)])
    dweight, dbias = (None if p is None else next(sums, None) for p in (weight, bias))
    return dx, dweight, dbias


def _used(options: Options, offsets: Dense | None) -> Dense | None:
    """(rows, 1), bool: which rows belong to a sequence, where not all do."""
    if offsets is None:
        return None
    token = jnp.arange(options.rows) // options.trail % options.tokens
    return (token < offsets[-1])[:, None]


def _forward_portable(options: Options, arrays: tuple[Any, ...], offsets: Dense | None) -> Dense:
    return portable._norm(options.eps, options.centred, *arrays, _used(options, offsets))


def _backward_portable(
    options: Options, arrays: tuple[Any, ...], offsets: Dense | None
) -> tuple[Dense, Dense | None, Dense | None]:
    *given, grad = arrays
    dx, dweight, dbias = jax.vjp(lambda *x: _forward_portable(options, x, offsets), *given)[1](grad)
    return (dx, dweight, dbias) if options.sums else (dx, None, None)
