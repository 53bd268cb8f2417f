"""Attention on a CUDA device beside its peers: forward, backward and both."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from cuda_timing import Case, Thunk

import scree
from scree import kernels
from scree.kernels import triton as fast
from scree.kernels._dispatch import TABLE

HEADLINE = (512, 1024, 768, 256, 2048, 384, 896, 640, 1536, 320, 1152, 480, 704, 192, 832, 416)


def log_normal(count: int, middle: float, sigma: float, most: int, seed: int) -> tuple[int, ...]:
    """Lengths that one seed gives everywhere."""
    normals = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return tuple(torch.exp(math.log(middle) + sigma * normals).long().clamp(1, most).tolist())


class Work:
    """One batch of sequences, with everything that a contender starts from."""

    def __init__(
        self, name: str, lengths: tuple[int, ...], heads: tuple[int, int, int], dtype: torch.dtype, causal: bool
    ) -> None:
        self.lengths, self.dtype, self.causal = lengths, dtype, causal
        self.heads, self.kv_heads, self.dim = heads
        self.tokens, self.longest = sum(lengths), max(lengths)
        self.name = name
        pairs = sum(n * n for n in lengths) / (2 if causal else 1)
        self.flops = 4.0 * pairs * self.heads * self.dim

    def make(self) -> None:
        """Put the tensors on the device."""
        random = torch.Generator("cuda").manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(self.tokens, heads, self.dim, generator=random, device="cuda").to(self.dtype)

        self.q, self.k, self.v, self.grad = map(normal, (self.heads, self.kv_heads, self.kv_heads, self.heads))
        self.cu_seqlens = torch.tensor([0, *self.lengths]).cumsum(0).int().cuda()

    @functools.cached_property
    def want(self) -> tuple[torch.Tensor, ...]:
        """The output and dq, dk, dv in float32, one sequence at a time."""
        leaves = [x.detach().float().requires_grad_() for x in (self.q, self.k, self.v)]
        out, start, group = [], 0, self.heads // self.kv_heads
        grads = [torch.zeros_like(x) for x in leaves]
        for n in self.lengths:
            row = slice(start, start + n)
            q, k, v = (x[row].detach().transpose(0, 1).requires_grad_() for x in leaves)
            scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) / math.sqrt(self.dim)
            if self.causal:
                scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device="cuda").triu(1), -math.inf)
            o = scores.softmax(-1) @ v.repeat_interleave(group, 0)
            for whole, part in zip(
                grads, torch.autograd.grad(o, (q, k, v), self.grad[row].float().transpose(0, 1)), strict=True
            ):
                whole[row] = part.transpose(0, 1)
            out.append(o.detach().transpose(0, 1))
            start += n
        return torch.cat(out), *grads


WORKS = (
    ("16 sequences, 16 heads of 64, fp16, causal", HEADLINE, (16, 16, 64), torch.float16, True),
    (
        "16 log-normal ~1800, 32/8 heads of 128, bf16, causal",
        log_normal(16, 1800, 0.8, 8192, seed=1),
        (32, 8, 128),
        torch.bfloat16,
        True,
    ),
    ("4 x 8192, 16 heads of 128, bf16, causal", (8192,) * 4, (16, 16, 128), torch.bfloat16, True),
    ("4 x 4096, 16 heads of 128, bf16, full", (4096,) * 4, (16, 16, 128), torch.bfloat16, False),
    (
        "512 log-normal ~128, 12 heads of 64, bf16, full",
        log_normal(512, 128, 0.7, 512, seed=2),
        (12, 12, 64),
        torch.bfloat16,
        False,
    ),
)

PORTABLE = "scree, portable kernels"

# A contender is a function of a workload and its q, k, v: it prepares what does not count, and gives the call.
Contender = Callable[[Work, torch.Tensor, torch.Tensor, torch.Tensor], Thunk]


def front_door(implementation: str) -> Contender:
    def prepare(work: Work, *qkv: torch.Tensor) -> Thunk:
        q, k, v = (scree.Array(x, work.cu_seqlens) for x in qkv)
        return lambda: kernels.varlen_attention(q, k, v, work.causal, implementation=implementation).values

    return prepare


def tensors(**options: Any) -> Contender:
    def prepare(work: Work, *qkv: torch.Tensor) -> Thunk:
        return lambda: fast.varlen_attention_triton(*qkv, work.cu_seqlens, work.causal, **options)

    return prepare


def portable(work: Work, *qkv: torch.Tensor) -> Thunk:
    """Triton's plain kernels, where Hopper has others of its own; the backward too, so the call must hold it."""
    cu_seqlens, causal = work.cu_seqlens.clone(), work.causal  # what is prepared is kept with it
    return lambda: fast.varlen_attention_triton(*qkv, cu_seqlens, causal)


def without_hopper(run: Thunk) -> Thunk:
    """The same call with Hopper's kernels refused; an error if nobody ever asked for them, as it measured something else."""
    from scree.kernels.triton import _hopper, _hopper_bwd, _hopper_pair

    places = [(module, module.why_not) for module in (_hopper, _hopper_bwd, _hopper_pair)]
    asked = []

    def refuse(*_: Any) -> str:
        asked.append(True)
        return "these are the portable kernels"

    def refused() -> Any:
        for module, _ in places:
            module.why_not = refuse
        try:
            result = run()
        finally:
            for module, why_not in places:
                module.why_not = why_not
        if not asked:
            raise RuntimeError("the portable kernels were not what ran")
        return result

    return refused


