"""The lengths of the sequences in a file, read without reading the sequences into memory."""

from __future__ import annotations

import codecs
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from .._array import Array
from .._backends._protocol import HostArray, HostInts
from ..bridges._handover import library
from ._columns import naming
from ._saving import load

TEXT = (".jsonl", ".ndjson", ".json")
ARROW = (".arrow", ".feather", ".ipc")
OWN = (".safetensors", ".npz")


class Lengths(NamedTuple):
    """Lengths, what they count, the bytes of one such thing in the data, and how many null rows were left out."""

    lengths: HostInts
    unit: str
    item_bytes: int
    nulls: int


def from_stream(stream: TextIO) -> Lengths:
    """Read lengths as text: integers between white space."""
    found: list[int] = []
    for number, line in enumerate(stream, 1):
        for word in line.split():
            if not word.isdecimal():
                raise ValueError(f"standard input, line {number}: got {word!r}; needs lengths, integers of 0 or more")
            found.append(int(word))
    return Lengths(_counted("standard input", found), "tokens", 8, 0)


def _counted(source: str, found: list[int]) -> HostInts:
    """Lengths as an array, whose sum 64 bits hold."""
    if sum(found) >= 1 << 63:
        raise ValueError(f"{source}: got lengths up to {max(found)}; needs such that sum to less than 2**63")
    return np.array(found, np.int64)


def from_file(path: Path, column: str | None, drop_nulls: bool) -> Lengths:
    """Read the lengths of a column of a file or folder.

    Of lists: their items. Of texts: their characters. Of integers: taken for lengths. Parquet, Arrow's files and streams,
    jsonl (plain or `.gz`), `.safetensors` and `.npz` of `scree.data.save`, folders of Parquet, and of datasets' `save_to_disk`.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise ValueError(f"'{path}' is not there")
    if path.is_dir():
        return _of_columns(path, _files_of(path), column, drop_nulls)
    if suffix in TEXT or (suffix == ".gz" and Path(path.stem).suffix.lower() in TEXT):
        return _of_jsonl(path, column, drop_nulls)
    if suffix in OWN:
        return _of_own(path, column)
    if suffix == ".parquet" or suffix in ARROW:
        return _of_columns(path, [path], column, drop_nulls)
    raise ValueError(
        f"'{path}' is of no format that is known; needs a name that ends in "
        f"{', '.join(('.parquet', *ARROW, *TEXT, '.jsonl.gz', *OWN))}, a folder, or - for lengths on standard input"
    )


def _chosen(path: Path, column: str | None, known: Iterable[str], usable: Iterable[str]) -> str:
    names, fit = list(known), list(usable)
    if column is None and len(fit) == 1:
        return fit[0]
    told = ", ".join(map(repr, names)) or "no columns"
    if column is None:
        raise ValueError(f"'{path}' has {told}; name one with --column")
    if column not in names:
        raise ValueError(f"'{path}' has no column {column!r}; it has {told}")
    return column


def _of_own(path: Path, column: str | None) -> Lengths:
    found = load(path, mmap=True)
    fields: dict[str, Any] = {"": found} if isinstance(found, Array) else found
    arrays = {name: field for name, field in fields.items() if isinstance(field, Array)}
    arr = arrays[_chosen(path, column, arrays, arrays)]
    return Lengths(
        np.diff(arr.offsets).astype(np.int64), "tokens", arr.dtype.itemsize * math.prod(arr.feature_shape), 0
    )


def _of_jsonl(path: Path, column: str | None, drop_nulls: bool) -> Lengths:
    found: list[int] = []
    kind, nulls = "", 0
    for number, record in _records(path):
        if column is None:
            fit = [name for name, value in record.items() if isinstance(value, (list, str))]
            column = _chosen(path, None, record, fit)
        if column not in record:
            raise ValueError(f"'{path}', line {number}: no field {column!r}; it has {', '.join(map(repr, record))}")
        value = record[column]
        if value is None:
            if not drop_nulls:
                raise ValueError(f"'{path}', line {number}: {column!r} is null; --nulls drop leaves such rows out")
            nulls += 1
            continue
        got = "integer" if isinstance(value, int) and not isinstance(value, bool) else type(value).__name__
        if got not in ("list", "str", "integer"):
            raise ValueError(f"'{path}', line {number}: {column!r} is {got}; needs a list, a text or a length")
        if got != (kind or got):
            raise ValueError(
                f"'{path}', line {number}: {column!r} is {got}, in the lines before {kind}; needs one type"
            )
        kind = got
        if isinstance(value, int) and value < 0:
            raise ValueError(f"'{path}', line {number}: {column!r} is {value}; needs a length of 0 or more")
        found.append(value if isinstance(value, int) else len(value))
    unit, size = ("characters", 1) if kind == "str" else ("tokens", 8)
    return Lengths(_counted(f"'{path}'", found), unit, size, nulls)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        for number, line in enumerate(_lines(path, file), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as wrong:
                raise ValueError(
                    f"'{path}', line {number}: byte {wrong.start} is {line[wrong.start]:#04x}, which is not UTF-8"
                ) from wrong
            except json.JSONDecodeError as wrong:
                raise ValueError(f"'{path}', line {number}: no JSON ({wrong.msg} at column {wrong.colno})") from wrong
            if not isinstance(record, dict):
                raise ValueError(f"'{path}', line {number}: {type(record).__name__}; needs an object a line")
            yield number, record


def _lines(path: Path, file: Any) -> Iterator[bytes]:
    """The lines of a file, of a compressed one too, without the mark of UTF-8 that some editors set in front."""
    try:
        for number, line in enumerate(file):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as wrong:
        raise ValueError(f"'{path}' is truncated, damaged, or not compressed by gzip ({wrong})") from wrong


def _files_of(folder: Path) -> list[Path]:
    """The data files of a folder, in their order."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = _json(splits).get("splits", [])
        raise ValueError(f"'{folder}' has several splits; name one of {', '.join(f'{folder / n}' for n in names)}")
    state = folder / "state.json"
    if state.is_file():
        listed = _json(state).get("_data_files", [])
        files = [folder / entry["filename"] for entry in listed]
    else:
        files = _below(folder, "*.parquet") or _below(folder, "*.arrow")
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ValueError(f"'{missing}' is not there, of which '{state}' speaks")
    if not files:
        raise ValueError(
            f"'{folder}' has no .parquet and no .arrow files; needs those, or what datasets' save_to_disk writes"
        )
    return files


