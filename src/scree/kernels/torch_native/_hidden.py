"""Keys and values that are not finite, and the queries that a mask hides them from.

A mask gives a hidden key the weight 0, and 0 * NaN is NaN; an additive one gives it NaN at once. So queries that see such
a key never share a matrix with queries that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import Span, spans
from ._common import wide

_Limits = tuple[int | None, int | None]
_LARGE = 1 << 20  # elements
_KERNEL_QUERIES = 32  # the flash kernel's blocks of queries have so many, or a multiple


def is_finite(x: Tensor) -> bool:
    """Whether all values of x are finite, or, rarely, false where they are too large to be added up."""
    if x.is_contiguous() and x.dtype == wide(x.dtype):
        x = x.view(-1)
        return math.isfinite(float(torch.dot(x, x)))  # quicker than a sum, whose threads have to be woken
    return math.isfinite(float(x.sum(dtype=wide(x.dtype))))


def witnesses_finite(x: Tensor, pieces: list[int]) -> bool:
    """Whether what the flash kernel computed shows no sign of a key or a value that is not finite and hidden.

    The kernel multiplies matrices of a block of queries of one call: what comes through to any of them comes through to the
    first, which sees no more keys than the others under `causal`, and with a window has as many hidden.

    Parameters
    ----------
    x : Tensor of (T, heads, D)
        The output, or the gradient of q.
    pieces : list of int
        How many queries each call had, in order.
    """
    if x.numel() <= _LARGE:  # quicker to look at whole
        return is_finite(x)
    first: list[int] = []
    end = 0
    for n in pieces:
        first.extend(range(end, end + n, _KERNEL_QUERIES))
        end += n
    return is_finite(x.index_select(0, torch.tensor(first, dtype=torch.int32)))


def not_finite(k: Tensor, v: Tensor, k_offsets: HostInts, limits: _Limits) -> dict[int, list[int]]:
    """The places in their row of the keys of which k or v has a value that is not finite, by row.

    Empty where nothing is hidden.
    """
    if limits == (None, None):
        return {}
    used = int(k_offsets[-1])
    k, v = k[:used], v[:used]
    if is_finite(k) and is_finite(v):
        return {}
    finite = k.isfinite().flatten(1).all(1) & v.isfinite().flatten(1).all(1)
    found: dict[int, list[int]] = {}
    for key in np.flatnonzero(~finite.cpu().numpy()).tolist():
        row = int(np.searchsorted(k_offsets, key, side="right")) - 1
        found.setdefault(row, []).append(key - int(k_offsets[row]))
    return found


def cut_spans(n: int, m: int, limits: _Limits, most: int, keys: list[int]) -> Iterator[Span]:
    """`spans`, cut once more so that the queries of one see each of these keys all, or see it none.

    Then none of a span that no query sees lies between its low and its high.
    """
    left, right = limits
    shift = m - n
    at: set[int] = set()
    if right is not None:
        at.update(key - right - shift for key in keys)  # the first query that sees it
    if left is not None:
        at.update(key + left + 1 - shift for key in keys)  # and the first after the last
    for span in spans(n, m, left, right, most):
        inner = [i for i in at if span.first < i < span.last] if at else []
        bounds = [span.first, *sorted(inner), span.last]
        for first, last in zip(bounds, bounds[1:], strict=False):
            low = span.low if left is None else max(span.low, first + shift - left)
            high = span.high if right is None else min(span.high, last + shift + right)
            yield Span(first, last, low, high)
