"""Under a trace no bridge can be crossed: each says so."""

import numpy as np
from test_dlpack import OFFSETS, data, harness

import scree
from expect import raises
from scree import bridges


def test_under_a_trace_of_jax():
    jax = harness("jax").module

    def inside(values, offsets):
        return bridges.to_numpy(scree.Array(values, offsets)).values

    with raises(NotImplementedError, "to_numpy", "traced"):
        jax.jit(inside)(data("float32"), OFFSETS.astype(np.int32))


def test_under_a_transformation_of_torch():
    torch = harness("torch").module
    arr = scree.Array(torch.zeros(3), torch.tensor([0, 3]))

    def inside(values):
        return bridges.to_numpy(arr.with_values(values)).values.sum()

    with raises(NotImplementedError, "to_numpy", "traced"):
        torch.func.grad(inside)(torch.ones(3))


def test_under_a_compiler_of_mlx():
    mx = harness("mlx").module

    def inside(values):
        bridges.to_numpy(scree.Array(values, mx.array([0, 3], dtype=mx.int32)))
        return values

    with raises(NotImplementedError, "to_numpy", "traced"):
        mx.compile(inside)(mx.ones(3))
