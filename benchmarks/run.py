"""Benchmarks: ``python benchmarks/run.py core`` prints a table, and saves it to ``benchmarks/results/``.

``docs/benchmarks.md`` is made from what was saved; ``python benchmarks/run.py core --document`` makes it again without
measuring.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import bench_data
import measure

PARTS = {"core": "bench_core", "data": "bench_data"}
DEVICE = "cpu-2-cores"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--document", action="store_true", help="write the page of saved results, and measure nothing")
    parser.add_argument("--results", default=DEVICE, metavar="NAME", help="the file in benchmarks/results")
    parser.add_argument("--sequences", type=int, nargs="+", help="only batches of so many sequences; nothing is saved")
    parser.add_argument("--remark", help="saved with the results: what else the machine did")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line of the table")
    arguments = parser.parse_args()
    if arguments.document:
        PAGE.write_text(page())
        return
    bench = importlib.import_module(PARTS[arguments.part])
    measured = measure.machine(bench.PACKAGES) | {"rows": []}
    if arguments.remark:
        measured["remark"] = arguments.remark
    sizes = tuple(arguments.sequences or (bench.SEQUENCES if arguments.part == "core" else bench.SIZES))
    for row in bench.rows(sizes, arguments.seconds):
        print(f"{row.get('ms', ''):>12}  {' '.join(str(row.get(k, '')) for k in ('op', 'framework', 'work', 'impl'))}")
        sys.stdout.flush()
        measured["rows"].append(row)
    print(drawn(arguments.part, measured))
    if not arguments.sequences:
        print(f"saved to {measure.save(arguments.results, arguments.part, measured)}")
        PAGE.write_text(page())


def page() -> str:
    """Write the page of the documentation: every saved part, by the file that it is in."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/run.py` from `benchmarks/results/`: every contender in the same run, in turn, its",
        "result compared with ours first. The goal for a row above 1 ms is at most 1.05 of the fastest contender that is",
        "not compiled, and below 1 ms at most 10 us over it, checks included. The copy floor is the time to copy as many",
        "bytes as the result holds, in memory that is warm.",
    ]
    for path in sorted(measure.RESULTS.glob("*.json")):
        for part, measured in json.loads(path.read_text()).items():
            lines += ["", f"## {part}: {path.stem}", "", drawn(part, measured)]
    return "\n".join(lines) + "\n"


def drawn(part: str, measured: dict[str, Any]) -> str:
    """Draw the table of a part."""
    return bench_data.table(measured) if part == "data" else table(measured)


def table(measured: dict[str, Any]) -> str:
    """Draw the table: ours beside the fastest that is not compiled, the goal, and compiled ones that are faster."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    lines = [
        f"Medians of interleaved rounds. {measured['device']}; {measured['system']}; {versions}; "
        f"commit {measured['commit'][:10]}{changed}.",
        "",
        "| operation | workload | scree | quartiles | fastest peer | ratio | over | goal | copy floor | compiled, faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["work"], row["op"], row["framework"]

    for (work, op, framework), group in groupby(measured["rows"], key):
        by = {row.get("impl"): row for row in group}
        if None in by:
            lines.append(f"| {op} | {work} | left out: {by[None]['left_out']} | | | | | | | |")
            continue
        floor, ours = by.pop("copy floor")["ms"], by.pop("scree")
        plain = {name: row["ms"] for name, row in by.items() if not row["compiled"]}
        best = min(plain, key=lambda name: plain[name])
        ratio, over = ours["ms"] / plain[best], (ours["ms"] - plain[best]) * 1e3
        met = ratio <= 1.05 if plain[best] >= 1 else over <= 10
        faster = [
            f"{name} {_time(row['ms'])}" for name, row in by.items() if row["compiled"] and row["ms"] < ours["ms"]
        ]
        lines.append(
            f"| {op}, {framework} | {work} | {_time(ours['ms'])} | {_time(ours['low'])} to {_time(ours['high'])} | "
            f"{_time(plain[best])} {best} | {ratio:.2f} | {over:+.1f} us | {'met' if met else 'missed'} | "
            f"{_time(floor) if floor else ''} | {', '.join(faster)} |"
        )
    return "\n".join(lines)


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms"


if __name__ == "__main__":
    main()
