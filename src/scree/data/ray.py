"""Packing a corpus that does not fit in memory, on Ray: Ray Data distributes, Arrow carries, scree packs each block."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..bridges._handover import library
from ._planning import ALGORITHMS, TOO_LONG, at_least_one, one_of
from ._saving import replacing
from ._tables import COUNTS, KEY, Tokenize, pack_table

__all__ = ["Packed", "pack"]

MANIFEST = "_scree.json"
ROWS = 16_384
"""Rows in a block unless said: as tight as the whole, and a file of tens of megabytes."""

_PART, _SUFFIX = "part-", ".parquet"

_HANDED_ON = 16 << 20
"""Bytes in which a task hands on what it reads, 128 MB by Ray's own choice, so that all workers have something to pack."""


@dataclass(frozen=True)
class Packed:
    """What `pack` wrote.

    Attributes
    ----------
    path : Path
        The folder.
    parts : tuple of str
        The Parquet files in it.
    rows, tokens, bins : int
        Sequences that were read, and tokens and bins that were written.
    split, dropped, nulls : int
        Sequences that were cut, that were left out because they are too long, and rows left out because they are null.
    reused : int
        Parts that an earlier run had written already.
    capacity : int
        The tokens that a bin holds.
    """

    path: Path
    parts: tuple[str, ...]
    rows: int
    tokens: int
    bins: int
    split: int
    dropped: int
    nulls: int
    reused: int
    capacity: int

    @property
    def efficiency(self) -> float:
        """Tokens in the bins by places in the bins; 1 where there is no bin."""
        return self.tokens / (self.bins * self.capacity) if self.bins else 1.0


def pack(
    dataset: Any,
    column: str,
    capacity: int,
    path: str | Path,
    *,
    tokenize: Tokenize | None = None,
    algo: Literal["bfd", "ffd", "wrapped", "split"] = "bfd",
    seed: int | None = None,
    too_long: Literal["error", "split", "drop"] | None = None,
    nulls: Literal["error", "drop"] = "error",
    batch_size: int | None = ROWS,
    version: str = "",
) -> Packed:
    """Tokenise, plan and pack a Ray dataset into Parquet files of bins, block by block, restartable.

    Every block becomes one file, whose name is a digest of the block and of the arguments: it is written whole or not at
    all, and a block that comes again (its worker died, the run was interrupted) finds its file there. At the end the files
    of this run are listed in ``_scree.json``, and what else earlier runs left is removed. So nothing is lost and nothing
    comes twice, whatever dies when: run it again with the same arguments until it returns. One run at a time.

    Parameters
    ----------
    dataset : ray.data.Dataset
        Read as a stream; never as a whole in memory.
    column : str
        Lists of token numbers; or, with `tokenize`, texts.
    capacity : int
        The tokens that a bin holds.
    path : path
        A folder that all workers see; made where it is not there.
    tokenize : function, optional
        As in `scree.data.pack_table`; called in the workers, once a block.
    algo, seed, too_long, nulls
        As in `scree.data.pack_table`.
    batch_size : int or None
        Rows in a block, and so in a file. Ray is told to keep their order, so that blocks come again as they were. None packs
        what a task has read in that very task, in files of 16,384 rows at most: quicker where what one task reads has
        thousands of rows, for then nothing goes through Ray's memory, and no CPU is set apart for reading.
    version : str
        Of `tokenize`, whose code is not looked at: another one packs everything anew.

    Returns
    -------
    Packed
        What was written, counted.

    Raises
    ------
    ImportError
        Ray or pyarrow is missing.
    TypeError, ValueError
        An argument is not as described, a row is null, too long or of another type; or the folder holds what was packed
        with other arguments.
    RuntimeError
        A worker failed in another way; or `pack` is called in a Ray task that holds every CPU of the cluster.

    Notes
    -----
    Bins are planned within a block: blocks of thousands of sequences pack as tightly as the whole. The columns are those of
    `scree.data.pack_table`.
    """
    ray = library("pack", "ray", "ray")
    data = library("pack", "ray.data", "ray")
    if not isinstance(dataset, data.Dataset):
        raise TypeError(f"pack: dataset is {type(dataset).__name__}; needs a ray.data.Dataset")
    at_least_one("capacity", capacity)
    one_of("algo", algo, ALGORITHMS)
    if too_long is not None:
        one_of("too_long", too_long, TOO_LONG)
    one_of("nulls", nulls, ("error", "drop"))
    if batch_size is not None:
        at_least_one("batch_size", batch_size)
    _require_a_free_cpu(ray)
    schema = dataset.schema(fetch_if_missing=False)  # otherwise Ray would run a part of the dataset to find out
    _require_column(schema, column)
    folder = Path(path).absolute()
    settings = {
        "column": column, "capacity": capacity, "algo": algo, "seed": seed, "too_long": too_long, "nulls": nulls,
        "tokenize": getattr(tokenize, "__qualname__", type(tokenize).__qualname__), "version": version,
    }  # fmt: skip
    _prepare(folder, settings)
    options = {name: settings[name] for name in ("algo", "seed", "too_long", "nulls")} | {"tokenize": tokenize}
    blocks = dataset.select_columns([column]).map_batches(
        _pack_blocks,
        batch_size=batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        fn_kwargs={"rows": batch_size or ROWS, "folder": folder, "settings": settings, "options": options},
    )
    done: list[dict[str, Any]] = []
    with _streaming(blocks.context, in_parts=batch_size is not None):
        try:
            done = blocks.take_all()
        except ray.exceptions.RayTaskError as failed:
            known = dataset.schema() if schema is None else schema
            _require_column(known, column)
            if known is not None:  # otherwise there are no rows
                raise _cause(failed) from failed
    return _commit(folder, settings, done)


