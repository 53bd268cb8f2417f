"""The type: dense values, the offsets of the sequences in them, and the axis along which they are joined."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex, cast, overload

import numpy as np

from . import _backends, _check, _layout, _offsets, _rows
from ._backends import Backend, Dense, backend_of
from ._backends._protocol import HostInts
from ._html import raggedness
from ._offsets import Structure
from ._operators import Operators


class Array(Operators):
    """Join sequences of different lengths in one dense array, without padding.

    Sequence i is ``values[offsets[i]:offsets[i + 1]]`` along `ragged_dim`. An Array is immutable, holds exactly what
    it was given (no copy), and works the same on every framework in `values`.

    Parameters
    ----------
    values : array
        One dense array of NumPy, PyTorch, JAX, MLX or CuPy: all sequences joined along `ragged_dim`.
    offsets : array of (B + 1,), integer, or list of int
        Where the sequences begin and end: 0 first, never falling, the size of the ragged axis last. Of the same
        framework and on the same device as `values`; a list becomes int32 (int64 where the total needs it). This is
        FlashAttention's ``cu_seqlens``.
    ragged_dim : int
        The axis of `values` that varies; negative counts from the end.

    Raises
    ------
    TypeError, ValueError
        The field is named, with what it got and what it needs. Offsets that are on the host (NumPy, PyTorch on the
        CPU) are checked in full; on a device, in JAX and MLX, and under a trace only shapes, dtypes and devices are,
        so that construction never waits: `validate` checks the rest.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.Array(np.arange(5.0), np.array([0, 2, 2, 5]))
    >>> arr
    scree.Array(batch_size=3, total_length=5, feature_shape=(), dtype=float64)
    >>> arr[2]
    array([2., 3., 4.])
    """

    __slots__ = ("__weakref__", "_offsets", "_ragged_dim", "_structure", "_values")

    _values: Dense
    _offsets: Dense
    _ragged_dim: int
    _structure: Structure

    def __init__(self, values: Dense, offsets: Any, ragged_dim: int = 0) -> None:
        xp = _check.dense(values, "values")
        dim = _check.axis(ragged_dim, values.ndim)
        if isinstance(offsets, (list, tuple)):
            given = cast("list[Any]", offsets)
            offsets = xp.asarray(_offsets.narrow(_check.host_ints(given, "offsets")) if given else _NO_OFFSETS, values)
        self._values = values
        self._offsets = offsets
        self._ragged_dim = dim
        self._structure = _checked(xp, values, offsets, dim)

    @classmethod
    def _make(cls, values: Dense, offsets: Dense, ragged_dim: int, structure: Structure) -> Array:
        """Make an Array from parts that are known to fit: nothing is checked."""
        arr = object.__new__(cls)
        arr._values = values
        arr._offsets = offsets
        arr._ragged_dim = ragged_dim
        arr._structure = structure
        return arr

    # The fields, and what follows from them without a look at the device.

    @property
    def values(self) -> Dense:
        """All sequences, joined along `ragged_dim`: the very array that was given."""
        return self._values

    @property
    def offsets(self) -> Dense:
        """(B + 1,), integer: where the sequences begin and end. FlashAttention's ``cu_seqlens``."""
        return self._offsets

    @property
    def ragged_dim(self) -> int:
        """The axis of `values` that varies, counted from the front."""
        return self._ragged_dim

    @property
    def batch_size(self) -> int:
        """B, the number of sequences."""
        return self._offsets.shape[0] - 1

    @property
    def total_length(self) -> int:
        """T, the size of the ragged axis of `values`."""
        return self._values.shape[self._ragged_dim]

    @property
    def lengths(self) -> Dense:
        """(B,), integer: the length of each sequence, on the device of `offsets`."""
        return self._offsets[1:] - self._offsets[:-1]

    @property
    def dtype(self) -> Any:
        """The dtype of `values`, the framework's own."""
        return self._values.dtype

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The axes of `values` other than the ragged one."""
        shape = tuple(self._values.shape)
        return shape[: self._ragged_dim] + shape[self._ragged_dim + 1 :]

    @property
    def device(self) -> Any:
        """The device of `values` as the framework names it (``"cpu"`` for NumPy; None under a trace of JAX)."""
        return self._xp.device_of(self._values)

    @property
    def nbytes(self) -> int:
        """Bytes of values and offsets."""
        return self._values.nbytes + self._offsets.nbytes

    @property
    def max_length(self) -> int:
        """The length of the longest sequence, 0 for B = 0.

        Known for free where the lengths were known on the host; otherwise found with one copy of the offsets to the
        host, once. An upper bound that was given to `from_cu_seqlens` is kept.
        """
        known = self._structure.max_length
        return known if known is not None else self._measured("max_length")

    @property
    def min_length(self) -> int:
        """The length of the shortest sequence, 0 for B = 0. Found as `max_length` is."""
        known = self._structure.min_length
        return known if known is not None else self._measured("min_length")

    @property
    def _xp(self) -> Backend:
        return backend_of(self._values)

    def _measured(self, name: str) -> int:
        self._structure.measure(self._host_offsets(name))
        return getattr(self._structure, name)

    def _known_offsets(self) -> HostInts | None:
        """The offsets on the host where that needs no copy from a device, otherwise None."""
        if self._is_opaque():
            return None
        if self._structure.host is None:
            host = self._xp.host_view(self._offsets)
            self._structure.host = None if host is None else _offsets.signed(host)
        return self._structure.host

    def _is_opaque(self) -> bool:
        """Whether a trace hides the offsets. Rows that were packed within a trace may be known to it."""
        xp = self._xp
        return xp.is_traced(self._offsets) and (xp.TRACES_NUMPY or self._structure.host is None)

    def _refuse_trace(self, op: str) -> None:
        if self._is_opaque():
            raise NotImplementedError(f"{op}: {CONCRETE_OFFSETS}")

    def _host_offsets(self, op: str) -> HostInts:
        """The offsets on the host: at most one copy from the device, kept for every Array of this structure."""
        host = self._known_offsets()
        if host is None:
            self._refuse_trace(op)
            host = self._structure.host = _offsets.signed(self._xp.to_host(self._offsets))
        return host

    # Values that change, structure that stays.

    def with_values(self, values: Dense) -> Array:
        """Put other values of the same total length on the same offsets object.

        Parameters
        ----------
        values : array of (..., T, ...)
            Of the same framework, with `total_length` values along `ragged_dim`. Not copied.
        """
        _check.same_framework(self._xp, values, "values", "offsets")
        if values.ndim <= self._ragged_dim or values.shape[self._ragged_dim] != self.total_length:
            raise ValueError(
                f"values: got shape {tuple(values.shape)}; needs {self.total_length} along ragged_dim={self._ragged_dim}"
            )
        return Array._make(values, self._offsets, self._ragged_dim, self._structure)

    def map(self, fn: Callable[[Dense], Dense]) -> Array:
        """Apply a function of the values that keeps the ragged axis: elementwise, or token by token.

        Returns
        -------
        Array
            ``fn(values)`` on the same offsets object.
        """
        return self.with_values(fn(self._values))

    def astype(self, dtype: Any) -> Array:
        """Cast the values to `dtype`: the framework's own, or a name such as ``"float32"``. Same offsets object."""
        return self.with_values(self._xp.astype(self._values, dtype))

    def to(self, device: Any) -> Array:
        """Bring values and offsets to `device`, as the framework names it; the Array itself where both are there."""
        xp = self._xp
        values, offsets = xp.to_device(self._values, device), xp.to_device(self._offsets, device)
        if values is self._values and offsets is self._offsets:
            return self
        return Array._make(values, offsets, self._ragged_dim, self._moved_structure())

    def pin_memory(self) -> Array:
        """Copy to page-locked memory, as PyTorch's DataLoader asks. Only PyTorch has it."""
        xp = self._xp
        values, offsets = xp.pin_memory(self._values), xp.pin_memory(self._offsets)
        return Array._make(values, offsets, self._ragged_dim, self._moved_structure())

    def copy(self) -> Array:
        """Copy values and offsets."""
        xp = self._xp
        values, offsets = xp.copy(self._values), xp.copy(self._offsets)
        return Array._make(values, offsets, self._ragged_dim, self._moved_structure())

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        return self.copy()

    def _moved_structure(self) -> Structure:
        """What the host knows stays true elsewhere; what an implementation derived on the old device does not."""
        known = self._structure
        host = None if known.host is None else known.host.copy()
        return Structure(host, min_length=known.min_length, max_length=known.max_length, spare=known.spare)

    def validate(self) -> Array:
        """Check the offsets in full, wherever they are, with one copy to the host; return the Array itself."""
        xp = self._xp
        self._refuse_trace("validate")
        host = _offsets.validate(xp, self._offsets, self.total_length, self._structure.spare)
        bound, longest = self._structure.max_length, self._structure.longest(host)
        if bound is not None and bound < longest:
            raise ValueError(f"max_length: got {bound}; needs at least {longest}, the longest sequence")
        self._structure.measure(host)
        return self

    # Rows.

    def __len__(self) -> int:
        return self.batch_size

    def __bool__(self) -> bool:
        raise ValueError(
            "the truth of an Array is ambiguous; ask len(arr), or reduce it with scree.kernels.varlen_reduce"
        )

    def __iter__(self) -> Iterator[Dense]:
        return iter(self._rows("iteration"))

    def _rows(self, op: str) -> list[Dense]:
        return self._xp.split(self._values, self._host_offsets(op), self._ragged_dim)

    @overload
    def __getitem__(self, key: SupportsIndex) -> Dense: ...
    @overload
    def __getitem__(self, key: slice | list[int] | list[bool]) -> Array: ...
    @overload
    def __getitem__(self, key: Any) -> Array | Dense: ...
    def __getitem__(self, key: Any) -> Array | Dense:
        """Return row ``key`` (a view where the framework has them), or an Array of the rows that `key` chooses.

        Parameters
        ----------
        key : int, slice, list of int, array of int, or array of bool
            Negative numbers count from the end. A bool mask has one value a row. Integer and bool arrays may be
            NumPy's or of the framework. A slice with step 1 takes a view of the values; every other choice copies.
        """
        host = self._host_offsets("indexing")
        if isinstance(key, slice):
            start, stop, step = key.indices(self.batch_size)
            if step == 1:
                return self._span(host, start, max(start, stop))
            return self._chosen(host, np.arange(start, stop, step))
        if _rows.is_number(key):
            row = _rows.number(operator.index(key), self.batch_size)
            return self._between(int(host[row]), int(host[row + 1]))
        return self._chosen(host, _rows.numbers(key, self.batch_size))

    def _between(self, start: int, stop: int) -> Dense:
        return self._values[(*(slice(None),) * self._ragged_dim, slice(start, stop))]

    def _span(self, host: HostInts, start: int, stop: int) -> Array:
        chosen = host[start : stop + 1] - host[start]
        values = self._between(int(host[start]), int(host[stop]))
        return from_host_offsets(self._xp, values, _offsets.narrow(chosen), self._ragged_dim, like=self._offsets)

    def _chosen(self, host: HostInts, rows: HostInts) -> Array:
        values, offsets = _layout.rows_to(self._xp, self._values, host, rows, self._ragged_dim)
        return from_host_offsets(self._xp, values, offsets, self._ragged_dim, like=self._offsets)

    # Meeting other programs.

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "a ragged Array has no dense form; scree.to_padded(arr) pads it, scree.unpack(arr) lists its rows, arr.values "
            "is the packed array"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        known, portable = self._structure, self._xp.portable
        fields = portable(self._values), portable(self._offsets), self._ragged_dim
        return _restore, (self._xp.NAME, *fields, known.spare, known.max_length)

    def __repr__(self) -> str:
        if _backends.find_backend(self._values) is None:
            return f"scree.Array(values={self._values!r}, offsets={self._offsets!r}, ragged_dim={self._ragged_dim})"
        ragged = f", ragged_dim={self._ragged_dim}" if self._ragged_dim else ""
        return (
            f"scree.Array(batch_size={self.batch_size}, total_length={self.total_length}, "
            f"feature_shape={self.feature_shape}, dtype={self._xp.dtype_name(self._values)}{ragged})"
        )

    def _repr_html_(self) -> str:
        """Draw the raggedness. Copies the offsets to the host, once; under a trace there is nothing to draw."""
        return raggedness(repr(self), None if self._is_opaque() else np.diff(self._host_offsets("_repr_html_")))


