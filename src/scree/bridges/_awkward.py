"""Awkward Array: one level of lists over numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._array import Array, expect_array
from .._backends._protocol import HostArray, HostInts
from ._dlpack import to_numpy
from ._handover import NUMBERS, along_axis_0, library, readable, used_values

_INDEX = {"int32": "Index32", "uint32": "IndexU32", "int64": "Index64"}  # what a ListOffsetArray takes
_COMPLEX = ("complex64", "complex128")


def to_awkward(arr: Array) -> Any:
    """View an Array as an Awkward Array. Copies nothing that is on the host.

    Copied are: what is on a device; NumPy values of foreign byte order or with negative strides; offsets other than
    int32, uint32 and int64.

    Parameters
    ----------
    arr : Array of (T, *features), bool, integer, float16, float32, float64 or complex
        Of any framework; detached.

    Returns
    -------
    awkward.Array of type ``B * var * (*features) * dtype``
        Spare values (`scree.with_capacity`) are left out.

    Raises
    ------
    ImportError
        awkward is missing.
    TypeError
        Awkward Array has no such dtype (bfloat16).
    ValueError
        `arr` has a `ragged_dim` other than 0.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.bridges.to_awkward(scree.Array(np.arange(3), [0, 2, 2, 3])).to_list()
    [[0, 1], [], [2]]
    """
    ak = library("to_awkward", "awkward", "awkward")
    expect_array("to_awkward", arr)
    along_axis_0("to_awkward", arr, "an Awkward Array")
    name = arr._xp.dtype_name(arr.values)
    if name not in NUMBERS and name not in _COMPLEX:
        raise TypeError(f"to_awkward: got dtype {name}, which Awkward Array does not have; arr.astype casts")
    host = to_numpy(arr)
    values, offsets = readable(used_values("to_awkward", host)), readable(host.offsets)
    index = getattr(ak.index, _INDEX.get(offsets.dtype.name, "Index64"))
    content = ak.contents.NumpyArray(values)
    return ak.Array(ak.contents.ListOffsetArray(index(offsets.astype(index._expected_dtype, copy=False)), content))


def from_awkward(array: Any) -> Array:
    """Make an Array of NumPy from an Awkward Array with one level of lists.

    Views the memory of lists with offsets, slices of them included (their offsets are made to start at 0). Lists in
    another order (after a selection), and what is on another backend than the CPU, are copied.

    Parameters
    ----------
    array : awkward.Array of type ``B * var * (*features) * number``
        Rows of one length (``B * N * number``) are lists too.

    Returns
    -------
    Array of (T, *features)
        Offsets of the dtype that `array` has (int32, uint32 or int64; int64 where they must be made). Rows of unknown
        type, which are all empty, become float64 as in Awkward Array's own conversions.

    Raises
    ------
    ImportError
        awkward is missing.
    TypeError
        `array` is no Awkward Array; or its rows are not lists of numbers or bools: strings, records, unions, lists
        within lists, options (missing rows or values).

    Examples
    --------
    >>> import awkward, scree
    >>> scree.bridges.from_awkward(awkward.Array([[1, 2], [], [3]]))
    scree.Array(batch_size=3, total_length=3, feature_shape=(), dtype=int64)
    """
    ak = library("from_awkward", "awkward", "awkward")
    if not isinstance(array, ak.Array):
        raise TypeError(f"from_awkward: got {type(array).__name__}; needs an awkward.Array")
    if ak.backend(array) != "cpu":
        array = ak.to_backend(array, "cpu")
    rows = _listed(ak, array.layout, array.type)
    offsets: HostInts = np.asarray(rows.offsets.data)
    first, last = int(offsets[0]), int(offsets[-1])
    values = _values_of(rows.content[first:last], array.type)
    return Array(values, offsets - offsets[0] if first else offsets)


def _listed(ak: Any, layout: Any, kind: Any) -> Any:
    """The rows as lists with offsets."""
    layout = _projected(layout)
    if layout.is_numpy and layout.purelist_depth > 1:
        layout = layout.to_RegularArray()
    if layout.is_unknown:
        layout = ak.contents.ListOffsetArray(ak.index.Index64(np.zeros(1, np.int64)), layout)
    if not layout.is_list or _is_text(layout):
        raise _refusal(kind)
    return layout if isinstance(layout, ak.contents.ListOffsetArray) else layout.to_ListOffsetArray64(True)


def _values_of(content: Any, kind: Any) -> HostArray:
    """The numbers under any levels of lists of one length: (T, *features)."""
    content = _projected(content)
    if content.is_unknown:
        return np.empty(0, np.float64)
    if content.is_regular and not content.is_numpy and not _is_text(content):
        inner = _values_of(content.content[: content.length * content.size], kind)
        return inner.reshape(content.length, content.size, *inner.shape[1:])
    if not content.is_numpy or _is_text(content):
        raise _refusal(kind)
    return np.asarray(content.data)


def _projected(layout: Any) -> Any:
    return layout.project() if layout.is_indexed and not layout.is_option else layout


def _is_text(layout: Any) -> bool:
    return layout.parameter("__array__") in ("string", "bytestring", "char", "byte")


def _refusal(kind: Any) -> TypeError:
    return TypeError(
        f"from_awkward: got type {kind}; needs one level of lists of numbers or bools, without missing values "
        "(awkward.fill_none, awkward.drop_none), strings, records or unions"
    )
