"""What the room torch_native promises beyond the suite: compilers, refusals, bits at sizes where libraries switch."""

import importlib
import os

import numpy as np
import pytest

import oracle
import scree
from cases import batch, normal
from expect import assert_close, assert_same_bits, raises
from scree import kernels
from test_compilers import need

pytestmark = [
    pytest.mark.skipif(os.environ.get("SCREE_TORCH_DEVICE", "cpu") != "cpu", reason="the room is for the CPU"),
    pytest.mark.no_poison,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # PyTorch's own
]
NAME = "torch_native"


@pytest.fixture
def th():
    """PyTorch, with an empty compiler."""
    harness = need("torch")
    harness.module._dynamo.reset()
    yield harness
    harness.module._dynamo.reset()


def attend(q, k, v, **options):
    """Call attention, causal."""
    return kernels.varlen_attention(q, k, v, causal=True, implementation=NAME, **options)


CALLS = {
    "attention": lambda a: attend(a, a, a).values,
    "all": lambda a: kernels.varlen_attention(a, a, a, implementation=NAME).values,
    "softcap": lambda a: attend(a, a, a, softcap=2.0).values,
    "softmax": lambda a: kernels.varlen_softmax(a, implementation=NAME).values,
    "reduce": lambda a: kernels.varlen_reduce(a, "logsumexp", implementation=NAME),
    "rmsnorm": lambda a: kernels.varlen_rmsnorm(a, implementation=NAME).values,
    "layernorm": lambda a: kernels.varlen_layernorm(a, implementation=NAME).values,
    "rope": lambda a: kernels.varlen_rope(a, *tables(a), implementation=NAME).values,
}


def tables(a):
    """The cosines and sines of a few angles, in the framework of the Array."""
    angles = a.values.new_tensor([[0.1 * p * (f + 1) for f in range(4)] for p in range(8)])
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_with_the_array_as_an_argument(th, name):
    torch = th.module
    a = batch(th, (3, 2, 5), (2, 8))

    def grad(fn):
        values = a.values.clone().requires_grad_()
        out = fn(scree.Array(values, a.offsets))
        return out.detach(), torch.autograd.grad((out * out).sum(), values)[0]

    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for got, want in zip(grad(compiled), grad(CALLS[name]), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", ["varlen_rmsnorm", "varlen_layernorm"])
@pytest.mark.parametrize("compiled", [False, True])
def test_norms_give_the_gradients_that_are_asked_for(th, op, compiled):
    torch = th.module
    a = batch(th, (3, 2, 5), (8,))
    given = [a.values, *(th.array(normal((8,), seed)) for seed in ((1, 2) if op == "varlen_layernorm" else (1,)))]

    def call(x, *weights):
        return getattr(kernels, op)(a.with_values(x), *weights, implementation=NAME).values

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call

    def grads(*wanted):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(given)]
        return torch.autograd.grad(run(*leaves).square().sum(), [leaves[i] for i in wanted])

    every = grads(*range(len(given)))
    for i, want in enumerate(every):
        assert_same_bits(th.to_np(grads(i)[0]), th.to_np(want))


def test_is_what_the_front_door_chooses(th):
    a = batch(th, (3, 2, 5), (2, 8))
    want = attend(a, a, a)
    assert_same_bits(th.to_np(kernels.varlen_attention(a, a, a, causal=True).values), th.to_np(want.values))
    assert_same_bits(th.to_np(kernels.varlen_softmax(a).values), th.to_np(CALLS["softmax"](a)))


def test_says_what_it_cannot_transform(th):
    torch = th.module
    a = batch(th, (3, 5), (2, 8))
    with raises(NotImplementedError, "varlen_softmax", NAME, "torch.func"):
        torch.func.grad(lambda v: CALLS["softmax"](a.with_values(v)).sum())(a.values)
    with raises(NotImplementedError, "varlen_rmsnorm", NAME, "forward-mode"), torch.autograd.forward_ad.dual_level():
        CALLS["rmsnorm"](a)
    # Not asked for by name, the reference takes the call.
    got = torch.func.grad(lambda v: kernels.varlen_softmax(a.with_values(v)).values.square().sum())(a.values)
    (want,) = th.grad(lambda v: kernels.varlen_softmax(a.with_values(v)).values.square().sum(), a.values)
    assert_close(th.to_np(got), want, "float32", scale=4.0)


