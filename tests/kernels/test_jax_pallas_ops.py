"""The other ops of the room jax_pallas without a GPU: kernels in Pallas's interpreter, and what is computed elsewhere instead."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from pallas_room import NAME, anywhere, arr_of, interpreted, jx
from scree import kernels

pytestmark = pytest.mark.no_poison


def vectors_of(jx, size, count):
    """Vectors of normals."""
    return [jx.array(normal((size,), 20 + i)) for i in range(count)]


def tables_of(jx, places, half):
    """cos and sin."""
    angles = np.arange(places)[:, None] / 100.0 ** (np.arange(half) / half)
    return jx.array(np.cos(angles), "float32"), jx.array(np.sin(angles), "float32")


def reduction(op):
    """An op of the Array alone, which gives an array."""
    return lambda jx, a, name: kernels.varlen_reduce(a, op, implementation=name)


def rope(jx, a, name, **options):
    """Turn by tables that are long enough."""
    tables = tables_of(jx, 600, a.feature_shape[-1] // 2)
    return kernels.varlen_rope(a, *tables, implementation=name, **options).values


TOKEN_LENGTHS = (130, 0, 5, 300)  # a part of a row has 128 tokens
OPS = {
    "softmax": lambda jx, a, name: kernels.varlen_softmax(a, implementation=name).values,
    **{op: reduction(op) for op in ("sum", "mean", "max", "min", "logsumexp")},
    "rmsnorm": lambda jx, a, name: kernels.varlen_rmsnorm(a, implementation=name).values,
    "layernorm": lambda jx, a, name: kernels.varlen_layernorm(a, implementation=name).values,
    "rope": rope,
    "rope, pairs": lambda jx, a, name: rope(jx, a, name, interleaved=True, start=7),
    "rope, starts": lambda jx, a, name: rope(jx, a, name, start=[3, 0, 1, 2]),
}


def both(jx, call, values, name, *more):
    """A result, and the gradients of its product with weights that a seed gives, as NumPy's."""
    jax, jnp = jx.module, jx.module.numpy

    def loss(values, more):
        out = call(values, name, *more)
        finite = jnp.where(jnp.isfinite(out), out, 0).astype("float32")
        return (finite * normal(out.shape, 7)).sum(), out

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), grads = jx.run(run, values, more)
    return [jx.to_np(x) for x in jax.tree_util.tree_leaves((out, grads))]


HALVES = ("softmax", "max", "rmsnorm", "rope")


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in OPS), *((name, "bfloat16") for name in HALVES)]
)
def test_ops_and_their_gradients(jx, interpreted, name, dtype):
    a = arr_of(jx, TOKEN_LENGTHS, (3, 10) if "rope" in name else (37,), 4, dtype)
    wide = a.astype("float32")
    got = both(jx, lambda x, impl: OPS[name](jx, a.with_values(x), impl), a.values, NAME)
    want = both(jx, lambda x, impl: OPS[name](jx, wide.with_values(x), impl), wide.values, "reference")
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, dtype, rounded_factors=dtype != "float32")


@pytest.mark.parametrize(("count", "spare"), [(0, False), (1, True), (2, False), (2, True)])
def test_gradients_of_what_norms_learn(jx, interpreted, count, spare):
    a = arr_of(jx, (10, 0, 33), (2, 96), 3)
    a = scree.with_capacity(a, 5, 50) if spare else a

    def norm(x, impl, *vectors):
        return kernels.varlen_layernorm(a.with_values(x), *vectors, implementation=impl).values

    vectors = vectors_of(jx, 96, count)
    got, want = (both(jx, norm, a.values, impl, *vectors) for impl in (NAME, "reference"))
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, "float32", scale=8.0)


def test_gradients_of_tables(jx, interpreted):
    a, tables = arr_of(jx, (10, 0, 33), (2, 12), 3), tables_of(jx, 40, 6)

    def turn(x, impl, cos, sin):
        return kernels.varlen_rope(a.with_values(x), cos, sin, implementation=impl).values

    got, want = (both(jx, turn, a.values, impl, *tables) for impl in (NAME, "reference"))
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, "float32", scale=8.0)


