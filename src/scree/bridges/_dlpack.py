"""From any framework to any other: over DLPack where both sides can reach the memory, otherwise through the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .._array import Array, expect_array
from .._backends import Dense, backend_of, load
from .._backends._protocol import HostArray
from ._handover import concrete, library, readable

# Of the floating dtypes that NumPy lacks: the integers that hold their bits while they pass through it.
_BITS = {
    "bfloat16": np.int16,
    **dict.fromkeys(["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"], np.uint8),
}
_CPU, _CUDA = 1, 2  # DLPack's numbers


def to_numpy(arr: Array) -> Array:
    """Bring an Array to NumPy.

    Host memory is not copied: the result sees it (PyTorch on the CPU, MLX, JAX on the CPU; the last two read-only).
    A device's memory is copied.

    Parameters
    ----------
    arr : Array
        Of any framework; one of NumPy is returned as it is.

    Returns
    -------
    Array
        The same dtypes; bfloat16 and the float8 dtypes are those of `ml_dtypes`. Detached: NumPy has no gradients.

    Raises
    ------
    ImportError
        The dtype is bfloat16 or float8 and `ml_dtypes` is not installed.
    NotImplementedError
        `arr` is traced by a compiler or a transformation.
    ValueError
        The offsets, which the host sees now, are invalid.

    Examples
    --------
    >>> import scree, torch
    >>> arr = scree.pack([torch.ones(2), torch.ones(1)])
    >>> scree.bridges.to_numpy(arr).values
    array([1., 1., 1.], dtype=float32)
    """
    return _moved("to_numpy", "numpy", arr, lambda x: _on_host("to_numpy", x))


def to_torch(arr: Array) -> Array:
    """Bring an Array to PyTorch.

    Copies only what PyTorch cannot see where it is: NumPy arrays that are read-only, unaligned, of foreign byte order
    or with negative strides, MLX arrays that are not contiguous, CuPy arrays with negative strides, and memory of a
    device that PyTorch has no build for.
    What is shared must not be written to where the other framework's arrays are immutable (JAX, MLX).

    Parameters
    ----------
    arr : Array
        Of any framework; one of PyTorch is returned as it is, with its gradients.

    Returns
    -------
    Array
        The same dtypes, on the device where `arr` is; but uint16, uint32 and uint64 offsets, with which PyTorch cannot
        calculate, become int64. It requires no gradients: none cross from another framework.

    Raises
    ------
    ImportError
        PyTorch is missing.
    TypeError
        PyTorch has no such dtype.
    NotImplementedError
        `arr` is traced by a compiler or a transformation.
    ValueError
        The offsets are seen on the host now, and are invalid.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.pack([np.ones(2, np.float32), np.ones(1, np.float32)])
    >>> scree.bridges.to_torch(arr).values
    tensor([1., 1., 1.])
    """
    torch = library("to_torch", "torch", "torch")

    def adopted(x: HostArray) -> Dense:
        name = x.dtype.name
        if not isinstance(getattr(torch, name, None), torch.dtype) or not (name in _BITS or x.dtype.kind in "biufc"):
            raise TypeError(f"to_torch: got dtype {name}, which PyTorch does not have; arr.astype casts")
        x = x if x.flags.writeable else x.copy()  # PyTorch has no read-only tensors
        x = x.view(np.uint64) if name == "uint64" else x  # C's long long, which PyTorch does not know, is another
        return (
            torch.from_numpy(x.view(_BITS[name])).view(getattr(torch, name)) if name in _BITS else torch.from_numpy(x)
        )

    def bring(x: Dense) -> Dense:
        lent = _lent(x)
        where = _memory(lent)
        if not isinstance(lent, np.ndarray) and (where == _CPU or (where == _CUDA and torch.cuda.is_available())):
            return torch.from_dlpack(lent)
        return adopted(_on_host("to_torch", lent))

    return _moved("to_torch", "torch", arr, bring, offsets_to=dict.fromkeys(("uint16", "uint32", "uint64"), "int64"))


def to_jax(arr: Array) -> Array:
    """Bring an Array to JAX.

    Shares memory with PyTorch and CuPy on a device that JAX has too, and with PyTorch on the CPU where the tensor is
    contiguous and aligned as XLA needs it; MLX memory likewise. What is shared must not be written to afterwards.
    NumPy arrays go to JAX's default device, which copies them unless it can share memory with the host.

    Parameters
    ----------
    arr : Array
        Of any framework; one of JAX is returned as it is.

    Returns
    -------
    Array
        The same dtypes; but 64-bit offsets become int32 while JAX's 64-bit types are off. No gradients cross.

    Raises
    ------
    ImportError
        JAX is missing.
    ValueError
        JAX would narrow 64-bit values, or offsets of 2**31 and beyond: its 64-bit types are off.
    TypeError
        JAX has no such dtype.
    NotImplementedError
        `arr` is traced by a compiler or a transformation.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.pack([np.ones(2, np.float32), np.ones(1, np.float32)])
    >>> scree.bridges.to_jax(arr)
    scree.Array(batch_size=2, total_length=3, feature_shape=(), dtype=float32)
    """
    jax = library("to_jax", "jax", "jax")
    jnp = jax.numpy

    def bring(x: Dense) -> Dense:
        name = backend_of(x).dtype_name(x)
        if not hasattr(jnp, "bool_" if name == "bool" else name):
            raise TypeError(f"to_jax: got dtype {name}, which JAX does not have; arr.astype casts")
        kept = jax.dtypes.canonicalize_dtype(name).name
        if kept != name:
            raise ValueError(
                f"to_jax: got dtype {name}, which JAX would narrow to {kept}; cast with arr.astype, or set "
                "jax_enable_x64"
            )
        lent = _lent(x, compact=True)
        where = _memory(lent)
        if not isinstance(lent, np.ndarray) and (where == _CPU or (where == _CUDA and has_cuda)):
            return jnp.from_dlpack(lent)
        return jnp.asarray(_on_host("to_jax", lent))

    has_cuda = jax.default_backend() in ("gpu", "cuda")
    wide = jax.dtypes.canonicalize_dtype("int64").name == "int64"
    if not wide and isinstance(arr, Array) and arr.total_length >= 2**31:
        raise ValueError(
            f"to_jax: the offsets of total_length {arr.total_length} need int64 and JAX's 64-bit types are off; set "
            "jax_enable_x64"
        )
    return _moved("to_jax", "jax", arr, bring, offsets_to={} if wide else {"int64": "int32", "uint64": "int32"})


def to_mlx(arr: Array) -> Array:
    """Bring an Array to MLX. Copies: MLX makes its own memory.

    Parameters
    ----------
    arr : Array
        Of any framework; one of MLX is returned as it is.

    Returns
    -------
    Array
        The same dtypes. No gradients cross.

    Raises
    ------
    ImportError
        MLX is missing.
    ValueError
        The values are float64 and MLX works on a GPU, which has no float64; or complex128, which MLX would narrow.
    TypeError
        MLX has no such dtype.
    NotImplementedError
        `arr` is traced by a compiler or a transformation.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.pack([np.ones(2, np.float32), np.ones(1, np.float32)])
    >>> scree.bridges.to_mlx(arr)
    scree.Array(batch_size=2, total_length=3, feature_shape=(), dtype=float32)
    """
    mx = library("to_mlx", "mlx.core", "mlx")

    def bring(x: Dense) -> Dense:
        name = backend_of(x).dtype_name(x)
        if name == "complex128" or (name == "float64" and mx.default_device() != mx.cpu):
            raise ValueError(
                f"to_mlx: got dtype {name}, which MLX does not have on {mx.default_device()}; cast with arr.astype"
            )
        dtype = getattr(mx, "bool_" if name == "bool" else name, None)
        if not isinstance(dtype, mx.Dtype):
            raise TypeError(f"to_mlx: got dtype {name}, which MLX does not have; arr.astype casts")
        lent = _lent(x)
        if _memory(lent) != _CPU or name == "float64":
            lent = _on_host("to_mlx", x)
        # Without the dtype MLX narrows float64 in silence; with it, it takes no bfloat16 and no negative strides.
        return mx.array(readable(lent), dtype=dtype) if name == "float64" else mx.array(lent)

    return _moved("to_mlx", "mlx", arr, bring)


def to_cupy(arr: Array) -> Array:
    """Bring an Array to CuPy.

    Shares memory with PyTorch and JAX on a CUDA device; what is on the host is copied to the current device.

    Parameters
    ----------
    arr : Array
        Of any framework; one of CuPy is returned as it is.

    Returns
    -------
    Array
        The same dtypes. Detached: CuPy has no gradients.

    Raises
    ------
    ImportError
        CuPy is missing.
    TypeError
        CuPy has no such dtype (bfloat16 before CuPy 14).
    NotImplementedError
        `arr` is traced by a compiler or a transformation.
    """
    cupy = library("to_cupy", "cupy", "cupy")

    def bring(x: Dense) -> Dense:
        name = backend_of(x).dtype_name(x)
        try:
            cupy.empty(0, _numpy_dtype("to_cupy", name))
        except (TypeError, ValueError) as refused:
            raise TypeError(f"to_cupy: got dtype {name}, which CuPy does not have; arr.astype casts") from refused
        lent = _lent(x)
        return cupy.from_dlpack(lent) if _memory(lent) == _CUDA else cupy.asarray(_on_host("to_cupy", x))

    return _moved("to_cupy", "cupy", arr, bring)


def _moved(
    op: str,
    framework: str,
    arr: Array,
    bring: Callable[[Dense], Dense],
    offsets_to: dict[str, str] | None = None,
) -> Array:
    """Make the Array of the other framework: `bring` takes one dense array there; what the host knows goes along.

    `offsets_to` names the dtypes that offsets get instead of those that the other framework cannot use.
    """
    expect_array(op, arr)
    source, target = arr._xp, load(framework)
    if source is target:
        return arr
    concrete(op, arr)
    arr._known_offsets()  # noted on the way, where that waits for nothing
    structure, offsets = arr._moved_structure(), arr.offsets
    dtype = (offsets_to or {}).get(source.dtype_name(offsets))
    if dtype is not None:
        offsets = source.astype(offsets, dtype)
        structure.host = None if structure.host is None else structure.host.astype(dtype)
    moved = Array._make(bring(arr.values), bring(offsets), arr.ragged_dim, structure)
    on_host = target.EAGER and target.host_view(moved.offsets) is not None
    return moved.validate() if on_host else moved


def _memory(x: Dense) -> int:
    """The kind of device whose memory x is in, as DLPack numbers them."""
    return int(x.__dlpack_device__()[0])


def _lent(x: Dense, *, compact: bool = False) -> Dense:
    """Return x as another framework may read it; `compact`: contiguous too. A copy only where it must be."""
    lend = _LEND.get(backend_of(x).NAME)
    return x if lend is None else lend(x, compact)


def _lent_by_numpy(x: Dense, compact: bool) -> Dense:
    return np.ascontiguousarray(readable(x)) if compact else readable(x)


def _lent_by_torch(x: Dense, compact: bool) -> Dense:
    x = x.detach().resolve_conj().resolve_neg()
    return x.contiguous() if compact else x


def _lent_by_jax(x: Dense, _compact: bool) -> Dense:
    devices = list(x.devices())
    # DLPack speaks of one device, and of no TPU.
    return x if len(devices) == 1 and devices[0].platform in ("cpu", "gpu", "cuda") else np.asarray(x)


def _lent_by_mlx(x: Dense, _compact: bool) -> Dense:
    import mlx.core as mx

    return mx.contiguous(x)  # a reversed array has negative strides, at which PyTorch aborts the process


def _lent_by_cupy(x: Dense, compact: bool) -> Dense:
    reversed_axes = any(stride < 0 for stride in x.strides)  # PyTorch aborts the process at them
    return x.copy() if reversed_axes or (compact and not x.flags.c_contiguous) else x


# What a framework wants done before another may read its arrays; without an entry, nothing.
_LEND: dict[str, Callable[[Dense, bool], Dense]] = {
    "numpy": _lent_by_numpy,
    "torch": _lent_by_torch,
    "jax": _lent_by_jax,
    "mlx": _lent_by_mlx,
    "cupy": _lent_by_cupy,
}


def _on_host(op: str, x: Dense) -> HostArray:
    """Return x as a NumPy array of the same dtype: a view of host memory, a copy of a device's."""
    xp = backend_of(x)
    name, fetch = xp.dtype_name(x), _FETCH.get(xp.NAME, np.asarray)
    host = fetch(x)
    return host if host.dtype.name == name else host.view(_numpy_dtype(op, name))


def _fetch_torch(x: Dense) -> HostArray | None:
    return load("torch").host_view(_lent_by_torch(x, compact=False).cpu())


def _fetch_mlx(x: Dense) -> HostArray:
    import mlx.core as mx

    host = np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    host.flags.writeable = False  # MLX may share the memory with other arrays
    return host


def _fetch_cupy(x: Dense) -> HostArray:
    return x.get()


# How the memory is reached from the host where np.asarray does not, or not for every dtype.
_FETCH: dict[str, Callable[[Dense], Any]] = {"torch": _fetch_torch, "mlx": _fetch_mlx, "cupy": _fetch_cupy}


def _numpy_dtype(op: str, name: str) -> np.dtype[Any]:
    if name not in _BITS:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as missing:
        raise ImportError(f"{op}: NumPy has {name} only with the package ml_dtypes; pip install ml_dtypes") from missing
    return np.dtype(getattr(ml_dtypes, name))
