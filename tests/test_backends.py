"""The seam: finding a framework, importing none too early, and each backend's functions against NumPy's."""

import inspect
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import conftest
import scree
from expect import raises
from scree import _backends
from scree._backends import _protocol

PROTOCOL = [n for n, f in vars(_protocol.Backend).items() if inspect.isfunction(f) and not n.startswith("_")]


@pytest.mark.parametrize("name", list(_backends.FRAMEWORKS))
def test_every_framework_is_here(name):
    if isinstance(conftest.LOADED[name], str):
        pytest.skip(conftest.LOADED[name])
    assert conftest.LOADED[name].name == name


def run(program, **environment):
    """Run a program in a fresh interpreter and return what it printed."""
    import os

    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:scree", "-c", textwrap.dedent(program)],
        capture_output=True, text=True, env=env, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_scree_imports_no_framework():
    program = """
        import sys
        import numpy as np
        before = set(sys.modules)
        import scree, scree.kernels, scree.bridges
        arr = scree.pack([np.ones((2, 3)), np.ones((1, 3))])
        scree.unpack(scree.from_padded(*scree.to_padded(arr)))
        scree.kernels.varlen_rmsnorm(arr)
        scree.kernels.varlen_softmax(arr)
        roots = {m.partition(".")[0] for m in set(sys.modules) - before}
        heavy = {"torch", "jax", "jaxlib", "mlx", "cupy", "pyarrow", "awkward", "tensorflow", "triton", "numba",
                 "typer", "rich", "matplotlib", "transformers", "tokenizers", "ml_dtypes"}
        print(sorted(roots & heavy))
    """
    assert run(program).strip() == "[]"


def test_the_proof_above_can_fail():
    program = """
        import sys
        before = set(sys.modules)
        import typing, ml_dtypes
        print(sorted({m.partition(".")[0] for m in set(sys.modules) - before} & {"ml_dtypes"}))
    """
    if "jax" in conftest.HERE:  # it brings ml_dtypes
        assert run(program).strip() == "['ml_dtypes']"


def test_numpy_alone_is_enough():
    program = """
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {"torch", "jax", "jaxlib", "mlx", "cupy", "ml_dtypes", "pyarrow", "awkward",
                                              "tensorflow", "triton"}:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
                return None

        sys.meta_path.insert(0, Absent())
        import numpy as np, scree
        from scree import kernels
        arr = scree.pack([np.ones((2, 4, 8), np.float32), np.ones((0, 4, 8), np.float32)])
        assert scree.to_padded(arr)[0].shape == (2, 2, 4, 8)
        kernels.varlen_attention(arr, arr, arr, causal=True)
        kernels.varlen_layernorm(arr)
        kernels.varlen_reduce(arr, "max")
        try:
            scree.Array([1], [0, 1])
        except TypeError as error:
            print("values" in str(error))
    """
    assert run(program).strip() == "True"


def test_each_array_finds_its_backend(xp):
    backend = _backends.backend_of(xp.array([1.0]))
    assert backend is _backends.load(xp.name)
    assert backend.NAME == xp.name
    assert backend.__name__ == f"scree._backends.{xp.name}"


def test_subclasses_and_tracers_find_theirs(grad_xp):
    xp = grad_xp
    if xp.name == "torch":
        parameter = xp.module.nn.Parameter(xp.module.ones(2))
        assert _backends.backend_of(parameter).NAME == "torch"
    if xp.name == "jax":
        seen = []
        xp.module.jit(lambda x: seen.append(_backends.backend_of(x).NAME) or x)(xp.array([1.0]))
        assert seen == ["jax"]


