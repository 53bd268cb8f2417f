"""Sums, extremes and spreading over rows: of any lengths in one call on the CPU, elsewhere rows of one length together.

On the CPU a sum is that of `embedding_bag`, which adds up tokens in order, and an extreme that of `scatter_reduce_`, which
goes through sorted rows: both take rows one by one, each the same way whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..._backends._protocol import HostInts
from .._rows import TOGETHER, alike
from ._common import on, wide

_INF = float("inf")
_CHUNK = 128  # terms of a sum that are added up one after the other
_RUN = 4096  # those of a sum that is rounded to halves: what they lose in float32 is less than that
_FEW = 16  # features: of fewer, NumPy finds extremes faster
_BLOCK = 1 << 18  # elements of rows that are computed together: what stays in the cache
_SPLIT = 1 << 17  # elements: a longer row is computed some columns at a time


class Group(Protocol):
    """Some rows and what can be done along them; the tokens are (T, F), or (G, n, F) for rows of one length."""

    def sum(self, x: Tensor) -> Tensor:
        """Add up the tokens of each row: (G, F)."""
        ...

    def extreme(self, x: Tensor, op: str) -> Tensor:
        """Find the "amax" or "amin" of the tokens of each row: (G, F); NaN where one is NaN."""
        ...

    def count(self, x: Tensor) -> Tensor | int:
        """How many tokens each row has."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """Give (G, F) to each token: what broadcasts with the tokens."""
        ...


class Together:
    """Rows on the CPU that lie one behind the other, of any lengths; floating values.

    Parameters
    ----------
    bounds : array of (G + 1,), integer
        Where they begin and end in the tokens that the methods are given.
    """

    def __init__(self, bounds: HostInts) -> None:
        self.bounds = bounds.astype(np.int64, copy=False)
        self.lengths = np.diff(self.bounds)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """The number of the row of every token."""
        if self._rows is None:
            self._rows = torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths))
        return self._rows

    def spread(self, x: Tensor) -> Tensor:
        """(G, F) to (T, F)."""
        return x.expand(int(self.bounds[-1]), -1) if len(x) == 1 else x.index_select(0, self.rows)

    def sum(self, x: Tensor) -> Tensor:
        """Add up tokens in the wide dtype, in chunks, so that no sum is a long row of additions."""
        if not x.numel():
            return x.new_zeros((len(self.lengths), x.shape[1]))
        chunks = -(-self.lengths // _CHUNK)
        if chunks.max() <= 1:
            return _bags(x, self.bounds)
        ends = np.cumsum(chunks)
        places = np.arange(ends[-1]) - np.repeat(ends - chunks, chunks)
        starts = np.repeat(self.bounds[:-1], chunks) + places * _CHUNK
        return Together(np.append(0, ends)).sum(_bags(x, np.append(starts, self.bounds[-1])))

    def sum_of_halves(self, x: Tensor) -> Tensor:
        """Add up tokens of a narrow dtype in float32, and round once."""
        if not x.numel():
            return x.new_zeros((len(self.lengths), x.shape[1]))
        out = _bags(x, self.bounds)
        for row in np.flatnonzero(self.lengths > _RUN).tolist():
            some = x[int(self.bounds[row]) : int(self.bounds[row + 1])]
            out[row] = some.sum(0, dtype=torch.float32)
        return out

    def count(self, x: Tensor) -> Tensor:
        """How many tokens each row has, (G, 1), in the dtype to compute in."""
        return torch.from_numpy(self.lengths)[:, None].to(wide(x.dtype))

    def extreme(self, x: Tensor, op: str) -> Tensor:
        """Find it in the dtype of x."""
        if x.shape[1] < _FEW:
            return self._extreme_of_few(x, op)
        worst = -_INF if op == "amax" else _INF
        if "fbgemm" in torch.backends.quantized.supported_engines:  # what sorts the rows; without, it goes by elements
            out = x.new_full((len(self.lengths), x.shape[1]), worst)
            return out.scatter_reduce_(0, self.rows[:, None].expand(-1, x.shape[1]), x, op)
        extreme, nothing = getattr(torch, op), x.new_full((x.shape[1],), worst)
        found = [extreme(row, 0) if len(row) else nothing for row in x.split(self.lengths.tolist())]
        return torch.stack(found) if found else x.new_empty((0, x.shape[1]))

    def _extreme_of_few(self, x: Tensor, op: str) -> Tensor:
        out = x.new_full((len(self.lengths), x.shape[1]), -_INF if op == "amax" else _INF)
        filled = np.flatnonzero(self.lengths)
        if len(filled):
            pick = np.maximum if op == "amax" else np.minimum
            turned = x.to(wide(x.dtype)).t().contiguous().numpy()
            found = pick.reduceat(turned, self.bounds[filled], axis=1)
            out[torch.from_numpy(filled)] = torch.from_numpy(found).t().to(x.dtype)
        return out


def _bags(x: Tensor, bounds: HostInts) -> Tensor:
    """Sum of the tokens (T, F) of each bag, in the dtype of x; added up in that or in float32."""
    kind = torch.int32 if len(x) < 1 << 31 else torch.int64
    tokens, starts = torch.arange(len(x), dtype=kind), torch.from_numpy(bounds).to(kind)
    return torch.embedding_bag(x, tokens, starts, False, 0, False, None, True)[0]


def blocks(bounds: HostInts, tokens: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of about so many tokens, each from row a to before row b."""
    a, last = 0, len(bounds) - 1
    while a < last:
        b = int(np.searchsorted(bounds, bounds[a] + tokens, side="right")) - 1
        b = min(max(b, a + 1), last)
        yield a, b
        a = b


