"""`scree report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scree.data._lengths import Lengths, from_file, from_stream
from scree.data._page import page, short, size
from scree.data._saving import replacing
from scree.data._waste import Waste, measure

NULLS = ("error", "drop")


def run(
    file: str,
    column: str | None,
    batch_size: int,
    capacity: int | None,
    bytes_each: int | None,
    nulls: str,
    seed: int,
    output: Path,
) -> None:
    """Measure what padding wastes on the lengths of a column, print it and write the page."""
    if nulls not in NULLS:
        raise typer.BadParameter(f"got {nulls!r}; needs one of {', '.join(NULLS)}", param_hint="--nulls")
    if output.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"got {str(output)!r}; needs a name that ends in .html", param_hint="--output")
    if file == "-" and column is not None:
        raise typer.BadParameter(
            f"got {column!r}; needs a file, as standard input has lengths and no columns", param_hint="--column"
        )
    found = _read(file, column, nulls == "drop")
    name = "standard input" if file == "-" else file
    if len(found.lengths) == 0:
        _fail(f"{name} has no sequences; there is nothing to measure")
    waste = measure(found.lengths, batch_size, capacity, seed)
    item_bytes = found.item_bytes if bytes_each is None else bytes_each
    console = Console()
    title = f"What padding wastes in {name}" + (f", {column}" if column else "")
    console.print(Text(title, style="bold"))
    console.print(_facts(waste, found))
    console.print(_table(waste, item_bytes))
    notes = _notes(waste, found, item_bytes, bytes_each is not None)
    for note in (*(f"{strategy.name}: {strategy.how}." for strategy in waste.strategies), *notes):
        console.print(Text(note, style="dim"))
    try:
        with replacing("report", output) as opened:
            opened.write(page(waste, title, found.unit, item_bytes, notes).encode())
    except OSError as error:
        _fail(str(error.strerror if error.errno else error).removeprefix("report: "))
    console.print(Text(f"Saved {output}: the same with charts.", style="dim"))


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"scree report: {message}", style="red"))
    raise typer.Exit(1)


def _read(file: str, column: str | None, drop_nulls: bool) -> Lengths:
    try:
        return from_stream(sys.stdin) if file == "-" else from_file(Path(file), column, drop_nulls)
    except (ValueError, TypeError, OSError, ImportError) as wrong:
        _fail(str(wrong))


def _facts(waste: Waste, found: Lengths) -> str:
    lengths = waste.lengths
    return (
        f"{len(lengths):,} sequences, {waste.tokens:,} {found.unit}; lengths {lengths.min():,} to {lengths.max():,}, "
        f"median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}"
    )


def _table(waste: Waste, item_bytes: int) -> Table:
    table = Table()
    table.add_column("batches")
    for heading in ("places", "padding", "share", "bytes", "pairs", "places\nsaved", "pairs\nsaved"):
        table.add_column(heading, justify="right")
    for strategy in waste.strategies:
        wasted = waste.wasted(strategy)
        table.add_row(
            strategy.name, short(strategy.places), short(wasted), f"{waste.wasted_share(strategy):.1%}",
            size(wasted * item_bytes), short(strategy.pairs), f"{waste.saved_places(strategy):.1%}",
            f"{waste.saved_pairs(strategy):.1%}",
        )  # fmt: skip
    return table


def _notes(waste: Waste, found: Lengths, item_bytes: int, asked: bool) -> list[str]:
    source = "as --bytes says" if asked else "as the data has them; --bytes says what one takes in your model"
    notes = [
        f"bytes: of the padding, {item_bytes} each, {source}.",
        "pairs: of a query and a key that attention computes, for each head and layer.",
        "saved: of what random batches take.",
    ]
    if found.unit != "tokens":
        notes.append(f"The column holds texts, whose {found.unit} were counted; tokens are fewer.")
    if waste.plan.n_split:
        notes.append(f"{waste.plan.n_split:,} sequences are above {waste.capacity:,} and were cut to fit the bins.")
    if found.nulls:
        notes.append(f"{found.nulls:,} null rows were left out.")
    return notes