@pytest.mark.parametrize(
    "odd",
    [None, 1, 1.0, "a", [1.0], (1,), {}, object(), np.float32(1), range(3), b"ab"],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array_is_a_type_error(odd):
    with pytest.raises(TypeError) as caught:
        _backends.backend_of(odd)
    assert "\n" not in str(caught.value)


def test_every_backend_has_the_whole_protocol(xp):
    backend = _backends.load(xp.name)
    for name in PROTOCOL:
        have = inspect.signature(getattr(backend, name)).parameters
        want = [p for p in inspect.signature(getattr(_protocol.Backend, name)).parameters if p != "self"]
        assert list(have)[: len(want)] == want, name


# Each function of the protocol, against NumPy.


@pytest.fixture
def backend(xp):
    """The backend module."""
    return _backends.load(xp.name)


def test_making(xp, backend, any_dtype):
    like = xp.array([1], any_dtype)
    data = xp.to_np(xp.array([1, 0, 1], any_dtype)) if any_dtype != "bfloat16" else np.array([1, 0, 1], np.float32)
    made = backend.asarray(data, like)
    assert xp.is_array(made)
    np.testing.assert_array_equal(xp.to_np(made), data)
    if any_dtype != "bfloat16":
        assert xp.dtype_of(made) == any_dtype
    for n in (0, 5):
        counted = backend.arange(n, like)
        assert xp.to_np(counted).tolist() == list(range(n))
        assert xp.dtype_of(counted) == "int32"
    full = backend.full((2, 0), 1, like)
    assert tuple(full.shape) == (2, 0)
    full = backend.full((2, 3), 1, like)
    assert xp.dtype_of(full) == any_dtype
    np.testing.assert_array_equal(xp.to_np(full), np.ones((2, 3)))
    assert backend.dtype_name(like) == any_dtype


def test_a_64_bit_integer_is_never_narrowed_in_silence(xp, backend):
    data = np.array([0, 2**40])
    like = xp.array([1.0])
    if "int64" in xp.integers:
        np.testing.assert_array_equal(xp.to_np(backend.asarray(data, like)), data)
    else:
        with raises(ValueError):
            backend.asarray(data, like)


def test_moving(xp, backend, any_dtype):
    x = xp.array(np.arange(24).reshape(2, 3, 4) % 7, any_dtype)
    data = xp.to_np(x)
    same = lambda got, want: (np.testing.assert_array_equal(xp.to_np(got), want), xp.dtype_of(got) == any_dtype)  # noqa: E731
    for axis in (0, 1, 2):
        same(backend.concat([x, x], axis), np.concatenate([data, data], axis))
        same(backend.concat([x], axis), data)
        index = xp.array([[1, 0], [1, 1]], "int32")
        same(backend.take(x, index, axis), np.take(data, xp.to_np(index), axis))
        same(backend.take(x, xp.array(np.zeros((0,)), "int32"), axis), np.take(data, np.zeros(0, int), axis))
    cuts = backend.split(x, np.array([0, 0, 2, 2, 4]), 2)
    assert [tuple(c.shape) for c in cuts] == [(2, 3, 0), (2, 3, 2), (2, 3, 0), (2, 3, 2)]
    same(cuts[3], data[:, :, 2:])
    assert backend.split(x, np.array([0]), 0) == []
    same(backend.permute_dims(x, (2, 0, 1)), data.transpose(2, 0, 1))
    condition = xp.array(np.arange(24).reshape(2, 3, 4) % 2 == 0)
    same(backend.where(condition, x, backend.full((2, 3, 4), 1, x)), np.where(xp.to_np(condition), data, 1))
    same(backend.copy(x), data)


def test_concat_never_promotes(xp, backend):
    with pytest.raises((TypeError, ValueError)):
        backend.concat([xp.array([1.0]), xp.array([1.0], "float16")], 0)
    with pytest.raises((TypeError, ValueError)):
        backend.concat([xp.array([1.0]), xp.array([[1.0]])], 0)


def test_searchsorted_counts_what_is_at_most(xp, backend):
    x, values = xp.array([0, 3, 3, 7], "int32"), xp.array([0, 1, 3, 6, 7, 8], "int32")
    assert xp.to_np(backend.searchsorted(x, values)).tolist() == [1, 1, 3, 3, 4, 4]


def test_arithmetic(xp, backend, floating):
    x = xp.array([[0.5, 1.0, 2.0], [4.0, 0.25, 1.5]], floating)
    data = xp.to_np(x).astype(np.float64)
    for name in ("exp", "log", "sqrt", "tanh"):
        got = getattr(backend, name)(x)
        assert xp.dtype_of(got) == floating
        np.testing.assert_allclose(
            xp.to_np(got), getattr(np, name)(data), rtol=2e-2 if floating == "bfloat16" else 2e-3
        )
    for name in ("sum", "max", "min"):
        for axis in (0, 1):
            for keep in (False, True):
                got = getattr(backend, name)(x, axis, keepdims=keep)
                assert xp.dtype_of(got) == floating
                np.testing.assert_allclose(xp.to_np(got), getattr(np, name)(data, axis, keepdims=keep), rtol=1e-2)
    up = backend.upcast(x)
    assert xp.dtype_of(up) == ("float64" if floating == "float64" else "float32")
    np.testing.assert_array_equal(xp.to_np(up), data)
    assert xp.dtype_of(backend.cast_like(up, x)) == floating
    for name in xp.floats:
        assert xp.dtype_of(backend.astype(x, name)) == name
        assert xp.dtype_of(backend.astype(x, xp.array([1.0], name).dtype)) == name


def test_upcast_leaves_integers(xp, backend, integer):
    assert xp.dtype_of(backend.upcast(xp.array([1], integer))) == integer


def test_matmul(xp, backend):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 5, 2))
    got = backend.matmul(xp.array(a), xp.array(b))
    np.testing.assert_allclose(xp.to_np(got), a @ b, atol=2e-6)
    assert tuple(backend.matmul(xp.array(a[:, :, :0]), xp.array(b[:, :0])).shape) == (3, 4, 2)
    np.testing.assert_array_equal(
        xp.to_np(backend.matmul(xp.array(a[:, :, :0]), xp.array(b[:, :0]))), np.zeros((3, 4, 2))
    )


