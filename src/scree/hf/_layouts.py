"""Where the tokens of a batch are: the way from transformers' padded tensors to Arrays, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from .._array import Array
from .._backends import torch as torch_backend
from .._backends.torch import host_view
from .._offsets import Structure, signed
from ._pattern import Pattern


@dataclass(frozen=True)
class Rows:
    """The sequences in a padded batch of B rows and N columns.

    Attributes
    ----------
    places : Array of (T,), integer
        For each token, sequence by sequence, its place among the B * N.
    whole : bool
        Whether every place holds a token, in order.
    inverse : tensor of (B * N,), integer, or None
        For each place its token, where that cannot be a matter of shape (torch.compile). Then T = B * N, and the
        places without a token come last, in no sequence.
    size : int
        B * N.
    """

    places: Array
    whole: bool
    inverse: Tensor | None = None
    size: int = 0

    def gather(self, x: Tensor) -> Array:
        """(B, heads, N, D) -> Array of (T, heads, D): a view where every place holds a token and the strides allow it."""
        flat = x.transpose(1, 2).flatten(0, 1)
        return self.places.with_values(flat if self.whole else flat.index_select(0, self.places.values))

    def scatter(self, arr: Array, batch_size: int) -> Tensor:
        """Array of (T, heads, D) -> (B, N, heads, D), with zeros where there is no token."""
        values = arr.values
        if self.inverse is not None:
            values = values.index_select(0, self.inverse)
        elif not self.whole:
            places = self.places.values
            values = values.new_zeros(self.size, *values.shape[1:]).index_copy(0, places, values)
        return values.unflatten(0, (batch_size, -1))


class Layout:
    """What the attention function has to know of a batch.

    Parameters
    ----------
    pattern : Pattern
        Which keys a query sees.
    find : function
        Gives `q` and `k`; called where they are asked for, once: to find them in a mask is to wait for the device.
    given : bool
        Whether a padding mask was given: then its rows are the sequences, whatever the positions say.
    to_itself : bool
        Whether the keys are of the same tokens as the queries, and of those before them.
    """

    def __init__(
        self,
        pattern: Pattern,
        find: Callable[[], tuple[Rows, Rows]],
        *,
        given: bool = False,
        to_itself: bool = False,
    ) -> None:
        self.pattern = pattern
        self.given = given
        self.to_itself = to_itself
        self.vetted: Tensor | None = None
        """The `position_ids` that were compared with this already."""
        self._find = find
        self._rows: tuple[Rows, Rows] | None = None

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """Where the queries and the keys are."""
        if self._rows is None:
            self._rows = self._find()
        return self._rows

    def cut(self, segments: Tensor) -> None:
        """Let the sequences be those that (B, S) numbers."""
        rows = of_segments(segments)
        self._rows = rows, rows


def _offsets_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def uniform(batch_size: int, length: int, device: torch.device) -> Rows:
    """Rows without padding."""
    size = batch_size * length
    offsets = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * length
    places = torch.arange(size, device=device)
    return Rows(_array(places, offsets), True, size=size)


def of_mask(real: Tensor) -> Rows:
    """The rows of a padding mask (B, N), bool: to either side, or with holes. Waits for the device, once."""
    offsets = _offsets_of(real.sum(1))
    flat = real.flatten()
    if torch.compiler.is_compiling():
        return _of_traced_mask(flat, offsets)
    places = flat.nonzero().flatten()
    return Rows(_array(places, offsets), len(places) == len(flat), size=len(flat))


def _of_traced_mask(flat: Tensor, offsets: Tensor) -> Rows:
    """How many tokens there are decides no shape here: the tokens come first, and what is none comes behind."""
    token = flat.cumsum(0)
    inverse = torch.where(flat, token, token[-1] + (~flat).cumsum(0)) - 1
    every = torch.arange(flat.shape[0], device=flat.device)
    places = torch.empty_like(inverse).scatter(0, inverse, every)
    return Rows(_spare(places, offsets), False, inverse)


def of_segments(segments: Tensor) -> Rows:
    """Rows that are cut where the number in (B, S) changes."""
    first = torch.ones_like(segments[:, :1], dtype=torch.bool)
    starts = torch.cat([first, segments[:, 1:] != segments[:, :-1]], 1).flatten()
    size = starts.shape[0]
    every = torch.arange(size, device=starts.device)
    if torch.compiler.is_compiling():  # as many sequences as there are tokens, and most of them empty, at the end
        ranks = starts.cumsum(0) - 1
        bounds = torch.full((size + 1,), size, device=starts.device, dtype=torch.int32)
        bounds = bounds.scatter_reduce(0, ranks, every.to(torch.int32), "amin")
        return Rows(_spare(every, bounds), True, size=size)
    offsets = F.pad(starts.nonzero().flatten().to(torch.int32), (0, 1), value=size)
    return Rows(_array(every, offsets), True, size=size)


def of_offsets(name: str, offsets: Tensor, total: int) -> Rows:
    """The rows of a packed batch of `total` places; those beyond the last row belong to none (`scree.with_capacity`).

    Offsets on the host are checked in full; on a device, and by a compiler, they are taken as they are.
    """
    places = offsets.new_zeros(1).expand(total)
    host = host_view(offsets)
    if host is None:
        return Rows(_spare(places, offsets), True, size=total)
    try:
        _check.integers(torch_backend, offsets, name)
        _check.host_offsets(host, total, spare=True)
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"scree attention: {name} of a packed batch of {total} tokens: {wrong}") from wrong
    structure = Structure(signed(host), spare=int(host[-1]) < total)
    return Rows(Array._make(places, offsets, 0, structure), True, size=total)


def _array(places: Tensor, offsets: Tensor) -> Array:
    if torch.compiler.is_compiling():
        return Array._make(places, offsets, 0, Structure())
    return Array(places, offsets)


def _spare(places: Tensor, offsets: Tensor) -> Array:
    return Array._make(places, offsets, 0, Structure(spare=True))


_ATTRIBUTE = "_scree_layout"


def attach(tensor: Tensor, made: Any) -> None:
    """Let a tensor carry what is worked out from it once and read in every layer, until it is written to."""
    if not tensor.is_inference():
        setattr(tensor, _ATTRIBUTE, (tensor._version, made))


def attach_to_own(tensor: Tensor, made: Any) -> Tensor:
    """The same for a tensor that was made here, which nobody writes to."""
    setattr(tensor, _ATTRIBUTE, (None, made))
    return tensor


def attached(tensor: Tensor | None) -> Any:
    """What a tensor carries, or None."""
    version, made = getattr(tensor, _ATTRIBUTE, (None, None))
    return made if version is None or (tensor is not None and version == tensor._version) else None