def _runs(bounds: HostInts, features: int) -> Iterator[tuple[int, int]]:
    """Cut all rows into runs: long rows alone, as `TOGETHER` has it, and the short ones between them."""
    a = 0
    for row in [*long_rows(bounds, features), len(bounds) - 1]:
        for i, j in blocks(bounds[a : row + 1], _BLOCK // max(features, 1)):
            yield a + i, a + j
        if row < len(bounds) - 1:
            yield row, row + 1
        a = row + 1


def long_rows(bounds: HostInts, features: int) -> list[int]:
    """The rows that are computed alone, in the order of memory."""
    return np.flatnonzero(np.diff(bounds).astype(np.int64) * features > TOGETHER).tolist()


def _columns(length: int, features: int) -> int:
    """How many columns of a row to compute at a time: a matter of the row's own shape."""
    if length * features <= _SPLIT:
        return max(features, 1)
    return max(16, _SPLIT // length // 16 * 16)


class Alike:
    """Rows of one length, as (G, n, F): torch adds up the middle axis column by column, the same way for every G."""

    def sum(self, x: Tensor) -> Tensor:
        """Add up the middle axis."""
        return x.sum(1, dtype=x.dtype)

    def extreme(self, x: Tensor, op: str) -> Tensor:
        """Find the amax or amin of the middle axis."""
        return x.amax(1) if op == "amax" else x.amin(1)

    def count(self, x: Tensor) -> int:
        """The size of the middle axis."""
        return x.shape[1]

    def spread(self, x: Tensor) -> Tensor:
        """(G, F) to (G, 1, F)."""
        return x[:, None]


class Part(NamedTuple):
    """Some rows, and some of their columns, that are computed at once.

    Attributes
    ----------
    group : Group
    numbers : slice or Tensor
        Which rows.
    tokens : slice or Tensor
        Their tokens.
    columns : slice
    length : int, optional
        Of every row, where they are to be stacked.
    """

    group: Group
    numbers: slice | Tensor
    tokens: slice | Tensor
    columns: slice
    length: int | None

    def of_tokens(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Their tokens of x (T, F), contiguous, in another dtype: as the group takes them."""
        some = x[self.tokens, self.columns].to(dtype).contiguous()
        return some if self.length is None else some.view(-1, self.length, some.shape[1])

    def of_rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What x (B, F) has for them, in another dtype."""
        return x[self.numbers, self.columns].to(dtype)

    def write_tokens(self, out: Tensor, y: Tensor) -> None:
        """Put the result for their tokens in its place in out (T, F)."""
        out[self.tokens, self.columns] = y.view(-1, y.shape[-1]).to(out.dtype)

    def write_rows(self, out: Tensor, y: Tensor) -> None:
        """Put the result for the rows in its place in out (B, F)."""
        out[self.numbers, self.columns] = y.to(out.dtype)


def parts(bounds: HostInts, x: Tensor, *, short: bool = False) -> Iterator[Part]:
    """Go through the rows of x (T, F), or through the short ones alone: how depends on where x is, and on its dtype."""
    features = x.shape[1]
    if x.device.type == "cpu" and x.is_floating_point():
        for a, b in _runs(bounds, features):
            first, last = int(bounds[a]), int(bounds[b])
            if first == last:
                continue
            if (last - first) * features <= TOGETHER or b - a > 1:
                group = Together(bounds[a : b + 1] - bounds[a])
                yield Part(group, slice(a, b), slice(first, last), slice(0, features), None)
            elif not short:
                step = _columns(last - first, features)
                for c in range(0, features, step):
                    columns = slice(c, min(c + step, features))
                    yield Part(Alike(), slice(a, b), slice(first, last), columns, last - first)
        return
    for rows in alike(bounds, features, only_short=short):
        tokens = slice(int(rows.starts[0]), int(rows.starts[-1]) + rows.length) if rows.adjacent else None
        some = on(x, rows.tokens()) if tokens is None else tokens
        step = features if rows.short else _columns(rows.length, features)
        for c in range(0, features, step):
            columns = slice(c, min(c + step, features))
            yield Part(Alike(), on(x, rows.numbers), some, columns, rows.length)
