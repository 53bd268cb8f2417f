"""PyTorch's nested tensors of the jagged layout: the same two tensors under another type."""

from __future__ import annotations

from typing import Any

from .._array import Array, expect_array
from ._handover import library, used_values


def to_torch_nested(arr: Array) -> Any:
    """View a PyTorch Array as a nested tensor of the jagged layout. Never copies the values.

    Parameters
    ----------
    arr : Array of (..., T, ...), PyTorch
        Another framework's goes through `to_torch` first.

    Returns
    -------
    torch.Tensor of (B, ..., j, ...), layout ``torch.jagged``
        With the memory of ``arr.values`` and the very tensor ``arr.offsets``, so that nested tensors made from Arrays
        that share their offsets go together in one operation. Differentiable in the values. Axis ``ragged_dim + 1``
        is the ragged one.

    Raises
    ------
    TypeError
        `arr` is not of PyTorch.

    Notes
    -----
    The shortest and the longest length go along where the host knows them; the device is never waited for. A nested
    tensor has no place for spare values (`scree.with_capacity`): it gets a view of those in use, for which the offsets
    must be on the host or are copied there, once.

    Examples
    --------
    >>> import scree, torch
    >>> arr = scree.pack([torch.ones(2, 8), torch.ones(5, 8)])
    >>> nested = scree.bridges.to_torch_nested(arr)
    >>> nested.values().data_ptr() == arr.values.data_ptr()
    True
    """
    torch = library("to_torch_nested", "torch", "torch")
    expect_array("to_torch_nested", arr)
    if not isinstance(arr.values, torch.Tensor):
        raise TypeError(
            f"to_torch_nested: arr is of {arr._xp.NAME}; needs torch; scree.bridges.to_torch brings it there"
        )
    known = arr._structure
    values = used_values("to_torch_nested", arr)
    if arr._known_offsets() is not None:
        shortest, longest = arr.min_length, arr.max_length
    else:
        shortest, longest = known.min_length, known.max_length
    return torch.nested.nested_tensor_from_jagged(
        values, arr.offsets, jagged_dim=arr.ragged_dim + 1, min_seqlen=shortest, max_seqlen=longest
    )


def from_torch_nested(nested: Any) -> Array:
    """View a nested tensor of the jagged layout as an Array. Never copies.

    Parameters
    ----------
    nested : torch.Tensor of (B, ..., j, ...), layout ``torch.jagged``

    Returns
    -------
    Array
        Its values are ``nested.values()``, in the same memory and differentiable in `nested`; its offsets are the very
        tensor ``nested.offsets()``; its `ragged_dim` is the ragged axis of `nested` less 1. A longest length that
        `nested` has noted becomes its `max_length`; nothing is computed on the device.

    Raises
    ------
    TypeError
        `nested` is no nested tensor.
    ValueError
        It has the strided layout; it has holes (lengths of its own, as `torch.nested.narrow` makes them); or, on the
        CPU, its offsets are invalid, which PyTorch does not check, or its noted longest length is too small.
    """
    torch = library("from_torch_nested", "torch", "torch")
    if not (isinstance(nested, torch.Tensor) and nested.is_nested):
        raise TypeError(f"from_torch_nested: got {type(nested).__name__}; needs a nested tensor of the jagged layout")
    if nested.layout is not torch.jagged:
        raise ValueError(
            f"from_torch_nested: got layout {nested.layout}; needs torch.jagged; "
            "torch.nested.as_nested_tensor(nested.unbind(), layout=torch.jagged) converts"
        )
    if nested.lengths() is not None:
        raise ValueError(
            "from_torch_nested: the nested tensor has holes between its rows (lengths of its own); needs rows end to "
            "end; nested.contiguous() closes them"
        )
    arr = Array(nested.values(), nested.offsets(), nested._ragged_idx - 1)
    return _with_noted_lengths(arr, nested._maybe_min_seqlen, nested._maybe_max_seqlen)


def _with_noted_lengths(arr: Array, shortest: int | None, longest: int | None) -> Array:
    known = arr._structure
    if known.host is None:
        known.min_length, known.max_length = shortest, longest
    elif longest is not None:
        if longest < arr.max_length:
            raise ValueError(f"max_length: got {longest}; needs at least {arr.max_length}, the longest sequence")
        known.max_length = longest
    return arr
