"""Softmax along the ragged axis, one sequence after the other."""

from __future__ import annotations

from ..._array import Array
from ..._backends import Backend, Dense
from .. import _contract
from ._common import back_on, joined, rows_of


def varlen_softmax(arr: Array) -> Array:
    """Compute `scree.kernels.varlen_softmax`: exp(x - max(x)) / sum(exp(x - max(x)))."""
    _contract.softmax(arr)
    rows = [_softmax(arr._xp, x) for x in rows_of("varlen_softmax", arr)]
    return back_on(arr, joined(arr, rows, arr.feature_shape))


def _softmax(xp: Backend, x: Dense) -> Dense:
    if x.shape[0] == 0:
        return x
    p = xp.exp(x - xp.max(x, axis=0, keepdims=True))
    return p / xp.sum(p, axis=0, keepdims=True)
