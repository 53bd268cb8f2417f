"""Saving and loading Arrays: written in one piece or not at all, and checked when read."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import _offsets
from .._array import Array
from .._backends._protocol import HostArray
from . import _columns, _npz, _safetensors
from ._fields import SINGLE, Entries, Layout, Lazy, as_bytes, crc32, from_entries, to_entries

_Writer = Callable[[IO[bytes], Entries, Layout], None]
_Reader = Callable[[Path, bool], tuple[Lazy, Layout | None]]

_FORMATS: dict[str, tuple[_Writer, _Reader]] = {
    ".safetensors": (_safetensors.write, _safetensors.read),
    ".npz": (_npz.write, _npz.read),
    ".arrow": (_columns.write_arrow, _columns.read_arrow),
    ".parquet": (_columns.write_parquet, _columns.read_parquet),
}


def save(path: str | os.PathLike[str], data: Any) -> None:
    """Write an Array, or a dictionary of Arrays and dense arrays, to one file.

    The file appears when it is complete: it is written beside its place, brought to the disk, and then put there. Until
    then what was there before stays as it is, also where the disk is full or the process dies.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors``, ``.npz``, ``.arrow`` (``pip install "scree[arrow]"``) or ``.parquet`` (the same).
    data : Array, dictionary, or iterator of such
        Of any framework. A dictionary has texts as keys, and Arrays and dense arrays as values. An iterator gives
        batches, which become one Array: a corpus larger than memory is collected in temporary files beside `path`.
        Spare values (`scree.with_capacity`) are left out.

    Raises
    ------
    TypeError, ValueError
        `data` is not as described, or the format cannot hold it (Arrow and Parquet: another `ragged_dim` than 0, fields
        with different numbers of rows, bfloat16).
    OSError
        The file cannot be written; it names the file, and what was there before is intact.
    ImportError
        Arrow's formats need pyarrow.

    Notes
    -----
    A CRC-32 of every array is stored, and so is the `ragged_dim`. `.safetensors` and `.npz` are readable by the
    safetensors package and by `np.load`; Arrow and Parquet have a list column for each Array.

    Examples
    --------
    >>> import numpy as np, scree, tempfile, pathlib
    >>> arr = scree.from_lengths(np.arange(6), [3, 1, 2])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scree.data.save(pathlib.Path(folder, "corpus.safetensors"), {"tokens": arr, "label": np.array([0, 1, 0])})
    ...     scree.data.load(pathlib.Path(folder, "corpus.safetensors"))
    {'tokens': scree.Array(batch_size=3, total_length=6, feature_shape=(), dtype=int64), 'label': array([0, 1, 0])}
    """
    target, (write, _) = _format("save", path)
    if isinstance(data, Iterator):
        with _spooled(target, data) as whole:
            _write(target, write, *to_entries("save", whole))
    else:
        _write(target, write, *to_entries("save", data))


def load(
    path: str | os.PathLike[str],
    *,
    mmap: bool = False,
    verify: bool | None = None,
    fields: Iterable[str] | None = None,
) -> Any:
    """Read what `save` wrote, or another file of these formats.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors``, ``.npz``, ``.arrow`` or ``.parquet``.
    mmap : bool
        Map the values instead of reading them (read-only): a corpus larger than memory opens at once, and what is
        indexed is read, with what is near it (`Corpus` is for rows in random order). Not for Parquet, which has to be
        decoded.
    verify : bool, optional
        Whether to compare the checksums of the values. Unless said, what is read is compared, and what is mapped is not:
        there the structure, the size and the offsets are.
    fields : list of str, optional
        Only these; all unless said.

    Returns
    -------
    Array or dict
        Of NumPy, what was saved. Files that scree did not write give a dictionary: list columns, and pairs of
        ``x.values`` and ``x.offsets``, are Arrays.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is truncated or altered, or has no such field. The message names the file and the part.
    ImportError
        Arrow's formats need pyarrow, bfloat16 needs ml_dtypes.
    """
    source, (_, read) = _format("load", path)
    if not source.is_file():
        raise FileNotFoundError(f"load: '{source}' is {'a folder' if source.is_dir() else 'not there'}; needs a file")
    verify_values = not mmap if verify is None else bool(verify)

    def check(entry: str, array: HostArray, sums: Mapping[str, str]) -> None:
        small = entry == "offsets" or entry.endswith(".offsets")
        if (verify_values or small) and entry in sums and crc32(array) != sums[entry]:
            raise ValueError(
                f"load: '{source}' was altered: {entry!r} does not have the checksum that it was saved with"
            )

    entries, layout = read(source, bool(mmap))
    return from_entries(source, entries, layout, fields, check)


def _format(op: str, path: Any) -> tuple[Path, tuple[_Writer, _Reader]]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{op}: path is {type(path).__name__}; needs a path")
    found = Path(path)
    if found.suffix.lower() not in _FORMATS:
        raise ValueError(f"{op}: path is '{found}'; needs a name that ends in {', '.join(_FORMATS)}")
    return found, _FORMATS[found.suffix.lower()]


def _write(target: Path, write: _Writer, entries: Entries, layout: Layout) -> None:
    with replacing("save", target) as file:
        write(file, entries, layout)


@contextmanager
def replacing(op: str, target: Path) -> Generator[IO[bytes], None, None]:
    """Give a file to write to, which takes the place of `target` when all went well and vanishes otherwise."""
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{op}: '{target}' cannot be written: the folder '{target.parent}' is not there")
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
        _sync_folder(target.absolute().parent)
    except OSError as failed:
        raise _unwritten(op, target, failed) from failed
    finally:
        beside.unlink(missing_ok=True)


def _unwritten(op: str, target: Path, failed: OSError) -> OSError:
    state = "the file that was there is unchanged" if target.exists() else "nothing was written"
    return OSError(failed.errno, f"{op}: '{target}' could not be written ({failed.strerror or failed}); {state}")


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk too, where folders can be opened (not on Windows)."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class _Spool:
    """The batches of one field, on the disk."""

    def __init__(self, name: str, folder: Path, number: int, first: Any) -> None:
        self.name = name
        self.path = folder / str(number)
        self.file = self.path.open("wb")
        self.ragged = isinstance(first, Array)
        self.lengths: list[HostArray] = []
        self.kind: Any = None
        self.count = 0

    def append(self, batch: int, value: Any) -> None:
        if isinstance(value, Array) != self.ragged:
            raise TypeError(f"save: batch {batch}: field {self.name!r} is an Array in some batches and dense in others")
        if self.ragged and value.ragged_dim != 0:
            raise ValueError(
                f"save: batch {batch}: field {self.name!r} has ragged_dim {value.ragged_dim}; batches need 0"
            )
        entries, _ = to_entries("save", {"x": value})
        values = entries["x.values" if self.ragged else "x"]
        kind = values.dtype, values.shape[1:]
        if self.kind is None:
            self.kind = kind
        elif kind != self.kind:
            raise ValueError(
                f"save: batch {batch}: field {self.name!r} has dtype {kind[0]} and feature shape {kind[1]}; needs "
                f"{self.kind[0]} and {self.kind[1]}, as batch 0 has"
            )
        if self.ragged:
            self.lengths.append(np.diff(entries["x.offsets"]))
        self.count += len(values)
        if values.size:
            self.file.write(as_bytes(values))

    def mapped(self) -> Any:
        self.file.close()
        dtype, features = self.kind
        shape = (self.count, *features)
        values = np.zeros(shape, dtype) if 0 in shape else np.asarray(np.memmap(self.path, dtype, "r", shape=shape))
        return Array(values, _offsets.from_lengths(np.concatenate(self.lengths))) if self.ragged else values


@contextmanager
def _spooled(target: Path, batches: Iterator[Any]) -> Generator[Any, None, None]:
    """Collect batches in files beside the target; give them joined and mapped."""
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"save: '{target}' cannot be written: the folder '{target.parent}' is not there")
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.absolute().parent))
    spools: dict[str, _Spool] = {}
    try:
        for i, batch in enumerate(batches):
            fields: dict[str, Any] = {SINGLE: batch} if isinstance(batch, Array) else batch
            if not isinstance(fields, Mapping) or not fields:
                raise TypeError(f"save: batch {i} is {type(batch).__name__}; needs an Array or a dictionary of fields")
            if not spools:
                spools = {name: _Spool(name, folder, n, fields[name]) for n, name in enumerate(fields)}
            if fields.keys() != spools.keys():
                raise ValueError(f"save: batch {i} has the fields {list(fields)}; needs {list(spools)}, as batch 0 has")
            _append(target, spools, i, fields)
        if not spools:
            raise ValueError("save: got no batches; needs at least one, to know the fields and the dtypes")
        whole = {name: spool.mapped() for name, spool in spools.items()}
        yield whole.get(SINGLE, whole)
    finally:
        for spool in spools.values():
            spool.file.close()
        shutil.rmtree(folder, ignore_errors=True)


def _append(target: Path, spools: dict[str, _Spool], i: int, fields: Mapping[str, Any]) -> None:
    try:
        for name, value in fields.items():
            spools[name].append(i, value)
    except OSError as failed:
        raise _unwritten("save", target, failed) from failed
