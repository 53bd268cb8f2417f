"""Attention of the room jax_pallas without a GPU: kernels in Pallas's interpreter, and what is computed elsewhere instead."""

import functools

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from pallas_room import NAME, anywhere, arr_of, for_bits, interpreted, jx
from scree import kernels

pytestmark = pytest.mark.no_poison
LENGTHS = (70, 0, 5, 40)  # tiles of single precision have 32 tokens


def results(jx, given, implementation, sinks=None, bits=False, **options):
    """Attention's output and LSE, and the gradients of both through weights that a seed gives."""
    jax, jnp = jx.module, jx.module.numpy

    def loss(arrays, sinks):
        some = (a.with_values(x) for a, x in zip(given, arrays, strict=True))
        out, lse = kernels.varlen_attention(
            *some, implementation=implementation, return_lse=True, sinks=sinks, **options
        )
        finite = jnp.where(jnp.isfinite(lse.values), lse.values, 0)
        total = (out.values.astype("float32") * normal(out.values.shape, 8)).sum()
        return total + (finite * normal(finite.shape, 9)).sum(), (out.values, lse.values)

    arrays = [a.values for a in given]
    run = jax.value_and_grad(loss, argnums=0 if sinks is None else (0, 1), has_aux=True)
    jit = functools.partial(for_bits, jx) if bits else jx.jit
    (_, out), grads = jit(run)(arrays, None if sinks is None else jx.array(sinks))
    return [jx.to_np(x) for x in (*out, *jax.tree_util.tree_leaves(grads))]


OPTIONS = {
    "all": {},
    "causal": {"causal": True},
    "window": {"window_size": (33, 3)},
    "causal window, softcap": {"causal": True, "window_size": (20, None), "softcap": 4.0},
    "sinks": {"causal": True, "sinks": np.array([0.5, -1.0, 0.0, 2.0], np.float32)},
}
OTHER = (13, 7, 0, 90)  # keys of cross-attention: fewer, none at all, more


@pytest.mark.parametrize(("name", "k_lengths"), [("causal", LENGTHS), *((name, OTHER) for name in OPTIONS)], ids=str)
def test_results_and_gradients(jx, interpreted, name, k_lengths):
    given = arr_of(jx, LENGTHS, (4, 12)), *(arr_of(jx, k_lengths, (2, d), i) for i, d in ((1, 12), (2, 20)))
    got, want = (results(jx, given, impl, **OPTIONS[name]) for impl in (NAME, "reference"))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, "float32", scale=8.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(jx, interpreted, dtype):
    given = [arr_of(jx, (130, 3), (2, 16), i, dtype) for i in range(3)]
    wide = [a.astype("float32") for a in given]
    got, want = results(jx, given, NAME, causal=True), results(jx, wide, "reference", causal=True)
    for a, b in zip(got, want, strict=True):
        lse = a is got[1]
        assert_close(a, b, "float32" if lse else dtype, rounded_factors=not lse)


def test_a_row_alone_and_beside_nan(jx, interpreted):
    given = [arr_of(jx, LENGTHS, (2, 8), i) for i in range(3)]
    cuts = oracle.offsets_of(LENGTHS)
    together = results(jx, given, NAME, bits=True, causal=True)
    bad = [a.with_values(a.values.at[cuts[2] : cuts[3]].set(np.nan)) for a in given]
    beside = results(jx, bad, NAME, bits=True, causal=True)
    for row in (0, 3):
        place = slice(cuts[row], cuts[row + 1])
        for a, b in zip(together, beside, strict=True):
            assert_same_bits(a[place], b[place])
        alone = results(jx, [a[row : row + 1] for a in given], NAME, bits=True, causal=True)
        for a, b in zip(together[:2], alone, strict=False):  # the gradients are of other weights
            assert_same_bits(a[place], b)


def test_spare_values_are_left_out_and_one_trace_serves_all_raggedness(jx, interpreted):
    jax, traces = jx.module, []

    @jx.jit
    def step(a):
        traces.append(None)

        def loss(values):
            b = a.with_values(values)
            out, lse = kernels.varlen_attention(b, b, b, causal=True, implementation=NAME, return_lse=True)
            return (out.values**2).sum(), (out.values, lse.values)

        (_, out), grad = jax.value_and_grad(loss, has_aux=True)(a.values)
        return (*out, grad)

    for lengths in ((40, 1, 5), (0, 64), (30,), (0, 0)):
        plain = arr_of(jx, lengths, (2, 8))
        full = scree.with_capacity(plain, 4, 70)
        full = full.with_values(full.values.at[sum(lengths) :].set(np.nan))
        for got in step(full):
            assert np.isfinite(jx.to_np(got)).all()
            assert (jx.to_np(got)[sum(lengths) :] == 0).all()
    assert len(traces) == 1


