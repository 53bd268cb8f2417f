"""What the tests of saving and loading share."""

import importlib.util

import numpy as np
import pytest

import scree
from expect import assert_same_bits

HAS_ARROW = importlib.util.find_spec("pyarrow") is not None
NEEDS_ARROW = pytest.mark.skipif(not HAS_ARROW, reason="pyarrow not installed")
PLAIN = (".safetensors", ".npz")
FORMATS = (*PLAIN, *(pytest.param(s, marks=NEEDS_ARROW) for s in (".arrow", ".parquet")))
MAPPED = (*PLAIN, pytest.param(".arrow", marks=NEEDS_ARROW))


def same(a, b):
    """Require the same fields, bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, scree.Array):
        assert isinstance(b, scree.Array)
        assert a.ragged_dim == b.ragged_dim
        assert_same_bits(a.values, b.values)
        assert_same_bits(a.offsets, b.offsets)
    else:
        assert_same_bits(a, b)


def names(folder):
    """List what is in a folder, hidden files too."""
    return [path.name for path in folder.iterdir()]


def corpus():
    rng = np.random.default_rng(0)
    ids = scree.from_lengths(rng.integers(0, 9, 60).astype(np.int32), [10, 0, 25, 25])
    return {
        "ids": ids,
        "frames": scree.from_lengths(rng.normal(size=(9, 3, 2)).astype(np.float32), [3, 3, 0, 3]),
        "label": np.array([1, 2, 3, 4], np.int8),
        "image": rng.normal(size=(4, 2, 3)),
    }
