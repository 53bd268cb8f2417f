"""The front door: the signatures and the contract of every op, and one line of dispatch each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from .._array import Array
from .._backends import Dense
from . import _contract
from ._dispatch import choose
from ._recall import CHOSEN, bound, recall, whatever_lengths

Window = tuple[int | None, int | None]
Reduction = Literal["sum", "mean", "max", "min", "logsumexp"]


@overload
def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = ...,
    *,
    scale: float | None = ...,
    window_size: Window = ...,
    softcap: float | None = ...,
    sinks: Dense | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    implementation: str | None = ...,
) -> Array: ...
@overload
def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = ...,
    *,
    scale: float | None = ...,
    window_size: Window = ...,
    softcap: float | None = ...,
    sinks: Dense | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    implementation: str | None = ...,
) -> tuple[Array, Array]: ...
@overload
def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = ...,
    *,
    scale: float | None = ...,
    window_size: Window = ...,
    softcap: float | None = ...,
    sinks: Dense | None = ...,
    return_lse: bool = ...,
    deterministic: bool = ...,
    implementation: str | None = ...,
) -> tuple[Array, Array] | Array: ...
def varlen_attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    *,
    scale: float | None = None,
    window_size: Window = (None, None),
    softcap: float | None = None,
    sinks: Dense | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    implementation: str | None = None,
) -> tuple[Array, Array] | Array:
    """Attend within each sequence: softmax of scaled scores, times the values.

    For query i of n and key j of m in the same sequence, and head h, which reads key/value head h // (H / K)::

        s[i, j] = scale * <q[i], k[j]>              softcap c:  s = c * tanh(s / c)
        visible(i, j):  p = i + m - n               the aligned position of query i
                        j <= p                      if causal
                        p - left <= j <= p + right  if window_size = (left, right)
        l[i]    = sum_j exp(s[i, j]) + exp(sink)    over the visible j; the sink's term with `sinks` only
        o[i]    = sum_j exp(s[i, j]) / l[i] * v[j]
        lse[i]  = log(l[i])

    Parameters
    ----------
    q : Array of (T, H, D), floating
    k : Array of (T_k, K, D), floating
        Of the same batch size; its offsets may differ from q's (cross-attention). H is a multiple of K (grouped
        queries).
    v : Array of (T_k, K, D_v), floating
        With the offsets of k.
    causal : bool
        Query i of n sees key j of m when j <= i + m - n: aligned to the lower right.
    scale : float, optional
        1 / sqrt(D) unless said.
    window_size : (left, right)
        Tokens that are visible to each side of the aligned position, inclusive; None is no limit.
    softcap : float, optional
        Bounds the scores, more than 0.
    sinks : array of (H,), floating, optional
        One logit a head that joins the softmax's denominator and brings no value.
    return_lse : bool
        Return the LSE too.
    deterministic : bool
        Whether two backward passes must give the same bits. False lets an implementation that is faster otherwise (on
        Hopper, head dim 128 in 16 bits) add up the gradient of q in no fixed order, so that it differs by rounding from run
        to run, unless `torch.use_deterministic_algorithms` is on; all else keeps its bits.
    implementation : str, optional
        Force one by name.

    Returns
    -------
    o : Array of (T, H, D_v)
        On q's offsets, in q's dtype. A query that sees no key gives 0; an empty sequence, an empty row.
    lse : Array of (T, H), float32
        Only with `return_lse`: the natural logarithm; -inf (or the sink) where a query sees no key.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit; it is named, with what it got and what it needs.
    NotImplementedError
        No implementation can serve the call; the message has every reason.

    Notes
    -----
    Arithmetic is in float32 or wider. No sequence sees another: a row of the result does not depend, bit for bit, on
    the other rows. Differentiable in q, k, v and sinks.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017, eq. 1. Dao, "FlashAttention-2", 2023 (LSE). Gemma Team,
    "Gemma 2", 2024, section 2 (softcap). Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    2023.

    Examples
    --------
    >>> import numpy as np, scree
    >>> x = scree.from_lengths(np.ones((5, 2, 8), np.float32), [2, 3])  # two sequences, two heads
    >>> scree.kernels.varlen_attention(x, x, x, causal=True)
    scree.Array(batch_size=2, total_length=5, feature_shape=(2, 8), dtype=float32)
    """
    # A float that equals an integer is no integer: of a window, as of a start below, the types count.
    given = (causal, scale, softcap, return_lse, deterministic, implementation)
    if window_size != (None, None):
        window = window_size if type(window_size) is tuple else (window_size,)
        given = (*given, *window, *map(type, window))
    others = () if sinks is None else (sinks,)
    key, call = recall("varlen_attention", (q, k, v), others, given)
    alike = None if call is not None or key is None or others else whatever_lengths(key, (q, k, v))
    if alike is not None:
        call = CHOSEN.get(alike)
    if call is None:
        options = _contract.attention(
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
        module = choose("varlen_attention", implementation, q, k, v, sinks, options)
        call = bound(key, module, "varlen_attention", (q, k, v), {"options": options}, alike)
    return call(q, k, v, sinks)


def varlen_layernorm(
    arr: Array,
    weight: Dense | None = None,
    bias: Dense | None = None,
    eps: float = 1e-5,
    *,
    implementation: str | None = None,
) -> Array:
    """Normalise each token over its last axis to mean 0 and variance 1.

    ``y = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias``

    Parameters
    ----------
    arr : Array of (T, ..., M), floating
        Any `ragged_dim` but the last axis.
    weight, bias : array of (M,), floating, optional
    eps : float
    implementation : str, optional
        Force one by name.

    Returns
    -------
    Array of (T, ..., M)
        In the dtype of `arr`, on the same offsets object.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As `varlen_attention`.

    Notes
    -----
    Arithmetic is in float32 or wider. Differentiable in `arr`, `weight` and `bias`.

    References
    ----------
    Ba et al., "Layer Normalization", 2016, eq. 3 and 4.
    """
    others = tuple(x for x in (weight, bias) if x is not None)
    key, call = recall("varlen_layernorm", (arr,), others, (weight is None, eps, implementation))
    if call is None:
        eps = _contract.norm("varlen_layernorm", arr, {"weight": weight, "bias": bias}, eps)
        module = choose("varlen_layernorm", implementation, arr, weight, bias, eps)
        call = bound(key, module, "varlen_layernorm", (arr,), {"eps": eps})
    return call(arr, weight, bias)


def varlen_rmsnorm(
    arr: Array, weight: Dense | None = None, eps: float = 1e-6, *, implementation: str | None = None
) -> Array:
    """Divide each token by the root of the mean square over its last axis.

    ``y = x / sqrt(mean(x**2) + eps) * weight``

    Parameters
    ----------
    arr : Array of (T, ..., M), floating
        Any `ragged_dim` but the last axis.
    weight : array of (M,), floating, optional
    eps : float
    implementation : str, optional
        Force one by name.

    Returns
    -------
    Array of (T, ..., M)
        In the dtype of `arr`, on the same offsets object.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As `varlen_attention`.

    Notes
    -----
    Arithmetic is in float32 or wider. Differentiable in `arr` and `weight`.

    References
    ----------
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    others = () if weight is None else (weight,)
    key, call = recall("varlen_rmsnorm", (arr,), others, (eps, implementation))
    if call is None:
        eps = _contract.norm("varlen_rmsnorm", arr, {"weight": weight}, eps)
        module = choose("varlen_rmsnorm", implementation, arr, weight, eps)
        call = bound(key, module, "varlen_rmsnorm", (arr,), {"eps": eps})
    return call(arr, weight)


