"""Moving tokens between the packed and the padded layout, and between rows.

Each move is written twice: over host memory with NumPy, which copies whole tokens as opaque bytes and allocates well,
and as one gather over any backend, for devices, traces and gradients. `_packing` and `Array` choose by what
`Backend.host_view` answers. Where the backend has kernels of its own for a move on the device (`Backend.moves`), those
come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _check, _offsets
from ._backends import Backend, Dense
from ._backends._protocol import HostArray, HostInts


def moved_to_front(xp: Backend, x: Dense, axis: int) -> Dense:
    """x with `axis` first, the other axes in order."""
    if axis == 0:
        return x
    return xp.permute_dims(x, (axis, *(i for i in range(x.ndim) if i != axis)))


def moved_from_front(xp: Backend, x: Dense, axis: int) -> Dense:
    """The inverse of `moved_to_front`."""
    if axis == 0:
        return x
    return xp.permute_dims(x, (*range(1, axis + 1), 0, *range(axis + 1, x.ndim)))


def take_tokens(xp: Backend, values: Dense, index: HostInts, axis: int) -> Dense:
    """Gather tokens by an index that is known on the host."""
    host = xp.host_view(values)
    if host is not None:
        return xp.adopt(np.take(host, index, axis=axis), values)
    if index.size == 0:
        return values[(*(slice(None),) * axis, slice(0, 0))]
    if values.shape[axis] < 2**31:
        index = index.astype(np.int32, copy=False)
    return xp.take(values, xp.asarray(index, values), axis)


def mask_host(offsets: HostInts, n: int, side: str) -> HostArray:
    """(B, n) bool: true at the tokens of rows with these offsets."""
    places = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    lengths = offsets[1:] - offsets[:-1]
    if side == "right":
        return places < lengths.astype(places.dtype, copy=False)[:, None]
    return places >= (n - lengths).astype(places.dtype, copy=False)[:, None]


def pad_host(values: HostArray, mask: HostArray, fill: HostArray | None) -> HostArray:
    """Spread `values` (T, *F) over the true places of `mask` (B, N); `fill` (None: zero) elsewhere. (B, N, *F)."""
    shape = mask.shape + values.shape[1:]
    padded = np.zeros(shape, values.dtype) if fill is None else np.full(shape, fill, values.dtype)
    source, target = _as_tokens(values, 1), _as_tokens(padded, 2)
    if source is None or target is None:
        padded[mask] = values
    else:
        target[mask] = source
    return padded


def unpad_host(padded: HostArray, mask: HostArray) -> HostArray:
    """Collect the true places of `mask` (B, N) from `padded` (B, N, *F), in order. (T, *F)."""
    tokens = _as_tokens(padded, 2)
    if tokens is None:
        return padded[mask]
    kept = tokens[mask]
    return kept if kept.dtype == padded.dtype else kept.view(padded.dtype).reshape(len(kept), *padded.shape[2:])


def _as_tokens(x: HostArray, lead: int) -> HostArray | None:
    """View the axes of x beyond the first `lead` as one opaque element, or None where they are not contiguous.

    Boolean indexing with a mask over all axes copies runs of elements; over the first axes only, it would go element
    by element through an index.
    """
    features = x.shape[lead:]
    if not features:
        return x
    if x.size == 0:
        return None
    size = x.dtype.itemsize
    for n, stride in zip(reversed(features), reversed(x.strides[lead:]), strict=True):
        if n != 1 and stride != size:
            return None
        size *= n
    flat = x.reshape(*x.shape[:lead], -1)
    if flat.strides[-1] != x.dtype.itemsize:
        return None
    return flat.view(np.dtype((np.void, size)))[..., 0]


_BLOCK = 1 << 15  # elements: what is checked is still in the cache when it is converted


def bools_of(mask: HostArray) -> HostArray | None:
    """The integers of a mask as bools, or None where one is neither 0 nor 1."""
    flat = np.ascontiguousarray(mask).reshape(-1)
    unsigned = flat.view(f"u{flat.itemsize}")  # as unsigned integers the negative ones are large
    bools = np.empty(flat.shape, np.bool_)
    for start in range(0, flat.size, _BLOCK):
        block = unsigned[start : start + _BLOCK]
        if block.max() > 1:
            return None
        bools[start : start + _BLOCK] = block
    return bools.reshape(mask.shape)


def counts(mask: HostArray) -> HostInts:
    """How many places of each row of a bool mask (B, N) are true. (B,)."""
    return mask.view(np.uint8).sum(axis=1, dtype=np.int32 if mask.shape[1] < 2**31 else np.int64)


def padding_index(xp: Backend, offsets: Dense, n: int, total: int, side: str) -> tuple[Dense, Dense]:
    """Where each padded place comes from in the values, and whether it does: two (B, n), on the device of offsets."""
    offsets = _offsets.wide(xp, offsets, total + n)
    places = xp.arange(n, offsets)[None, :]
    starts, stops = offsets[:-1][:, None], offsets[1:][:, None]
    index = starts + places if side == "right" else stops - n + places
    mask = (index < stops) & (index >= starts)
    return xp.where(mask, index, index - index), mask


def pad_device(xp: Backend, values: Dense, index: Dense, mask: Dense, fill: Any) -> Dense:
    """One gather from `values` (T, *F), `fill` where the mask is false. (B, N, *F)."""
    features = tuple(values.shape[1:])
    empty = xp.full((*mask.shape, *features), fill, values)
    if values.shape[0] == 0 or 0 in empty.shape:
        return empty
    wide = mask.reshape(*mask.shape, *(1 for _ in features))
    return xp.where(wide, xp.take(values, index, 0), empty)


def unpad_device(xp: Backend, padded: Dense, offsets: Dense, total: int, side: str) -> Dense:
    """One gather of the tokens of rows with these offsets from `padded` (B, N, *F), without a look at them. (T, *F).

    Tokens beyond the last row are 0; those for which N has no place NaN, or 0 where the dtype has no NaN.
    """
    rows, width = padded.shape[:2]
    values = padded.reshape(rows * width, *padded.shape[2:])
    if total == 0 or rows * width == 0:
        return xp.full((total, *padded.shape[2:]), 0, padded)
    if rows * width + total >= 2**31:
        offsets = xp.astype(offsets, "int64")
    row, place = _offsets.segment_ids(xp, offsets, total), _offsets.position_ids(xp, offsets, total)
    used = row < rows
    row = xp.where(used, row, row - row)
    fits = place < width
    if side == "left":
        lengths = xp.cast_like(offsets[1:] - offsets[:-1], place)
        fits = xp.take(lengths, row, 0) <= width
        place = place + width - xp.take(lengths, row, 0)
    index = row * width + place
    index = xp.where(used & fits, index, index - index)

    def wide(condition: Dense) -> Dense:
        return condition.reshape(total, *(1 for _ in padded.shape[2:]))

    taken = xp.take(values, index, 0)
    odd = xp.full((), float("nan") if _check.is_floating(xp.dtype_name(padded)) else 0, padded)
    taken = xp.where(wide(fits), taken, odd)
    return xp.where(wide(used), taken, xp.full((), 0, padded))


def rows_to(xp: Backend, values: Dense, host: HostInts, rows: HostInts, axis: int) -> tuple[Dense, HostInts]:
    """Gather whole rows, by their numbers (0 <= row < B), and the offsets of the result."""
    lengths = np.diff(host)[rows]
    offsets = _offsets.from_lengths(lengths)
    return take_runs(xp, values, host[:-1][rows], offsets, axis), offsets


def take_runs(xp: Backend, values: Dense, starts: HostInts, offsets: HostInts, axis: int) -> Dense:
    """Join the runs of tokens that begin at `starts` (R,), as long as `offsets` (R + 1,) say."""
    moves = xp.moves(values) if axis == 0 else None
    if moves is not None:
        return moves.take_rows(values, starts, offsets)
    return take_tokens(xp, values, _offsets.gather_index(starts, offsets), axis)
