"""The table of what was measured on models of transformers."""

from __future__ import annotations

from itertools import groupby
from typing import Any

BASE = "padded sdpa"
"""The contender beside which the others are put."""
COLLATE = "collate"
"""The operation that has no model."""


def table(measured: dict[str, Any]) -> str:
    """Draw two tables: every way to run a model beside the padded one, with the goal for what is packed; the collators."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    threads = f" Threads: {measured['threads']}." if "threads" in measured else ""
    clock = "processor time" if measured.get("clock") == "process_time" else "time"
    lines = [
        f"Medians of interleaved rounds, {clock}. {measured['device']}; {measured['system']}; {versions}; commit "
        f"{measured['commit'][:10]}{changed}.{threads} {measured.get('remark', '')}".rstrip(),
    ]
    models = [row for row in measured["rows"] if row["op"] != COLLATE]
    if models:
        lines += _explained(measured["goal"])
    for _, group in groupby(models, lambda row: (row["work"], row["op"])):
        contenders = {row["impl"]: row for row in group}
        lines += (_line(row, contenders[BASE], measured["goal"]) for row in contenders.values())
    collators = [row for row in measured["rows"] if row["op"] == COLLATE]
    if collators:
        lines += ["", "| workload | collator | time | quartiles | beside the other |", "|---|---|---|---|---|"]
    for _, group in groupby(collators, lambda row: row["work"]):
        pair = list(group)
        for row, other in zip(pair, reversed(pair), strict=True):
            low, high = row["low"], row["high"]
            lines.append(
                f"| {row['work']} | {row['impl']} | {row['ms']:.3f} ms | {low:.3f} to {high:.3f} ms | "
                f"{row['ms'] / other['ms']:.2f} |"
            )
    return "\n".join(lines)


def _explained(goal: float) -> list[str]:
    return [
        "",
        "All sequences in batches of at most as many places, padding included, collated beforehand; in float32 unless it says "
        f"otherwise. The goal: faster than {BASE} by {goal} of its padding, places over tokens. Memory is the peak beyond what "
        "was held before. The error is relative; where it is not rounding, sequences see each other.",
        "",
        "| operation | workload | contender | seconds | quartiles | tokens a second | memory | places | error | "
        f"faster than {BASE} | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]


def _line(row: dict[str, Any], base: dict[str, Any], share: float) -> str:
    name = row["impl"]
    start = f"| {row['op']} | {row['work']}, {row['tokens']:,} tokens | {name} |"
    if "left_out" in row:
        return f"{start} left out: {row['left_out']} | | | | {row['places']:,} | {row['err']:.0e} | | |"
    low, high, rate = row["low"] / 1e3, row["high"] / 1e3, row["tokens"] / row["ms"] * 1e3
    peak = "" if row["peak"] is None else f"{row['peak'] / 1e9:.2f} GB"
    leaks = " leaks" if row["leaks"] else ""
    faster = goal = ""
    if "ms" in base:
        times, wanted = base["ms"] / row["ms"], share * base["places"] / row["tokens"]
        faster = f"{times:.2f}"
        if name.startswith("scree packed"):
            goal = f"{wanted:.2f} {'met' if times >= wanted else 'missed'}"
    return (
        f"{start} {row['ms'] / 1e3:.3f} | {low:.3f} to {high:.3f} | {rate:,.0f} | {peak} | {row['places']:,} | "
        f"{row['err']:.0e}{leaks} | {faster} | {goal} |"
    )
