"""The norms' kernels beyond what the suite of the op asks: strides, wide rows, bits, compilers."""

import numpy as np
import pytest

import scree
from cases import normal
from expect import TOLERANCES, assert_close, assert_same_bits
from scree import kernels

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of PyTorch's compiler
]
torch = pytest.importorskip("torch")


def tensor(device, shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(normal(shape, seed)).to(device, dtype)


def reference(x, weight=None, bias=None, centered=True, eps=1e-5):
    x = x.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def both(x, weight=None, bias=None, centered=True):
    """Return outputs and gradients of the kernel and of the float64 formula."""
    room = kernels.triton
    results = []
    for wide in (False, True):
        given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
        if wide:
            y = reference(*given, centered=centered)
        elif centered:
            y = room.varlen_layernorm_triton(*given)
        else:
            y = room.varlen_rmsnorm_triton(*given[:2], eps=1e-5)
        dy = tensor(x.device, x.shape, 9, y.dtype).to(x.dtype).to(y.dtype)
        grads = torch.autograd.grad(y, [t for t in given if t is not None], dy)
        results.append([y.detach(), *grads])
    return results


def compare(x, weight=None, bias=None, centered=True, scale=8.0):
    got, want = both(x, weight, bias, centered)
    dtype = str(x.dtype).removeprefix("torch.")
    for a, b in zip(got, want, strict=True):
        assert_close(a.double().cpu(), b.cpu(), dtype, scale=scale)
    return got


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (3, 2, 100), (37, 16), (2, 257), (1, 1024)])
def test_shapes(device, centered, dtype, shape):
    if shape[-1] == 1 and centered:
        return  # no spread: the gradient is 0 but for rounding
    dtype = getattr(torch, dtype)
    bias = tensor(device, shape[-1:], 2, dtype) if centered else None
    compare(tensor(device, shape, 0, dtype), tensor(device, shape[-1:], 1, dtype), bias, centered)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("features", [20, 64])
def test_wide_rows(device, monkeypatch, centered, features):
    from scree.kernels.triton import _norm_launch

    x, weight = tensor(device, (11, features)), tensor(device, (features,), 1)
    bias = tensor(device, (features,), 2) if centered else None
    for name in ("_FORWARD", "_BACKWARD"):
        monkeypatch.setattr(_norm_launch, name, {})
    monkeypatch.setattr(_norm_launch, "_WIDE", 8)
    monkeypatch.setattr(_norm_launch, "_WIDE_BACKWARD", 8)
    monkeypatch.setattr(_norm_launch, "_CHUNK", 16)
    compare(x, weight, bias, centered)


@pytest.mark.parametrize(
    "layout", ["every other", "heads of a joint tensor", "transposed", "reversed axes", "expanded"]
)
def test_strides(device, layout):
    joint = tensor(device, (6, 4, 3, 8))
    x = {
        "every other": joint[::2, 0, 0],
        "heads of a joint tensor": joint[:, 1:3, 2],
        "transposed": joint[:, 0].transpose(0, 1),
        "reversed axes": joint.permute(2, 1, 0, 3),
        "expanded": joint[:1, :, 0].expand(5, 4, 8),
    }[layout]
    assert not x.is_contiguous()
    got = compare(x, tensor(device, (8,), 1), tensor(device, (8,), 2))
    packed = both(x.contiguous(), tensor(device, (8,), 1), tensor(device, (8,), 2))[0]
    for a, b in zip(got, packed, strict=True):
        assert_same_bits(a.cpu().numpy(), b.cpu().numpy())


def test_features_that_are_not_dense(device):
    compare(tensor(device, (8, 5)).T, tensor(device, (8,), 1)[::1], None)
    compare(tensor(device, (5, 16))[:, ::2], tensor(device, (16,), 1)[::2], tensor(device, (16,), 1)[1::2])


def test_two_runs_and_rows_alone_have_the_same_bits(device):
    x, weight, bias = tensor(device, (300, 40)), tensor(device, (40,), 1), tensor(device, (40,), 2)
    first, second = both(x, weight, bias)[0], both(x, weight, bias)[0]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for begin, end in ((0, 1), (7, 9), (200, 300)):
        x1 = x[begin:end].clone().requires_grad_()
        y = kernels.triton.varlen_layernorm_triton(x1, weight, bias)
        assert torch.equal(y, first[0][begin:end])
        (dx,) = torch.autograd.grad(y, x1, tensor(device, x.shape, 9)[begin:end])
        assert torch.equal(dx, first[1][begin:end])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's own, in the interpreter
def test_nan_stays_in_its_row(device):
    x, weight = tensor(device, (9, 12)), tensor(device, (12,), 1)
    clean = both(x, weight, None)[0]
    for bad in (np.nan, np.inf):
        x[4] = bad
        y, dx, _ = both(x, weight, None)[0]
        for a, b in ((y, clean[0]), (dx, clean[1])):
            assert torch.equal(torch.cat([a[:4], a[5:]]), torch.cat([b[:4], b[5:]]))


