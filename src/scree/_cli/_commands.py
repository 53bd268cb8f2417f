"""The commands and their options. What they do stands in one file a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import scree

from . import _bench, _demo, _doctor, _report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scree {scree.__version__}")
        raise typer.Exit


@app.callback(help="Ragged arrays for every framework.")
def _scree(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command(help="Embed Python's own documentation with a real model, padded and packed, and compare the two.")
def demo(
    question: Annotated[
        str | None, typer.Argument(help="Find the five docstrings nearest to it.", show_default=False)
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help=f"The framework: {', '.join(_demo.BACKENDS)}. Default: the first of these that is installed."
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="How many docstrings, spread evenly over all of them, or 'all'. "
            "Default: what takes a minute or two on two CPU cores."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to save the picture (.png, .svg or .pdf).")] = Path(
        "scree-demo.png"
    ),
    hf: Annotated[
        bool,
        typer.Option(
            "--hf", help='Through Hugging Face transformers, packed with attn_implementation="scree"; on torch.'
        ),
    ] = False,
) -> None:
    _demo.run(question, backend, texts, output, hf)


@app.command(
    help="Measure the kernels on each framework that is installed here, beside what people write by hand with it, and "
    "print a chart and a table. Ctrl-C ends it with what was measured until then."
)
def bench(
    framework: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(_bench.bench.FRAMEWORKS)}; may be given several times. Default: all that are installed.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, in about a minute.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="SECONDS",
            help="How long to repeat each row of the table, 5 rounds at least. "
            f"Default: {_bench.SECONDS:g}; with --quick up to {_bench.QUICK_SECONDS:g}, and no row begins after "
            f"{_bench.QUICK_TOTAL:g}.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save all times there too (.json).", show_default=False)
    ] = None,
) -> None:
    _bench.run(framework or [], quick, seconds, output)


@app.command(help="List the frameworks, devices and implementations found here, and why each missing one is missing.")
def doctor() -> None:
    _doctor.run()


@app.command(
    help="Print what padding wastes in your own data, for each way to make batches, and write a page with charts."
)
def report(
    file: Annotated[
        str,
        typer.Argument(
            help="Parquet, Arrow, jsonl, what scree.data.save wrote, a folder of Parquet or of datasets' save_to_disk; "
            "or - for lengths on standard input."
        ),
    ],
    column: Annotated[
        str | None, typer.Option(help="Its lists, texts or lengths. May be left out where only one has lists.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 64,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a bin. Default: the longest sequence.", show_default=False)
    ] = None,
    bytes_each: Annotated[
        int | None,
        typer.Option(
            "--bytes", min=1, help="Bytes of a token in your model. Default: in the data.", show_default=False
        ),
    ] = None,
    nulls: Annotated[str, typer.Option(help="What a null row is: error, or drop to leave it out.")] = "error",
    seed: Annotated[int, typer.Option(min=0, help="Draws the random batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to save the page (.html).")] = Path("scree-report.html"),
) -> None:
    _report.run(file, column, batch_size, capacity, bytes_each, nulls, seed, output)
