"""Norms, softmax, reductions and rope on CUDA against the reference in float64, and their bits."""

import pytest

import gpu_cases
import scree
from gpu_cases import assert_bits, assert_near, normal, offsets_of
from scree import kernels
from scree.kernels._dispatch import TABLE

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

LENGTHS = (0, 65, 1, 300, 2500, 0, 31, 17, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SERVED = {op for op, impls in TABLE.items() if any(impl.name == "triton" for impl in impls)}
REDUCTIONS = ("sum", "mean", "max", "min", "logsumexp")
ALL = ("varlen_rmsnorm", "varlen_layernorm", "varlen_softmax", "varlen_rope", *(f"reduce {how}" for how in REDUCTIONS))


def serves(what):
    return ("varlen_reduce" if what.startswith("reduce") else what) in SERVED


OPS = [what for what in ALL if serves(what)]
PER_TOKEN = [what for what in OPS if not what.startswith("reduce")]


def parameters(what, features, dtype):
    """Return the small tensors that an op takes beside the array."""
    width = features[-1] if features else 1
    if what == "varlen_rmsnorm":
        return [1 + 0.1 * normal(width, dtype=dtype, seed=1)]
    if what == "varlen_layernorm":
        return [1 + 0.1 * normal(width, dtype=dtype, seed=1), normal(width, dtype=dtype, seed=2)]
    if what == "varlen_rope":
        angles = torch.arange(4096, device="cuda")[:, None] * torch.linspace(0.01, 1, width // 2, device="cuda")
        return [angles.cos(), angles.sin()]
    return []


def call(what, arr, given, implementation="triton"):
    """Return the values."""
    if what.startswith("reduce"):
        return kernels.varlen_reduce(arr, what.removeprefix("reduce "), implementation=implementation)
    return getattr(kernels, what)(arr, *given, implementation=implementation).values


def run(what, arr, given, implementation="triton", wide=False, weights=None):
    """Return the result and the gradients of the array and of the small tensors."""
    leaves = [(x.double() if wide else x).detach().requires_grad_() for x in (arr.values, *given)]
    out = call(what, arr.with_values(leaves[0]), leaves[1:], implementation)
    weights = normal(*out.shape, dtype=arr.dtype, seed=9) if weights is None else weights
    loss = torch.where(out.isfinite(), out * weights.to(out.dtype), 0.0).sum()
    return out.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)


def check(what, arr, dtype):
    """Compare with the reference in float64."""
    given = parameters(what, arr.feature_shape, dtype)
    got, want = run(what, arr, given), run(what, arr, given, "reference", wide=True)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype is (arr.values, arr.values, *given)[i].dtype
        nan = b.isnan()
        assert torch.equal(a.isnan(), nan), f"{what}: NaN in other places"
        # The gradients of small tensors sum over every token.
        assert_near(a.masked_fill(nan, 0.0), b.masked_fill(nan, 0.0), dtype, 2.0 if i < 2 else 8.0, f"{what}, {i}")


def make(features, dtype, lengths=LENGTHS, ragged_dim=0):
    shape = list(features)
    shape.insert(ragged_dim, sum(lengths))
    return scree.Array(normal(*shape, dtype=dtype), offsets_of(lengths), ragged_dim)


@pytest.mark.parametrize("what", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(what, dtype):
    check(what, make((2, 64), dtype), dtype)


@pytest.mark.parametrize("what", OPS)
@pytest.mark.parametrize("size", [1, 3, 7, 100, 129, 768, 1000, 4096, 10_000])
def test_feature_sizes(what, size):
    size += size % 2 if what == "varlen_rope" else 0
    lengths = (0, 65, 1, 30)
    check(what, make((size,), torch.float16, lengths), torch.float16)


@pytest.mark.parametrize("what", [what for what in OPS if what == "varlen_softmax" or what.startswith("reduce")])
def test_without_features_and_along_another_axis(what):
    check(what, make((), torch.float32), torch.float32)
    check(what, make((3, 5), torch.float32, ragged_dim=1), torch.float32)


@pytest.mark.parametrize("what", OPS)
def test_a_very_long_and_many_short_sequences(what):
    check(what, make((4,), torch.float32, (70_001, 3)), torch.float32)
    check(what, make((4,), torch.float32, tuple(i % 5 for i in range(20_000))), torch.float32)


@pytest.mark.parametrize("what", OPS)
def test_bits_of_runs_rows_and_neighbours(what):
    arr = make((2, 64), torch.float16)
    given = parameters(what, (2, 64), torch.float16)
    weights = normal(*call(what, arr, given).shape, dtype=torch.float16, seed=9)
    together = run(what, arr, given, weights=weights)
    for a, b in zip(run(what, arr, given, weights=weights), together, strict=True):
        assert_bits(a, b, "a second run")
    cuts = arr.offsets.tolist()
    changed = arr.values.clone()
    changed[cuts[3] : cuts[4]] = float("nan")
    other = run(what, arr.with_values(changed), given, weights=weights)
    for row in range(len(LENGTHS)):
        tokens = slice(cuts[row], cuts[row + 1])
        mine = slice(row, row + 1) if what.startswith("reduce") else tokens
        alone = run(what, arr[[row]], given, weights=weights[mine])
        assert_bits(alone[0], together[0][mine], f"row {row}")
        assert_bits(alone[1], together[1][tokens], f"row {row}, gradient")
        if row != 3:
            assert_bits(other[0][mine], together[0][mine], f"row {row} beside NaN")
            assert_bits(other[1][tokens], together[1][tokens], f"row {row} beside NaN, gradient")


@pytest.mark.parametrize("what", [what for what in OPS if what == "varlen_softmax" or what.startswith("reduce")])
@pytest.mark.parametrize(
    ("features", "dtype"), [((1,), torch.float32), ((3,), torch.float32), ((16,), torch.float16)], ids=str
)
def test_bits_of_every_length_in_other_batches(what, features, dtype):
    """Around the lengths at which softmax and the reductions go other ways, among few and among many others."""
    from scree.kernels.triton._segment_launch import tiles

    t = tiles(features[0], dtype.itemsize, 4, False)
    ways = (t.short // 8, t.short // 2, t.short, t.tile // t.block, t.medium, t.part_tile // t.block, t.part)
    lengths = (0, 1, *(n + more for n in (*ways, 2 * t.part, 3 * t.part) for more in (-1, 0, 1)), 0)
    arr = make(features, dtype, lengths)
    check(what, arr, dtype)
    weights = normal(*call(what, arr, ()).shape, dtype=dtype, seed=9)
    out, grad = run(what, arr, (), weights=weights)
    order = [*reversed(range(len(lengths)))]
    turned = run(
        what,
        arr[order],
        (),
        weights=weights.flip(0) if what.startswith("reduce") else arr.with_values(weights)[order].values,
    )
    assert_bits(turned[0], out.flip(0) if what.startswith("reduce") else arr.with_values(out)[order].values, "turned")
    assert_bits(turned[1], arr.with_values(grad)[order].values, "turned, gradient")
    others = make(features, dtype, tuple(i % 9 for i in range(150_000)))
    among = run(
        what, scree.concat([arr, others]), (), weights=torch.cat([weights, torch.zeros_like(call(what, others, ()))])
    )
    assert_bits(among[0][: len(out)], out, "among many")
    assert_bits(among[1][: len(grad)], grad, "among many, gradient")


@pytest.mark.parametrize("what", PER_TOKEN)
def test_spare_values_get_nothing_and_give_nothing(what):
    arr = make((2, 64), torch.float16)
    used = arr.total_length
    full = scree.with_capacity(arr, arr.batch_size + 3, used + 77)
    full.values[used:] = float("nan")
    given = parameters(what, (2, 64), torch.float16)
    weights = normal(used + 77, 2, 64, dtype=torch.float16, seed=9)
    got, want = run(what, full, given, weights=weights), run(what, arr, given, weights=weights[:used])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i < 2:
            assert_bits(a[:used], b)
            assert not a[used:].any()
        else:
            assert_near(a, b, torch.float16, 4.0)


@pytest.mark.parametrize("what", OPS)
def test_strided_views(what):
    joint = normal(sum(LENGTHS), 3, 4, 64, dtype=torch.float16)
    given = parameters(what, (4, 64), torch.float16)
    for view in (joint[:, 1], joint[:, :, :, ::2][:, 0].repeat_interleave(2, -1), joint.transpose(2, 3)[:, 2].mT):
        strided = scree.Array(view, offsets_of(LENGTHS))
        dense = strided.with_values(view.contiguous())
        for a, b in zip(run(what, strided, given), run(what, dense, given), strict=True):
            assert_bits(a.contiguous(), b.contiguous())


@pytest.mark.parametrize("what", OPS)
def test_it_waits_for_nothing(what):
    arr = make((2, 64), torch.float16)
    given = parameters(what, (2, 64), torch.float16)
    run(what, arr, given)
    fresh = scree.from_cu_seqlens(arr.values, arr.offsets.clone())
    leaf = arr.values.detach().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = call(what, fresh.with_values(leaf), given)
        torch.autograd.grad(out, leaf, torch.ones_like(out))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("what", PER_TOKEN)
def test_more_than_2_to_the_31_elements(what):
    lengths = (100,) * 5_990 + (700, 1, 299)
    x = torch.zeros(sum(lengths), 64, 64, dtype=torch.float16, device="cuda")
    x[-1000:].normal_()
    given = parameters(what, (64, 64), torch.float16)
    arr = scree.Array(x, offsets_of(lengths))
    out = call(what, arr, given)
    few = scree.Array(x[-1000:].contiguous(), offsets_of(lengths[-3:]))
    assert_bits(out[-1000:], call(what, few, given))


def test_memcheck():
    for what in OPS:
        check(what, make((33 + what.endswith("rope"),), torch.float16, (0, 17, 1, 40)), torch.float16)
