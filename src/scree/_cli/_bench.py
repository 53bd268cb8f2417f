"""`scree bench`: the kernels here, on what is installed here, beside what one would write without them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import scree
from scree import bench
from scree._backends import FRAMEWORKS

SECONDS, QUICK_SECONDS = 4.0, 0.5  # of rounds for each contest
QUICK_TOTAL = 75.0  # seconds from the start on after which a short run begins no further contest
_INTERRUPTED = 130  # the exit status that shells give to Ctrl-C
_BAR = 40  # characters of the longest bar
_OPTIONAL = {"numba": "numba loops", "awkward": "awkward"}  # packages of peers -> what they bring


def run(names: list[str], quick: bool, seconds: float | None, output: Path | None) -> None:
    """Measure, and print the chart and the table; save the rows where that is asked for."""
    deadline = time.monotonic() + QUICK_TOTAL if quick and seconds is None else math.inf
    _check_names(names)
    if output is not None:
        _check_output(output)
    each = (QUICK_SECONDS if quick else SECONDS) if seconds is None else seconds
    if not math.isfinite(each):
        raise typer.BadParameter(f"got {each}; needs a number", param_hint="--seconds")
    console = Console()
    contests, missing = _collect(list(dict.fromkeys(names)) or list(bench.FRAMEWORKS), asked=bool(names))
    contests = _in_turn([contest for contest in contests if contest.quick]) if quick else contests
    if not contests:
        _fail("found no framework to measure: " + "; ".join(missing))
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows has none
    rows, stopped, late = _measure(console, contests, each, deadline)
    if not rows:
        _fail("stopped before the first row was measured", _INTERRUPTED)
    console.print(Text(f"scree {scree.__version__} on {_machine()}", style="bold"))
    console.print(_chart(rows))
    console.print(_table(rows))
    for note in (*_notes(rows, missing, quick, busy), *_late(late)):
        console.print(Text(note, style="dim"))
    if output is not None:
        _save(output, rows)
        console.print(Text(f"Saved {output}.", style="dim"))
    if stopped:
        _fail(f"stopped after {sum(1 for _ in _contests(rows))} of {len(contests)} rows", _INTERRUPTED)


def _fail(message: str, code: int = 1) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"scree bench: {message}", style="red"))
    raise typer.Exit(code)


def _check_names(names: list[str]) -> None:
    for name in names:
        if name not in bench.FRAMEWORKS:
            known = ", ".join(bench.FRAMEWORKS)
            raise typer.BadParameter(f"got {name!r}; needs one of {known}", param_hint="--framework")


def _check_output(path: Path) -> None:
    """Refuse, before the work, a path to which nothing can be written after it."""
    problem = None
    if path.suffix.lower() != ".json":
        problem = "needs a name that ends in .json"
    elif path.is_dir():
        problem = "is a folder; needs a file"
    elif not path.absolute().parent.is_dir():
        problem = f"needs a folder that exists; {path.absolute().parent} does not"
    elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        problem = "needs a place that may be written to"
    if problem is not None:
        raise typer.BadParameter(f"got {str(path)!r}; {problem}", param_hint="--output")


def _collect(names: list[str], *, asked: bool) -> tuple[list[bench.Contest], list[str]]:
    """The contests of the frameworks that are here, and of each other one why it is left out."""
    found: list[bench.Contest] = []
    missing: list[str] = []
    for name in names:
        problem = None
        if importlib.util.find_spec(FRAMEWORKS[name][0].partition(".")[0]) is None:
            problem = f'{name} is not installed: pip install "scree[{name}]"'
        else:
            try:
                found += bench.contests(name)
            except (ImportError, OSError) as error:  # OSError: a shared library of the framework's that is missing
                problem = f'{name} cannot be imported ({error}): pip install "scree[{name}]"'
        if problem is not None and asked:
            _fail(problem)
        if problem is not None:
            missing.append(problem)
    return found, missing


def _in_turn(contests: list[bench.Contest]) -> list[bench.Contest]:
    """The first of each framework, then the second of each: what time is left for is not the last framework's to lose."""
    turns: Counter[str] = Counter()
    turn: list[int] = []
    for contest in contests:
        turn.append(turns[contest.framework])
        turns[contest.framework] += 1
    return [contests[i] for i in sorted(range(len(contests)), key=turn.__getitem__)]


