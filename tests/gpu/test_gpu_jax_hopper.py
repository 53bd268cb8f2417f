"""Attention of jax_pallas in halves at head dim 128, which Hopper has kernels for: nothing interprets them without a GPU."""

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
NAME = "jax_pallas"
DIM = 128


def arr_of(lengths, heads, dtype, seed=0):
    """Make an Array of normals on the GPU."""
    values = jnp.asarray(normal((sum(lengths), heads, DIM), seed).astype(np.float32), dtype)
    return scree.Array(values, jnp.asarray(np.array(oracle.offsets_of(lengths), np.int32)))


def step_of(implementation, sinks=None, **options):
    """A compiled function of q, k and v: the output, the LSE, the gradients of q, k and v, and that of the sinks."""

    def loss(arrays, offsets, sinks):
        q, k, v = (scree.Array(x, o) for x, o in zip(arrays, offsets, strict=True))
        out, lse = kernels.varlen_attention(
            q, k, v, implementation=implementation, return_lse=True, sinks=sinks, **options
        )
        weight = jnp.sin(jnp.arange(out.values.size, dtype=jnp.float32)).reshape(out.values.shape)
        finite = jnp.where(jnp.isfinite(lse.values), lse.values, 0)
        return (out.values.astype("float32") * weight).sum() + (finite * weight[..., 0]).sum(), (out.values, lse.values)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=0 if sinks is None else (0, 2), has_aux=True))

    def step(*given):
        (_, out), grads = compiled([a.values for a in given], [a.offsets for a in given], sinks)
        return [np.asarray(x.astype("float32")) for x in (*out, *jax.tree_util.tree_leaves(grads))]

    return step


CASES = {
    "causal": ("bfloat16", (130, 7, 0, 300), None, 4, {"causal": True}),
    "cross": ("float16", (1000, 77, 128), (64, 700, 0), 2, {"causal": True}),
    "window": ("bfloat16", (500, 9, 333), (600, 80, 100), 1, {"window_size": (100, 50)}),
    "sinks": ("float16", (700, 3), None, 2, {"causal": True, "window_size": (150, None), "sinks": True}),
    "few tokens": ("float16", (20, 3), None, 2, {"causal": True, "window_size": (5, None), "sinks": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_right_again_alone_and_beside_nan(name):
    dtype, lengths, k_lengths, group, options = CASES[name]
    k_lengths, options = k_lengths or lengths, dict(options)
    sinks = jnp.linspace(-1, 1, 4) if options.pop("sinks", False) else None
    given = [arr_of(n, h, dtype, i) for i, (n, h) in enumerate(((lengths, 4), *((k_lengths, 4 // group),) * 2))]
    step = step_of(NAME, sinks, **options)
    got, again = step(*given), step(*given)
    want = step_of("jax_xla", sinks, **options)(*(a.astype("float32") for a in given))
    rtol = 2.0**-8 if dtype == "float16" else 2.0**-6
    for i, (x, y, z) in enumerate(zip(got, again, want, strict=True)):
        assert_same_bits(x, y)
        assert (np.isfinite(x) == np.isfinite(z)).all()
        finite = np.isfinite(z)
        assert np.abs(x - z)[finite].max() <= (1e-5 if i == 1 else rtol) * np.abs(z)[finite].max()

    cuts, k_cuts = oracle.offsets_of(lengths), oracle.offsets_of(k_lengths)
    of = (cuts, cuts, cuts, k_cuts, k_cuts)  # the gradient of the sinks is of all rows
    bad = [a.with_values(a.values.at[c[1] : c[2]].set(jnp.nan)) for a, c in zip(given, of[2:], strict=True)]
    for x, y, c in zip(got, step(*bad), of, strict=False):
        for row in set(range(len(lengths))) - {1}:
            assert_same_bits(x[c[row] : c[row + 1]], y[c[row] : c[row + 1]])
    alone = (
        scree.with_capacity(a[:1], a.batch_size, a.total_length) for a in given
    )  # of the same shapes: compiled already
    for x, y, c in zip(got, step(*alone), of, strict=False):
        assert_same_bits(x[: c[1]], y[: c[1]])


def test_types_of_64_bits_change_nothing():
    a = arr_of((40, 150), 2, "bfloat16")
    want = step_of(NAME, causal=True)(a, a, a)
    with jax.enable_x64(True):
        wide = scree.Array(a.values, a.offsets.astype("int64"))
        for x, y in zip(step_of(NAME, causal=True)(wide, wide, wide), want, strict=True):
            assert_same_bits(x, y)


def test_spare_values_and_any_offsets():
    a = arr_of((40, 1, 150), 2, "bfloat16")
    full = scree.with_capacity(a, 5, 300)
    full = full.with_values(full.values.at[191:].set(jnp.nan))
    step, wide = step_of(NAME, causal=True), step_of("jax_xla", causal=True)
    for x, y in zip(step(full, full, full), step(a, a, a), strict=True):
        assert_same_bits(x[:191], y)
        assert (x[191:] == 0).all()
    for offsets in ((0, 40, 900, 3, 3, 3), (5, 6, 7, 7, 7, 200), (9, 2, -1, 0, 0, 0)):
        some = scree.Array(full.values.at[191:].set(1), jnp.asarray(np.array(offsets, np.int32)))
        got, want = step(some, some, some), wide(*(some.astype("float32"),) * 3)
        for i, (x, y) in enumerate(zip(got, want, strict=True)):
            finite = np.isfinite(y)
            assert (np.isfinite(x) == finite).all()
            assert np.abs(x - y)[finite].max() <= (1e-5 if i == 1 else 2.0**-6) * max(np.abs(y)[finite].max(), 1)


def test_vmap_over_values():
    a = arr_of((40, 1, 150), 2, "bfloat16")

    def attend(values):
        b = a.with_values(values)
        return kernels.varlen_attention(b, b, b, causal=True, implementation=NAME).values

    for x, values in zip(jax.vmap(attend)(jnp.stack([a.values, a.values * 2])), (a.values, a.values * 2), strict=True):
        assert_same_bits(np.asarray(x.astype("float32")), np.asarray(attend(values).astype("float32")))


def test_hopper_has_kernels_of_its_own():
    from scree.kernels.jax_pallas import _hopper

    if str(jax.devices()[0].compute_capability) != "9.0":
        pytest.skip("this is no Hopper")
    a = arr_of((40, 100), 2, "bfloat16")
    attend = jax.jit(lambda a: kernels.varlen_attention(a, a, a, causal=True, implementation=NAME).values)
    known = _hopper._FIRST <= jax.__version_info__ < _hopper._BEFORE
    assert ("@mosaic_gpu" in attend.lower(a).as_text()) == known
