"""Arrow's lists: `list`, `large_list` and `list_view` columns of numbers, or of fixed-size lists of numbers."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from .. import _check, _offsets
from .._array import Array, expect_array
from .._backends._protocol import HostArray, HostInts
from ._dlpack import to_numpy
from ._handover import NUMBERS, along_axis_0, library, readable, used_values


def to_arrow(arr: Array) -> Any:
    """Make an Arrow list array of the sequences. Copies nothing that Arrow can see where it is.

    Values and offsets of NumPy are shared. Copied are: bools, which Arrow packs in bits; values that are not
    contiguous; what is on a device; offsets other than int32 and int64.

    Parameters
    ----------
    arr : Array of (T, *features), bool, integer, float16, float32 or float64
        Of any framework; detached.

    Returns
    -------
    pyarrow.ListArray or pyarrow.LargeListArray of B rows
        Large for int64 offsets, and for 2**31 values and beyond. Every feature axis is a level of `fixed_size_list`.
        Spare values (`scree.with_capacity`) are left out.

    Raises
    ------
    ImportError
        pyarrow is missing.
    TypeError
        Arrow has no such dtype (bfloat16, complex).
    ValueError
        `arr` has a `ragged_dim` other than 0.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.bridges.to_arrow(scree.Array(np.arange(3), [0, 2, 2, 3])).to_pylist()
    [[0, 1], [], [2]]
    """
    pa = library("to_arrow", "pyarrow", "arrow")
    expect_array("to_arrow", arr)
    along_axis_0("to_arrow", arr, "an Arrow list")
    name = arr._xp.dtype_name(arr.values)
    if name not in NUMBERS:
        raise TypeError(f"to_arrow: got dtype {name}, which Arrow does not have; arr.astype casts")
    host = to_numpy(arr)
    values, offsets = readable(used_values("to_arrow", host)), host.offsets
    tokens = pa.array(np.ascontiguousarray(values).reshape(-1))
    for i in reversed(range(1, values.ndim)):
        kind = pa.list_(tokens.type, values.shape[i])
        tokens = pa.Array.from_buffers(kind, math.prod(values.shape[:i]), [None], null_count=0, children=[tokens])
    if offsets.dtype == np.int64 or int(offsets[-1]) >= 2**31:
        return pa.LargeListArray.from_arrays(pa.array(readable(offsets.astype(np.int64, copy=False))), tokens)
    return pa.ListArray.from_arrays(pa.array(readable(offsets.astype(np.int32, copy=False))), tokens)


def from_arrow(column: Any, nulls: Literal["error", "empty"] = "error") -> Array:
    """Make an Array of NumPy from an Arrow column of lists.

    Views Arrow's memory (read-only) where the column is one chunk of `list` or `large_list`, or a slice of one, without
    null rows. Copied are: several chunks, which are joined; bools, which Arrow packs in bits; columns with null rows,
    and `list_view` columns; the offsets of a slice, which are made to start at 0.

    Parameters
    ----------
    column : pyarrow.Array, pyarrow.ChunkedArray, or an object with ``__arrow_c_array__`` or ``__arrow_c_stream__``
        Of type `list`, `large_list`, `list_view`, `large_list_view` or `fixed_size_list`, with numbers or bools in it,
        or one or more levels of `fixed_size_list` of them, or `fixed_shape_tensor` of them.
    nulls : "error" or "empty"
        What a null row is: an error, or an empty sequence. Nulls inside of rows are always an error.

    Returns
    -------
    Array of (T, *features)
        Offsets int32 from `list`, int64 from the large types, and where the total needs it.

    Raises
    ------
    ImportError
        pyarrow is missing.
    TypeError
        `column` is no Arrow column, or not one of lists of numbers: strings, ragged rows within rows, dictionaries.
    ValueError
        A row or a value is null, or the offsets are invalid, which Arrow does not check.

    Examples
    --------
    >>> import pyarrow, scree
    >>> scree.bridges.from_arrow(pyarrow.array([[1, 2], [], [3]]))
    scree.Array(batch_size=3, total_length=3, feature_shape=(), dtype=int64)
    """
    pa = library("from_arrow", "pyarrow", "arrow")
    if nulls not in ("error", "empty"):
        raise ValueError(f"from_arrow: nulls is {nulls!r}; needs 'error' or 'empty'")
    kind, chunks = _chunks_of(pa, column)
    if not _holds_rows(pa, kind):
        raise TypeError(
            f"from_arrow: got type {kind}; needs list, large_list, list_view or fixed_size_list of numbers or bools"
        )
    parts: list[tuple[HostArray, HostInts]] = []
    row = 0
    for chunk in chunks:
        if nulls == "error" and chunk.null_count:
            null = row + int(chunk.is_null().to_numpy(zero_copy_only=False).argmax())
            raise ValueError(f"from_arrow: row {null} is null; needs a list in every row, or nulls='empty'")
        parts.append(_rows_of(pa, chunk))
        row += len(chunk)
    if len(parts) == 1:
        return Array(*parts[0])
    return Array(np.concatenate([values for values, _ in parts]), _joined([offsets for _, offsets in parts]))


def _chunks_of(pa: Any, column: Any) -> tuple[Any, list[Any]]:
    if hasattr(column, "__arrow_c_array__") and not isinstance(column, pa.Array):
        column = pa.array(column)
    elif hasattr(column, "__arrow_c_stream__") and not isinstance(column, pa.ChunkedArray):
        column = pa.chunked_array(column)
    if isinstance(column, pa.Array):
        return column.type, [column]
    if not isinstance(column, pa.ChunkedArray):
        raise TypeError(
            f"from_arrow: got {type(column).__name__}; needs an Arrow array or chunked array, or an object that exports "
            "one"
        )
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    return column.type, chunks or [pa.array([], column.type)]


def _holds_rows(pa: Any, kind: Any) -> bool:
    is_rows = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(is_kind(kind) for is_kind in is_rows) and _holds_numbers(pa, kind.value_type)


def _holds_numbers(pa: Any, kind: Any) -> bool:
    if pa.types.is_fixed_size_list(kind) or isinstance(kind, pa.FixedShapeTensorType):
        return _holds_numbers(pa, kind.value_type)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _rows_of(pa: Any, chunk: Any) -> tuple[HostArray, HostInts]:
    """The values and the offsets of one chunk; null rows are empty."""
    if pa.types.is_fixed_size_list(chunk.type):
        lengths = np.full(len(chunk), chunk.type.list_size, np.int64)
        offsets = None
    elif hasattr(chunk, "sizes"):  # list_view, large_list_view
        _within(chunk.offsets.to_numpy(), chunk.sizes.to_numpy(), len(chunk.values))
        lengths, offsets = chunk.sizes.to_numpy(), None
    else:
        offsets = chunk.offsets.to_numpy()
        first = int(offsets[0])
        if first < 0:
            raise ValueError(f"offsets[0]: got {first}; needs 0 or more")
        offsets = offsets - offsets[0] if first else offsets
        _check.host_offsets(offsets, len(chunk.values) - first, spare=True)
        lengths = offsets[1:] - offsets[:-1]
    if chunk.null_count:
        lengths = np.where(chunk.is_null().to_numpy(zero_copy_only=False), 0, lengths)
        offsets = None
    if offsets is None:
        wide = pa.types.is_large_list(chunk.type) or pa.types.is_large_list_view(chunk.type)
        offsets = _offsets.from_lengths(lengths)
        offsets = offsets.astype(np.int64, copy=False) if wide else offsets
    return values_of_tokens(pa, chunk.flatten()), offsets


def _within(starts: HostInts, sizes: HostInts, total: int) -> None:
    outside = (starts < 0) | (sizes < 0) | (starts.astype(np.int64) + sizes > total)
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(
            f"from_arrow: row {i} begins at {starts[i]} with size {sizes[i]}; needs to lie within {total} values"
        )


def values_of_tokens(pa: Any, tokens: Any) -> HostArray:
    """The numbers under any levels of fixed-size lists: (T, *features)."""
    if tokens.null_count:
        raise ValueError(f"from_arrow: {tokens.null_count} values within the rows are null; fill or drop them first")
    kind = tokens.type
    if isinstance(kind, pa.FixedShapeTensorType):
        values = values_of_tokens(pa, tokens.storage.flatten())
        values = values.reshape(len(tokens), *kind.shape, *values.shape[1:])
        order = kind.permutation or range(len(kind.shape))
        return values.transpose(0, *(axis + 1 for axis in order))
    if pa.types.is_fixed_size_list(kind):
        values = values_of_tokens(pa, tokens.flatten())
        return values.reshape(len(tokens), kind.list_size, *values.shape[1:])
    return tokens.to_numpy(zero_copy_only=not pa.types.is_boolean(kind))


def _joined(parts: list[HostInts]) -> HostInts:
    offsets = _offsets.from_lengths(np.concatenate([np.diff(part) for part in parts]))
    return offsets.astype(np.int64, copy=False) if any(part.dtype == np.int64 for part in parts) else offsets
