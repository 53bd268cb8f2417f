"""Comparing `position_ids` with the sequences of a batch: what contradicts them is an error, never a guess."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._array import Array
from .._backends.torch import host_view
from ._layouts import Layout

_REMEDY = "scree.hf.model_kwargs and scree.hf.collator give both"


def expect_packed(position_ids: Tensor, places: Array) -> None:
    """Refuse positions that contradict the offsets of a packed batch. On a device nothing is looked at, nor waited for.

    Within a sequence they run on by one, and from a sequence to the next they do not, at least not everywhere.

    Parameters
    ----------
    position_ids : tensor of (1, T), integer
        Of another number of axes (several positions a token), they are not looked at.
    places : Array of (T,)
        With the offsets.
    """
    offsets = places._known_offsets()
    positions = host_view(position_ids)
    if position_ids.ndim != 2 or offsets is None or positions is None:
        return
    if positions.size != places.total_length:
        raise ValueError(
            f"scree attention: position_ids has shape {tuple(position_ids.shape)} for {places.total_length} packed tokens"
        )
    used = int(offsets[-1])
    steps = np.diff(positions.reshape(-1)[:used])
    begins = np.unique(offsets)[1:-1] - 1
    between = np.zeros(len(steps), bool)
    between[begins] = True
    wrong = (steps != 1) & ~between
    if wrong.any():
        place = int(wrong.argmax())
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        a, b = (int(positions.reshape(-1)[i]) for i in (place, place + 1))
        raise ValueError(
            f"scree attention: position_ids contradict cu_seq_lens_q: within sequence {row} ({offsets[row]} to "
            f"{offsets[row + 1]}) position {a} is followed by {b}; {_REMEDY}"
        )
    if len(begins) and (steps[between] == 1).all():
        raise ValueError(
            f"scree attention: position_ids contradict cu_seq_lens_q: they run on through all {len(begins) + 1} sequences; "
            f"they have to begin anew in each; {_REMEDY}"
        )


def compare(layout: Layout, position_ids: Tensor, batch_size: int, length: int, kv_length: int) -> bool:
    """Find the sequences that positions tell of in a batch that has no offsets, where that is beyond doubt.

    Beside a padding mask, whose rows are the sequences, positions that fall within a row are an error. Without one, rows
    whose positions begin anew are cut there, and positions that jump anywhere else are an error: transformers' own
    implementations disagree on them.

    Returns
    -------
    bool
        Whether the rows were found to be packed.

    Notes
    -----
    Waits for the device, once a forward pass; with `cu_seq_lens_q` nothing does.
    """
    if length == 1 or position_ids.ndim != 2 or position_ids.shape[1] != length:
        return False
    if position_ids.shape[0] not in (1, batch_size):
        return False
    positions = position_ids.expand(batch_size, length)
    jumps = positions[:, 1:] != positions[:, :-1] + 1
    segments = torch.nn.functional.pad(jumps.cumsum(1), (1, 0))
    if torch.compiler.is_compiling():
        if not layout.given and length == kv_length:
            layout.cut(segments)
        return False
    if layout.given:
        _expect_rising(layout, positions)
        return False
    if not bool(jumps.any()):
        return False
    first = positions[:, :1]
    if kv_length != length or bool((jumps & (positions[:, 1:] != first)).any()) or bool((positions < first).any()):
        raise ValueError(
            "scree attention: position_ids jump in the middle of a row, and it cannot be told whether a sequence begins "
            "there; pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k (scree.hf.model_kwargs makes them), "
            "or an attention_mask if every row is one sequence"
        )
    layout.cut(segments)
    return True


def _expect_rising(layout: Layout, positions: Tensor) -> None:
    """Refuse positions that fall from a token to the next, in a row that a padding mask says is one sequence."""
    q, _ = layout.rows
    places = q.places.values
    told = positions.flatten()[places]
    rows = places // positions.shape[1]
    falls = (told[1:] <= told[:-1]) & (rows[1:] == rows[:-1])
    if bool(falls.any()):
        raise ValueError(
            "scree attention: position_ids begin anew within a row, where attention_mask says that the row is one "
            "sequence; for a packed batch leave attention_mask out and pass cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
            "max_length_k (scree.hf.model_kwargs makes them)"
        )
