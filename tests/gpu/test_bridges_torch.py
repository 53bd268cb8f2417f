"""PyTorch's nested tensors and the masks of Hugging Face on a GPU machine."""

from __future__ import annotations

import pytest

import scree
from scree import bridges

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]


def make():
    values = torch.arange(18.0, device="cuda").reshape(9, 2)
    offsets = torch.tensor([0, 0, 3, 4, 9, 9], dtype=torch.int32, device="cuda")
    return scree.Array(values, offsets)


def test_nested_tensors_stay_on_the_device_and_wait_for_nothing():
    arr = make()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nested = bridges.to_torch_nested(arr)
        back = bridges.from_torch_nested(nested)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert nested.offsets() is arr.offsets
    assert back.values.data_ptr() == arr.values.data_ptr()


@pytest.mark.parametrize("side", ["left", "right"])
def test_hf_round_trip(side):
    arr = make()
    hidden_states, attention_mask = bridges.to_hf_padded(arr, side)
    assert hidden_states.device.type == "cuda"
    assert attention_mask.dtype is torch.int64
    back = bridges.from_hf_padded(hidden_states, attention_mask)
    assert torch.equal(back.values, arr.values)
    assert torch.equal(back.offsets, arr.offsets)
