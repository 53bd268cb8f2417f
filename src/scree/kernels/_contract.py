"""What every implementation of an op may rely on: the arguments, checked once, by metadata alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .. import _check
from .._array import Array, expect_array
from .._backends import Backend, Dense
from .._check import is_floating, same_device, same_framework
from ._options import AttentionOptions, Sides

REDUCTIONS = ("sum", "mean", "max", "min", "logsumexp")


def array(op: str, arr: Any, name: str = "arr") -> Backend:
    """Return the backend of an argument that must be an Array."""
    expect_array(op, arr, name)
    return arr._xp


def floating(op: str, xp: Backend, x: Dense, name: str) -> None:
    """Refuse integers, bools and complex numbers."""
    if not is_floating(xp.dtype_name(x)):
        raise TypeError(f"{op}: {name} has dtype {xp.dtype_name(x)}; needs floating values; arr.astype casts")


def _along_axis_0(op: str, arr: Array, name: str) -> None:
    if arr.ragged_dim != 0:
        raise ValueError(f"{op}: {name} has ragged_dim {arr.ragged_dim}; needs 0, with the features behind")


def attention(
    q: Any,
    k: Any,
    v: Any,
    causal: bool,
    *,
    scale: float | None,
    window_size: Sides,
    softcap: float | None,
    sinks: Dense | None,
    return_lse: bool,
    deterministic: bool = True,
) -> AttentionOptions:
    """Check the arguments of `varlen_attention`; return its options."""
    op = "varlen_attention"
    xp = array(op, q, "q")
    queries: Dense = q._values
    dtype, kind = queries.dtype, type(queries)
    for name, arr in (("q", q), ("k", k), ("v", v)):
        expect_array(op, arr, name)
        values: Dense = arr._values
        if type(values) is not kind:
            same_framework(xp, values, f"{op}: {name}", "q")
        if arr._ragged_dim != 0:
            _along_axis_0(op, arr, name)
        if values.ndim != 3:
            raise ValueError(f"{op}: {name}.values has shape {tuple(values.shape)}; needs (T, heads, head_dim)")
        if arr is q or values.dtype != dtype:
            floating(op, xp, values, name)
        if values.dtype != dtype:
            raise TypeError(
                f"{op}: {name} has dtype {xp.dtype_name(values)}, q has {xp.dtype_name(queries)}; all must agree"
            )
        if arr is not q:
            same_device(xp, values, queries, f"{op}: {name}", "q")
        if arr._structure is not q._structure and arr.batch_size != q.batch_size:
            raise ValueError(
                f"{op}: q and {name} have different batch sizes ({q.batch_size} and {arr.batch_size}); "
                f"{name}.offsets must have shape ({q.batch_size + 1},), got ({arr.batch_size + 1},)"
            )
    _, heads, head_dim = queries.shape
    total_k, kv_heads, k_dim = k._values.shape
    total_v, v_heads, _ = v._values.shape
    if k_dim != head_dim:
        raise ValueError(f"{op}: k has head_dim {k_dim}, q has {head_dim}; they must agree")
    if head_dim == 0:
        raise ValueError(f"{op}: q has head_dim 0; needs at least 1")
    if v_heads != kv_heads:
        raise ValueError(f"{op}: k has {kv_heads} heads, v has {v_heads}; they must agree")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: q has {heads} heads, k has {kv_heads}; q's must be a multiple of k's")
    if total_v != total_k:
        raise ValueError(f"{op}: k has {total_k} tokens, v has {total_v}; they must agree")
    _equal_offsets(op, k, v)
    if sinks is not None:
        same_framework(xp, sinks, f"{op}: sinks", "q")
        same_device(xp, sinks, q.values, f"{op}: sinks", "q")
        if tuple(sinks.shape) != (heads,):
            raise ValueError(f"{op}: sinks has shape {tuple(sinks.shape)}; needs ({heads},), one logit a head")
        floating(op, xp, sinks, "sinks")
    return AttentionOptions(
        _number(op, "scale", scale, 1.0 / math.sqrt(head_dim)),
        bool(causal),
        _window(op, window_size),
        None if softcap is None else _positive(op, "softcap", softcap),
        bool(return_lse),
        bool(deterministic),
    )


def checked(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Give the ``attend(q, k, v, sinks, options)`` of a room the signature and the checks of `varlen_attention`."""

    def varlen_attention(
        q: Array,
        k: Array,
        v: Array,
        causal: bool = False,
        *,
        scale: float | None = None,
        window_size: Sides = (None, None),
        softcap: float | None = None,
        sinks: Dense | None = None,
        return_lse: bool = False,
        deterministic: bool = True,
    ) -> tuple[Array, Array] | Array:
        """Compute `scree.kernels.varlen_attention` by this implementation, and no other."""
        options = attention(
            q,
            k,
            v,
            causal,
            scale=scale,
            window_size=window_size,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
            deterministic=deterministic,
        )
        return attend(q, k, v, sinks, options)

    return varlen_attention


def _equal_offsets(op: str, k: Array, v: Array) -> None:
    """Refuse k and v of different offsets, where the host knows both without a copy from a device."""
    if v.offsets is k.offsets:
        return
    mine, theirs = k._known_offsets(), v._known_offsets()
    if mine is None or theirs is None:
        return
    differ = mine != theirs
    if differ.any():
        i = int(differ.argmax())
        raise ValueError(
            f"{op}: k and v have different offsets, offsets[{i}] is {mine[i]} and {theirs[i]}; they must agree"
        )


