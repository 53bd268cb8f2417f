"""PyTorch's compilers and transformations over programs that pack outside and compute inside."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

import scree
from cases import batch, normal, with_spare
from scree import kernels
from test_array import LENGTHS, make
from test_compilers import RAGGED, assert_spare_is_left_out, need, on_capacity

pytestmark = [
    pytest.mark.no_poison,
    # PyTorch's own, when its compiler is imported.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


# PyTorch


@pytest.fixture
def torch():
    """PyTorch with an empty compiler."""
    module = need("torch").module
    module._dynamo.reset()
    yield module
    module._dynamo.reset()


def counting(torch):
    """Return a compiler backend that counts what it compiles."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    return backend, compiled


def step(a):
    """Compute inside what was packed outside."""
    b = kernels.varlen_rmsnorm(a * 2 + a)
    return b.map(lambda v: v + 1)


def test_torch_tree(torch):
    xp = need("torch")
    from torch.utils import _pytree as tree

    arr = make(xp)
    leaves, structure = tree.tree_flatten(arr)
    assert leaves[0] is arr.values
    assert leaves[1] is arr.offsets
    back = tree.tree_unflatten(leaves, structure)
    assert isinstance(back, scree.Array)
    assert tree.tree_unflatten([object(), None], structure).ragged_dim == 0
    assert tree.tree_map(lambda x: x, make(xp, features=(2, 2), ragged_dim=1)).ragged_dim == 1


def test_torch_compile(torch):
    xp = need("torch")
    arr = make(xp)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(arr)
    assert isinstance(got, scree.Array)
    np.testing.assert_allclose(xp.to_np(got.values), xp.to_np(step(arr).values), rtol=1e-6)
    assert [len(r) for r in scree.unpack(got)] == list(LENGTHS)


def test_torch_compile_of_the_operations(torch):
    xp = need("torch")

    def all_of_them(a):
        padded, mask = scree.to_padded(a, "left", 0.5, max_length=6)
        return padded, mask, scree.segment_ids(a), scree.position_ids(a), a.lengths, a.batch_size, a.total_length

    arr = make(xp)
    got = torch.compile(all_of_them, fullgraph=True, backend="eager")(arr)
    for x, y in zip(got, all_of_them(arr), strict=True):
        assert (x == y) if isinstance(x, int) else torch.equal(x, y)


def test_torch_knows_spare_values_when_compiling(torch):
    xp = need("torch")
    full = with_spare(xp, make(xp), 7, 13)
    assert_spare_is_left_out(xp, torch.compile(on_capacity, fullgraph=True, backend="eager")(full))
    leaves, structure = torch.utils._pytree.tree_flatten(full)
    assert torch.utils._pytree.tree_unflatten(leaves, structure).validate().total_length == 13


def test_torch_compile_makes_arrays_inside(torch):
    xp = need("torch")

    def inside(values, offsets):
        return scree.Array(values, offsets).map(torch.exp).values

    arr = make(xp)
    got = torch.compile(inside, fullgraph=True, backend="eager")(arr.values, arr.offsets)
    np.testing.assert_allclose(xp.to_np(got), np.exp(xp.to_np(arr.values)), rtol=1e-6)


def test_torch_compile_carries_gradients(torch):
    xp = need("torch")
    arr = make(xp)
    weights = xp.array(normal((9, 2), 1))
    grads = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        values = arr.values.clone().requires_grad_()
        (fn(scree.Array(values, arr.offsets)).values * weights).sum().backward()
        grads.append(xp.to_np(values.grad))
    np.testing.assert_allclose(grads[1], grads[0], rtol=1e-5, atol=1e-6)


def test_torch_compiles_once_with_capacity(torch):
    xp = need("torch")
    plain = [make(xp, lengths=n) for n in RAGGED]

    def compilations(batches):
        torch._dynamo.reset()
        backend, compiled = counting(torch)
        fn = torch.compile(step, fullgraph=True, backend=backend)
        for arr in batches:
            np.testing.assert_allclose(xp.to_np(fn(arr).values), xp.to_np(step(arr).values), rtol=1e-6)
        return len(compiled)

    assert compilations([scree.with_capacity(a, 4, 10) for a in plain]) == 1
    assert compilations(plain) > 1


def test_torch_inductor_smoke(torch):
    xp = need("torch")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler for inductor")
    arr = make(xp)

    def step(a):
        return a * 2 + a

    got = torch.compile(step, fullgraph=True)(arr)
    np.testing.assert_allclose(xp.to_np(got.values), xp.to_np(step(arr).values), rtol=1e-5)


def test_torch_export(torch):
    xp = need("torch")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 3)

        def forward(self, a):
            return kernels.varlen_layernorm(a.map(self.linear)) * 2

    model, arr = Model(), make(xp)
    program = torch.export.export(model, (arr,))
    got = program.module()(arr)
    assert isinstance(got, scree.Array)
    torch.testing.assert_close(got.values, model(arr).values)


