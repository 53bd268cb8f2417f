"""Ops that move memory on a CUDA device beside their peers: norms, softmax, reductions, rope, padding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cuda_attention import HEADLINE, log_normal
from cuda_timing import Case, Thunk

import scree
from scree import kernels
from scree.kernels import triton as fast
from scree.kernels._dispatch import TABLE

COLD = 200e6  # bytes of inputs that are used in turn: the cache of an H200 holds 60 MB
Tensors = tuple[torch.Tensor, ...]


class Batch:
    """Offsets on the device, and tensors of normals for them."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths, self.tokens, self.longest = lengths, sum(lengths), max(lengths)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        self.long_offsets = self.cu_seqlens.long()
        self.segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()

    def array(self, values: torch.Tensor) -> scree.Array:
        return scree.from_cu_seqlens(values, self.cu_seqlens, max_length=self.longest)


def normals(*shape: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0, middle: float = 0.0) -> torch.Tensor:
    """Draw on the device, in pieces: a float32 copy of the whole may not fit."""
    random = torch.Generator("cuda").manual_seed(seed)
    made = torch.empty(shape, dtype=dtype, device="cuda")
    for part in made.split(max(1, 2**26 // max(1, made[0].numel()))):
        part.copy_(torch.randn(part.shape, generator=random, device="cuda") * spread + middle)
    return made


def copies(x: torch.Tensor) -> list[torch.Tensor]:
    """So many of a tensor that the cache does not hold them all."""
    return [x, *(x.clone() for _ in range(min(16, int(COLD // (x.numel() * x.element_size())))))]


def calls(contenders: dict[str, Any], x: torch.Tensor) -> dict[str, Callable[[], list[Thunk]]]:
    """What prepares each contender's calls on the copies of a tensor."""

    def prepare(contender: Any) -> list[Thunk]:
        return [contender(a) for a in copies(x)]

    return {name: functools.partial(prepare, contender) for name, contender in contenders.items()}


def ours(op: str) -> list[str]:
    """The implementations of the table that serve CUDA."""
    return [
        impl.name
        for impl in TABLE[op]
        if "torch" in (impl.backends or ()) and "cuda" in (impl.devices or ()) and not impl.on_request
    ]


def forward_and_backward(
    op: str, work: str, x: torch.Tensor, vectors: Tensors, contenders: dict[str, Any], exact: Any, tensors: Any = None
) -> Iterator[Case]:
    """Cases of an op on one array and some small ones: two times the array's bytes forward, three times backward.

    A contender is a function of (x, *vectors) that prepares what does not count, and gives the call.
    """
    size = x.numel() * x.element_size()
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32

    def forward(contender: Any) -> list[Thunk]:
        return [contender(a, *vectors) for a in copies(x)]

    def want() -> torch.Tensor:
        return exact(x.to(wide), *(v.to(wide) for v in vectors))

    made = {name: (lambda c=c: forward(c)) for name, c in contenders.items()}
    host = {} if tensors is None else {"scree triton": lambda: tensors(x, *vectors)}
    yield Case(f"{op} forward", work, "tbs", 2.0 * size, x.dtype, want, made, host)
    grad = normals(*x.shape, dtype=x.dtype, seed=1)

    def backward(contender: Any) -> list[Thunk]:
        small = [v.detach().clone().requires_grad_() for v in vectors]

        def of(leaf: torch.Tensor) -> Thunk:
            out = contender(leaf, *small)()
            return lambda: torch.autograd.grad(out, (leaf, *small), grad, retain_graph=True)

        return [of(a.detach().requires_grad_()) for a in copies(x)]

    def want_grads() -> Tensors:
        leaves = [a.detach().to(wide).requires_grad_() for a in (x, *vectors)]
        return torch.autograd.grad(exact(*leaves), leaves, grad.to(wide))

    made = {name: (lambda c=c: backward(c)) for name, c in contenders.items()}
    host = {} if tensors is None else {"scree triton": lambda: backward(tensors)[0]}
    yield Case(f"{op} backward", work, "tbs", 3.0 * size, x.dtype, want_grads, made, host)


def plain(call: Callable[..., Any]) -> Callable[..., Thunk]:
    return lambda *given: lambda: call(*given)


def compiled(call: Callable[..., Any]) -> Callable[..., Thunk]:
    made: list[Any] = []

    def contender(*given: Any) -> Thunk:
        if not made:
            torch._dynamo.reset()
            torch._functorch.config.donated_buffer = False  # a graph that is kept is differentiated many times
            made.append(torch.compile(call, dynamic=False, fullgraph=True))
        return lambda: made[0](*given)

    return contender


def norms(quick: bool) -> Iterator[Case]:
    for lengths, features in ((HEADLINE, 4096), ((1024,) * 64, 768))[: 1 if quick else 2]:
        batch = Batch(lengths)
        for dtype in (torch.float16, torch.bfloat16)[: 1 if quick else 2]:
            x = normals(batch.tokens, features, dtype=dtype)
            weight = normals(features, dtype=dtype, seed=2, spread=0.1, middle=1.0)
            bias = normals(features, dtype=dtype, seed=3, spread=0.1)
            work = f"{batch.tokens} x {features}, {str(dtype).removeprefix('torch.')}"
            yield from _rmsnorm(batch, work, x, weight)
            yield from _layernorm(batch, work, x, weight, bias)


def _rmsnorm(batch: Batch, work: str, x: torch.Tensor, weight: torch.Tensor) -> Iterator[Case]:
    def torch_own(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, w.shape, w, 1e-6)

    def liger(x: torch.Tensor, w: torch.Tensor) -> Thunk:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)

    def quack(x: torch.Tensor, w: torch.Tensor) -> Thunk:
        from quack import rmsnorm

        return lambda: rmsnorm(x, w, eps=1e-6)

    def front_door(name: str) -> Any:
        def contender(x: torch.Tensor, w: torch.Tensor) -> Thunk:
            arr = batch.array(x)
            return lambda: kernels.varlen_rmsnorm(arr, w, implementation=name).values

        return contender

    def tensors(x: torch.Tensor, w: torch.Tensor) -> Thunk:
        return lambda: fast.varlen_rmsnorm_triton(x, w, 1e-6)

    contenders = {f"scree {name}": front_door(name) for name in ours("varlen_rmsnorm")}
    contenders |= {"torch": plain(torch_own), "torch.compile": compiled(torch_own), "Liger": liger, "quack": quack}
    yield from forward_and_backward("rmsnorm", work, x, (weight,), contenders, torch_own, tensors)


def _layernorm(batch: Batch, work: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Iterator[Case]:
    def torch_own(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, w.shape, w, b, 1e-5)

    def liger(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Thunk:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        return lambda: LigerLayerNormFunction.apply(x, w, b, 1e-5)

    def quack(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Thunk:
        from quack.rmsnorm import layernorm_fwd

        wide, wide_b = w.float(), b.float()  # it takes no other
        return lambda: layernorm_fwd(x, wide, wide_b, eps=1e-5)

    def front_door(name: str) -> Any:
        def contender(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Thunk:
            arr = batch.array(x)
            return lambda: kernels.varlen_layernorm(arr, w, b, implementation=name).values

        return contender

    def tensors(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Thunk:
        return lambda: fast.varlen_layernorm_triton(x, w, b, 1e-5)

    contenders = {f"scree {name}": front_door(name) for name in ours("varlen_layernorm")}
    contenders |= {"torch": plain(torch_own), "torch.compile": compiled(torch_own), "Liger": liger, "quack": quack}
    yield from forward_and_backward("layernorm", work, x, (weight, bias), contenders, torch_own, tensors)


def softmaxes(quick: bool) -> Iterator[Case]:
    long, short = (lambda n: log_normal(n, 2048, 0.3, 8192, seed=0)), (lambda n: log_normal(n, 128, 0.5, 1024, seed=0))
    shapes = ((64, long, 16), (8192, short, 1), (1024, long, 32), (524_288, short, 1))
    for count, lengths, features in shapes[:: 3 if quick else 1]:
        batch = Batch(lengths(count))
        x = normals(batch.tokens, features, dtype=torch.float32)
        work = f"{count} x ~{2048 if lengths is long else 128} x {features}, float32, {x.numel() * 4 / 1e6:.0f} MB"
        yield from _softmax(batch, work, x)


def _softmax(batch: Batch, work: str, x: torch.Tensor) -> Iterator[Case]:
    rows, segments, offsets = len(batch.lengths), batch.segments, batch.long_offsets

    def scatter(x: torch.Tensor) -> torch.Tensor:
        places = segments[:, None].expand_as(x)
        top = x.new_full((rows, x.shape[1]), -torch.inf).scatter_reduce(0, places, x, "amax").detach()
        e = (x - top[segments]).exp()
        return e / x.new_zeros(rows, x.shape[1]).index_add(0, segments, e)[segments]

    def segment_reduce(x: torch.Tensor) -> torch.Tensor:
        top = torch.segment_reduce(x.detach(), "max", offsets=offsets, axis=0)
        e = (x - top[segments]).exp()
        return e / torch.segment_reduce(e, "sum", offsets=offsets, axis=0)[segments]

    def front_door(name: str) -> Any:
        def contender(x: torch.Tensor) -> Thunk:
            arr = batch.array(x)
            return lambda: kernels.varlen_softmax(arr, implementation=name).values

        return contender

    contenders = {f"scree {name}": front_door(name) for name in ours("varlen_softmax")}
    contenders |= {"torch scatter": plain(scatter), "torch segment_reduce": plain(segment_reduce)}
    contenders |= {"torch.compile scatter": compiled(scatter)}
    yield from forward_and_backward("softmax", work, x, (), contenders, scatter)


def cases(quick: bool) -> Iterator[Case]:
    """Every op that moves memory."""
    from cuda_moves import paddings, reductions, ropes

    yield from norms(quick)
    yield from softmaxes(quick)
    yield from paddings(quick)
    yield from reductions(quick)
    yield from ropes(quick)
