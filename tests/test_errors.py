"""What bad input gets at the kernels' front door: every refusal, by its text.

The refusals of the type and its operations stand beside their operation, in test_array, test_offsets, test_packing.
"""

import numpy as np
import pytest

import scree
from cases import batch
from expect import raises
from scree import kernels

LENGTHS = (3, 0, 5)


def qkv(xp, heads=2, kv_heads=2, dim=4, v_dim=4, lengths=LENGTHS, key_lengths=LENGTHS, dtype="float32"):
    """Return q, k, v."""
    return (
        batch(xp, lengths, (heads, dim), dtype, 0),
        batch(xp, key_lengths, (kv_heads, dim), dtype, 1),
        batch(xp, key_lengths, (kv_heads, v_dim), dtype, 2),
    )


def test_attention_shapes(xp):
    q, k, v = qkv(xp)
    attend = kernels.varlen_attention
    with raises(ValueError, "varlen_attention", "q", "k", "batch", 3, 2):
        attend(q, k[:2], v[:2])
    with raises(ValueError, "varlen_attention", "k", "v"):
        attend(q, k, v[[2, 1, 0]])
    with raises(ValueError, "varlen_attention", "v", "batch", 3, 2):
        attend(q, k, v[:2])
    with raises(ValueError, "varlen_attention", "heads", 3, 2):
        attend(qkv(xp, heads=3)[0], k, v)
    with raises(ValueError, "varlen_attention", "v", "heads", 4, 2):
        attend(qkv(xp, heads=4)[0], k, qkv(xp, kv_heads=4)[2])
    with raises(ValueError, "varlen_attention", "q", "k", 6, 4):
        attend(qkv(xp, dim=6)[0], k, v)
    flat = batch(xp, LENGTHS, (4,))
    for bad in ((flat, k, v), (q, flat, v), (q, k, flat)):
        with raises(ValueError, "varlen_attention", "(8, 4)", "(T, heads, head_dim)"):
            attend(*bad)


def test_attention_types(xp):
    q, k, v = qkv(xp)
    attend = kernels.varlen_attention
    with raises(TypeError, "varlen_attention", "q", "Array"):
        attend(q.values, k, v)
    with raises(TypeError, "varlen_attention", "v", "Array"):
        attend(q, k, v.values)
    for bad in ((q.astype("float16"), k, v), (q, k.astype("float16"), v), (q, k, v.astype("float16"))):
        with raises((TypeError, ValueError), "varlen_attention", "float16", "float32"):
            attend(*bad)
    with raises(TypeError, "varlen_attention", "int32"):
        attend(*(x.astype("int32") for x in (q, k, v)))
    if xp.name != "numpy":
        other = scree.Array(np.zeros((8, 2, 4), np.float32), np.array([0, 3, 3, 8], np.int32))
        with raises(TypeError, "varlen_attention", "numpy", xp.name):
            attend(q, other, other)


@pytest.mark.parametrize("ragged_dim", [1, 2])
def test_attention_wants_ragged_dim_0(xp, ragged_dim):
    arr = batch(xp, LENGTHS, (2, 2), ragged_dim=ragged_dim)
    with raises(ValueError, "varlen_attention", "ragged_dim", ragged_dim, 0):
        kernels.varlen_attention(arr, arr, arr)