def _require_column(schema: Any, column: str) -> None:
    """Refuse a column that is not among those known."""
    if schema is not None and column not in schema.names:
        raise ValueError(f"column: got {column!r}; the dataset has {', '.join(map(repr, schema.names))}")


@contextmanager
def _streaming(context: Any, in_parts: bool) -> Generator[None, None, None]:
    """Have Ray keep the order of the rows, and (`in_parts`) hand them on before a task has read all of its own."""
    options, size = context.execution_options, context.target_max_block_size
    ordered = options.preserve_order
    options.preserve_order = True
    if in_parts:
        context.target_max_block_size = min(size or _HANDED_ON, _HANDED_ON)
    try:
        yield
    finally:
        options.preserve_order, context.target_max_block_size = ordered, size


def _require_a_free_cpu(ray: Any) -> None:
    """Refuse to wait for ever, in a task that holds all the CPUs that the tasks of the dataset need."""
    try:
        held = ray.get_runtime_context().get_assigned_resources().get("CPU", 0)
    except AssertionError:  # Ray's way to say that this is the program itself, which holds none
        return
    there = ray.cluster_resources().get("CPU", 0)
    if there - held < 1:
        raise RuntimeError(
            f"pack: the Ray task that calls it holds {held:g} of the {there:g} CPUs of the cluster, and none is left to "
            "read and pack; needs num_cpus=0 for that task"
        )


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or see that what is in it was packed with the same arguments."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path: '{folder}' is a file; needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / MANIFEST
    if not begun.exists():
        foreign = [
            found.name for found in folder.iterdir() if not found.name.startswith((_PART, f".{_PART}", f".{MANIFEST}"))
        ]
        if foreign:
            raise ValueError(f"path: '{folder}' holds {foreign[0]!r}; needs a folder that is empty or that pack wrote")
        _write_manifest(folder, {"settings": settings, "complete": False})
        return
    try:
        told = json.loads(begun.read_bytes())
        known, complete = told["settings"], told["complete"]
    except (ValueError, KeyError, TypeError) as wrong:
        raise ValueError(f"path: '{begun}' cannot be read ({wrong}); needs a folder that pack wrote") from wrong
    if not complete and not any(folder.glob(f"{_PART}*")):  # the run failed before it wrote anything
        _write_manifest(folder, {"settings": settings, "complete": False})
        return
    for name, value in settings.items():
        if known.get(name) != value:
            raise ValueError(
                f"path: '{folder}' was packed with {name}={known.get(name)!r}, and now it is {value!r}; needs another folder"
            )


