"""Arrow's file format and Parquet: one column a field, one row a sequence."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .._array import Array
from .._backends._protocol import HostArray
from ..bridges import from_arrow, to_arrow
from ..bridges._arrow import values_of_tokens
from ..bridges._handover import library
from ._fields import SINGLE, Entries, Layout, Lazy, crc32, entry_names, parsed, sealed

_KEY = b"scree"
_UNNAMED = "values"  # the column of an Array that was saved by itself


def write_arrow(file: IO[bytes], entries: Entries, layout: Layout) -> None:
    """Write one record batch, uncompressed, so that it can be mapped."""
    pa = library("save", "pyarrow", "arrow")
    table = _table(pa, entries, layout)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_parquet(file: IO[bytes], entries: Entries, layout: Layout) -> None:
    """Write Parquet, compressed, with a checksum for each page."""
    pa = library("save", "pyarrow", "arrow")
    pq = library("save", "pyarrow.parquet", "arrow")
    pq.write_table(_table(pa, entries, layout), file, compression="zstd", write_page_checksum=True)


def _table(pa: Any, entries: Entries, layout: Layout) -> Any:
    columns: dict[str, Any] = {}
    for name, field in layout["fields"].items():
        if field["kind"] == "ragged":
            if field["ragged_dim"] != 0:
                raise ValueError(f"save: field {name!r} has ragged_dim {field['ragged_dim']}; Arrow and Parquet need 0")
            values, offsets = (entries[entry] for entry in entry_names(name))
        else:
            # a dense array is one row of many values: its column is that row
            values, offsets = entries[name], [0, len(entries[name])]
        try:
            column = to_arrow(Array(values, offsets))
        except TypeError as wrong:
            raise TypeError(f"save: field {name!r}: {wrong}") from wrong
        columns[name or _UNNAMED] = column if field["kind"] == "ragged" else column.values
    rows = {name: len(column) for name, column in columns.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name!r} {n}" for name, n in rows.items())
        raise ValueError(
            f"save: the fields have different numbers of rows ({told}); Arrow and Parquet need one for all"
        )
    sums = {entry: crc32(array) for entry, array in entries.items()}
    table = pa.table(columns)
    return table.replace_schema_metadata({_KEY: sealed(layout, sums)})


def read_arrow(path: Path, mmap: bool) -> tuple[Lazy, Layout | None]:
    """Open a file, or a stream, of record batches, mapped or read."""
    pa = library("load", "pyarrow", "arrow")
    with naming(pa, path, "load: "):
        source = pa.memory_map(str(path)) if mmap else pa.py_buffer(path.read_bytes())
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            if mmap:
                source.seek(0)
            reader = pa.ipc.open_stream(source)
        table = reader.read_all()
        table.validate()
        return _lazy(pa, path, table)


def read_parquet(path: Path, mmap: bool) -> tuple[Lazy, Layout | None]:
    """Read Parquet, its checksums compared."""
    if mmap:
        raise ValueError(
            f"mmap: '{path}' is Parquet, which is decoded and cannot be mapped; needs mmap=False, or one of .arrow, "
            ".safetensors and .npz"
        )
    pa = library("load", "pyarrow", "arrow")
    pq = library("load", "pyarrow.parquet", "arrow")
    with naming(pa, path, "load: "):
        return _lazy(pa, path, pq.ParquetFile(path, page_checksum_verification=True).read())


@contextmanager
def naming(pa: Any, path: Path, op: str = "") -> Generator[None, None, None]:
    """Give Arrow's own errors the name of the file. Some of them are plain OSErrors without a number."""
    try:
        yield
    except (
        pa.ArrowInvalid,
        pa.ArrowNotImplementedError,
        pa.ArrowSerializationError,
        UnicodeDecodeError,
        OSError,
    ) as wrong:
        if isinstance(wrong, OSError) and wrong.errno is not None:
            raise
        reason = " ".join(str(wrong).split())
        raise ValueError(f"{op}'{path}' is truncated, damaged, or of another format ({reason})") from wrong


def _lazy(pa: Any, path: Path, table: Any) -> tuple[Lazy, Layout | None]:
    told = (table.schema.metadata or {}).get(_KEY)
    layout = parsed(path, told) if told is not None else None
    lazy: Lazy = {}
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"load: '{path}' has several columns {twice!r}; needs one of each name")
    for i, column in enumerate(names):
        held = table.column(i)
        kind = held.type
        single = layout is not None and SINGLE in layout["fields"]
        name = SINGLE if single and column == _UNNAMED else column
        if _is_rows(pa, kind, layout, name):
            arrays = _once(path, column, lambda held=held: from_arrow(held))
            values, offsets = entry_names(name)
            lazy[values] = lambda arrays=arrays: arrays().values
            lazy[offsets] = lambda arrays=arrays: arrays().offsets
        else:
            lazy[name] = _once(path, column, lambda held=held: _dense(pa, held))
    return lazy, layout


def _is_rows(pa: Any, kind: Any, layout: Layout | None, name: str) -> bool:
    if layout is not None and name in layout["fields"]:
        return layout["fields"][name]["kind"] == "ragged"
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)


def _once(path: Path, column: str, make: Callable[[], Any]) -> Callable[[], Any]:
    """Make it when it is first asked for, and keep it."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            try:
                made.append(make())
            except (TypeError, ValueError) as wrong:
                raise type(wrong)(f"load: '{path}': column {column!r}: {wrong}") from wrong
        return made[0]

    return get


def _dense(pa: Any, column: Any) -> HostArray:
    kind = column.type
    while pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise TypeError(f"got type {column.type}; needs numbers, or lists of numbers; fields=[...] chooses columns")
    if column.null_count:
        null = int(column.is_null().to_numpy().argmax())
        raise ValueError(f"row {null} is null; needs a value in every row")
    return values_of_tokens(pa, column.combine_chunks())
