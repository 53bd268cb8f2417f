"""Argument checks. The only author of the messages about shapes, dtypes, devices and structure.

Every message is one line: the operation or field, what it got, what it needs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, cast

import numpy as np

from ._backends import Backend, Dense, backend_of, find_backend
from ._backends._protocol import HostArray, HostInts

# The largest finite value of the floating dtypes that cannot hold every Python float.
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
    "float8_e4m3fn": 448.0,
    "float8_e5m2": 57344.0,
}
_FEW = 64  # offsets
_FLOAT64_END = 1.7976931348623157e308
_FLOATS = (*_LARGEST, "float64")


def is_integer(dtype_name: str) -> bool:
    """Whether the dtype of this name is an integer (bool is none)."""
    return dtype_name.startswith(("int", "uint"))


def is_floating(dtype_name: str) -> bool:
    """Whether the dtype of this name is a real floating one."""
    return dtype_name in _FLOATS or dtype_name.startswith("float")


def integer_limits(dtype_name: str) -> tuple[int, int]:
    """The smallest and the largest value of the integer dtype of this name."""
    bits = int(dtype_name.removeprefix("u").removeprefix("int"))
    return (0, 2**bits - 1) if dtype_name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def whole(value: Any, name: str) -> int:
    """Return an integer argument as an int: anything with `__index__` but a bool."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: got {value!r}; needs an integer")


def axis(ragged_dim: Any, ndim: int, name: str = "ragged_dim", of: str = "values") -> int:
    """Return `ragged_dim` counted from the front."""
    dim = whole(ragged_dim, name)
    if ndim == 0:
        raise ValueError(f"{of}: got a scalar; needs at least one axis")
    if not -ndim <= dim < ndim:
        raise ValueError(f"{name}: got {dim}; needs {-ndim} <= {name} < {ndim}, {of} has {ndim} axes")
    return dim % ndim


def dense(x: Any, name: str) -> Backend:
    """Return the backend of an argument that must be a dense array that scree can carry."""
    xp = backend_of(x, name)
    against = xp.why_not_dense(x)
    if against is not None:
        raise TypeError(f"{name}: {against}")
    return xp


def same_framework(xp: Backend, x: Any, name: str, beside: str) -> None:
    """Refuse an argument of another framework than `xp`."""
    other = find_backend(x)
    if other is not xp:
        got = other.NAME if other is not None else type(x).__name__
        raise TypeError(f"{name}: got {got}, but {beside} is {xp.NAME}; both must be of one framework")


def same_device(xp: Backend, x: Dense, y: Dense, name: str, beside: str) -> None:
    """Refuse arrays on different devices."""
    got, wanted = xp.device_of(x), xp.device_of(y)
    if got is not None and wanted is not None and got != wanted:
        raise ValueError(f"{name}: on device {got}, but {beside} is on {wanted}; move one of them")


def integers(xp: Backend, x: Dense, name: str) -> None:
    """Refuse anything but a 1-D array of integers."""
    dtype = xp.dtype_name(x)
    if not is_integer(dtype):
        raise TypeError(f"{name}: got dtype {dtype}; needs integers")
    if x.ndim != 1:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}; needs one axis")
    if dtype.startswith("uint"):
        try:
            _ = x[:1] - x[:1]
        except (NotImplementedError, RuntimeError):
            raise TypeError(f"{name}: {xp.NAME} cannot calculate with {dtype}; needs int32 or int64") from None


def host_offsets(offsets: HostInts, total: int, spare: bool) -> None:
    """Refuse offsets, known on the host, that do not describe `total` values."""
    if len(offsets) <= _FEW:  # in a list it takes less than the calls of NumPy
        listed = offsets.tolist()
        first, last, fall = listed[0], listed[-1], sorted(listed) != listed
    else:
        first, last, fall = offsets[0], int(offsets[-1]), bool((offsets[1:] < offsets[:-1]).any())
    if first != 0:
        raise ValueError(f"offsets[0]: got {first}; needs 0")
    if fall:
        i = int((offsets[1:] < offsets[:-1]).argmax()) + 1
        raise ValueError(f"offsets[{i}]: got {offsets[i]} after {offsets[i - 1]}; offsets must never fall")
    if last > total or (last < total and not spare):
        need = f"at most {total}" if spare else f"{total}"
        raise ValueError(f"offsets[-1]: got {last}; needs {need}, the size of the ragged axis of values")


def host_lengths(lengths: HostArray, total: int | None) -> HostInts:
    """Return row lengths, known on the host, after checking that they describe `total` values (None: any)."""
    if lengths.size and lengths.min() < 0:
        i = int((lengths < 0).argmax())
        raise ValueError(f"lengths[{i}]: got {lengths[i]}; needs 0 or more")
    if total is not None:
        got = int(lengths.sum(dtype=np.int64))
        if got != total or (lengths.size and lengths.max() > total):  # beyond int64 a sum begins anew below 0
            got = sum(map(int, lengths))
            raise ValueError(f"lengths: they sum to {got}; needs {total}, the size of the ragged axis of values")
    return lengths


def host_ints(values: Sequence[Any] | HostArray, name: str) -> HostInts:
    """Return a list of Python integers, or a NumPy array of integers, as a 1-D NumPy array of integers."""
    array = np.asarray(values)
    if array.size == 0 and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got {array.dtype.name}; needs integers")
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}; needs one axis")
    return array


