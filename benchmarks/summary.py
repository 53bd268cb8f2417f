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

MODELS = "huggingface"
"""The part that has whole models."""
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


class Group(NamedTuple):
    """The workloads of one framework and kind that were measured together."""

    title: str  # a link to their table
    on: str  # the file of results
    mean: float  # of the ratios, geometric
    pairs: list[Pair]

    @property
    def n_no_slower(self) -> int:
        """On how many of them scree takes no longer."""
        return sum(pair.ratio <= 1 for pair in self.pairs)


def summary(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Draw the lines of the summary from the parts of every file of results, by the file's name."""
    groups = [group for name, parts in results.items() for group in _groups(name, parts)]
    n_no_slower, n = sum(group.n_no_slower for group in groups), sum(len(group.pairs) for group in groups)
    slower = [f"{group.title} on {group.on} ({group.mean:.2f})" for group in groups if group.mean > 1]
    lines = [
        "## In short",
        "",
        "Ratios are the time of scree over that of the fastest peer of the same workload, in the same run: **below 1 scree is",
        "faster**. The mean is geometric; the worst workload stands there by name, with the time that it loses or gains. What",
        "a call without options chooses is counted, and every peer but those that the tables list as compiled.",
        "",
        f"scree takes no longer in {n_no_slower} of {n} workloads. In the mean it is slower in "
        f"{', '.join(slower) or 'none of these'}.",
    ]
    for name in results:
        lines += ["", f"| on {name} | mean | no slower | worst |", "|---|---|---|---|"]
        lines += [_line(group) for group in groups if group.on == name]
    lines += [
        "",
        f"Whole models of Hugging Face transformers, packed, beside the usual way (`{huggingface_table.BASE}`) and beside the fastest",
        "other way in which no sequence sees another. Padding is the places of the padded batches over the tokens: about what",
        "there is to win. `scree report` tells how much it is in your own data; where it is nearly 1, stay with what you have.",
        "",
        "| model | padding | times as fast as padded | times as fast as the fastest other |",
        "|---|---|---|---|",
    ]
    for name, parts in results.items():
        lines += _models(name, parts.get(MODELS, {"rows": []})["rows"])
    return lines


def _groups(name: str, parts: dict[str, dict[str, Any]]) -> list[Group]:
    """Return what is measured in a file of results, but the models, as it first comes there."""
    found: dict[str, list[Pair]] = {}
    for part, measured in parts.items():
        if part != MODELS:
            for pair in _pairs(measured["rows"], FRAMEWORK.get(part, "")):
                what = f"{pair.kind}, {pair.framework}" if pair.framework else pair.kind
                found.setdefault(f"[{what}](#{part}-{name})", []).append(pair)
    return [
        Group(title, name, math.exp(sum(math.log(pair.ratio) for pair in pairs) / len(pairs)), pairs)
        for title, pairs in found.items()
    ]


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


def _line(group: Group) -> str:
    worst = max(group.pairs, key=lambda pair: pair.ratio)
    return (
        f"| {group.title} | **{group.mean:.2f}** | {group.n_no_slower} of {len(group.pairs)} | "
        f"{worst.ratio:.2f}, {_time(worst.ours - worst.peer)}: {worst.name} |"
    )


def _models(name: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    models = [row for row in rows if row["op"] != huggingface_table.COLLATE]
    for (work, op), group in groupby(models, lambda row: (row["work"], row["op"])):
        timed = [row for row in group if "ms" in row]
        ours = next(row for row in timed if row["impl"].startswith("scree packed"))
        base = next(row for row in timed if row["impl"] == huggingface_table.BASE)
        others = [row for row in timed if not row["impl"].startswith("scree") and not row["leaks"]]
        other = min(others, key=lambda row: row["ms"])
        lines.append(
            f"| [{op}, {work}](#{MODELS}-{name}), {name} | {base['places'] / ours['tokens']:.2f} | **{base['ms'] / ours['ms']:.2f}** | "
            f"{other['ms'] / ours['ms']:.2f} ({other['impl']}) |"
        )
    return lines


def _time(ms: float) -> str:
    return f"{ms * 1e3:+.1f} us" if abs(ms) < 1 else f"{ms:+.2f} ms"
