"""Contests on PyTorch's CPU: `scaled_dot_product_attention` row by row and padded, FlexAttention, native norms."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import scree
from scree import kernels

from ._contest import Contenders, Contest
from ._work import Heads, Tokens, heads, tokens

_Lengths = list[int]
_Call = Callable[..., Any]  # of q, k, v, lengths, offsets
_MOST_SCORES = 1 << 26  # of a padded step: beyond, it takes seconds and is no contender
_NAMES = ("softmax", "sum", "max", "rmsnorm", "layernorm", "rope")


def _ours(q: Any, k: Any, v: Any, lengths: _Lengths, offsets: Any) -> Any:
    arr = scree.Array(q, offsets)
    return kernels.varlen_attention(arr, arr.with_values(k), arr.with_values(v), causal=True).values


def _by_rows(q: Any, k: Any, v: Any, lengths: _Lengths, offsets: Any) -> Any:
    rows = zip(*(x.transpose(0, 1)[None].split(lengths, 2) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True)[0].transpose(0, 1) for row in rows])


def _padded(x: Any, lengths: _Lengths) -> Any:
    return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)


def _unpadded(x: Any, lengths: _Lengths) -> Any:
    return torch.cat([row[:n] for row, n in zip(x.transpose(1, 2), lengths, strict=True)])


def _by_padding(q: Any, k: Any, v: Any, lengths: _Lengths, offsets: Any) -> Any:
    rows = (_padded(x, lengths) for x in (q, k, v))
    return _unpadded(F.scaled_dot_product_attention(*rows, is_causal=True), lengths)


def _by_mask(q: Any, k: Any, v: Any, lengths: _Lengths, offsets: Any) -> Any:
    rows = [_padded(x, lengths) for x in (q, k, v)]
    places = torch.arange(rows[0].shape[2])
    mask = (places < torch.tensor(lengths)[:, None, None]) & (places <= places[:, None])
    return _unpadded(F.scaled_dot_product_attention(*rows, attn_mask=mask[:, None]), lengths)


def _flex(work: Heads) -> _Call:
    """FlexAttention as it is meant to be used: compiled, with its blocks found beforehand, which is not counted."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows = torch.tensor(np.repeat(np.arange(len(work.lengths)), work.lengths))

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (rows[i] == rows[j]) & (i >= j)

    blocks = create_block_mask(seen, None, None, len(rows), len(rows), device="cpu")
    compiled = torch.compile(flex_attention)

    def run(q: Any, k: Any, v: Any, lengths: _Lengths, offsets: Any) -> Any:
        given = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(*given, block_mask=blocks)[0].transpose(0, 1)

    return run


def _step(fn: Callable[..., Any], given: list[Any], grad: Any) -> Any:
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(fn(*leaves), leaves, grad)


def _tensor(x: Any, work: Heads | Tokens) -> Any:
    return torch.tensor(x, dtype=getattr(torch, work.dtype))


def _attention(work: Heads, *, new: bool = False, step: bool = False, flex: bool = False) -> Contenders:
    given, grad = [_tensor(x, work) for x in (work.q, work.k, work.v)], _tensor(work.grad, work)
    lengths = work.others if new else [work.lengths]
    offsets = work.other_offsets if new else [work.offsets]
    calls: dict[str, _Call] = {"scree": _ours, "SDPA a sequence": _by_rows}
    if not new:  # padding takes the longer, the more the lengths differ, and nothing else is new about it
        if not step or len(work.lengths) * max(work.lengths) ** 2 * work.q.shape[1] <= _MOST_SCORES:
            calls["SDPA padded, is_causal"] = _by_padding
        if not step:
            calls["SDPA padded, mask"] = _by_mask
    if flex and shutil.which("c++") is not None:
        calls["FlexAttention compiled"] = _flex(work)

    def contender(fn: _Call) -> Callable[[], Any]:
        turns = itertools.cycle(zip(lengths, offsets, strict=True))

        def run() -> Any:
            some, bounds = next(turns)
            of_rows = {"lengths": some, "offsets": torch.from_numpy(bounds)}
            call = functools.partial(fn, **of_rows)
            return _step(call, given, grad) if step else call(*given)

        return run

    return {name: contender(fn) for name, fn in calls.items()}