def test_attention_options(xp):
    q, k, v = qkv(xp)

    def attend(**options):
        return kernels.varlen_attention(q, k, v, **options)

    for bad in ((-1, 0), (0, -1), (-1, -1)):
        with raises(ValueError, "varlen_attention", "window_size", -1):
            attend(window_size=bad)
    for bad in (3, (1,), (1, 2, 3), (1.5, 0), ("a", 0), None):
        with raises((TypeError, ValueError), "varlen_attention", "window_size"):
            attend(window_size=bad)
    for bad in (0, 0.0, -1.0, float("nan")):
        with raises(ValueError, "varlen_attention", "softcap", bad):
            attend(softcap=bad)
    for shape in ((3,), (1,), (), (2, 1), (1, 2)):
        with raises(ValueError, "varlen_attention", "sinks", "(2,)"):
            attend(sinks=xp.array(np.zeros(shape)))
    with raises(TypeError, "varlen_attention", "sinks"):
        attend(sinks=[0.0, 0.0])
    with raises(TypeError, "varlen_attention", "sinks", "int32"):
        attend(sinks=xp.array([0, 0], "int32"))
    for bad in ("a", [1.0]):
        with raises((TypeError, ValueError), "varlen_attention", "scale"):
            attend(scale=bad)
    if xp.name != "numpy":
        with raises(TypeError, "varlen_attention", "sinks", "numpy"):
            attend(sinks=np.zeros(2, np.float32))


@pytest.mark.parametrize("name", ["varlen_layernorm", "varlen_rmsnorm"])
def test_norms(xp, name):
    norm = getattr(kernels, name)
    with raises(ValueError, name, "1-D"):
        norm(batch(xp, LENGTHS, ()))
    for features, ragged_dim in [((4,), 1), ((2, 4), 2)]:
        with raises(ValueError, name, "ragged_dim", ragged_dim):
            norm(batch(xp, LENGTHS, features, ragged_dim=ragged_dim))
    arr = batch(xp, LENGTHS, (4,))
    for shape in ((3,), (5,), (1,), (), (8, 4), (1, 4)):
        with raises(ValueError, name, "weight", "(4,)"):
            norm(arr, xp.array(np.ones(shape)))
    with raises(TypeError, name, "weight"):
        norm(arr, [1.0] * 4)
    with raises(TypeError, name, "weight", "int32"):
        norm(arr, xp.array(np.ones(4), "int32"))
    with raises(TypeError, name, "Array"):
        norm(arr.values)
    with raises(TypeError, name, "int32"):
        norm(arr.astype("int32"))
    for bad in ("a", None, -1.0):
        with raises((TypeError, ValueError), name, "eps"):
            norm(arr, eps=bad)
    if xp.name != "numpy":
        with raises(TypeError, name, "weight", "numpy"):
            norm(arr, np.ones(4, np.float32))


def test_layernorm_bias(xp):
    arr = batch(xp, LENGTHS, (4,))
    with raises(ValueError, "varlen_layernorm", "bias", "(4,)", "(3,)"):
        kernels.varlen_layernorm(arr, bias=xp.array(np.ones(3)))
    with raises(TypeError, "varlen_layernorm", "bias"):
        kernels.varlen_layernorm(arr, bias=0.0)


def test_softmax(xp):
    arr = batch(xp, LENGTHS, (4,))
    with raises(TypeError, "varlen_softmax", "int32"):
        kernels.varlen_softmax(arr.astype("int32"))
    with raises(TypeError, "varlen_softmax", "bool"):
        kernels.varlen_softmax(arr.astype("bool"))
    with raises(TypeError, "varlen_softmax", "Array"):
        kernels.varlen_softmax(arr.values)


def test_reduce(xp):
    arr = batch(xp, LENGTHS, (4,))
    for bad in ("average", "", "SUM", None, 3, sum):
        with raises((ValueError, TypeError), "varlen_reduce", "op", "sum", "mean", "max", "min", "logsumexp"):
            kernels.varlen_reduce(arr, bad)
    for op in ("mean", "logsumexp"):
        with raises(TypeError, "varlen_reduce", "int32", op):
            kernels.varlen_reduce(arr.astype("int32"), op)
    for op in ("sum", "mean", "logsumexp"):
        with raises(TypeError, "varlen_reduce", "bool", op):
            kernels.varlen_reduce(arr.astype("bool"), op)
    with raises(TypeError, "varlen_reduce", "Array"):
        kernels.varlen_reduce(arr.values, "sum")


