"""What a backend is: about thirty functions over one framework's arrays, each stated once, here.

pyright checks every module of this package against `Backend`. Arrays of a framework are written `Dense`; they share,
beyond these functions, the operators, basic slices, `.shape`, `.ndim`, `.dtype` and `.reshape`.

A new backend is one file with these functions, one line in `FRAMEWORKS`, and one extra in `pyproject.toml`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Dense: TypeAlias = Any
"""A dense array of a framework."""

HostArray: TypeAlias = NDArray[Any]
"""A NumPy array."""

HostInts: TypeAlias = NDArray[np.integer[Any]]
"""A NumPy array of integers, one value a row, a token or an offset."""

Flatten: TypeAlias = Callable[[Any], tuple[tuple[Any, Any], Any]]
Unflatten: TypeAlias = Callable[[Any, Iterable[Any]], Any]


class Moves(Protocol):
    """Kernels of a device that move tokens in one pass, differentiable as the framework's own operations are."""

    def pad(
        self, values: Dense, offsets: Dense, width: int, side: str, fill: Any, too_long: float | None
    ) -> tuple[Dense, Dense]:
        """Spread values (T, *F) over (B, width, *F), `fill` elsewhere; with it the mask (B, width).

        `too_long` is what rows longer than `width` hold, None to cut them.
        """
        ...

    def unpad(self, padded: Dense, offsets: Dense, total: int, side: str) -> Dense:
        """Take the tokens back from padded (B, N, *F): (total, *F), 0 for those of no row. Waits for nothing."""
        ...

    def unpad_mask(self, padded: Dense, mask: Dense) -> tuple[Dense, Dense, HostInts] | None:
        """Collect what a mask (B, N) keeps of padded (B, N, *F): values, offsets, and the offsets on the host.

        None where a value of the mask is neither 0 nor 1. Waits for the device until that has counted.
        """
        ...

    def to_device(self, host: HostInts, like: Dense) -> Dense:
        """Bring integers from the host to where `like` is, without waiting for the device."""
        ...

    def take_rows(self, values: Dense, starts: HostInts, offsets: HostInts) -> Dense:
        """Join the rows of values (T, *F) that begin at `starts` (R,), as long as `offsets` (R + 1,) say."""
        ...


