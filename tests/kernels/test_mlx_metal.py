"""The Metal kernel for attention, without Metal: its body as C++ on the CPU, against the reference."""

import sys

import numpy as np
import pytest

import metal_shim
import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits, raises
from scree import kernels
from scree.kernels import _dispatch
from test_compilers import need

pytestmark = pytest.mark.no_poison
NAME = "mlx_metal"


@pytest.fixture
def ml():
    """MLX."""
    return need("mlx")


@pytest.fixture
def metal(ml, monkeypatch):
    """MLX as if there were a Metal device, which is the CPU."""
    if metal_shim.COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("the kernel's body is compiled by a C++ compiler on Linux")
    from scree.kernels.mlx_metal import _attention

    _attention._kernel.cache_clear()
    monkeypatch.setattr(ml.module.metal, "is_available", lambda: True)
    monkeypatch.setattr(ml.module.fast, "metal_kernel", metal_shim.metal_kernel)
    yield ml
    _attention._kernel.cache_clear()


def arr_of(ml, lengths, features, dtype="float32", seed=0, offset_dtype="int32"):
    """Make an Array of normals."""
    values = ml.array(normal((sum(lengths), *features), seed), dtype)
    return scree.Array(values, ml.array(oracle.offsets_of(lengths), offset_dtype))


def both(ml, q, k, v, **options):
    """Return out and LSE of the kernel, then of the reference, as NumPy."""
    found = []
    for name in (NAME, "reference"):
        out, lse = kernels.varlen_attention(q, k, v, return_lse=True, implementation=name, **options)
        assert ml.dtype_of(out.values) == ml.dtype_of(q.values)
        found += [ml.to_np(out.values), ml.to_np(lse.values)]
    return found


def check(ml, q, k, v, dtype="float32", **options):
    """Require the kernel to give what the reference gives, out and LSE."""
    out, lse, want, want_lse = both(ml, q, k, v, **options)
    assert_close(out, want, dtype, rounded_factors=True)
    assert_close(lse, want_lse, "float32")


LENGTHS = (3, 0, 1, 9, 2, 5)
KEY_LENGTHS = (4, 2, 0, 7, 6, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (2, 1)},
        {"window_size": (None, 0)},
        {"window_size": (0, None)},
        {"window_size": (2**40, 1)},
        {"causal": True, "window_size": (4, 3)},
        {"softcap": 1.5, "scale": 0.7},
        {"scale": -0.5, "causal": True},
    ],
    ids=str,
)
def test_the_options(metal, options):
    q, k, v = (arr_of(metal, LENGTHS, (2, 8), seed=seed) for seed in range(3))
    check(metal, q, k, v, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks", [False, True])
def test_cross_attention_grouped_queries_sinks_and_a_head_dim_of_its_own_for_v(metal, causal, sinks):
    q = arr_of(metal, LENGTHS, (6, 40))
    k, v = arr_of(metal, KEY_LENGTHS, (2, 40), seed=1), arr_of(metal, KEY_LENGTHS, (2, 12), seed=2)
    given = metal.array([0.5, -2.0, float("-inf"), 3.0, 0.0, 1.0]) if sinks else None
    check(metal, q, k, v, causal=causal, sinks=given)


@pytest.mark.parametrize("dim", [1, 31, 32, 33, 256])
def test_head_dims(metal, dim):
    q = arr_of(metal, (3, 4), (1, dim))
    check(metal, q, q, q)


def test_bfloat16_and_offsets_of_64_bits(metal):
    q, k, v = (arr_of(metal, LENGTHS, (2, 8), "bfloat16", seed, "int64") for seed in range(3))
    check(metal, q, k, v, "bfloat16", causal=True)


def test_tokens_that_belong_to_no_row(metal):
    spare = scree.with_capacity(arr_of(metal, LENGTHS, (2, 8)), 9, 27)
    check(metal, spare, spare, spare, causal=True)


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=str)
def test_nothing_to_compute(metal, lengths):
    q = arr_of(metal, lengths, (2, 8))
    check(metal, q, q, q)


def test_no_key_anywhere(metal):
    q, k = arr_of(metal, (2, 3), (2, 8)), arr_of(metal, (0, 0), (2, 8))
    check(metal, q, k, k, sinks=metal.array([1.0, 2.0]))


@pytest.mark.parametrize("sinks", [False, True])
def test_scores_of_minus_infinity_count_for_nothing(metal, sinks):
    values = normal((6, 1, 8), 0)
    values[0, 0, 0] = -np.inf  # the first key of a row, and both keys of the other
    values[4:, 0, 0] = -np.inf
    offsets = metal.array([0, 4, 6], "int32")
    q, k = (scree.Array(metal.array(x), offsets) for x in (np.ones((6, 1, 8)), values))
    check(metal, q, k, q, sinks=metal.array([0.5]) if sinks else None)


