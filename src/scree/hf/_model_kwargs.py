"""From an Array to the keywords of a model's forward."""

from __future__ import annotations

import inspect
from typing import Any

from .. import _check
from .._array import Array, expect_array
from .._backends import Dense
from .._packing import position_ids, segment_ids
from ..bridges import to_torch

_OP = "model_kwargs"
_IGNORED = -100


def model_kwargs(
    arr: Array,
    *,
    model: Any = None,
    labels: Array | None = None,
    position_ids_start: int | None = None,
    seq_idx: bool = False,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Give the keywords with which a model of transformers runs a packed batch: ``model(**model_kwargs(arr))``.

    No layer then has to infer where a sequence ends, or to ask the device for it.

    Parameters
    ----------
    arr : Array of (T,), integer, or (T, M), floating
        Token ids, or embeddings. Of PyTorch; another framework's goes through `scree.bridges.to_torch`.
        `scree.with_capacity` gives fixed shapes.
    model : transformers.PreTrainedModel, optional
        Asked where its positions begin.
    labels : Array of (T,), integer, optional
        With the structure of `arr`, for a causal model, which shifts them by one: the label of the first token of each
        sequence becomes -100, so that no other sequence learns to predict it, and that of spare tokens too.
    position_ids_start : int, optional
        The position of the first token. Where it is not given, what `model` says, and 0 without one: RoBERTa and its
        relatives count from ``padding_idx + 1``.
    seq_idx : bool
        Give `seq_idx` too, (1, T) int32, which state-space and convolution layers read.
    max_length : int, optional
        An upper bound on the lengths, so that compiled code sees one number for every batch. Otherwise ``arr.max_length``.

    Returns
    -------
    dict
        `input_ids` (1, T) int64, or `inputs_embeds` (1, T, M) in the dtype of `arr`, differentiable; `position_ids` (1, T)
        int64, which begin anew in every sequence; `cu_seq_lens_q` and `cu_seq_lens_k` (B + 1,) int32, one tensor;
        `max_length_q` and `max_length_k`, int; ``use_cache=False``, because a cache has no place for several sequences in
        a row; and `labels` and `seq_idx` where they are asked for. Never an `attention_mask`. Views of `arr` where the
        dtypes agree.

    Raises
    ------
    TypeError, ValueError
        `arr` holds something else than ids or embeddings, `labels` have another structure, `max_length` is below the
        longest sequence; the model is an encoder and a decoder, which need a batch each, or its forward has no place for
        `cu_seq_lens_q`, as in many encoders before transformers 5.

    Notes
    -----
    Nothing waits for the device where the host knows the lengths; otherwise the offsets are copied there once, for
    ``arr.max_length``, unless `max_length` is given. Under a trace that hides the offsets, the bound is ``total_length``.

    Examples
    --------
    >>> import scree, torch
    >>> batch = scree.hf.model_kwargs(scree.pack([torch.tensor([5, 6, 7]), torch.tensor([8, 9])]))
    >>> batch["input_ids"], batch["cu_seq_lens_q"]
    (tensor([[5, 6, 7, 8, 9]]), tensor([0, 3, 5], dtype=torch.int32))
    """
    expect_array(_OP, arr)
    if model is not None:
        _expect_room(model)
    name = _kind(arr)
    arr = in_torch(arr)
    import torch

    if arr.total_length >= 2**31:
        raise ValueError(f"{_OP}: arr has {arr.total_length} tokens; cu_seq_lens are int32, which ends at {2**31 - 1}")
    places = position_ids(arr).to(torch.int64)
    start = (
        positions_start(model) if position_ids_start is None else _check.whole(position_ids_start, "position_ids_start")
    )
    cu_seq_lens, longest = arr.offsets.to(torch.int32), _longest(arr, max_length)
    batch: dict[str, Any] = {
        name: (arr.values.to(torch.int64) if name == "input_ids" else arr.values)[None],
        "position_ids": (places + start if start else places)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }
    if seq_idx:
        batch["seq_idx"] = segment_ids(arr).to(torch.int32)[None]
    if labels is not None:
        # Spare tokens have place 0 as well.
        batch["labels"] = torch.where(places == 0, _IGNORED, _labels(labels, arr).to(torch.int64))[None]
    return batch


def positions_start(model: Any) -> int:
    """The position that a model gives to the first token of a sequence.

    RoBERTa and its relatives keep the place of `padding_idx` in the table of positions for padding, and count from the one
    after it; no other model gives that table a `padding_idx`.
    """
    for name, module in model.named_modules() if model is not None else ():
        if name.rpartition(".")[2] == "position_embeddings":
            padding_idx = getattr(module, "padding_idx", None)
            return 0 if padding_idx is None else padding_idx + 1
    return 0


def _expect_room(model: Any) -> None:
    """Refuse a model that cannot be told where a packed sequence ends."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{_OP}: {name} is an encoder and a decoder; each needs a packed batch of its own")
    parameters = inspect.signature(model.forward).parameters
    if "cu_seq_lens_q" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"{_OP}: the forward of {name} takes no cu_seq_lens_q, so that it cannot keep packed sequences apart; "
            "use a newer transformers, or pad (scree.bridges.to_hf_padded)"
        )


def in_torch(arr: Array) -> Array:
    """The Array of PyTorch; one that is there already, without the import, which no compiler can follow."""
    return arr if arr._xp.NAME == "torch" else to_torch(arr)


def _kind(arr: Array) -> str:
    dtype = arr._xp.dtype_name(arr.values)
    if arr.ragged_dim == 0 and arr.values.ndim == 1 and _check.is_integer(dtype):
        return "input_ids"
    if arr.ragged_dim == 0 and arr.values.ndim == 2 and _check.is_floating(dtype):
        return "inputs_embeds"
    raise TypeError(
        f"{_OP}: arr has values of shape {tuple(arr.values.shape)}, {dtype}, ragged_dim={arr.ragged_dim}; "
        "needs token ids (T,), integer, or embeddings (T, M), floating"
    )


def _longest(arr: Array, bound: int | None) -> int:
    known = arr._known_offsets()
    if bound is None:
        return arr.total_length if known is None and arr._is_opaque() else arr.max_length
    given = _check.whole(bound, "max_length")
    if known is not None and given < arr._structure.longest(known):
        raise ValueError(
            f"max_length: got {given}; needs at least {arr._structure.longest(known)}, the longest sequence"
        )
    return given


def _labels(labels: Any, arr: Array) -> Dense:
    expect_array(_OP, labels, "labels")
    if labels.ragged_dim or labels.values.ndim != 1 or not _check.is_integer(labels._xp.dtype_name(labels.values)):
        raise TypeError(f"{_OP}: labels have shape {tuple(labels.values.shape)}; needs (T,), integer")
    labels = in_torch(labels)
    mine, theirs = arr._known_offsets(), labels._known_offsets()
    same = labels.total_length == arr.total_length and labels.batch_size == arr.batch_size
    if not same or (mine is not None and theirs is not None and mine.tolist() != theirs.tolist()):
        raise ValueError(f"{_OP}: labels have another structure than arr; needs one label a token")
    return labels.values
