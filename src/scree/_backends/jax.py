"""JAX behind `_protocol.Backend`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._protocol import Any, Dense, Flatten, HostArray, HostInts, Unflatten

NAME = "jax"
EAGER = False
TRACES_NUMPY = False


def why_not_dense(x: Dense) -> str | None:
    return None


def asarray(data: HostArray, like: Dense) -> Dense:
    if data.dtype.itemsize == 8 and jax.dtypes.canonicalize_dtype(data.dtype) != data.dtype:
        raise ValueError(
            f"values: JAX would narrow {data.dtype.name} to {jax.dtypes.canonicalize_dtype(data.dtype).name}; "
            "cast first, or set jax_enable_x64"
        )
    return _place(data, like)


def _place(data: HostArray, like: Dense) -> Dense:
    """Keep to the device of `like` only where the user chose one: JAX moves uncommitted arrays by itself."""
    if isinstance(like, Tracer) or not like.committed:
        return jnp.asarray(data)
    return jax.device_put(data, like.sharding if like.ndim == data.ndim else next(iter(like.devices())))


def arange(n: int, like: Dense) -> Dense:
    if n < 2**31:
        return jnp.arange(n, dtype=jnp.int32)
    if not jax.config.read("jax_enable_x64"):
        raise ValueError(f"offsets: {n} positions need int64 and JAX's 64-bit types are off; set jax_enable_x64")
    return jnp.arange(n, dtype=jnp.int64)


def full(shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
    return jnp.full(shape, value, dtype=like.dtype)


def sizes(arrays: Sequence[Dense], axis: int) -> HostInts:
    return np.fromiter([x.shape[axis] for x in arrays], np.int64, len(arrays))


def concat(arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
    first = arrays[0]
    if [x.dtype for x in arrays].count(first.dtype) != len(arrays):  # JAX would promote
        raise TypeError("concat: the arrays have different dtypes")
    views = [host_view(x) for x in arrays]
    host = [view for view in views if view is not None]
    if len(host) == len(arrays):  # no program to compile for each new list of shapes
        return adopt(np.concatenate(host, axis=axis), first)
    return jnp.concatenate(arrays, axis=axis)


def take(x: Dense, index: Dense, axis: int) -> Dense:
    return jnp.take(x, index, axis=axis, mode="clip")


def split(x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
    cuts = offsets.tolist()
    host = host_view(x)
    source = x if host is None else host
    lead = (slice(None),) * axis
    rows = [source[(*lead, slice(a, b))] for a, b in zip(cuts, cuts[1:], strict=False)]
    return rows if host is None else [adopt(row, x) for row in rows]


def where(condition: Dense, a: Dense, b: Dense) -> Dense:
    return jnp.where(condition, a, b)


def permute_dims(x: Dense, axes: tuple[int, ...]) -> Dense:
    return jnp.transpose(x, axes)


def searchsorted(x: Dense, values: Dense) -> Dense:
    return jnp.searchsorted(x, values, side="right")


def cumsum(x: Dense) -> Dense:
    return jnp.cumsum(x)


def exp(x: Dense) -> Dense:
    return jnp.exp(x)


def log(x: Dense) -> Dense:
    return jnp.log(x)


def sqrt(x: Dense) -> Dense:
    return jnp.sqrt(x)


def tanh(x: Dense) -> Dense:
    return jnp.tanh(x)


def sum(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return jnp.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype)


def max(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return jnp.max(x, axis=axis, keepdims=keepdims)


def min(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return jnp.min(x, axis=axis, keepdims=keepdims)


def matmul(a: Dense, b: Dense) -> Dense:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def upcast(x: Dense) -> Dense:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else x


def cast_like(x: Dense, like: Dense) -> Dense:
    return x.astype(like.dtype)


def astype(x: Dense, dtype: Any) -> Dense:
    wanted = jnp.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise TypeError(f"dtype: JAX's 64-bit types are off, so {wanted.name} is not to be had; set jax_enable_x64")
    return x.astype(wanted)


def dtype_name(x: Dense) -> str:
    return x.dtype.name


def device_of(x: Dense) -> Any:
    return None if isinstance(x, Tracer) else x.device


def to_device(x: Dense, device: Any) -> Dense:
    if isinstance(device, str):
        platform, _, index = device.partition(":")
        device = jax.devices(platform)[int(index or 0)]
    return jax.device_put(x, device)


def copy(x: Dense) -> Dense:
    return jnp.copy(x)


def portable(x: Dense) -> Dense:
    return x


def pin_memory(x: Dense) -> Dense:
    raise TypeError("pin_memory: JAX places host memory by itself; jax.device_put takes a memory kind")


def is_traced(*arrays: Dense) -> bool:
    return any(isinstance(x, Tracer) for x in arrays)


def facts(*arrays: Any) -> tuple[Any, ...] | None:
    found: list[Any] = []
    for x in arrays:
        if isinstance(x, Tracer) or not isinstance(x, jax.Array):
            return None
        found += (x.dtype, x.shape, x.sharding)
    return tuple(found)


def to_host(x: Dense) -> HostArray:
    return np.asarray(x)


def host_view(x: Dense) -> HostArray | None:
    if isinstance(x, Tracer) or len(x.devices()) != 1 or next(iter(x.devices())).platform != "cpu":
        return None
    return np.asarray(x)


def moves(*arrays: Dense) -> None:
    return None


def adopt(data: HostArray, like: Dense) -> Dense:
    return _place(data, like)


def register_pytree(cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
    def flatten_with_keys(arr: Any) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        (values, offsets), aux = flatten(arr)
        keys = jax.tree_util.GetAttrKey("values"), jax.tree_util.GetAttrKey("offsets")
        return ((keys[0], values), (keys[1], offsets)), aux

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
