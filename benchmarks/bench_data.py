"""`scree.data` beside the packages that plan, pad and pack today.

Peers are installed beside the environment: trl, axolotl (without its dependencies), binpacking, datasets; and numba and
Ray. What they return is looked at before they are timed: every sequence once, no bin over-full.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("scree", "numpy", "numba", "torch", "trl", "axolotl", "binpacking", "pyarrow", "ray", "datasets")
CAPACITY = 2048
SIZES = (1_000, 10_000, 100_000, 1_000_000)
_QUADRATIC_UP_TO = 10_000  # lengths: binpacking looks at every bin for every one
_PACKED_UP_TO = 100_000  # sequences: TRL takes minutes beyond
_SHORT, _LONG = 0.02, 20.0  # seconds
_CORPUS_BYTES = 10 * 10**9
_TEXTS = {"small": 40_000, "large": 240_000}
_BLOCK = 5_000  # texts
SECONDS = 2.0  # for each line of the table, unless said
PARTS = ("plan", "pack", "collate", "open", "engines")
HOW = (
    "Medians. What compiles is warm: axolotl's planner was called once, and plan_bins until it went over to numba by itself "
    '(`implementation="numpy"` never does). Ray\'s cluster is started before `scree.data.ray.pack` is timed (its start has a '
    "row of its own), its workers are warm and no less urgent than other processes, and unless said `batch_size=None` packs "
    "each file in the task that reads it, without `use_datasource_v2`; `datasets.map` forks its processes within what is "
    "timed. Both read, tokenise in Python and write: Ray from Parquet to compressed Parquet, datasets from Arrow to Arrow."
)


def rows(sizes: tuple[int, ...], seconds: float, parts: tuple[str, ...] = PARTS) -> Iterator[dict[str, Any]]:
    """Measure everything, or some parts; give one row a contender."""
    if "plan" in parts:
        yield from _compiling()
        for n in sizes:
            yield from _planning(n, seconds)
    if "pack" in parts:
        for n in sizes:
            if n <= _PACKED_UP_TO:
                yield from _packing(n, seconds)
    if "collate" in parts:
        for mean in (4, 6):
            yield from _collating(mean, seconds)
    if "open" in parts:
        yield from _opening()
    if "engines" in parts:
        yield from _engines()


def _lengths(n: int) -> Any:
    return np.clip(np.random.default_rng(0).lognormal(4, 1, n), 1, CAPACITY).astype(np.int64)


def _timed(contenders: dict[str, Callable[[], Any]], seconds: float, least: int = 1) -> dict[str, dict[str, Any]]:
    """The median and the quartiles in ms, the contenders in turn: as many rounds as the time allows, and three at least.

    Where a round takes longer than `_LONG`, it is as many as `least`. What takes less than `_SHORT` is called once more,
    before it is timed, so that the caches hold its own data and not that of the contender before it.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    begun, spent, rounds = time.perf_counter(), 0.0, 0
    while rounds < (3 if spent < _LONG else least) or (spent < seconds * len(contenders) and rounds < 1001):
        for name, run in contenders.items():
            if times[name] and times[name][-1] < _SHORT:
                run()
            started = time.perf_counter()
            result = run()
            times[name].append(time.perf_counter() - started)
            del result
        spent, rounds = time.perf_counter() - begun, rounds + 1
    return {name: _summary(values) for name, values in times.items()}


def _summary(seconds: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "ms": round(middle * 1e3, 4),
        "low": round(low * 1e3, 4),
        "high": round(high * 1e3, 4),
        "rounds": len(seconds),
    }


def _rows(op: str, work: str, found: dict[str, dict[str, Any]], notes: dict[str, str]) -> Iterator[dict[str, Any]]:
    for name, times in found.items():
        yield {"op": op, "work": work, "impl": name, **times, "note": notes.get(name, "")}


def _check_bins(bins: list[Any], lengths: Any) -> str:
    """Require every sequence once and no bin over-full; say how tight they are."""
    members = np.concatenate([np.asarray(b, np.int64) for b in bins])
    if not np.array_equal(np.sort(members), np.arange(len(lengths))):
        raise SystemExit("a contender lost or doubled a sequence")
    if max(int(lengths[np.asarray(b, np.int64)].sum()) for b in bins) > CAPACITY:
        raise SystemExit("a contender filled a bin above its capacity")
    return f"{len(bins):,} bins, {lengths.sum() / (len(bins) * CAPACITY):.4f}"