def _below(folder: Path, pattern: str) -> list[Path]:
    """The files in a folder and in its folders, as other programs partition tables; none that is hidden."""
    found = (file.relative_to(folder) for file in folder.rglob(pattern))
    return [folder / file for file in sorted(found) if not any(part.startswith((".", "_")) for part in file.parts)]


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as wrong:
        raise ValueError(f"'{path}' cannot be read ({wrong})") from wrong


def _of_columns(path: Path, files: list[Path], column: str | None, drop_nulls: bool) -> Lengths:
    pa = library("report", "pyarrow", "arrow")
    parts: list[HostArray] = []
    rows = nulls = 0
    unit, size, known = "tokens", 8, None
    for file in files:
        with naming(pa, file):
            schema, batches = _opened(pa, file)
        column = _chosen(path, column, schema.names, [f.name for f in schema if _is_list(pa, f.type)])
        kind = schema.field(column).type
        unit, size = _unit(pa, path, column, kind)
        if (known or kind) != kind and _sort(pa, known) != _sort(pa, kind):
            raise ValueError(f"'{file}': {column!r} is of type {kind}, in the files before {known}; needs one type")
        known = kind
        with naming(pa, file):
            for batch in batches(column):
                values = batch.column(batch.schema.names.index(column))
                if values.null_count and not drop_nulls:
                    null = rows + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
                    raise ValueError(f"'{path}', row {null}: {column!r} is null; --nulls drop leaves such rows out")
                nulls += values.null_count
                rows += len(values)
                values.validate(full=True)  # texts that are not UTF-8, offsets that fall
                parts.append(_lengths_of(pa, kind, values.drop_null()))
    lengths = np.concatenate([np.zeros(0, np.int64), *parts])
    if lengths.min(initial=0) < 0:
        raise ValueError(f"'{path}': {column!r} has {lengths.min()}; needs lengths of 0 or more")
    return Lengths(lengths, unit, size, nulls)


def _opened(pa: Any, file: Path) -> tuple[Any, Any]:
    """The schema, and a function from a column to its record batches, read one by one."""
    if file.suffix.lower() == ".parquet":
        parquet = library("report", "pyarrow.parquet", "arrow").ParquetFile(file)
        return parquet.schema_arrow, lambda column: parquet.iter_batches(columns=[column])
    source = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return stream.schema, lambda _: stream
    return reader.schema, lambda _: (reader.get_batch(i) for i in range(reader.num_record_batches))


def _is_list(pa: Any, kind: Any) -> bool:
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_kind(kind) for is_kind in (*kinds, pa.types.is_large_list_view))


def _is_text(pa: Any, kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _sort(pa: Any, kind: Any) -> str:
    return "lists" if _is_list(pa, kind) else "lengths" if pa.types.is_integer(kind) else "texts"


def _unit(pa: Any, path: Path, column: str, kind: Any) -> tuple[str, int]:
    if _is_list(pa, kind):
        item, width = kind.value_type, 1
        while pa.types.is_fixed_size_list(item):
            item, width = item.value_type, width * item.list_size
        return "tokens", width * (max(item.bit_width // 8, 1) if pa.types.is_primitive(item) else 8)
    if _is_text(pa, kind) or (pa.types.is_dictionary(kind) and _is_text(pa, kind.value_type)):
        return "characters", 1
    if pa.types.is_integer(kind):
        return "tokens", 8
    raise ValueError(
        f"'{path}': {column!r} is of type {kind}; needs lists, texts or integers, which are taken for lengths"
    )


def _lengths_of(pa: Any, kind: Any, values: Any) -> HostInts:
    compute = library("report", "pyarrow.compute", "arrow")
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if pa.types.is_integer(kind):
        counted = values
    elif _is_text(pa, kind):
        counted = compute.utf8_length(values.cast(pa.large_string()))  # which it has no kernel for views of
    else:
        counted = compute.list_value_length(values)
    return counted.to_numpy(zero_copy_only=False).astype(np.int64)