def test_infinite_scores_and_nan_stay_in_their_row(metal):
    values = normal((12, 1, 8), 0)
    values[3] = np.inf
    values[9] = np.nan
    k = scree.Array(metal.array(values), metal.array([0, 3, 6, 9, 12], "int32"))
    q = arr_of(metal, (3, 3, 3, 3), (1, 8), seed=1)
    out, lse, want, want_lse = both(metal, q, k, arr_of(metal, (3, 3, 3, 3), (1, 8), seed=2))
    assert_close(out, want, "float32", rounded_factors=True)
    assert_close(lse, want_lse, "float32")
    assert np.isfinite(out[:3]).all()
    assert np.isfinite(out[6:9]).all()


def test_a_row_has_the_bits_that_it_has_alone(metal):
    q = arr_of(metal, LENGTHS, (2, 8))
    out = kernels.varlen_attention(q, q, q, causal=True, implementation=NAME)
    for row in range(len(LENGTHS)):
        one = q[row : row + 1]
        alone = kernels.varlen_attention(one, one, one, causal=True, implementation=NAME)
        assert_same_bits(metal.to_np(alone.values), metal.to_np(out[row]))


@pytest.mark.parametrize("kept", ["q", "k", "neither"])
@pytest.mark.parametrize("wrong", [[0, 9, 4, 12], [-7, 3, 99, 12], [5, 5, 5, 5], [12, 8, 4, 0], [0, 4, 8, 99]], ids=str)
def test_no_offsets_lead_out_of_the_buffers(metal, wrong, kept):
    x, right = metal.array(normal((12, 2, 8), 0)), [0, 4, 8, 12]
    q, k = (scree.Array(x, metal.array(right if kept == name else wrong, "int32")) for name in "qk")
    out = kernels.varlen_attention(q, k, k, implementation=NAME)  # the stand-in checks every index
    assert np.isfinite(metal.to_np(out.values)).all()


@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_are_those_of_mlx_fast(metal, sinks):
    mx = metal.module
    q, k, v = (arr_of(metal, LENGTHS, (2, 8), seed=seed) for seed in range(3))
    given = [q.values, k.values, v.values] + ([metal.array([0.5, -1.0])] if sinks else [])
    weights = metal.array(normal((sum(LENGTHS), 2, 8), 3)), metal.array(normal((sum(LENGTHS), 2), 4))

    def loss(name):
        def of(q_values, k_values, v_values, *sink):
            arrays = q.with_values(q_values), k.with_values(k_values), v.with_values(v_values)
            options = {"causal": True, "return_lse": True, "sinks": sink[0] if sink else None}
            out, lse = kernels.varlen_attention(*arrays, implementation=name, **options)
            return mx.sum(out.values * weights[0]) + mx.sum(lse.values * weights[1])

        return of

    numbers = tuple(range(len(given)))
    found = mx.grad(loss(NAME), argnums=numbers)(*given)
    for got, want in zip(found, mx.grad(loss("mlx_fast"), argnums=numbers)(*given), strict=True):
        assert_close(metal.to_np(got), metal.to_np(want), "float32", scale=4.0)


def test_what_it_refuses(metal):
    wide = arr_of(metal, (2, 1), (1, 257))
    with raises(NotImplementedError, "varlen_attention", f"{NAME}: its head dims go up to 256, q has 257"):
        kernels.varlen_attention(wide, wide, wide, implementation=NAME)


def test_without_metal_it_says_so_and_is_never_chosen(ml, monkeypatch):
    impl = next(impl for impl in _dispatch.TABLE["varlen_attention"] if impl.name == NAME)
    assert impl.on_request
    monkeypatch.setattr(ml.module.metal, "is_available", lambda: False)
    q = arr_of(ml, (2, 1), (2, 8))
    with raises(NotImplementedError, f"{NAME}: it is a Metal kernel for Apple GPUs", "is_available() is False"):
        kernels.varlen_attention(q, q, q, implementation=NAME)


def test_the_stand_in_notices_an_index_outside_and_what_is_not_written(metal):
    call = {
        "grid": (32, 1, 1),
        "threadgroup": (32, 1, 1),
        "output_shapes": [(4,)],
        "output_dtypes": [metal.module.float32],
    }
    x = metal.array(np.ones(4, np.float32))
    for body, says in (
        ("out[thread_position_in_grid.x] = 0.0f;", "28 indices outside"),
        ("if (thread_position_in_grid.x < 3) { out[thread_position_in_grid.x] = x[0]; }", "not written once"),
        ("if (thread_position_in_grid.x < 3) { out[0] = metal::simd_sum(x[0]); }", "lanes that do not agree"),
    ):
        kernel = metal_shim.metal_kernel("wrong", ["x"], ["out"], body)
        with pytest.raises(AssertionError, match=says):
            kernel(inputs=[x], template=[("D", 1)], **call)