def test_rope(xp):
    arr = batch(xp, LENGTHS, (2, 4))
    table = xp.array(np.zeros((5, 2)))
    rope = kernels.varlen_rope
    assert arr.max_length == 5  # known to the host from here on, wherever the Array is
    with raises(ValueError, "varlen_rope", "cos", 4, 5):
        rope(arr, table[:4], table[:4])
    with raises(ValueError, "varlen_rope", 5, 6):
        rope(arr, table, table, start=1)
    with raises(ValueError, "varlen_rope"):
        rope(arr, table, table, start=xp.array([0, 0, 1], "int32"))
    with raises(ValueError, "varlen_rope", "start"):
        rope(arr, table, table, start=-1)
    with raises(ValueError, "varlen_rope", "start"):
        rope(arr, table, table, start=xp.array([0, 0, -1], "int32"))
    for shape in ((5, 3), (5, 4), (5,), (5, 2, 1)):
        with raises(ValueError, "varlen_rope", "cos"):
            rope(arr, xp.array(np.zeros(shape)), table)
        with raises(ValueError, "varlen_rope", "sin"):
            rope(arr, table, xp.array(np.zeros(shape)))
    with raises(ValueError, "varlen_rope", "sin"):
        rope(arr, xp.array(np.zeros((6, 2))), table)
    for bad in (0.5, "a", [0.0, 0.0, 0.0], [0, 0]):
        with raises((TypeError, ValueError), "varlen_rope", "start"):
            rope(arr, table, table, start=bad)
    for shape in ((2,), (4,), (3, 1)):
        with raises((TypeError, ValueError), "varlen_rope", "start", shape):
            rope(arr, table, table, start=xp.array(np.zeros(shape), "int32"))
    with raises(TypeError, "varlen_rope", "start", "float32"):
        rope(arr, table, table, start=xp.array(np.zeros(3)))
    with raises(ValueError, "varlen_rope", "even", 5):
        rope(batch(xp, LENGTHS, (2, 5)), table, table)
    with raises(ValueError, "varlen_rope"):
        rope(batch(xp, LENGTHS, ()), table, table)
    for ragged_dim in (1, 2):
        with raises(ValueError, "varlen_rope", "ragged_dim", ragged_dim, 0):
            rope(batch(xp, LENGTHS, (2, 4), ragged_dim=ragged_dim), table, table)
    with raises(TypeError, "varlen_rope", "int32"):
        rope(arr.astype("int32"), table, table)
    with raises(TypeError, "varlen_rope", "Array"):
        rope(arr.values, table, table)
    with raises(TypeError, "varlen_rope", "cos"):
        rope(arr, [[0.0, 0.0]] * 5, table)
    if xp.name != "numpy":
        with raises(TypeError, "varlen_rope", "cos", "numpy"):
            rope(arr, np.zeros((5, 2), np.float32), table)


CALLS = {
    "varlen_attention": lambda a, **o: kernels.varlen_attention(a, a, a, **o),
    "varlen_layernorm": lambda a, **o: kernels.varlen_layernorm(a, **o),
    "varlen_rmsnorm": lambda a, **o: kernels.varlen_rmsnorm(a, **o),
    "varlen_softmax": lambda a, **o: kernels.varlen_softmax(a, **o),
    "varlen_reduce": lambda a, **o: kernels.varlen_reduce(a, "sum", **o),
    "varlen_rope": lambda a, **o: kernels.varlen_rope(a, a.values[:8, 0, :2], a.values[:8, 0, :2], **o),
}


@pytest.mark.parametrize("name", CALLS)
def test_unknown_implementations(xp, name):
    arr = batch(xp, LENGTHS, (2, 4))
    for bad in ("no such", "", "Reference"):
        with raises(ValueError, name, "implementation", "reference"):
            CALLS[name](arr, implementation=bad)
    CALLS[name](arr, implementation="reference")
