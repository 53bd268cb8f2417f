"""The frameworks' own operations against float64 loops."""

import math

import numpy as np
from demo_model import each_framework

from scree._backends import FRAMEWORKS
from scree.demo import native

X = np.linspace(-8, 8, 4001).astype(np.float32)


def test_every_entry_is_a_framework():
    assert set(native.NATIVE) <= set(FRAMEWORKS)


def test_erf_is_exact_to_the_rounding_of_float32():
    x = np.concatenate([X, np.array([0, -0.0, 1e-30, 1e30, np.inf, -np.inf], np.float32)])
    want = np.array([math.erf(v) for v in x.tolist()])
    got = native.erf(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=5e-7, atol=0)
    assert np.isnan(native.erf(np.array([np.nan], np.float32))).all()


@each_framework
def test_gelu(framework):
    ops = native.NATIVE[framework]()
    want = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in X.tolist()])
    got = np.asarray(ops.gelu(ops.asarray(X.reshape(1, -1))))[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-6)


def test_gelu_goes_over_many_blocks():
    x = np.linspace(-3, 3, 3 * native._BLOCK + 5, dtype=np.float32)
    gelu = native.NATIVE["numpy"]().gelu
    np.testing.assert_array_equal(gelu(x)[-100:], gelu(x[-100:]))


@each_framework
def test_linear_and_layernorm(framework):
    ops = native.NATIVE[framework]()
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8), (5, 8), (5,)))
    got = np.asarray(ops.linear(*map(ops.asarray, (x, weight, bias))))
    np.testing.assert_allclose(got, x.astype(float) @ weight.T.astype(float) + bias, rtol=1e-5, atol=1e-6)
    scale, shift = weight[0], weight[1]
    got = np.asarray(ops.layernorm(*map(ops.asarray, (x, scale, shift)), 1e-5))
    wide = x.astype(float)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * scale + shift
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@each_framework
def test_attention_sees_no_padding(framework):
    ops = native.NATIVE[framework]()
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 4, 3, 8)).astype(np.float32) for _ in range(3))
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    whole = np.asarray(ops.attention(*map(ops.asarray, (q, k, v, mask))))
    k[0, 2:], v[0, 2:] = 100, -100
    changed = np.asarray(ops.attention(*map(ops.asarray, (q, k, v, mask))))
    np.testing.assert_array_equal(whole, changed)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k, dtype=float) / math.sqrt(8)
    weights = np.exp(scores) * mask[:, None, None, :]
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(whole, np.einsum("bhnm,bmhd->bnhd", weights, v), rtol=1e-5, atol=1e-5)
