"""Fixtures of the suite: ``xp`` and the parametrisation over frameworks, dtypes, ops and implementations.

A test that names one of these arguments is run once for every combination of

- ``xp``: each framework of scree's ``FRAMEWORKS`` that can run here (``grad_xp``: those with gradients);
- ``floating``, ``integer``, ``any_dtype``: each dtype of that kind that the framework has;
- ``op``: each name in the test module's ``OPS``;
- ``implementation``: each implementation in the dispatch table that serves the op, framework, device and dtype.

``SCREE_REQUIRE=numpy,torch,...`` makes a missing package a failure of the whole run; without it, one is left out and
``test_backends.py`` shows one skip for it. ``SCREE_TORCH_DEVICE=cuda`` puts PyTorch's arrays there. With
``TRITON_INTERPRET=1`` the Triton kernels serve PyTorch on the CPU, where Triton's interpreter runs them.
``SCREE_IMPLEMENTATION=triton`` leaves of the parametrised tests those of that implementation.
"""

import importlib
import importlib.util
import os
import tempfile
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import pytest

import frameworks
from scree._backends import FRAMEWORKS

# JAX compiles an equal program of another function anew: this spares it that. To each worker its own: JAX writes in place.
COMPILED = tempfile.TemporaryDirectory(prefix="scree-tests-", ignore_cleanup_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

KINDS = {"floating": "floats", "integer": "integers", "any_dtype": "dtypes"}


def _load():
    if set(FRAMEWORKS) != set(frameworks.HARNESS):
        raise pytest.UsageError("tests/frameworks.py needs one harness for each name in scree's FRAMEWORKS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: frameworks.load(name, module) for name, (module, _) in FRAMEWORKS.items()}


LOADED = _load()
HERE = {name: found for name, found in LOADED.items() if not isinstance(found, str)}


def _missing_required():
    wanted = [n.strip() for n in os.environ.get("SCREE_REQUIRE", "").split(",") if n.strip()]
    reasons = []
    for name in wanted:
        if name in LOADED:
            if name not in HERE:
                reasons.append(LOADED[name])
            continue
        if name == "chromium":  # no package: tests/data/test_page.py looks for it
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    return reasons


def _interpret_triton():
    """Let the Triton kernels serve PyTorch on the CPU, where Triton's interpreter runs them (TRITON_INTERPRET=1).

    The interpreter's arithmetic in bfloat16 is wrong.
    """
    from scree.kernels import _dispatch, triton

    triton._load()  # as a PyTorch for GPUs has it done: a compiler cannot import
    for op, impls in _dispatch.TABLE.items():
        _dispatch.TABLE[op] = tuple(
            impl._replace(devices=("cpu", "cuda"), dtypes=tuple(d for d in impl.dtypes if d != "bfloat16"))
            if impl.module == ".triton"
            else impl
            for impl in impls
        )


def pytest_configure(config):
    """Fail the run when a required package is missing, and name the markers."""
    config.addinivalue_line("markers", "no_poison: fresh memory is left as the framework gives it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_triton()
        # The interpreter's own: what a kernel computes beside the mask is NumPy's to warn of.
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    reasons = _missing_required()
    if reasons:
        raise pytest.UsageError("SCREE_REQUIRE names what cannot be imported: " + "; ".join(reasons))


def implementations(op, xp, dtype=None):
    """Return the names of the table's implementations that say they serve this."""
    from scree.kernels import _dispatch

    found = []
    for impl in _dispatch.TABLE[op]:
        if impl.on_request or (impl.requires is not None and importlib.util.find_spec(impl.requires) is None):
            continue
        if impl.backends is not None and xp.name not in impl.backends:
            continue
        if impl.devices is not None and xp.device_kind not in impl.devices:
            continue
        if dtype is not None and impl.dtypes is not None and dtype not in impl.dtypes:
            continue
        if os.environ.get("SCREE_IMPLEMENTATION") not in (None, impl.name):
            continue
        found.append(impl.name)
    return found


def pytest_generate_tests(metafunc):
    """Parametrise jointly, so that a dtype or implementation is drawn only where the framework has it."""
    asked = metafunc.fixturenames
    frame = next((n for n in ("xp", "grad_xp") if n in asked), None)
    if frame is None:
        return
    kind = next((k for k in KINDS if k in asked), None)
    ops = list(getattr(metafunc.module, "OPS", (None,)))
    drawn = {kind} | ({"op"} if ops[0] is not None else set()) | {"implementation"}
    if "op" not in asked:
        ops = ops[:1]
    names = [frame] + [n for n in (kind, "op", "implementation") if n in drawn and n in asked]
    rows, ids = [], []
    for xp in HERE.values():
        if frame == "grad_xp" and not xp.has_gradients:
            continue
        for dtype in getattr(xp, KINDS[kind]) if kind else [None]:
            for op in ops:
                for impl in implementations(op, xp, dtype) if "implementation" in asked else [None]:
                    row = [xp] + [v for n, v in ((kind, dtype), ("op", op), ("implementation", impl)) if n in names]
                    rows.append(row)
                    ids.append("-".join(str(v) for v in row))
    metafunc.parametrize(names, rows, ids=ids)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of gradients where no framework here has any, instead of skipping each."""
    empty = [
        i for i in items if any("empty parameter set" in m.kwargs.get("reason", "") for m in i.iter_markers("skip"))
    ]
    if "SCREE_IMPLEMENTATION" in os.environ:
        empty += [i for i in items if "implementation" not in i.fixturenames and not i.get_closest_marker("triton")]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [i for i in items if i not in set(empty)]


def _poisoned(make, fill):
    def fresh(*args, **kwargs):
        return fill(make(*args, **kwargs))

    return fresh


def _fill_numpy(x):
    kind = x.dtype.kind
    if kind in "iu":
        x.fill(np.iinfo(x.dtype).max - 5)
    elif kind in "fcV":  # V: bfloat16 of ml_dtypes
        try:
            x.fill(np.nan)
        except (TypeError, ValueError):  # a structured or raw void dtype holds no NaN
            return x
    return x


def _fill_torch(x):
    import torch

    if x.device.type == "meta":
        return x
    if x.is_floating_point() or x.is_complex():
        with torch.no_grad():
            return x.fill_(float("nan"))
    if x.dtype in (torch.bool,):
        return x
    return x.fill_(torch.iinfo(x.dtype).max - 5)


@pytest.fixture(autouse=True)
def poison(request, monkeypatch):
    """Fill fresh memory with NaN (integers: a huge number), so that an element nobody wrote cannot pass."""
    if request.node.get_closest_marker("no_poison"):
        return
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, _poisoned(getattr(np, name), _fill_numpy))
    if "torch" in HERE:
        torch = HERE["torch"].module
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name), _fill_torch))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty, _fill_torch))
    if "cupy" in HERE:
        cupy = HERE["cupy"].module
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(cupy, name, _poisoned(getattr(cupy, name), _fill_numpy))


@pytest.fixture(scope="session")
def device():
    """Return the device that Triton's kernels run on here: the CPU, in Triton's interpreter, or a GPU."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    return "cuda"
