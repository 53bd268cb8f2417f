"""MLX behind `_protocol.Backend`.

MLX arrays are lazy and carry no mark of the transformation that traces them, so values never go through host memory:
a gradient would be lost in silence. Only offsets do, which MLX itself refuses to evaluate while it compiles.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ._protocol import Any, Dense, Flatten, HostArray, HostInts, Unflatten

NAME = "mlx"
EAGER = False
TRACES_NUMPY = False

_LOG2_E = 1.4426950408889634


def why_not_dense(x: Dense) -> str | None:
    return None


def asarray(data: HostArray, like: Dense) -> Dense:
    if data.dtype == np.float64:
        return mx.array(data, dtype=mx.float64)  # without the dtype MLX narrows it in silence
    return mx.array(data)


def arange(n: int, like: Dense) -> Dense:
    return mx.arange(n, dtype=mx.int32 if n < 2**31 else mx.int64)


def full(shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
    if like.dtype == mx.uint64:
        value = np.uint64(value)  # MLX takes no int of Python beyond int64
    return mx.full(shape, mx.array(value, dtype=like.dtype))


def sizes(arrays: Sequence[Dense], axis: int) -> HostInts:
    return np.fromiter([x.shape[axis] for x in arrays], np.int64, len(arrays))


def concat(arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
    if [x.dtype for x in arrays].count(arrays[0].dtype) != len(arrays):  # MLX would promote
        raise TypeError("concat: the arrays have different dtypes")
    return mx.concatenate(list(arrays), axis=axis)


def take(x: Dense, index: Dense, axis: int) -> Dense:
    return mx.take(x, index, axis=axis)


def split(x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
    cuts = offsets.tolist()
    lead = (slice(None),) * axis
    return [x[(*lead, slice(a, b))] for a, b in zip(cuts, cuts[1:], strict=False)]


def where(condition: Dense, a: Dense, b: Dense) -> Dense:
    return mx.where(condition, a, b)


def permute_dims(x: Dense, axes: tuple[int, ...]) -> Dense:
    return mx.transpose(x, axes)


def searchsorted(x: Dense, values: Dense) -> Dense:
    return mx.searchsorted(x, values.astype(x.dtype), side="right").astype(
        mx.int64 if x.dtype == mx.int64 else mx.int32
    )


def cumsum(x: Dense) -> Dense:
    return mx.cumsum(x)


def on_cpu() -> bool:
    """Whether what is computed now is computed on the CPU."""
    return mx.default_device() == mx.Device(mx.cpu)


def exp(x: Dense) -> Dense:
    # Without Apple's Accelerate, MLX's exp is a polynomial good to float32 in every dtype, and slower than its power.
    if sys.platform != "darwin" and on_cpu():
        return mx.power(mx.array(2, x.dtype), x * _LOG2_E)
    return mx.exp(x)


def log(x: Dense) -> Dense:
    return mx.log(x)


def sqrt(x: Dense) -> Dense:
    return mx.sqrt(x)


def tanh(x: Dense) -> Dense:
    return mx.tanh(x)


def sum(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    if x.shape[axis] == 0:  # over which mx.sum of MLX 0.32 sometimes spins for a minute on the CPU
        shape = [1 if i == axis % x.ndim else n for i, n in enumerate(x.shape)]
        x = mx.concatenate([x, mx.zeros(shape, x.dtype)], axis)
    return mx.sum(x, axis=axis, keepdims=keepdims).astype(x.dtype)


def max(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return mx.max(x, axis=axis, keepdims=keepdims)


def min(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return mx.min(x, axis=axis, keepdims=keepdims)


def matmul(a: Dense, b: Dense) -> Dense:
    return mx.matmul(a, b)


def upcast(x: Dense) -> Dense:
    return x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x


def cast_like(x: Dense, like: Dense) -> Dense:
    return x.astype(like.dtype)


def astype(x: Dense, dtype: Any) -> Dense:
    if isinstance(dtype, str):
        named = getattr(mx, "bool_" if dtype == "bool" else dtype, None)
        if not isinstance(named, mx.Dtype):
            raise TypeError(f"dtype: MLX has no dtype {dtype!r}")
        dtype = named
    if not isinstance(dtype, mx.Dtype):
        raise TypeError(f"dtype: got {dtype!r}; needs an mlx.core.Dtype or its name")
    return x.astype(dtype)


def dtype_name(x: Dense) -> str:
    return str(x.dtype).removeprefix("mlx.core.")


def device_of(x: Dense) -> Any:
    return mx.default_device()


def to_device(x: Dense, device: Any) -> Dense:
    """MLX memory is unified: an array is on every device, and streams choose where the work runs."""
    name = device if isinstance(device, str) else str(getattr(device, "type", device)).rpartition(".")[2]
    if name.partition(":")[0] not in ("cpu", "gpu"):
        raise ValueError(f"device: MLX has 'cpu' and 'gpu', got {device!r}")
    return x


def copy(x: Dense) -> Dense:
    return mx.array(x)


def portable(x: Dense) -> Dense | HostArray:
    return np.array(x) if x.dtype == mx.float64 else x  # MLX pickles it as float32


def pin_memory(x: Dense) -> Dense:
    raise TypeError("pin_memory: MLX memory is unified and needs no pinning")


def is_traced(*arrays: Dense) -> bool:
    try:
        mx.eval(*arrays)
    except ValueError:  # "[eval] Attempting to eval an array during function transformations ..."
        return True
    return False


def facts(*arrays: Any) -> tuple[Any, ...] | None:
    # Traced arrays are no others here, and no choice depends on whether values are traced: offsets are the same ones.
    found: list[Any] = [mx.default_device().type]
    for x in arrays:
        if type(x) is not mx.array:
            return None
        found += (x.dtype, x.shape)
    return tuple(found)


def to_host(x: Dense) -> HostArray:
    return np.array(x)


def host_view(x: Dense) -> HostArray | None:
    if x.dtype not in (mx.int32, mx.int64) or is_traced(x):
        return None
    return np.asarray(x)


def moves(*arrays: Dense) -> None:
    return None


def adopt(data: HostArray, like: Dense) -> Dense:
    return mx.array(data)


def register_pytree(cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
    """MLX knows trees of lists, tuples and dictionaries only; transform over `arr.values`."""
