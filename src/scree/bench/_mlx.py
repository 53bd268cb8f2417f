"""Contests on MLX: `mx.fast`, and a loop over the sequences."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

import scree
from scree import kernels

from ._contest import Contenders, Contest
from ._work import Heads, Tokens, heads, tokens


def _evaluated(fn: Callable[..., Any], *given: Any) -> Any:
    out = fn(*given)
    mx.eval(out)
    return out


def _ours(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    bounds = mx.array(offsets)
    return kernels.varlen_attention(*(scree.Array(x, bounds) for x in (q, k, v)), causal=True).values


def _by_rows(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    cuts, scale = offsets.tolist(), q.shape[2] ** -0.5
    parts: list[Any] = []
    for a, b in zip(cuts, cuts[1:], strict=False):
        row = [x[a:b].transpose(1, 0, 2)[None] for x in (q, k, v)]
        out = mx.fast.scaled_dot_product_attention(*row, scale=scale, mask="causal")
        parts.append(out[0].transpose(1, 0, 2))
    return mx.concatenate(parts, 0)


def _attention(work: Heads, *, new: bool = False) -> Contenders:
    given = [mx.array(x) for x in (work.q, work.k, work.v)]
    offsets = work.other_offsets if new else [work.offsets]

    def contender(fn: Callable[..., Any]) -> Callable[[], Any]:
        turns = itertools.cycle(offsets)
        return lambda: _evaluated(fn, *given, next(turns))

    return {"scree": contender(_ours), "mx.fast a sequence": contender(_by_rows)}


def _tokens(op: str, work: Tokens) -> Contenders:
    x, w, b = (mx.array(part) for part in (work.x, work.weight, work.bias))
    offsets, cuts = mx.array(work.offsets), work.offsets[1:-1].tolist()
    arr = scree.Array(x, offsets)
    found: dict[str, dict[str, Callable[[], Any]]] = {
        "softmax": {
            "scree": lambda: kernels.varlen_softmax(arr).values,
            "softmax a sequence": lambda: mx.concatenate([mx.softmax(row, 0) for row in mx.split(x, cuts)]),
        },
        "sum": {
            "scree": lambda: kernels.varlen_reduce(arr, "sum"),
            "sum a sequence": lambda: mx.stack([row.sum(0) for row in mx.split(x, cuts)]),
        },
        "rmsnorm": {
            "scree": lambda: kernels.varlen_rmsnorm(arr, w).values,
            "mx.fast.rms_norm": lambda: mx.fast.rms_norm(x, w, 1e-6),
        },
        "layernorm": {
            "scree": lambda: kernels.varlen_layernorm(arr, w, b).values,
            "mx.fast.layer_norm": lambda: mx.fast.layer_norm(x, w, b, 1e-5),
        },
    }
    return {name: functools.partial(_evaluated, fn) for name, fn in found[op].items()}


def contests() -> list[Contest]:
    """Give the contests of MLX, on its default device."""
    found: list[Contest] = []
    for i, work in enumerate(heads()):
        new = functools.partial(_attention, work, new=True)
        found.append(Contest("attention", "mlx", work.name, work.flops, 0, i == 0, functools.partial(_attention, work)))
        found.append(Contest("attention, new lengths", "mlx", work.name, work.other_flops, 0, False, new))
    rows = tokens()
    for op in ("softmax", "sum", "rmsnorm", "layernorm"):
        make = functools.partial(_tokens, op, rows)
        nbytes = rows.x.nbytes * (1 if op == "sum" else 2)
        found.append(Contest(op, "mlx", rows.name, 0.0, nbytes, op in ("softmax", "rmsnorm"), make))
    return found