_COMPILE = """
import time, sys
import numpy as np
import scree.data
lengths = np.array([3, 2, 1])
scree.data.plan_bins(lengths, 8)
begun = time.perf_counter()
scree.data.plan_bins(lengths, 8, implementation="numba")
print(time.perf_counter() - begun)
"""


def _compiling() -> Iterator[dict[str, Any]]:
    """What it costs a process to go over to numba: the first one on a machine, and later ones."""
    with tempfile.TemporaryDirectory() as folder:

        def started() -> float:
            told = subprocess.run(
                [sys.executable, "-c", _COMPILE], env=os.environ | {"NUMBA_CACHE_DIR": folder},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            return float(told.stdout)

        first, *later = (started() for _ in range(4))
    found = {"scree, compiling": _summary([first]), "scree, from what numba left on disk": _summary(later)}
    yield from _rows("go over to numba", "once a process, with the import of numba", found, {})


def _tiered_up() -> None:
    """Plan until `plan_bins` has gone over to numba, as it does in a process that plans much."""
    from scree.data import _fitting, plan_bins

    lengths = _lengths(1_000_000)
    while _fitting.TIERS.fit is None:
        if _fitting.TIERS.failed:
            raise SystemExit("numba cannot be had")
        plan_bins(lengths, CAPACITY)


def _planning(n: int, seconds: float) -> Iterator[dict[str, Any]]:
    from axolotl.utils.samplers.multipack import pack_parallel
    from binpacking import to_constant_volume

    from scree.data import plan_bins

    _tiered_up()
    lengths = _lengths(n)
    falling = np.argsort(-lengths, kind="stable")  # pack_parallel is first fit in the order that it is given

    def axolotl(which: Any = lengths) -> Any:
        return pack_parallel(which, CAPACITY, group_size=100_000, bin_size=200, num_processes=1, safe_mode=False)

    contenders: dict[str, Callable[[], Any]] = {
        "scree bfd": lambda: plan_bins(lengths, CAPACITY),
        "scree bfd, implementation='numba'": lambda: plan_bins(lengths, CAPACITY, implementation="numba"),
        "scree bfd, implementation='numpy'": lambda: plan_bins(lengths, CAPACITY, implementation="numpy"),
        "scree ffd": lambda: plan_bins(lengths, CAPACITY, "ffd"),
        "scree ffd, implementation='numpy'": lambda: plan_bins(lengths, CAPACITY, "ffd", implementation="numpy"),
        "axolotl": axolotl,
        "axolotl, sorted": lambda: axolotl(lengths[falling]),
    }
    if n <= _QUADRATIC_UP_TO:
        given = dict(enumerate(lengths.tolist()))
        contenders["binpacking"] = lambda: to_constant_volume(given, CAPACITY)
    notes = {
        **{name: _check_bins(list(run()), lengths) for name, run in contenders.items() if name.startswith("scree")},
        "axolotl": _check_bins(axolotl(), lengths),
        "axolotl, sorted": _check_bins(contenders["axolotl, sorted"](), lengths[falling]),
    }
    if n <= _QUADRATIC_UP_TO:
        notes["binpacking"] = _check_bins([list(b) for b in contenders["binpacking"]()], lengths)
    yield from _rows("plan", f"{n:,} lengths, capacity {CAPACITY:,}", _timed(contenders, seconds), notes)


def _packing(n: int, seconds: float) -> Iterator[dict[str, Any]]:
    """TRL's planner has no front of its own: the whole packing of a table, of one byte a token, is compared."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    import scree
    from scree.data import pack_table

    lengths = _lengths(n)
    values = np.random.default_rng(1).integers(0, 255, int(lengths.sum()), np.uint8)
    table = pa.table({"ids": scree.bridges.to_arrow(scree.from_lengths(values, lengths))})
    contenders: dict[str, Callable[[], Any]] = {
        "scree pack_table": lambda: pack_table(table, "ids", CAPACITY),
        "TRL": lambda: _pack_bfd(table, CAPACITY),
    }
    notes = {}
    for name, run in contenders.items():
        packed = run()["ids"]
        held = np.concatenate([np.asarray(chunk.values.to_numpy()) for chunk in packed.chunks])
        if not np.array_equal(np.bincount(held, minlength=256), np.bincount(values, minlength=256)):
            raise SystemExit(f"{name} lost or doubled a token")
        notes[name] = f"{len(packed):,} bins, {len(values) / (len(packed) * CAPACITY):.4f}"
    work = f"{n:,} sequences, {len(values):,} tokens of a byte"
    yield from _rows("pack a table", work, _timed(contenders, seconds), notes)


def _collating(mean: int, seconds: float) -> Iterator[dict[str, Any]]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from scree.data import collate

    lengths = np.clip(np.random.default_rng(0).lognormal(mean, 1, 64), 1, 8192).astype(int)
    samples = [torch.randint(0, 50_000, (n,)) for n in lengths.tolist()]
    if not torch.equal(collate(samples).values, torch.cat(samples)):
        raise SystemExit("collate does not join the samples")
    contenders: dict[str, Callable[[], Any]] = {
        "scree collate": lambda: collate(samples),
        "pad_sequence": lambda: pad_sequence(samples, batch_first=True),
    }
    places = len(samples) * int(lengths.max())
    notes = {"scree collate": f"{lengths.sum():,} places", "pad_sequence": f"{places:,} places"}
    yield from _rows("collate", f"64 rows of int64, {lengths.sum():,} tokens", _timed(contenders, seconds), notes)


def _opening() -> Iterator[dict[str, Any]]:
    import scree
    from scree.data import Corpus, load, save

    n_tokens, n_rows = _CORPUS_BYTES // 4, _CORPUS_BYTES // 4 // 1000
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCREE_BENCHMARK_FOLDER")) as folder:
        path, empty = Path(folder) / "corpus.safetensors", Path(folder) / "zeros"
        with empty.open("wb") as file:
            file.truncate(n_tokens * 4)
        lengths = np.random.default_rng(0).integers(1, 2000, n_rows - 1)
        lengths = lengths[np.cumsum(lengths) < n_tokens]
        lengths = np.append(lengths, n_tokens - lengths.sum())
        save(path, scree.from_lengths(np.asarray(np.memmap(empty, np.int32, "r")), lengths))
        work = f"{path.stat().st_size / 1e9:.1f} GB, {len(lengths):,} rows"
        yield from _rows("open", work, _timed({"scree load(mmap=True)": lambda: load(path, mmap=True)}, 2), {})
        chosen = np.random.default_rng(1).integers(0, len(lengths), 4000)
        offsets = load(path, mmap=True).offsets
        start = path.stat().st_size - n_tokens * 4  # where the values begin is not what the time depends on

        def forget() -> None:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

        def by_row(arr: Any, rows: Any) -> int:
            return sum(int(arr[int(i)].sum()) for i in rows)

        def by_read(file: int, rows: Any) -> int:
            spans = ((int(offsets[i]) * 4, int(offsets[i + 1]) * 4) for i in rows)
            return sum(int(np.frombuffer(os.pread(file, b - a, start + a), np.int32).sum()) for a, b in spans)

        times: dict[str, list[float]] = {"scree Corpus": [], "scree load(mmap=True)": [], "pread": []}
        for turn in range(4):
            part = chosen[turn * 1000 : (turn + 1) * 1000]
            for name, mapped in (("scree Corpus", Corpus), ("scree load(mmap=True)", lambda p: load(p, mmap=True))):
                forget()
                arr = mapped(path)
                begun = time.perf_counter()
                by_row(arr, part)
                times[name].append(time.perf_counter() - begun)
                del arr
            forget()
            file = os.open(path, os.O_RDONLY)
            begun = time.perf_counter()
            by_read(file, part)
            times["pread"].append(time.perf_counter() - begun)
            os.close(file)
        size = float(np.diff(offsets)[chosen].sum()) * 4 / 4
        found, notes = {}, {}
        for name, values in times.items():
            found[name] = _summary(values)
            notes[name] = f"{size / statistics.median(values) / 1e6:.0f} MB/s"
        yield from _rows("1,000 random rows, not in the cache", work, found, notes)


def _numbered(texts: list[str]) -> list[Any]:
    """Number the words of texts: a tokenizer in Python, called once a block."""
    known: dict[str, int] = {}
    return [np.array([known.setdefault(word, len(known)) for word in text.split()], np.int32) for text in texts]


def _corpus(n: int, folder: Path) -> Any:
    """Write `n` texts to Parquet files of `_BLOCK`; return their lengths in words."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, words = np.random.default_rng(0), np.array([f"word{i}" for i in range(5000)])
    lengths = _lengths(n)
    folder.mkdir()
    for i in range(0, n, _BLOCK):
        part = lengths[i : i + _BLOCK]
        texts = np.split(words[rng.integers(0, len(words), int(part.sum()))], np.cumsum(part)[:-1])
        pq.write_table(pa.table({"text": [" ".join(text) for text in texts]}), folder / f"{i:07}.parquet")
    return lengths


def _engines() -> Iterator[dict[str, Any]]:
    """Tokenise and pack texts from Parquet files: on Ray's workers, and in the processes of datasets' `map`."""
    import datasets
    import ray

    datasets.disable_progress_bars()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  Ray's own choice, 15, would measure what else runs here
    begun = time.perf_counter()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1_000_000_000)
    ray.data.DataContext.get_current().enable_progress_bars = False
    started = {"ray.init(num_cpus=2)": _summary([time.perf_counter() - begun])}
    yield from _rows("start a cluster", "on this machine", started, {})
    with tempfile.TemporaryDirectory() as folder:
        for size, n in _TEXTS.items():
            yield from _on_engines(size, n, Path(folder))
    ray.shutdown()


