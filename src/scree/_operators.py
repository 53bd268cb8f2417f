"""The arithmetic of an Array: elementwise, with a scalar or with an Array of equal structure."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _backends, _check
from ._backends import Dense

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._array import Array


def _elementwise(operation: Callable[[Any, Any], Any], reflected: bool = False) -> Callable[[Any, Any], Array]:
    def method(self: Any, other: Any) -> Any:
        operand = _operand(self, other)
        if operand is NotImplemented:
            return NotImplemented
        return self.with_values(operation(operand, self.values) if reflected else operation(self.values, operand))

    return method


def _operand(arr: Any, other: Any) -> Any:
    """What stands beside ``arr.values`` in the operation: a scalar, or the values of an Array of equal structure."""
    if isinstance(other, Operators):
        return _values_beside(arr, other)
    if isinstance(other, np.generic) and not hasattr(arr.values, "__array_priority__"):
        return other.item()  # NumPy's scalar on the left would make a NumPy array of the values
    if isinstance(other, (bool, int, float, complex, np.generic)):
        return other
    if getattr(other, "shape", None) == () and _backends.find_backend(other) is arr._xp:
        return other
    return NotImplemented


def _values_beside(arr: Any, other: Any) -> Dense:
    """The values of an Array of equal structure, or the error that says how the structures differ."""
    _check.same_framework(arr._xp, other.values, "arithmetic: the other Array", "this one")
    if other.offsets is not arr.offsets:
        shapes = (arr.batch_size, arr.total_length), (other.batch_size, other.total_length)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"arithmetic: Arrays of unequal structure, batch_size and total_length {shapes[0]} and {shapes[1]}"
            )
        mine, theirs = (x._host_offsets("arithmetic between Arrays with two offsets arrays") for x in (arr, other))
        differ = mine != theirs
        if differ.any():
            i = int(differ.argmax())
            raise ValueError(
                f"arithmetic: Arrays of unequal structure, offsets[{i}] is {mine[i]} in one and {theirs[i]} in the other"
            )
    if other.ragged_dim != arr.ragged_dim:
        raise ValueError(f"arithmetic: Arrays of unequal structure, ragged_dim {arr.ragged_dim} and {other.ragged_dim}")
    return other.values


class Operators:
    """The operators of `scree.Array`, which gives them `values` and `with_values`."""

    __slots__ = ()

    __array_ufunc__ = None  # NumPy's operators leave an Array on their right to us
    __hash__ = None  # type: ignore[assignment]  # == is elementwise

    values: Any
    with_values: Any

    __add__ = _elementwise(operator.add)
    __radd__ = _elementwise(operator.add, reflected=True)
    __sub__ = _elementwise(operator.sub)
    __rsub__ = _elementwise(operator.sub, reflected=True)
    __mul__ = _elementwise(operator.mul)
    __rmul__ = _elementwise(operator.mul, reflected=True)
    __truediv__ = _elementwise(operator.truediv)
    __rtruediv__ = _elementwise(operator.truediv, reflected=True)
    __floordiv__ = _elementwise(operator.floordiv)
    __rfloordiv__ = _elementwise(operator.floordiv, reflected=True)
    __mod__ = _elementwise(operator.mod)
    __rmod__ = _elementwise(operator.mod, reflected=True)
    __pow__ = _elementwise(operator.pow)
    __rpow__ = _elementwise(operator.pow, reflected=True)
    __and__ = _elementwise(operator.and_)
    __rand__ = _elementwise(operator.and_, reflected=True)
    __or__ = _elementwise(operator.or_)
    __ror__ = _elementwise(operator.or_, reflected=True)
    __xor__ = _elementwise(operator.xor)
    __rxor__ = _elementwise(operator.xor, reflected=True)
    __lt__ = _elementwise(operator.lt)
    __le__ = _elementwise(operator.le)
    __gt__ = _elementwise(operator.gt)
    __ge__ = _elementwise(operator.ge)
    if TYPE_CHECKING:  # an assignment would have the type that object declares, a bool

        def __eq__(self, other: object) -> Array: ...  # type: ignore[override]
        def __ne__(self, other: object) -> Array: ...  # type: ignore[override]
    else:
        __eq__ = _elementwise(operator.eq)
        __ne__ = _elementwise(operator.ne)

    def __pos__(self) -> Self:
        return self.with_values(+self.values)

    def __neg__(self) -> Self:
        return self.with_values(-self.values)

    def __abs__(self) -> Self:
        return self.with_values(abs(self.values))

    def __invert__(self) -> Self:
        return self.with_values(~self.values)
