"""The mask function: what transformers knows of a batch, once a forward pass, put into what the attention needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _layouts, _mask_tensor, _pattern
from ._layouts import Layout, Rows
from ._pattern import Pattern, refusal


def mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    cache_position: Tensor | None = None,
    device: Any = None,
    **options: Any,
) -> Tensor:
    """Make the mask of a batch: transformers calls this once for each kind of layer, and each layer is handed the result.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        B, S and K: rows, queries in each, and keys in each, those in the cache included.
    q_offset, kv_offset : int, or tensor of (), integer
        The positions of the first query and of the first key.
    mask_function : function
        Which keys a query may see, by their positions.
    attention_mask : tensor of (B, positions), bool, optional
        True at tokens.
    cache_position : tensor of (S,), integer
        The positions of the queries: how transformers 4 tells `q_length` and `q_offset`.
    **options
        What transformers tells other implementations.

    Returns
    -------
    Mask of (B, 1, 2, K), int8
        It carries a `Layout`.
    """
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if q_length is None or mask_function is None:
        raise TypeError("scree attention: the mask function was called without q_length or mask_function")
    options |= {"q_length": q_length, "kv_length": kv_length, "attention_mask": attention_mask}
    columns = torch.arange(kv_length, device=device)
    pattern = _pattern_of(mask_function, kv_length + kv_offset, options, batch_size, columns)
    if attention_mask is not None and isinstance(q_offset, int) and attention_mask.shape[1] < q_offset + q_length:
        raise ValueError(
            f"scree attention: attention_mask has {attention_mask.shape[1]} columns; needs {q_offset + q_length}: "
            f"{q_offset} of the tokens in the cache, and {q_length} of the new ones"
        )
    keys = _keys(attention_mask, batch_size, kv_length, kv_offset, columns)
    if is_to_itself(pattern.causal, q_length, kv_length, options.get("config")):
        first = 0 if q_length == kv_length else q_offset - kv_offset
        stands = columns < first + q_length
        keys, queries = keys & stands, stands & (columns >= first)
    else:  # the keys may be of other tokens
        first, queries = None, torch.zeros_like(columns, dtype=torch.bool)
    if attention_mask is None and (first is None or (isinstance(first, int) and first + q_length == kv_length)):
        layout = full(batch_size, q_length, kv_length, pattern, columns)
        layout.to_itself = first is not None
    else:
        layout = of_keys(keys, q_length, pattern, first)
        layout.given = attention_mask is not None
    # Beside a cache the model may be compiled, with the mask as an input; a model that computes with its mask was refused
    # before, at the prompt.
    cached = first is not None and (isinstance(first, Tensor) or first > 0 or q_length < kv_length)
    plain = torch.compiler.is_compiling() or cached
    return _layouts.attach_to_own(_mask_tensor.pack(keys, queries, plain), layout)


def _pattern_of(
    mask_function: Callable[..., Any], end: int, options: dict[str, Any], batch_size: int, columns: Tensor
) -> Pattern:
    if not torch.compiler.is_compiling():
        return _pattern.read(mask_function, end)

    def segments() -> Tensor:
        """A sequence begins where a token does not see the one before."""
        rows = torch.arange(batch_size, device=columns.device)[:, None]
        before = (columns - 1).clamp(min=0)
        return (~mask_function(rows, rows * 0, columns[None], before[None])).cumsum(1)

    return _pattern.guess(mask_function, options, segments)


def is_to_itself(causal: bool, q_length: int, kv_length: int, config: Any) -> bool:
    """Whether the keys are certainly of the queries' own tokens, and not of an encoder's."""
    names = ("is_encoder_decoder", "add_cross_attention", "is_decoder", "cross_attention_frequency")
    return causal or (q_length == kv_length and not any(getattr(config, name, None) for name in names))


def _keys(given: Tensor | None, batch_size: int, kv_length: int, kv_offset: int, columns: Tensor) -> Tensor:
    """(B, K), bool: the part of the mask that is about these keys. What the mask does not tell of is no key."""
    if given is None:
        return torch.ones_like(columns, dtype=torch.bool).expand(batch_size, -1)
    part = given[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return torch.nn.functional.pad(part, (0, kv_length - part.shape[1]))


def full(batch_size: int, q_length: int, kv_length: int, pattern: Pattern, like: Tensor) -> Layout:
    """The layout of a batch without padding, whose queries are the last of its tokens."""

    def find() -> tuple[Rows, Rows]:
        if pattern.segments is not None:
            rows = _layouts.of_segments(pattern.segments)
            return rows, rows
        k = _layouts.uniform(batch_size, kv_length, like.device)
        return k if q_length == kv_length else _layouts.uniform(batch_size, q_length, like.device), k

    return Layout(pattern, find)


def of_keys(keys: Tensor, q_length: int, pattern: Pattern, first: int | Tensor | None) -> Layout:
    """The layout where there are keys at (B, K), bool; `first` is the place of the first query, None for other tokens."""
    batch_size, kv_length = keys.shape

    def find() -> tuple[Rows, Rows]:
        k = _layouts.of_mask(keys)
        if first is None:
            return _layouts.uniform(batch_size, q_length, keys.device), k
        if q_length == kv_length:
            return k, k
        places = torch.arange(q_length, device=keys.device) + first
        return _layouts.of_mask(keys.index_select(1, places)), k

    return Layout(pattern, find, given=True, to_itself=first is not None)


def of_copy(mask: Tensor, q_length: int, pattern: Pattern) -> Layout | None:
    """The layout of a copy of a mask of ours (on another device, say), which does not carry it; None of another mask."""
    ours = _mask_tensor.planes(mask)
    if ours is None:
        return None
    keys, queries = ours
    original: Layout | None = _layouts.attached(getattr(mask, "origin", None))
    if original is not None:
        pattern = original.pattern
        if pattern.segments is not None:
            pattern = pattern._replace(segments=pattern.segments.to(keys.device))
            return full(keys.shape[0], q_length, keys.shape[1], pattern, keys)
    layout = of_keys(keys, q_length, pattern, queries.to(torch.int8).argmax() if pattern.causal else None)
    layout.given = original is None or original.given
    return layout


def of_foreign(mask: Tensor, q_length: int, kv_length: int, pattern: Pattern) -> Layout:
    """The layout of a mask that a model or its caller made, if it is of padding, alone or with the pattern of the layer.

    Parameters
    ----------
    mask : tensor of (B, K), true at tokens; or of (B, 1, 1 or S, K), bool and true at what is seen, or added to the scores
    """
    if mask.ndim == 2 and mask.shape[1] == kv_length:
        first = kv_length - q_length if pattern.causal else None
        return of_keys(mask.to(torch.bool), q_length, pattern, first)
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != kv_length:
        raise refusal(f"an attention mask of shape {tuple(mask.shape)} for {q_length} queries and {kv_length} keys")
    if torch.compiler.is_compiling():
        raise refusal("a 4-D mask that the model made itself, under torch.compile,")
    seen = _seen(mask[:, 0])
    keys = seen[:, -1]  # to the last query all that there is of a causal pattern is seen
    if bool((seen == keys[:, None]).all()):
        return of_keys(keys, q_length, Pattern(causal=False), None)
    if not pattern.causal or not _is_causal(seen, keys):
        raise refusal("a 4-D attention mask that is neither padding nor causal")
    return of_keys(keys, q_length, Pattern(causal=True), kv_length - q_length)


def _seen(mask: Tensor) -> Tensor:
    """Which keys a mask lets through, bool."""
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= -1e4)).all()):
        raise refusal("a 4-D attention mask that adds a bias to the scores")
    return seen


def _is_causal(seen: Tensor, keys: Tensor) -> bool:
    """Whether (B, S, K) lets every query that is a token see the keys (B, K) up to itself."""
    length, kv_length = seen.shape[1:]
    if kv_length < length:
        return False
    upto = torch.ones(length, kv_length, dtype=torch.bool, device=seen.device).tril(kv_length - length)
    queries = keys[:, kv_length - length :, None]
    return bool(((seen == (keys[:, None] & upto)) | ~queries).all())
