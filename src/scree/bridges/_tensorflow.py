"""TensorFlow's RaggedTensor with one ragged axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._array import Array, expect_array
from ._dlpack import to_numpy
from ._handover import along_axis_0, library, readable, used_values


def to_tensorflow(arr: Array) -> Any:
    """Make a RaggedTensor of the sequences. Copies: TensorFlow makes its own memory.

    Parameters
    ----------
    arr : Array of (T, *features)
        Of any framework; detached.

    Returns
    -------
    tensorflow.RaggedTensor of (B, None, *features)
        The same dtype, bfloat16 too. Its `row_splits` are int32 or int64 as the offsets are (int64 for other offsets).
        Spare values (`scree.with_capacity`) are left out.

    Raises
    ------
    ImportError
        TensorFlow is missing.
    TypeError
        TensorFlow has no such dtype.
    ValueError
        `arr` has a `ragged_dim` other than 0.
    """
    tf = library("to_tensorflow", "tensorflow", "tensorflow")
    expect_array("to_tensorflow", arr)
    along_axis_0("to_tensorflow", arr, "a RaggedTensor")
    host = to_numpy(arr)
    values, offsets = readable(used_values("to_tensorflow", host)), host.offsets
    try:
        dtype = tf.as_dtype(values.dtype)
    except TypeError as refused:
        raise TypeError(
            f"to_tensorflow: got dtype {values.dtype.name}, which TensorFlow does not have; arr.astype casts"
        ) from refused
    splits = offsets if offsets.dtype in (np.int32, np.int64) else offsets.astype(np.int64)
    return tf.RaggedTensor.from_row_splits(
        tf.constant(values, dtype=dtype), tf.constant(readable(splits)), validate=False
    )


def from_tensorflow(ragged: Any) -> Array:
    """Make an Array of NumPy from a RaggedTensor. Copies where TensorFlow's own `numpy()` does.

    Parameters
    ----------
    ragged : tensorflow.RaggedTensor of (B, None, *features), ragged_rank 1

    Returns
    -------
    Array of (T, *features)
        Its offsets have the dtype of the `row_splits`. No gradients cross.

    Raises
    ------
    ImportError
        TensorFlow is missing.
    TypeError
        `ragged` is no RaggedTensor, or holds strings.
    ValueError
        It is ragged along more than one axis, or its row splits are invalid.
    NotImplementedError
        `ragged` is symbolic, inside a `tf.function`.
    """
    tf = library("from_tensorflow", "tensorflow", "tensorflow")
    if not isinstance(ragged, tf.RaggedTensor):
        raise TypeError(f"from_tensorflow: got {type(ragged).__name__}; needs a tensorflow.RaggedTensor")
    if ragged.ragged_rank != 1:
        raise ValueError(
            f"from_tensorflow: got ragged_rank {ragged.ragged_rank}; needs 1; ragged.merge_dims joins ragged axes"
        )
    if ragged.dtype == tf.string:
        raise TypeError("from_tensorflow: got dtype string; needs numbers or bools")
    if not (tf.is_tensor(ragged.values) and hasattr(ragged.values, "numpy")):
        raise NotImplementedError("from_tensorflow: the RaggedTensor is symbolic; call this outside of the tf.function")
    return Array(ragged.values.numpy(), ragged.row_splits.numpy())
