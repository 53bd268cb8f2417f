"""The kernels on the CPU, beside what people write by hand with the same framework. Every peer is checked first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from measure import interleaved

import scree
from scree import kernels

PACKAGES = ("numpy", "torch", "jax", "mlx", "scree")
GOAL = 1.0
THREADS = os.environ.get("OMP_NUM_THREADS", "all")
HEADS = ((16, 124, 4, 32), (16, 512, 8, 64))  # sequences, mean length, heads, head dim
ROWS, TOKENS, FEATURES = 96, 12_160, 1024

Contenders = dict[str, Callable[[], Any]]


def lengths_of(rows: int, mean: int, total: int | None = None) -> Any:
    """Log-normal lengths of sigma 1, scaled to a total where one is given."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, rows).astype(np.int64))
    if total is not None:
        lengths = np.maximum(1, lengths * total // lengths.sum())
        lengths[lengths.argmax()] += total - lengths.sum()
    return lengths


class Heads:
    """One batch for causal attention, in NumPy: q, k, v, offsets, and a gradient of the output."""

    def __init__(self, sequences: int, mean: int, heads: int, dim: int) -> None:
        self.lengths = lengths_of(sequences, mean).tolist()
        self.offsets = np.cumsum([0, *self.lengths], dtype=np.int32)
        self.q, self.k, self.v, self.grad = np.random.default_rng(1).standard_normal(
            (4, int(self.offsets[-1]), heads, dim), np.float32
        )
        self.name = f"{sequences} x ~{mean} x {heads} x {dim}"
        self.flops = sum(2.0 * n * (n + 1) for n in self.lengths) * heads * dim


def _numpy_attention(work: Heads) -> Any:
    out = np.empty_like(work.q)
    for a, b in zip(work.offsets, work.offsets[1:], strict=False):
        s = np.matmul(work.q[a:b].transpose(1, 0, 2), work.k[a:b].transpose(1, 2, 0))
        s *= np.float32(work.q.shape[2] ** -0.5)
        s[:, ~np.tri(b - a, dtype=bool)] = -np.inf
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        out[a:b] = np.matmul(s, work.v[a:b].transpose(1, 0, 2)).transpose(1, 0, 2)
    return out


def attention_numpy(work: Heads) -> Contenders:
    q, k, v = (scree.Array(x, work.offsets) for x in (work.q, work.k, work.v))
    return {
        "scree": lambda: kernels.varlen_attention(q, k, v, causal=True).values,
        "matmul a sequence": lambda: _numpy_attention(work),
    }


def _torch_loop(q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
    rows = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True)[0].transpose(0, 1) for row in rows])


def _torch_padded(q: Any, k: Any, v: Any, lengths: list[int]) -> Any:
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*padded, is_causal=True).transpose(1, 2)
    return torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)])


def _torch_step(fn: Callable[..., Any], given: list[Any], grad: Any) -> Callable[[], Any]:
    def step() -> Any:
        leaves = [x.detach().requires_grad_() for x in given]
        return torch.autograd.grad(fn(*leaves), leaves, grad)

    return step


def _torch_attention(work: Heads) -> tuple[dict[str, Callable[..., Any]], list[Any], Any]:
    given, offsets = [torch.tensor(x) for x in (work.q, work.k, work.v)], torch.tensor(work.offsets)

    def ours(*tensors: Any) -> Any:
        return kernels.varlen_attention(*(scree.Array(x, offsets) for x in tensors), causal=True).values

    calls = {
        "scree": ours,
        "SDPA a sequence": lambda *x: _torch_loop(*x, work.lengths),
        "SDPA padded": lambda *x: _torch_padded(*x, work.lengths),
    }
    return calls, given, torch.tensor(work.grad)


def attention_torch(work: Heads) -> Contenders:
    calls, given, _ = _torch_attention(work)
    return {name: lambda fn=fn: fn(*given) for name, fn in calls.items()}


def attention_step_torch(work: Heads) -> Contenders:
    calls, given, grad = _torch_attention(work)
    return {name: _torch_step(fn, given, grad) for name, fn in calls.items()}


def _jax_attention(work: Heads) -> tuple[dict[str, Callable[..., Any]], list[Any]]:
    given = [jnp.asarray(x) for x in (work.q, work.k, work.v)]
    offsets = jnp.asarray(work.offsets)
    n, longest = len(work.lengths), max(work.lengths)
    index = jnp.asarray(np.minimum(work.offsets[:-1, None] + np.arange(longest), work.offsets[-1] - 1))
    back = jnp.asarray(np.concatenate([i * longest + np.arange(m) for i, m in enumerate(work.lengths)]))

    def padded(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(q[index], k[index], v[index], is_causal=True)
        return out.reshape(n * longest, *out.shape[2:])[back]

    def segments(q: Any, k: Any, v: Any) -> Any:
        ids = scree.segment_ids(scree.Array(q, offsets))
        mask = (ids[:, None] == ids[None, :])[None, None]
        return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=mask, is_causal=True)[0]

    def ours(q: Any, k: Any, v: Any) -> Any:
        return kernels.varlen_attention(*(scree.Array(x, offsets) for x in (q, k, v)), causal=True).values

    calls = {"scree": ours, "padded": padded}
    if len(work.q) < 4000:  # a square of scores beyond
        calls["segment mask"] = segments
    return calls, given


