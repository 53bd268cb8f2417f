"""What the room jax_xla promises beyond the suite: traced offsets, one trace for all raggedness, memory, vmap."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from scree import kernels
from test_compilers import need

pytestmark = pytest.mark.no_poison
NAME = "jax_xla"
RAGGED = [(3, 1, 5), (2, 2), (6,), (0, 0, 4, 1), (5, 4)]


@pytest.fixture
def jx():
    """JAX."""
    return need("jax")


def arr_of(jx, lengths, features, seed=0):
    """Make an Array of normals."""
    values = jx.array(normal((sum(lengths), *features), seed))
    return scree.Array(values, jx.array(oracle.offsets_of(lengths), "int32"))


def attend(a, implementation=NAME, **options):
    """Call causal attention of an Array with itself."""
    return kernels.varlen_attention(a, a, a, causal=True, implementation=implementation, **options).values


CALLS = {
    "attention": attend,
    "softmax": lambda a, implementation=NAME: kernels.varlen_softmax(a, implementation=implementation).values,
    "reduce": lambda a, implementation=NAME: kernels.varlen_reduce(a, "mean", implementation=implementation),
}


@pytest.mark.parametrize("name", CALLS)
def test_offsets_may_be_traced_and_one_trace_serves_all_raggedness(jx, name):
    jax, traces = jx.module, []

    @jx.jit
    def step(a):
        traces.append(None)

        def loss(values):
            out = CALLS[name](a.with_values(values))
            return (jax.numpy.nan_to_num(out) ** 2).sum(), out

        (_, out), grad = jax.value_and_grad(loss, has_aux=True)(a.values)
        return out, grad

    for lengths in RAGGED:
        plain = arr_of(jx, lengths, (2, 4))
        out, grad = step(scree.with_capacity(plain, 4, 10))
        want = jx.to_np(jx.run(lambda v, a=plain: CALLS[name](a.with_values(v), "reference"), plain.values))
        assert_close(jx.to_np(out)[: len(want)], want, "float32")
        assert np.isfinite(jx.to_np(grad)).all()
        assert (jx.to_np(grad)[sum(lengths) :] == 0).all()
    assert len(traces) == 1


def test_rows_of_several_tiles_and_a_row_alone(jx):
    # A tile has 128 tokens: rows that end within one, at its end, and behind several.
    lengths = (130, 5, 128, 300)
    a = arr_of(jx, lengths, (2, 8))
    out = jx.to_np(attend(a))
    host = scree.Array(jx.to_np(a.values), jx.to_np(a.offsets))
    assert_close(out, attend(host, "reference"), "float32")
    cuts = oracle.offsets_of(lengths)
    for row in (0, 3):
        place = slice(cuts[row], cuts[row + 1])
        assert_same_bits(jx.to_np(attend(a[row : row + 1])), out[place])


def test_the_gradient_of_rows_of_several_tiles(jx):
    lengths = (130, 5, 300)
    a, weights = arr_of(jx, lengths, (2, 8)), normal((435, 2, 8), 3)

    def grad(a, weights):
        return jx.eager_grad(lambda v: (attend(a.with_values(v)) * jx.array(weights)).sum(), a.values)[0]

    (want,) = jx.grad(lambda v: (attend(a.with_values(v), "reference") * jx.array(weights)).sum(), a.values)
    got = grad(a, weights)
    assert_close(got, want, "float32", scale=8.0)
    assert_same_bits(grad(a[2:3], weights[135:]), got[135:])


def test_wide_and_narrow_tokens_of_long_rows(jx):
    for features in (70, 3):
        lengths = (200, 3, 0, 1100)
        a = arr_of(jx, lengths, (features,))
        for name in ("softmax", "reduce"):
            got = jx.to_np(CALLS[name](a))
            assert_close(got, jx.to_np(CALLS[name](a, "reference")), "float32")
            alone = jx.to_np(CALLS[name](a[3:4]))
            assert_same_bits(alone, got[203:] if name == "softmax" else got[3:])


def test_many_tiles_are_found_by_a_search_where_comparing_them_with_all_rows_would_be_too_much(jx, monkeypatch):
    from scree.kernels.jax_xla import _tiles

    tiles = _tiles.tiles_of(jx.array(oracle.offsets_of((130, 0, 5, 64)), "int32"), 64)
    number = jx.module.numpy.arange(7, dtype="int32")  # the last one is no tile
    compared = tiles.tile(number)
    monkeypatch.setattr(_tiles, "_COMPARED", 0)
    for got, want in zip(tiles.tile(number), compared, strict=True):
        assert_same_bits(jx.to_np(got), jx.to_np(want))
    assert jx.to_np(compared.row).tolist() == [0, 0, 0, 2, 3, 4, 4]


@pytest.mark.parametrize("lengths", [(130, 0, 5, 64), (0, 0, 3), (127, 1, 128, 0), (1,), (0,), (1000, 0)], ids=str)
@pytest.mark.parametrize("spare", [0, 1, 200])
def test_the_row_of_every_token_by_a_search_and_by_sums(jx, lengths, spare):
    from scree.kernels.jax_xla import _tiles

    total = sum(lengths) + spare
    bounds = jx.array(oracle.offsets_of(lengths)[1:], "int32")
    want = np.searchsorted(oracle.offsets_of(lengths)[1:], np.arange(total), side="right")
    for way in (_tiles._counted, _tiles._searched, lambda total, bounds: _tiles.passed(bounds, total)):
        got = jx.to_np(way(total, bounds))
        assert got.dtype == np.int32
        assert got.tolist() == want.tolist()


def test_memory_is_of_the_order_of_the_tokens(jx):
    jax = jx.module

    def temporary(n):
        a = arr_of(jx, (n,), (1, 8))
        grad = jax.grad(lambda values, offsets: attend(scree.Array(values, offsets)).sum())
        return jax.jit(grad).lower(a.values, a.offsets).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) <= 4.5 * temporary(2048)
    assert temporary(8192) < 8192 * 8192 * 4 / 10


def test_vmap_over_values(jx):
    jax = jx.module
    a = arr_of(jx, (3, 0, 5), (2, 4))
    stacked = jx.array(normal((3, 8, 2, 4), 5))
    many = jax.vmap(lambda v: attend(a.with_values(v)))(stacked)
    for got, values in zip(many, stacked, strict=True):
        assert_close(jx.to_np(got), jx.to_np(attend(a.with_values(values))), "float32")


def test_no_offsets_reach_outside(jx):
    # What no check has seen, as under a trace: too large, falling, negative.
    values = jx.array(normal((10, 2, 4), 0))
    run = jx.jit(lambda v, o: attend(scree.Array(v, o)))
    for offsets in ([0, 4, 90], [0, 8, 3], [0, -5, 10], [7, 2, -1]):
        out = run(values, jx.array(offsets, "int32"))
        assert np.isfinite(jx.to_np(out)).all()


@pytest.mark.parametrize("features", [31, 33, 130])
@pytest.mark.parametrize("op", ["sum", "max"])
def test_reductions_of_a_row_alone_where_the_way_changes_with_the_features(jx, op, features):
    lengths = (300, 0, 5, 129, 1)
    a = arr_of(jx, lengths, (features,))
    out = jx.to_np(kernels.varlen_reduce(a, op, implementation=NAME))
    for i in (0, 2, 3):
        alone = kernels.varlen_reduce(a[i : i + 1], op, implementation=NAME)
        assert_same_bits(jx.to_np(alone)[0], out[i])


@pytest.mark.parametrize("features", [256, 1500])
@pytest.mark.parametrize("name", ["softmax", "max", "logsumexp"])
def test_wide_tokens_of_a_row_alone_where_the_way_changes_with_the_lengths(jx, name, features):
    jax = jx.module
    lengths = (600, 0, 5, 129, 1)  # long on average, and so is one row; alone, the others are short
    a = arr_of(jx, lengths, (features,))
    cuts = oracle.offsets_of(lengths)

    def call(a, implementation):
        if name == "softmax":
            return kernels.varlen_softmax(a, implementation=implementation).values
        return kernels.varlen_reduce(a, name, implementation=implementation)

    def both(a, place, implementation=NAME):
        weights = jx.array(normal((cuts[-1], features), 7)[place if name == "softmax" else slice(len(a))])

        def loss(values):
            out = call(a.with_values(values), implementation)
            return (jax.numpy.where(jax.numpy.isfinite(out), out, 0) * weights).sum(), out

        both = jax.value_and_grad(loss, has_aux=True)
        (_, out), grad = (both if implementation == NAME else jx.jit(both))(a.values)
        return jx.to_np(out), jx.to_np(grad)

    out, grad = both(a, slice(None))
    for got, want in zip((out, grad), both(a, slice(None), "reference"), strict=True):
        assert_close(got, want, "float32")
    for i in (0, 2, 3, 4):
        place = slice(cuts[i], cuts[i + 1])
        if name != "softmax":
            assert_same_bits(jx.to_np(call(a[i : i + 1], NAME)), out[i : i + 1])
            continue
        for x, y in zip(both(a[i : i + 1], place), (out, grad), strict=True):
            assert_same_bits(x, y[place])


def test_wide_tokens_as_on_devices_other_than_the_cpu(jx, monkeypatch):
    from scree.kernels.jax_xla import _fold

    monkeypatch.setattr(_fold, "_NARROW", 1000)
    lengths = (200, 3, 0, 1101)  # of no other test here: what was compiled is kept by shapes
    a = arr_of(jx, lengths, (70,))
    for name in ("softmax", "reduce"):
        got = jx.to_np(CALLS[name](a))
        assert_close(got, jx.to_np(CALLS[name](a, "reference")), "float32")
        assert_same_bits(jx.to_np(CALLS[name](a[3:4])), got[203:] if name == "softmax" else got[3:])


def test_the_second_derivative_of_softmax(jx):
    jax = jx.module
    a = arr_of(jx, (3, 0, 30), (256,))
    direction = jx.array(normal(a.values.shape, 3))

    def product(implementation):
        def loss(values):
            return (CALLS["softmax"](a.with_values(values), implementation) ** 2).sum()

        return jx.grad(lambda v: (jax.grad(loss)(v) * direction).sum(), a.values)[0]

    assert_close(product(NAME), product("reference"), "float32")


def test_spare_values_that_are_nan_reach_no_sum_and_get_no_gradient(jx):
    jax, jnp = jx.module, jx.module.numpy
    a = scree.with_capacity(arr_of(jx, (300, 5), (40,)), 4, 400)
    values = a.values.at[305:].set(jnp.nan)

    def total(values, op):
        return kernels.varlen_reduce(a.with_values(values), op, implementation=NAME)[:2].sum()

    for op in ("sum", "mean", "max", "logsumexp"):
        value, grad = jax.value_and_grad(total)(values, op)
        assert np.isfinite(value)
        assert np.isfinite(jx.to_np(grad)[:305]).all()
        assert (jx.to_np(grad)[305:] == 0).all()
