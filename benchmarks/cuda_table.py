"""The table of what was measured on a CUDA device."""

from __future__ import annotations

from itertools import groupby
from typing import Any


def table(measured: dict[str, Any]) -> str:
    """Draw a line for each of ours, with the peers beside it from the fastest on; and what was left out, and why."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    changed = " with changes" if measured["changed"] else ""
    ceilings = measured["ceilings"]
    lines = [
        f"Medians of interleaved rounds, time on the device, inputs and outputs out of cache. {measured['device']}, driver "
        f"{measured['driver']}; {measured['system']}; {versions}; commit {measured['commit'][:10]}{changed}. "
        f"{measured.get('remark', '')}".rstrip(),
        "",
        f"Measured in the same run: a copy moves {ceilings['copy_tbs']:.2f} TB/s, read and written; a bf16 product of "
        f"matrices makes {ceilings['matmul_tflops']:.0f} TFLOP/s. Host is the time in which Python issues a call, in "
        "brackets that of the function that takes tensors. Error is relative, against float32 or wider.",
        "",
        "| operation | workload | implementation | time | quartiles | rate | of the ceiling | to the fastest peer | host | "
        "error | peers |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    absent: dict[str, list[str]] = {}
    for (op, work), group in groupby(measured["rows"], lambda row: (row["op"], row["work"])):
        rows = list(group)
        for row in rows:
            if "left_out" in row:
                absent.setdefault(f"{row['impl']}: {row['left_out']}", []).append(f"{op}, {work}")
        timed = [row for row in rows if "ms" in row]
        peers = sorted((row for row in timed if not _is_ours(row)), key=lambda row: row["ms"])
        for row in timed:
            if _is_ours(row):
                lines.append(f"| {op} | {work} | {_ours(row, peers, ceilings)} |")
        if peers and not any(map(_is_ours, timed)):
            lines.append(f"| {op} | {work} | none | | | | | | | | {_list(peers)} |")
    if absent:
        lines += ["", "Left out:", ""]
        lines += [f"- {reason} ({_rows(cells)})" for reason, cells in absent.items()]
    return "\n".join(lines)


def _rows(cells: list[str]) -> str:
    return cells[0] if len(cells) == 1 else f"{len(cells)} rows, the first: {cells[0]}"


def _is_ours(row: dict[str, Any]) -> bool:
    return row["impl"].startswith("scree")


def _ours(row: dict[str, Any], peers: list[dict[str, Any]], ceilings: dict[str, float]) -> str:
    if "tflops" in row:
        rate, share = f"{row['tflops']:.0f} TFLOP/s", row["tflops"] / ceilings["matmul_tflops"]
    else:
        rate, share = f"{row['tbs']:.2f} TB/s", row["tbs"] / ceilings["copy_tbs"]
    host = f"{row['host_us']:.0f} us"
    if "host_us_tensors" in row:
        host += f" ({row['host_us_tensors']:.0f} us)"
    ratio = f"{row['ms'] / peers[0]['ms']:.2f}" if peers else ""
    cells = [
        row["impl"],
        _time(row["ms"]),
        f"{_time(row['low'])} to {_time(row['high'])}",
        rate,
        f"{100 * share:.0f}%",
        ratio,
        host,
        f"{row['err']:.1e}",
        _list(peers),
    ]
    return " | ".join(cells)


def _list(peers: list[dict[str, Any]]) -> str:
    return ", ".join(f"{peer['impl']} {_time(peer['ms'])}" for peer in peers)


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms"
