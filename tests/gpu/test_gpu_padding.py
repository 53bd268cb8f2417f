"""Padding, unpadding and taking rows on CUDA: exact, in every dtype, beyond 2^31 elements."""

import numpy as np
import pytest

import gpu_cases
import scree
from gpu_cases import normal, offsets_of

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

LENGTHS = (0, 65, 1, 300, 128, 0, 31, 17, 0)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip


def make(features, dtype=torch.float32, lengths=LENGTHS):
    values = normal(sum(lengths), *features) * 50
    return scree.Array(values > 0 if dtype is torch.bool else values.to(dtype), offsets_of(lengths))


def on_the_host(arr):
    return scree.Array(arr.values.cpu(), arr.offsets.cpu(), arr.ragged_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(), (1,), (3,), (7, 5), (1024,)], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_there_and_back(dtype, features, side):
    arr = make(features, dtype)
    fill = True if dtype is torch.bool else 3
    padded, mask = scree.to_padded(arr, side=side, fill_value=fill)
    want, want_mask = scree.to_padded(on_the_host(arr), side=side, fill_value=fill)
    assert torch.equal(padded.cpu(), want) and torch.equal(mask.cpu(), want_mask)
    back = scree.from_padded(padded, mask)
    assert torch.equal(back.values, arr.values) and torch.equal(back.offsets, arr.offsets)
    for kind in (torch.int64, torch.float32):
        assert torch.equal(scree.from_padded(padded, mask.to(kind)).values, arr.values)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_hugging_face_bridge(side):
    arr = make((768,), torch.bfloat16)
    hidden, mask = scree.bridges.to_hf_padded(arr, side)
    want, want_mask = scree.bridges.to_hf_padded(on_the_host(arr), side)
    assert torch.equal(hidden.cpu(), want) and torch.equal(mask.cpu(), want_mask)
    assert torch.equal(scree.bridges.from_hf_padded(hidden, mask).values, arr.values)


def test_a_mask_with_holes():
    padded = normal(7, 50, 12)
    mask = torch.from_numpy(np.random.default_rng(0).random((7, 50)) < 0.5).cuda()
    arr = scree.from_padded(padded, mask)
    assert torch.equal(arr.values, padded[mask])
    assert arr.lengths.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("features", [(), (3,), (1024,)], ids=str)
def test_lengths_instead_of_a_mask(side, features):
    arr = make(features, torch.bfloat16)
    padded, _ = scree.to_padded(arr, side=side, fill_value=7, max_length=310)
    for lengths in (arr, list(LENGTHS), arr.lengths):
        back = scree.from_padded(padded, lengths=lengths, side=side)
        assert torch.equal(back.values, arr.values) and torch.equal(back.offsets, arr.offsets)
    spare = scree.with_capacity(arr, 12, arr.total_length + 40)
    wide, _ = scree.to_padded(spare, side=side, fill_value=7)
    back = scree.from_padded(wide, lengths=spare, side=side)
    assert back.offsets is spare.offsets
    assert torch.equal(back.values[: arr.total_length], arr.values) and not back.values[arr.total_length :].any()


def test_many_rows_and_wide_masks():
    lengths = np.random.default_rng(0).integers(0, 40, 5000)
    arr = make((8,), torch.float16, tuple(int(n) for n in lengths))
    for side in ("right", "left"):
        padded, mask = scree.to_padded(arr, side=side, max_length=5000)
        back = scree.from_padded(padded, mask)
        assert torch.equal(back.values, arr.values) and torch.equal(back.offsets, arr.offsets)
        assert back.max_length == lengths.max()
    mask[17, 4000] = True
    mask[17, 0] = True
    assert torch.equal(scree.from_padded(padded, mask).values, padded[mask])
    odd = mask.int()
    odd[4999, 7] = 3
    with pytest.raises(ValueError, match=r"mask: got 3 at \[4999, 7\]"):
        scree.from_padded(padded, odd)


def test_gradients():
    arr = make((12,))
    leaf = arr.values.detach().requires_grad_()
    padded, mask = scree.to_padded(arr.with_values(leaf))
    weights = normal(*padded.shape, seed=1)
    (grad,) = torch.autograd.grad(padded, leaf, weights)
    assert torch.equal(grad, weights[mask])
    leaf = padded.detach().requires_grad_()
    weights = normal(*arr.values.shape, seed=2)
    (grad,) = torch.autograd.grad(scree.from_padded(leaf, mask).values, leaf, weights)
    want = torch.zeros_like(leaf)
    want[mask] = weights
    assert torch.equal(grad, want)


@pytest.mark.parametrize(
    "index", [[3, 3, 0, -2], slice(1, 6), slice(None, None, -2), [True] * 4 + [False] * 5], ids=str
)
def test_rows_and_concat(index):
    arr = make((5,))
    got, want = arr[index], on_the_host(arr)[index]
    assert torch.equal(got.values.cpu(), want.values) and torch.equal(got.offsets.cpu(), want.offsets)
    for dim in ("batch", "ragged"):
        got = scree.concat([arr, arr], dim)
        want = scree.concat([on_the_host(arr)] * 2, dim)
        assert torch.equal(got.values.cpu(), want.values) and torch.equal(got.offsets.cpu(), want.offsets)


def test_it_waits_for_nothing_where_the_size_is_known():
    arr = make((64,))
    fresh = scree.from_cu_seqlens(arr.values, arr.offsets, max_length=320)
    scree.to_padded(fresh)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        padded, _ = scree.to_padded(fresh)
        scree.bridges.to_hf_padded(fresh)
        scree.to_padded(fresh, side="left", max_length=400)
        scree.from_padded(padded, lengths=fresh)
        back = scree.from_padded(padded, lengths=LENGTHS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert padded.shape == (9, 320, 64)
    assert torch.equal(back.values, arr.values)


def test_more_than_2_to_the_31_elements():
    lengths = (1,) * 4_095 + (1_100,)
    arr = make((512,), torch.float16, lengths)
    padded, mask = scree.to_padded(arr)
    assert padded.numel() > 2**31
    assert torch.equal(padded[-1], arr.values[-1_100:])
    assert torch.equal(padded[:-1, 0], arr.values[:4_095])
    assert not padded[:-1, 1:].any()
    assert torch.equal(scree.from_padded(padded, mask).values, arr.values)


def test_memcheck():
    for features in ((), (3,), (129,)):
        for side in ("right", "left"):
            arr = make(features, torch.float16, (0, 17, 1, 40))
            padded, mask = scree.to_padded(arr, side=side)
            assert torch.equal(scree.from_padded(padded, mask).values, arr.values)
