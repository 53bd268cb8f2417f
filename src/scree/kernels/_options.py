"""The options of `varlen_attention`, stated once: the front door makes them, and every room gets them as one object."""

from __future__ import annotations

from typing import NamedTuple

_NO_LIMIT = -1
_LONGEST = 1 << 30  # no window reaches further, and sums with it fit in 32 bits

Sides = tuple[int | None, int | None]
"""How many keys to the left and to the right of its place a query sees; None is no limit."""


class AttentionOptions(NamedTuple):
    """The options of `varlen_attention`, checked, with every default filled in.

    They have a hash: what was chosen, planned or compiled for them can be kept under them.

    Attributes
    ----------
    scale : float
    causal : bool
    window_size : (left, right)
        As it was given; `sides` has `causal` in it, too.
    softcap : float, optional
    return_lse, deterministic : bool
    """

    scale: float
    causal: bool = False
    window_size: Sides = (None, None)
    softcap: float | None = None
    return_lse: bool = False
    deterministic: bool = True

    @property
    def left(self) -> int | None:
        """How many keys to the left of its place a query sees; None is no limit."""
        return self.window_size[0]

    @property
    def right(self) -> int | None:
        """How many keys to the right of its place a query sees: none where `causal`; None is no limit."""
        return 0 if self.causal else self.window_size[1]

    @property
    def sides(self) -> Sides:
        """`left` and `right`."""
        return self.left, self.right

    def flat(self) -> FlatOptions:
        """The same as numbers alone."""
        (left, right), softcap = self.window_size, self.softcap
        return FlatOptions(
            _NO_LIMIT if left is None else min(left, _LONGEST),
            0 if self.causal else _NO_LIMIT if right is None else min(right, _LONGEST),
            self.scale,
            0.0 if softcap is None else softcap,
            self.return_lse,
            self.deterministic,
        )


class FlatOptions(NamedTuple):
    """The options as kernels and operators of `torch.library` take them, which know no None and no tuples of it.

    Attributes
    ----------
    left, right : int
        The window, `causal` being one that does not look to the right; -1 for no limit.
    scale : float
    softcap : float
        0 for none.
    return_lse, deterministic : bool
    """

    left: int
    right: int
    scale: float
    softcap: float
    return_lse: bool = False
    deterministic: bool = True

    @property
    def sides(self) -> Sides:
        """`left` and `right` with None for no limit."""
        return (None if self.left < 0 else self.left), (None if self.right < 0 else self.right)


FLAT_SCHEMA = "SymInt left, SymInt right, float scale, float softcap, bool return_lse, bool deterministic"
"""The fields of `FlatOptions` in the language of `torch.library`: an operator ends with them, and gets ``*flat``."""
