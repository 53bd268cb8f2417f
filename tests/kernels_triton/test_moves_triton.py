"""Moving tokens by kernels: hostile offsets, strides, gradients of gradients, and what is not served."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_same_bits

pytestmark = [pytest.mark.triton]
torch = pytest.importorskip("torch")
LENGTHS = (0, 3, 1, 5, 0, 3)


@pytest.fixture
def moves(device):
    """Return the module, handed out."""
    import scree.kernels

    scree.kernels.triton._load()
    from scree.kernels.triton import _moves

    return _moves


@pytest.fixture
def watched(moves, monkeypatch):
    """Count how often each kernel is launched."""
    launched = []
    original = moves.launch.Launcher.__call__

    def call(self, *args):
        launched.append(self._kernel.__name__)
        return original(self, *args)

    monkeypatch.setattr(moves.launch.Launcher, "__call__", call)
    return launched


def values(device, features=(2,), dtype=torch.float32, total=12):
    return torch.from_numpy(normal((total, *features), 0) * 10).to(device, dtype)


def array(device, features=(2,), dtype=torch.float32, lengths=LENGTHS):
    offsets = torch.tensor(oracle.offsets_of(lengths), dtype=torch.int32, device=device)
    return scree.Array(values(device, features, dtype, sum(lengths)), offsets)


def rows_of(arr):
    host = arr.offsets.tolist()
    return [arr.values[a:b].cpu().double().numpy() for a, b in zip(host, host[1:], strict=False)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("dtype", "features"),
    [
        ("float16", ()), ("float64", (1,)), ("int8", (3,)), ("int64", (2, 5)), ("bool", (0,)), ("uint8", (600,)),
        ("bool", (3,)), ("float32", (300,)),
    ],
)  # fmt: skip
def test_there_and_back(device, watched, side, dtype, features):
    arr = array(device, features, getattr(torch, dtype))
    padded, mask = scree.to_padded(arr, side, 1)
    want, want_mask = oracle.to_padded(rows_of(arr), features, np.float64, side, 1)
    np.testing.assert_array_equal(padded.cpu().double().numpy(), want)
    np.testing.assert_array_equal(mask.cpu().numpy(), want_mask)
    assert watched == ["_pad_kernel"]
    back = scree.from_padded(padded, mask)
    assert torch.equal(back.values, arr.values)
    assert back.offsets.tolist() == arr.offsets.tolist()
    assert back.offsets.dtype == torch.int32
    assert watched[1:] == ["_count_kernel", "_offsets_kernel"] + ["_unpad_kernel"] * (0 not in features)


@pytest.mark.parametrize("features", [(2,), (300,)])
def test_many_rows(device, features):
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(0, 9, 70))
    arr = array(device, features, torch.float16, lengths)
    for side in ("left", "right"):
        padded, mask = scree.to_padded(arr, side, -1.0, max_length=11)
        want, want_mask = oracle.to_padded(rows_of(arr), features, np.float64, side, -1.0, 11)
        np.testing.assert_array_equal(padded.cpu().double().numpy(), want)
        np.testing.assert_array_equal(mask.cpu().numpy(), want_mask)
        assert torch.equal(scree.from_padded(padded, mask).values, arr.values)
    order = np.random.default_rng(1).integers(0, 70, 90)
    want = np.concatenate([rows_of(arr)[i] for i in order])
    np.testing.assert_array_equal(arr[order].values.cpu().double().numpy(), want)


def test_holes_and_wide_masks(device):
    keep = torch.from_numpy(np.random.default_rng(0).random((3, 5000)) < 0.5).to(device)
    data = torch.from_numpy(normal((3, 5000), 0)).to(device)
    for mask in (keep, keep.int(), keep.double()):
        arr = scree.from_padded(data, mask)
        assert torch.equal(arr.values, data[keep])
        assert arr.lengths.tolist() == keep.sum(1).tolist()


@pytest.mark.parametrize("bits", [-0.0, float("nan"), float("inf"), -1.5])
def test_fill_keeps_its_bits(device, bits):
    padded, mask = scree.to_padded(array(device, ()), fill_value=bits)
    got = padded[~mask].cpu().numpy()
    assert_same_bits(got, np.full_like(got, bits))


@pytest.mark.parametrize("side", ["left", "right"])
def test_strided_values(device, moves, side):
    joint = values(device, (3, 2, 4))
    offsets = array(device).offsets
    for x in (joint[:, 1], joint[:, :, 1, :2], joint[:, 0, 0, 1], joint[:, :, :, 2]):
        a, b = scree.Array(x, offsets), scree.Array(x.contiguous(), offsets)
        for got, want in zip(scree.to_padded(a, side), scree.to_padded(b, side), strict=True):
            assert torch.equal(got, want)
        assert torch.equal(a[[3, 1]].values, b[[3, 1]].values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(device, moves, side):
    arr = array(device, (3,), torch.float64)
    _, mask = scree.to_padded(arr, side)

    def out(x):
        return scree.to_padded(arr.with_values(x), side, 2.0)[0]

    def back(x):
        return scree.from_padded(x, mask).values

    def rows(x):
        return arr.with_values(x)[[3, 1, 3, 0, 5, 3]].values

    def ragged(x):
        return scree.concat([arr.with_values(x), arr.with_values(x * 2)], "ragged").values

    x = arr.values.clone().requires_grad_()
    for fn, given in ((out, x), (rows, x), (ragged, x), (back, out(x).detach().requires_grad_())):
        assert torch.autograd.gradcheck(fn, (given,), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda t, fn=fn: fn(t) ** 2, (given,), fast_mode=True)


def test_gradients_of_spare_values_and_cut_rows_are_zero(device, moves):
    for lengths, width in (((2, 3), 3), ((2, 5), 4)):
        offsets = torch.tensor([0, 2, 2 + lengths[1]], device=device)
        x = values(device, (2,), total=9).requires_grad_()
        arr = scree.with_capacity(scree.Array(x[: 2 + lengths[1]], offsets), 3, 9)
        arr = arr._make(x, arr.offsets, 0, type(arr._structure)(spare=True))  # nobody knows its lengths
        if device == "cpu":
            padded, _ = moves.pad(x, arr.offsets, width, "right", 0.0, float("nan"))
        else:
            padded, _ = scree.to_padded(arr, max_length=width)
        padded[:2].sum().backward()
        fits = lengths[1] <= width
        assert padded[1].isnan().all() == (not fits)
        want = torch.zeros(9, 2)
        want[: 2 + (lengths[1] if fits else 0)] = 1
        assert torch.equal(x.grad.cpu(), want)


@pytest.mark.parametrize("offsets", [[0, 3, 100], [0, -5, 7], [9, 5, 2], [-(2**40), 2**40, 3], [12, 12, 12]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_offsets_lead_outside(device, moves, offsets, side):
    x = values(device, (2,))
    offsets = torch.tensor(offsets, device=device)
    padded, mask = moves.pad(x.requires_grad_(), offsets, 4, side, -1.0, None)
    assert not padded.isnan().any()
    assert torch.equal(padded[~mask], torch.full_like(padded[~mask], -1.0))
    padded.sum().backward()
    assert set(x.grad.unique().tolist()) <= {0.0, 1.0}


def test_odd_masks_are_refused_and_complex_values_go_the_other_way(device, watched):
    data = torch.ones(2, 3, dtype=torch.complex64, device=device)
    assert scree.from_padded(data, torch.ones(2, 3, device=device)).total_length == 6
    assert watched == []
    with pytest.raises(ValueError, match=r"mask: got 2 at \[1, 2\]; needs 0 and 1 only"):
        scree.from_padded(data.real, torch.tensor([[0, 1, 1], [1, 0, 2]], device=device))


def test_nothing_to_move(device, moves):
    empty = scree.Array(values(device, (2,), total=0), torch.tensor([0, 0, 0], device=device))
    padded, mask = scree.to_padded(empty, max_length=3)
    assert not padded.any()
    assert not mask.any()
    assert scree.to_padded(empty)[0].shape == (2, 0, 2)
    assert scree.from_padded(padded, mask).offsets.tolist() == [0, 0, 0]
    assert empty[[1, 0]].total_length == 0
    none = scree.Array(values(device, (2,), total=0), torch.tensor([0], device=device))
    assert scree.from_padded(*scree.to_padded(none, max_length=2)).batch_size == 0


def test_transformations_go_the_other_way(device, watched):
    arr = array(device)

    def loss(x):
        return scree.to_padded(arr.with_values(x), max_length=5)[0].sin().sum()

    torch.testing.assert_close(torch.func.grad(loss)(arr.values), arr.values.cos())
    assert watched == []