def test_attention_is_chosen_once_for_all_lengths_and_checked_where_it_differs(th, monkeypatch):
    torch = th.module
    room = importlib.import_module("scree.kernels.torch_native")
    asked = []
    real = room.why_not
    monkeypatch.setattr(room, "why_not", lambda op, *args, **options: asked.append(op) or real(op, *args, **options))
    scale = 0.3125  # that no other test has

    def call(lengths, heads=2, kv_heads=2, **options):
        a, b = batch(th, lengths, (heads, 8)), batch(th, lengths, (kv_heads, 8), seed=1)
        b = a.with_values(b.values)
        return a, b, attend(a, b, b, scale=scale, **options)

    for lengths in ((3, 2, 5), (4, 1), (0, 9, 3, 3)):
        a, b, out = call(lengths)
        want = kernels.varlen_attention(a, b, b, causal=True, scale=scale, implementation="reference")
        assert_close(th.to_np(out.values), th.to_np(want.values), "float32")
    assert asked == ["varlen_attention"]
    call((3, 2), heads=4)
    assert len(asked) == 2
    with raises(ValueError, "varlen_attention", "multiple"):
        call((3, 2), kv_heads=3)
    a, b, _ = call((3, 2))
    with raises(NotImplementedError, NAME, "torch.func"):
        torch.func.grad(lambda x: attend(a.with_values(x), b, b, scale=scale).values.sum())(a.values)


def test_a_second_derivative_is_refused_and_not_zero(th):
    torch = th.module
    a = batch(th, (3, 5), (2, 8))
    values = a.values.clone().requires_grad_()
    out = CALLS["softmax"](a.with_values(values)).square().sum()

    def twice():
        (grad,) = torch.autograd.grad(out, values, create_graph=True)
        return torch.autograd.grad(grad.sum(), values)

    with pytest.raises(RuntimeError):
        twice()


def rows_alone(th, lengths, features, call, seed=0, shift=0):
    """Require of every row, forward and backward, the bits that it has alone in memory of its own."""
    torch = th.module
    total = sum(lengths)
    flat = torch.zeros(total * int(np.prod(features)) + shift)[shift:]
    values = flat.view(total, *features).copy_(th.array(normal((total, *features), seed)))
    cuts = oracle.offsets_of(lengths)

    def both(values, offsets, weights):
        leaf = values.detach().requires_grad_()
        out = call(scree.Array(leaf, torch.tensor(offsets)))
        if len(out) == len(values):
            loss = (out * weights).sum()
        else:
            loss = (out * weights[: len(out)]).sum()
        return out.detach(), torch.autograd.grad(loss, leaf)[0]

    probe = call(scree.Array(values, torch.tensor(cuts)))
    per_token = len(probe) == total
    weights = th.array(normal(tuple(probe.shape), seed + 1))
    out, grad = both(values, cuts, weights)
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        place = slice(start, stop) if per_token else slice(i, i + 1)
        alone, grad_alone = both(values[start:stop].clone(), [0, stop - start], weights[place])
        assert_same_bits(th.to_np(alone), th.to_np(out[place]))
        assert_same_bits(th.to_np(grad_alone), th.to_np(grad[start:stop]))


# Around the sizes where the kernel's blocks change, and of odd sizes; shifted, no row begins where torch aligns.
# Causal rows are cut into spans from 128 tokens on, or from 192 where heads and features are few.
@pytest.mark.parametrize(
    "lengths", [(1, 33, 17, 33, 5), (200, 97, 200, 31), (800, 3, 520), (127, 143, 191, 193, 277, 128)], ids=str
)
@pytest.mark.parametrize("heads", [(1, 16), (2, 5), (3, 64), (8, 64)], ids=str)
@pytest.mark.parametrize("name", ["attention", "all", "softcap"])
@pytest.mark.parametrize("shift", [0, 3])
def test_attention_of_a_row_alone_at_many_sizes(th, lengths, heads, name, shift):
    rows_alone(th, lengths, heads, CALLS[name], shift=shift)