def _write_manifest(folder: Path, told: dict[str, Any]) -> None:
    with replacing("pack", folder / MANIFEST) as file:
        file.write(json.dumps(told, indent=1).encode())


def _pack_blocks(table: Any, rows: int, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> Any:
    """Pack what one task is given, in equal blocks of `rows` at most; return one row a block."""
    pa = library("pack", "pyarrow", "arrow")
    n = max(-(-len(table) // rows), 1)
    ends = [len(table) * i // n for i in range(n + 1)]
    done = [_pack_block(table[a:b], folder, settings, options) for a, b in zip(ends, ends[1:], strict=False)]
    told = pa.Table.from_pylist(done)
    return told if len(table) else told[:0]


def _pack_block(table: Any, folder: Path, settings: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Write the bins of one block, unless they are there; return what names and counts them."""
    pa = library("pack", "pyarrow", "arrow")
    pq = library("pack", "pyarrow.parquet", "arrow")
    name = f"{_PART}{_digest(pa, table, settings)}"
    target = folder / f"{name}{_SUFFIX}"
    reused = target.exists()
    if reused:
        told = pq.read_schema(target).metadata[KEY]
    else:
        packed = pack_table(table, settings["column"], settings["capacity"], **options)
        told = packed.schema.metadata[KEY]
        with replacing("pack", target) as file:
            pq.write_table(packed, file, compression="zstd", write_page_checksum=True)
    counts = json.loads(told)
    return {"part": name, "reused": reused, **{key: counts[key] for key in COUNTS}}


def _digest(pa: Any, table: Any, settings: dict[str, Any]) -> str:
    """A name for a block and the arguments: the same for the same rows, however Ray holds them."""
    column = table.column(settings["column"]).combine_chunks()
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    sink = pa.BufferOutputStream()
    plain = pa.table({settings["column"]: column})
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    digest.update(sink.getvalue())
    return digest.hexdigest()


def _cause(failed: Exception) -> Exception:
    """The error that a worker raised, which Ray hands on as the text of a traceback."""
    causes = str(failed).split("\n\nThe above exception was the direct cause of the following exception:\n\n")
    ours = [cause for cause in causes if "\nray.exceptions." not in cause] or causes  # Ray wraps it once more
    kind, _, message = ours[-1].rstrip().rpartition("\n")[2].partition(": ")
    known: dict[str, type[Exception]] = {e.__name__: e for e in (TypeError, ValueError, OSError, ImportError)}
    if kind in known:
        return known[kind](message)
    return RuntimeError(f"pack: a worker failed: {kind}: {message}" if message else f"pack: a worker failed: {kind}")


def _commit(folder: Path, settings: dict[str, Any], done: list[dict[str, Any]]) -> Packed:
    """Bring the folder to hold the blocks of this run, each as often as it came, and nothing else; list them."""
    often = Counter(row["part"] for row in done)
    parts: list[str] = []
    for part, times in sorted(often.items()):
        parts.append(f"{part}{_SUFFIX}")
        for i in range(1, times):  # blocks that are equal to the last byte
            again = f"{part}-{i}{_SUFFIX}"
            parts.append(again)
            if not (folder / again).exists():
                with replacing("pack", folder / again) as file, (folder / f"{part}{_SUFFIX}").open("rb") as source:
                    shutil.copyfileobj(source, file)
    for found in folder.iterdir():
        if found.name not in (*parts, MANIFEST) and found.name.startswith((_PART, f".{_PART}", f".{MANIFEST}")):
            found.unlink()
    counts = {name: sum(row[name] for row in done) for name in COUNTS}
    _write_manifest(folder, {"settings": settings, "complete": True, "parts": parts, **counts})
    reused = sum(row["reused"] for row in done)
    return Packed(folder, tuple(parts), reused=reused, capacity=settings["capacity"], **counts)
