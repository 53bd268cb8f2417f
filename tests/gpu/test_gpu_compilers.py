"""The kernels on CUDA under what records or transforms them: CUDA graphs, torch.compile, torch.func, opcheck."""

import pytest

import gpu_cases
import scree
from gpu_cases import assert_bits, normal, offsets_of
from scree import kernels
from scree.kernels._dispatch import TABLE

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # the compilers' own warnings

LENGTHS, OTHERS = (40, 0, 130, 1, 29), (3, 100, 0, 90, 7)
OPS = [op for op, impls in TABLE.items() if any(impl.name == "triton" for impl in impls)]


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """Load the backend and the kernels, whichever test comes first: a compiler cannot import."""
    scree.Array(torch.zeros(1), torch.tensor([0, 1]))


def attention(x, offsets):
    arr = scree.from_cu_seqlens(x, offsets)
    return kernels.varlen_attention(arr, arr, arr, causal=True, implementation="triton").values


def rmsnorm(x, offsets):
    arr = scree.from_cu_seqlens(x, offsets)
    return kernels.varlen_rmsnorm(arr, torch.full_like(x[0, 0], 1.5), implementation="triton").values


def layernorm(x, offsets):
    arr, weight = scree.from_cu_seqlens(x, offsets), torch.full_like(x[0, 0], 1.5)
    return kernels.varlen_layernorm(arr, weight, weight, implementation="triton").values


def softmax(x, offsets):
    return kernels.varlen_softmax(scree.from_cu_seqlens(x, offsets), implementation="triton").values


def logsumexp(x, offsets):
    return kernels.varlen_reduce(scree.from_cu_seqlens(x, offsets), "logsumexp", implementation="triton")


def rope(x, offsets):
    angles = torch.arange(256, device="cuda")[:, None] * torch.linspace(0.1, 1, x.shape[2] // 2, device="cuda")
    return kernels.varlen_rope(
        scree.from_cu_seqlens(x, offsets), angles.cos(), angles.sin(), implementation="triton"
    ).values


CALLS = {
    "varlen_attention": attention,
    "varlen_layernorm": layernorm,
    "varlen_reduce": logsumexp,
    "varlen_rmsnorm": rmsnorm,
    "varlen_rope": rope,
    "varlen_softmax": softmax,
}


@pytest.fixture(params=OPS)
def call(request):
    return CALLS[request.param]


def make(seed=0):
    return normal(sum(LENGTHS), 2, 64, dtype=torch.float16, seed=seed), offsets_of(LENGTHS)


def with_gradient(call, x, offsets):
    """Return the result and the gradient of x, for weights that a seed gives."""
    leaf = x.detach().requires_grad_()
    out = call(leaf, offsets)
    weights = normal(*out.shape, dtype=out.dtype, seed=9)
    loss = torch.where(out.isfinite(), out * weights, 0.0).sum()
    return out.detach(), *torch.autograd.grad(loss, leaf)


def test_a_graph_is_replayed_with_other_offsets(call):
    x, offsets = make()
    weights = normal(*call(x, offsets).shape, dtype=torch.float16, seed=9)

    def step():
        out = call(leaf, offsets)
        return out, *torch.autograd.grad(out, leaf, weights)

    leaf = x.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths, seed in ((LENGTHS, 0), (OTHERS, 1), ((200, 0, 0, 0, 0), 2), (LENGTHS, 3)):
        with torch.no_grad():
            leaf.copy_(normal(*x.shape, dtype=torch.float16, seed=seed))
        offsets.copy_(offsets_of(lengths))
        graph.replay()
        torch.cuda.synchronize()
        fresh = leaf.detach().clone().requires_grad_()
        out = call(fresh, offsets_of(lengths))
        assert_bits(captured[0], out, f"{lengths}: result")
        assert_bits(captured[1], torch.autograd.grad(out, fresh, weights)[0], f"{lengths}: gradient")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(call, backend):
    if backend == "inductor" and call not in (attention, softmax):
        return
    torch._dynamo.reset()
    x, offsets = make()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    (out, grad), (want, want_grad) = with_gradient(compiled, x, offsets), with_gradient(call, x, offsets)
    assert_bits(out, want)
    # Inductor adds the gradients of q, k and v without rounding in between
    torch.testing.assert_close(grad, want_grad, rtol=2e-3, atol=2e-3)


def test_torch_compile_of_other_sizes(call):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 5), (40, 1, 0, 7), (100,) * 9):
        x = normal(sum(lengths), 2, 64, dtype=torch.float16)
        assert_bits(compiled(x, offsets_of(lengths)), call(x, offsets_of(lengths)), f"{lengths}")


def test_torch_func_grad(call):
    x, offsets = make()
    want = with_gradient(call, x, offsets)[1]

    def loss(x):
        out = call(x, offsets)
        return torch.where(out.isfinite(), out * normal(*out.shape, dtype=out.dtype, seed=9), 0.0).sum()

    assert_bits(torch.func.grad(loss)(x), want)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every call of an operator of scree."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "scree":
            given = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (args, kwargs or {}))
            self.calls.setdefault(func, given)
        return func(*args, **(kwargs or {}))


def test_operators(call):
    x, offsets = make()
    with _Recorder() as recorder:
        with_gradient(call, x, offsets)
    assert recorder.calls, "no operator was called under a dispatch mode"
    for operator, (args, kwargs) in recorder.calls.items():
        torch.library.opcheck(operator, args, kwargs)
        differentiable = [
            x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
        ]
        if not operator.name().endswith(("_backward", "_bwd")):
            torch.library.opcheck(operator, tuple(differentiable), kwargs)


def test_attention_under_a_checkpoint():
    x, offsets = make()
    want = with_gradient(attention, x, offsets)

    def checkpointed(x, offsets):
        return torch.utils.checkpoint.checkpoint(attention, x, offsets, use_reentrant=False)

    for a, b in zip(with_gradient(checkpointed, x, offsets), want, strict=True):
        assert_bits(a, b)


def test_export():
    class Model(torch.nn.Module):
        def forward(self, x, offsets):
            return attention(x, offsets)

    x, offsets = make()
    assert_bits(torch.export.export(Model(), (x, offsets)).module()(x, offsets), attention(x, offsets))
