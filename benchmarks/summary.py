"""The first screen of the page of benchmarks: what every table below it comes to, worst rows by name."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any, NamedTuple

import huggingface_table

KINDS = {
    "attention": ("attention",),
    "softmax, reductions": ("softmax", "sum", "mean", "max", "min", "logsumexp", "reduce"),
    "norms, rope": ("rmsnorm", "layernorm", "rope"),
    "packing tables": ("pack a table",),
    "packing, padding": ("pack", "unpack", "to_padded", "from_padded", "hf_round_trip"),
    "planning": ("plan",),
    "collating": ("collate",),
    "random rows of a file": ("1,000 random rows",),
    "Ray beside datasets": ("tokenise and pack",),
}
"""What the operations are called together, by how their names begin; the first that fits."""

FRAMEWORK = {"cuda": "torch"}
"""The framework of the parts whose rows do not name one."""


class Pair(NamedTuple):
    """One workload: ours, as a call without options chooses, and the fastest peer."""

    framework: str
    kind: str
    name: str
    ours: float  # ms
    peer: float  # ms

    @property
    def ratio(self) -> float:
        """Our time over the peer's."""
        return self.ours / self.peer


def summary(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Draw the lines of the summary from the parts of every file of results, by the file's name."""
    parts = [(name, part, measured["rows"]) for name, found in results.items() for part, measured in found.items()]
    groups = [
        (_link(name, part), *group)
        for name, part, rows in parts
        if part != "huggingface"
        for group in _together(_pairs(rows, FRAMEWORK.get(part, "")))
    ]
    pairs = [pair for *_, group in groups for pair in group]
    slower = [
        f"{kind} ({mean:.2f}; {f'{framework}, ' * bool(framework)}{where})"
        for where, framework, kind, mean, _ in groups
        if mean > 1
    ]
    lines = [
        "## In short",
        "",
        "Ratios are the time of scree over that of the fastest peer of the same workload, in the same run: **below 1 scree is",
        "faster**. The mean is geometric; the worst workload stands there by name, with the time that it loses or gains. What",
        "a call without options chooses is counted, and every peer but those that the tables list as compiled.",
        "",
        f"scree takes no longer in {sum(pair.ratio <= 1 for pair in pairs)} of {len(pairs)} workloads. In the mean it is slower in "
        f"{'; '.join(slower) or 'none of these'}.",
        "",
        "| measured on | framework | what | workloads | no slower | mean | best | worst |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(*group) for group in groups]
    lines += [
        "",
        f"Whole models of Hugging Face transformers, packed, beside the usual way (`{huggingface_table.BASE}`) and beside the fastest",
        "other way in which no sequence sees another. Padding is the places of the padded batches over the tokens: about what",
        "there is to win. `scree report` tells how much it is in your own data; where it is nearly 1, stay with what you have.",
        "",
        "| measured on | what | padding | times as fast as padded | times as fast as the fastest other |",
        "|---|---|---|---|---|",
    ]
    for name, part, rows in parts:
        if part == "huggingface":
            lines += _models(_link(name, part), rows)
    return lines


def _link(name: str, part: str) -> str:
    return f"[{part}: {name}](#{part}-{name})"


def _pairs(rows: list[dict[str, Any]], framework_of_all: str) -> list[Pair]:
    """Return the workloads that have both a time of ours and one of a peer."""
    found = []
    for (work, op, framework), group in groupby(rows, lambda row: (row["work"], row["op"], row.get("framework"))):
        timed = [row for row in group if "ms" in row and not row.get("compiled")]
        ours = [row["ms"] for row in timed if row["impl"].startswith("scree")]  # the first is the default
        peers = [
            row["ms"] for row in timed if not row["impl"].startswith("scree") and not row["impl"].endswith("floor")
        ]
        if ours and peers:
            found.append(Pair(framework or framework_of_all, _kind(op), f"{op}, {work}", ours[0], min(peers)))
    return found


def _kind(op: str) -> str:
    for kind, words in KINDS.items():
        if op.startswith(words):
            return kind
    raise ValueError(f"operation {op!r} is of no kind of {list(KINDS)}; add it to KINDS in benchmarks/summary.py")


def _together(pairs: list[Pair]) -> list[tuple[str, str, float, list[Pair]]]:
    """Return framework, kind, mean ratio and workloads of each kind, as they first come."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        found.setdefault((pair.framework, pair.kind), []).append(pair)
    return [
        (framework, kind, math.exp(sum(math.log(pair.ratio) for pair in group) / len(group)), group)
        for (framework, kind), group in found.items()
    ]


def _line(where: str, framework: str, kind: str, mean: float, group: list[Pair]) -> str:
    best, worst = min(group, key=lambda pair: pair.ratio), max(group, key=lambda pair: pair.ratio)
    n_met = sum(pair.ratio <= 1 for pair in group)
    return (
        f"| {where} | {framework} | {kind} | {len(group)} | {n_met} | **{mean:.2f}** | {best.ratio:.2f} | "
        f"{worst.ratio:.2f}, {_time(worst.ours - worst.peer)}: {worst.name} |"
    )


def _models(where: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    models = [row for row in rows if row["op"] != huggingface_table.COLLATE]
    for (work, op), group in groupby(models, lambda row: (row["work"], row["op"])):
        timed = [row for row in group if "ms" in row]
        ours = next(row for row in timed if row["impl"].startswith("scree packed"))
        base = next(row for row in timed if row["impl"] == huggingface_table.BASE)
        others = [row for row in timed if not row["impl"].startswith("scree") and not row["leaks"]]
        other = min(others, key=lambda row: row["ms"])
        lines.append(
            f"| {where} | {op}, {work} | {base['places'] / ours['tokens']:.2f} | **{base['ms'] / ours['ms']:.2f}** | "
            f"{other['ms'] / ours['ms']:.2f} ({other['impl']}) |"
        )
    return lines


def _time(ms: float) -> str:
    return f"{ms * 1e3:+.1f} us" if abs(ms) < 1 else f"{ms:+.2f} ms"
