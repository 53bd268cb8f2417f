"""jax.jit, grad, vmap; torch.compile, export, func; mx.grad and mx.compile; and how often each compiles."""

import numpy as np
import pytest

import conftest
import oracle
import scree
from cases import batch, normal, with_spare
from expect import raises
from scree import kernels
from test_array import LENGTHS, make, rows_of

pytestmark = [
    pytest.mark.no_poison,
    # PyTorch's own, when its compiler is imported.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def need(name):
    """Return the harness of a framework, or skip where it is not here."""
    if name not in conftest.HERE:
        pytest.skip(conftest.LOADED[name])
    return conftest.HERE[name]


# JAX


def test_jax_tree():
    xp = need("jax")
    tree = xp.module.tree_util
    arr = make(xp)
    leaves, structure = tree.tree_flatten(arr)
    assert len(leaves) == 2
    assert leaves[0] is arr.values
    assert leaves[1] is arr.offsets
    back = tree.tree_unflatten(structure, leaves)
    assert isinstance(back, scree.Array)
    assert back.values is arr.values
    for odd in (object(), None, "a", 3):
        again = tree.tree_unflatten(structure, [odd, odd])
        assert again.values is odd
        assert again.ragged_dim == 0
    assert hash(structure) == hash(tree.tree_structure(make(xp)))
    assert structure == tree.tree_structure(make(xp, lengths=(9, 0, 0)))
    across = make(xp, features=(2, 2), ragged_dim=1)
    assert tree.tree_structure(across) != structure
    assert tree.tree_map(lambda x: x, across).ragged_dim == 1
    paths = [str(path) for path, _ in tree.tree_flatten_with_path(arr)[0]]
    assert "values" in paths[0]
    assert "offsets" in paths[1]


def test_jax_jit_takes_and_gives_arrays():
    xp = need("jax")
    jax = xp.module
    arr = make(xp)

    @jax.jit
    def step(a):
        b = kernels.varlen_rmsnorm(a.map(lambda v: v * 2) + a)
        assert repr(b).startswith("scree.Array(batch_size=5, total_length=9")
        return b, scree.segment_ids(a), scree.position_ids(a, start=1), a.lengths

    got, ids, places, lengths = step(arr)
    assert isinstance(got, scree.Array)
    np.testing.assert_allclose(xp.to_np(got.values), oracle.rmsnorm(xp.to_np(arr.values) * 3), rtol=1e-5)
    assert xp.to_np(ids).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert xp.to_np(places).tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 5]
    assert xp.to_np(lengths).tolist() == list(LENGTHS)
    assert xp.to_np(got.offsets).tolist() == oracle.offsets_of(LENGTHS)
    assert [len(r) for r in scree.unpack(got)] == list(LENGTHS)
    assert got.max_length == 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_jax_padding_under_jit(side):
    xp = need("jax")
    arr = make(xp)
    padded, mask = xp.module.jit(lambda a: scree.to_padded(a, side, -1.0, max_length=6))(arr)
    want, want_mask = oracle.to_padded(rows_of(xp, arr), (2,), np.float32, side, -1.0, 6)
    np.testing.assert_array_equal(xp.to_np(padded), want)
    np.testing.assert_array_equal(xp.to_np(mask), want_mask)


def test_jax_says_what_needs_concrete_offsets():
    xp = need("jax")
    jit = xp.module.jit
    arr = make(xp)
    with raises(NotImplementedError, "to_padded", "max_length"):
        jit(scree.to_padded)(arr)
    for call in (
        lambda a: scree.unpack(a),
        lambda a: a[1],
        lambda a: a[1:],
        lambda a: list(a),
        lambda a: a.max_length,
        lambda a: a.validate(),
        lambda a: scree.from_padded(*scree.to_padded(a, max_length=5)),
        lambda a: scree.concat([a, a], dim="ragged"),
    ):
        with raises(NotImplementedError, "traced"):
            jit(call)(arr)


