"""The tensor that stands in for an attention mask on its way through a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._pattern import refusal

KEYS, QUERIES = 0, 1
"""The planes of a mask."""

_HANDED_ON = {
    "__deepcopy__", "__get__", "__getitem__", "__hash__", "__len__", "__reduce_ex__", "__repr__", "__set__",
    "as_subclass", "chunk", "clone", "contiguous", "cpu", "cuda", "data_ptr", "detach", "dim", "element_size", "expand",
    "index_select", "is_complex", "is_contiguous", "is_floating_point", "is_inference", "is_pinned", "nelement", "numel",
    "pin_memory", "record_stream", "repeat", "repeat_interleave", "size", "split", "stride", "to", "type",
    "untyped_storage",
}  # fmt: skip


class Mask(Tensor):
    """(B, 1, 2, K), int8: 1 where there is a key, and 1 where a query stands.

    It has four axes, so that transformers hands it on as it is. It can be moved, copied and cut, and nothing else: a model
    that computes with its mask does not use the attention interface, and would be silently wrong.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse arithmetic."""
        if getattr(func, "__name__", "") not in _HANDED_ON:
            raise refusal(
                "a model that does not use transformers' attention interface, but computes with its mask by itself "
                f"({getattr(func, '__name__', func)}),"
            )
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Mask) and isinstance(args[0], Mask) and result is not args[0]:
            result.origin = args[0] if args[0].origin is None else args[0].origin
        return result

    origin: Mask | None = None
    """The mask that this is a copy or a part of."""


def pack(keys: Tensor, queries: Tensor, plain: bool) -> Tensor:
    """Make a mask of the places of keys (B, K) and of queries (K,), both bool.

    A compiler wants a plain tensor; then scores cannot be added to its shape, at least.
    """
    both = torch.stack([keys, queries.expand_as(keys)], 1).to(torch.int8)[:, None]
    return both if plain else both.as_subclass(Mask)


def planes(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """The keys (B, K) and queries (K,), bool, of a mask of ours; None of another."""
    if mask.dtype != torch.int8 or mask.ndim != 4 or mask.shape[1:3] != (1, 2):
        return None
    plain = mask.as_subclass(Tensor)[:, 0].bool() if isinstance(mask, Mask) else mask[:, 0].bool()
    return plain[:, KEYS], plain[0, QUERIES]
