"""Rotary embedding by kernels: strides, positions outside the table, compilers."""

import numpy as np
import pytest

import scree
from cases import normal
from expect import assert_close, assert_same_bits
from scree import kernels

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of PyTorch's compiler
]
torch = pytest.importorskip("torch")


def tables(device, half, positions=40):
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(half) / half)
    return torch.from_numpy(np.cos(angles)).to(device).float(), torch.from_numpy(np.sin(angles)).to(device).float()


def array(device, features, lengths=(7, 0, 20, 3), dtype=torch.float32):
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return scree.Array(torch.from_numpy(normal((sum(lengths), *features), 0)).to(device, dtype), offsets)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("features", [(2,), (3, 10), (1, 64), (20, 16), (2, 3, 6)])
def test_against_the_reference(device, interleaved, features):
    arr = array(device, features)
    given = [arr.values, *tables(device, features[-1] // 2)]
    dy = torch.from_numpy(normal(tuple(arr.values.shape), 1)).to(device).float()
    results = []
    for implementation in ("triton", "reference"):
        x, cos, sin = (t.clone().requires_grad_() for t in given)
        start = torch.tensor([3, 0, 5, 1], device=device)
        y = kernels.varlen_rope(
            arr.with_values(x), cos, sin, interleaved=interleaved, start=start, implementation=implementation
        )
        results.append([y.values, *torch.autograd.grad(y.values, (x, cos, sin), dy)])
    for got, want in zip(*results, strict=True):
        assert_close(got.detach().cpu(), want.detach().cpu(), "float32", scale=4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_views_of_a_joint_tensor(device, interleaved):
    arr = array(device, (3, 4, 8))
    cos, sin = tables(device, 4)
    for view in (arr.values[:, 1], arr.values[:, :, 2], arr.values[:, 0].transpose(1, 2).contiguous().transpose(1, 2)):
        got = kernels.varlen_rope(arr.with_values(view), cos, sin, interleaved=interleaved, implementation="triton")
        want = kernels.varlen_rope(
            arr.with_values(view.contiguous()), cos, sin, interleaved=interleaved, implementation="triton"
        )
        assert_same_bits(got.values.cpu().numpy(), want.values.cpu().numpy())


def test_positions_outside_the_table_are_nan(device):
    from scree.kernels.triton import _rope

    arr = array(device, (2, 4))
    cos, sin = tables(device, 2, 10)
    y = _rope.varlen_rope(arr, cos, sin, start=0).values
    assert y[17:27].isnan().all()
    assert not y[:17].isnan().any()
    assert not y[27:].isnan().any()
    y = _rope.varlen_rope(arr, cos, sin, start=torch.tensor([-1, 0, 0, 0], device=device)).values
    assert y[0].isnan().all()


@pytest.mark.parametrize("offsets", [[0, 3, 1000], [0, -5, 7], [9, 5, 2], [-(2**40), 2**40, 3]])
def test_no_offsets_lead_outside(device, offsets):
    from scree.kernels.triton import _rope

    arr = array(device, (2, 4))
    arr = arr._make(arr.values, torch.tensor(offsets, device=device), 0, arr._structure)
    assert _rope.varlen_rope(arr, *tables(device, 2), start=0).values.shape == arr.values.shape


def test_operator_compiler_and_transformation(device):
    torch._dynamo.reset()
    arr = array(device, (2, 4))
    cos, sin = tables(device, 2)

    def loss(x, cos, sin):
        return kernels.varlen_rope(scree.Array(x, arr.offsets), cos, sin, start=2).values.sin().sum()

    given = [t.clone().requires_grad_() for t in (arr.values, cos, sin)]
    want = torch.autograd.grad(loss(*given), given)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got in (
        torch.autograd.grad(compiled(*given), given),
        torch.func.grad(loss, argnums=(0, 1, 2))(arr.values, cos, sin),
    ):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.scree.rope_fwd, (*given, arr.offsets, None, 2, False, False))
