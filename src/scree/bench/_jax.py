"""Contests on JAX: `jax.nn.dot_product_attention` padded and with a mask of segments, `jax.ops.segment_*`.

All is compiled, with offsets as arguments, so that new lengths are no new program for anyone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import scree
from scree import kernels

from ._contest import Contenders, Contest
from ._work import Heads, Tokens, heads, tokens

_Call = Callable[..., Any]
_MOST_SCORES = 1 << 27  # of the mask of segments, whose memory is that of all scores


def _ours(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    return kernels.varlen_attention(*(scree.Array(x, offsets) for x in (q, k, v)), causal=True).values


def _by_segments(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    ids = scree.segment_ids(scree.Array(q, offsets))
    mask = (ids[:, None] == ids[None, :])[None, None]
    return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask, is_causal=True)[0]


def _by_padding(longest: int) -> _Call:
    def run(q: Any, k: Any, v: Any, offsets: Any) -> Any:
        arr = scree.Array(q, offsets)
        index = jnp.minimum(offsets[:-1, None] + jnp.arange(longest), len(q) - 1)
        out = jax.nn.dot_product_attention(q[index], k[index], v[index], is_causal=True)
        return out[scree.segment_ids(arr), scree.position_ids(arr)]

    return run


def _step(fn: _Call) -> _Call:
    return jax.grad(lambda q, k, v, offsets, grad: (fn(q, k, v, offsets) * grad).sum(), argnums=(0, 1, 2))


def _attention(work: Heads, *, new: bool = False, step: bool = False) -> Contenders:
    given, grad = [jnp.asarray(x) for x in (work.q, work.k, work.v)], jnp.asarray(work.grad)
    offsets = work.other_offsets if new else [work.offsets]
    total, heads, _ = work.q.shape
    calls = {"scree": _ours}
    if not new:  # a program of fixed shapes would have to pad to the longest that may ever come
        calls["padded, is_causal"] = _by_padding(max(work.lengths))
    if new or total * total * heads <= _MOST_SCORES:
        calls["segment mask"] = _by_segments

    def contender(fn: _Call) -> Callable[[], Any]:
        turns = itertools.cycle(offsets)
        compiled = jax.jit(_step(fn) if step else fn)
        more = (grad,) if step else ()  # an argument: XLA would work on a constant for seconds
        return lambda: jax.block_until_ready(compiled(*given, jnp.asarray(next(turns)), *more))

    return {name: contender(fn) for name, fn in calls.items()}


def _rmsnorm(x: Any, weight: Any) -> Any:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def _layernorm(x: Any, weight: Any, bias: Any) -> Any:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * weight + bias


def _rope(x: Any, cos: Any, sin: Any, places: Any) -> Any:
    c, s = cos[places][:, None], sin[places][:, None]
    x1, x2 = jnp.split(x, 2, -1)
    return jnp.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def _forward(work: Tokens) -> dict[str, dict[str, _Call]]:
    """Functions of the values, their offsets and the row of every token."""
    w, b, cos, sin = (jnp.asarray(x) for x in (work.weight, work.bias, work.cos, work.sin))
    of_heads = (-1, work.features // 64, 64)

    def segment(fn: _Call, x: Any, ids: Any) -> Any:
        return fn(x, ids, num_segments=work.rows, indices_are_sorted=True)

    def by_hand(x: Any, offsets: Any, ids: Any) -> Any:
        p = jnp.exp(x - segment(jax.ops.segment_max, x, ids)[ids])
        return p / segment(jax.ops.segment_sum, p, ids)[ids]

    return {
        "softmax": {
            "scree": lambda x, o, _: kernels.varlen_softmax(scree.Array(x, o)).values,
            "segment ops": by_hand,
        },
        "sum": {
            "scree": lambda x, o, _: kernels.varlen_reduce(scree.Array(x, o), "sum"),
            "segment_sum": lambda x, _, ids: segment(jax.ops.segment_sum, x, ids),
        },
        "max": {
            "scree": lambda x, o, _: kernels.varlen_reduce(scree.Array(x, o), "max"),
            "segment_max": lambda x, _, ids: segment(jax.ops.segment_max, x, ids),
        },
        "rmsnorm": {
            "scree": lambda x, o, _: kernels.varlen_rmsnorm(scree.Array(x, o), w).values,
            "by hand": lambda x, *_: _rmsnorm(x, w),
        },
        "layernorm": {
            "scree": lambda x, o, _: kernels.varlen_layernorm(scree.Array(x, o), w, b).values,
            "by hand": lambda x, *_: _layernorm(x, w, b),
        },
        "rope": {
            "scree": lambda x, o, _: kernels.varlen_rope(scree.Array(x.reshape(of_heads), o), cos, sin).values,
            "by hand": lambda x, o, ids: _rope(x.reshape(of_heads), cos, sin, jnp.arange(len(x)) - o[ids]),
        },
    }


def _tokens(op: str, work: Tokens) -> Contenders:
    given = [jnp.asarray(x) for x in (work.x, work.offsets, np.repeat(np.arange(work.rows), work.lengths))]

    def contender(fn: _Call) -> Callable[[], Any]:
        compiled = jax.jit(fn)
        return lambda: jax.block_until_ready(compiled(*given))

    return {name: contender(fn) for name, fn in _forward(work)[op].items()}


def contests() -> list[Contest]:
    """Give the contests of JAX, on its default device."""
    found: list[Contest] = []
    for i, work in enumerate(heads()):
        # The backward multiplies five matrices where the forward multiplies two.
        for op, flops, quick, make in (
            ("attention", work.flops, i == 0, functools.partial(_attention, work)),
            ("attention, new lengths", work.other_flops, i == 0, functools.partial(_attention, work, new=True)),
            ("attention step", 3.5 * work.flops, False, functools.partial(_attention, work, step=True)),
            (
                "attention step, new lengths",
                3.5 * work.other_flops,
                False,
                functools.partial(_attention, work, new=True, step=True),
            ),
        ):
            found.append(Contest(op, "jax", work.name, flops, 0, quick, make))
    rows = tokens()
    for op in ("softmax", "sum", "max", "rmsnorm", "layernorm", "rope"):
        passes = 1 if op in ("sum", "max") else 2
        make = functools.partial(_tokens, op, rows)
        quick = op in ("softmax", "sum")
        found.append(Contest(op, "jax", rows.name, 0.0, rows.x.nbytes * passes, quick, make))
    return found