def test_torch_func(torch):
    xp = need("torch")
    arr, weights = make(xp), xp.array(normal((9, 2), 1))

    def loss(values):
        return (step(arr.with_values(values)).values * weights).sum()

    (want,) = xp.grad(loss, arr.values)
    got = torch.func.grad(loss)(arr.values)
    np.testing.assert_allclose(xp.to_np(got), want, rtol=1e-5, atol=1e-6)
    stacked = xp.array(normal((3, 9, 2), 0))
    many = torch.func.vmap(lambda v: step(arr.with_values(v)).values)(stacked)
    want = np.stack([xp.to_np(step(arr.with_values(v)).values) for v in stacked])
    np.testing.assert_allclose(xp.to_np(many), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_func_over_arrays_made_inside(torch, dtype):
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    constant = torch.randn(8).to(getattr(torch, dtype))

    def loss(values):
        mine, other = scree.Array(values, offsets), scree.Array(constant, offsets)
        return (scree.to_padded(mine)[0] * scree.to_padded(other)[0]).sum()

    values = torch.randn(8).to(constant.dtype)
    assert torch.equal(torch.func.grad(loss)(values), constant)
    many = torch.func.vmap(lambda v: scree.to_padded(scree.Array(v, offsets))[0])(torch.stack([values, constant]))
    assert torch.equal(many[1], scree.to_padded(scree.Array(constant, offsets))[0])
    values, tangent = torch.func.jvp(lambda v: scree.to_padded(scree.Array(v, offsets))[0], (values,), (constant,))
    assert torch.equal(tangent, scree.to_padded(scree.Array(constant, offsets))[0])


def test_torch_func_grad_of_attention(torch):
    xp = need("torch")
    q = batch(xp, (3, 0, 5), (2, 4))

    def loss(values):
        a = q.with_values(values)
        return kernels.varlen_attention(a, q, q, causal=True).values.sum()

    np.testing.assert_allclose(
        xp.to_np(torch.func.grad(loss)(q.values)), xp.grad(loss, q.values)[0], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("op", ["attention", "softmax", "reduce"])
def test_torch_references_ask_for_concrete_offsets(torch, op):
    xp = need("torch")
    q = batch(xp, (3, 0, 5), (2, 4))
    calls = {
        "attention": lambda a: kernels.varlen_attention(a, a, a, implementation="reference").values,
        "softmax": lambda a: kernels.varlen_softmax(a, implementation="reference").values,
        "reduce": lambda a: kernels.varlen_reduce(a, "sum", implementation="reference"),
    }
    with pytest.raises(Exception) as caught:  # noqa: PT011 - dynamo wraps it in an exception of its own
        torch.compile(calls[op], fullgraph=True, backend="eager")(q)
    assert "concrete" in str(caught.value)
    assert f"varlen_{op}" in str(caught.value)


def test_torch_forward_mode_after_a_plain_call_with_the_same_offsets(torch):
    from torch.autograd import forward_ad

    xp = need("torch")
    q = batch(xp, (3, 4), (2, 4))
    kernels.varlen_attention(q, q, q)  # whose choice is remembered with the offsets
    direction = torch.ones_like(q.values)
    with forward_ad.dual_level():
        dual = q.with_values(forward_ad.make_dual(q.values, direction))
        got = forward_ad.unpack_dual(kernels.varlen_attention(dual, dual, dual).values).tangent
        with pytest.raises(NotImplementedError, match="to_numpy"):
            scree.bridges.to_numpy(dual)

    def attend(x):
        a = q.with_values(x)
        return kernels.varlen_attention(a, a, a, implementation="reference").values

    np.testing.assert_allclose(xp.to_np(got), xp.to_np(torch.func.jvp(attend, (q.values,), (direction,))[1]), rtol=1e-5)


def test_torch_data_loader_pins_and_moves(torch):
    xp = need("torch")
    arr = make(xp)
    rows = scree.unpack(arr)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=scree.pack)
    got = list(loader)
    assert [len(a) for a in got] == [2, 2, 1]
    np.testing.assert_array_equal(xp.to_np(scree.concat(got).values), xp.to_np(arr.values))


FIRST_USE = """
import torch
import scree

@torch.compile(fullgraph=True, backend="eager")
def attend(x, offsets):
    arr = scree.Array(x, offsets)
    return scree.kernels.varlen_attention(arr, arr, arr, causal=True).values

x = torch.linspace(-1, 1, 60).reshape(10, 2, 3)
offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
compiled = [attend(x, offsets) for _ in range(2)]
arr = scree.Array(x, offsets)
expected = scree.kernels.varlen_attention(arr, arr, arr, causal=True, implementation="reference").values
for actual in compiled:
    torch.testing.assert_close(actual, expected)
"""


def test_the_first_use_may_be_inside_of_a_compiled_function(torch):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST_USE], check=True, timeout=300)