@pytest.mark.parametrize("side", ["right", "left"])
def test_jax_goes_back_from_padding_by_an_array(side):
    xp = need("jax")
    arr = make(xp)

    def there_and_back(a):
        return scree.from_padded(scree.to_padded(a, side, max_length=5)[0], lengths=a, side=side)

    back = xp.module.jit(there_and_back)(arr)
    np.testing.assert_array_equal(back.values, arr.values)
    np.testing.assert_array_equal(back.offsets, arr.offsets)


def test_jax_grad():
    xp = need("jax")
    jax = xp.module
    arr, weights = make(xp), xp.array(normal((9, 2), 1))

    def loss(values, offsets):
        return (kernels.varlen_rmsnorm(scree.Array(values, offsets)).values * weights).sum()

    want = jax.grad(loss)(arr.values, arr.offsets)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(arr.values, arr.offsets), want, rtol=1e-5, atol=1e-6)

    def of_array(a):
        return (kernels.varlen_rmsnorm(a).values * weights).sum()

    got = jax.grad(of_array, allow_int=True)(arr)
    assert isinstance(got, scree.Array)
    np.testing.assert_allclose(got.values, want, rtol=1e-5, atol=1e-6)
    value, got = jax.jit(jax.value_and_grad(of_array, allow_int=True))(arr)
    np.testing.assert_allclose(got.values, want, rtol=1e-5, atol=1e-6)
    assert np.isfinite(float(value))


def test_jax_vmap_over_values():
    xp = need("jax")
    jax = xp.module
    arr = make(xp)
    stacked = xp.array(normal((3, 9, 2), 0))

    def one(values):
        return kernels.varlen_rmsnorm(arr.with_values(values) * 2).values

    np.testing.assert_allclose(jax.vmap(one)(stacked), oracle.rmsnorm(normal((3, 9, 2), 0) * 2), rtol=1e-4, atol=1e-5)
    many = jax.vmap(lambda v: scree.Array(v, arr.offsets) + 1)(stacked)
    np.testing.assert_array_equal(many.values, stacked + 1)


def on_capacity(a):
    """Compute all that looks at where the sequences of a capacity Array end."""
    padded, mask = scree.to_padded(a, "left", 0.5, max_length=6)
    angles = a.values[:6, :1] * 0 + 0.5
    turned = kernels.varlen_rope(a, angles, angles, start=1)
    norm, mean = kernels.varlen_rmsnorm(a), kernels.varlen_layernorm(a)
    ids = scree.segment_ids(a), scree.position_ids(a), scree.position_ids(a, start=3)
    return norm.values, mean.values, turned.values, padded, mask, *ids, a.lengths


def assert_spare_is_left_out(xp, got):
    """Compare with what the same sequences give without spare values; these are NaN."""
    norm, mean, turned, padded, mask, ids, places, shifted, lengths = (xp.to_np(x) for x in got)
    data = xp.to_np(make(xp).values)
    spare = np.zeros((4, 2))
    np.testing.assert_allclose(norm, np.concatenate([oracle.rmsnorm(data), spare]), rtol=1e-5)
    np.testing.assert_allclose(mean, np.concatenate([oracle.layernorm(data), spare]), rtol=1e-5, atol=1e-6)
    half = np.full((6, 1), 0.5)
    want = oracle.rope(data, oracle.offsets_of(LENGTHS), half, half, start=1)
    np.testing.assert_allclose(turned, np.concatenate([want, spare]), rtol=1e-5)
    rows = [*rows_of(xp, make(xp)), spare[:0], spare[:0]]
    want, want_mask = oracle.to_padded(rows, (2,), np.float32, "left", 0.5, 6)
    np.testing.assert_array_equal(padded, want)
    np.testing.assert_array_equal(mask, want_mask)
    assert ids.tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3, 7, 7, 7, 7]
    assert places.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert shifted.tolist() == [3, 4, 5, 3, 3, 4, 5, 6, 7, 0, 0, 0, 0]
    assert lengths.tolist() == [*LENGTHS, 0, 0]