def test_vmap_over_values(jx, interpreted):
    a = arr_of(jx, (3, 0, 5), (2, 8))
    stacked = jx.array(normal((3, 8, 2, 8), 5))

    def attend(values, implementation=NAME):
        b = a.with_values(values)
        return kernels.varlen_attention(b, b, b, causal=True, implementation=implementation).values

    want = jx.jit(lambda values: attend(values, "reference"))
    for got, values in zip(jx.run(jx.module.vmap(attend), stacked), stacked, strict=True):
        assert_close(jx.to_np(got), jx.to_np(want(values)), "float32")


def test_no_offsets_reach_outside_or_leave_a_token_out(jx, interpreted):
    # What no check has seen, as under a trace: too large, falling, negative, not from 0.
    values = jx.array(normal((10, 2, 8), 0))

    def attend(implementation):
        def square(v, o):
            b = scree.Array(v, o)
            out, lse = kernels.varlen_attention(b, b, b, implementation=implementation, return_lse=True)
            return (out.values**2).sum() + lse.values.sum(), (out.values, lse.values)

        return jx.jit(jx.module.grad(square, has_aux=True))

    got, want, leaves = attend(NAME), attend("jax_xla"), jx.module.tree_util.tree_leaves
    for numbers in ([0, 4, 90], [0, 8, 3], [0, -5, 10], [7, 2, -1], [3, 3, 10], [2, 5, 8]):
        offsets, before = jx.array(numbers, "int32"), max(numbers[0], 0)
        for a, b in zip(leaves(got(values, offsets)), leaves(want(values, offsets)), strict=True):
            assert_close(jx.to_np(a), jx.to_np(b), "float32")
            assert (jx.to_np(a)[:before] == 0).all()


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_nothing(jx, interpreted, lengths):
    got = results(jx, [arr_of(jx, lengths, (2, 8), i) for i in range(3)], NAME)
    assert [x.shape for x in got] == [(0, 2, 8), (0, 2), *[(0, 2, 8)] * 3]


@pytest.mark.parametrize("name", ["causal", "sinks"])
def test_a_program_for_another_device_has_the_tiles_of_jax_xla(jx, anywhere, name):
    given = arr_of(jx, LENGTHS, (4, 12)), *(arr_of(jx, OTHER, (2, 12), i) for i in (1, 2))
    got, want = (results(jx, given, impl, **OPTIONS[name]) for impl in (NAME, "jax_xla"))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, "float32")


def test_what_it_refuses(jx, monkeypatch):
    a = arr_of(jx, (2, 3), (2, 8))
    if jx.device_kind != "gpu":
        with pytest.raises(NotImplementedError, match="jax_pallas: serves device gpu, cuda, unknown, got cpu"):
            kernels.varlen_attention(a, a, a, implementation=NAME)
        with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and JAX's default backend is cpu"):
            jx.module.jit(lambda a: kernels.varlen_attention(a, a, a, implementation=NAME).values)(a)


def test_wide_heads_are_refused(jx, anywhere):
    a = arr_of(jx, (2,), (1, 257))
    with pytest.raises(NotImplementedError, match="serves head dims up to 256, got 257"):
        kernels.varlen_attention(a, a, a, implementation=NAME)


def test_older_gpus_and_a_jax_without_the_backend_are_refused(jx, monkeypatch):
    from scree.kernels import jax_pallas

    class Device:
        device_kind, compute_capability = "NVIDIA T4", "7.5"

    monkeypatch.setattr(jax_pallas.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax_pallas.jax, "devices", lambda: [Device])
    assert "compute capability 8.0 or more, got NVIDIA T4 of 7.5" in jax_pallas.why_not_here()
    Device.compute_capability = "9.0"
    monkeypatch.setattr(jax_pallas, "find_spec", lambda name: None)
    assert "needs Pallas's Triton backend" in jax_pallas.why_not_here()


def test_a_program_for_an_nvidia_gpu_has_the_kernels_and_one_for_the_cpu_has_none(jx, anywhere):
    jax, jnp = jx.module, jx.module.numpy

    def loss(q, k, offsets):
        some = scree.Array(q, offsets), *(scree.Array(k, offsets) for _ in range(2))
        out = kernels.varlen_attention(*some, causal=True, softcap=5.0, window_size=(100, None), implementation=NAME)
        return out.values.astype("float32").sum()

    like = jax.ShapeDtypeStruct
    shapes = like((300, 4, 80), jnp.bfloat16), like((300, 2, 80), jnp.bfloat16), like((5,), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
    assert "triton" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX compiles for no GPU that is not here: {error}")
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_tiles_fit_into_little_shared_memory(jx, monkeypatch):
    from scree.kernels.jax_pallas import _attention

    class Device:
        compute_capability = ""

    q = jx.module.ShapeDtypeStruct((9, 2, 128), "bfloat16")
    monkeypatch.setattr(_attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(_attention.jax, "devices", lambda: [Device])
    found = {}
    for capability in ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"):
        Device.compute_capability = capability
        found[capability] = _attention._cut("forward", q, q).stages
    assert found == {"8.0": 4, "8.6": 3, "8.9": 3, "9.0": 4, "10.0": 4, "12.0": 3}
