"""What is shipped, what is public, what an import costs others, and the limits that the house keeps."""

import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import scree
from scree._backends import FRAMEWORKS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "scree"
LONGEST_FILE = 400  # lines

PUBLIC = {
    "scree": (
        "Array", "__version__", "bridges", "concat", "data", "from_cu_seqlens", "from_lengths", "from_padded", "hf", "kernels",
        "pack", "plot", "position_ids", "segment_ids", "to_padded", "unpack", "with_capacity",
    ),
    "scree.kernels": (
        "reference", "triton", "varlen_attention", "varlen_layernorm", "varlen_reduce", "varlen_rmsnorm", "varlen_rope",
        "varlen_softmax",
    ),
    "scree.bridges": (
        "from_arrow", "from_awkward", "from_hf_padded", "from_tensorflow", "from_torch_nested", "to_arrow", "to_awkward",
        "to_hf_padded", "to_tensorflow", "to_torch_nested", *(f"to_{name}" for name in FRAMEWORKS),
    ),
    "scree.data": (
        "Balance", "Corpus", "Plan", "TokenBatches", "balance", "collate", "from_datasets", "from_polars", "load",
        "pack_table", "plan_bins", "ray", "save", "to_datasets", "to_polars", "token_batches", "unpack_table",
    ),
    "scree.data.ray": ("Packed", "pack"),
    "scree.hf": ("assert_isolated", "collator", "model_kwargs", "pool", "register", "unflatten"),
}  # fmt: skip


def imported_by(program):
    """Return the top-level packages, beyond Python's own, that a program imports in a fresh interpreter."""
    watched = f"{program}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", watched], capture_output=True, text=True, timeout=240, check=True
    )
    bare = subprocess.run([sys.executable, "-I", "-c", watched.removeprefix(program)], capture_output=True, text=True,
                          timeout=240, check=True)  # fmt: skip
    return set(done.stdout.split()) - set(bare.stdout.split()) - set(sys.stdlib_module_names)


def test_importing_scree_imports_numpy_only():
    assert imported_by("import scree") - imported_by("import numpy") == {"scree"}


def test_scree_data_is_imported_when_it_is_asked_for():
    def loaded(program):
        watched = f"import sys\n{program}\nprint('scree.data' in sys.modules, 'zipfile' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-I", "-c", watched], capture_output=True, text=True, timeout=240, check=True
        )
        return done.stdout.split()

    assert loaded("import scree; assert 'data' in dir(scree) and 'pack' in dir(scree)") == ["False", "False"]
    for program in (
        "import scree; scree.data.plan_bins([1], 1)",
        "from scree import data",
        "from scree import *; data.save",
    ):
        assert loaded(program) == ["True", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'scree' has no attribute 'datas'"):
        scree.datas  # noqa: B018


def test_the_check_on_imports_can_fail():
    assert "_pytest" in imported_by("import pytest")


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module])
    for name in found.__all__:
        thing = getattr(found, name)
        assert name == "__version__" or inspect.getdoc(thing), f"{module}.{name} has no docstring"


def test_public_methods_have_docstrings():
    for name, member in vars(scree.Array).items():
        if not name.startswith("_"):
            assert inspect.getdoc(member), f"Array.{name} has no docstring"


def test_the_version_stands_in_one_place():
    (version,) = re.findall(r'__version__ = "(.*)"', (PACKAGE / "_version.py").read_text(encoding="utf-8"))
    assert scree.__version__ == version == importlib.metadata.version("scree")


def test_numpy_is_the_only_requirement():
    required = [r for r in importlib.metadata.requires("scree") or [] if "extra ==" not in r]
    assert [re.match(r"[a-z0-9-]+", r)[0] for r in required] == ["numpy"]


def test_every_framework_has_an_extra():
    extras = set(importlib.metadata.metadata("scree").get_all("Provides-Extra"))
    assert set(FRAMEWORKS) - {"numpy"} <= extras


def test_the_script():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="scree")
    module = PACKAGE.parent.joinpath(*script.module.split(".")).with_suffix(".py")
    assert f"def {script.attr}(" in module.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel and open it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT, check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    (path,) = folder.glob("scree-*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == sources
    assert "scree/py.typed" in shipped
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_no_file_is_too_long():
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "examples", "scripts")]
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".py", "") and path.is_file()
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_a_large_room_says_what_it_is_for():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        n_files = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert n_files <= 9 or (folder / "README.md").is_file(), f"{folder.name} has {n_files} files and no README.md"
