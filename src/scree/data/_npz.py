"""NumPy's `.npz`, stored without compression, so that the arrays in it can be mapped."""

from __future__ import annotations

import os
import struct
import tokenize
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._backends._protocol import HostArray
from ._fields import Entries, Layout, Lazy, crc32, dtype_named, parsed, sealed

_LAYOUT = "scree.json"
_ALIGNED = 64  # bytes: where each array begins; NumPy pads its own header to as much
_PADDING_ID = 0xD935  # the extra field that Android's zipalign uses for the same
_ZIP64 = 20  # bytes of the extra field that zipfile adds
_CHUNK = 1 << 24
_END = struct.Struct("<4s4H2LH")  # the end of a zip file without a comment
# What zipfile and NumPy's reader of headers raise for bytes that they do not know; RuntimeError: encrypted.
_BROKEN = (
    zipfile.BadZipFile, EOFError, ValueError, OSError, struct.error, NotImplementedError, RuntimeError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip


def write(file: IO[bytes], entries: Entries, layout: Layout) -> None:
    """Write the entries as `.npy` members, each aligned, and the layout as the last member."""
    stored: dict[str, str] = {}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in entries.items():
            if array.dtype.kind == "V":  # of ml_dtypes, of which .npy knows the size only
                stored[name] = array.dtype.name
                array = array.view(f"u{array.dtype.itemsize}")
            info = zipfile.ZipInfo(f"{name}.npy")
            before = file.tell() + 30 + len(info.filename.encode()) + _ZIP64 + 4
            padding = -before % _ALIGNED
            info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        sums = {name: crc32(array) for name, array in entries.items()}
        archive.writestr(_LAYOUT, sealed({**layout, "dtypes": stored}, sums))


def read(path: Path, mmap: bool) -> tuple[Lazy, Layout | None]:
    """Read the directory; return how to get each entry, and the layout."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            _require_all(path, len(archive.infolist()))
            layout = parsed(path, archive.read(_LAYOUT)) if _LAYOUT in members else None
    except _BROKEN as wrong:
        raise ValueError(f"load: '{path}' is truncated or no .npz file ({wrong})") from wrong
    stored: dict[str, str] = layout.get("dtypes", {}) if layout else {}

    def get(name: str) -> HostArray:
        info = members[f"{name}.npy"]
        try:
            array = _mapped(path, info) if mmap else _copied(path, info)
        except _BROKEN as wrong:
            raise ValueError(f"load: '{path}': {name!r} cannot be read ({wrong}); the file is damaged") from wrong
        return array.view(dtype_named(path, stored[name])) if name in stored else array

    names = [name.removesuffix(".npy") for name in members if name.endswith(".npy")]
    return {name: (lambda name=name: get(name)) for name in names}, layout


def _require_all(path: Path, listed: int) -> None:
    """Compare the members that a directory lists with how many it says there are, which zipfile does not look at."""
    with path.open("rb") as file:
        file.seek(-_END.size, os.SEEK_END)
        mark, *_, n_members, _, _, _ = _END.unpack(file.read())
    if mark == b"PK\5\6" and n_members not in (listed, 0xFFFF):  # 0xFFFF: the number is elsewhere
        raise ValueError(f"its directory lists {listed} of {n_members} members")


def _copied(path: Path, info: zipfile.ZipInfo) -> HostArray:
    with zipfile.ZipFile(path) as archive, archive.open(info) as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
        if member.read(1):  # at the end zipfile compares its checksum
            raise ValueError("the array is shorter than its member")
        return array


def _mapped(path: Path, info: zipfile.ZipInfo) -> HostArray:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it is compressed and cannot be mapped; needs mmap=False")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("its member has no header")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        file.seek(begin)
        version = np.lib.format.read_magic(file)
        shape, fortran, dtype = _header_of(file, version)
        at = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if at + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != begin + info.file_size:
        raise ValueError("its size is not that of its array")
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.asarray(np.memmap(path, dtype, "r", at, shape, order="F" if fortran else "C"))


def _header_of(file: IO[bytes], version: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
