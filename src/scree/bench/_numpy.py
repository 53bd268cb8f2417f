"""Contests on NumPy: by hand with `reduceat` and matrix products, numba's loops, awkward."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

import scree
from scree import kernels

from ._contest import Contenders, Contest
from ._work import Heads, Tokens, heads, tokens

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_AWKWARD = importlib.util.find_spec("awkward") is not None


def _by_matmul(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    out = np.empty_like(q)
    for a, b in zip(offsets, offsets[1:], strict=False):
        s = np.matmul(q[a:b].transpose(1, 0, 2), k[a:b].transpose(1, 2, 0))
        s *= np.float32(q.shape[2] ** -0.5)
        s[:, ~np.tri(b - a, dtype=bool)] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        out[a:b] = np.matmul(s, v[a:b].transpose(1, 0, 2)).transpose(1, 0, 2)
    return out


def _attention(work: Heads, offsets: list[Any]) -> Contenders:
    given = work.q, work.k, work.v

    def ours(offsets: Any) -> Any:
        return kernels.varlen_attention(*(scree.Array(x, offsets) for x in given), causal=True).values

    return {
        "scree": _in_turn(ours, offsets),
        "matmul a sequence": _in_turn(lambda offsets: _by_matmul(*given, offsets), offsets),
    }


def _in_turn(run: Callable[[Any], Any], given: list[Any]) -> Callable[[], Any]:
    """Call run with one after the other, over and over."""
    turns = itertools.cycle(given)
    return lambda: run(next(turns))


def _softmax(x: Any, offsets: Any, lengths: Any) -> Any:
    p = np.exp(x - np.repeat(np.maximum.reduceat(x, offsets[:-1]), lengths, 0))
    p /= np.repeat(np.add.reduceat(p, offsets[:-1]), lengths, 0)
    return p


def _rmsnorm(x: Any, weight: Any) -> Any:
    y = x / np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1] + 1e-6)[:, None]
    y *= weight
    return y


def _layernorm(x: Any, weight: Any, bias: Any) -> Any:
    y = x - x.mean(1, keepdims=True)
    y /= np.sqrt(np.einsum("ij,ij->i", y, y) / x.shape[1] + 1e-5)[:, None]
    y *= weight
    y += bias
    return y


def _rope(x: Any, cos: Any, sin: Any, places: Any) -> Any:
    c, s = cos[places][:, None], sin[places][:, None]
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    return np.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def _tokens(op: str, work: Tokens) -> Contenders:
    arr, x, o, n = scree.Array(work.x, work.offsets), work.x, work.offsets, work.lengths
    w, b = work.weight, work.bias
    of_heads = arr.map(lambda x: x.reshape(len(x), -1, 64))
    places = scree.position_ids(arr)
    found: dict[str, dict[str, Callable[[], Any]]] = {
        "softmax": {
            "scree": lambda: kernels.varlen_softmax(arr).values,
            "reduceat, repeat": lambda: _softmax(x, o, n),
        },
        "sum": {"scree": lambda: kernels.varlen_reduce(arr, "sum"), "reduceat": lambda: np.add.reduceat(x, o[:-1])},
        "max": {"scree": lambda: kernels.varlen_reduce(arr, "max"), "reduceat": lambda: np.maximum.reduceat(x, o[:-1])},
        "rmsnorm": {"scree": lambda: kernels.varlen_rmsnorm(arr, w).values, "by hand": lambda: _rmsnorm(x, w)},
        "layernorm": {
            "scree": lambda: kernels.varlen_layernorm(arr, w, b).values,
            "by hand": lambda: _layernorm(x, w, b),
        },
        "rope": {
            "scree": lambda: kernels.varlen_rope(of_heads, work.cos, work.sin).values,
            "by hand": lambda: _rope(of_heads.values, work.cos, work.sin, places),
        },
    }
    contenders = found[op]
    if HAS_NUMBA:
        from . import _numba

        loops: dict[str, Callable[[], Any]] = {
            "softmax": lambda: _numba.softmax(x, o, np.empty_like(x)),
            "sum": lambda: _numba.add(x, o, np.zeros((len(n), work.features), np.float32)),
            "max": lambda: _numba.largest(x, o, np.full((len(n), work.features), -np.inf, np.float32)),
            "rmsnorm": lambda: _numba.rmsnorm(x, w, np.float32(1e-6), np.empty_like(x)),
            "layernorm": lambda: _numba.layernorm(x, w, b, np.float32(1e-5), np.empty_like(x)),
        }
        if op in loops:
            contenders["numba loops"] = loops[op]
    if HAS_AWKWARD and op in ("sum", "max"):
        ak: Any = importlib.import_module("awkward")
        rows, reduce = scree.bridges.to_awkward(arr), {"sum": ak.sum, "max": ak.max}[op]
        contenders["awkward"] = lambda: ak.to_numpy(reduce(rows, axis=1), allow_missing=False)
    return contenders


def contests() -> list[Contest]:
    """Give the contests of NumPy."""
    found: list[Contest] = []
    for i, work in enumerate(heads()):
        same = functools.partial(_attention, work, [work.offsets])
        new = functools.partial(_attention, work, work.other_offsets)
        found.append(Contest("attention", "numpy", work.name, work.flops, 0, i == 0, same))
        found.append(Contest("attention, new lengths", "numpy", work.name, work.other_flops, 0, False, new))
    rows = tokens()
    for op in ("softmax", "sum", "max", "rmsnorm", "layernorm", "rope"):
        passes = 1 if op in ("sum", "max") else 2
        make = functools.partial(_tokens, op, rows)
        quick = op in ("softmax", "sum", "rmsnorm")
        found.append(Contest(op, "numpy", rows.name, 0.0, rows.x.nbytes * passes, quick, make))
    return found
