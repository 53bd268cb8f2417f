"""PyTorch behind `_protocol.Backend`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from ._protocol import Any, Dense, Flatten, HostArray, HostInts, Moves, Unflatten

NAME = "torch"
EAGER = True
TRACES_NUMPY = True

# NumPy asks the kernel for huge pages and torch's allocator does not: large results on the host are made by NumPy.
_NUMPY_ALLOCATES_FROM = 1 << 20  # bytes

_STAND_IN = {1: torch.uint8, 2: torch.int16}  # bytes an element -> a dtype that NumPy has
_NUMPY_LACKS = frozenset(
    getattr(torch, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
PLAIN = (torch.Tensor, torch.nn.Parameter)

# Asked in every call: looking them up in their module takes as long as their answer.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_is_transformed = torch._C._are_functorch_transforms_active


def why_not_dense(x: Dense) -> str | None:
    if x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        return f"a {kind} tensor; needs a dense one; scree.bridges.from_torch_nested takes nested ones"
    if x.is_nested or x.is_quantized:
        return f"a {'nested' if x.is_nested else 'quantized'} tensor; needs a dense one"
    return None


def asarray(data: HostArray, like: Dense) -> Dense:
    if not data.flags.writeable:
        data = data.copy()
    return torch.from_numpy(data).to(like.device)


def arange(n: int, like: Dense) -> Dense:
    return torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64, device=like.device)


def full(shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def sizes(arrays: Sequence[Dense], axis: int) -> HostInts:
    return np.fromiter([x.shape[axis] for x in arrays], np.int64, len(arrays))


_sizes = sizes  # concat has an argument of that name


def concat(arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
    first = arrays[0]
    dtype = first.dtype
    if [x.dtype for x in arrays].count(dtype) != len(arrays):  # torch would promote
        raise TypeError("concat: the arrays have different dtypes")
    if torch.compiler.is_compiling():
        return torch.cat(tuple(arrays), dim=axis)
    lengths = _sizes(arrays, axis) if sizes is None else sizes
    # torch.cat drops empty tensors of shape (0,) whatever the others are
    if not lengths.all() and [x.ndim for x in arrays].count(first.ndim) != len(arrays):
        raise ValueError("concat: the arrays have different numbers of axes")
    out = _room_for(first, int(lengths.sum()), axis)
    if out is not None and torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        out = None
    try:
        return torch.cat(cast("list[Any]", arrays), dim=axis, out=out)
    except RuntimeError as failed:  # the shapes or the devices differ
        raise ValueError(str(failed)) from failed


def _room_for(first: Dense, length: int, axis: int) -> Dense | None:
    """Uninitialised host memory, from NumPy, for the joined tensor; None where torch may as well find its own."""
    size = first.dtype.itemsize * length
    for i, n in enumerate(first.shape):
        size *= 1 if i == axis else n
    if size < _NUMPY_ALLOCATES_FROM or first.device.type != "cpu" or type(first) not in PLAIN or is_recorded():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
    return torch.from_numpy(np.empty(size, np.uint8)).view(first.dtype).view(shape)


def take(x: Dense, index: Dense, axis: int) -> Dense:
    if index.ndim == 1:
        return torch.index_select(x, axis, index)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return torch.index_select(x, axis, index.reshape(-1)).reshape(shape)


def split(x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
    lengths = np.diff(offsets).tolist()
    spare = x.shape[axis] - int(offsets[-1])
    rows = torch.split(x, [*lengths, spare] if spare else lengths, dim=axis)
    return list(rows[: len(lengths)])


def where(condition: Dense, a: Dense, b: Dense) -> Dense:
    return torch.where(condition, a, b)


def permute_dims(x: Dense, axes: tuple[int, ...]) -> Dense:
    return x.permute(axes)


def searchsorted(x: Dense, values: Dense) -> Dense:
    return torch.searchsorted(x, values.to(x.dtype), right=True)


def cumsum(x: Dense) -> Dense:
    return torch.cumsum(x, 0)


def exp(x: Dense) -> Dense:
    return torch.exp(x)


def log(x: Dense) -> Dense:
    return torch.log(x)


def sqrt(x: Dense) -> Dense:
    return torch.sqrt(x)


def tanh(x: Dense) -> Dense:
    return torch.tanh(x)


def sum(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return torch.sum(x, dim=axis, keepdim=keepdims, dtype=x.dtype)


def max(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return torch.amax(x, dim=axis, keepdim=keepdims)


def min(x: Dense, axis: int, keepdims: bool = False) -> Dense:
    return torch.amin(x, dim=axis, keepdim=keepdims)


def matmul(a: Dense, b: Dense) -> Dense:
    return torch.matmul(a, b)


def upcast(x: Dense) -> Dense:
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def cast_like(x: Dense, like: Dense) -> Dense:
    return x.to(like.dtype)


def astype(x: Dense, dtype: Any) -> Dense:
    if isinstance(dtype, str):
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise TypeError(f"dtype: PyTorch has no dtype {dtype!r}")
        dtype = named
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: got {dtype!r}; needs a torch.dtype or its name")
    return x.to(dtype)


_NAMES = {found: str(found).removeprefix("torch.") for found in vars(torch).values() if isinstance(found, torch.dtype)}


def dtype_name(x: Dense) -> str:
    return _NAMES[x.dtype]


def device_of(x: Dense) -> torch.device:
    return x.device


def to_device(x: Dense, device: Any) -> Dense:
    return x.to(device)


def copy(x: Dense) -> Dense:
    return x.clone()


def portable(x: Dense) -> Dense:
    return x


def pin_memory(x: Dense) -> Dense:
    return x.pin_memory()


def is_traced(*arrays: Dense) -> bool:
    if torch.compiler.is_compiling() or is_recorded():
        return True
    for x in arrays:
        if type(x) not in PLAIN:
            return True
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return False
    return any(_is_wrapped(x) or _is_dual(x) for x in arrays)


def _is_wrapped(x: Dense) -> bool:
    """Whether a torch.func transformation has put x into a wrapper; what it did not touch is a constant to it."""
    return is_functorch_wrapped_tensor(x)


def is_recorded() -> bool:
    """Whether a mode (make_fx, fake tensors) or torch.jit.trace records whatever is computed."""
    return _dispatch_modes() > 0 or bool(_tracing_state())


def facts(*arrays: Any) -> tuple[Any, ...] | None:
    if torch.compiler.is_compiling() or _dispatch_modes() or _is_transformed() or forward_ad._current_level >= 0:
        return None
    if _tracing_state():
        return None
    found: list[Any] = []
    for x in arrays:
        if type(x) not in PLAIN:
            return None
        found += (x.dtype, x.shape, x.device)
    return tuple(found)


def to_host(x: Dense) -> HostArray:
    if torch._C._are_functorch_transforms_active():
        with torch._C._DisableFuncTorch():
            return x.detach().cpu().numpy()
    return x.detach().cpu().numpy()


def host_view(x: Dense) -> HostArray | None:
    if torch.compiler.is_compiling() or type(x) not in PLAIN or not x.is_cpu or x.layout != torch.strided:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or _is_wrapped(x) or is_recorded() or _is_dual(x):
        return None
    if x.is_conj() or x.is_neg():
        return None
    if torch._C._are_functorch_transforms_active():  # whose views, of anything, are wrappers without memory
        with torch._C._DisableFuncTorch():
            return _bits(x)
    return _bits(x)


def _bits(x: Dense) -> HostArray:
    if x.requires_grad:
        x = x.detach()
    return (x.view(_STAND_IN[x.dtype.itemsize]) if x.dtype in _NUMPY_LACKS else x).numpy()


def _is_dual(x: Dense) -> bool:
    """Whether x carries a tangent of forward-mode differentiation."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


_moves: Any = None


def adopt_moves(kernels: Any) -> None:
    """Hand out these kernels from now on: they stand above this module, and are loaded only where Triton is."""
    global _moves
    _moves = kernels


def moves(*arrays: Dense) -> Moves | None:
    if _moves is None or torch.compiler.is_compiling() or not _moves.serves(*arrays):
        return None
    return _moves


def adopt(data: HostArray, like: Dense) -> Dense:
    return torch.from_numpy(data).view(like.dtype)


def register_pytree(cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
    def flatten_list(arr: Any) -> tuple[list[Any], Any]:
        children, aux = flatten(arr)
        return list(children), aux

    def flatten_with_keys(arr: Any) -> tuple[list[tuple[Any, Any]], Any]:
        (values, offsets), aux = flatten(arr)
        return [(_pytree.GetAttrKey("values"), values), (_pytree.GetAttrKey("offsets"), offsets)], aux

    _pytree.register_pytree_node(
        cls,
        flatten_list,
        lambda children, aux: unflatten(aux, tuple(children)),
        serialized_type_name="scree.Array",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=flatten_with_keys,
    )
