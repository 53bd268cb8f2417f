"""The table of what was measured of `scree.data`."""

from __future__ import annotations

from itertools import groupby
from typing import Any


def table(measured: dict[str, Any]) -> str:
    """Draw the table: every contender, and ours beside the fastest peer of the same work."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    lines = [
        f"{measured.get('how', 'Medians.')} {measured['device']}; {measured['system']}; {versions}; commit {measured['commit'][:10]}{changed}. "
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
