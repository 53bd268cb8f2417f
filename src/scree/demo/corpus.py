"""The docstrings of the standard library, read by parsing its sources and never by importing them."""

from __future__ import annotations

import ast
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Folders that are not the library: what others installed, and test suites with files that are wrong on purpose.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests"}
)
# The one module whose users know it by another name.
_KNOWN_AS = {os.path.__name__: "os.path"}

_Documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    """One documented thing: its qualified name, such as `os.path.join`, and its text."""

    name: str
    text: str


class Skipped(NamedTuple):
    """A file that could not be read, and why."""

    path: Path
    reason: str


class Corpus(NamedTuple):
    """The docstrings in the order of their files and lines, how many files were read, and which could not be."""

    docstrings: tuple[Docstring, ...]
    n_files: int
    skipped: tuple[Skipped, ...]


def stdlib_folder() -> Path:
    """Return the folder with the sources of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def find_sources(root: Path) -> list[Path]:
    """List the Python files below `root`, sorted by path, without those in `SKIPPED_FOLDERS`."""
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found.extend(Path(folder, name) for name in files if name.endswith(".py"))
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def read(root: Path | None = None, on_file: Callable[[int, int], None] | None = None) -> Corpus:
    """Read every docstring of the modules, classes, methods and functions below a folder.

    Parameters
    ----------
    root : Path, optional
        The folder; unless said, that of the standard library.
    on_file : callable, optional
        Called after every file with how many were read, and how many there are.

    Returns
    -------
    Corpus
        The same for the same files, in the same order. A text that occurs again is left out, so that no two are equal.

    Raises
    ------
    ValueError
        There is no docstring below `root`: a Python that came without its sources, say.
    """
    root = stdlib_folder() if root is None else root
    sources = find_sources(root)
    by_text: dict[str, Docstring] = {}
    skipped: list[Skipped] = []
    for n_read, path in enumerate(sources, 1):
        try:
            tree = _parse(path)
        # ValueError: an unknown encoding or a byte that it does not have; RecursionError: nested too deeply to parse.
        except (OSError, SyntaxError, ValueError, RecursionError) as error:
            skipped.append(Skipped(path, f"{type(error).__name__}: {error}"))
        else:
            for docstring in _docstrings(tree, _module_name(path.relative_to(root))):
                by_text.setdefault(docstring.text, docstring)
        if on_file is not None:
            on_file(n_read, len(sources))
    if not by_text:
        raise ValueError(f"corpus: found no docstring in {len(sources)} files below {root}; needs Python sources")
    return Corpus(tuple(by_text.values()), len(sources), tuple(skipped))


def spread(docstrings: tuple[Docstring, ...], n: int) -> tuple[Docstring, ...]:
    """Return `n` docstrings at even distances, the same ones every time; all of them where there are no more."""
    if n < 1:
        raise ValueError(f"n: got {n}; needs 1 or more")
    total = len(docstrings)
    return docstrings if n >= total else tuple(docstrings[i * total // n] for i in range(n))


def _parse(path: Path) -> ast.Module:
    with tokenize.open(path) as file:
        source = file.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\d", which the authors of the file have to mend
        return ast.parse(source)


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
    return _KNOWN_AS.get(name, name)


def _docstrings(tree: ast.Module, module: str) -> Iterator[Docstring]:
    text = ast.get_docstring(tree)
    if text:
        yield Docstring(module, text)
    yield from _documented(tree.body, module)


def _documented(body: list[ast.stmt], prefix: str) -> Iterator[Docstring]:
    for node in body:
        if isinstance(node, _Documented):
            name = f"{prefix}.{node.name}"
            text = ast.get_docstring(node)
            if text:
                yield Docstring(name, text)
            if isinstance(node, ast.ClassDef):  # what a function defines inside has no name outside
                yield from _documented(node.body, name)
        else:
            for branch in ("body", "orelse", "finalbody"):  # definitions under if, try and with
                yield from _documented(getattr(node, branch, []), prefix)
            for handler in getattr(node, "handlers", []):
                yield from _documented(handler.body, prefix)
