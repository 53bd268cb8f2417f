"""A saved corpus as a dataset, opened anew in each process that reads it."""

from __future__ import annotations

import mmap
import os
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
    Pickling keeps the path alone, so that worker processes map the same file instead of being sent it. Rows are views
    of the mapping, and read-only. Of `.safetensors` and `.npz` the pages of a row, and no more, are asked for at once.

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
        self._rows = {name: _indexable(field) for name, field in self.fields.items()}

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


def _indexable(field: Any) -> Any:
    """A function from a row number, in range, to the row: for an Array without what its own indexing checks."""
    if not isinstance(field, Array) or field.ragged_dim != 0:
        return field.__getitem__
    values, offsets = field.values, field.offsets
    ask_for = _asker(values)

    def row_of(row: int) -> Any:
        found = values[offsets[row] : offsets[row + 1]]
        ask_for(found)
        return found

    return row_of


def _asker(values: HostArray) -> Callable[[HostArray], None]:
    """A function that asks the system for the pages of a row at once, of values that are mapped.

    What is near a row is read ahead otherwise, which for rows in random order is read in vain.
    """
    mapping: Any = values
    while getattr(mapping, "base", None) is not None:
        mapping = mapping.base
    if not isinstance(mapping, mmap.mmap) or not hasattr(mmap, "MADV_RANDOM"):
        return lambda _: None
    begin = np.frombuffer(mapping, np.uint8).ctypes.data
    mapping.madvise(mmap.MADV_RANDOM)

    def ask(row: HostArray) -> None:
        if row.nbytes:
            start = row.ctypes.data - begin
            page = start - start % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, page, start + row.nbytes - page)

    return ask
