"""Packing the rows of an Arrow table into bins: a plain function of one block, for any engine that gives Arrow tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from .. import _offsets
from .._array import Array
from .._backends._protocol import HostArray
from ..bridges import from_arrow, to_arrow, to_numpy
from ..bridges._handover import library
from ._planning import one_of, plan_bins

Tokenize = Callable[[list[str]], Any]

LENGTHS = "lengths"
COUNTS = ("rows", "tokens", "bins", "split", "dropped", "nulls")
KEY = b"scree.pack"
_INT32 = np.iinfo(np.int32)


def pack_table(
    table: Any,
    column: str,
    capacity: int,
    *,
    tokenize: Tokenize | None = None,
    algo: Literal["bfd", "ffd", "wrapped", "split"] = "bfd",
    seed: int | None = None,
    too_long: Literal["error", "split", "drop"] | None = None,
    nulls: Literal["error", "drop"] = "error",
) -> Any:
    """Pack the sequences of one block into bins of `capacity` tokens.

    Depends on its arguments alone, so that it can be given to whatever maps over Arrow tables: Ray Data's and datasets'
    `map_batches` and `map`, Daft, Dask, a loop over record batches.

    Parameters
    ----------
    table : pyarrow.Table or RecordBatch
        The block.
    column : str
        Its lists of token numbers; or, with `tokenize`, its texts.
    capacity : int
        The tokens that a bin holds.
    tokenize : function from a list of str to a list of lists or arrays of int, or an Array, optional
        Called once, with all texts of the block.
    algo, seed, too_long
        As in `plan_bins`.
    nulls : "error" or "drop"
        What a null row is.

    Returns
    -------
    pyarrow.Table
        One row a bin: its tokens in ``column`` (``"input_ids"`` where texts were tokenised), and in ``"lengths"`` those of
        its sequences, from which `unpack_table` makes an Array. The schema's metadata under ``scree.pack`` counts rows,
        tokens, bins, and what was split, dropped or null, as JSON.

    Raises
    ------
    TypeError, ValueError
        There is no such column, it is of another type, a row is null or too long, a text is not UTF-8, or `tokenize`
        gave something else than one sequence of integers a text.
    ImportError
        pyarrow is missing.

    Examples
    --------
    >>> import pyarrow, scree
    >>> table = pyarrow.table({"ids": [[1, 2, 3], [4, 5], [6]]})
    >>> packed = scree.data.pack_table(table, "ids", capacity=4)
    >>> packed.to_pydict()
    {'ids': [[1, 2, 3, 6], [4, 5]], 'lengths': [[3, 1], [2]]}
    >>> [row.tolist() for row in scree.data.unpack_table(packed, "ids")]
    [[1, 2, 3], [6], [4, 5]]
    """
    pa = library("pack_table", "pyarrow", "arrow")
    one_of("nulls", nulls, ("error", "drop"))
    rows = _column("pack_table", pa, table, column)
    n_rows, n_nulls = len(rows), rows.null_count
    if n_nulls:
        if nulls == "error":
            null = int(rows.is_null().to_numpy().argmax())
            raise ValueError(f"pack_table: row {null} of {column!r} is null; needs a value, or nulls='drop'")
        rows = rows.drop_null()
    if pa.types.is_null(rows.type):  # a block without one value has no other type
        rows = rows.cast(pa.list_(pa.int32()) if tokenize is None else pa.string())
    if tokenize is None:
        if column == LENGTHS:
            raise ValueError(f"pack_table: got column {column!r}, the name of what it adds; needs another name")
        arr, output = _token_lists(rows, column), column
    else:
        arr, output = _tokenised(pa, rows, column, tokenize), "input_ids"
    plan = plan_bins(arr, capacity, algo, seed, too_long=too_long)
    packed = plan.gather(arr)
    bins = Array(packed.values, _offsets.from_lengths(plan.fills))
    lengths = Array(plan.lengths.astype(np.int32), plan.bins.offsets)
    counts = (n_rows, plan.n_tokens, plan.n_bins, plan.n_split, len(plan.dropped), n_nulls)
    told = json.dumps(dict(zip(COUNTS, counts, strict=True)))
    return pa.table({output: to_arrow(bins), LENGTHS: to_arrow(lengths)}).replace_schema_metadata({KEY: told})


def unpack_table(table: Any, column: str = "input_ids") -> Array:
    """Make an Array of the sequences in packed bins, one row a sequence, bin after bin.

    Parameters
    ----------
    table : pyarrow.Table or RecordBatch
        As `pack_table` makes it, or rows of it.
    column : str
        The column of tokens.

    Returns
    -------
    Array
        Of NumPy. The values are viewed where they are one chunk; the offsets are what FlashAttention calls `cu_seqlens`.

    Raises
    ------
    ValueError
        There are no such columns, or the lengths do not add up to the tokens of each bin.
    """
    pa = library("unpack_table", "pyarrow", "arrow")
    bins = from_arrow(_column("unpack_table", pa, table, column))
    lengths = from_arrow(_column("unpack_table", pa, table, LENGTHS))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.values, dtype=np.int64)])
    wrong = np.diff(ends[lengths.offsets]) != np.diff(bins.offsets)
    if wrong.any():
        b = int(wrong.argmax())
        raise ValueError(
            f"unpack_table: the lengths of bin {b} do not add up to its {np.diff(bins.offsets)[b]} tokens; needs what "
            "pack_table made"
        )
    return Array(bins.values, _offsets.from_lengths(lengths.values))


def _column(op: str, pa: Any, table: Any, column: str) -> Any:
    if not isinstance(table, (pa.Table, pa.RecordBatch)):
        raise TypeError(f"{op}: table is {type(table).__name__}; needs a pyarrow Table or RecordBatch")
    if column not in table.schema.names:
        known = ", ".join(map(repr, table.schema.names)) or "none"
        raise ValueError(f"{op}: got column {column!r}; the table has {known}")
    if table.schema.names.count(column) > 1:
        raise ValueError(f"{op}: the table has several columns {column!r}; needs one")
    found = table.column(column)
    return pa.chunked_array([found]) if isinstance(found, pa.Array) else found


def _token_lists(rows: Any, column: str) -> Array:
    try:
        arr = from_arrow(rows)
    except (TypeError, ValueError) as wrong:
        text = str(wrong).removeprefix("from_arrow: ")
        hint = "; texts need tokenize=" if "string" in text else ""
        raise type(wrong)(f"pack_table: column {column!r}: {text}{hint}") from wrong
    if arr.values.ndim != 1 or arr.dtype.kind not in "iu":
        raise TypeError(
            f"pack_table: column {column!r} holds {arr.dtype.name} {arr.feature_shape}; needs lists of integers"
        )
    return arr


def _tokenised(pa: Any, rows: Any, column: str, tokenize: Tokenize) -> Array:
    kind = rows.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise TypeError(f"pack_table: column {column!r} is of type {kind}; tokenize needs texts")
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid as wrong:
        raise ValueError(f"pack_table: column {column!r} holds a text that is not UTF-8 ({wrong})") from wrong
    texts: list[str] = rows.to_pylist()
    if not texts:
        return Array(np.zeros(0, np.int32), [0])
    made = tokenize(texts)
    arr = to_numpy(made) if isinstance(made, Array) else _joined(made)
    if arr.batch_size != len(texts):
        raise ValueError(f"pack_table: tokenize gave {arr.batch_size} sequences for {len(texts)} texts; needs one each")
    return arr


def _joined(made: Any) -> Array:
    if isinstance(made, (str, bytes, dict)) or (not isinstance(made, Sequence) and not hasattr(made, "__iter__")):
        raise TypeError(f"pack_table: tokenize gave {type(made).__name__}; needs a list of lists of integers")
    rows: list[HostArray] = []
    for i, row in enumerate(made):
        array = np.asarray(row if len(row) else np.zeros(0, np.int32))
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(
                f"pack_table: tokenize gave {array.dtype.name} {array.shape} for text {i}; needs a list of integers"
            )
        rows.append(array)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    values = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    if values.size and not (_INT32.min <= values.min() and values.max() <= _INT32.max):
        raise ValueError(
            f"pack_table: tokenize gave tokens from {values.min()} to {values.max()}; needs what int32 holds"
        )
    return Array(values.astype(np.int32, copy=False), _offsets.from_lengths(lengths))
