"""Benchmarks: ``python benchmarks/run.py PART`` prints a table.

It is saved in ``benchmarks/results/``, from where ``docs/benchmarks.md`` is made; with ``--document`` the page is made again
without measuring.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import bench_data
import cuda_table
import data_table
import huggingface_table
import measure
import summary

DEVICE = "cpu-2-cores"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def main() -> None:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(TABLES))
    parser.add_argument("--document", action="store_true", help="write the page of saved results, and measure nothing")
    parser.add_argument("--results", default=DEVICE, metavar="NAME", help="the file in benchmarks/results")
    parser.add_argument("--sequences", type=int, nargs="+", help="only batches of so many sequences; nothing is saved")
    parser.add_argument("--remark", default="", help="kept with the results: what else ran on the machine, say")
    parser.add_argument("--seconds", type=float, help="for each line of the table; 4 unless said, and 2 for data")
    parser.set_defaults(only=None)
    if "data" in sys.argv[1:2]:
        parser.add_argument("--only", nargs="+", choices=bench_data.PARTS, help="only these; nothing is saved")
    parser.add_argument(
        "--busy", action="store_true", help="cpu, jax and huggingface: processor time, for a machine that is shared"
    )
    if "cuda" in sys.argv[1:2]:
        import bench_cuda

        bench_cuda.add_arguments(parser)
    if "huggingface" in sys.argv[1:]:
        import bench_huggingface

        bench_huggingface.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.seconds is None:
        arguments.seconds = bench_data.SECONDS if arguments.part == "data" else 4.0
    if arguments.document:
        PAGE.write_text(page())
        return
    if arguments.part == "cuda":
        bench_cuda.main(arguments, cuda_table.table)
        return
    if arguments.part == "huggingface":
        if bench_huggingface.main(arguments, huggingface_table.table):
            PAGE.write_text(page())
        return
    facts: dict[str, Any] = {"remark": arguments.remark} if arguments.remark else {}
    if arguments.part in ("cpu", "jax"):
        import bench_kernels

        facts |= {"goal": bench_kernels.GOAL, "threads": bench_kernels.THREADS} | bench_kernels.device(arguments.part)
        packages, rows = (
            bench_kernels.packages(),
            bench_kernels.rows(arguments.part, arguments.seconds, busy=arguments.busy),
        )
        if arguments.busy:
            facts["remark"] = f"Times are of the processor, all threads together. {arguments.remark}".rstrip()
    elif arguments.part == "data":
        facts["how"], packages = bench_data.HOW, bench_data.PACKAGES
        sizes, parts = tuple(arguments.sequences or bench_data.SIZES), tuple(arguments.only or bench_data.PARTS)
        rows = bench_data.rows(sizes, arguments.seconds, parts)
    else:
        import bench_core

        packages = bench_core.PACKAGES
        rows = bench_core.rows(tuple(arguments.sequences or bench_core.SEQUENCES), arguments.seconds)
    measured = measure.machine(packages) | facts | {"rows": []}
    for row in rows:
        print(f"{row.get('ms', ''):>12}  {' '.join(str(row.get(k, '')) for k in ('op', 'framework', 'work', 'impl'))}")
        sys.stdout.flush()
        measured["rows"].append(row)
    print(TABLES[arguments.part](measured))
    if not arguments.sequences and not arguments.only:
        print(f"saved to {measure.save(arguments.results, arguments.part, measured)}")
        PAGE.write_text(page())


def page() -> str:
    """Write the page of the documentation: every saved part, by the file that it is in."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(measure.RESULTS.glob("*.json"))}
    lines = [
        "# Benchmarks",
        "",
        "Made by `python benchmarks/run.py` from `benchmarks/results/`: every contender in the same run, in turn, its",
        "result compared with ours first.",
        "",
        *summary.summary(results),
        "",
        "## How to read the tables",
        "",
        "The goal for a row above 1 ms is at most 1.05 of the fastest contender that is",
        "not compiled, and below 1 ms at most 10 us over it, checks included. The copy floor is the time to copy as many",
        "bytes as the result holds, in memory that is warm.",
        "",
        "In the parts cpu and jax the goal is at most 1.00 of the fastest contender of the same framework; the floor of",
        "attention is its operations over the rate of NumPy's matrix product, that of the others their bytes over the rate",
        "of a copy. A step is forward and backward. New lengths come at every call, and have as much to compute as those",
        "that are repeated, or at most 5 in 100 more.",
    ]
    for name, parts in results.items():
        for part, measured in parts.items():
            lines += ["", f"## {part}: {name}", "", TABLES[part](measured)]
    return "\n".join(lines) + "\n"


def table(measured: dict[str, Any]) -> str:
    """Draw the table: ours beside the fastest that is not compiled, the goal, and compiled ones that are faster."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    threads = f" Threads: {measured['threads']}." if "threads" in measured else ""
    remark = f" {measured['remark']}" if measured.get("remark") else ""
    lines = [
        f"Medians of interleaved rounds. {measured['device']}; {measured['system']}; {versions}; "
        f"commit {measured['commit'][:10]}{changed}.{threads}{remark}",
        "",
        "| operation | workload | scree | quartiles | fastest peer | ratio | over | goal | floor | compiled, faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def key(row: dict[str, Any]) -> tuple[str, str, str]:
        return row["work"], row["op"], row["framework"]

    for (work, op, framework), group in groupby(measured["rows"], key):
        by = {row.get("impl"): row for row in group}
        if None in by:
            lines.append(f"| {op} | {work} | left out: {by[None]['left_out']} | | | | | | | |")
            continue
        floor, ours = (by.pop("floor", None) or by.pop("copy floor"))["ms"], by.pop("scree")
        plain = {name: row["ms"] for name, row in by.items() if not row["compiled"]}
        best = min(plain, key=lambda name: plain[name])
        ratio, over = ours["ms"] / plain[best], (ours["ms"] - plain[best]) * 1e3
        met = ratio <= 1.05 if plain[best] >= 1 else over <= 10
        if "goal" in measured:
            met = ratio <= measured["goal"]
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


TABLES = {
    "core": table,
    "cpu": table,
    "jax": table,
    "cuda": cuda_table.table,
    "data": data_table.table,
    "huggingface": huggingface_table.table,
}

if __name__ == "__main__":
    main()