def _on_engines(size: str, n: int, folder: Path) -> Iterator[dict[str, Any]]:
    import datasets
    import pyarrow.compute
    import ray

    from scree.data import pack_table
    from scree.data.ray import pack

    source = folder / size
    lengths = _corpus(n, source)
    given = datasets.load_dataset(str(source), split="train", cache_dir=f"{folder}/cache").with_format("arrow")
    packing = {"column": "text", "capacity": CAPACITY, "tokenize": _numbered}

    def require(tokens: int) -> int:
        if tokens != lengths.sum():
            raise SystemExit("tokens were lost or doubled")
        return tokens

    def on_ray(workers: int, batch_size: int | None = None, footers: bool = False) -> int:
        ray.data.DataContext.get_current().use_datasource_v2 = footers
        dataset = ray.data.read_parquet(str(source), override_num_blocks=None if batch_size else n // _BLOCK)
        dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=workers)
        with tempfile.TemporaryDirectory(dir=folder) as out:
            packed = pack(dataset, "text", CAPACITY, f"{out}/bins", tokenize=_numbered, batch_size=batch_size)
        return require(packed.tokens)

    def on_datasets(workers: int) -> int:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            packed = given.map(
                pack_table, batched=True, batch_size=_BLOCK, fn_kwargs=packing, remove_columns=["text"],
                num_proc=None if workers == 1 else workers, load_from_cache_file=False,
                cache_file_name=f"{out}/bins.arrow",
            )  # fmt: skip
            return require(sum(len(pyarrow.compute.list_flatten(part["input_ids"])) for part in packed.iter(1000)))

    contenders: dict[str, Callable[[], Any]] = {
        "scree.data.ray.pack, 1 worker": lambda: on_ray(1),
        "scree.data.ray.pack, 2 workers": lambda: on_ray(2),
        "datasets.map(pack_table), 1 process": lambda: on_datasets(1),
        "datasets.map(pack_table), 2 processes": lambda: on_datasets(2),
    }
    if size == "small":
        on_ray(2)  # starts the workers
        contenders["scree.data.ray.pack, 2 workers, batch_size=5000"] = lambda: on_ray(2, _BLOCK)
        contenders["scree.data.ray.pack, 2 workers, batch_size=5000, Ray's own reader"] = lambda: on_ray(
            2, _BLOCK, True
        )
    found = _timed(contenders, 0, least=2)
    growth = {which: found[f"{which}, 1 {one}"]["ms"] / found[f"{which}, 2 {two}"]["ms"]
              for which, one, two in (("scree.data.ray.pack", "worker", "workers"),
                                      ("datasets.map(pack_table)", "process", "processes"))}  # fmt: skip
    notes = {}
    for name, times in found.items():
        two = ", 2 " in name
        notes[name] = f"{lengths.sum() / times['ms'] / 1e3 / (1 + two):.2f} M tokens/s per core"
        if two and "batch_size" not in name:
            notes[name] += f", {growth[name.split(', 2 ')[0]]:.2f} times as fast as one"
    for workers in (1, 2):
        both = {name: times for name, times in found.items() if f", {workers} " in name}
        work = f"{n:,} texts, {lengths.sum():,} tokens, {n // _BLOCK} files, on {workers}"
        yield from _rows("tokenise and pack", work, both, notes)
