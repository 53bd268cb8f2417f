"""Padding, reductions and rope on a CUDA device beside their peers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from cuda_attention import HEADLINE, log_normal
from cuda_memory import Batch, calls, compiled, forward_and_backward, normals, ours, plain
from cuda_timing import Case, Thunk

import scree
from scree import kernels

HALF = torch.bfloat16


def paddings(quick: bool) -> Iterator[Case]:
    """There and back, forward."""
    for count, middle, features in ((64, 256, 4096), (4096, 128, 512))[: 1 if quick else 2]:
        lengths = log_normal(count, middle, 0.7, 8192, seed=0)
        batch = Batch(lengths)
        x = normals(batch.tokens, features, dtype=HALF)
        size, padded_size = 2.0 * x.numel(), 2.0 * len(lengths) * batch.longest * features
        work = f"{count} x ~{middle} x {features}, bfloat16, {padded_size / 1e9:.2f} GB padded"
        mask = torch.arange(batch.longest, device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
        padded = x.new_zeros(len(lengths), batch.longest, features)
        padded[mask] = x
        yield Case(
            "to_padded",
            work,
            "tbs",
            size + padded_size,
            HALF,
            lambda padded=padded: padded,
            calls(_to_padded(batch, mask), x),
        )
        yield Case(
            "from_padded",
            work,
            "tbs",
            2 * size,
            HALF,
            lambda x=x: x,
            calls(_from_padded(batch, mask, batch.array(x)), padded),
        )


def _to_padded(batch: Batch, mask: torch.Tensor) -> dict[str, Any]:
    def front_door(x: torch.Tensor) -> Thunk:
        arr = batch.array(x)
        return lambda: scree.to_padded(arr)[0]

    def bridge(x: torch.Tensor) -> Thunk:
        arr = batch.array(x)
        return lambda: scree.bridges.to_hf_padded(arr)[0]

    def nested(x: torch.Tensor) -> Thunk:
        jagged = torch.nested.nested_tensor_from_jagged(
            x, batch.long_offsets, min_seqlen=min(batch.lengths), max_seqlen=batch.longest
        )
        return lambda: jagged.to_padded_tensor(0.0)

    def aten(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._jagged_to_padded_dense_forward(x, [batch.long_offsets], [batch.longest], 0.0)

    def boolean(x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(*mask.shape, x.shape[1])
        padded[mask] = x
        return padded

    return {
        "scree": front_door,
        "scree, Hugging Face bridge": bridge,
        "aten jagged_to_padded": plain(aten),
        "torch.nested": nested,
        "boolean mask": plain(boolean),
    }


def _from_padded(batch: Batch, mask: torch.Tensor, arr: scree.Array) -> dict[str, Any]:
    def front_door(padded: torch.Tensor) -> Thunk:
        return lambda: scree.from_padded(padded, mask).values

    def bridge(padded: torch.Tensor) -> Thunk:
        attention_mask = mask.long()
        return lambda: scree.bridges.from_hf_padded(padded, attention_mask).values

    def lengths_of(padded: torch.Tensor) -> Thunk:
        return lambda: scree.from_padded(padded, lengths=arr).values

    def lengths(padded: torch.Tensor) -> Thunk:
        return lambda: scree.from_padded(padded, lengths=batch.lengths).values

    def aten(padded: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._padded_dense_to_jagged_forward(padded, [batch.long_offsets], batch.tokens)

    return {
        "scree": front_door,
        "scree, Hugging Face bridge": bridge,
        "scree, lengths of an Array": lengths_of,
        "scree, lengths on the host": lengths,
        "aten padded_to_jagged": plain(aten),
        "boolean mask": plain(lambda padded: padded[mask]),
    }


def reductions(quick: bool) -> Iterator[Case]:
    """One pass over the array; the result is small."""
    shapes = ((64, 2048, log_normal(64, 2048, 0.3, 8192, seed=0), 512), (8192, 128, _short(8192), 64))
    for count, middle, lengths, features in shapes[: 1 if quick else 2]:
        batch = Batch(lengths)
        x = normals(batch.tokens, features, dtype=torch.float32)
        for op in ("sum", "max", "logsumexp")[: 1 if quick else 3]:
            yield Case(
                f"reduce {op}",
                f"{count} x ~{middle} x {features}, float32, {x.numel() * 4 / 1e6:.0f} MB",
                "tbs",
                4.0 * x.numel(),
                torch.float32,
                lambda op=op, batch=batch, x=x: _exact(op, x, batch),
                calls(_reduce(op, batch), x),
            )


def _short(count: int) -> tuple[int, ...]:
    return log_normal(count, 128, 0.5, 1024, seed=0)


def _exact(op: str, x: torch.Tensor, batch: Batch) -> torch.Tensor:
    rows = x.double().split(list(batch.lengths))
    how = {"sum": lambda r: r.sum(0), "max": lambda r: r.amax(0), "logsumexp": lambda r: r.logsumexp(0)}[op]
    return torch.stack([how(row) for row in rows])


def _reduce(op: str, batch: Batch) -> dict[str, Any]:
    rows = len(batch.lengths)

    def scatter(x: torch.Tensor) -> torch.Tensor:
        if op == "sum":
            return x.new_zeros(rows, x.shape[1]).index_add(0, batch.segments, x)
        places = batch.segments[:, None].expand_as(x)
        top = x.new_full((rows, x.shape[1]), -torch.inf).scatter_reduce(0, places, x, "amax")
        if op == "max":
            return top
        e = (x - top[batch.segments]).exp()
        return top + x.new_zeros(rows, x.shape[1]).index_add(0, batch.segments, e).log()

    def segment_reduce(x: torch.Tensor) -> torch.Tensor:
        offsets = batch.long_offsets
        if op != "logsumexp":
            return torch.segment_reduce(x, op, offsets=offsets, axis=0)
        top = torch.segment_reduce(x, "max", offsets=offsets, axis=0)
        return top + torch.segment_reduce((x - top[batch.segments]).exp(), "sum", offsets=offsets, axis=0).log()

    def front_door(name: str) -> Any:
        def contender(x: torch.Tensor) -> Thunk:
            arr = batch.array(x)
            return lambda: kernels.varlen_reduce(arr, op, implementation=name)  # type: ignore[arg-type]

        return contender

    contenders = {f"scree {name}": front_door(name) for name in ours("varlen_reduce")}
    contenders |= {"torch scatter": plain(scatter), "torch segment_reduce": plain(segment_reduce)}
    return contenders | {"torch.compile scatter": compiled(scatter)}


def ropes(quick: bool) -> Iterator[Case]:
    """Halves that are turned by the place in the sequence."""
    long = log_normal(16, 1800, 0.8, 8192, seed=1)
    for lengths, heads, dim, dtype in ((long, 32, 128, HALF), (HEADLINE, 16, 64, torch.float16))[: 1 if quick else 2]:
        batch = Batch(lengths)
        x = normals(batch.tokens, heads, dim, dtype=dtype)
        angles = torch.arange(8192, device="cuda")[:, None] / 10_000 ** (
            torch.arange(dim // 2, device="cuda") / (dim // 2)
        )
        contenders, exact = _rope(batch, angles.cos(), angles.sin())
        work = f"{batch.tokens} x {heads} x {dim}, {str(dtype).removeprefix('torch.')}"
        yield from forward_and_backward("rope", work, x, (), contenders, exact)


def _rope(batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> tuple[dict[str, Any], Any]:
    places = torch.cat([torch.arange(n) for n in batch.lengths]).cuda()

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        c, s = cos[places][:, None], sin[places][:, None]
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    def quack(x: torch.Tensor) -> Thunk:
        from quack.rotary import apply_rotary_emb

        options = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.longest}
        return lambda: apply_rotary_emb(x, cos, sin, **options)

    def front_door(name: str) -> Any:
        def contender(x: torch.Tensor) -> Thunk:
            arr = batch.array(x)
            return lambda: kernels.varlen_rope(arr, cos, sin, implementation=name).values

        return contender

    contenders = {f"scree {name}": front_door(name) for name in ours("varlen_rope")}
    contenders |= {"torch": plain(by_hand), "torch.compile": compiled(by_hand), "quack": quack}
    return contenders, by_hand
