"""What the room mlx_fast promises beyond the suite: refusals, float64, rows of several blocks."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits, raises
from scree import kernels
from test_compilers import need

pytestmark = pytest.mark.no_poison
NAME = "mlx_fast"


@pytest.fixture
def ml():
    """MLX."""
    return need("mlx")


def arr_of(ml, lengths, features, dtype="float32"):
    """Make an Array of normals."""
    values = ml.array(normal((sum(lengths), *features), 0), dtype)
    return scree.Array(values, ml.array(oracle.offsets_of(lengths), "int32"))


@pytest.mark.parametrize("op", ["varlen_softmax", "varlen_attention"])
def test_says_that_a_trace_hides_the_lengths(ml, op):
    def inside(values, offsets):
        a = scree.Array(values, offsets)
        more = (a, a) if op == "varlen_attention" else ()
        return getattr(kernels, op)(a, *more, implementation=NAME).values

    a = arr_of(ml, (2, 3), (2, 4))
    with raises(NotImplementedError, op, NAME, "by length", "concrete"):
        ml.module.compile(inside)(a.values, a.offsets)


def test_norms_in_float64_are_left_to_the_reference(ml):
    if "float64" not in ml.floats:
        pytest.skip("MLX has float64 on the CPU only")
    a = arr_of(ml, (2, 3), (6,), "float64")
    with raises(NotImplementedError, "varlen_rmsnorm", NAME, "float64"):
        kernels.varlen_rmsnorm(a, implementation=NAME)
    assert_close(ml.to_np(kernels.varlen_rmsnorm(a).values), oracle.rmsnorm(ml.to_np(a.values)), "float64")


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (40, 3)}], ids=str)
def test_rows_of_several_blocks_and_a_row_alone(ml, options):
    lengths = (300, 7, 600, 7)
    a = arr_of(ml, lengths, (2, 8))
    out = kernels.varlen_attention(a, a, a, implementation=NAME, **options)
    host = scree.Array(ml.to_np(a.values), np.array(oracle.offsets_of(lengths), np.int32))
    want = kernels.varlen_attention(host, host, host, implementation="reference", **options)
    assert_close(ml.to_np(out.values), want.values, "float32")
    for row in range(4):
        one = a[row : row + 1]
        alone = kernels.varlen_attention(one, one, one, implementation=NAME, **options)
        assert_same_bits(ml.to_np(alone.values), ml.to_np(out[row]))