@pytest.mark.parametrize("offsets", [[0, 3, 100], [0, -5, -7], [9, 5, 2], [0, 3, 6]])
@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_no_offsets_lead_outside(device, offsets, ragged_dim):
    shape = (9, 2, 6) if ragged_dim == 0 else (2, 9, 6)
    x = tensor(device, shape).requires_grad_()
    arr = scree.with_capacity(scree.Array(x, torch.tensor([0, 3, 9], device=device), ragged_dim), 2, 9)
    arr = arr._make(arr.values, torch.tensor(offsets, device=device), ragged_dim, arr._structure)
    y = kernels.varlen_layernorm(arr, implementation="triton").values
    y.sum().backward()
    used = min(max(offsets[-1], 0), 9)
    inside = [slice(None)] * ragged_dim + [slice(0, used)]
    beyond = [slice(None)] * ragged_dim + [slice(used, None)]
    assert_close(y.detach()[tuple(inside)].cpu(), reference(x.detach())[tuple(inside)].cpu(), "float32")
    assert not y[tuple(beyond)].any()
    assert not x.grad[tuple(beyond)].any()


def test_only_what_is_asked_for(device):
    x, weight, bias = tensor(device, (5, 8)), tensor(device, (8,), 1), tensor(device, (8,), 2)
    want = both(x, weight, bias)[0][1:]
    for asked in range(1, 8):
        given = [t.clone().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate((x, weight, bias))]
        kernels.triton.varlen_layernorm_triton(*given).backward(tensor(device, x.shape, 9))
        for t, grad in zip(given, want, strict=True):
            assert t.grad is None if not t.requires_grad else torch.equal(t.grad, grad)


def test_nothing_to_do(device):
    for shape in ((0, 8), (4, 0), (0, 0)):
        x, weight = tensor(device, shape).requires_grad_(), tensor(device, shape[-1:]).requires_grad_()
        y = kernels.triton.varlen_rmsnorm_triton(x, weight)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert not weight.grad.any()


def test_errors(device):
    x = tensor(device, (5, 8))
    with pytest.raises(ValueError, match=r"varlen_rmsnorm_triton: x has shape \(8,\); needs \(T, ..., M\)"):
        kernels.triton.varlen_rmsnorm_triton(x[0])
    with pytest.raises(ValueError, match=r"varlen_layernorm_triton: bias has shape \(5,\); needs \(8,\)"):
        kernels.triton.varlen_layernorm_triton(x, None, x[:, 0])
    with pytest.raises(TypeError, match=r"x has dtype torch.int32; needs float16, bfloat16, float32 or float64"):
        kernels.triton.varlen_rmsnorm_triton(x.int())
    with pytest.raises(TypeError, match=r"weight has dtype torch.int64"):
        kernels.triton.varlen_rmsnorm_triton(x, x[0].long())
    with pytest.raises(TypeError, match=r"x is list; needs a tensor"):
        kernels.triton.varlen_rmsnorm_triton([1.0])


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_operators(device, centered, learnt):
    x = tensor(device, (5, 2, 8)).requires_grad_()
    weight = tensor(device, (8,), 1).requires_grad_() if learnt else None
    bias = tensor(device, (8,), 2).requires_grad_() if learnt and centered else None
    kernels.triton.varlen_rmsnorm_triton(x)  # loads the operators
    for offsets in (None, torch.tensor([0, 3, 4], device=device)):
        torch.library.opcheck(torch.ops.scree.norm_fwd, (x, weight, bias, offsets, 1e-5, centered, 0))


def test_compiled(device):
    torch._dynamo.reset()
    x, weight, bias = tensor(device, (6, 8)), tensor(device, (8,), 1), tensor(device, (8,), 2)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)

    def step(x, weight, bias):
        a = kernels.varlen_layernorm(scree.Array(x * 2, offsets), weight, bias, implementation="triton")
        return kernels.varlen_rmsnorm(a, weight, implementation="triton").values

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        given = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = fn(*given)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), given)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_transformations(device):
    x, weight = tensor(device, (6, 8)), tensor(device, (8,), 1)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)

    def loss(x, weight):
        return kernels.varlen_rmsnorm(scree.Array(x, offsets), weight).values.sin().sum()

    got = torch.func.grad(loss, argnums=(0, 1))(x, weight)
    given = [t.clone().requires_grad_() for t in (x, weight)]
    want = torch.autograd.grad(loss(*given), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x, weight).sum())(x)
    # The reference answers where there is no rule.
    many = torch.func.vmap(loss, in_dims=(0, None))(torch.stack([x, x * 2]), weight)
    torch.testing.assert_close(many[1], loss(x * 2, weight))
    _, tangent = torch.func.jvp(lambda x: loss(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, (want[0] * x).sum(), rtol=1e-4, atol=1e-5)


def test_half_tolerances_hold(device):
    x = tensor(device, (64, 128), 0, torch.float16)
    y = kernels.triton.varlen_layernorm_triton(x).double()
    assert (y - reference(x)).abs().max() <= TOLERANCES["float16"][0] * 4
