"""What the room numba_loops promises beyond the suite: bits at sizes where vectors end, accuracy, how it is chosen."""

import subprocess
import sys
import threading

import numpy as np
import pytest

import oracle
import scree
from cases import ATTENTION, normal
from expect import assert_close, assert_same_bits, raises
from frameworks import NumPy
from scree import kernels
from scree.kernels import _dispatch, numba_loops

pytestmark = pytest.mark.no_poison
NAME = "numba"
needs_numba = pytest.mark.engines


def arr_of(lengths, features, seed=0, dtype=np.float32):
    """Make an Array of normals on NumPy."""
    values = normal((sum(lengths), *features), seed).astype(dtype)
    return scree.Array(values, np.array(oracle.offsets_of(lengths), np.int32))


def rope(a, implementation=NAME):
    """Rotate heads of 2, 4 or more features."""
    half = a.values.shape[-1] // 2
    angles = np.arange(1000)[:, None] / 100.0 ** (np.arange(half) / max(half, 1))
    tables = np.cos(angles).astype(a.dtype), np.sin(angles).astype(a.dtype)
    return kernels.varlen_rope(a, *tables, implementation=implementation).values


CALLS = {
    "sum": lambda a, **more: kernels.varlen_reduce(a, "sum", **more),
    "max": lambda a, **more: kernels.varlen_reduce(a, "max", **more),
    "logsumexp": lambda a, **more: kernels.varlen_reduce(a, "logsumexp", **more),
    "rmsnorm": lambda a, **more: kernels.varlen_rmsnorm(a, **more).values,
    "layernorm": lambda a, **more: kernels.varlen_layernorm(a, **more).values,
}


@needs_numba
@pytest.mark.parametrize("features", [(1,), (5,), (34,), (1100,), (9000,)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_row_alone_at_many_sizes(name, features):
    lengths = (7, 130, 7, 1, 7, 130, 300)
    a = arr_of(lengths, features)
    out, cuts = CALLS[name](a, implementation=NAME), oracle.offsets_of(lengths)
    for i, row in enumerate(scree.unpack(a)):
        place = slice(cuts[i], cuts[i + 1]) if len(out) == len(a.values) else slice(i, i + 1)
        assert_same_bits(CALLS[name](scree.pack([row]), implementation=NAME), out[place])


@needs_numba
@pytest.mark.parametrize("name", CALLS)
def test_the_same_as_without_numba(name):
    a = arr_of((7, 0, 400, 1), (300,))
    np.testing.assert_allclose(
        CALLS[name](a, implementation=NAME), CALLS[name](a, implementation="numpy_blas"), rtol=2e-5, atol=2e-5
    )


@needs_numba
@pytest.mark.parametrize("name", CALLS)
def test_foreign_byte_order(name):
    a = arr_of((3, 0, 2), (5,))
    b = a.map(lambda x: x.astype(">f4"))
    np.testing.assert_array_equal(CALLS[name](b, implementation=NAME), CALLS[name](a, implementation=NAME))


@needs_numba
@pytest.mark.parametrize("features", [(), (64,)], ids=str)
def test_a_long_sum_is_no_long_row_of_additions(features):
    a = arr_of((200_000,), features).map(lambda x: np.abs(x) + 1)
    got = kernels.varlen_reduce(a, "sum", implementation=NAME)
    np.testing.assert_allclose(got[0], a.values.astype(np.float64).sum(0), rtol=2e-6)


@needs_numba
def test_a_norm_of_many_features_is_accurate():
    a = arr_of((2,), (100_000,)).map(lambda x: x + 3)
    x = a.values.astype(np.float64)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(CALLS["layernorm"](a, implementation=NAME), want, rtol=1e-4, atol=1e-5)


@needs_numba
def test_it_is_what_numpy_gets():
    a = arr_of((7, 3), (4, 6))
    assert_same_bits(rope(a, None), rope(a))
    for name in CALLS:
        assert_same_bits(CALLS[name](a), CALLS[name](a, implementation=NAME))


@needs_numba
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention_is_that_of_the_reference(case, dtype):
    *arrays, sinks = case.make(NumPy(np), dtype)
    got, want = (
        kernels.varlen_attention(*arrays, return_lse=True, implementation=name, **case.arguments(sinks))
        for name in (NAME, "reference")
    )
    assert_close(got[0].values, want[0].values, dtype)
    assert_close(got[1].values, want[1].values, "float32")


@needs_numba
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 5), (3, 3, 64)])
def test_attention_of_a_row_alone_at_many_sizes(heads, kv_heads, dim):
    q, k, v = (arr_of((1, 33, 200, 33, 520), (h, dim), seed) for seed, h in enumerate((heads, kv_heads, kv_heads)))
    out = kernels.varlen_attention(q, k, v, causal=True)  # what NumPy gets
    for i, rows in enumerate(zip(q, k, v, strict=True)):
        mine = [scree.pack([row]) for row in rows]
        assert_same_bits(kernels.varlen_attention(*mine, causal=True, implementation=NAME).values, out[i])