def flash_2(work: Work, *qkv: torch.Tensor) -> Thunk:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest, window = work.cu_seqlens, work.longest, (-1, 0 if work.causal else -1)
    return lambda: varlen_attn(*qkv, cu, cu, longest, longest, window_size=window)


def flash_4(work: Work, *qkv: torch.Tensor) -> Thunk:
    from flash_attn.cute import flash_attn_varlen_func

    options = {"cu_seqlens_q": work.cu_seqlens, "cu_seqlens_k": work.cu_seqlens, "causal": work.causal}
    options |= {"max_seqlen_q": work.longest, "max_seqlen_k": work.longest}

    def run() -> torch.Tensor:
        result = flash_attn_varlen_func(*qkv, **options)
        return result[0] if isinstance(result, tuple) else result

    return run


def dense_cudnn(work: Work, *qkv: torch.Tensor) -> Thunk:
    if len(set(work.lengths)) > 1:
        raise ValueError("the lengths differ")
    rows = [x.view(len(work.lengths), work.longest, *x.shape[1:]).transpose(1, 2) for x in qkv]
    grouped = work.heads != work.kv_heads

    def run() -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*rows, is_causal=work.causal, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(work.tokens, work.heads, work.dim)

    return run


def pad_and_unpad(work: Work, *qkv: torch.Tensor) -> Thunk:
    if len(set(work.lengths)) == 1:
        raise ValueError("nothing to pad")
    count, longest = len(work.lengths), work.longest
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(work.lengths)]).cuda()
    keys = torch.arange(longest, device="cuda") < torch.tensor(work.lengths, device="cuda")[:, None]
    mask = None if work.causal else keys[:, None, None, :].expand(count, 1, longest, longest)
    grouped = work.heads != work.kv_heads

    def run() -> torch.Tensor:
        padded = [
            x.new_zeros(count * longest, *x.shape[1:])
            .index_copy(0, places, x)
            .view(count, longest, *x.shape[1:])
            .transpose(1, 2)
            for x in qkv
        ]
        out = F.scaled_dot_product_attention(*padded, mask, is_causal=work.causal, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(count * longest, work.heads, work.dim).index_select(0, places)

    return run


PEERS: dict[str, Contender] = {
    "FlashAttention-2 (torch varlen_attn)": flash_2,
    "FlashAttention-4 (flash_attn.cute)": flash_4,
    "dense cuDNN": dense_cudnn,
    "pad, SDPA, unpad": pad_and_unpad,
}


def ours() -> dict[str, Contender]:
    """Every implementation of the table that is chosen on CUDA, and the backward that does not promise equal bits."""
    found = {
        f"scree {impl.name}": front_door(impl.name)
        for impl in TABLE["varlen_attention"]
        if "torch" in (impl.backends or ()) and "cuda" in (impl.devices or ()) and not impl.on_request
    }
    if "deterministic" in _options():
        found["scree, deterministic=False"] = tensors(deterministic=False)
    if torch.cuda.get_device_capability() == (9, 0):
        found[PORTABLE] = portable
    return found


def _options() -> tuple[str, ...]:
    try:
        from scree.kernels.triton import _attention
    except ImportError:
        return ()
    return tuple(inspect.signature(_attention.varlen_attention_triton).parameters)


def cases(quick: bool) -> Iterator[Case]:
    """Forward, backward and both of every workload."""
    for name, *rest in WORKS[:: 4 if quick else 1]:
        work = Work(f"{name}, {sum(rest[0])} tokens", *rest)
        work.make()
        yield _case("attention forward", work, 1.0, _forward, lambda work=work: work.want[:1])
        yield _case("attention backward", work, 2.5, _backward, lambda work=work: work.want[1:])
        yield _case("attention forward and backward", work, 3.5, _both, lambda work=work: work.want)


def _case(op: str, work: Work, flops: float, how: Callable[[Work, Contender], Thunk], want: Callable[[], Any]) -> Case:
    contenders = ours() | PEERS
    if how is _forward:
        contenders.pop("scree, deterministic=False", None)
    return Case(
        op=op,
        work=work.name,
        unit="tflops",
        amount=flops * work.flops,
        dtype=work.dtype,
        want=want,
        contenders={name: (lambda name=name, c=c: [_run(name, how(work, c))]) for name, c in contenders.items()},
        tensors={"scree triton": lambda: how(work, tensors())},
    )


def _run(name: str, run: Thunk) -> Thunk:
    return without_hopper(run) if name == PORTABLE else run


def _leaves(work: Work) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in (work.q, work.k, work.v)]


def _forward(work: Work, contender: Contender) -> Thunk:
    return contender(work, work.q, work.k, work.v)


def _backward(work: Work, contender: Contender) -> Thunk:
    leaves = _leaves(work)
    out = contender(work, *leaves)()
    return lambda: torch.autograd.grad(out, leaves, work.grad, retain_graph=True)


def _both(work: Work, contender: Contender) -> Thunk:
    leaves = _leaves(work)
    forward = contender(work, *leaves)

    def run() -> tuple[torch.Tensor, ...]:
        out = forward()
        return out, *torch.autograd.grad(out, leaves, work.grad)

    return run
