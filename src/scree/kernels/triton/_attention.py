"""Attention on CUDA: from the public calls to the kernels, with gradients, compilers and transformations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..._array import Array
from ..._offsets import Structure
from .. import _contract
from .._options import AttentionOptions, FlatOptions
from . import _attention_calls as _calls
from . import _attention_launch as _launch
from ._attention_ops import Transformed
from ._launch import is_plain, is_transformed, refuse_device
from ._tiles import Kept
from ._views import once

_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
_OP = "varlen_attention"


def why_not(op: str, q: Array, k: Array, v: Array, *args: Any) -> str | None:
    """Say what speaks against computing this call here."""
    for name, arr in (("q", q), ("v", v)):
        width = arr.values.shape[2]
        if width > _launch.WIDEST:
            return f"its tiles hold a head_dim up to {_launch.WIDEST}, {name} has {width}"
    return None


def attend(
    q: Array, k: Array, v: Array, sinks: torch.Tensor | None, options: AttentionOptions
) -> tuple[Array, Array] | Array:
    """Compute `scree.kernels.varlen_attention`, whose arguments were checked."""
    home, structure, return_lse = q._offsets, q._structure, options.return_lse
    derived = structure.derived, k._structure.derived
    o, lse = _attend(q._values, k._values, v._values, sinks, home, k._offsets, options.flat(), *derived, return_lse)
    result = Array._make(o, home, 0, structure)
    return (result, Array._make(lse.t(), home, 0, structure)) if return_lse else result


varlen_attention = _contract.checked(attend)


def bind(arrays: tuple[Array, ...], options: dict[str, Any]) -> Callable[..., Any]:
    """`attend` for Arrays on the same offsets that agree with these in dtypes, shapes and devices."""
    q = arrays[0]
    resolved: FlatOptions = options["options"].flat()
    return_lse = resolved.return_lse
    home, kept = q._offsets, _kept_with(q._offsets, q._structure.derived)
    about = tuple((arr._values.shape, arr._values.dtype) for arr in arrays), resolved
    token = object() if kept is None else kept.setdefault(about, object())  # stands for what is the same in every call

    def call(q: Array, k: Array, v: Array, sinks: torch.Tensor | None) -> tuple[Array, Array] | Array:
        x, y, z, offsets, structure = q._values, k._values, v._values, q._offsets, q._structure
        if offsets is home and not torch.is_autocast_enabled("cuda"):
            wanted = _is_differentiated(x, y, z, sinks)
            same = None if sinks is not None else _calls.places(x, y, z, (token, return_lse or wanted))
            if wanted:
                o, lse = _Attention.apply(x, y, z, sinks, (home, home, resolved, kept, kept, same))  # pyright: ignore[reportGeneralTypeIssues]
            else:
                o, lse = _launch.forward(x, y, z, sinks, home, home, resolved, kept, return_lse, same)
        else:
            derived = structure.derived
            o, lse = _attend(x, y, z, sinks, offsets, offsets, resolved, derived, derived, return_lse)
        result = Array._make(o, offsets, 0, structure)
        return (result, Array._make(lse.t(), offsets, 0, structure)) if return_lse else result

    return call


def varlen_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    causal: bool,
    cu_seqlens_k: torch.Tensor | None,
    scale: float | None,
    window_size: tuple[int | None, int | None],
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
    """Compute attention on tensors; `scree.kernels.triton.varlen_attention_triton` has the contract."""
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    tensors = (q, k, v, cu_seqlens, cu_seqlens_k)
    plain = type(q) is type(k) is type(v) is type(cu_seqlens) is type(cu_seqlens_k) is torch.Tensor
    same = None
    if plain and sinks is None and is_plain() and not torch.is_autocast_enabled("cuda"):
        given = (causal, return_lse, scale, softcap, window_size)
        if type(causal) is type(return_lse) is bool and (given[2:] == _DEFAULTS or _is_plain_number(*given[2:])):
            wanted = _is_differentiated(q, k, v, None)
            same = _calls.facts(q, k, v, return_lse or wanted, given)
            kept: Kept | None = None if wanted else getattr(cu_seqlens, "_scree_kept", None)
            made = _calls.again(q, k, v, None, cu_seqlens, cu_seqlens_k, kept, return_lse, same)
            if made is not None:
                return (made[0], made[1].t()) if return_lse else made[0]
    if plain and _is_sound(*tensors, sinks, scale, window_size, softcap):
        options = AttentionOptions(
            1.0 / math.sqrt(q.shape[2]), bool(causal), return_lse=bool(return_lse), deterministic=bool(deterministic)
        ).flat()
    else:
        options = _checked(
            *tensors,
            causal,
            scale=scale,
            window_size=window_size,
            softcap=softcap,
            sinks=sinks,
            return_lse=return_lse,
            deterministic=deterministic,
        ).flat()
    o, lse = _attend(q, k, v, sinks, cu_seqlens, cu_seqlens_k, options, None, None, return_lse, same)
    return (o, lse.t()) if return_lse else o


_DEFAULTS = (None, None, (None, None))  # scale, softcap, window_size
_NUMBERS = frozenset({int, float, type(None)})
_SIDES = frozenset({int, type(None)})


def _is_plain_number(scale: Any, softcap: Any, window_size: Any) -> bool:
    """Whether a call can be kept under these options: equal ones are accepted, or refused, all alike."""
    if type(window_size) is not tuple or not _SIDES.issuperset(map(type, window_size)):
        return False
    return type(scale) in _NUMBERS and type(softcap) in _NUMBERS


def _is_differentiated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> bool:
    """Whether somebody wants gradients."""
    needed = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    return needed and torch.is_grad_enabled()


def _is_sound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: Any,
    window_size: Any,
    softcap: Any,
) -> bool:
    """Whether the arguments are plainly right, in as little time as that takes; those that are not are looked at again."""
    if not (sinks is None and scale is None and softcap is None and window_size == (None, None)):
        return False
    if not (q.is_cuda and k.is_cuda and v.is_cuda and cu_q.is_cuda and cu_k.is_cuda):
        return False
    dtype, shape, k_shape, v_shape = q.dtype, q.shape, k.shape, v.shape
    if not (dtype in _DTYPES and dtype is k.dtype and dtype is v.dtype):
        return False
    if not (len(shape) == len(k_shape) == len(v_shape) == 3):
        return False
    device = q.get_device()
    return (
        device == k.get_device() == v.get_device() == cu_q.get_device() == cu_k.get_device()
        and 0 < shape[2] == k_shape[2] <= _launch.WIDEST
        and v_shape[2] <= _launch.WIDEST
        and k_shape[0] == v_shape[0]
        and 0 < k_shape[1] == v_shape[1]
        and shape[1] % k_shape[1] == 0
        and cu_q.dtype is torch.int32
        and (cu_q is cu_k or cu_k.dtype is torch.int32)
        and len(cu_q.shape) == 1
        and cu_q.shape[0] > 0
        and cu_q.shape == cu_k.shape
    )


def _checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    causal: bool,
    **options: Any,
) -> AttentionOptions:
    """Check the arguments as the front door does, with its messages; return the options."""
    op = "varlen_attention_triton"
    for name, x in (("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k)):
        if not isinstance(x, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{op}: {name} is {type(x).__name__}; needs a torch.Tensor")
    for name, x in (("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k)):
        if x.ndim != 1 or x.shape[0] == 0 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{op}: {name} is {x.dtype} of shape {tuple(x.shape)}; needs integers (batch_size + 1,)")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}; they must agree")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; needs (T, heads, head_dim)")
    q_arr, k_arr, v_arr = (Array._make(x, cu, 0, Structure()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)))
    found = _contract.attention(q_arr, k_arr, v_arr, causal, **options)
    refuse_device(op, "q", q)
    if q.dtype not in _DTYPES:
        raise NotImplementedError(f"{op}: q has dtype {q.dtype}; serves float16, bfloat16 and float32")
    against = why_not(_OP, q_arr, k_arr, v_arr)
    if against is not None:
        raise NotImplementedError(f"{op}: {against}")
    return found


def _kept_with(offsets: torch.Tensor, otherwise: Kept | None) -> Kept | None:
    """The dictionary that is kept with offsets, whatever Arrays are made of them.

    An inference tensor hides when it is written to: `otherwise` then, which is that of an Array, or None.
    """
    if offsets.is_inference():
        return otherwise
    kept: Kept | None = getattr(offsets, "_scree_kept", None)
    if kept is None:
        kept = {}
        offsets._scree_kept = kept  # pyright: ignore[reportAttributeAccessIssue]
    return kept


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    options: FlatOptions,
    kept_q: Kept | None,
    kept_k: Kept | None,
    with_lse: bool,
    same: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O (T, H, D_v), and LSE (H, T) or, where nobody asks for it, anything.

    `kept_q` and `kept_k` are dictionaries of Arrays, for offsets that can hold none themselves.
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not is_plain(q, k, v, cu_q, cu_k, sinks):
        if is_transformed():
            return Transformed.apply(q, k, v, sinks, cu_q, cu_k, options)  # pyright: ignore[reportReturnType]
        return torch.ops.scree.attention(q, k, v, sinks, cu_q, cu_k, *options)
    kept_q = _kept_with(cu_q, kept_q)
    kept_k = kept_q if cu_k is cu_q else _kept_with(cu_k, kept_k)
    if _is_differentiated(q, k, v, sinks):
        work = cu_q, cu_k, options, kept_q, kept_k, same
        return _Attention.apply(q, k, v, sinks, work)  # pyright: ignore[reportReturnType]
    return _launch.forward(q, k, v, sinks, cu_q, cu_k, options, kept_q, with_lse, same)


class _Attention(torch.autograd.Function):
    """The kernels to autograd, where nothing but autograd looks on, and which looks at each argument: the fewer, the faster.

    `work` is (cu_q, cu_k, options, kept_q, kept_k, same).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, work: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cu_q, cu_k, options, kept_q, kept_k, same = work
        o, lse = _launch.forward(q, k, v, sinks, cu_q, cu_k, options, kept_q, True, same)
        ctx.save_for_backward(q, k, v, sinks, cu_q, cu_k, o, lse)
        ctx.work = options, kept_q, kept_k
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if do is None and dlse is None:
            return None, None, None, None, None
        return *_launch.backward(do, dlse, *ctx.saved_tensors, *ctx.work), None
