"""Reductions along the ragged axis, one sequence after the other."""

from __future__ import annotations

from ... import _check
from ..._array import Array
from ..._backends import Backend, Dense
from .. import _contract
from ._common import rows_of

_INF = float("inf")


def varlen_reduce(arr: Array, op: str) -> Dense:
    """Compute `scree.kernels.varlen_reduce`."""
    _contract.reduce(arr, op)
    xp = arr._xp
    name = xp.dtype_name(arr.values)
    rows = [_REDUCE[op](xp, x) if x.shape[0] else _of_nothing(xp, x, op, name) for x in rows_of("varlen_reduce", arr)]
    return xp.cast_like(xp.concat(rows, 0)[: arr.batch_size], arr.values)


def _of_nothing(xp: Backend, x: Dense, op: str, dtype_name: str) -> Dense:
    """What an empty sequence gives, (1, *features); a floating one with a place in the gradient's graph."""
    nothing = xp.full((1, *x.shape[1:]), _value_of_nothing(op, dtype_name), x)
    return _sum(xp, x) + nothing if _check.is_floating(dtype_name) else nothing


def _value_of_nothing(op: str, dtype_name: str) -> float | int | bool:
    if op == "sum":
        return 0
    if op == "mean":
        return float("nan")
    if dtype_name == "bool":
        return op == "min"
    if _check.is_integer(dtype_name):
        smallest, largest = _check.integer_limits(dtype_name)
        return largest if op == "min" else smallest
    return _INF if op == "min" else -_INF


# Each reduces (n, *features), n > 0, to (1, *features).


def _sum(xp: Backend, x: Dense) -> Dense:
    return xp.sum(x, axis=0, keepdims=True)


def _mean(xp: Backend, x: Dense) -> Dense:
    return xp.sum(x, axis=0, keepdims=True) / x.shape[0]


def _max(xp: Backend, x: Dense) -> Dense:
    return xp.max(x, axis=0, keepdims=True)


def _min(xp: Backend, x: Dense) -> Dense:
    return xp.min(x, axis=0, keepdims=True)


def _logsumexp(xp: Backend, x: Dense) -> Dense:
    """log(sum(exp(x - top))) + top, with top = max(x) where that is finite."""
    top = xp.max(x, axis=0, keepdims=True)
    zero = xp.full((), 0, x)
    top = xp.where(abs(top) < _INF, top, zero)
    s = xp.sum(xp.exp(x - top), axis=0, keepdims=True)
    none = s == 0
    return xp.where(none, xp.full((), -_INF, x), xp.log(xp.where(none, xp.full((), 1, x), s)) + top)


_REDUCE = {"sum": _sum, "mean": _mean, "max": _max, "min": _min, "logsumexp": _logsumexp}