def fill_value(value: Any, dtype_name: str) -> Any:
    """Return `value` as the dtype holds it, or refuse: a number that would wrap, overflow or lose its fraction."""
    if not isinstance(value, (bool, int, float, complex, np.generic)):
        raise TypeError(f"fill_value: got {type(value).__name__}; needs a number")
    if dtype_name.startswith("complex"):
        return complex(value)
    if isinstance(value, (complex, np.complexfloating)):
        raise ValueError(f"fill_value: got {value!r}; dtype {dtype_name} has no imaginary part")
    if dtype_name == "bool":
        if value not in (0, 1):
            raise ValueError(f"fill_value: got {value!r}; dtype bool holds False and True")
        return bool(value)
    if is_integer(dtype_name):
        low, high = integer_limits(dtype_name)
        number = value if isinstance(value, int) else int(value) if math.isfinite(value) else None
        if number is None or number != value or not low <= number <= high:
            raise ValueError(f"fill_value: got {value!r}; dtype {dtype_name} holds integers from {low} to {high}")
        return number
    largest = _LARGEST.get(dtype_name, _FLOAT64_END)
    size = abs(cast(float, value))
    if size > largest and size != math.inf:
        raise ValueError(f"fill_value: got {value!r:.40}; dtype {dtype_name} ends at {largest:.6g}")
    return float(value)


def at_least(name: str, got: int, bound: int, what: str) -> None:
    """Refuse `got` below `bound`."""
    if got < bound:
        raise ValueError(f"{name}: got {got}; needs at least {bound}, {what}")


def _within(name: str, start: int, end: int) -> None:
    if not -(2**31) <= start <= end:
        raise ValueError(f"{name}: got {start}; needs {-(2**31)} to {end}, so that positions do not wrap")


def starts(name: str, xp: Backend, start: Any, offsets: Dense, total: int = 0) -> int | Dense:
    """Return the first position of all rows as an int, or of each row as an integer array (B,) beside `offsets`.

    Those that are known on the host must leave room for `total` more in int32, or in int64 where `total` is beyond it.
    """
    end = (2**31 if total < 2**31 else 2**63) - max(total, 1)
    if getattr(start, "ndim", 0) == 0 and not isinstance(start, (list, tuple)):
        number = whole(start, name)
        _within(name, number, end)
        return number
    if isinstance(start, (list, tuple, np.ndarray)):
        host = host_ints(cast("list[Any]", start), name)
        if total and host.size:
            _within(name, int(host.min()), end)
            _within(name, int(host.max()), end)
        start = xp.asarray(host.astype(np.int32 if not host.size or abs(host).max() < 2**31 else np.int64), offsets)
    same_framework(xp, start, name, "the Array")
    integers(xp, start, name)
    same_device(xp, start, offsets, name, "the Array")
    if start.shape[0] != offsets.shape[0] - 1:
        raise ValueError(f"{name}: got shape {tuple(start.shape)}; needs ({offsets.shape[0] - 1},), one a sequence")
    return start


def same_kinds(op: str, arrays: Sequence[Any], dim: int) -> None:
    """Refuse a list whose entries are of different frameworks; a subclass of the framework's array may pass."""
    xp = backend_of(arrays[0], f"{op}: arrays[0]")
    for x in arrays:
        if find_backend(x) is not xp or xp.why_not_dense(x) is not None:
            odd_one_out(op, arrays, dim)


def odd_one_out(op: str, arrays: Sequence[Any], dim: int, cause: Exception | None = None) -> NoReturn:
    """Raise the error that names the first array that does not fit beside the first one.

    Called where joining them failed. `dim` is the ragged axis, counted from the front.
    """
    first = arrays[0]
    xp = backend_of(first, f"{op}: arrays[0]")
    for i, x in enumerate(arrays[1:], 1):
        for problem in _differences(xp, first, x, dim):
            message = f"{op}: arrays[{i}] has {problem.got}, arrays[0] has {problem.wanted}; all must agree"
            raise problem.kind(message) from cause
    raise ValueError(f"{op}: {len(arrays)} arrays could not be joined along ragged_dim={dim}") from cause


class _Difference:
    __slots__ = ("got", "kind", "wanted")

    def __init__(self, kind: type[Exception], got: str, wanted: str) -> None:
        self.kind = kind
        self.got = got
        self.wanted = wanted


def _differences(xp: Backend, first: Dense, x: Any, dim: int) -> Iterable[_Difference]:
    other = find_backend(x)
    if other is not xp:
        got = f"framework {other.NAME}" if other is not None else f"type {type(x).__name__}"
        yield _Difference(TypeError, got, f"framework {xp.NAME}")
        return
    against = xp.why_not_dense(x)
    if against is not None:
        yield _Difference(TypeError, against, "a dense array")
        return
    if xp.dtype_name(x) != xp.dtype_name(first):
        yield _Difference(TypeError, f"dtype {xp.dtype_name(x)}", xp.dtype_name(first))
    if xp.device_of(x) != xp.device_of(first):
        yield _Difference(ValueError, f"device {xp.device_of(x)}", f"{xp.device_of(first)}")
    if x.ndim != first.ndim:
        yield _Difference(ValueError, f"{x.ndim} axes", f"{first.ndim}")
        return
    got, wanted = (tuple(y.shape[:dim]) + tuple(y.shape[dim + 1 :]) for y in (x, first))
    if got != wanted:
        yield _Difference(ValueError, f"feature shape {got}", f"{wanted}")
