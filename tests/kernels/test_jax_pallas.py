"""The room jax_pallas without a GPU: its kernels in Pallas's interpreter, and what is computed elsewhere instead."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from scree import kernels
from scree.kernels import _dispatch
from test_compilers import need

pytestmark = pytest.mark.no_poison
NAME = "jax_pallas"
LENGTHS = (70, 0, 5, 40)  # tiles of single precision have 32 tokens


@pytest.fixture
def jx():
    """JAX, which takes calls of this room anywhere."""
    return need("jax")


@pytest.fixture
def anywhere(jx, monkeypatch):
    """Serve every device: what is not an NVIDIA GPU gets the tiles of jax_xla."""
    from scree.kernels import jax_pallas

    for op, impls in _dispatch.TABLE.items():
        served = tuple(impl._replace(devices=None) if impl.name == NAME else impl for impl in impls)
        monkeypatch.setitem(_dispatch.TABLE, op, served)
    monkeypatch.setattr(jax_pallas, "why_not_here", lambda: None)


@pytest.fixture
def interpreted(anywhere, monkeypatch):
    """Run the kernels in the interpreter."""
    if not hasattr(pytest.importorskip("jax.experimental.pallas.triton"), "load"):
        pytest.skip("this JAX's Pallas is too old")
    from scree.kernels.jax_pallas import _attention, _where

    for module in (_attention, _where):
        monkeypatch.setattr(module, "INTERPRET", True)


def arr_of(jx, lengths, features, seed=0, dtype="float32"):
    """Make an Array of normals."""
    values = jx.array(normal((sum(lengths), *features), seed), dtype)
    return scree.Array(values, jx.array(oracle.offsets_of(lengths), "int32"))


def compiled(run, *given):
    """Call a jitted function; nearly all the time went to optimising what the interpreter makes of a kernel."""
    return run.lower(*given).compile(compiler_options={"xla_backend_optimization_level": 0})(*given)


def results(jx, given, implementation, sinks=None, **options):
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
    run = jax.jit(jax.value_and_grad(loss, argnums=0 if sinks is None else (0, 1), has_aux=True))
    (_, out), grads = compiled(run, arrays, None if sinks is None else jx.array(sinks))
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
    together = results(jx, given, NAME, causal=True)
    bad = [a.with_values(a.values.at[cuts[2] : cuts[3]].set(np.nan)) for a in given]
    beside = results(jx, bad, NAME, causal=True)
    for row in (0, 3):
        place = slice(cuts[row], cuts[row + 1])
        for a, b in zip(together, beside, strict=True):
            assert_same_bits(a[place], b[place])
        alone = results(jx, [a[row : row + 1] for a in given], NAME, causal=True)
        for a, b in zip(together[:2], alone, strict=False):  # the gradients are of other weights
            assert_same_bits(a[place], b)


def test_spare_values_are_left_out_and_one_trace_serves_all_raggedness(jx, interpreted):
    jax, traces = jx.module, []

    @jax.jit
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

    for got, values in zip(jx.module.vmap(attend)(stacked), stacked, strict=True):
        assert_close(jx.to_np(got), jx.to_np(attend(values, "reference")), "float32")


@pytest.mark.parametrize("offsets", [[0, 4, 90], [0, 8, 3], [0, -5, 10], [7, 2, -1], [3, 3, 10]], ids=str)
def test_no_offsets_reach_outside(jx, interpreted, offsets):
    # What no check has seen, as under a trace: too large, falling, negative, not from 0.
    values = jx.array(normal((10, 2, 8), 0))

    def attend(v, o):
        b = scree.Array(v, o)
        return kernels.varlen_attention(b, b, b, causal=True, implementation=NAME).values

    assert np.isfinite(jx.to_np(jx.module.jit(attend)(values, jx.array(offsets, "int32")))).all()


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

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), grads = compiled(run, values, more)
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

        return jx.to_np(jax.grad(lambda v: (jax.grad(loss)(v) * direction).sum())(a.values))

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

    for got, values in zip(jx.module.vmap(call)(stacked), stacked, strict=True):
        assert_close(jx.to_np(got), jx.to_np(call(values)), "float32")


def test_a_table_in_double_precision_is_refused(jx, anywhere):
    from scree.kernels import jax_pallas

    a, table = arr_of(jx, (2,), (1, 4)), np.zeros((2, 2))
    assert jax_pallas.why_not("varlen_rope", a, table, table) == "serves float32 beside no float64"


@pytest.mark.parametrize("op", ["rmsnorm", "layernorm"])
def test_wide_tokens_are_refused(jx, anywhere, op):
    with pytest.raises(NotImplementedError, match="serves up to 8192 features, got 8200"):
        OPS[op](jx, arr_of(jx, (2,), (8200,)), NAME)


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
