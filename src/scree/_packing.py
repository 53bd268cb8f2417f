"""Packing: from lists, lengths and `cu_seqlens` to an Array, and back; joining Arrays, ids, and fixed shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from . import _check, _layout, _offsets
from ._array import Array, expect_array, from_host_offsets
from ._backends import Backend, Dense, find_backend
from ._backends._protocol import HostInts
from ._offsets import Structure

# What the frameworks raise where arrays cannot be joined: the message that names the odd one is ours.
JOINING_FAILED = (TypeError, ValueError, RuntimeError, IndexError)


def pack(arrays: Iterable[Dense], ragged_dim: int = 0) -> Array:
    """Join a list of arrays to one Array, without padding.

    Parameters
    ----------
    arrays : iterable of array, each (..., n_i, ...)
        One sequence each, of any length, 0 included. The first one decides the framework; framework, dtype, device
        and the axes other than `ragged_dim` must agree.
    ragged_dim : int
        The axis along which the lengths differ; negative counts from the end.

    Returns
    -------
    Array
        With fresh values (..., T, ...), differentiable in each input, and offsets (B + 1,) on their device, int32
        where T fits and int64 beyond.

    Raises
    ------
    ValueError
        The list is empty, or the feature shapes or devices differ; the message names the index of the odd one.
    TypeError
        The frameworks or dtypes differ, or an entry is no array.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.pack([np.arange(3), np.arange(0), np.arange(5)])
    scree.Array(batch_size=3, total_length=8, feature_shape=(), dtype=int64)
    """
    rows = arrays if isinstance(arrays, list) else list(_iterable(arrays))
    if not rows:
        raise ValueError("pack: got an empty list; needs at least one array, to know the framework and the dtype")
    first = rows[0]
    xp = _check.dense(first, "pack: arrays[0]")
    dim = _check.axis(ragged_dim, first.ndim, of="arrays[0]")
    if list(map(type, rows)).count(type(first)) != len(rows):
        _check.same_kinds("pack", rows, dim)
    try:
        lengths = xp.sizes(rows, dim)
        values = xp.concat(rows, dim, lengths)
    except JOINING_FAILED as failed:
        _check.odd_one_out("pack", rows, dim, failed)
    return from_host_offsets(xp, values, _offsets.from_lengths(lengths), dim)


def _iterable(arrays: Any) -> Iterable[Any]:
    if find_backend(arrays) is not None or isinstance(arrays, Array):
        raise TypeError(f"pack: got one {type(arrays).__name__}; needs a list of arrays, one a sequence")
    try:
        return iter(arrays)
    except TypeError:
        raise TypeError(f"pack: got {type(arrays).__name__}; needs a list of arrays, one a sequence") from None


def unpack(arr: Array) -> list[Dense]:
    """List the sequences of an Array.

    Returns
    -------
    list of array, each (..., n_i, ...)
        Views of ``arr.values`` where the framework has them (NumPy, PyTorch, CuPy), differentiable. Where the offsets
        are on a device, they are copied to the host, once for all Arrays that share them.

    Raises
    ------
    NotImplementedError
        The offsets are traced by a compiler or a transformation.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.unpack(scree.from_lengths(np.arange(4), [1, 3]))
    [array([0]), array([1, 2, 3])]
    """
    expect_array("unpack", arr)
    return arr._rows("unpack")


def from_cu_seqlens(values: Dense, cu_seqlens: Dense, max_length: int | None = None) -> Array:
    """Put the Array type on values and `cu_seqlens`, as FlashAttention takes them, without a copy.

    Parameters
    ----------
    values : array of (T, ...)
        Kept: ``arr.values is values``.
    cu_seqlens : array of (B + 1,), integer
        Kept: ``arr.offsets is cu_seqlens``.
    max_length : int, optional
        The longest sequence, or an upper bound, where the caller knows it: saves finding it on the device. Becomes
        ``arr.max_length``. Below the truth it is an error where the host sees the offsets.

    Returns
    -------
    Array
        With `ragged_dim` 0, on the very same memory.

    Raises
    ------
    ValueError
        `cu_seqlens` is not 1-D, or where the host sees it, does not start at 0, falls, or does not end at T;
        `max_length` is too small.
    TypeError
        `cu_seqlens` is a list, not of integers, or of another framework than `values`.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.from_cu_seqlens(np.zeros((6, 2)), np.array([0, 2, 6]), max_length=4)
    scree.Array(batch_size=2, total_length=6, feature_shape=(2,), dtype=float64)
    """
    if isinstance(cu_seqlens, (list, tuple)):
        raise TypeError("cu_seqlens: got a list; needs an array of the framework of values, which is kept as it is")
    arr = Array(values, cu_seqlens)
    if max_length is not None:
        bound = _check.whole(max_length, "max_length")
        if bound < 0:
            raise ValueError(f"max_length: got {bound}; needs 0 or more")
        if arr._structure.host is not None and bound < arr.max_length:
            raise ValueError(f"max_length: got {bound}; needs at least {arr.max_length}, the longest sequence")
        arr._structure.max_length = bound
    return arr


def from_lengths(values: Dense, lengths: Sequence[int] | Dense) -> Array:
    """Put the Array type on values and the lengths of the sequences, without copying the values.

    Parameters
    ----------
    values : array of (T, ...)
        Kept: ``arr.values is values``.
    lengths : list of int, or array of (B,), integer
        Zero or more each, T in all. A NumPy array serves every framework; the framework's own is used on its device
        without waiting for it, so that its sum is checked by `Array.validate` only.

    Returns
    -------
    Array
        With `ragged_dim` 0, and fresh offsets on the device of `values`: int32 where T fits and int64 beyond.

    Raises
    ------
    ValueError
        A length is negative, or they do not sum to T.
    TypeError
        `lengths` is not of integers, or of another framework than `values`.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.from_lengths(np.arange(4), [1, 0, 3])[2]
    array([1, 2, 3])
    """
    xp = _check.dense(values, "values")
    dim = _check.axis(0, values.ndim)
    given = find_backend(lengths)
    if given is None or given.NAME == "numpy":
        host = _check.host_ints(lengths, "lengths")
    else:
        _check.same_framework(xp, lengths, "lengths", "values")
        _check.integers(xp, lengths, "lengths")
        _check.same_device(xp, lengths, values, "lengths", "values")
        host = xp.host_view(lengths) if xp.EAGER else None
        if host is None:
            return _from_device_lengths(xp, values, lengths)
    total = values.shape[dim]
    return from_host_offsets(xp, values, _offsets.from_lengths(_check.host_lengths(host, total)), dim)


def _from_device_lengths(xp: Backend, values: Dense, lengths: Dense) -> Array:
    narrow = "int32" if values.shape[0] < 2**31 else "int64"
    steps = (
        xp.astype(xp.concat([lengths[:1] * 0, lengths], 0), narrow) if lengths.shape[0] else xp.full((1,), 0, lengths)
    )
    return Array._make(values, xp.astype(xp.cumsum(steps), narrow), 0, Structure())


def concat(arrays: Iterable[Array], dim: Literal["batch", "ragged"] = "batch") -> Array:
    """Join Arrays: one below the other, or row by row.

    Parameters
    ----------
    arrays : iterable of Array
        Of one framework, dtype, device, feature shape and `ragged_dim`; for ``"ragged"`` also of one batch size.
    dim : "batch" or "ragged"
        ``"batch"`` gives all rows of the first, then all of the second, and so on. ``"ragged"`` gives as row i the
        rows i of all, end to end.

    Returns
    -------
    Array
        With fresh values, differentiable in each input.

    Raises
    ------
    ValueError
        The list is empty, or the feature shapes, devices, `ragged_dim` or, row by row, batch sizes differ; the message
        names the index of the odd one.
    TypeError
        The frameworks or dtypes differ, or an entry is no Array.

    Examples
    --------
    >>> import numpy as np, scree
    >>> a, b = scree.from_lengths(np.arange(3), [1, 2]), scree.from_lengths(np.arange(10, 12), [1, 1])
    >>> scree.concat([a, b], dim="ragged").values
    array([ 0, 10,  1,  2, 11])
    """
    if dim not in ("batch", "ragged"):
        raise ValueError(f"concat: dim is {dim!r}; needs 'batch' or 'ragged'")
    parts: list[Any] = list(arrays)
    if not parts:
        raise ValueError("concat: got an empty list; needs at least one Array")
    for i, part in enumerate(parts):
        if not isinstance(part, Array):
            raise TypeError(
                f"concat: arrays[{i}] is {type(part).__name__}; needs an Array; scree.pack joins dense ones"
            )
    first: Array = parts[0]
    xp, axis = first._xp, first.ragged_dim
    for i, part in enumerate(parts[1:], 1):
        _check.same_framework(xp, part.values, f"concat: arrays[{i}]", "arrays[0]")
        if part.ragged_dim != axis:
            raise ValueError(
                f"concat: arrays[{i}] has ragged_dim {part.ragged_dim}, arrays[0] has {axis}; all must agree"
            )
        if dim == "ragged" and part.batch_size != first.batch_size:
            raise ValueError(
                f"concat: arrays[{i}] has batch_size {part.batch_size}, arrays[0] has {first.batch_size}; "
                "row by row they must agree"
            )
    hosts = [part._known_offsets() for part in parts]
    known = [host for host in hosts if host is not None]
    if dim == "batch" and len(known) < len(parts) and not any(part._structure.spare for part in parts):
        values = _joined(xp, [part.values for part in parts], axis)
        return Array._make(values, _shifted(xp, parts, values.shape[axis]), axis, Structure())
    known = [part._host_offsets(f"concat along {dim!r}") for part in parts]
    used = [part._between(0, int(host[-1])) for part, host in zip(parts, known, strict=True)]
    values = _joined(xp, used, axis)
    bases = np.cumsum([0, *(int(host[-1]) for host in known)])
    if dim == "batch":
        tails = [host[1:] + base for host, base in zip(known, bases, strict=False)]
        offsets = _offsets.narrow(np.concatenate([np.zeros(1, np.int64), *tails]))
        return from_host_offsets(xp, values, offsets, axis, like=first.offsets)
    starts = np.stack([host[:-1] + base for host, base in zip(known, bases, strict=False)], axis=1)
    pieces = _offsets.from_lengths(np.stack([np.diff(host) for host in known], axis=1).ravel())
    moved = _layout.take_runs(xp, values, starts.ravel(), pieces, axis)
    return from_host_offsets(xp, moved, pieces[:: len(parts)], axis, like=first.offsets)


def _joined(xp: Backend, values: list[Dense], axis: int) -> Dense:
    try:
        return xp.concat(values, axis)
    except JOINING_FAILED as failed:
        _check.odd_one_out("concat", values, axis, failed)


def _shifted(xp: Backend, parts: list[Array], total: int) -> Dense:
    dtype = "int32" if total < 2**31 else "int64"
    shifted, base = [xp.astype(parts[0].offsets[:1], dtype)], 0
    for part in parts:
        shifted.append(xp.astype(part.offsets[1:], dtype) + base)
        base += part.total_length
    return xp.concat(shifted, 0)


def segment_ids(arr: Array) -> Dense:
    """Number for every token the sequence it belongs to.

    Returns
    -------
    array of (T,), int32 (int64 where T >= 2**31)
        On the device of the offsets, without waiting for it. Tokens beyond the last sequence (`with_capacity`) have
        the number B.
    """
    expect_array("segment_ids", arr)
    return _per_token(arr, _offsets.host_segment_ids, _offsets.segment_ids)


def position_ids(arr: Array, start: int | Sequence[int] | Dense = 0) -> Dense:
    """Number for every token its place within its sequence, from `start`.

    Parameters
    ----------
    start : int, list of int, or array of (B,), integer
        The number of the first token: one for all sequences, or one each.

    Returns
    -------
    array of (T,), int32 (int64 where T >= 2**31)
        On the device of the offsets, without waiting for it. Tokens beyond the last sequence (`with_capacity`) have
        the number 0.
    """
    expect_array("position_ids", arr)
    positions = _per_token(arr, _offsets.host_position_ids, _offsets.position_ids)
    begin = _check.starts("position_ids: start", arr._xp, start, arr.offsets, arr.total_length)
    if isinstance(begin, int) and begin == 0:
        return positions
    return _offsets.shifted_positions(arr._xp, positions, arr.offsets, begin, spare=arr._structure.spare)


def _per_token(arr: Array, on_host: Callable[..., HostInts], on_device: Callable[..., Dense]) -> Dense:
    host, xp = arr._known_offsets(), arr._xp
    if host is not None and xp.host_view(arr.offsets) is not None:
        return xp.asarray(on_host(host, arr.total_length), arr.offsets)
    return on_device(xp, arr.offsets, arr.total_length)


def with_capacity(arr: Array, batch_size: int, total_length: int) -> Array:
    """Put the same sequences into fixed shapes, so that a compiler or a CUDA graph sees one shape for every batch.

    Parameters
    ----------
    batch_size : int
        The rows of the result: `arr`'s, then empty ones.
    total_length : int
        The size of the ragged axis of the result: `arr`'s values, then zeros.

    Returns
    -------
    Array
        Its ``offsets[-1]`` may be less than its `total_length`. What lies beyond belongs to no sequence: kernels
        write 0 there and give it no gradient. The values are copied and stay differentiable.

    Raises
    ------
    ValueError
        `arr` does not fit; the message says what it takes.
    """
    expect_array("with_capacity", arr)
    rows, total = _check.whole(batch_size, "batch_size"), _check.whole(total_length, "total_length")
    xp, axis = arr._xp, arr.ragged_dim
    _check.at_least("with_capacity: batch_size", rows, arr.batch_size, "the rows of the Array")
    host, values = arr._known_offsets(), arr.values
    if arr._structure.spare and host is not None:
        values = arr._between(0, int(host[-1]))
    used = values.shape[axis]
    _check.at_least("with_capacity: total_length", total, used, "the tokens of the Array")
    if total > used:
        shape = tuple(total - used if i == axis else n for i, n in enumerate(values.shape))
        values = xp.concat([values, xp.full(shape, 0, values)], axis)
    if host is not None:
        padded = np.concatenate([host, np.full(rows - arr.batch_size, host[-1], host.dtype)])
        padded = padded.astype(np.int32 if total < 2**31 else np.int64)
        return Array._make(values, xp.asarray(padded, arr.offsets), axis, Structure(padded, spare=True))
    offsets = xp.astype(arr.offsets, "int32" if total < 2**31 else "int64")
    if rows > arr.batch_size:
        offsets = xp.concat(
            [offsets, xp.take(offsets, xp.arange(rows - arr.batch_size, offsets) * 0 + arr.batch_size, 0)], 0
        )
    return Array._make(values, offsets, axis, Structure(max_length=arr._structure.max_length, spare=True))
