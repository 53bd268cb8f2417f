"""What every file format holds: named arrays, and a layout that says which of them are one Array.

An Array in the field ``name`` is the two entries ``name.values`` and ``name.offsets``; without a name (an Array that was
saved by itself) they are ``values`` and ``offsets``. A dense array is one entry of its name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _offsets, bridges
from .._array import Array
from .._backends import find_backend
from .._backends._protocol import HostArray
from ..bridges._handover import readable, used_values

Layout = dict[str, Any]
Entries = dict[str, HostArray]
Lazy = dict[str, Callable[[], HostArray]]
Fields = Mapping[str, Any]

VERSION = 1
SINGLE = ""


def entry_names(field: str) -> tuple[str, str]:
    """The entries of an Array in this field."""
    dot = f"{field}." if field else ""
    return f"{dot}values", f"{dot}offsets"


def to_entries(op: str, data: Any) -> tuple[Entries, Layout]:
    """Take an Array, or a dictionary of Arrays and dense arrays, apart."""
    if isinstance(data, Array):
        data = {SINGLE: data}
    elif not isinstance(data, Mapping):
        raise TypeError(
            f"{op}: data is {type(data).__name__}; needs an Array, a dictionary of fields, or batches of them"
        )
    elif not data:
        raise ValueError(f"{op}: data is an empty dictionary; needs at least one field")
    elif SINGLE in data:
        raise ValueError(f"{op}: a field has an empty name; needs a text of one character or more")
    entries: Entries = {}
    fields: dict[str, Any] = {}
    for name, value in data.items():
        if not isinstance(name, str):
            raise TypeError(f"{op}: field {name!r} is named by {type(name).__name__}; needs a text")
        made: Entries = {}
        if isinstance(value, Array):
            host = bridges.to_numpy(value)
            values_name, offsets_name = entry_names(name)
            made[values_name] = used_values(op, host)
            made[offsets_name] = _offsets.signed(host.offsets)
            fields[name] = {"kind": "ragged", "ragged_dim": value.ragged_dim}
        else:
            made[name] = _dense(op, name, value)
            fields[name] = {"kind": "dense"}
        for entry, array in made.items():
            if array.dtype.kind not in "biufc" and array.dtype.name.startswith(
                ("str", "bytes", "void", "datetime", "time")
            ):
                raise TypeError(f"{op}: field {name!r} has dtype {array.dtype.name}; needs numbers or bools")
            if entry in entries:
                raise ValueError(
                    f"{op}: field {name!r} would be stored as {entry!r}, which another field is; rename one"
                )
            entries[entry] = np.ascontiguousarray(readable(array)).reshape(array.shape)
    return entries, {"version": VERSION, "fields": fields}


def _dense(op: str, name: str, value: Any) -> HostArray:
    xp = find_backend(value)
    if xp is None:
        raise TypeError(f"{op}: field {name!r} is {type(value).__name__}; needs an Array or an array")
    if value.ndim == 0:
        raise ValueError(f"{op}: field {name!r} is a scalar; needs at least one axis")
    return bridges.to_numpy(Array(value, [0, value.shape[0]])).values


def from_entries(path: Path, entries: Lazy, layout: Layout | None, wanted: Iterable[str] | None, check: Any) -> Any:
    """Put the fields together again. ``check(entry, array, sums)`` looks at each array that is read."""
    fields, sums = _fields_of(path, entries, layout)
    if wanted is not None:
        if isinstance(wanted, str):
            raise TypeError(f"fields: got {wanted!r}; needs a list of names")
        wanted = list(wanted)
        unknown = [name for name in wanted if name not in fields]
        if unknown:
            known = ", ".join(map(repr, fields))
            raise ValueError(f"fields: got {unknown[0]!r}, which '{path}' does not have; it has {known}")
        fields = {name: fields[name] for name in wanted}
    found: dict[str, Any] = {}
    for name, field in fields.items():
        ragged = field["kind"] == "ragged"
        parts: list[HostArray] = []
        for entry in entry_names(name) if ragged else (name,):
            if entry not in entries:
                raise ValueError(f"load: '{path}' lacks {entry!r}, of which its layout speaks; it is not whole")
            parts.append(entries[entry]())
            check(entry, parts[-1], sums)
        found[name] = _array(path, name, parts, field.get("ragged_dim", 0)) if ragged else parts[0]
    return found[SINGLE] if list(found) == [SINGLE] else found


def _array(path: Path, name: str, parts: list[HostArray], ragged_dim: Any) -> Array:
    try:
        return Array(parts[0], parts[1], ragged_dim)
    except (TypeError, ValueError) as wrong:
        raise ValueError(f"load: '{path}': field {name!r} is damaged: {wrong}") from wrong


def _fields_of(path: Path, entries: Lazy, layout: Layout | None) -> tuple[dict[str, Any], Mapping[str, str]]:
    if layout is not None:
        if layout.get("version") != VERSION:
            raise ValueError(
                f"load: '{path}' has a layout of version {layout.get('version')!r}; this scree reads version {VERSION}"
            )
        return layout["fields"], layout.get("crc32", {})
    fields: dict[str, Any] = {}
    for entry in entries:
        name = SINGLE if entry == "values" else entry.removesuffix(".values")
        if entry_names(name)[0] == entry and entry_names(name)[1] in entries:
            fields[name] = {"kind": "ragged"}
        elif not (entry == "offsets" or entry.endswith(".offsets")) or _partner(entry) not in entries:
            fields[entry] = {"kind": "dense"}
    return fields, {}


def _partner(entry: str) -> str:
    return entry.removesuffix("offsets") + "values"


def crc32(array: HostArray) -> str:
    """The CRC-32 of an array's dtype, shape and bytes, as eight hexadecimal digits."""
    start = zlib.crc32(f"{array.dtype.name} {array.shape}".encode())
    return f"{zlib.crc32(as_bytes(array), start) if array.size else start:08x}"


def as_bytes(array: HostArray) -> Any:
    """An array's bytes, without a copy where they are contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def sealed(layout: Layout, sums: Mapping[str, str]) -> str:
    """A layout and the checksums of the entries as JSON, with a checksum of its own; its length depends on no sum."""
    told = {**layout, "crc32": dict(sums)}
    return json.dumps({**told, "seal": _seal(told)})


def _seal(told: Layout) -> str:
    return f"{zlib.crc32(json.dumps(told).encode()):08x}"


def parsed(path: Path, text: bytes | str) -> Layout:
    """A layout from its JSON."""
    try:
        layout = dict(json.loads(text))
        seal = layout.pop("seal")
    except (ValueError, KeyError, TypeError) as wrong:
        raise ValueError(f"load: '{path}' has a layout that cannot be read ({wrong}); it is damaged") from wrong
    if seal != _seal(layout):
        raise ValueError(f"load: '{path}' was altered: its layout does not have the checksum that it was saved with")
    return layout


def dtype_named(path: Path, name: str) -> np.dtype[Any]:
    """NumPy's dtype of this name; bfloat16 and the float8 dtypes are those of ml_dtypes."""
    if name.startswith(("bfloat", "float8")):
        try:
            import ml_dtypes
        except ImportError as missing:
            raise ImportError(
                f"load: '{path}' holds {name}, which NumPy has with the package ml_dtypes only; pip install ml_dtypes"
            ) from missing
        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)