@pytest.mark.parametrize("name", ["softmax", "max", "logsumexp", "layernorm", "rope"])
def test_a_row_of_an_op_alone_and_beside_nan(jx, interpreted, name):
    a, cuts = arr_of(jx, TOKEN_LENGTHS, (3, 10) if "rope" in name else (37,), 5), oracle.offsets_of(TOKEN_LENGTHS)
    bad = a.with_values(a.values.at[: cuts[1]].set(np.nan))
    together, beside = (
        both(jx, lambda x, impl, b=b: OPS[name](jx, b.with_values(x), impl), b.values, NAME) for b in (a, bad)
    )
    for x, y in zip(together, beside, strict=True):
        start = cuts[1] if len(x) == sum(TOKEN_LENGTHS) else 1
        assert_same_bits(x[start:], y[start:])
        assert len(x) == sum(TOKEN_LENGTHS) or np.isnan(y[0]).all()
    row = a[3:4]
    alone = both(jx, lambda x, impl: OPS[name](jx, row.with_values(x), impl), row.values, NAME)[0]
    assert_same_bits(alone, together[0][-len(alone) :])


@pytest.mark.parametrize("name", ["softmax", "mean", "min", "rmsnorm", "rope, pairs"])
def test_spare_values_of_an_op_are_left_out(jx, interpreted, name):
    plain = arr_of(jx, TOKEN_LENGTHS, (3, 10) if "rope" in name else (37,), 6)
    full = scree.with_capacity(plain, 4, 500)
    full = full.with_values(full.values.at[435:].set(np.nan))
    want, got = (
        both(jx, lambda x, impl, b=b: OPS[name](jx, b.with_values(x), impl), b.values, NAME) for b in (plain, full)
    )
    for x, y in zip(want, got, strict=True):
        assert_same_bits(x, y[: len(x)])
        assert (y[len(x) :] == 0).all()


@pytest.mark.parametrize("offsets", [[0, 4, 90], [0, 8, 3], [0, -5, 10], [7, 2, -1], [3, 3, 10]], ids=str)
def test_no_offsets_lead_a_part_outside(jx, interpreted, offsets):
    from jax.experimental import pallas as pl

    from scree.kernels.jax_pallas import _segment_kernels

    def found(offsets, out):
        place = _segment_kernels.segment(offsets, pl.program_id(0), 10, 4)
        for i, x in enumerate((place.row, place.start, place.tokens)):
            out[pl.program_id(0), i] = x

    parts = _segment_kernels.parts_of(10, 2, 4)
    shape = jx.module.ShapeDtypeStruct((parts, 3), "int32")
    rows, starts, tokens = jx.to_np(
        pl.pallas_call(found, out_shape=shape, grid=(parts,), interpret=True)(jx.array(offsets, "int32"))
    ).T
    assert ((rows >= 0) & (rows <= 2)).all()
    used = tokens > 0
    assert ((starts >= 0) & (starts + tokens <= 10))[used].all()
    assert (tokens >= 0).all()


def test_parts_cover_every_token_once(jx, interpreted):
    from jax.experimental import pallas as pl

    from scree.kernels.jax_pallas import _segment_kernels

    lengths = np.random.default_rng(0).integers(0, 9, 700)  # more rows than one step of the search looks at
    total = int(lengths.sum()) + 5
    parts = _segment_kernels.parts_of(total, 700, 4)

    def found(offsets, out):
        place = _segment_kernels.segment(offsets, pl.program_id(0), total, 4)
        for i, x in enumerate((place.row, place.start, place.tokens)):
            out[pl.program_id(0), i] = x

    shape = jx.module.ShapeDtypeStruct((parts, 3), "int32")
    offsets = jx.array(oracle.offsets_of(lengths), "int32")
    found = jx.to_np(pl.pallas_call(found, out_shape=shape, grid=(parts,), interpret=True)(offsets))
    rows = np.full(total, -1)
    for row, start, tokens in found:
        assert (rows[start : start + tokens] == -1).all()
        rows[start : start + tokens] = row
    np.testing.assert_array_equal(rows, np.repeat(np.arange(701), [*lengths, 5]))


