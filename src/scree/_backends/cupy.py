"""CuPy behind `_protocol.Backend`."""

from __future__ import annotations

from collections.abc import Sequence

import cupy  # pyright: ignore
import numpy as np

from ._protocol import Any, Dense, Flatten, HostArray, HostInts, Unflatten

cp: Any = cupy

NAME = "cupy"
EAGER = True
TRACES_NUMPY = False


def why_not_dense(x: Dense) -> str | None:
    return None


def asarray(data: HostArray, like: Dense) -> Dense:
    with like.device:
        return cp.asarray(data)


def arange(n: int, like: Dense) -> Dense:
    with like.device:
        return cp.arange(n, dtype=np.int32 if n < 2**31 else np.int64)


def full(shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
    with like.device:
        return cp.full(shape, value, dtype=like.dtype)


def sizes(arrays: Sequence[Dense], axis: int) -> HostInts:
    return np.fromiter([x.shape[axis] for x in arrays], np.int64, len(arrays))


def concat(arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
    first = arrays[0]
    if [x.dtype for x in arrays].count(first.dtype) != len(arrays):  # CuPy would promote
        raise TypeError("concat: the arrays have different dtypes")
    if [x.device for x in arrays].count(first.device) != len(arrays):  # CuPy would copy between devices
        raise ValueError("concat: the arrays are on different devices")
    with first.device:
        return cp.concatenate(list(arrays), axis=axis)


def take(x: Dense, index: Dense, axis: int) -> Dense:
    with x.device:
        return cp.take(x, index, axis=axis)


def split(x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
    cuts = offsets.tolist()
    lead = (slice(None),) * axis
    return [x[(*lead, slice(a, b))] for a, b in zip(cuts, cuts[1:], strict=False)]


def where(condition: Dense, a: Dense, b: Dense) -> Dense:
    with a.device:
        return cp.where(condition, a, b)


def permute_dims(x: Dense, axes: tuple[int, ...]) -> Dense:
    return cp.transpose(x, axes)


def searchsorted(x: Dense, values: Dense) -> Dense:
    with x.device:
        return cp.searchsorted(x, values, side="right")


def cumsum(x: Dense) -> Dense:
    with x.device:
        return cp.cumsum(x)


def exp(x: Dense) -> Dense:
    return cp.exp(x)


def log(x: Dense) -> Dense:
    return cp.log(x)


def sqrt(x: Dense) -> Dense:
    return cp.sqrt(x)


def tanh(x: Dense) -> Dense:
    return cp.tanh(x)


def sum(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return cp.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype)


def max(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return cp.max(x, axis=axis, keepdims=keepdims)


def min(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return cp.min(x, axis=axis, keepdims=keepdims)


def matmul(a: Dense, b: Dense) -> Dense:
    return cp.matmul(a, b)


def upcast(x: Dense) -> Dense:
    return x.astype(np.float32) if dtype_name(x) in ("float16", "bfloat16") else x


def cast_like(x: Dense, like: Dense) -> Dense:
    return x.astype(like.dtype, copy=False)


def astype(x: Dense, dtype: Any) -> Dense:
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return x.astype(np.dtype(dtype), copy=False)


def dtype_name(x: Dense) -> str:
    return x.dtype.name


def device_of(x: Dense) -> Any:
    return x.device


def to_device(x: Dense, device: Any) -> Dense:
    """`device`: a `cupy.cuda.Device`, its number, or ``"cuda:1"``."""
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        if kind not in ("cuda", "gpu"):
            raise ValueError(f"device: CuPy arrays live on 'cuda' devices, got {device!r}")
        device = int(number or 0)
    wanted = cp.cuda.Device(device)
    if x.device == wanted:
        return x
    with wanted:
        return cp.array(x)


def copy(x: Dense) -> Dense:
    with x.device:
        return x.copy()


def portable(x: Dense) -> Dense:
    return x


def pin_memory(x: Dense) -> Dense:
    raise TypeError("pin_memory: a CuPy array is on the device already")


def is_traced(*arrays: Dense) -> bool:
    return False


def facts(*arrays: Any) -> tuple[Any, ...] | None:
    found: list[Any] = []
    for x in arrays:
        if type(x) is not cp.ndarray:
            return None
        found += (x.dtype, x.shape, x.device.id)
    return tuple(found)


def to_host(x: Dense) -> HostArray:
    return cp.asnumpy(x)


def host_view(x: Dense) -> HostArray | None:
    return None


def moves(*arrays: Dense) -> None:
    return None


def adopt(data: HostArray, like: Dense) -> Dense:
    return asarray(data, like)


def register_pytree(cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
    """CuPy has no transformations."""