def _measure(
    console: Console, contests: list[bench.Contest], seconds: float, deadline: float
) -> tuple[list[dict[str, Any]], bool, list[bench.Contest]]:
    """The rows, by framework; whether the user stopped it, who gets those of the contests that were over; what came too late.

    What time there is until the deadline is shared among the contests that are left, each of which takes up to `seconds`.
    """
    rows: list[dict[str, Any]] = []
    stopped = False
    late: list[bench.Contest] = []
    columns = (TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("what this machine can do", total=len(contests))
        try:
            rates = bench.measured_rates()
            for i, contest in enumerate(contests):
                left = deadline - time.monotonic()
                if left <= 0 and rows:
                    late = contests[i:]
                    break
                progress.update(task, description=f"{contest.framework}: {contest.op}, {contest.work}")
                each = min(seconds, max(left, 0.0) / (len(contests) - i))
                try:
                    rows += list(bench.measure(contest, rates, each))  # all of a contest, or nothing
                except AssertionError as error:
                    _fail(
                        f"{contest.framework}, {contest.op}: a contender computes something else than scree: "
                        f"{' '.join(str(error).split())}"
                    )
                progress.advance(task)
        except KeyboardInterrupt:
            stopped = True
    rows.sort(key=lambda row: bench.FRAMEWORKS.index(row["framework"]))
    return rows, stopped, late


def _late(contests: list[bench.Contest]) -> Iterator[str]:
    """Say what the time was too short for."""
    if contests:
        rows = "; ".join(f"{contest.framework} {contest.op}" for contest in contests)
        yield (
            f"Left out, as {QUICK_TOTAL:g} seconds were over: {rows}. With --seconds {QUICK_SECONDS:g} all rows are "
            "measured, however long that takes."
        )


def _contests(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, float, dict[str, float]]]:
    """Framework, op, workload, floor and the milliseconds of every contender, ours first."""
    for (framework, op, work), group in groupby(rows, lambda row: (row["framework"], row["op"], row["work"])):
        ms = {row["impl"]: row["ms"] for row in group}
        yield framework, op, work, ms.pop("floor"), ms


def _peers(ms: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in ms.items() if name != "scree"}


def _chart(rows: list[dict[str, Any]]) -> Group:
    """Bars as long as the contenders take, each contest on a scale of its own."""
    lines: list[Text] = []
    for framework, op, work, _, ms in _contests(rows):
        lines.append(Text(f"\n{framework}: {op}, {work}", style="bold"))
        longest, name_width = max(ms.values()), max(map(len, ms))
        for name, value in ms.items():
            bar = "█" * max(1, round(_BAR * value / longest))
            style = "green" if name == "scree" else "blue"
            lines.append(Text.assemble(f"  {name:<{name_width}}  ", (f"{bar:<{_BAR}}", style), f"  {_time(value)}"))
    return Group(*lines, Text(""))


def _table(rows: list[dict[str, Any]]) -> Table:
    """Two lines a contest, which fit into 80 columns."""
    table = Table(
        title="Ours, and the fastest of the others", title_justify="left", title_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("op, workload")
    table.add_column("scree", justify="right", no_wrap=True)
    table.add_column("fastest other")
    table.add_column("scree /\nother", justify="right")
    table.add_column("floor\n[1]", justify="right", no_wrap=True)
    last = ""
    for framework, op, work, floor, ms in _contests(rows):
        if framework != last:
            table.add_section()
            table.add_row(Text(framework, style="bold"))
            last = framework
        peers = _peers(ms)
        best = min(peers, key=lambda name: peers[name])
        ratio = ms["scree"] / peers[best]
        table.add_row(
            Text.assemble(op, "\n", (work, "dim")),
            _time(ms["scree"]),
            Text.assemble(_time(peers[best]), "\n", (best, "dim")),
            Text(f"{ratio:.2f}", style="green" if ratio <= 1.0 else "yellow"),
            _time(floor),
        )
    return table


def _notes(rows: list[dict[str, Any]], missing: list[str], quick: bool, busy: float) -> Iterator[str]:
    yield (
        "[1] What the matrix products alone would take at the rate of NumPy's, or reading and writing alone at the rate "
        "of a copy."
    )
    ratios = [ms["scree"] / min(_peers(ms).values()) for *_, ms in _contests(rows)]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    ahead = sum(ratio <= 1.0 for ratio in ratios)
    yield (
        f"scree is no slower than the fastest other in {ahead} of {len(ratios)} rows; it takes {mean:.2f} of its time, "
        "in the geometric mean."
    )
    yield "Medians of rounds in which each contender ran once; results were compared first. Frameworks use all threads."
    if busy > 0.5 * (os.cpu_count() or 1):
        yield f"The load of this machine was {busy:.1f} at the start: something else is running, and the times say less."
    yield from (f"Left out: {problem}" for problem in missing)
    for package, brings in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield f"Left out: {brings}: pip install {package}"
    if quick:
        yield "--quick: without it there are more workloads, training steps, new lengths at every call, and more rounds."


def _machine() -> str:
    return f"{bench.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    versions = {name: _version(name) for name in ("numpy", *bench.FRAMEWORKS) if importlib.util.find_spec(name)}
    whole = {"scree": scree.__version__, "machine": _machine(), "versions": versions, "rows": rows}
    try:
        path.write_text(json.dumps(whole, indent=1) + "\n")
    except OSError as error:
        _fail(f"the results could not be saved: {error}")


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _time(ms: float) -> str:
    return f"{ms * 1e3:.1f} us" if ms < 1 else f"{ms:.2f} ms"