@pytest.mark.parametrize("features", [(1,), (5,), (33,), (1100,)], ids=str)
@pytest.mark.parametrize("name", ["softmax", "reduce", "rmsnorm", "layernorm"])
def test_segments_of_a_row_alone_at_many_sizes(th, features, name):
    rows_alone(th, (7, 130, 7, 1, 7, 130), features, CALLS[name])


@pytest.mark.parametrize("op", ["sum", "mean", "logsumexp"])
def test_a_long_column_alone(th, op):
    # Longer than what torch's reductions would split between threads.
    rows_alone(th, (40_000, 3, 40_000), (1,), lambda a: kernels.varlen_reduce(a, op, implementation=NAME))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("features", [(1,), (5,), (33,), (300,)], ids=str)
def test_rows_of_any_lengths_are_added_up_in_float32(th, dtype, features):
    # Of ones, sums in the dtype itself would stop at 256 or 2048.
    lengths = (2608, 0, 1, 129, 0, 5120)
    a = batch(th, lengths, features, "float32")
    ones = a.with_values(th.module.ones_like(a.values)).astype(dtype)
    mean = th.to_np(kernels.varlen_reduce(ones, "mean", implementation=NAME).float())
    filled = np.array(lengths) > 0
    assert (mean[filled] == 1).all()
    assert np.isnan(mean[~filled]).all()
    total = kernels.varlen_reduce(ones, "sum", implementation=NAME)
    want = th.module.tensor(lengths, dtype=total.dtype)[:, None].expand_as(total)
    assert th.module.equal(total, want)


@pytest.mark.parametrize("op", ["max", "min"])
def test_extremes_without_the_library_that_sorts(th, op, monkeypatch):
    a = batch(th, (3, 0, 130, 1), (20,))
    want = th.to_np(kernels.varlen_reduce(a, op, implementation=NAME))
    monkeypatch.setattr(type(th.module.backends.quantized), "supported_engines", ())
    assert_same_bits(th.to_np(kernels.varlen_reduce(a, op, implementation=NAME)), want)
    nothing = a[:0]
    assert tuple(kernels.varlen_reduce(nothing, op, implementation=NAME).shape) == (0, 20)