def varlen_softmax(arr: Array, *, implementation: str | None = None) -> Array:
    """Softmax along the ragged axis, each sequence and each feature on its own.

    ``y[t] = exp(x[t] - max(x)) / sum(exp(x - max(x)))`` over the tokens t of one sequence.

    Parameters
    ----------
    arr : Array of (T, *features), floating
        Any `ragged_dim`.
    implementation : str, optional
        Force one by name.

    Returns
    -------
    Array
        In the shape and dtype of `arr`, on the same offsets object; empty where a sequence is empty.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As `varlen_attention`.

    Notes
    -----
    Arithmetic is in float32 or wider. Differentiable.
    """
    key, call = recall("varlen_softmax", (arr,), (), (implementation,))
    if call is None:
        _contract.softmax(arr)
        call = bound(key, choose("varlen_softmax", implementation, arr), "varlen_softmax", (arr,), {})
    return call(arr)


def varlen_reduce(arr: Array, op: Reduction, *, implementation: str | None = None) -> Dense:
    """Reduce each sequence along the ragged axis.

    Parameters
    ----------
    arr : Array of (T, *features)
        Any `ragged_dim`. Floating, or integer for "sum", "max" and "min", or bool for "max" and "min".
    op : "sum", "mean", "max", "min" or "logsumexp"
    implementation : str, optional
        Force one by name.

    Returns
    -------
    array of (B, *features)
        In the dtype of `arr`; an integer sum wraps where that dtype does. Of an empty sequence: sum 0, mean NaN, max
        -inf, min +inf, logsumexp -inf; for integers the smallest and the largest value of the dtype.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As `varlen_attention`.

    Notes
    -----
    Arithmetic on floating values is in float32 or wider. Differentiable.

    Examples
    --------
    >>> import numpy as np, scree
    >>> scree.kernels.varlen_reduce(scree.from_lengths(np.arange(5.0), [2, 0, 3]), "sum")
    array([1., 0., 9.])
    """
    key, call = recall("varlen_reduce", (arr,), (), (op, implementation))
    if call is None:
        _contract.reduce(arr, op)
        call = bound(key, choose("varlen_reduce", implementation, arr, op), "varlen_reduce", (arr,), {"op": op})
    return call(arr)


