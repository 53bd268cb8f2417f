"""From what a model gives back to Arrays, and from Arrays to one vector a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from .. import _check
from .._array import Array, expect_array
from .._backends import Dense, find_backend
from ..kernels import varlen_reduce

Pooling = Literal["mean", "first", "last"]

_TOKEN_LOGITS = ("start_logits", "end_logits")  # of question answering: one number a token
_NOT_TOKENS = ("attention", "past_key_values", "cache")
_ONE_FOR_ALL = "pooler_output"


def unflatten(outputs: Any, arr: Array) -> Any:
    """Turn what a model gave for a packed batch back into Arrays. Copies nothing.

    Parameters
    ----------
    outputs : ModelOutput, mapping, tuple or tensor
        Of ``model(**scree.hf.model_kwargs(arr))``; a tensor must be (1, T, ...).
    arr : Array
        What was packed: its offsets, with its empty and its spare rows, are those of the result.

    Returns
    -------
    ModelOutput, dict, tuple or Array
        The same kind, in which every tensor of (1, T, ...) is an Array of (T, ...) with ``arr.offsets``: `logits`,
        `last_hidden_state`, each of `hidden_states`. What is not by token (`loss`, a cache, attention weights) stays as it
        is. `pooler_output` is left out where there are several sequences: it is made of the first alone; `scree.hf.pool`
        gives one vector for each.

    Raises
    ------
    ValueError
        No tensor has one value for each of the T tokens; or `logits` are one row for the whole batch: a head that
        classifies sequences has looked at one token of all of them.
    """
    expect_array("unflatten", arr)
    if arr.ragged_dim:
        raise ValueError(f"unflatten: arr has ragged_dim {arr.ragged_dim}; needs 0")
    if _is_dense(outputs):
        if outputs.ndim < 2 or tuple(outputs.shape[:2]) != (1, arr.total_length):
            raise ValueError(
                f"unflatten: outputs have shape {tuple(outputs.shape)}; needs (1, {arr.total_length}, ...) for this Array"
            )
        return _as_array(outputs, arr)
    if isinstance(outputs, (tuple, list)):
        made: Any = tuple(_field(f"outputs[{i}]", value, arr) for i, value in enumerate(outputs))
        _expect_one(made, outputs, arr)
        return made
    if not isinstance(outputs, Mapping):
        raise TypeError(f"unflatten: outputs is {type(outputs).__name__}; needs a tensor, or what a model returned")
    fields = {name: _field(name, value, arr) for name, value in outputs.items()}
    if arr.batch_size != 1:
        fields.pop(_ONE_FOR_ALL, None)
    _expect_one(tuple(fields.values()), outputs, arr)
    if not dataclasses.is_dataclass(outputs):
        return fields
    empty: Any = type(outputs)(**dict.fromkeys(field.name for field in dataclasses.fields(outputs)))
    for name, value in fields.items():
        empty[name] = value
    return empty


def pool(outputs: Any, how: Pooling = "mean", *, arr: Array | None = None, empty: float = float("nan")) -> Dense:
    """Reduce each sequence to one vector.

    Parameters
    ----------
    outputs : Array of (T, *features), floating; or what a model returned
        The Array, of any framework; `last_hidden_state` of what `unflatten` gave; or a model's outputs for a packed batch,
        together with `arr`.
    how : "mean", "first" or "last"
        The mean of its tokens; its first token (BERT's ``[CLS]``); its last (decoders).
    arr : Array, optional
        What was packed, where `outputs` are not Arrays yet.
    empty : float
        What every feature of an empty sequence is. It has no mean, no first and no last token: NaN unless said, so that
        one that should not be there is seen. With `scree.with_capacity`, 0.0 keeps the empty rows out of a sum.

    Returns
    -------
    array of (B, *features)
        In the dtype of the Array, differentiable, computed in float32 or wider. Nothing waits for the device.

    Examples
    --------
    >>> import numpy as np, scree
    >>> arr = scree.Array(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [0, 2, 2, 3])
    >>> scree.hf.pool(arr)
    array([[ 2.,  3.],
           [nan, nan],
           [ 5.,  6.]])
    >>> scree.hf.pool(arr, "last", empty=0.0)
    array([[3., 4.],
           [0., 0.],
           [5., 6.]])
    """
    if how not in ("mean", "first", "last"):
        raise ValueError(f"pool: how is {how!r}; needs 'mean', 'first' or 'last'")
    tokens = _tokens(outputs, arr)
    xp, values, offsets = tokens._xp, tokens.values, tokens.offsets
    if tokens.ragged_dim:
        raise ValueError(f"pool: the Array has ragged_dim {tokens.ragged_dim}; needs 0")
    if not _check.is_floating(xp.dtype_name(values)):
        raise TypeError(f"pool: the Array is {xp.dtype_name(values)}; needs floating values, such as last_hidden_state")
    features = tuple(values.shape[1:])
    blank = xp.full((tokens.batch_size, *features), empty, values)
    if values.shape[0] == 0 or tokens.batch_size == 0:
        return blank
    if how == "mean":
        pooled = varlen_reduce(tokens, "mean")
    else:
        place = offsets[:-1] if how == "first" else offsets[1:] - 1
        # Of an empty row the place may be beyond either end.
        place = xp.where(tokens.lengths > 0, place, place * 0)
        pooled = xp.take(values, place, 0)
    used = (tokens.lengths > 0).reshape(-1, *(1 for _ in features))
    return xp.where(used, pooled, blank)


def per_token(name: str, value: Any, shape: tuple[int, int]) -> bool:
    """Whether a model's output of this name is a tensor with one value, or row of them, for each token of `shape`."""
    if not _is_dense(value) or tuple(value.shape[:2]) != shape or any(word in name for word in _NOT_TOKENS):
        return False
    return value.ndim >= 3 or name in _TOKEN_LOGITS


def _field(name: str, value: Any, arr: Array) -> Any:
    if not _is_dense(value):
        by_layer = isinstance(value, (tuple, list)) and not any(word in name for word in _NOT_TOKENS)
        return tuple(_field(name, part, arr) for part in value) if by_layer else value
    if per_token(name, value, (1, arr.total_length)):
        return _as_array(value, arr)
    if name in ("logits", "last_hidden_state") and (value.ndim >= 3 or arr.batch_size != 1):
        pooled = (
            "" if value.ndim >= 3 else ": the head looked at one token of the whole batch; pool the model without it"
        )
        raise ValueError(
            f"unflatten: {name} has shape {tuple(value.shape)}; needs (1, {arr.total_length}, ...){pooled}"
        )
    return value


def _as_array(value: Dense, arr: Array) -> Array:
    return arr.with_values(value.reshape(arr.total_length, *value.shape[2:]))


def _expect_one(made: tuple[Any, ...], outputs: Any, arr: Array) -> None:
    found = [part for value in made for part in (value if isinstance(value, tuple) else (value,))]
    if not any(isinstance(part, Array) for part in found):
        has = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else f"{len(outputs)} of them"
        raise ValueError(f"unflatten: none of the outputs ({has}) has shape (1, {arr.total_length}, ...)")


def _tokens(outputs: Any, arr: Array | None) -> Array:
    if isinstance(outputs, Array):
        return outputs
    if _is_dense(outputs):
        return unflatten(outputs, _given(arr))
    if isinstance(outputs, Mapping):
        outputs = outputs.get("last_hidden_state")
        if isinstance(outputs, Array):
            return outputs
        if outputs is not None:
            return unflatten(outputs, _given(arr))
        raise ValueError(
            "pool: the outputs have no last_hidden_state; call the model without its head, or pool hidden_states[-1]"
        )
    raise TypeError(f"pool: outputs is {type(outputs).__name__}; needs an Array, or what a model returned")


def _given(arr: Array | None) -> Array:
    if arr is None:
        raise ValueError("pool: outputs of a model need arr=, the Array that was packed")
    return arr


def _is_dense(x: Any) -> bool:
    return find_backend(x) is not None
