"""The loops of torch_native's attention: TorchScript's interpreter and Python give the same bits, and a call bound before."""

import numpy as np
import pytest
from test_torch_native import NAME, pytestmark  # noqa: F401  where, and without which warnings

import scree
from cases import batch
from expect import assert_close, assert_same_bits
from scree import kernels
from test_compilers import need

LENGTHS, OTHERS = (5, 0, 200, 33, 1, 0), (5, 7, 200, 40, 0, 0)
CASES = {
    "causal": {"causal": True},
    "causal lse": {"causal": True, "return_lse": True},
    "all": {},
    "all lse": {"return_lse": True},
    "lower right": {"causal": True, "others": True},
    "window": {"window_size": (40, 2)},
    "sinks": {"causal": True, "sinks": True},
}


@pytest.fixture
def th():
    """PyTorch."""
    return need("torch")


@pytest.fixture
def loops(th):
    """The module of the loops, for which the fixture `th` looked whether there is a PyTorch."""
    from scree.kernels.torch_native import _loops

    return _loops


def results(th, dtype, heads, dims, options):
    """The output, and the gradients of q, k, v, and where it is returned the LSE."""
    torch = th.module
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 1, heads[0])
    lengths = OTHERS if options.pop("others", not options.get("causal")) else LENGTHS
    q = batch(th, LENGTHS, (heads[0], dims[0])).astype(dtype)
    k = batch(th, lengths, (heads[1], dims[0]), seed=1).astype(dtype)
    v = k.with_values(batch(th, lengths, (heads[1], dims[1]), seed=2).astype(dtype).values)
    if lengths == LENGTHS:
        k, v = (q.with_values(x.values) for x in (k, v))

    def call(q, k, v):
        out = kernels.varlen_attention(q, k, v, implementation=NAME, **options)
        return [x.values for x in out] if isinstance(out, tuple) else [out.values]

    plain = call(q, k, v)
    leaves = [x.values.clone().requires_grad_() for x in (q, k, v)]
    out = call(*(a.with_values(x) for a, x in zip((q, k, v), leaves, strict=True)))
    loss = out[0].float().square().sum()
    if len(out) > 1:
        loss = loss + torch.where(out[1].isfinite(), out[1], 0).square().sum()
    return [th.to_np(x.detach().double()) for x in (*plain, *out, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (10, 6), (6, 10)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_python_the_loops_give_the_same_bits(th, loops, monkeypatch, case, heads, dims, dtype):
    scripted = results(th, dtype, heads, dims, CASES[case])
    monkeypatch.setattr(loops, "scripted", lambda loop: loop)
    for got, want in zip(scripted, results(th, dtype, heads, dims, CASES[case]), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_batch_is_widened_row_by_row_with_the_same_bits(th, dtype, monkeypatch):
    from scree.kernels.torch_native import _flash

    want = results(th, dtype, (2, 2), (16, 16), CASES["causal"])
    monkeypatch.setattr(_flash, "_LARGE", 0)
    for got, right in zip(results(th, dtype, (2, 2), (16, 16), CASES["causal"]), want, strict=True):
        assert_same_bits(got, right)


def test_they_are_compiled_where_torch_has_a_compiler_for_them(th, loops, monkeypatch):
    torch = th.module
    for loop in (loops.forward, loops.backward):
        assert isinstance(loops.scripted(loop), torch.jit.ScriptFunction)

    def refuse(loop):
        raise RuntimeError("no TorchScript")

    monkeypatch.setattr(torch.jit, "script", refuse)
    assert loops.scripted.__wrapped__(loops.forward) is loops.forward


@pytest.mark.parametrize("step", [64, 96])
def test_spans_leave_no_query_out(loops, step):
    for n in range(1, 1100):
        last = loops.last_span(n, step, 1024)
        assert last % step == 0
        assert 0 < n - last
        assert n - last < step + step // 2 or last == 0
        assert (last == 0) == (n < 2 * step or n > 1024)


def test_a_call_that_was_bound_before_looks_whether_gradients_are_wanted(th):
    torch = th.module
    a = batch(th, (3, 2, 70), (2, 8))
    sinks = torch.tensor([0.5, -0.5])

    def call(values, **options):
        x = a.with_values(values)
        return kernels.varlen_attention(x, x, x, causal=True, implementation=NAME, **options).values

    for options in ({}, {"sinks": sinks}):
        want = call(a.values, **options)
        values = a.values.clone().requires_grad_()
        out = call(values, **options)
        assert out.requires_grad
        assert_same_bits(th.to_np(out.detach()), th.to_np(want))
        (grad,) = torch.autograd.grad(out.square().sum(), values)
        x = a.with_values(values)
        reference = kernels.varlen_attention(x, x, x, causal=True, implementation="reference", **options).values
        assert_close(th.to_np(grad), th.to_np(torch.autograd.grad(reference.square().sum(), values)[0]), "float32", 8.0)
        with torch.no_grad():
            assert not call(values, **options).requires_grad
    leaf = sinks.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(a.values, sinks=leaf).sum(), leaf)
    assert np.isfinite(th.to_np(grad)).all()


def test_a_bound_call_is_for_arrays_with_spare_room_too(th):
    a = scree.with_capacity(batch(th, (3, 2, 70), (2, 8)), 4, 90)
    for _ in range(2):
        out = kernels.varlen_attention(a, a, a, causal=True, implementation=NAME)
        assert out.offsets is a.offsets
        assert (th.to_np(out.values[75:]) == 0).all()
    want = kernels.varlen_attention(a, a, a, causal=True, implementation="reference")
    assert_close(th.to_np(out.values), th.to_np(want.values), "float32")
