"""The form of Hugging Face's models: hidden states padded to one length, and an attention mask of 1 and 0."""

from __future__ import annotations

import numpy as np

from .._array import Array, expect_array
from .._backends import Backend, Dense
from .._padding import Side, from_padded, to_padded
from ._handover import along_axis_0


def to_hf_padded(arr: Array, side: Side = "right") -> tuple[Dense, Dense]:
    """Pad an Array to `hidden_states` and `attention_mask`. Copies.

    Parameters
    ----------
    arr : Array of (T, *features)
    side : "right" or "left"
        Where the padding goes.

    Returns
    -------
    hidden_states : array of (B, N, *features)
        N is ``arr.max_length``; zero at the padding; the dtype of the values; differentiable in them.
    attention_mask : array of (B, N), int64 (int32 in JAX without 64-bit types)
        1 at the tokens.

    Raises
    ------
    ValueError
        `side` is another word, or `arr` has a `ragged_dim` other than 0.

    Notes
    -----
    Offsets on a device are copied to the host, once for all Arrays that share them, as `scree.to_padded` does.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.Array(np.array([5, 6, 7]), [0, 1, 3])
    >>> hidden_states, attention_mask = scree.bridges.to_hf_padded(arr, side="left")
    >>> hidden_states
    array([[0, 5],
           [6, 7]])
    >>> attention_mask
    array([[0, 1],
           [1, 1]])
    """
    expect_array("to_hf_padded", arr)
    along_axis_0("to_hf_padded", arr, "hidden_states")
    hidden_states, mask = to_padded(arr, side)
    return hidden_states, _ones_and_zeros(arr._xp, mask)


def from_hf_padded(hidden_states: Dense, attention_mask: Dense) -> Array:
    """Pack what an attention mask keeps of padded hidden states. Copies.

    Parameters
    ----------
    hidden_states : array of (B, N, *features)
    attention_mask : array of (B, N), integer, floating or bool, with 0 and 1 only
        Right-padded, left-padded or with holes.

    Returns
    -------
    Array of (T, *features)
        The tokens whose mask is 1, in order; differentiable in `hidden_states`.

    Raises
    ------
    ValueError, TypeError
        The mask has another shape, framework or device, or values other than 0 and 1.

    Notes
    -----
    A mask on a device is copied to the host, once, as `scree.from_padded` does.

    Examples
    --------
    >>> import numpy as np, scree
    >>> hidden_states = np.array([[0, 5], [6, 7]])
    >>> scree.bridges.from_hf_padded(hidden_states, np.array([[0, 1], [1, 1]])).values
    array([5, 6, 7])
    """
    return from_padded(hidden_states, attention_mask)


def _ones_and_zeros(xp: Backend, mask: Dense) -> Dense:
    host = xp.host_view(mask)
    if host is not None and host.dtype == np.bool_ and xp.EAGER:
        return xp.asarray(host.astype(np.int64), mask)
    try:
        return xp.astype(mask, "int64")
    except TypeError:  # JAX without its 64-bit types
        return xp.astype(mask, "int32")
