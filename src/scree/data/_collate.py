"""From samples to batches whose fields are Arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np

from .. import _check, bridges
from .._array import Array
from .._backends import FRAMEWORKS, find_backend
from .._backends._protocol import HostArray
from .._packing import pack, with_capacity
from ._planning import at_least_one, one_of

_WIDE = {"int64": "int32", "float64": "float32"}


def collate(
    samples: Sequence[Any],
    framework: str = "torch",
    *,
    dense: Sequence[str] = (),
    capacity: tuple[int, int | Mapping[str, int]] | None = None,
) -> Any:
    """Join samples to a batch without padding: a `collate_fn` for PyTorch's DataLoader, and for programs in JAX.

    Parameters
    ----------
    samples : list
        All of one structure: nested dictionaries and tuples of fields. What becomes of a field:

        - an array of one axis or more, or a list of numbers: a row of an Array, its first axis the ragged one
          (of the framework, of NumPy, or of any other); Python's numbers count as int64 and float32, in JAX and MLX as
          int32 and float32, in NumPy and CuPy as int64 and float64;
        - a number, or an array without axes: a value of a dense array (B,);
        - a text: an entry of a list.
    framework : str
        ``"torch"``, ``"jax"``, ``"numpy"``, ``"mlx"`` or ``"cupy"``: what the batch is made of.
    dense : list of str
        The fields, as ``"name"`` or ``"outer.inner"``, whose arrays have one shape: stacked to (B, ...).
    capacity : (rows, tokens), optional
        Fixed shapes for compilers: Arrays go through `scree.with_capacity`, dense fields get zeros up to `rows`. Tokens
        may be a dictionary, a number a field. A compiled function that takes the batch is compiled once.

    Returns
    -------
    dict, tuple, Array, array or list
        The structure of a sample. Fields whose lengths agree share one offsets array. In a worker process of the
        DataLoader the values are put into shared memory as they are joined, so that sending them copies nothing; an
        Array has `pin_memory`, which ``pin_memory=True`` calls.

    Raises
    ------
    TypeError, ValueError
        A field is missing in a sample, null, of another kind, dtype or feature shape than in the first, or the batch is
        above the capacity. The message names the field and the sample.

    Examples
    --------
    >>> import numpy as np, scree
    >>> batch = scree.data.collate([{"ids": [5, 6, 7], "label": 1}, {"ids": [8], "label": 0}], "numpy")
    >>> batch["ids"], batch["label"]
    (scree.Array(batch_size=2, total_length=4, feature_shape=(), dtype=int64), array([1, 0]))
    """
    one_of("framework", framework, tuple(FRAMEWORKS))
    if isinstance(dense, str):
        raise TypeError(f"dense: got {dense!r}; needs a list of names")
    if isinstance(samples, (str, bytes)) or not hasattr(samples, "__len__"):
        raise TypeError(f"collate: got {type(samples).__name__}; needs a list of samples")
    if len(samples) == 0:
        raise ValueError("collate: got no samples; needs at least one, to know the fields and the dtypes")
    if capacity is not None:
        if not isinstance(capacity, tuple) or len(capacity) != 2:
            raise TypeError(f"capacity: got {capacity!r}; needs a pair, (rows, tokens)")
        at_least_one("capacity[0]", capacity[0])
    batch = _Batch(framework, frozenset(dense), capacity)
    made = batch.field(list(samples), "")
    unknown = sorted(batch.dense - batch.seen)
    if unknown:
        raise ValueError(
            f"dense: got {unknown[0]!r}, which the samples do not have; they have {', '.join(batch.names)}"
        )
    return made


class _Batch:
    """One batch in the making."""

    def __init__(self, framework: str, dense: frozenset[str], capacity: Any) -> None:
        self.framework = framework
        self.dense = dense
        self.capacity = capacity
        self.seen: set[str] = set()
        self.names: list[str] = []
        self.structures: list[tuple[HostArray, Array]] = []  # lengths, and the first Array that has them

    def field(self, values: list[Any], path: str) -> Any:
        """Join one field of all samples: itself a structure, or a leaf."""
        first = values[0]
        if isinstance(first, Mapping):
            return self._mapping(values, path)
        if isinstance(first, tuple):
            self._same_kind(values, path, tuple, f"a tuple of {len(first)}", lambda value: len(value) == len(first))
            parts = [self.field([v[i] for v in values], f"{path}.{i}".lstrip(".")) for i in range(len(first))]
            return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
        self.seen.add(path)
        self.names.append(repr(path))
        if isinstance(first, (str, bytes)):
            self._same_kind(values, path, type(first), "a text")
            return values
        return self._leaf(values, path)

    def _mapping(self, values: list[Any], path: str) -> dict[str, Any]:
        keys = list(values[0])
        for i, value in enumerate(values):
            if not isinstance(value, Mapping):
                raise TypeError(f"collate: sample {i}{_at(path)} is {type(value).__name__}, sample 0 has a dictionary")
            if value.keys() != values[0].keys():
                odd = next((key for key in keys if key not in value), None)
                if odd is not None:
                    raise ValueError(f"collate: sample {i} lacks the field '{_joined(path, odd)}', which sample 0 has")
                odd = next(key for key in value if key not in keys)
                raise ValueError(f"collate: sample {i} has the field '{_joined(path, odd)}', which sample 0 lacks")
        return {key: self.field([value[key] for value in values], _joined(path, key)) for key in keys}

    def _same_kind(
        self, values: list[Any], path: str, kind: type, wanted: str, fits: Callable[[Any], bool] | None = None
    ) -> None:
        for i, value in enumerate(values):
            if not isinstance(value, kind) or (fits is not None and not fits(value)):
                got = "null" if value is None else type(value).__name__
                raise TypeError(f"collate: sample {i}{_at(path)} is {got}, sample 0 has {wanted}")

    def _leaf(self, values: list[Any], path: str) -> Any:
        for i, value in enumerate(values):
            if value is None:
                raise ValueError(f"collate: sample {i}{_at(path)} is null; needs an array, a list or a number")
        first = values[0]
        if _is_number(first) or getattr(first, "ndim", 1) == 0:
            return self._scalars(values, path)
        if find_backend(first) is None and not isinstance(first, list):
            raise TypeError(
                f"collate: sample 0{_at(path)} is {type(first).__name__}; needs an array, a list or a number"
            )
        rows = _rows_of_lists(values, path, self.framework) if isinstance(first, list) else values
        return self._stacked(rows, path) if path in self.dense else self._ragged(rows, path)

    def _scalars(self, values: list[Any], path: str) -> Any:
        kinds = [_number_kind(value) for value in values]
        if kinds.count(kinds[0]) != len(kinds):
            i = next(i for i, kind in enumerate(kinds) if kind != kinds[0])
            raise TypeError(f"collate: sample {i}{_at(path)} is {kinds[i]}, sample 0 has {kinds[0]}")
        first = values[0]
        if _is_number(first):
            array = np.asarray(values)
            array = array if isinstance(first, np.generic) else _narrowed(array, self.framework)
        else:
            array = self._packed([value[None] for value in values], path).values
        return self._up_to_capacity(self._native(Array(array, [0, len(values)])).values)

    def _stacked(self, rows: list[Any], path: str) -> Any:
        shapes = [tuple(getattr(row, "shape", ())) for row in rows]
        if shapes.count(shapes[0]) != len(shapes):
            i = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
            raise ValueError(
                f"collate: sample {i}{_at(path)} has shape {shapes[i]}, sample 0 has {shapes[0]}; a dense field needs one"
            )
        return self._up_to_capacity(self._native(self._packed([row[None] for row in rows], path)).values)

    def _ragged(self, rows: list[Any], path: str) -> Array:
        arr = self._native(self._packed(rows, path))
        lengths = np.diff(arr._host_offsets("collate"))
        if self.capacity is not None:
            rows_wanted, tokens = self.capacity
            if isinstance(tokens, Mapping):
                if path not in tokens:
                    raise ValueError(f"capacity: it has no number of tokens for the field {path!r}")
                tokens = tokens[path]
            try:
                arr = with_capacity(arr, rows_wanted, tokens)
            except ValueError as wrong:
                raise ValueError(
                    f"collate: {f'the field {path!r}' if path else 'the batch'} is above the capacity: {wrong}"
                ) from wrong
        for known_lengths, known in self.structures:
            if known.total_length == arr.total_length and np.array_equal(known_lengths, lengths):
                return known.with_values(arr.values)
        self.structures.append((lengths, arr))
        return arr

    def _packed(self, rows: list[Any], path: str) -> Array:
        try:
            shared = _in_shared_memory(rows) if self.framework == "torch" else None
            return pack(rows) if shared is None else shared
        except (TypeError, ValueError) as wrong:
            text = str(wrong).replace("pack: arrays", "sample").replace("arrays", "sample")
            raise type(wrong)(f"collate: {f'the field {path!r}: ' if path else ''}{text}") from wrong

    def _native(self, arr: Array) -> Array:
        """The same Array of the framework that was asked for."""
        return arr if self.framework == arr._xp.NAME else getattr(bridges, f"to_{self.framework}")(arr)

    def _up_to_capacity(self, values: Any) -> Any:
        if self.capacity is None:
            return values
        rows, n = self.capacity[0], values.shape[0]
        if n > rows:
            raise ValueError(f"collate: capacity[0] is {rows}, but there are {n} samples")
        return with_capacity(Array(values, [0, n]), 1, rows).values


def _at(path: str) -> str:
    return f", field {path!r}," if path else ""


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, complex, np.generic))


def _number_kind(value: Any) -> str:
    if _is_number(value):
        return type(value).__name__
    xp = find_backend(value)
    return type(value).__name__ if xp is None or value.ndim else f"a scalar of {xp.dtype_name(value)}"


def _rows_of_lists(values: list[Any], path: str, framework: str) -> list[HostArray]:
    """Lists of numbers as arrays of one dtype: views of one array that is made of all of them at once."""
    for i, value in enumerate(values):
        if not isinstance(value, list):
            raise TypeError(f"collate: sample {i}{_at(path)} is {type(value).__name__}, sample 0 has a list")
    lists = cast("list[list[Any]]", values)
    if any(isinstance(row[0], (list, tuple)) for row in lists if row):
        arrays = [_array_of(row, i, path) for i, row in enumerate(lists)]
        dtypes = [a.dtype for a in arrays if a.size]
        dtype = np.result_type(*dtypes)
        return [_narrowed(a.astype(dtype, copy=False), framework) for a in arrays]
    flat = _array_of(list(chain.from_iterable(lists)), None, path)
    if flat.dtype.kind not in "biuf" or flat.ndim != 1:
        for i, row in enumerate(lists):
            _array_of(row, i, path)
    cuts = np.cumsum([len(row) for row in lists])[:-1]
    return np.split(_narrowed(flat, framework), cuts)


def _array_of(row: list[Any], i: int | None, path: str) -> HostArray:
    try:
        made = np.asarray(row if row else np.zeros(0, np.int64))
    except ValueError:
        made = np.zeros(0, object)
    if made.dtype.kind not in "biuf" and i is not None:
        odd = next((x for x in row if not _is_number(x)), row)
        got = "null" if odd is None else type(odd).__name__
        raise TypeError(f"collate: sample {i}{_at(path)} has {got} among its numbers; needs numbers only")
    return made


def _narrowed(values: HostArray, framework: str) -> HostArray:
    """What a list of Python's numbers becomes in a framework: its own idea of an int and of a float."""
    if framework == "torch" and values.dtype == np.float64:
        return values.astype(np.float32)
    narrow = _WIDE.get(values.dtype.name) if framework in ("jax", "mlx") else None
    if narrow is None or (narrow == "int32" and values.size and abs(values).max() >= 2**31):
        return values
    return values.astype(narrow)


