"""Bridges on a GPU machine: CuPy, PyTorch and JAX share CUDA memory; NumPy gets copies.

One command runs all of this: ``python -m pytest -m gpu tests/gpu``.
"""

import sys

import numpy as np
import pytest

import scree
from scree import bridges

cupy = pytest.importorskip("cupy")
if not cupy.cuda.runtime.getDeviceCount():
    pytest.skip("no CUDA device", allow_module_level=True)

OFFSETS = np.array([0, 0, 3, 4, 9, 9], np.int32)
pytestmark = pytest.mark.gpu

DTYPES = ("bool", "int8", "uint8", "int32", "int64", "float16", "bfloat16", "float32", "float64")


def host(dtype, shape=(9, 2)):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(dtype)


def on_cupy(dtype="float32"):
    return bridges.to_cupy(scree.Array(host(dtype), OFFSETS))


def on_torch(dtype="float32"):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return bridges.to_torch(scree.Array(host(dtype), OFFSETS)).to("cuda")


def on_jax(dtype="float32"):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU for JAX")
    return bridges.to_jax(scree.Array(host(dtype), OFFSETS))


def pointer(x):
    return next(int(find(x)) for name, find in POINTERS.items() if type(x).__module__.startswith(name))


POINTERS = {
    "cupy": lambda x: x.data.ptr,
    "torch": lambda x: x.data_ptr(),
    "jax": lambda x: x.unsafe_buffer_pointer(),
}


def assert_back(arr, dtype):
    back = bridges.to_numpy(arr)
    assert back.values.dtype == host(dtype).dtype
    assert back.offsets.dtype == np.int32
    assert back.values.tobytes() == host(dtype).tobytes()
    np.testing.assert_array_equal(back.offsets, OFFSETS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_and_cupy(dtype):
    arr = on_cupy(dtype)
    assert isinstance(arr.values, cupy.ndarray)
    assert isinstance(arr.offsets, cupy.ndarray)
    assert arr._structure.host is not None
    assert_back(arr, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_cupy_share_memory(dtype):
    arr = on_torch(dtype)
    there = bridges.to_cupy(arr)
    assert pointer(there.values) == pointer(arr.values)
    assert pointer(there.offsets) == pointer(arr.offsets)
    assert_back(there, dtype)
    back = bridges.to_torch(there)
    assert back.values.dtype == arr.values.dtype
    assert pointer(back.values) == pointer(arr.values)
    assert_back(back, dtype)


@pytest.mark.parametrize("dtype", ["int32", "float16", "bfloat16", "float32"])
def test_jax_shares_memory(dtype):
    for arr in (on_torch(dtype), on_cupy(dtype)):
        there = bridges.to_jax(arr)
        assert pointer(there.values) == pointer(arr.values)
        assert_back(there, dtype)
    arr = on_jax(dtype)
    for to in (bridges.to_torch, bridges.to_cupy):
        there = to(arr)
        assert pointer(there.values) == pointer(arr.values)
        assert_back(there, dtype)


def test_tensors_that_need_gradients_and_layouts():
    torch = pytest.importorskip("torch")
    arr = on_torch()
    leaf = arr.values.clone().requires_grad_()
    assert_back(bridges.to_cupy(arr.with_values(leaf)), "float32")
    turned = arr.values.T.contiguous().T
    assert_back(bridges.to_cupy(arr.with_values(turned)), "float32")
    reverse = scree.Array(on_cupy().values[::-1], on_cupy().offsets)
    assert bridges.to_torch(reverse).values.cpu().equal(torch.from_numpy(host("float32")[::-1].copy()))


def test_from_torch_on_the_host():
    torch = pytest.importorskip("torch")
    arr = scree.Array(torch.from_numpy(host("float32")), torch.from_numpy(OFFSETS.copy()))
    there = bridges.to_cupy(arr)
    assert_back(there, "float32")
    assert (there.max_length, there.min_length) == (5, 0)


def test_the_longest_length_goes_along_without_a_look():
    arr = on_torch()
    fresh = scree.from_cu_seqlens(arr.values, arr.offsets.clone(), max_length=8)
    there = bridges.to_cupy(fresh)
    assert there._structure.max_length == 8
    assert there._structure.host is None


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nested_tensors_do_not_wait_for_the_device():
    torch = pytest.importorskip("torch")
    arr = on_torch()
    fresh = scree.Array(arr.values, arr.offsets.clone())
    try:
        torch.cuda.set_sync_debug_mode("error")
        nested = bridges.to_torch_nested(fresh)
        back = bridges.from_torch_nested(nested)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert pointer(back.values) == pointer(arr.values)
    assert back._structure.max_length is None
    assert back.max_length == 5


def test_hugging_face_on_the_device():
    arr = on_torch()
    hidden_states, attention_mask = bridges.to_hf_padded(arr, "left")
    assert hidden_states.is_cuda
    assert attention_mask.is_cuda
    assert_back(bridges.from_hf_padded(hidden_states, attention_mask), "float32")


def test_arrow_from_the_device():
    pytest.importorskip("pyarrow")
    for arr in (on_cupy(), on_torch()):
        assert_back(bridges.from_arrow(bridges.to_arrow(arr)), "float32")


def test_a_torch_that_sees_no_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    arr = on_cupy()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = bridges.to_torch(arr)
    assert there.values.device.type == "cpu"
    assert_back(there, "float32")


@pytest.mark.skipif("ml_dtypes" not in sys.modules, reason="needs ml_dtypes")
def test_dtypes_that_cupy_lacks():
    import ml_dtypes

    with pytest.raises(TypeError, match="to_cupy: got dtype float8_e4m3fn"):
        bridges.to_cupy(scree.Array(np.zeros(2, ml_dtypes.float8_e4m3fn), [0, 2]))
    with pytest.raises(TypeError, match="to_cupy: got dtype datetime64"):
        bridges.to_cupy(scree.Array(np.zeros(2, "datetime64[s]"), [0, 2]))
