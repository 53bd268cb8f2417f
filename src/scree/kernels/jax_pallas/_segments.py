"""Softmax and reductions along the ragged axis: a kernel that folds parts of rows, and one that uses what came out."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense

from ..._array import Array
from ..._layout import moved_from_front
from ..jax_xla import _segments as portable
from ..jax_xla._tiles import safe
from . import _segment_kernels as kernels
from . import _where
from ._launch import like

_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`."""
    y = _softmax(portable._flat(arr), arr.offsets).reshape(arr.total_length, *arr.feature_shape)
    return arr.with_values(moved_from_front(arr._xp, y, arr.ragged_dim))


def varlen_reduce(arr: Array, op: str) -> Dense:
    """Compute `scree.kernels.varlen_reduce` of floating values."""
    return _reduce(portable._flat(arr), arr.offsets, op=op).reshape(arr.batch_size, *arr.feature_shape)


@jax.jit
def _softmax(values: Dense, offsets: Dense) -> Dense:
    if offsets.shape[0] == 1 or values.size == 0:
        return portable._softmax(values, offsets)
    return _normalised(values, offsets.astype(jnp.int32))


@partial(jax.jit, static_argnames="op")
def _reduce(values: Dense, offsets: Dense, *, op: str) -> Dense:
    if offsets.shape[0] == 1 or values.size == 0:
        return portable._reduce(values, offsets, op=op)
    return _reduced(op, len(values), values, offsets.astype(jnp.int32)).astype(values.dtype)


def _fold(op: str, offsets: Dense, *given: Dense) -> Dense:
    (total, features), cut = given[0].shape, kernels.cut_of(given[0].shape[1])
    parts = kernels.parts_of(total, len(offsets) - 1, kernels.PART)
    out = jax.ShapeDtypeStruct((kernels._Fold(op).states * parts, features), jnp.float32)
    return kernels.call(kernels.fold, op, out, parts, cut, total, offsets, *given, interpret=_where.INTERPRET)


def _spread(op: str, out: jax.ShapeDtypeStruct, offsets: Dense, *given: Dense) -> Dense:
    cut = kernels.cut_of(out.shape[1])
    if op in kernels.FOLDED:
        given = *given, _fold(kernels.FOLDED[op], offsets, *given[:2])
    parts = kernels.parts_of(out.shape[0], len(offsets) - 1, kernels.PART)
    how = {"interpret": _where.INTERPRET}
    return kernels.call(kernels.spread, op, out, parts, cut, out.shape[0], offsets, *given, **how)


def _result(op: str, offsets: Dense, x: Dense) -> Dense:
    rows, cut = len(offsets) - 1, kernels.cut_of(x.shape[1])
    out, how = jax.ShapeDtypeStruct((rows, x.shape[1]), jnp.float32), {"interpret": _where.INTERPRET}
    return kernels.call(kernels.result, op, out, rows, cut, len(x), offsets, _fold(op, offsets, x), **how)


# Each of two ways is a function of (options, arrays, offsets). Kernels take any offsets; what indexes with them, safe ones.


def _softmax_kernels(options: None, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    return _spread("softmax", like(arrays[0]), offsets, arrays[0])


def _softmax_portable(options: None, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    return portable._normalised(arrays[0], safe(offsets, len(arrays[0])))


def _softmax_back_kernels(options: None, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    return _spread("d softmax", like(arrays[0]), offsets, *arrays)


def _weighted(y: Dense, g: Dense) -> Dense:
    return portable._wide(y) * portable._wide(g)


def _softmax_back_portable(options: None, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    (y, g), offsets = arrays, safe(offsets, len(arrays[0]))
    along = portable._spread(portable._sum(_weighted, (y, g), (), offsets), offsets, len(y))
    g = jnp.where(portable._used(offsets, len(y)), portable._wide(g), 0)
    return (portable._wide(y) * (g - along)).astype(y.dtype)


@_custom_vjp
def _normalised(x: Dense, offsets: Dense) -> Dense:
    return _where.run(_softmax_kernels, _softmax_portable, None, (x,), offsets)


def _normalised_fwd(x: Dense, offsets: Dense) -> tuple[Dense, Any]:
    y = _normalised(x, offsets)
    return y, (y, offsets)


def _normalised_bwd(kept: Any, grad: Dense) -> tuple[Dense, None]:
    y, offsets = kept
    return _where.run(_softmax_back_kernels, _softmax_back_portable, None, (y, grad), offsets), None


_normalised.defvjp(_normalised_fwd, _normalised_bwd)


def _reduce_kernels(op: str, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    return _result(op, offsets, arrays[0])


def _reduce_portable(op: str, arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    return portable._reduce(portable._wide(arrays[0]), offsets, op=op)


def _reduce_back_kernels(options: tuple[str, int, Any], arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    op, total, dtype = options
    return _spread(op, jax.ShapeDtypeStruct((total, arrays[-1].shape[1]), dtype), offsets, *arrays)


def _reduce_back_portable(options: tuple[str, int, Any], arrays: tuple[Dense, ...], offsets: Dense) -> Dense:
    op, total, dtype = options
    *kept, grad = arrays
    x = kept[0] if kept else jnp.zeros((total, grad.shape[1]), dtype)  # which the gradient of a sum is not of
    return jax.vjp(lambda x: _reduce_portable(op, (x,), offsets), x)[1](grad)[0]


@partial(_custom_vjp, nondiff_argnums=(0, 1))
def _reduced(op: str, total: int, x: Dense, offsets: Dense) -> Dense:
    """(B, F), float32."""
    return _where.run(_reduce_kernels, _reduce_portable, op, (x,), offsets)


def _reduced_fwd(op: str, total: int, x: Dense, offsets: Dense) -> tuple[Dense, Any]:
    out = _reduced(op, total, x, offsets)
    kept = () if op in ("sum", "mean") else (x, out)
    return out, (x[:0], kept, offsets)


def _reduced_bwd(op: str, total: int, left: Any, grad: Dense) -> tuple[Dense, None]:
    like, kept, offsets = left
    options = op, total, like.dtype
    return _where.run(_reduce_back_kernels, _reduce_back_portable, options, (*kept, grad), offsets), None


_reduced.defvjp(_reduced_fwd, _reduced_bwd)