def test_host(xp, backend, integer):
    x = xp.array([3, 1, 2], integer)
    host = backend.to_host(x)
    assert type(host) is np.ndarray
    assert host.dtype == np.dtype(integer)
    assert host.tolist() == [3, 1, 2]
    assert not backend.is_traced(x)
    assert backend.to_host(xp.array([True, False])).tolist() == [True, False]


def test_host_views_and_back(xp, backend, any_dtype):
    x = xp.array([1, 0, 1, 1], any_dtype)
    view = backend.host_view(x)
    if view is None:
        return
    assert view.shape == (4,)
    assert view.dtype.itemsize == x.itemsize
    back = backend.adopt(view.copy(), x)
    assert xp.dtype_of(back) == any_dtype
    np.testing.assert_array_equal(xp.to_np(back), xp.to_np(x))


def test_no_host_view_of_what_a_gradient_watches(grad_xp):
    xp = grad_xp
    backend = _backends.load(xp.name)
    seen = []

    def through(x):
        seen.append(backend.host_view(x))
        return (x * 2).sum()

    xp.grad(through, xp.array([1.0, 2.0]))
    assert seen == [None]


def test_traces_are_seen(grad_xp):
    xp = grad_xp
    if xp.name != "jax":
        return
    backend, seen = _backends.load("jax"), []
    xp.module.jit(lambda x: seen.append(backend.is_traced(x)) or x)(xp.array([1.0]))
    assert seen == [True]


def test_poison_bites(xp):
    """The suite's own guard: fresh memory must not look like an answer."""
    if xp.name in ("numpy", "torch", "cupy"):
        assert np.isnan(xp.to_np(xp.module.empty((3,)))).all()
        assert np.isnan(xp.to_np(xp.module.empty_like(xp.array([1.0])))).all()
        assert (xp.to_np(xp.module.empty((3,), dtype=xp.array([1], "int32").dtype)) > 2**30).all()


def test_jax_with_64_bit_types():
    if "jax" not in conftest.HERE:
        return
    program = """
        import os, sys
        sys.path.insert(0, os.environ["SCREE_TESTS"])
        import jax, jax.numpy as jnp, numpy as np, scree, oracle
        from scree import kernels
        assert jax.config.jax_enable_x64
        rng = np.random.default_rng(0)
        offsets = jnp.asarray([0, 3, 3, 5])
        assert offsets.dtype == jnp.int64
        q, k, v = (scree.Array(jnp.asarray(rng.normal(size=(5, 2, 4))), offsets) for _ in range(3))
        assert q.offsets is offsets and q.dtype == jnp.float64
        out, lse = kernels.varlen_attention(q, k, v, causal=True, return_lse=True)
        want, want_lse = oracle.attention(q.values, k.values, v.values, [0, 3, 3, 5], [0, 3, 3, 5], True)
        assert out.dtype == jnp.float64 and lse.dtype == jnp.float32
        assert np.abs(np.asarray(out.values) - want).max() < 1e-13
        norm = kernels.varlen_rmsnorm(q)
        assert np.abs(np.asarray(norm.values) - oracle.rmsnorm(q.values)).max() < 1e-13
        rows = scree.unpack(q)
        packed = scree.pack(rows)
        assert packed.offsets.dtype == jnp.int32 and packed.dtype == jnp.float64
        ids = scree.segment_ids(q)
        assert ids.dtype == jnp.int32 and ids.tolist() == [0, 0, 0, 2, 2]
        padded, mask = scree.to_padded(q.astype("int64"), fill_value=2**53 + 1)
        assert padded.dtype == jnp.int64 and int(padded[1, 0, 0, 0]) == 2**53 + 1
        scree.from_padded(padded, mask.astype("int64"))
        print("fine")
    """
    import pathlib

    here = str(pathlib.Path(__file__).parent)
    assert run(program, JAX_ENABLE_X64="1", SCREE_TESTS=here).strip() == "fine"


def test_scree_says_its_version():
    assert isinstance(scree.__version__, str)
    assert set(scree.__all__) <= set(dir(scree))
    for name in (
        "Array", "pack", "unpack", "to_padded", "from_padded", "from_cu_seqlens", "from_lengths", "concat",
        "segment_ids", "position_ids", "with_capacity", "kernels", "bridges",
    ):  # fmt: skip
        assert hasattr(scree, name), name


def test_facts_tell_apart_what_a_choice_may_depend_on(xp):
    facts = _backends.load(xp.name).facts
    x, same = (xp.array(np.full((2, 3), fill), "float32") for fill in (0.0, 1.0))
    assert facts(x, x) == facts(same, x)
    assert hash(facts(x)) == hash(facts(same))
    assert {facts(x): 1}.get(facts(same)) == 1
    for other in (xp.array(np.zeros((2, 3)), "float16"), xp.array(np.zeros((3, 2)), "float32")):
        assert facts(other) != facts(x)
    assert facts(x, x) != facts(x)
    assert facts(x, [1.0]) is None
    assert facts(x, None) is None