def _number(op: str, name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} is {value!r}; needs a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{op}: {name} is {number}; needs a finite number")
    return number


def _positive(op: str, name: str, value: Any) -> float:
    number = _number(op, name, value, 1.0)
    if number <= 0:
        raise ValueError(f"{op}: {name} is {number}; needs more than 0, or None for none")
    return number


def _window(op: str, window_size: Any) -> tuple[int | None, int | None]:
    if window_size == (None, None):
        return window_size
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(f"{op}: window_size is {window_size!r}; needs (left, right), None for no limit")
    sides: list[int | None] = []
    for name, side in zip(("left", "right"), window_size, strict=True):  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
        if side is not None:
            side = _check.whole(side, f"{op}: window_size {name}")
            if side < 0:
                raise ValueError(f"{op}: window_size {name} is {side}; needs 0 or more, or None for no limit")
        sides.append(side)
    return sides[0], sides[1]


def norm(op: str, arr: Any, weights: dict[str, Dense | None], eps: Any) -> float:
    """Check the arguments of a norm over the last axis of the values; return eps."""
    xp = array(op, arr)
    floating(op, xp, arr.values, "arr")
    shape = tuple(arr.values.shape)
    if len(shape) == 1:
        raise ValueError(f"{op}: arr.values has shape {shape}, 1-D; needs a feature axis behind the ragged one")
    if arr.ragged_dim == len(shape) - 1:
        raise ValueError(f"{op}: arr has ragged_dim {arr.ragged_dim}, the last axis, over which the norm runs")
    for name, weight in weights.items():
        if weight is None:
            continue
        same_framework(xp, weight, f"{op}: {name}", "arr")
        same_device(xp, weight, arr.values, f"{op}: {name}", "arr")
        if tuple(weight.shape) != shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(weight.shape)}; needs {shape[-1:]}, the last axis of arr.values"
            )
        floating(op, xp, weight, name)
    if eps is None:
        raise TypeError(f"{op}: eps is None; needs a number")
    number = _number(op, "eps", eps, 0.0)
    if number < 0:
        raise ValueError(f"{op}: eps is {number}; needs 0 or more")
    return number


def softmax(arr: Any) -> None:
    """Check the argument of `varlen_softmax`."""
    floating("varlen_softmax", array("varlen_softmax", arr), arr.values, "arr")


def reduce(arr: Any, reduction: str) -> None:
    """Check the arguments of `varlen_reduce`."""
    op = "varlen_reduce"
    xp = array(op, arr)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: op is {reduction!r}; needs one of {', '.join(map(repr, REDUCTIONS))}")
    name = xp.dtype_name(arr.values)
    if reduction in ("mean", "logsumexp") and not is_floating(name):
        raise TypeError(f"{op}: op {reduction!r} of dtype {name}; needs floating values; arr.astype casts")
    if reduction == "sum" and not (is_floating(name) or _check.is_integer(name)):
        raise TypeError(f"{op}: op 'sum' of dtype {name}; needs integers or floating values; arr.astype casts")
    if name.startswith("complex"):
        raise TypeError(f"{op}: dtype {name} has no order; needs real values")


def rope(arr: Any, cos: Dense, sin: Dense, start: Any) -> int | Dense:
    """Check the arguments of `varlen_rope`; return start as an int, or as an integer array (B,)."""
    op = "varlen_rope"
    xp = array(op, arr)
    floating(op, xp, arr.values, "arr")
    _along_axis_0(op, arr, "arr")
    shape = tuple(arr.values.shape)
    if len(shape) < 2:
        raise ValueError(f"{op}: arr.values has shape {shape}; needs (T, ..., head_dim)")
    if shape[-1] % 2:
        raise ValueError(f"{op}: arr.values has head_dim {shape[-1]}; needs an even one, in pairs to rotate")
    for name, table in (("cos", cos), ("sin", sin)):
        same_framework(xp, table, f"{op}: {name}", "arr")
        same_device(xp, table, arr.values, f"{op}: {name}", "arr")
        if table.ndim != 2 or table.shape[1] != shape[-1] // 2:
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)}; needs (positions, {shape[-1] // 2})")
        floating(op, xp, table, name)
    if cos.shape[0] != sin.shape[0]:
        raise ValueError(f"{op}: cos has {cos.shape[0]} positions, sin has {sin.shape[0]}; they must agree")
    begin = 0 if start is None else _check.starts(f"{op}: start", xp, start, arr.offsets)
    _table_suffices(op, arr, cos.shape[0], begin)
    return begin


def _table_suffices(op: str, arr: Array, positions: int, start: int | Dense) -> None:
    """Refuse a table that is too short, or a start below 0, where the host knows the lengths without a copy."""
    if isinstance(start, int) and start < 0:
        raise ValueError(f"{op}: start is {start}; needs 0 or more")
    host = arr._known_offsets()
    if host is None or len(host) == 1:
        return
    lengths = host[1:] - host[:-1]
    if not lengths.any():
        return
    if isinstance(start, int):
        needed = start + int(lengths.max())
    else:
        xp = arr._xp
        first = None if xp.is_traced(start) else xp.host_view(start)
        if first is None:
            return
        if first.min() < 0:
            raise ValueError(f"{op}: start[{int(first.argmin())}] is {first.min()}; needs 0 or more")
        needed = int((first.astype("int64") + lengths)[lengths > 0].max())
    if needed > positions:
        raise ValueError(f"{op}: cos and sin have {positions} positions; needs at least {needed}, the last one used")