class Backend(Protocol):
    """One framework. Nothing here waits for a device but `to_host`."""

    @property
    def NAME(self) -> str:  # noqa: N802
        """The key of `FRAMEWORKS`."""
        ...

    @property
    def EAGER(self) -> bool:  # noqa: N802
        """Whether arrays in host memory are computed already, so that looking at them never waits."""
        ...

    @property
    def TRACES_NUMPY(self) -> bool:  # noqa: N802
        """Whether its compiler traces NumPy calls too, so that what is known on the host is out of its reach."""
        ...

    def why_not_dense(self, x: Dense) -> str | None:
        """Say why x is no plain dense array of numbers or bools (masked, sparse, nested, of objects); None if it is."""
        ...

    # Making arrays: always beside another one, so that the device cannot be forgotten.

    def asarray(self, data: HostArray, like: Dense) -> Dense:
        """Bring `data` to the framework and to the device of `like`; dtype and values kept, or a `ValueError`."""
        ...

    def arange(self, n: int, like: Dense) -> Dense:
        """Count from 0 to n - 1, on the device of `like`; int32, or int64 where n does not fit."""
        ...

    def full(self, shape: tuple[int, ...], value: Any, like: Dense) -> Dense:
        """Make an array filled with the scalar `value`, with the dtype and on the device of `like`."""
        ...

    # Moving elements.

    def sizes(self, arrays: Sequence[Dense], axis: int) -> HostInts:
        """Return how long each array is along `axis`."""
        ...

    def concat(self, arrays: Sequence[Dense], axis: int, sizes: HostInts | None = None) -> Dense:
        """Join one or more arrays along `axis`; `sizes`, where the caller has them, are not asked for again.

        Raises `ValueError` or `TypeError` where their dtypes, devices or other axes differ: never promotes.
        """
        ...

    def take(self, x: Dense, index: Dense, axis: int) -> Dense:
        """Gather along `axis` by an integer `index` of any shape, whose values all lie inside; differentiable in x."""
        ...

    def split(self, x: Dense, offsets: HostInts, axis: int) -> list[Dense]:
        """Cut x at `offsets` (0 first, never falling, within the axis): views where the framework has them."""
        ...

    def where(self, condition: Dense, a: Dense, b: Dense) -> Dense:
        """Choose elementwise. a and b have one dtype."""
        ...

    def permute_dims(self, x: Dense, axes: tuple[int, ...]) -> Dense:
        """Reorder the axes: a view where the framework has them."""
        ...

    def searchsorted(self, x: Dense, values: Dense) -> Dense:
        """For each value, how many entries of the 1-D, rising `x` are at most the value; an integer array."""
        ...

    def cumsum(self, x: Dense) -> Dense:
        """Add up the 1-D x from the front."""
        ...

    # Arithmetic beyond the operators: the dtype of the result is that of x.

    def exp(self, x: Dense) -> Dense: ...
    def log(self, x: Dense) -> Dense: ...
    def sqrt(self, x: Dense) -> Dense: ...
    def tanh(self, x: Dense) -> Dense: ...
    def sum(self, x: Dense, axis: int, keepdims: bool = False) -> Dense: ...
    def max(self, x: Dense, axis: int, keepdims: bool = False) -> Dense: ...
    def min(self, x: Dense, axis: int, keepdims: bool = False) -> Dense: ...

    def matmul(self, a: Dense, b: Dense) -> Dense:
        """Multiply matrices over broadcast leading axes, in the full precision of the dtype (no tf32, no bf16)."""
        ...

    # dtypes: named as NumPy names them ("float32", "bfloat16", "int64", "bool").

    def upcast(self, x: Dense) -> Dense:
        """Return floating x in float32 or wider (float64 stays), integers and bools as they are."""
        ...

    def cast_like(self, x: Dense, like: Dense) -> Dense:
        """Return x in the dtype of `like`."""
        ...

    def astype(self, x: Dense, dtype: Any) -> Dense:
        """Return x in `dtype`: the framework's own, or a name. Raises `TypeError` for a dtype it does not have."""
        ...

    def dtype_name(self, x: Dense) -> str:
        """Name the dtype of x, without the framework's name."""
        ...

    # Devices, traces and the host.

    def device_of(self, x: Dense) -> Any:
        """Return the device of x as the framework names it, or None where it has none (a trace, say)."""
        ...

    def to_device(self, x: Dense, device: Any) -> Dense:
        """Return x on `device`; x itself where it is there already."""
        ...

    def copy(self, x: Dense) -> Dense:
        """Return a copy of x, differentiable in x."""
        ...

    def portable(self, x: Dense) -> Dense | HostArray:
        """Return what pickles exactly: x itself, or a NumPy array that `asarray` brings back."""
        ...

    def pin_memory(self, x: Dense) -> Dense:
        """Return x in page-locked memory. Raises `TypeError` where the framework has no such thing."""
        ...

    def is_traced(self, *arrays: Dense) -> bool:
        """Say whether the values of any are unknown because a compiler or a transformation is looking on."""
        ...

    def facts(self, *arrays: Any) -> tuple[Any, ...] | None:
        """Return all about arrays that checks and a choice of implementation may depend on, beside their values.

        Hashable, dtypes, shapes and devices among it. None where a compiler or a transformation is looking on, or where one is
        no plain array of the framework. Called in every op: in as little time as that takes.
        """
        ...

    def to_host(self, x: Dense) -> HostArray:
        """Copy integers or bools to the host. The only function that waits for a device."""
        ...

    def host_view(self, x: Dense) -> HostArray | None:
        """View x as a NumPy array without a copy, or None.

        None where x is on a device, traced, or where an operation on it would have to be recorded for a gradient.
        Where NumPy lacks the dtype, the view has an integer dtype of the same size: its bits, not its numbers.
        """
        ...

    def moves(self, *arrays: Dense) -> Moves | None:
        """Return the kernels that move these arrays where they are, or None where there are none: see `_layout`."""
        ...

    def adopt(self, data: HostArray, like: Dense) -> Dense:
        """Wrap fresh host memory, made from `host_view`s, as an array of the framework with the dtype of `like`."""
        ...

    def register_pytree(self, cls: type, flatten: Flatten, unflatten: Unflatten) -> None:
        """Make `cls` a tree for the framework's transformations, with the children `values` and `offsets`."""
        ...


if TYPE_CHECKING:
    from . import cupy as _cupy
    from . import jax as _jax
    from . import mlx as _mlx
    from . import numpy as _numpy
    from . import torch as _torch

    _backends: tuple[Backend, ...] = (_numpy, _torch, _jax, _mlx, _cupy)
