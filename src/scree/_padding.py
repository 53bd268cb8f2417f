"""Padding: from an Array to a batch of one length with a mask, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from . import _check, _layout, _offsets
from ._array import Array, expect_array, from_host_offsets
from ._backends import Backend, Dense, find_backend
from ._backends._protocol import HostArray
from ._offsets import Structure

Side = Literal["right", "left"]


def to_padded(
    arr: Array, side: Side = "right", fill_value: float = 0.0, max_length: int | None = None
) -> tuple[Dense, Dense]:
    """Pad the sequences to one length.

    Parameters
    ----------
    arr : Array of (T, *features)
        With another `ragged_dim` the row axis of the result still comes second.
    side : "right" or "left"
        Where the padding goes.
    fill_value : number
        What it holds; an error where the dtype cannot hold it.
    max_length : int, optional
        N. The longest sequence unless said; a longer sequence is an error. Under a trace it must be said, and there
        the lengths are unknown: a floating row that is longer comes out as NaN throughout, an integer one is cut.

    Returns
    -------
    padded : array of (B, N, *features)
        The dtype of the values; differentiable in them.
    mask : array of (B, N), bool
        True at the tokens.

    Raises
    ------
    ValueError
        `side` is another word, `max_length` is below the longest sequence, or the dtype cannot hold `fill_value`.
    NotImplementedError
        The offsets are traced, and `max_length` is not given.

    Notes
    -----
    Both results are fresh. Without `max_length` offsets on a device are copied to the host, once for all Arrays that
    share them.

    Examples
    --------
    >>> import numpy as np, scree
    >>> padded, mask = scree.to_padded(scree.from_lengths(np.array([1, 2, 3]), [1, 2]), side="left")
    >>> padded.tolist(), mask.tolist()
    ([[0, 1], [2, 3]], [[False, True], [True, True]])
    """
    expect_array("to_padded", arr)
    _check_side("to_padded", side)
    xp = arr._xp
    fill = _check.fill_value(fill_value, xp.dtype_name(arr.values))
    if max_length is None:
        arr._refuse_trace("to_padded without max_length")
    width = arr.max_length if max_length is None else _check.whole(max_length, "max_length")
    host = arr._known_offsets()
    longest = arr._structure.longest(host) if host is not None else 0
    if width < longest:
        raise ValueError(f"to_padded: max_length is {width}; needs at least {longest}, the longest sequence")
    values = _layout.moved_to_front(xp, arr.values, arr.ragged_dim)
    moves = xp.moves(values, arr.offsets)
    if moves is not None:
        too_long = float("nan") if host is None and _check.is_floating(xp.dtype_name(values)) else None
        return moves.pad(values, arr.offsets, width, side, fill, too_long)
    view = xp.host_view(values)
    if host is not None and view is not None:
        mask = _layout.mask_host(host, width, side)
        zero = fill == 0 and math.copysign(1.0, fill.real) > 0  # the bits of -0.0 are not all zero
        bits = None if zero else xp.host_view(xp.full((1,), fill, values))
        padded = _layout.pad_host(view[: int(host[-1])], mask, bits)
        return xp.adopt(padded, values), xp.asarray(mask, values)
    index, mask = _layout.padding_index(xp, arr.offsets, width, arr.total_length, side)
    padded = _layout.pad_device(xp, values, index, mask, fill)
    if host is None and _check.is_floating(xp.dtype_name(values)):
        lengths = _offsets.wide(xp, arr.lengths, width)
        too_long = (lengths > width).reshape(-1, *(1 for _ in padded.shape[1:]))
        padded = xp.where(too_long, xp.full((), float("nan"), values), padded)
    return padded, mask


def from_padded(
    padded: Dense,
    mask: Dense | None = None,
    *,
    lengths: Array | Sequence[int] | Dense | None = None,
    side: Side = "right",
) -> Array:
    """Pack what a mask keeps of a padded batch, or rows whose lengths are known.

    Parameters
    ----------
    padded : array of (B, N, *features)
    mask : array of (B, N), bool, or integer or floating with 0 and 1 only
        True at the tokens to keep, in order: right-padded, left-padded or with holes.
    lengths : Array of B sequences, list of int, or array of (B,), integer
        Instead of `mask`. The lengths of an Array are taken, and its offsets object kept: `from_padded(f(padded),
        lengths=arr)` goes back from ``padded, mask = to_padded(arr)``.
    side : "right" or "left"
        Where the padding is, with `lengths`.

    Returns
    -------
    Array
        With fresh values (T, *features), differentiable in `padded`.

    Raises
    ------
    ValueError
        `mask` is not (B, N), or holds what is neither 0 nor 1; or the lengths do not fit into `padded`.
    TypeError
        Both of `mask` and `lengths` are given, or neither; or one is of another framework than `padded`.
    NotImplementedError
        `mask` is traced.

    Notes
    -----
    How many tokens remain has to be known on the host. A mask on a device is copied there, once, or, where Triton's
    kernels count on the device (PyTorch on CUDA), what they counted is. A traced mask is an error. Nothing is waited for
    with lengths that are on the host, nor with an Array whose `max_length` is known; under a trace, an Array serves, and
    tokens for which N has no place come out as NaN (0 where the dtype has none).
    """
    xp = _check.dense(padded, "padded")
    if padded.ndim < 2:
        raise ValueError(f"padded: got shape {tuple(padded.shape)}; needs (B, N, *features)")
    if mask is None:
        if lengths is None:
            raise TypeError("from_padded: got neither mask nor lengths; needs one of them")
        _check_side("from_padded", side)
        return _from_lengths(xp, padded, lengths, side)
    if lengths is not None:
        raise TypeError("from_padded: got mask and lengths; needs one of them")
    if side != "right":
        raise ValueError(f"from_padded: side is {side!r}; needs lengths beside it, as a mask says where the padding is")
    _check.same_framework(xp, mask, "mask", "padded")
    _check.dense(mask, "from_padded: mask")
    _check.same_device(xp, mask, padded, "mask", "padded")
    if tuple(mask.shape) != tuple(padded.shape[:2]):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}; needs {tuple(padded.shape[:2])}, the first two of padded"
        )
    if xp.is_traced(mask):
        raise NotImplementedError(
            "from_padded: the number of tokens depends on mask, which is traced by a compiler or a transformation; "
            "call it outside of the compiled function, or give lengths=arr"
        )
    moves = xp.moves(padded, mask)
    if moves is not None:
        moved = moves.unpad_mask(padded, mask)
        if moved is not None:
            return Array._make(moved[0], moved[1], 0, Structure(moved[2]))
    keep = _host_mask(xp, mask)
    offsets = _offsets.from_lengths(_layout.counts(keep))
    return from_host_offsets(xp, _unpad_host(xp, padded, keep), offsets, 0)


def _check_side(op: str, side: str) -> None:
    if side not in ("right", "left"):
        raise ValueError(f"{op}: side is {side!r}; needs 'right' or 'left'")


def _unpad_host(xp: Backend, padded: Dense, keep: HostArray) -> Dense:
    """What a mask on the host keeps."""
    view = xp.host_view(padded)
    if view is not None:
        return xp.adopt(_layout.unpad_host(view, keep), padded)
    flat = padded.reshape(keep.size, *padded.shape[2:])
    return _layout.take_tokens(xp, flat, np.flatnonzero(keep), 0)


def _from_lengths(xp: Backend, padded: Dense, lengths: Any, side: Side) -> Array:
    batch_size, width = padded.shape[:2]
    if isinstance(lengths, Array):
        return _from_structure(xp, padded, lengths, side)
    given = find_backend(lengths)
    if given is not None and given.NAME != "numpy":
        _check.same_framework(xp, lengths, "lengths", "padded")
        _check.integers(xp, lengths, "lengths")
        if xp.is_traced(lengths):
            raise NotImplementedError(
                "from_padded: lengths is traced by a compiler or a transformation; needs an Array"
            )
        lengths = xp.to_host(lengths)
    host = _offsets.signed(_check.host_ints(lengths, "lengths"))
    if len(host) != batch_size:
        raise ValueError(f"lengths: got {len(host)}; needs {batch_size}, the first axis of padded")
    if batch_size and not 0 <= int(host.min()) <= int(host.max()) <= width:
        i = int(((host < 0) | (host > width)).argmax())
        raise ValueError(f"lengths[{i}]: got {host[i]}; needs 0 to {width}, the second axis of padded")
    offsets = _offsets.from_lengths(host)
    moves = xp.moves(padded)
    if moves is not None:
        placed = moves.to_device(offsets, padded)
        return Array._make(moves.unpad(padded, placed, int(offsets[-1]), side), placed, 0, Structure(offsets))
    return from_host_offsets(xp, _unpad_host(xp, padded, _layout.mask_host(offsets, width, side)), offsets, 0)


def _from_structure(xp: Backend, padded: Dense, arr: Array, side: Side) -> Array:
    """The tokens of the rows that an Array has, on its offsets."""
    offsets, width, total = arr._offsets, padded.shape[1], arr.total_length
    _check.same_framework(xp, offsets, "lengths", "padded")
    _check.same_device(xp, offsets, padded, "lengths", "padded")
    if arr.batch_size != padded.shape[0]:
        raise ValueError(f"lengths: got {arr.batch_size} sequences; needs {padded.shape[0]}, the first axis of padded")
    host = arr._known_offsets()
    if not arr._is_opaque():
        longest = arr.max_length if host is None else arr._structure.longest(host)
        if longest > width:
            raise ValueError(f"lengths: the longest is {longest}; needs at most {width}, the second axis of padded")
    moves = xp.moves(padded, offsets)
    if moves is not None:
        values = moves.unpad(padded, offsets, total, side)
    elif host is not None and not arr._structure.spare:
        values = _unpad_host(xp, padded, _layout.mask_host(host, width, side))
    else:
        values = _layout.unpad_device(xp, padded, offsets, total, side)
    return Array._make(values, offsets, 0, arr._structure)


def _host_mask(xp: Backend, mask: Dense) -> HostArray:
    """The mask as bools on the host: one copy from a device. Refuses values that are neither 0 nor 1."""
    name = xp.dtype_name(mask)
    if name == "bool":
        return xp.to_host(mask)
    if not (_check.is_integer(name) or _check.is_floating(name)):
        raise TypeError(f"mask: got dtype {name}; needs bool, integer or floating")
    view = xp.host_view(mask) if _check.is_integer(name) else None
    bools = None if view is None else _layout.bools_of(view)
    if bools is not None:
        return bools
    ones = mask == 1
    odd = xp.to_host(ones == (mask == 0))
    if odd.any():
        row, place = (int(i) for i in np.unravel_index(int(odd.argmax()), odd.shape))
        raise ValueError(f"mask: got {mask[row, place]} at [{row}, {place}]; needs 0 and 1 only")
    return xp.to_host(ones)