def test_jax_knows_spare_values_under_jit():
    xp = need("jax")
    full = with_spare(xp, make(xp), 7, 13)
    assert_spare_is_left_out(xp, xp.module.jit(on_capacity)(full))
    leaves, structure = xp.module.tree_util.tree_flatten(full)
    assert xp.module.tree_util.tree_unflatten(structure, leaves).validate().total_length == 13
    with raises(NotImplementedError, "concrete"):
        xp.module.jit(lambda a: scree.concat([a, a]))(full)


def jax_traces(batches):
    """Count how often one jitted program is traced over these Arrays."""
    import jax

    traces = []

    @jax.jit
    def step(a):
        traces.append(None)
        return kernels.varlen_rmsnorm(a * 2).values.sum() + scree.to_padded(a, max_length=6)[0].sum()

    for arr in batches:
        step(arr).block_until_ready()
    return len(traces)


RAGGED = [(3, 1, 5), (2, 2), (6,), (0, 0, 4, 1), (5, 4)]


def test_jax_compiles_once_with_capacity():
    xp = need("jax")
    plain = [make(xp, lengths=n) for n in RAGGED]
    assert jax_traces([scree.with_capacity(a, 4, 10) for a in plain]) == 1
    assert jax_traces(plain) > 1


@pytest.mark.parametrize("op", ["attention", "softmax", "reduce"])
def test_jax_references_ask_for_concrete_offsets(op):
    """The references loop over rows; the day a fast path lifts it, this test is to say so."""
    xp = need("jax")
    q = batch(xp, (3, 0, 5), (2, 4))
    calls = {
        "attention": lambda a: kernels.varlen_attention(a, a, a, implementation="reference").values,
        "softmax": lambda a: kernels.varlen_softmax(a, implementation="reference").values,
        "reduce": lambda a: kernels.varlen_reduce(a, "sum", implementation="reference"),
    }
    with raises(NotImplementedError, f"varlen_{op}", "concrete"):
        xp.module.jit(calls[op])(q)
    # With the offsets outside the trace, the same call compiles.
    jitted = xp.module.jit(lambda values: calls[op](q.with_values(values)))
    np.testing.assert_allclose(jitted(q.values), calls[op](q), rtol=1e-5, atol=1e-6)


# MLX


def test_mlx_grad_and_compile():
    xp = need("mlx")
    mx = xp.module
    # Rows of one length: MLX builds a program with the C++ compiler for every new fusion.
    arr = batch(xp, (3, 0, 3), (2, 4))

    def loss(values):
        a = kernels.varlen_rmsnorm(arr.with_values(values))
        return (kernels.varlen_softmax(a) * a).values.sum()

    def attend(values):
        a = arr.with_values(values)
        return kernels.varlen_attention(a, a, a, causal=True).values.sum()

    np.testing.assert_allclose(
        xp.to_np(mx.compile(mx.grad(loss))(arr.values)), xp.to_np(mx.grad(loss)(arr.values)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(xp.to_np(mx.compile(attend)(arr.values)), xp.to_np(attend(arr.values)), rtol=1e-4)


def test_mlx_compile_of_the_operations():
    xp = need("mlx")
    mx = xp.module
    arr = make(xp)

    def all_of_them(values):
        a = arr.with_values(values)
        padded, mask = scree.to_padded(a, "left", 0.5)
        return padded, mask, scree.from_padded(padded, scree.to_padded(arr, "left")[1]).values, a[1:].values, a[3]

    for x, y in zip(mx.compile(all_of_them)(arr.values), all_of_them(arr.values), strict=True):
        np.testing.assert_array_equal(xp.to_np(x), xp.to_np(y))


def test_mlx_says_what_a_trace_cannot_know():
    xp = need("mlx")
    mx = xp.module

    def inside(values, offsets):
        return kernels.varlen_softmax(scree.Array(values, offsets), implementation="reference").values

    arr = make(xp)
    with raises(NotImplementedError, "concrete"):
        mx.compile(inside)(arr.values, arr.offsets)
