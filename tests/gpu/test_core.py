"""The core on a GPU machine: CuPy, PyTorch and JAX on a device give what NumPy gives, and wait for it only where said.

One command runs all of this: ``python -m pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

import numpy as np
import pytest

import scree
from scree import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

LENGTHS = (3, 0, 7, 1, 12, 0)


class _CuPy:
    name = "cupy"

    def __init__(self):
        self.module = pytest.importorskip("cupy")
        if not self.module.cuda.runtime.getDeviceCount():
            pytest.skip("no CUDA device")

    def array(self, x):
        return self.module.asarray(x)

    def numpy(self, x):
        return self.module.asnumpy(x)


class _Torch:
    name = "torch"

    def __init__(self):
        self.module = pytest.importorskip("torch")
        if not self.module.cuda.is_available():
            pytest.skip("no CUDA device")

    def array(self, x):
        return self.module.from_numpy(np.array(x)).cuda()

    def numpy(self, x):
        return x.detach().cpu().numpy()


class _Jax:
    name = "jax"

    def __init__(self):
        self.module = pytest.importorskip("jax")
        if self.module.default_backend() != "gpu":
            pytest.skip("no GPU for JAX")

    def array(self, x):
        return self.module.numpy.asarray(x)

    def numpy(self, x):
        return np.asarray(x)


@pytest.fixture(params=[_CuPy, _Torch, _Jax], ids=lambda kind: kind.name)
def gpu(request):
    return request.param()


def rows(features=(4, 8), seed=0, lengths=LENGTHS):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *features)).astype(np.float32) for n in lengths]


def both(gpu, *args, **kwargs):
    host = rows(*args, **kwargs)
    return scree.pack(host), scree.pack([gpu.array(x) for x in host])


def same(gpu, got, want, tolerance=0.0):
    got, want = (x.values if isinstance(x, scree.Array) else x for x in (got, want))
    np.testing.assert_allclose(gpu.numpy(got), want, rtol=tolerance, atol=tolerance)


def test_packing(gpu):
    host, device = both(gpu)
    assert device.max_length == 12 and device.min_length == 0
    same(gpu, device.offsets, host.offsets)
    for got, want in zip(scree.unpack(device), scree.unpack(host), strict=True):
        same(gpu, got, want)
    for side in ("left", "right"):
        padded, mask = scree.to_padded(device, side=side, fill_value=-2.5)
        wanted, wanted_mask = scree.to_padded(host, side=side, fill_value=-2.5)
        same(gpu, padded, wanted)
        same(gpu, mask, wanted_mask)
        same(gpu, scree.from_padded(padded, mask), host)
    same(gpu, device[[4, -1, 2]], host[[4, -1, 2]])
    same(gpu, device[gpu.array(np.array([1, 0, 1, 0, 0, 1], bool))], host[[0, 2, 5]])
    same(gpu, scree.concat([device, device], "ragged"), scree.concat([host, host], "ragged"))
    same(gpu, scree.segment_ids(device), scree.segment_ids(host))
    same(gpu, scree.position_ids(device, start=3), scree.position_ids(host, start=3))
    same(gpu, scree.with_capacity(device, 9, 40), scree.with_capacity(host, 9, 40))


def test_structure_found_on_the_device(gpu):
    host, device = both(gpu)
    fresh = scree.from_cu_seqlens(device.values, device.offsets)
    assert fresh.offsets is device.offsets
    same(gpu, scree.segment_ids(fresh), scree.segment_ids(host))
    same(gpu, scree.position_ids(fresh), scree.position_ids(host))
    assert fresh.max_length == 12
    same(gpu, scree.from_lengths(device.values, device.lengths).offsets, host.offsets)
    falling = gpu.array(np.array([0, 5, 3, 23], np.int32))
    with pytest.raises(ValueError, match=r"offsets\[2\]: got 3 after 5"):
        scree.Array(device.values, falling).validate()


@pytest.mark.parametrize("op", ["sum", "mean", "max", "min", "logsumexp"])
def test_reduce(gpu, op):
    host, device = both(gpu)
    same(gpu, kernels.varlen_reduce(device, op), kernels.varlen_reduce(host, op), 1e-5)


def test_kernels(gpu):
    host, device = both(gpu)
    weight = np.linspace(0.5, 2, 8, dtype=np.float32)
    same(gpu, kernels.varlen_softmax(device), kernels.varlen_softmax(host), 1e-6)
    same(gpu, kernels.varlen_rmsnorm(device, gpu.array(weight)), kernels.varlen_rmsnorm(host, weight), 1e-5)
    same(gpu, kernels.varlen_layernorm(device, gpu.array(weight)), kernels.varlen_layernorm(host, weight), 1e-5)
    angles = np.outer(np.arange(20), np.linspace(0.1, 1, 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    for interleaved in (False, True):
        got = kernels.varlen_rope(device, gpu.array(cos), gpu.array(sin), interleaved=interleaved, start=2)
        same(gpu, got, kernels.varlen_rope(host, cos, sin, interleaved=interleaved, start=2), 1e-5)


def test_attention(gpu):
    host, device = both(gpu)
    host_k, device_k = both(gpu, features=(2, 8), seed=1, lengths=(5, 2, 3, 0, 12, 0))
    options = {"causal": True, "window_size": (4, None), "softcap": 5.0, "return_lse": True}
    sinks = np.linspace(-1, 1, 4, dtype=np.float32)
    got, got_lse = kernels.varlen_attention(device, device_k, device_k, sinks=gpu.array(sinks), **options)
    want, want_lse = kernels.varlen_attention(host, host_k, host_k, sinks=sinks, **options)
    same(gpu, got, want, 1e-5)
    same(gpu, got_lse, want_lse, 1e-5)


def test_torch_does_not_wait():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = torch.randn(23, 8, device="cuda", requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 10, 11, 23, 23], dtype=torch.int32, device="cuda")
    weight = torch.ones(8, device="cuda")
    angles = torch.randn(32, 4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        arr = scree.from_cu_seqlens(values, offsets, max_length=16)
        scree.segment_ids(arr)
        scree.position_ids(arr, start=2)
        scree.to_padded(arr)
        scree.to_padded(arr, side="left", max_length=16)
        scree.with_capacity(arr, 8, 32)
        scree.from_lengths(values, arr.lengths)
        kernels.varlen_rmsnorm(arr + 1, weight).values.sum().backward()
        kernels.varlen_rope(arr, angles, angles)
        repr(arr)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert arr.max_length == 16


def test_overlong_rows_are_nan_where_nobody_could_see_them():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device="cuda")
    padded, _ = scree.to_padded(scree.from_cu_seqlens(torch.ones(8, 2, device="cuda"), offsets), max_length=4)
    assert not padded[0].isnan().any() and padded[1].isnan().all()


def test_torch_pinning_and_moving():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arr = scree.pack([torch.ones(3, 2), torch.ones(5, 2)]).pin_memory()
    assert arr.values.is_pinned() and arr.offsets.is_pinned()
    moved = arr.to("cuda")
    assert moved.device.type == "cuda" and moved.offsets.device.type == "cuda" and moved.max_length == 5
    assert moved.to("cuda") is moved
    with pytest.raises(ValueError, match="offsets: on device cpu, but values is on cuda"):
        scree.Array(moved.values, arr.offsets)
