"""Contests on JAX: `jax.nn.dot_product_attention` padded and with a mask of segments, `jax.ops.segment_*`.

All is compiled, with offsets as arguments, so that new lengths are no new program for anyone. On an NVIDIA GPU the peers
in attention are cuDNN's, and a time has the dispatch and the waiting in it.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import scree
from scree import kernels

from ._contest import Contenders, Contest, Rates
from ._timing import interleaved
from ._work import Heads, Tokens, gpu_heads, heads, tokens

_Call = Callable[..., Any]
_REDUCTIONS = ("sum", "mean", "max", "min", "logsumexp")
_MOST_SCORES = 1 << 27  # of the mask of segments, whose memory is that of all scores
_COPIES = 20  # in a row


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


def _by_cudnn_padded(longest: int) -> _Call:
    def run(q: Any, k: Any, v: Any, offsets: Any) -> Any:
        arr, lengths = scree.Array(q, offsets), offsets[1:] - offsets[:-1]
        index = jnp.minimum(offsets[:-1, None] + jnp.arange(longest), len(q) - 1)
        out = jax.nn.dot_product_attention(
            q[index],
            k[index],
            v[index],
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
        return out[scree.segment_ids(arr), scree.position_ids(arr)]

    return run


def _by_cudnn_packed(q: Any, k: Any, v: Any, offsets: Any) -> Any:
    """What JAX keeps to itself: no public function takes offsets."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    lengths = (offsets[1:] - offsets[:-1])[None]
    attend = cast("Any", cudnn.dot_product_attention)  # whose result is an object to its types
    return attend(
        *(x[None] for x in (q, k, v)),
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets[None],
        kv_offsets=offsets[None],
        scale=q.shape[2] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )[0]


def _step(fn: _Call) -> _Call:
    def step(q: Any, k: Any, v: Any, offsets: Any, grad: Any) -> Any:
        out, backward = jax.vjp(lambda q, k, v: fn(q, k, v, offsets), q, k, v)
        return backward(grad.astype(out.dtype))

    return step


def _attention(work: Heads, *, new: bool = False, step: bool = False) -> Contenders:
    given, grad = [jnp.asarray(x, work.dtype) for x in (work.q, work.k, work.v)], jnp.asarray(work.grad, work.dtype)
    offsets = work.other_offsets if new else [work.offsets]
    total, heads, _ = work.q.shape
    calls = {"scree": _ours}
    if work.dtype == "float32":
        if not new:  # a program of fixed shapes would have to pad to the longest that may ever come
            calls["padded, is_causal"] = _by_padding(max(work.lengths))
        if new or total * total * heads <= _MOST_SCORES:
            calls["segment mask"] = _by_segments
    else:
        if not new:
            calls["padded, cuDNN"] = _by_cudnn_padded(max(work.lengths))
        calls["packed, cuDNN (private)"] = _by_cudnn_packed

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

    def mean(x: Any, offsets: Any, ids: Any) -> Any:
        return segment(jax.ops.segment_sum, x, ids) / (offsets[1:] - offsets[:-1])[:, None]

    def logsumexp(x: Any, offsets: Any, ids: Any) -> Any:
        top = jax.lax.stop_gradient(segment(jax.ops.segment_max, x, ids))
        return jnp.log(segment(jax.ops.segment_sum, jnp.exp(x - top[ids]), ids)) + top

    by_segments = {
        "sum": lambda x, _, ids: segment(jax.ops.segment_sum, x, ids),
        "mean": mean,
        "max": lambda x, _, ids: segment(jax.ops.segment_max, x, ids),
        "min": lambda x, _, ids: segment(jax.ops.segment_min, x, ids),
        "logsumexp": logsumexp,
    }

    def reduction(op: Any) -> dict[str, _Call]:
        ours = lambda x, o, _: kernels.varlen_reduce(scree.Array(x, o), op)  # noqa: E731
        return {"scree": ours, "segment ops": by_segments[op]}

    return {
        **{op: reduction(op) for op in _REDUCTIONS},
        "softmax": {
            "scree": lambda x, o, _: kernels.varlen_softmax(scree.Array(x, o)).values,
            "segment ops": by_hand,
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


def _tokens(op: str, work: Tokens, *, step: bool = False) -> Contenders:
    given = [jnp.asarray(x) for x in (work.x, work.offsets, np.repeat(np.arange(work.rows), work.lengths))]

    def backward(fn: _Call) -> _Call:
        def run(x: Any, offsets: Any, ids: Any, grad: Any) -> Any:
            out, back = jax.vjp(lambda x: fn(x, offsets, ids), x)
            return back(grad.reshape(out.shape))

        return run

    if step:
        given.append(jnp.asarray(work.grad[: work.rows] if op in _REDUCTIONS else work.grad))

    def contender(fn: _Call) -> Callable[[], Any]:
        compiled = jax.jit(backward(fn) if step else fn)
        return lambda: jax.block_until_ready(compiled(*given))

    return {name: contender(fn) for name, fn in _forward(work)[op].items()}


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def device_rates(clock: Callable[[], float] = time.perf_counter) -> Rates | None:
    """What JAX's own device does: the products of halves, and copies. None for the CPU, whose rates are NumPy's."""
    if not _on_gpu():
        return None
    a = jnp.ones((8192, 8192), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    ms = interleaved({"matmul": lambda: jax.block_until_ready(product(a, a))}, 0.5, clock=clock)["matmul"]["ms"]

    @functools.cache
    def copy(size: int) -> float:
        source, move = jnp.ones(-(-size // 4), jnp.uint32), jax.jit(lambda x: x + 1)

        def several() -> None:  # what a call takes of the host is not the device's rate
            jax.block_until_ready([move(source) for _ in range(_COPIES)])

        return interleaved({"copies": several}, 0.2, clock=clock)["copies"]["ms"] / _COPIES

    return Rates(2 * 8192**3 / ms, copy)


def contests() -> list[Contest]:
    """Give the contests of JAX, on its default device: on an NVIDIA GPU attention on halves."""
    found: list[Contest] = []
    for i, work in enumerate(gpu_heads() if _on_gpu() else heads()):
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
    for op in ("softmax", *_REDUCTIONS, "rmsnorm", "layernorm", "rope"):
        passes = 1 if op in _REDUCTIONS else 2
        make = functools.partial(_tokens, op, rows)
        quick = op in ("softmax", "sum")
        found.append(Contest(op, "jax", rows.name, 0.0, rows.x.nbytes * passes, quick, make))
        step = functools.partial(_tokens, op, rows, step=True)
        found.append(Contest(f"{op} step", "jax", rows.name, 0.0, rows.x.nbytes * (passes + 1), False, step))
    return found
