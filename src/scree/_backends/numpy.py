"""NumPy behind `_protocol.Backend`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ._protocol import Any, Dense, Flatten, HostArray, HostInts, Unflatten

NAME = "numpy"
EAGER = True
TRACES_NUMPY = False


def why_not_dense(x: Dense) -> str | None:
    if isinstance(x, np.ma.MaskedArray):
        return "a masked array, whose mask would be lost; fill it, or drop what it masks"
    if x.dtype.hasobject:
        return f"dtype {x.dtype}; needs numbers or bools, not Python objects"
    return None


def asarray(data: HostArray, like: Dense) -> Dense:
    return data


def arange(n: int, like: Dense) -> Dense:
    return np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)


def full(shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
    return np.full(shape, value, dtype=like.dtype)


def sizes(arrays: Sequence[Dense], axis: int) -> HostInts:
    if axis == 0:
        return np.fromiter(map(len, arrays), np.int64, len(arrays))
    return np.fromiter([x.shape[axis] for x in arrays], np.int64, len(arrays))


def concat(arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
    return np.concatenate(arrays, axis=axis, dtype=arrays[0].dtype, casting="equiv")  # only the byte order may differ


def take(x: Dense, index: Dense, axis: int) -> Dense:
    return np.take(x, index, axis=axis)


def split(x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
    cuts = offsets.tolist()
    if axis == 0:
        return [x[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    lead = (slice(None),) * axis
    return [x[(*lead, slice(a, b))] for a, b in zip(cuts, cuts[1:], strict=False)]


def where(condition: Dense, a: Dense, b: Dense) -> Dense:
    return np.where(condition, a, b)


def permute_dims(x: Dense, axes: tuple[int, ...]) -> Dense:
    return np.transpose(x, axes)


def searchsorted(x: Dense, values: Dense) -> Dense:
    return np.searchsorted(x, values, side="right")


def cumsum(x: Dense) -> Dense:
    return np.cumsum(x)


def exp(x: Dense) -> Dense:
    return np.exp(x)


def log(x: Dense) -> Dense:
    return np.log(x)


def sqrt(x: Dense) -> Dense:
    return np.sqrt(x)


def tanh(x: Dense) -> Dense:
    return np.tanh(x)


def sum(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return np.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype.type)  # in native byte order


def max(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return np.max(x, axis=axis, keepdims=keepdims)


def min(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return np.min(x, axis=axis, keepdims=keepdims)


def matmul(a: Dense, b: Dense) -> Dense:
    return np.matmul(a, b)


def upcast(x: Dense) -> Dense:
    return x.astype(np.float32) if dtype_name(x) in ("float16", "bfloat16") else x


def cast_like(x: Dense, like: Dense) -> Dense:
    return x.astype(like.dtype, copy=False)


def astype(x: Dense, dtype: Any) -> Dense:
    return x.astype(_dtype(dtype), copy=False)


def _dtype(dtype: Any) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype.startswith(("bfloat", "float8", "float4")):
        try:
            import ml_dtypes
        except ImportError as missing:
            raise TypeError(
                f"dtype: NumPy has {dtype} only with the package ml_dtypes; pip install ml_dtypes"
            ) from missing
        return np.dtype(getattr(ml_dtypes, dtype))
    return np.dtype(dtype)


_NAMES: dict[Any, str] = {}  # NumPy makes a name anew whenever it is asked


def dtype_name(x: Dense) -> str:
    found = _NAMES.get(x.dtype)
    if found is None:
        found = _NAMES[x.dtype] = x.dtype.name
    return found


def device_of(x: Dense) -> str:
    return "cpu"


def to_device(x: Dense, device: Any) -> Dense:
    if device != "cpu":
        raise ValueError(f"device: NumPy arrays live on 'cpu', got {device!r}; scree.bridges brings them elsewhere")
    return x


def copy(x: Dense) -> Dense:
    return x.copy()


def portable(x: Dense) -> Dense:
    return x


def pin_memory(x: Dense) -> Dense:
    raise TypeError("pin_memory: NumPy has no page-locked memory; scree.bridges.to_torch(arr).pin_memory() has")


def is_traced(*arrays: Dense) -> bool:
    return False


def facts(*arrays: Any) -> tuple[Any, ...] | None:
    found: list[Any] = []
    for x in arrays:
        if type(x) is not np.ndarray:
            return None
        found += (x.dtype, x.shape)
    return tuple(found)


def to_host(x: Dense) -> HostArray:
    return x


def host_view(x: Dense) -> HostArray | None:
    return x


def moves(*arrays: Dense) -> None:
    return None


def adopt(data: HostArray, like: Dense) -> Dense:
    return data


def register_pytree(cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
    """NumPy has no transformations."""
