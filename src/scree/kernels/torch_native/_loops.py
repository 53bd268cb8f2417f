"""The flash kernel of the CPU on row after row, in loops that TorchScript's interpreter runs.

On a short row the kernel takes no longer than the Python around it: views of its tokens, the call, the copy of what it
gives. So the loops over rows of which a call sees all, or what is causal, are written in what TorchScript knows of Python.
Where there is no TorchScript they run as Python: the same calls, and the same bits.

Tensors are (1, H, T, D), or (K, H / K, T, D) with grouped queries; rows lie one behind the other along the third axis.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def last_span(n: int, step: int, most: int) -> int:
    """Where the last span of a causal row begins. They begin `step` apart; the last is at most half as long again.

    A row of less than two spans, or of more than `most` tokens, is one.
    """
    begin = 0
    if 2 * step <= n <= most:
        while n - begin >= step + step // 2:
            begin += step
    return begin


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor | None,
    n: list[int],
    m: list[int],
    causal: bool,
    step: int,
    corner: Tensor,
    scale: float,
) -> None:
    """Write o, which may have fewer features than v, and lse (1, H, T) of every row.

    With `causal` rows have as many keys as queries, and are cut into spans; the mask of one is a part of `corner`, at its
    lower right. In its dtype everything is computed.
    """
    qs, ks, vs = q.split_with_sizes(n, 2), k.split_with_sizes(m, 2), v.split_with_sizes(m, 2)
    os = o.split_with_sizes(n, 2)
    sums = os if lse is None else lse.split_with_sizes(n, 2)
    dtype, below, right = corner.dtype, corner.size(0), corner.size(1)
    as_it_is = q.dtype == dtype and k.dtype == dtype and v.dtype == dtype
    features, narrower = o.size(3), o.size(3) < v.size(3)
    for row in range(len(n)):
        end = n[row]
        if m[row] == 0:
            os[row].zero_()
            if lse is not None:
                sums[row].fill_(-float("inf"))
        elif end > 0:
            qr, kr, vr = qs[row], ks[row], vs[row]
            if not as_it_is:
                qr, kr, vr = qr.to(dtype), kr.to(dtype), vr.to(dtype)
            last = last_span(end, step, right) if causal else 0
            if last == 0:
                y, z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qr, kr, vr, 0.0, causal, scale=scale)
                # Written at once: its memory serves the next call, and is in the cache.
                os[row].copy_(y.narrow(3, 0, features) if narrower else y)
                if lse is not None:
                    sums[row].copy_(z)
            else:
                for first in range(0, last + 1, step):
                    some = end - first if first == last else step
                    mask: Tensor | None = None
                    if first > 0:
                        mask = corner[below - some :, right - first - some :]
                    y, z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                        qr.narrow(2, first, some),
                        kr.narrow(2, 0, first + some),
                        vr.narrow(2, 0, first + some),
                        0.0,
                        first == 0,
                        attn_mask=mask,
                        scale=scale,
                    )
                    os[row].narrow(2, first, some).copy_(y.narrow(3, 0, features) if narrower else y)
                    if lse is not None:
                        sums[row].narrow(2, first, some).copy_(z)


def backward(
    g: Tensor,
    q: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    k: Tensor,
    v: Tensor,
    dk: Tensor,
    dv: Tensor,
    n: list[int],
    m: list[int],
    causal: bool,
    step: int,
    corner: Tensor,
    scale: float,
) -> None:
    """Write dq, and dk and dv (1, K, T, D), of every row, as in the forward; they may have fewer features than q, k, v."""
    qs, ks, vs = q.split_with_sizes(n, 2), k.split_with_sizes(m, 2), v.split_with_sizes(m, 2)
    gs, os, sums = g.split_with_sizes(n, 2), o.split_with_sizes(n, 2), lse.split_with_sizes(n, 2)
    dqs, dks, dvs = dq.split_with_sizes(n, 2), dk.split_with_sizes(m, 2), dv.split_with_sizes(m, 2)
    dtype, below, right = corner.dtype, corner.size(0), corner.size(1)
    group = k.size(0) * k.size(1) // dk.size(1)
    for row in range(len(n)):
        end = n[row]
        if end == 0 or m[row] == 0:
            dqs[row].zero_()
            dks[row].zero_()
            dvs[row].zero_()
        else:
            gr, qr, kr, vr = gs[row].to(dtype), qs[row].to(dtype), ks[row].to(dtype), vs[row].to(dtype)
            last = last_span(end, step, right) if causal else 0
            dkr, dvr = kr, vr
            for first in range(last, -1, -step):  # the last span sees all keys
                some = end - first if first == last else step
                seen = first + some if causal else m[row]
                mask: Tensor | None = None
                if first > 0:
                    mask = corner[below - some :, right - seen :]
                x, y, z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    gr.narrow(2, first, some),
                    qr.narrow(2, first, some),
                    kr.narrow(2, 0, seen),
                    vr.narrow(2, 0, seen),
                    os[row].narrow(2, first, some),
                    sums[row].narrow(2, first, some),
                    0.0,
                    causal and first == 0,
                    attn_mask=mask,
                    scale=scale,
                )
                dqs[row].narrow(2, first, some).copy_(x.narrow(3, 0, dq.size(3)))
                if first == last:
                    dkr, dvr = y, z
                else:
                    dkr.narrow(2, 0, seen).add_(y)
                    dvr.narrow(2, 0, seen).add_(z)
            if group > 1:
                dkr, dvr = summed(dkr), summed(dvr)
            dks[row].copy_(dkr.narrow(3, 0, dk.size(3)))
            dvs[row].copy_(dvr.narrow(3, 0, dv.size(3)))


def summed(x: Tensor) -> Tensor:
    """(K, G, m, D) to (1, K, m, D), added up over the group in order."""
    total = x.select(1, 0)
    for head in range(1, x.size(1)):
        total = total + x.select(1, head)
    return total.unsqueeze(0)


@functools.cache
def scripted(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop for TorchScript's interpreter, once; or give it as it is where that is not to be had."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is deprecated about it is not for the caller to change
        try:
            return torch.jit.script(loop)
        except (AttributeError, OSError, RuntimeError):  # it is gone, or sees no source, or knows less of Python
            return loop