def test_the_second_derivative_of_softmax(jx, interpreted):
    jax, a = jx.module, arr_of(jx, (3, 0, 30), (40,))
    direction = jx.array(normal(a.values.shape, 3))

    def product(name):
        def loss(values):
            return (kernels.varlen_softmax(a.with_values(values), implementation=name).values ** 2).sum()

        return jx.grad(lambda v: (jax.grad(loss)(v) * direction).sum(), a.values)[0]

    assert_close(product(NAME), product("reference"), "float32")


@pytest.mark.parametrize("name", ["softmax", "mean", "max", "layernorm", "rope, pairs"])
def test_ops_of_another_device_are_those_of_jax_xla(jx, anywhere, name):
    a = arr_of(jx, TOKEN_LENGTHS, (3, 14) if "rope" in name else (39,), 4)
    # Of shapes that nothing here has interpreted: what was compiled is kept by shapes.
    got, want = (
        both(jx, lambda x, impl: OPS[name](jx, a.with_values(x), impl), a.values, impl) for impl in (NAME, "jax_xla")
    )
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, "float32")


@pytest.mark.parametrize(("name", "count"), [("softmax", 4), ("sum", 3), ("max", 4), ("rmsnorm", 2), ("rope", 2)])
def test_ops_for_an_nvidia_gpu_have_kernels(jx, anywhere, name, count):
    jax = jx.module

    def step(x, offsets):
        out, backward = jax.vjp(lambda x: OPS[name](jx, scree.Array(x, offsets), NAME), x)
        return out, backward(out)

    x = jax.ShapeDtypeStruct((300, 4, 80), "bfloat16")
    traced = jax.jit(step).trace(x, jax.ShapeDtypeStruct((5,), "int32"))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this JAX compiles for no GPU that is not here: {error}")
    assert text.count("__gpu$xla.gpu.triton") == count


@pytest.mark.parametrize("name", ["attention", "softmax", "max", "rmsnorm", "rope, starts"])
def test_a_program_for_an_nvidia_gpu_where_types_of_64_bits_are_on(jx, anywhere, name):
    jax = jx.module
    call = OPS.get(name, lambda jx, a, name: kernels.varlen_attention(a, a, a, True, implementation=name).values)

    def total(x, offsets):
        return call(jx, scree.Array(x, offsets), NAME).sum()

    if not hasattr(jax, "enable_x64"):
        pytest.skip("this JAX turns them on in another way")
    with jax.enable_x64(True):
        like = jax.ShapeDtypeStruct
        traced = jax.jit(jax.grad(total)).trace(like((300, 4, 32), "float32"), like((5,), "int64"))
        try:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as error:
            pytest.skip(f"this JAX compiles for no GPU that is not here: {error}")
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("name", ["softmax", "sum", "max", "layernorm", "rope, starts"])
def test_vmap_of_ops_over_values(jx, interpreted, name):
    a = arr_of(jx, TOKEN_LENGTHS, (2, 8))
    stacked = jx.array(normal((2, *a.values.shape), 5))

    def call(values):
        return OPS[name](jx, a.with_values(values), NAME)

    one = jx.jit(call)
    for got, values in zip(jx.run(jx.module.vmap(call), stacked), stacked, strict=True):
        assert_close(jx.to_np(got), jx.to_np(one(values)), "float32")


def test_a_table_in_double_precision_is_refused(jx, anywhere):
    from scree.kernels import jax_pallas

    a, table = arr_of(jx, (2,), (1, 4)), np.zeros((2, 2))
    assert jax_pallas.why_not("varlen_rope", a, table, table) == "serves float32 beside no float64"
    assert jax_pallas.why_not("varlen_rmsnorm", a, None, np.float64(1e-5)) is None  # a number is not an array


@pytest.mark.parametrize("op", ["rmsnorm", "layernorm"])
def test_wide_tokens_are_refused(jx, anywhere, op):
    with pytest.raises(NotImplementedError, match="serves up to 8192 features, got 8200"):
        OPS[op](jx, arr_of(jx, (2,), (8200,)), NAME)
