"""Reading transformers' mask functions: which keys may a query see, said in what the kernels take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

_MASKING = "transformers.masking_utils"
_REMEDY = (
    'load the model with attn_implementation="sdpa" or "eager" (model.set_attn_implementation for one that is loaded)'
)


class Pattern(NamedTuple):
    """Which keys a query at an aligned position sees, beside padding.

    Attributes
    ----------
    causal : bool
        No key after it.
    left, right : int or None
        At most so many before and after it; None is no limit.
    segments : tensor of (B, S), integer, or None
        Of equal numbers only: the sequences that transformers found in `position_ids`.
    """

    causal: bool
    left: int | None = None
    right: int | None = None
    segments: Tensor | None = None

    def both(self, other: Pattern) -> Pattern:
        """What this and the other let through."""
        segments = [one.segments for one in (self, other) if one.segments is not None]
        if len(segments) > 1:
            raise refusal("two masks of packed sequences, one upon the other")
        return Pattern(
            self.causal or other.causal,
            _smaller(self.left, other.left),
            _smaller(self.right, other.right),
            segments[0] if segments else None,
        )


def refusal(what: str, remedy: str = _REMEDY) -> NotImplementedError:
    """The error for what cannot be served."""
    return NotImplementedError(f"scree attention: {what} cannot be served; {remedy}")


def _smaller(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return a if b is None else b
    return min(a, b)


def read(mask_function: Callable[..., Any], end: int) -> Pattern:
    """Say what a mask function of transformers lets through, from the parts that it was made of.

    Parameters
    ----------
    mask_function : function
        As `AttentionMaskInterface` hands it over.
    end : int
        One beyond the last position of a key.

    Raises
    ------
    NotImplementedError
        A part is unknown, or nothing that the kernels can do.
    """
    if mask_function.__module__ != _MASKING:
        raise _unknown(mask_function)
    made_of = _closure(mask_function)
    match mask_function.__qualname__.partition(".<locals>")[0]:
        case "causal_mask_function":
            return Pattern(causal=True)
        case "bidirectional_mask_function":
            return Pattern(causal=False)
        case "sliding_window_overlay":
            return Pattern(False, made_of["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return Pattern(False, made_of["sliding_window"], made_of["sliding_window"])
        case "packed_sequence_mask_function":
            return Pattern(False, segments=made_of["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":  # to those within each sequence: differences stay what they are
            return read(made_of["mask_function"], end)
        case "chunked_overlay":
            return _chunked(made_of["chunk_size"], end)
        case "and_masks":
            return functools.reduce(Pattern.both, (read(part, end) for part in made_of["mask_functions"]))
        case "or_masks":
            return _either(*made_of["mask_functions"], end=end)
        case _:
            raise _unknown(mask_function)


def _unknown(mask_function: Callable[..., Any]) -> NotImplementedError:
    return refusal(f"the mask pattern {mask_function.__module__}.{mask_function.__qualname__}")


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a function was made around."""
    cells = function.__closure__ or ()  # pyright: ignore[reportFunctionMemberAccess]
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))  # pyright: ignore[reportFunctionMemberAccess]


def _either(first: Callable[..., Any], *others: Callable[..., Any], end: int) -> Pattern:
    """What one of these lets through, where that is a pattern again."""
    pattern = read(first, end)
    for other in others:
        match other.__qualname__.partition(".<locals>")[0]:
            case "_bidirectional_window_overlay":  # |q - k| < w, around a causal window w
                limit = _closure(other)["sliding_window"] - 1
                pattern = Pattern(False, limit, limit)
            case "blockwise_overlay":
                if bool((_closure(other)["block_sequence_ids"] >= 0).any()):
                    raise refusal("a mask in which the tokens of an image see each other both ways")
            case _ if _is_everything(other):
                pattern = Pattern(causal=False)
            case _:
                raise _unknown(other)
    return pattern


def _is_everything(function: Callable[..., Any]) -> bool:
    """Whether this is ``lambda *args: torch.tensor(True)``, as models write attention both ways."""
    code = function.__code__  # pyright: ignore[reportFunctionMemberAccess]
    takes_anything = code.co_argcount == 0 and code.co_varnames == ("args",) and not code.co_freevars
    return takes_anything and set(code.co_names) <= {"torch", "tensor", "bool", "dtype"} and bool(function())


def _chunked(chunk_size: int, end: int) -> Pattern:
    if end > chunk_size:
        raise refusal(f"attention in chunks of {chunk_size} over {end} tokens")
    return Pattern(causal=False)


def guess(mask_function: Callable[..., Any], options: dict[str, Any], segments: Callable[[], Tensor]) -> Pattern:
    """Say what a mask function lets through where a compiler hides what it was made of: from the options beside it.

    Parameters
    ----------
    mask_function : function
    options : dict
        The keywords that `AttentionMaskInterface` hands over with it.
    segments : function
        Gives the sequences in each row, (B, S), from the mask itself.
    """
    if options.get("use_vmap") or mask_function.__name__ == "or_mask":
        raise refusal("a custom mask function under torch.compile")
    if getattr(options["config"], "attention_chunk_size", None) is not None:
        raise refusal("attention in chunks under torch.compile")
    window = options.get("local_size")
    if "allow_is_bidirectional_skip" in options:
        return Pattern(False, window, window)
    square = options["q_length"] == options["kv_length"]
    packed = square and options["attention_mask"] is None and not options.get("allow_is_causal_skip", True)
    return Pattern(True, None if window is None else window - 1, None, segments() if packed else None)


def of_keywords(causal: bool, sliding_window: int | None) -> Pattern:
    """The pattern where no mask function was asked: as the flash path of transformers reads these keywords."""
    limit = None if sliding_window is None else sliding_window - 1
    return Pattern(causal, limit, None if causal else limit)
