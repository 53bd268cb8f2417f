"""Hugging Face datasets and Polars: columns of lists to Arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .._array import Array
from ..bridges import from_arrow, to_arrow
from ..bridges._handover import library


def from_datasets(dataset: Any, column: str, nulls: Literal["error", "empty"] = "error") -> Array:
    """Make an Array of a column of a Hugging Face dataset.

    The values are viewed where the column is one chunk, as it is in memory and in a file of one batch; several are
    joined. What `select`, `shuffle` and `filter` chose is what comes.

    Parameters
    ----------
    dataset : datasets.Dataset
        Not an iterable one.
    column : str
        Lists of numbers.
    nulls : "error" or "empty"
        What a null row is.

    Returns
    -------
    Array of (T, *features), NumPy

    Raises
    ------
    ImportError
        datasets or pyarrow is missing.
    TypeError, ValueError
        `dataset` is none, has no such column, or the column is not one of lists of numbers.
    """
    datasets = library("from_datasets", "datasets", "datasets")
    if not isinstance(dataset, datasets.Dataset):
        hint = "; name one split" if isinstance(dataset, datasets.DatasetDict) else ""
        raise TypeError(f"from_datasets: got {type(dataset).__name__}; needs a datasets.Dataset{hint}")
    _expect_column("from_datasets", column, dataset.column_names)
    return from_arrow(dataset.select_columns([column]).with_format("arrow")[:].column(column), nulls)


def to_datasets(fields: Mapping[str, Array | Any]) -> Any:
    """Make a Hugging Face dataset, in memory, of Arrays and one-dimensional arrays of NumPy, one a column.

    Copies what `scree.bridges.to_arrow` copies.

    Raises
    ------
    ImportError
        datasets is missing.
    TypeError, ValueError
        `fields` are no such columns, or have different numbers of rows.
    """
    datasets = library("to_datasets", "datasets", "datasets")
    return datasets.Dataset(_table("to_datasets", fields))


def from_polars(data: Any, column: str | None = None, nulls: Literal["error", "empty"] = "error") -> Array:
    """Make an Array of a Polars column of lists. The values are viewed where the column is one chunk.

    Parameters
    ----------
    data : polars.Series or polars.DataFrame
        A lazy frame is collected first, by you.
    column : str, optional
        Which of the DataFrame.
    nulls : "error" or "empty"
        What a null row is.

    Returns
    -------
    Array of (T, *features), NumPy
        Offsets int64, as Polars has them.

    Raises
    ------
    ImportError
        polars or pyarrow is missing.
    TypeError, ValueError
        `data` is none, has no such column, or the column is not one of lists of numbers.
    """
    polars = library("from_polars", "polars", "polars")
    if isinstance(data, polars.DataFrame):
        if column is None:
            raise ValueError(f"column: not given; needs one of {', '.join(map(repr, data.columns))}")
        _expect_column("from_polars", column, data.columns)
        data = data.get_column(column)
    elif not isinstance(data, polars.Series):
        raise TypeError(f"from_polars: got {type(data).__name__}; needs a polars.Series or polars.DataFrame")
    return from_arrow(data.to_arrow(), nulls)


def to_polars(fields: Mapping[str, Array | Any]) -> Any:
    """Make a Polars DataFrame of Arrays and one-dimensional arrays of NumPy, one a column.

    Copies what `scree.bridges.to_arrow` copies.

    Raises
    ------
    ImportError
        polars or pyarrow is missing.
    TypeError, ValueError
        `fields` are no such columns, or have different numbers of rows.
    """
    polars = library("to_polars", "polars", "polars")
    return polars.from_arrow(_table("to_polars", fields))


def _expect_column(op: str, column: str, known: list[str]) -> None:
    if column not in known:
        raise ValueError(f"{op}: got column {column!r}; needs one of {', '.join(map(repr, known))}")


def _table(op: str, fields: Any) -> Any:
    pa = library(op, "pyarrow", "arrow")
    if not isinstance(fields, Mapping) or not fields:
        raise TypeError(f"{op}: got {type(fields).__name__}; needs a dictionary of one Array or more")
    columns = {name: to_arrow(field) if isinstance(field, Array) else pa.array(field) for name, field in fields.items()}
    rows = {name: len(column) for name, column in columns.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name!r} {n}" for name, n in rows.items())
        raise ValueError(f"{op}: the fields have different numbers of rows ({told}); needs one for all")
    return pa.table(columns)