def _rope(x: Any, cos: Any, sin: Any, places: Any) -> Any:
    c, s = cos[places][:, None], sin[places][:, None]
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def _forward(work: Tokens) -> dict[str, dict[str, Callable[[Any], Any]]]:
    offsets, n = torch.from_numpy(work.offsets), work.lengths
    w, b, cos, sin = (_tensor(x, work) for x in (work.weight, work.bias, work.cos, work.sin))
    long = offsets.long()

    def arr(x: Any) -> Any:
        return scree.Array(x, offsets)

    def rows(x: Any) -> Any:
        return x.split(n)

    places = scree.position_ids(arr(_tensor(work.x, work)))
    of_heads = (-1, work.features // 64, 64)
    return {
        "softmax": {
            "scree": lambda x: kernels.varlen_softmax(arr(x)).values,
            "softmax a sequence": lambda x: torch.cat([torch.softmax(row, 0) for row in rows(x)]),
        },
        "sum": {
            "scree": lambda x: kernels.varlen_reduce(arr(x), "sum"),
            "sum a sequence": lambda x: torch.stack([row.sum(0) for row in rows(x)]),
            "segment_reduce": lambda x: torch.segment_reduce(x, "sum", offsets=long, axis=0),
        },
        "max": {
            "scree": lambda x: kernels.varlen_reduce(arr(x), "max"),
            "amax a sequence": lambda x: torch.stack([row.amax(0) for row in rows(x)]),
            "segment_reduce": lambda x: torch.segment_reduce(x, "max", offsets=long, axis=0),
        },
        "rmsnorm": {
            "scree": lambda x: kernels.varlen_rmsnorm(arr(x), w).values,
            "F.rms_norm": lambda x: F.rms_norm(x, w.shape, w, 1e-6),
        },
        "layernorm": {
            "scree": lambda x: kernels.varlen_layernorm(arr(x), w, b).values,
            "F.layer_norm": lambda x: F.layer_norm(x, w.shape, w, b),
        },
        "rope": {
            "scree": lambda x: kernels.varlen_rope(arr(x.view(of_heads)), cos, sin).values.view(x.shape),
            "by hand": lambda x: _rope(x.view(of_heads), cos, sin, places).view(x.shape),
        },
    }


def _tokens(op: str, work: Tokens, *, step: bool) -> Contenders:
    x, grad = _tensor(work.x, work), _tensor(work.grad, work)
    if op in ("sum", "max"):
        grad = grad[: len(work.lengths)].clone()
    calls = _forward(work)[op]
    if work.dtype != "float32":
        calls.pop("segment_reduce", None)  # adds up in the dtype itself: another result
    if step:
        return {name: functools.partial(_step, fn, [x], grad) for name, fn in calls.items()}
    return {name: functools.partial(fn, x) for name, fn in calls.items()}


def contests() -> list[Contest]:
    """Give the contests of PyTorch on the CPU."""
    found: list[Contest] = []
    for i, work in enumerate(heads()):
        # The backward multiplies five matrices where the forward multiplies two.
        for op, flops, quick, make in (
            ("attention", work.flops, i == 0, functools.partial(_attention, work, flex=i > 0)),
            ("attention, new lengths", work.other_flops, False, functools.partial(_attention, work, new=True)),
            ("attention step", 3.5 * work.flops, i == 0, functools.partial(_attention, work, step=True)),
            (
                "attention step, new lengths",
                3.5 * work.other_flops,
                False,
                functools.partial(_attention, work, new=True, step=True),
            ),
        ):
            found.append(Contest(op, "torch", work.name, flops, 0, quick, make))
    rows = tokens()
    for op in _NAMES:
        passes = 1 if op in ("sum", "max") else 2
        make = functools.partial(_tokens, op, rows, step=False)
        quick = op in ("softmax", "sum", "layernorm")
        found.append(Contest(op, "torch", rows.name, 0.0, rows.x.nbytes * passes, quick, make))
    for op in _NAMES:
        make = functools.partial(_tokens, op, rows, step=True)
        found.append(Contest(f"{op} step", "torch", rows.name, 0.0, rows.x.nbytes * 3, False, make))
    return found + _of_halves()


def _of_halves() -> list[Contest]:
    """The contests on bfloat16, in which the contenders compute in float32 or narrower."""
    found: list[Contest] = []
    for work in heads("bfloat16"):
        for op, flops, step in (("attention", work.flops, False), ("attention step", 3.5 * work.flops, True)):
            make = functools.partial(_attention, work, step=step)
            found.append(Contest(op, "torch", work.name, flops, 0, False, make))
    rows = tokens("bfloat16")
    for op in ("softmax", "sum", "rmsnorm"):
        make = functools.partial(_tokens, op, rows, step=False)
        size = rows.x.nbytes // 2
        found.append(Contest(op, "torch", rows.name, 0.0, size if op == "sum" else 2 * size, False, make))
    return found
