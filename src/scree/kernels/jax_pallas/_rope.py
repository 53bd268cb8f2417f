"""Rotary position embedding in one pass; its backward is the rotation by the opposite angles."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array as Dense

from ..._array import Array
from ..._backends import backend_of
from ..._offsets import is_used, position_ids, shifted_positions
from ..jax_xla import _rope as portable
from . import _rope_kernels as kernels
from . import _where
from ._rope_kernels import Options

_FURTHEST = 1 << 30  # places, beyond all tables
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def varlen_rope(arr: Array, cos: Dense, sin: Dense, *, interleaved: bool = False, start: Any = None) -> Array:
    """Compute `scree.kernels.varlen_rope`."""
    if arr.values.size == 0 or arr.batch_size == 0 or cos.size == 0:
        return portable.varlen_rope(arr, cos, sin, interleaved=interleaved, start=start)
    begin = 0 if start is None else start
    each, one = (None, begin) if isinstance(begin, int) else (begin, 0)
    one = min(max(one, -_FURTHEST), _FURTHEST)
    options = Options(interleaved, one, each is not None, arr._structure.spare)
    return arr.with_values(_turned(arr.values, cos, sin, arr.offsets, each, options=options))


@partial(jax.jit, static_argnames="options")
def _turned(x: Dense, cos: Dense, sin: Dense, offsets: Dense, each: Dense | None, *, options: Options) -> Dense:
    flat = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    if each is not None:
        each = jnp.clip(each, -_FURTHEST, _FURTHEST).astype(jnp.int32)
    return _rotate(options, flat, cos, sin, (offsets.astype(jnp.int32), each)).reshape(x.shape)


@partial(_custom_vjp, nondiff_argnums=(0,))
def _rotate(options: Options, x: Dense, cos: Dense, sin: Dense, rows: tuple[Dense, Dense | None]) -> Dense:
    """(T, heads, D) turned; `rows` has the offsets, and what each row begins at."""
    return _where.run(_kernels, _portable, options, (x, cos, sin), rows)


def _kernels(options: Options, arrays: tuple[Dense, ...], rows: tuple[Dense, Dense | None]) -> Dense:
    (x, cos, sin), (offsets, each) = arrays, rows
    more = () if each is None else (each,)
    return kernels.call(options, x, offsets, cos, sin, *more, interpret=_where.INTERPRET)


def _portable(options: Options, arrays: tuple[Dense, ...], rows: tuple[Dense, Dense | None]) -> Dense:
    (x, cos, sin), (offsets, each) = arrays, rows
    xp, total = backend_of(x), len(x)
    places = position_ids(xp, offsets, total)
    places = shifted_positions(xp, places, offsets, options.start if each is None else each, spare=options.spare)
    c, s = (portable._looked_up(table, places)[:, None] for table in (cos, sin))
    y = portable._rotate(options.interleaved, x, c, -s if options.back else s)
    return jnp.where(is_used(xp, offsets, total)[:, None, None], y, 0) if options.spare else y


def _rotate_fwd(options: Options, x: Any, cos: Any, sin: Any, rows: Any) -> tuple[Dense, Any]:
    kept = x.value if cos.perturbed or sin.perturbed else None  # which would stay in memory for the backward
    rows = jax.tree.map(lambda x: x.value, rows)
    return _rotate(options, x.value, cos.value, sin.value, rows), (kept, cos.value, sin.value, rows)


def _rotate_bwd(options: Options, left: Any, grad: Any) -> tuple[Dense | None, ...]:
    x, cos, sin, rows = left
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    if x is None:
        back = options._replace(back=not options.back)
        return _where.run(_kernels, _portable, back, (grad, cos, sin), rows), None, None, None
    return (*jax.vjp(lambda *given: _portable(options, given, rows), x, cos, sin)[1](grad), None)


_rotate.defvjp(_rotate_fwd, _rotate_bwd, symbolic_zeros=True)
