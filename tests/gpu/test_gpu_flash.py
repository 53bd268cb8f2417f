"""Other people's FlashAttention on CUDA, where it is installed: right where it serves, refused where it would not be."""

import pytest

import gpu_cases
from gpu_cases import ATTENTION, CAUSAL, Attention, assert_near, normal
from scree import kernels
from scree.kernels._dispatch import TABLE

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = pytest.mark.gpu
NAMES = [impl.name for impl in TABLE["varlen_attention"] if impl.on_request and impl.backends == ("torch",)]


def attend(case, dtype, implementation, leaves_dtype=None):
    """Return o, dq, dk, dv, or None where the implementation refuses the call."""
    q, k, v, sinks = case.make(dtype)
    cast = dtype if leaves_dtype is None else leaves_dtype
    given = [x.values.to(cast).requires_grad_() for x in (q, k, v)]
    arrays = [arr.with_values(x) for arr, x in zip((q, k, v), given, strict=True)]
    more = {} if sinks is None else {"sinks": sinks}
    try:
        o = kernels.varlen_attention(*arrays, implementation=implementation, **case.options, **more).values
    except NotImplementedError:
        return None
    weights = normal(*o.shape, dtype=dtype, seed=20).to(o.dtype)
    return o.detach(), *torch.autograd.grad((o * weights).sum(), given)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    """An implementation that is here and serves this device."""
    plain = Attention("plain", options=CAUSAL, lengths=(5, 70), key_lengths=(5, 70))
    q, k, v, _ = plain.make(torch.bfloat16)
    try:
        kernels.varlen_attention(q, k, v, causal=True, implementation=request.param)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_every_option_that_it_serves(name, case, dtype):
    got = attend(case, dtype, name)
    if got is None:
        pytest.skip(f"{name} refuses it")
    want = attend(case, dtype, "reference", torch.float64)
    for what, a, b in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        assert_near(a, b, dtype, 4, f"{name} {case}: {what}")


@pytest.mark.parametrize("dim", [8, 64, 72, 128, 192, 256])
def test_head_dims(name, dim):
    case = Attention(f"{dim}", heads=4, kv_heads=2, dim=dim, v_dim=dim, options=CAUSAL)
    got = attend(case, torch.bfloat16, name)
    if got is None:
        pytest.skip(f"{name} refuses it")
    for what, a, b in zip(
        ("o", "dq", "dk", "dv"), got, attend(case, torch.bfloat16, "reference", torch.float64), strict=True
    ):
        assert_near(a, b, torch.bfloat16, 4, f"{name} {dim}: {what}")


def test_it_is_not_what_is_chosen(name):
    q, k, v, _ = Attention("plain", options=CAUSAL).make(torch.bfloat16)
    chosen = kernels.varlen_attention(q, k, v, causal=True).values
    assert torch.equal(chosen, kernels.varlen_attention(q, k, v, causal=True, implementation="triton").values)