def _done(fn: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(fn(*given))


def attention_jax(work: Heads) -> Contenders:
    calls, given = _jax_attention(work)
    return {name: _done(jax.jit(fn), *given) for name, fn in calls.items()}


def attention_step_jax(work: Heads) -> Contenders:
    calls, given = _jax_attention(work)
    weights = jnp.asarray(work.grad)

    def step(fn: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(jax.grad(lambda q, k, v: (fn(q, k, v) * weights).sum(), argnums=(0, 1, 2)))

    return {name: _done(step(fn), *given) for name, fn in calls.items()}


def attention_mlx(work: Heads) -> Contenders:
    given, offsets = [mx.array(x) for x in (work.q, work.k, work.v)], mx.array(work.offsets)
    cuts, scale = work.offsets.tolist(), work.q.shape[2] ** -0.5

    def ours() -> Any:
        out = kernels.varlen_attention(*(scree.Array(x, offsets) for x in given), causal=True).values
        mx.eval(out)
        return out

    def loop() -> Any:
        parts = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            row = [x[a:b].transpose(1, 0, 2)[None] for x in given]
            out = mx.fast.scaled_dot_product_attention(*row, scale=scale, mask="causal")
            parts.append(out[0].transpose(1, 0, 2))
        out = mx.concatenate(parts, 0)
        mx.eval(out)
        return out

    return {"scree": ours, "mx.fast a sequence": loop}


class Tokens:
    """Tokens of many features in rows, for what runs along rows and along tokens."""

    def __init__(self) -> None:
        self.lengths = lengths_of(ROWS, TOKENS // ROWS, TOKENS).tolist()
        self.offsets = np.cumsum([0, *self.lengths], dtype=np.int32)
        rng = np.random.default_rng(2)
        self.x, self.grad = rng.standard_normal((2, TOKENS, FEATURES), np.float32)
        self.weight, self.bias = rng.standard_normal((2, FEATURES), np.float32)
        self.name = f"{TOKENS} x {FEATURES}, {ROWS} rows"


def _numpy_softmax(x: Any, offsets: Any, lengths: Any) -> Any:
    p = np.exp(x - np.repeat(np.maximum.reduceat(x, offsets[:-1]), lengths, 0))
    p /= np.repeat(np.add.reduceat(p, offsets[:-1]), lengths, 0)
    return p


def _numpy_rmsnorm(x: Any, weight: Any) -> Any:
    y = x / np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1] + 1e-6)[:, None]
    y *= weight
    return y


def _numpy_layernorm(x: Any, weight: Any, bias: Any) -> Any:
    y = x - x.mean(1, keepdims=True)
    y /= np.sqrt(np.einsum("ij,ij->i", y, y) / x.shape[1] + 1e-5)[:, None]
    y *= weight
    y += bias
    return y


def tokens_numpy(work: Tokens) -> dict[str, Contenders]:
    arr, x, o, n = scree.Array(work.x, work.offsets), work.x, work.offsets, work.lengths
    w, b = work.weight, work.bias
    return {
        "softmax": {
            "scree": lambda: kernels.varlen_softmax(arr).values,
            "reduceat, repeat": lambda: _numpy_softmax(x, o, n),
        },
        "sum": {"scree": lambda: kernels.varlen_reduce(arr, "sum"), "reduceat": lambda: np.add.reduceat(x, o[:-1])},
        "max": {"scree": lambda: kernels.varlen_reduce(arr, "max"), "reduceat": lambda: np.maximum.reduceat(x, o[:-1])},
        "rmsnorm": {
            "scree": lambda: kernels.varlen_rmsnorm(arr, w).values,
            "by hand": lambda: _numpy_rmsnorm(x, w),
        },
        "layernorm": {
            "scree": lambda: kernels.varlen_layernorm(arr, w, b).values,
            "by hand": lambda: _numpy_layernorm(x, w, b),
        },
    }


def tokens_torch(work: Tokens) -> dict[str, Contenders]:
    x, offsets, n = torch.from_numpy(work.x), torch.from_numpy(work.offsets), work.lengths
    w, b = torch.from_numpy(work.weight), torch.from_numpy(work.bias)
    long = offsets.long()

    def arr(x: Any) -> Any:
        return scree.Array(x, offsets)

    forward: dict[str, dict[str, Callable[[Any], Any]]] = {
        "softmax": {
            "scree": lambda x: kernels.varlen_softmax(arr(x)).values,
            "softmax a sequence": lambda x: torch.cat([torch.softmax(row, 0) for row in x.split(n)]),
        },
        "sum": {
            "scree": lambda x: kernels.varlen_reduce(arr(x), "sum"),
            "sum a sequence": lambda x: torch.stack([row.sum(0) for row in x.split(n)]),
            "segment_reduce": lambda x: torch.segment_reduce(x, "sum", offsets=long, axis=0),
        },
        "max": {
            "scree": lambda x: kernels.varlen_reduce(arr(x), "max"),
            "amax a sequence": lambda x: torch.stack([row.amax(0) for row in x.split(n)]),
            "segment_reduce": lambda x: torch.segment_reduce(x, "max", offsets=long, axis=0),
        },
        "rmsnorm": {
            "scree": lambda x: kernels.varlen_rmsnorm(arr(x), w).values,
            "F.rms_norm": lambda x: F.rms_norm(x, (FEATURES,), w, 1e-6),
        },
        "layernorm": {
            "scree": lambda x: kernels.varlen_layernorm(arr(x), w, b).values,
            "F.layer_norm": lambda x: F.layer_norm(x, (FEATURES,), w, b),
        },
    }
    found = {op: {name: lambda fn=fn: fn(x) for name, fn in calls.items()} for op, calls in forward.items()}
    grad, of_rows = torch.from_numpy(work.grad), torch.from_numpy(work.grad[:ROWS])
    for op, calls in forward.items():
        given = of_rows if op in ("sum", "max") else grad
        found[f"{op} step"] = {name: _torch_step(fn, [x], given) for name, fn in calls.items()}
    return found


def tokens_jax(work: Tokens) -> dict[str, Contenders]:
    x, offsets = jnp.asarray(work.x), jnp.asarray(work.offsets)
    ids = jnp.asarray(np.repeat(np.arange(ROWS), work.lengths))

    def segment(fn: Callable[..., Any], x: Any) -> Any:
        return fn(x, ids, num_segments=ROWS, indices_are_sorted=True)

    def softmax(x: Any) -> Any:
        p = jnp.exp(x - segment(jax.ops.segment_max, x)[ids])
        return p / segment(jax.ops.segment_sum, p)[ids]

    calls = {
        "softmax": {"scree": lambda x: kernels.varlen_softmax(scree.Array(x, offsets)).values, "segment ops": softmax},
        "sum": {
            "scree": lambda x: kernels.varlen_reduce(scree.Array(x, offsets), "sum"),
            "segment_sum": lambda x: segment(jax.ops.segment_sum, x),
        },
        "max": {
            "scree": lambda x: kernels.varlen_reduce(scree.Array(x, offsets), "max"),
            "segment_max": lambda x: segment(jax.ops.segment_max, x),
        },
    }
    return {op: {name: _done(jax.jit(fn), x) for name, fn in both.items()} for op, both in calls.items()}


def _arrays(result: Any) -> list[np.ndarray]:
    return [np.asarray(part) for part in (result if isinstance(result, (list, tuple)) else [result])]


def check(contenders: Contenders) -> None:
    """Refuse to time a contender that computes something else than ours."""
    want = _arrays(contenders["scree"]())
    for name, run in contenders.items():
        for a, b in zip(want, _arrays(run()), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=name)


def _rate() -> float:
    """Floating-point operations a millisecond of NumPy's matrix product."""
    a = np.ones((1024, 1024), np.float32)
    return 2 * 1024**3 / interleaved({"matmul": lambda: a @ a}, 0.5)["matmul"]["ms"]


def _copy(size: int) -> float:
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return interleaved({"copy": lambda: np.copyto(target, source)}, 0.2)["copy"]["ms"]


def _timed(row: dict[str, Any], contenders: Contenders, floor: float, seconds: float) -> Iterator[dict[str, Any]]:
    check(contenders)
    yield {**row, "impl": "copy floor", "ms": round(floor, 5)}
    for name, times in interleaved(contenders, seconds).items():
        yield {**row, "impl": name, "compiled": False, **times}


CPU = (
    (attention_numpy, tokens_numpy, "numpy"),
    (attention_torch, tokens_torch, "torch"),
    (attention_step_torch, None, "torch"),
    (attention_mlx, None, "mlx"),
)
JAX = ((attention_jax, tokens_jax, "jax"), (attention_step_jax, None, "jax"))


def rows(part: str, seconds: float = 4.0) -> Iterator[dict[str, Any]]:
    """Time every contender of every op and workload; a dictionary each."""
    rate, tokens = _rate(), Tokens()
    for attention, others, framework in CPU if part == "cpu" else JAX:
        for shape in HEADS:
            work = Heads(*shape)
            op = attention.__name__.rpartition("_")[0].replace("_", " ")
            # The backward multiplies five matrices where the forward multiplies two.
            floor = work.flops / rate * (3.5 if "step" in op else 1.0)
            yield from _timed({"op": op, "framework": framework, "work": work.name}, attention(work), floor, seconds)
        if others is None:
            continue
        for op, contenders in others(tokens).items():
            reads = 1 if op in ("sum", "max") else 3 if op.endswith("step") else 2
            floor = _copy(tokens.x.nbytes * reads // 2)
            yield from _timed({"op": op, "framework": framework, "work": tokens.name}, contenders, floor, seconds)