CONCRETE_OFFSETS = (
    "needs concrete offsets, and these are traced by a compiler or a transformation; call this outside of the compiled "
    "function, or (JAX, MLX) close over an Array that was packed there"
)

_NO_OFFSETS = np.empty(0, np.int32)


def _checked(xp: Backend, values: Dense, offsets: Any, dim: int) -> Structure:
    """Check the fields beside each other: all that can be known without waiting for a device."""
    _check.same_framework(xp, offsets, "offsets", "values")
    _check.dense(offsets, "offsets")
    _check.integers(xp, offsets, "offsets")
    if offsets.shape[0] == 0:
        raise ValueError("offsets: got shape (0,); needs (batch_size + 1,), at least the 0 at the front")
    _check.same_device(xp, offsets, values, "offsets", "values")
    if xp.EAGER:
        host = xp.host_view(offsets)  # None under a trace
        if host is not None:
            _check.host_offsets(host, values.shape[dim], spare=False)
            return Structure(_offsets.signed(host))
    return Structure()


def expect_array(op: str, arr: Any, name: str = "arr") -> None:
    """Refuse an argument that is no Array."""
    if not isinstance(arr, Array):
        raise TypeError(f"{op}: {name} is {type(arr).__name__}; needs a scree.Array; scree.pack makes one of a list")


def from_host_offsets(xp: Backend, values: Dense, offsets: HostInts, dim: int, *, like: Dense | None = None) -> Array:
    """Make an Array from offsets that the library made on the host; `like` says on which device they belong."""
    placed = xp.asarray(offsets, values if like is None else like)
    return Array._make(values, placed, dim, Structure(offsets))


def _restore(
    framework: str, values: Dense, offsets: Dense, ragged_dim: int, spare: bool, max_length: int | None
) -> Array:
    xp = _backends.load(framework)
    values, offsets = (x if _backends.find_backend(x) is xp else xp.asarray(x, x) for x in (values, offsets))
    return Array._make(values, offsets, ragged_dim, Structure(spare=spare, max_length=max_length))


def _flatten(arr: Array) -> tuple[tuple[Dense, Dense], tuple[int, bool]]:
    return (arr._values, arr._offsets), (arr._ragged_dim, arr._structure.spare)


def _unflatten(aux: tuple[int, bool], children: Any) -> Array:
    """Never checks: a transformation may put anything in place of the children."""
    values, offsets = children
    return Array._make(values, offsets, aux[0], Structure(spare=aux[1]))


_backends.on_load(lambda backend: backend.register_pytree(Array, _flatten, _unflatten))