def _in_shared_memory(rows: list[Any]) -> Array | None:
    """Join rows in memory that other processes see, within a worker of PyTorch's DataLoader; elsewhere None."""
    loading: Any = sys.modules.get("torch.utils.data")
    if loading is None or loading.get_worker_info() is None:
        return None
    torch: Any = sys.modules["torch"]
    first = rows[0]
    xp = _check.dense(first, "sample[0]")
    if xp.NAME not in ("numpy", "torch") or (xp.NAME == "torch" and first.device.type != "cpu") or not first.ndim:
        return None
    if any(
        type(row) is not type(first) or row.dtype != first.dtype or row.shape[1:] != first.shape[1:] for row in rows
    ):
        return None  # pack says which
    if xp.NAME == "torch" and any(row.requires_grad for row in rows):
        return None
    like = torch.as_tensor(first[:0] if xp.NAME == "torch" else np.zeros(0, first.dtype))
    total = sum(len(row) for row in rows)
    storage = torch.UntypedStorage._new_shared(max(total * int(np.prod(first.shape[1:])) * like.element_size(), 1))
    room = torch.empty(0, dtype=like.dtype).set_(storage, 0, (total, *first.shape[1:]))
    if xp.NAME == "torch":
        torch.cat(rows, out=room)
    else:
        np.concatenate(rows, out=room.numpy())
    return Array(room, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).tolist())