@needs_numba
def test_exponentials_are_accurate_to_two_units_and_nan_where_numpy_has_it():
    from scree.kernels.numba_loops import _arrays

    x = np.concatenate([np.linspace(-87.3, 0, 100_001), np.geomspace(1e-8, 80, 100_001) * -1]).astype(np.float32)
    got = x.copy()[None]
    total = _arrays._weigh(got, np.zeros((1, 1), np.float32))
    want = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(got[0], want, rtol=2 * 2.0**-23)
    np.testing.assert_allclose(total[0, 0], want.sum(), rtol=1e-5)
    odd = np.array([[np.nan, -np.inf, -87.5, -1e30, 0.0]], np.float32)
    _arrays._weigh(odd, np.zeros((1, 1), np.float32))
    np.testing.assert_array_equal(odd, [[np.nan, 0, 0, 0, 1]])


@needs_numba
def test_attention_in_float64_is_left_to_numpy():
    a = arr_of((7, 3), (2, 8), dtype=np.float64)
    assert_same_bits(
        kernels.varlen_attention(a, a, a).values, kernels.varlen_attention(a, a, a, implementation="numpy_blas").values
    )
    with raises(NotImplementedError, "numba: serves dtype float16, float32, got float64"):
        kernels.varlen_attention(a, a, a, implementation=NAME)


@needs_numba
def test_strided_values_are_no_matter():
    a = arr_of((7, 3), (4, 12))
    b = a.with_values(a.values[:, ::2, 1::2])
    assert not b.values.flags.c_contiguous
    c = a.with_values(b.values.copy())
    assert_same_bits(rope(b), rope(c))
    for name in CALLS:
        assert_same_bits(CALLS[name](b, implementation=NAME), CALLS[name](c, implementation=NAME))


@needs_numba
def test_from_several_threads_at_once():
    a = arr_of((300, 500, 11), (64,))
    want = {name: CALLS[name](a, implementation=NAME) for name in CALLS}
    wrong = []

    def work():
        for name in CALLS:
            if not np.array_equal(CALLS[name](a, implementation=NAME), want[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_numba
def test_numba_is_not_imported_before_a_call_that_needs_it():
    program = """
import sys, numpy as np, scree
a = scree.pack([np.ones((3, 4), np.float32)])
scree.kernels.varlen_softmax(a)
print("numba" in sys.modules)
scree.kernels.varlen_rmsnorm(a)
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_without_numba_it_says_so_and_is_passed_over(monkeypatch):
    monkeypatch.setitem(_dispatch._INSTALLED, "numba", False)
    a = arr_of((7, 3), (4,))
    assert_same_bits(CALLS["sum"](a), CALLS["sum"](a, implementation="numpy_blas"))
    with raises(
        NotImplementedError, "varlen_reduce", 'numba: needs numba, which is not installed: pip install "scree[numba]"'
    ):
        CALLS["sum"](a, implementation=NAME)


def test_a_broken_numba_is_passed_over_and_says_why(monkeypatch):
    def broken(*_):
        raise ImportError("Numba needs NumPy 2.0 or less")

    monkeypatch.setitem(_dispatch._INSTALLED, "numba", True)
    monkeypatch.setattr(numba_loops, "_KEPT", {})
    monkeypatch.setattr(numba_loops.importlib, "import_module", broken)
    a = arr_of((7, 3), (4,))
    assert_same_bits(CALLS["rmsnorm"](a), CALLS["rmsnorm"](a, implementation="numpy_blas"))
    with raises(NotImplementedError, "numba cannot be imported: Numba needs NumPy 2.0 or less"):
        CALLS["rmsnorm"](a, implementation=NAME)
