"""The safetensors format: eight bytes, a header in JSON, then the bytes of every tensor.

Read and written here, since the safetensors package gives NumPy a copy in memory of whatever it reads, and takes all
that it writes from memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._backends._protocol import HostArray
from ._fields import Entries, Layout, Lazy, as_bytes, crc32, dtype_named, parsed, sealed

_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_DTYPES = {code: name for name, code in _NAMES.items()}
_ALIGNED = 64  # bytes: where the tensors begin
_MOST_HEADER = 100_000_000  # bytes, as the safetensors package has it


def write(file: IO[bytes], entries: Entries, layout: Layout) -> None:
    """Write the entries, those with the widest elements first, so that each begins at a multiple of its own size."""
    ordered = sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)
    tensors: dict[str, Any] = {}
    end = 0
    for name, array in ordered:
        code = _NAMES.get(array.dtype.name)
        if code is None:
            raise TypeError(f"save: {name!r} has dtype {array.dtype.name}, which safetensors does not have")
        begin, end = end, end + array.nbytes
        tensors[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [begin, end]}
    sums = dict.fromkeys(entries, "00000000")
    file.write(_header(tensors, layout, sums))  # takes the place of the one below, which is as long
    for name, array in ordered:
        if array.size:
            file.write(as_bytes(array))
        sums[name] = crc32(array)
    file.seek(0)
    file.write(_header(tensors, layout, sums))


def _header(tensors: dict[str, Any], layout: Layout, sums: dict[str, str]) -> bytes:
    told = {"__metadata__": {"scree": sealed(layout, sums)}, **tensors}
    text = json.dumps(told).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def read(path: Path, mmap: bool) -> tuple[Lazy, Layout | None]:
    """Read the header; return how to get each entry, and the layout."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _MOST_HEADER:
            raise ValueError(
                f"load: '{path}' is truncated or no safetensors file: its header needs {length + 8} bytes, it has {size}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        told = header.pop("__metadata__", {})
        tensors = {name: (t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        raise ValueError(f"load: '{path}' has a header that cannot be read ({wrong}); it is damaged") from wrong
    _check(path, size, 8 + length, tensors)
    whole = np.asarray(np.memmap(path, np.uint8, "r")) if mmap else None

    def get(name: str) -> HostArray:
        code, shape, begin, end = tensors[name]
        dtype = dtype_named(path, _DTYPES[code])
        if whole is None:
            data = np.fromfile(path, np.uint8, end - begin, offset=8 + length + begin)
        else:
            data = whole[8 + length + begin : 8 + length + end]
        if (8 + length + begin) % dtype.itemsize:
            data = data.copy()
        return data.view(dtype).reshape(shape)

    lazy: Lazy = {name: (lambda name=name: get(name)) for name in tensors}
    return lazy, parsed(path, told["scree"]) if "scree" in told else None


def _check(path: Path, size: int, start: int, tensors: dict[str, Any]) -> None:
    """Refuse tensors that leave gaps, overlap, or do not end with the file."""
    at = 0
    for name, (code, shape, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if code not in _DTYPES:
            raise ValueError(f"load: '{path}': {name!r} has dtype {code!r}; needs one of {', '.join(_DTYPES)}")
        count = int(np.prod(shape, dtype=np.int64))
        item = np.dtype(_STAND_IN.get(_DTYPES[code], _DTYPES[code])).itemsize
        if begin != at or end - begin != count * item or min(shape, default=0) < 0:
            raise ValueError(f"load: '{path}': {name!r} does not fit its place in the header; the file is damaged")
        at = end
    if start + at != size:
        what = "truncated" if size < start + at else "longer than what was written"
        raise ValueError(f"load: '{path}' is {what}: it has {size} bytes, its header needs {start + at}")


_STAND_IN = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
