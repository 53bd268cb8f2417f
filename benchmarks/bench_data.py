"""`scree.data` beside the packages that plan, pad and pack today.

Peers are installed beside the environment: trl, axolotl (without its dependencies), binpacking. What they return is
looked at before they are timed: every sequence once, no bin over-full.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("scree", "numpy", "torch", "trl", "axolotl", "binpacking", "pyarrow")
CAPACITY = 2048
SIZES = (1_000, 10_000, 100_000, 1_000_000)
_QUADRATIC_UP_TO = 10_000  # lengths: binpacking looks at every bin for every one
_PACKED_UP_TO = 100_000  # sequences: TRL takes minutes beyond
_LONG = 20.0  # seconds
_CORPUS_BYTES = 10 * 10**9


def rows(sizes: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure everything; give one row a contender."""
    for n in sizes:
        yield from _planning(n, seconds)
        if n <= _PACKED_UP_TO:
            yield from _packing(n, seconds)
    for mean in (4, 6):
        yield from _collating(mean, seconds)
    yield from _opening()


def _lengths(n: int) -> Any:
    return np.clip(np.random.default_rng(0).lognormal(4, 1, n), 1, CAPACITY).astype(np.int64)


def _timed(contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
    """The median and the quartiles in ms, the contenders in turn: as many rounds as the time allows, and three at least.

    Where a round takes longer than `_LONG`, it is one.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    begun, spent, rounds = time.perf_counter(), 0.0, 0
    while rounds < (3 if spent < _LONG else 1) or (spent < seconds * len(contenders) and rounds < 1001):
        for name, run in contenders.items():
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


def _planning(n: int, seconds: float) -> Iterator[dict[str, Any]]:
    from axolotl.utils.samplers.multipack import pack_parallel
    from binpacking import to_constant_volume

    from scree.data import plan_bins

    lengths = _lengths(n)
    falling = np.argsort(-lengths, kind="stable")  # pack_parallel is first fit in the order that it is given

    def axolotl(which: Any = lengths) -> Any:
        return pack_parallel(which, CAPACITY, group_size=100_000, bin_size=200, num_processes=1, safe_mode=False)

    contenders: dict[str, Callable[[], Any]] = {
        "scree bfd": lambda: plan_bins(lengths, CAPACITY),
        "scree ffd": lambda: plan_bins(lengths, CAPACITY, "ffd"),
        "axolotl": axolotl,
        "axolotl, sorted": lambda: axolotl(lengths[falling]),
    }
    if n <= _QUADRATIC_UP_TO:
        given = dict(enumerate(lengths.tolist()))
        contenders["binpacking"] = lambda: to_constant_volume(given, CAPACITY)
    notes = {
        "scree bfd": _check_bins(list(contenders["scree bfd"]()), lengths),
        "scree ffd": _check_bins(list(contenders["scree ffd"]()), lengths),
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


def table(measured: dict[str, Any]) -> str:
    """Draw the table: every contender, and ours beside the fastest peer of the same work."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    lines = [
        f"Medians. {measured['device']}; {measured['system']}; {versions}; commit {measured['commit'][:10]}{changed}. "
        f"{measured.get('remark', '')}".rstrip(),
        "",
        "| operation | workload | contender | time | quartiles | result | beside the fastest peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, group in groupby(measured["rows"], lambda row: (row["op"], row["work"])):
        contenders = list(group)
        peers = [row["ms"] for row in contenders if not row["impl"].startswith("scree")]
        for row in contenders:
            ratio = f"{row['ms'] / min(peers):.3g}" if peers and row["impl"].startswith("scree") else ""
            lines.append(
                f"| {row['op']} | {row['work']} | {row['impl']} | {_time(row['ms'])} | {_time(row['low'])} to "
                f"{_time(row['high'])} | {row['note']} | {ratio} |"
            )
    return "\n".join(lines)


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:,.2f} ms" if ms < 1e4 else f"{ms / 1e3:,.1f} s"
