"""The rooms jax_xla and jax_pallas on JAX's GPU: right against the reference, a row's bits its own, and nothing added up in any order."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_same_bits
from scree import kernels

jax = pytest.importorskip("jax")
if jax.default_backend() != "gpu":
    pytest.skip("JAX has no GPU here", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]
NAME = "jax_xla"
LENGTHS = (130, 0, 5, 300)


def arr_of(features, seed=0):
    """Make an Array of normals on the GPU."""
    values = jnp.asarray(normal((sum(LENGTHS), *features), seed).astype(np.float32))
    return scree.Array(values, jnp.asarray(np.array(oracle.offsets_of(LENGTHS), np.int32)))


def attend(a, name):
    """Causal attention of an Array with itself, by both rooms; halves as float32."""
    return kernels.varlen_attention(a, a, a, causal=True, implementation=name).values


CALLS = {
    "attention": ((4, 64), attend),
    "softmax": ((96,), lambda a, name: kernels.varlen_softmax(a, implementation=name).values),
    "softmax of few": ((3,), lambda a, name: kernels.varlen_softmax(a, implementation=name).values),
    "sum": ((96,), lambda a, name: kernels.varlen_reduce(a, "sum", implementation=name)),
    "max": ((40,), lambda a, name: kernels.varlen_reduce(a, "max", implementation=name)),
    "layernorm": ((96,), lambda a, name: kernels.varlen_layernorm(a, implementation=name).values),
    "logsumexp": ((96,), lambda a, name: kernels.varlen_reduce(a, "logsumexp", implementation=name)),
}


def both(call, arr, implementation):
    """The result and the gradient of its product with weights that a seed gives."""

    def loss(values):
        out = call(arr.with_values(values), implementation)
        finite = jnp.where(jnp.isfinite(out), out, 0)
        return (finite * jnp.asarray(normal(out.shape, 7).astype(np.float32))).sum(), out

    (_, out), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(arr.values)
    return np.asarray(out), np.asarray(grad)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_pallas_is_right_alone_and_again(dtype, dim):
    given = [arr_of((4 if i == 0 else 2, dim), i).astype(dtype) for i in range(3)]

    def grads(given, implementation, take=slice(None)):
        def loss(values):
            q, k, v = (a.with_values(x) for a, x in zip(given, values, strict=True))
            out = kernels.varlen_attention(q, k, v, causal=True, window_size=(200, None), implementation=implementation)
            weights = jnp.asarray(normal((sum(LENGTHS), 4, dim), 7)[take].astype(np.float32))
            return (out.values.astype("float32") * weights).sum(), out.values

        (_, out), found = jax.jit(jax.value_and_grad(loss, has_aux=True))([a.values for a in given])
        return [np.asarray(x.astype("float32")) for x in (out, *found)]

    got, again = grads(given, None), grads(given, "jax_pallas")
    want = grads([a.astype("float32") for a in given], NAME)
    alone = grads([a[3:4] for a in given], None, slice(135, None))
    for x, y, z, one in zip(got, again, want, alone, strict=True):
        assert_same_bits(x, y)
        assert_same_bits(x[135:], one)
        rtol = 1e-5 if dtype == "float32" else 2.0**-7 if dtype == "float16" else 2.0**-5
        assert np.abs(x - z).max() <= rtol * np.abs(z).max()


@pytest.mark.parametrize("room", [NAME, "jax_pallas"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_right_and_two_runs_give_the_same_bits(name, room):
    features, call = CALLS[name]
    arr = arr_of(features)
    got, again, want = both(call, arr, room), both(call, arr, room), both(call, arr, "reference")
    for a, b, c in zip(got, again, want, strict=True):
        assert_same_bits(a, b)
        np.testing.assert_allclose(a, c, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("room", [NAME, "jax_pallas"])
@pytest.mark.parametrize("name", CALLS)
def test_a_row_alone_has_the_same_bits(name, room):
    features, call = CALLS[name]
    arr, cuts = arr_of(features), oracle.offsets_of(LENGTHS)
    out = np.asarray(call(arr, room))
    for row in (0, 2, 3):
        place = slice(cuts[row], cuts[row + 1]) if len(out) == sum(LENGTHS) else slice(row, row + 1)
        assert_same_bits(np.asarray(call(arr[row : row + 1], room)), out[place])


@pytest.mark.parametrize("name", CALLS)
def test_types_of_64_bits_change_nothing(name):
    features, call = CALLS[name]
    a = arr_of(features)
    want = both(call, a, "jax_pallas")
    with jax.enable_x64(True):
        got = both(call, scree.Array(a.values, a.offsets.astype("int64")), "jax_pallas")
    for x, y in zip(got, want, strict=True):
        assert_same_bits(x, y)