def test_no_python_loop_over_short_rows(th, monkeypatch):
    """The calls into PyTorch are as many for a thousand rows as for ten."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from scree._backends import torch as backend
    from scree.kernels.torch_native import _common

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(rows, name):
        a = batch(th, [1 + i % 17 for i in range(rows)], (3,))
        with Count() as count:
            CALLS[name](a)
        return count.calls

    monkeypatch.setattr(_common, "is_traced", lambda *x: False)
    monkeypatch.setattr(backend, "is_recorded", lambda: False)
    for name in ("softmax", "reduce"):
        assert calls(1000, name) == calls(10, name)


def test_a_window_needs_no_square_of_memory(th):
    torch = th.module
    a = batch(th, (6000,), (1, 8))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        attend(a, a, a, window_size=(64, 0))
    largest = max(event.self_cpu_memory_usage for event in seen.key_averages())
    assert largest < 6000 * 6000 * 4


# Other devices than the CPU: what can be known here of code that nobody has run there.


def test_serves_devices_for_which_there_is_no_triton(th, monkeypatch):
    from scree.kernels import _dispatch

    a = batch(th, (3, 2, 5), (2, 8))
    calls = {name: call for name, call in CALLS.items() if name != "softcap"}
    want = {name: call(a) for name, call in calls.items()}
    monkeypatch.setattr(_dispatch, "device_kind", lambda arr: "mps")
    a = batch(th, (3, 2, 5), (2, 8))  # on offsets with which nothing was chosen yet
    for op, impls in _dispatch.TABLE.items():
        fitting = [impl.name for impl in impls if _dispatch._fits(impl, a) and not impl.on_request]
        assert fitting[0] == NAME, op
    for name, call in calls.items():
        assert_same_bits(th.to_np(call(a)), th.to_np(want[name]))
    monkeypatch.setattr(_dispatch, "device_kind", lambda arr: "vulkan")
    with raises(NotImplementedError, "serves device cpu, mps, xpu, got vulkan"):
        CALLS["softmax"](batch(th, (3, 2, 5), (2, 8)))


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"window_size": (2, 1), "return_lse": True}, {"causal": True, "sinks": True}],
    ids=["all", "causal", "window", "sinks"],
)
def test_attention_without_the_kernel_of_the_cpu_is_the_same(th, options, monkeypatch):
    from scree.kernels.torch_native import _attention

    torch = th.module
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = th.array(normal((4,), 9))
    q, k, v = (
        batch(th, (5, 0, 70, 3), (4, 8)),
        batch(th, (4, 2, 70, 6), (2, 8), seed=1),
        batch(th, (4, 2, 70, 6), (2, 6), seed=2),
    )

    def both():
        given = [x.values.clone().requires_grad_() for x in (q, k, v)]
        arrays = [a.with_values(x) for a, x in zip((q, k, v), given, strict=True)]
        out = kernels.varlen_attention(*arrays, implementation=NAME, **options)
        o, lse = out if isinstance(out, tuple) else (out, None)
        loss = o.values.square().sum()
        if lse is not None:
            loss = loss + torch.where(lse.values.isfinite(), lse.values, 0).square().sum()
        return [o.values.detach(), *torch.autograd.grad(loss, given)]

    want = both()
    monkeypatch.setattr(_attention, "_has_kernel", lambda q: False)
    for got, right in zip(both(), want, strict=True):
        assert_close(th.to_np(got), th.to_np(right), "float32", scale=8.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computes_nothing_in_float64(th, dtype, monkeypatch):
    """MPS has no float64."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from scree._backends import torch as backend
    from scree.kernels.torch_native import _attention, _common

    torch = th.module
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.dtype for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    a = batch(th, (3, 2, 5), (2, 8)).astype(dtype)
    cases = {name: call for name, call in CALLS.items() if name != "rope"}
    cases["rope"] = lambda a: kernels.varlen_rope(a, *(x.to(a.dtype) for x in tables(a.astype("float32")))).values
    monkeypatch.setattr(_common, "is_traced", lambda *x: False)  # the mode would see one operator, and nothing in it
    monkeypatch.setattr(backend, "is_recorded", lambda: False)
    for kernel in (True, False):
        monkeypatch.setattr(_attention, "_has_kernel", lambda q, kernel=kernel: kernel)
        for call in cases.values():
            values = a.values.clone().requires_grad_()
            with Seen():
                call(a.with_values(values)).sum().backward()
    assert torch.float32 in seen
    assert torch.float64 not in seen


@pytest.mark.parametrize("weights", ["float32", "float16"])
def test_layernorm_of_few_and_of_many_tokens_has_the_same_bits(th, monkeypatch, weights):
    torch = th.module
    norm = importlib.import_module("scree.kernels.torch_native._norm")
    x, grad = (torch.from_numpy(normal((1300, 80), seed).astype(np.float32)) for seed in (0, 1))
    given = [x, *(torch.from_numpy(normal((80,), seed)).to(getattr(torch, weights)) for seed in (2, 3))]
    for a in given:
        a.requires_grad_()

    def results():
        y = kernels.varlen_layernorm(scree.from_lengths(given[0], [1300]), *given[1:], implementation=NAME).values
        return [y.detach(), *torch.autograd.grad(y, given, grad)]

    at_once = results()
    monkeypatch.setattr(norm, "_RECYCLED", 0)
    monkeypatch.setattr(norm, "_BLOCK", 80 * 400)
    in_blocks = results()
    assert [a.dtype for a in in_blocks] == [a.dtype for a in at_once]
    for a, b in zip(in_blocks[:2], at_once[:2], strict=True):
        assert_same_bits(th.to_np(a), th.to_np(b))
    for a, b in zip(in_blocks[2:], at_once[2:], strict=True):  # sums over tokens, which may be added up otherwise
        np.testing.assert_allclose(th.to_np(a), th.to_np(b), rtol=1e-3, atol=1e-3)
