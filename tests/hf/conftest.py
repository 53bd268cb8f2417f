"""The device on which these tests run: the CPU, or what SCREE_TORCH_DEVICE names."""

import os

import pytest

if device := os.environ.get("SCREE_TORCH_DEVICE"):
    torch = pytest.importorskip("torch")
    torch.set_default_device(device)
