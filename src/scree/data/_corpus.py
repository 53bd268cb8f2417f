"""A saved corpus as a dataset, opened anew in each process that reads it."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .._array import Array
from .._backends._protocol import HostArray, HostInts
from ._saving import load


class Corpus:
    """Map a file that `save` wrote, as a dataset for PyTorch's DataLoader or any program that asks for rows.

    Parameters
    ----------
    path : path
        Ends in ``.safetensors``, ``.npz`` or ``.arrow``. It is mapped, not read: opening takes no memory, and indexing
        reads the rows that are asked for.
    fields : list of str, optional
        Only these; all unless said.

    Notes
    -----
    Pickling keeps the path alone, so that worker processes open the same file instead of being sent it. Rows of an Array
    in `.safetensors` and `.npz` are read one by one, each with one call of the system for what it holds and no more, into
    arrays of their own. Rows of `.arrow`, and all rows on Windows, are views of the mapping, and read-only; so is what
    `fields` has.

    Examples
    --------
    >>> import numpy as np, scree, tempfile, pathlib
    >>> arr = scree.from_lengths(np.arange(6), [3, 1, 2])
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(folder.name, "corpus.npz")
    >>> scree.data.save(path, {"ids": arr, "label": np.array([0, 1, 0])})
    >>> corpus = scree.data.Corpus(path)
    >>> len(corpus), corpus.lengths("ids"), corpus[2]["ids"]
    (3, array([3, 1, 2], dtype=int32), array([4, 5]))
    >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str], fields: Iterable[str] | None = None) -> None:
        self._path = Path(path).absolute()
        self._wanted = fields if fields is None or isinstance(fields, str) else list(fields)
        if self._path.suffix.lower() == ".parquet":
            raise ValueError(
                f"Corpus: '{path}' is Parquet, which is decoded and cannot be mapped; needs one of .safetensors, .npz "
                "and .arrow: load reads it, and save writes it"
            )
        before = self._path.stat() if self._path.is_file() else None
        found = load(path, mmap=True, fields=self._wanted)
        self._single = isinstance(found, Array)
        self.fields: dict[str, Any] = {"": found} if self._single else found
        rows = {name: len(field) for name, field in self.fields.items()}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{name!r} {n}" for name, n in rows.items())
            raise ValueError(
                f"Corpus: the fields of '{path}' have different numbers of rows ({told}); fields=[...] chooses"
            )
        self._n_rows = next(iter(rows.values()), 0)
        self._rows = {name: field.__getitem__ for name, field in self.fields.items()}
        if hasattr(os, "preadv"):
            file = os.open(self._path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            if before is None or not _same_file(before, os.fstat(file)):
                raise ValueError(f"Corpus: '{path}' was replaced while it was opened; open it again")
            readers = {name: _reader(self._path, file, field) for name, field in self.fields.items()}
            self._rows |= {name: read for name, read in readers.items() if read is not None}

    def lengths(self, field: str | None = None) -> HostInts:
        """(B,), integer: the lengths of the rows of an Array in the corpus; its name may be left out where it is alone."""
        arrays = [name for name, value in self.fields.items() if isinstance(value, Array)]
        if field is None and len(arrays) == 1:
            field = arrays[0]
        if field not in arrays:
            raise ValueError(f"field: got {field!r}; needs one of {', '.join(map(repr, arrays))}")
        return np.diff(self.fields[field].offsets)

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, row: int) -> Any:
        """Row number `row`: a dictionary of its fields, or the row of an Array that was saved by itself."""
        if not -self._n_rows <= row < self._n_rows:
            raise IndexError(f"row {row} of a corpus of {self._n_rows}")
        row = int(row) % self._n_rows
        if self._single:
            return self._rows[""](row)
        return {name: get(row) for name, get in self._rows.items()}

    def __getitems__(self, rows: list[int]) -> list[Any]:
        """Several rows, as PyTorch's DataLoader asks for a batch."""
        return [self[row] for row in rows]

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(self._n_rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self._path, self._wanted)

    def __repr__(self) -> str:
        names = "" if self._single else f", fields={list(self.fields)}"
        return f"Corpus('{self._path.name}', {self._n_rows} rows{names})"


def _same_file(a: os.stat_result, b: os.stat_result) -> bool:
    return (a.st_dev, a.st_ino, a.st_size, a.st_mtime_ns) == (b.st_dev, b.st_ino, b.st_size, b.st_mtime_ns)


def _reader(path: Path, file: int, field: Any) -> Callable[[int], HostArray] | None:
    """A function that reads a row of an Array from the open file; None where it is no plain piece of the file.

    A mapping would wait for its pages one by one, or read ahead what random rows do not need.
    """
    if not isinstance(field, Array) or field.ragged_dim != 0 or not field.values.flags.c_contiguous:
        return None
    values, offsets = field.values, field.offsets.copy()  # a mapping that is cut short ends the program
    mapped: Any = values
    while mapped is not None and not isinstance(mapped, np.memmap):
        mapped = getattr(mapped, "base", None)
    if mapped is None:
        return None
    begin = mapped.offset + values.ctypes.data - mapped.ctypes.data
    dtype, features = values.dtype, values.shape[1:]
    wide = dtype.itemsize * math.prod(features)

    def read(row: int) -> HostArray:
        first, end = offsets[row : row + 2].tolist()
        found = np.empty((end - first) * wide, np.uint8)
        at, left = 0, found.data
        while at < len(found):
            got = os.preadv(file, [left[at:]], begin + first * wide + at)
            if got == 0:
                raise ValueError(f"Corpus: '{path}' was truncated after it was opened: row {row} is not in it any more")
            at += got
        return found.view(dtype).reshape(end - first, *features)

    return read
