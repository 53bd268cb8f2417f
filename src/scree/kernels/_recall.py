"""Calls like one before, which need not be checked and chosen for again: outside of compilers and transformations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .._array import Array
from .._backends import Dense, find_backend
from ._dispatch import function_of

Call = Callable[..., Any]
Key = tuple[Any, ...]
_IMMUTABLE = frozenset({bool, int, float, str, type, type(None)})
_MOST_KEPT = 256
CHOSEN: dict[Key, Call] = {}  # under keys of `whatever_lengths`


def recall(
    op: str, arrays: tuple[Array, ...], others: tuple[Dense, ...], given: tuple[Any, ...]
) -> tuple[Key | None, Call | None]:
    """Return the function that computes a call, if one like it was checked before, and the key to keep it under.

    A call is like another one on the same offsets, where arrays and options agree in all that the checks and the choice
    of an implementation look at. No key where that cannot be said in a few words: Arrays of different offsets, or a
    compiler or a transformation that is looking on.
    """
    first = arrays[0]
    if type(first) is not Array:
        return None, None
    xp = find_backend(first._values)
    if xp is None:
        return None, None
    offsets, dim = first._offsets, first._ragged_dim
    every: list[Dense] = []
    for arr in arrays:
        if type(arr) is not Array or arr._offsets is not offsets or arr._ragged_dim != dim:
            return None, None
        every.append(arr._values)
    facts = xp.facts(*every, *others)
    if facts is None:
        return None, None
    key = (op, dim, given, facts)
    try:
        return key, first._structure.derived.get(key)
    except TypeError:  # an option without a hash
        return None, None


def bound(
    key: Key | None,
    module: Any,
    op: str,
    arrays: tuple[Array, ...],
    options: dict[str, Any],
    alike: Key | None = None,
) -> Call:
    """Bind the options of a call that was checked to the function of its implementation, and keep that with the offsets.

    Under `alike`, a key of `whatever_lengths`, it is kept for other offsets too, where the implementation says that it
    looks at none: it has ``WHATEVER_LENGTHS``.
    """
    if key is None or "bind" not in vars(module):
        call = functools.partial(function_of(module, op), **options)
    else:
        call = module.bind(op, arrays, options)
    if key is not None:
        _keep(arrays[0]._structure.derived, key, call)
    if alike is not None and getattr(module, "WHATEVER_LENGTHS", False):
        _keep(CHOSEN, alike, call)
    return call


def _keep(kept: dict[Key, Call], key: Key, call: Call) -> None:
    if _IMMUTABLE.issuperset(map(type, key[2])):
        if len(kept) >= _MOST_KEPT:  # options or shapes that change at every call
            kept.clear()
        kept[key] = call


def whatever_lengths(key: Key, arrays: tuple[Array, ...]) -> Key | None:
    """A key of `recall` for any offsets and any number of tokens: for calls of an op whose checks look at neither.

    None where the arrays differ in their number of tokens.
    """
    op, dim, given, facts = key
    total = arrays[0]._values.shape[dim]
    others: list[Any] = []
    for fact in facts:
        if isinstance(fact, tuple):  # a shape, as they are in every framework
            if fact[dim] != total:
                return None
            fact = fact[:dim] + fact[dim + 1 :]
        others.append(fact)
    return op, dim, given, tuple(others)