def varlen_rope(
    arr: Array,
    cos: Dense,
    sin: Dense,
    *,
    interleaved: bool = False,
    start: int | Sequence[int] | Dense | None = None,
    implementation: str | None = None,
) -> Array:
    """Rotate pairs of features by angles that grow with the place in the sequence (rotary position embedding).

    For a token at place p of its sequence, with c = cos[p + start] and s = sin[p + start]::

        y1 = x1 * c - x2 * s
        y2 = x2 * c + x1 * s

    where x1, x2 are the halves ``x[..., :D/2]``, ``x[..., D/2:]``, or with `interleaved` the even and odd features.

    Parameters
    ----------
    arr : Array of (T, ..., D), floating
        `ragged_dim` 0 and D even; usually (T, H, D).
    cos, sin : array of (positions, D/2), floating
        At least as many positions as are used; a table that is too short is an error where the lengths are known on
        the host. Where they are not (a trace), tokens beyond the table come out as NaN.
    interleaved : bool
        Pair neighbouring features instead of halves.
    start : int, or list or array of (B,), integer, optional
        The position of the first token: one for all sequences, or one each (a KV cache). 0 unless said.
    implementation : str, optional
        Force one by name.

    Returns
    -------
    Array of (T, ..., D)
        In the dtype of `arr`, on the same offsets object.

    Raises
    ------
    ValueError, TypeError, NotImplementedError
        As `varlen_attention`.

    Notes
    -----
    Arithmetic is in float32 or wider. Differentiable in `arr`, `cos` and `sin`.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, eq. 34.
    """
    key, call = recall("varlen_rope", (arr,), (cos, sin), (interleaved, start, type(start), implementation))
    if call is None:
        options = {"interleaved": bool(interleaved), "start": _contract.rope(arr, cos, sin, start)}
        module = choose("varlen_rope", implementation, arr, cos, sin, **options)
        call = bound(key, module, "varlen_rope", (arr,), options)
    return call(arr, cos, sin)
