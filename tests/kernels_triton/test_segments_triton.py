"""Softmax and reductions by kernels: sequences of every length, hostile offsets, compilers."""

import numpy as np
import pytest

import oracle
import scree
from cases import normal
from expect import assert_close, assert_same_bits
from scree import kernels

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # of PyTorch's compiler
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the oracle's, of infinities
]
torch = pytest.importorskip("torch")
REDUCTIONS = ("sum", "mean", "max", "min", "logsumexp")
LENGTHS = (5, 0, 16, 40, 1, 17)


@pytest.fixture(params=["in parts", "of medium length"])
def small_tiles(device, monkeypatch, request):
    """Let some sequences be of medium length, or long, or of several parts."""
    import scree.kernels

    scree.kernels.triton._load()
    from scree.kernels.triton import _segment_launch

    medium, part = (8, 16) if request.param == "in parts" else (32, 32)
    small = _segment_launch.Tiles(4, 4, 1, 64, medium, 2, part, 32, 4, 8)
    monkeypatch.setattr(_segment_launch, "_PLANS", {})
    monkeypatch.setattr(_segment_launch, "_WAYS", {})
    monkeypatch.setattr(_segment_launch, "tiles", lambda *args: small)


def array(device, features=(3,), dtype=torch.float64, lengths=LENGTHS, known=True, seed=0):
    offsets = torch.tensor(oracle.offsets_of(lengths), dtype=torch.int32, device=device)
    arr = scree.Array(torch.from_numpy(normal((sum(lengths), *features), seed)).to(device, dtype), offsets)
    return arr if known else arr._make(arr.values, offsets, 0, type(arr._structure)())


def softmax(arr):
    return kernels.varlen_softmax(arr, implementation="triton").values


def reduce(arr, how):
    return kernels.varlen_reduce(arr, how, implementation="triton")


@pytest.mark.parametrize(("features", "known"), [((), True), ((6,), False)])
def test_several_parts(device, small_tiles, features, known):
    arr = array(device, features, known=known)
    x, offsets = arr.values.cpu().numpy(), arr.offsets.tolist()
    assert_close(softmax(arr).cpu(), oracle.softmax(x, offsets), "float64", scale=10)
    for how in REDUCTIONS:
        assert_close(reduce(arr, how).cpu(), oracle.reduce(x, offsets, how), "float64", scale=10)


@pytest.mark.parametrize("how", ["softmax", *REDUCTIONS])
def test_however_many_share_a_program_the_bits_are_the_same(device, small_tiles, monkeypatch, how):
    from scree.kernels.triton import _segment_launch

    def run(number):
        monkeypatch.setattr(_segment_launch, "_together", lambda *args: number)
        monkeypatch.setattr(_segment_launch, "_WAYS", {})
        arr = scree.with_capacity(array(device, (2,), lengths=(3, 40, 0, 1, 1, 17, 0)), 9, 70)
        x = arr.values.clone().requires_grad_()
        arr = arr._make(x, arr.offsets, 0, type(arr._structure)(spare=True))
        y = softmax(arr) if how == "softmax" else reduce(arr, how)
        finite = torch.where(y.isfinite(), y, 0.0)
        dy = torch.arange(y.numel(), device=device).reshape(y.shape)
        return y.detach(), *torch.autograd.grad((finite * dy).sum(), x)

    for one, several in zip(run(1), run(4), strict=True):
        assert_same_bits(one.cpu(), several.cpu())


@pytest.mark.parametrize(("rows", "tokens", "block", "number"), [
    (4194304, 4194304 * 16, 1, 64), (524288, 524288 * 128, 1, 16), (65536, 65536 * 128, 16, 4), (8192, 8192 * 128, 1, 1),
    (1024, 1024 * 2048, 32, 1), (64, 64 * 2048, 16, 1),
])  # fmt: skip
def test_many_short_sequences_share_programs(monkeypatch, rows, tokens, block, number):
    from scree.kernels.triton import _segment_launch

    monkeypatch.setattr(_segment_launch, "processors", lambda device: 132)
    assert _segment_launch._together(rows, _segment_launch._Shape(1, tokens, 1), block, 0) == number


@pytest.mark.parametrize("how", ["softmax", *REDUCTIONS])
def test_gradients_of_several_parts(device, small_tiles, how):
    arr = array(device, (2,), lengths=(3, 40, 1, 17))
    x = arr.values.clone().round(decimals=1).requires_grad_()  # with ties
    reference = {"implementation": "reference"}

    def call(x, **options):
        a = arr.with_values(x)
        return (
            kernels.varlen_softmax(a, **options).values
            if how == "softmax"
            else kernels.varlen_reduce(a, how, **options)
        )

    got, want = call(x, implementation="triton"), call(x, **reference)
    dy = torch.from_numpy(normal(tuple(want.shape), 1)).to(device)
    (dx,), (dx_want,) = torch.autograd.grad(got, x, dy), torch.autograd.grad(want, x, dy)
    assert_close(dx.cpu(), dx_want.cpu(), "float64", scale=10)


@pytest.mark.parametrize("how", ["softmax", "max", "logsumexp"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_special_values_in_several_parts(device, small_tiles, how, bad):
    arr = array(device, (), lengths=(5, 0, 40, 1))
    host = arr.values.cpu().numpy()
    begin = int(arr.offsets[2])
    clean = softmax(arr) if how == "softmax" else reduce(arr, how)
    for places in ([*range(begin, begin + 16)], [*range(begin, begin + 40)]):
        x = host.copy()
        x[places] = bad
        a = arr.with_values(torch.from_numpy(x).to(device))
        got = (softmax(a) if how == "softmax" else reduce(a, how)).cpu().numpy()
        want = (
            kernels.varlen_softmax(a, implementation="reference").values
            if how == "softmax"
            else kernels.varlen_reduce(a, how, implementation="reference")
        )
        assert_close(got, want.cpu(), "float64", scale=10)
        others = [*range(begin), *range(begin + 40, len(x))] if how == "softmax" else [0, 1, 3]
        assert_same_bits(got[others], clean.cpu().numpy()[others])


def test_a_row_alone_has_the_same_bits(device, small_tiles):
    for known in (True, False):
        arr = array(device, (1,), torch.float32, known=known)
        together, again = softmax(arr), softmax(arr)
        assert torch.equal(together, again)
        sums = {how: reduce(arr, how) for how in ("sum", "logsumexp")}
        offsets = arr.offsets.tolist()
        for row, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False)):
            alone = scree.Array(arr.values[a:b], torch.tensor([0, b - a], device=device))
            assert torch.equal(softmax(alone), together[a:b])
            for how in sums:
                assert_same_bits(reduce(alone, how)[0].cpu().numpy(), sums[how][row].cpu().numpy())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_in_several_parts(device, small_tiles, dtype):
    arr = array(device, (3,))
    x = (arr.values * 20).round().to(dtype)
    for how in ("max", "min") if dtype == torch.bool else ("sum", "max", "min"):
        want = kernels.varlen_reduce(arr.with_values(x), how, implementation="reference")
        assert torch.equal(reduce(arr.with_values(x), how), want)


@pytest.mark.parametrize("ragged_dim", [1, 2])
def test_another_ragged_dim(device, small_tiles, ragged_dim):
    arr = array(device, (2, 3), torch.float32, (5, 0, 40, 1))
    moved = scree.Array(arr.values.movedim(0, ragged_dim).contiguous(), arr.offsets, ragged_dim)
    assert_close(softmax(moved).movedim(ragged_dim, 0).cpu(), softmax(arr).cpu(), "float32")
    for how in ("sum", "max", "logsumexp"):
        assert_close(reduce(moved, how).cpu(), reduce(arr, how).cpu(), "float32")


@pytest.mark.parametrize("offsets", [
    [0, 3, 1000], [0, -5, 7], [9, 5, 2], [-(2**40), 2**40, 3], [60, 60, 60], [0, 59, 1, 60, 2, 60, 0, 60, 3, 58],
])  # fmt: skip
def test_no_offsets_lead_outside_or_leave_anything_unwritten(device, small_tiles, offsets):
    x = torch.from_numpy(normal((60, 3), 0)).to(device).requires_grad_()
    arr = array(device)._make(x, torch.tensor(offsets, device=device), 0, type(array(device)._structure)(spare=True))
    y = softmax(arr)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    for how in ("sum", "logsumexp"):
        assert not reduce(arr, how).isnan().any()
    beyond = min(max(offsets[-1], 0), 60)
    assert beyond == 60 or offsets[-1] < max(offsets) or not y[beyond:].any()


@pytest.mark.parametrize("how", [0, 1, 5])
def test_operators(device, how):
    arr = array(device, (2,), torch.float32, (3, 0, 4))
    softmax(arr)  # loads the operators
    torch.library.opcheck(torch.ops.scree.segments_fwd, (how, arr.values.requires_grad_(), arr.offsets, 0))


def test_compiled(device):
    torch._dynamo.reset()
    arr = array(device, (2,), torch.float32, (3, 0, 4))

    def step(values):
        a = scree.Array(values, arr.offsets)
        return softmax(a), reduce(a, "logsumexp"), reduce(a, "sum")

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = arr.values.clone().requires_grad_()
        outputs = fn(x)
        results.append([*outputs, *torch.autograd.grad([o[[0, 2]].sum() for o in outputs], x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_transformations(device):
    arr = array(device, (2,), torch.float32, (3, 1, 4))

    def loss(x):
        a = arr.with_values(x)
        return (kernels.varlen_softmax(a).values.square().sum() + kernels.varlen_reduce(a, "logsumexp").sum()) * 2

    x = arr.values.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(arr.values), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("how", ["softmax", "sum", "logsumexp"])
def test_a_bound_below_the_truth_leaves_nothing_out(device, small_tiles, how):
    arr = array(device, (5,), lengths=(5, 40, 0, 17))
    offsets = torch.tensor([0, 5, 45, 45, 55], device=device)  # nor do they end where they should
    x = arr.values.clone().requires_grad_()
    vouched = arr._make(x, offsets, 0, type(arr._structure)(max_length=3))
    y = softmax(vouched) if how == "softmax" else reduce(vouched, how)
    full = scree.with_capacity(scree.Array(arr.values[:55], offsets), 4, len(x))
    want = kernels.varlen_softmax(full, implementation="reference").values
    if how != "softmax":
        want = kernels.varlen_reduce(full, how, implementation="reference")
    assert_close(y.detach().cpu(), want.cpu(), "float64", scale=10)
    (dx,) = torch.autograd.grad((y * y).sum(), x)
    assert not dx[55:].any()
    assert dx[:55].any(1).all()


@pytest.mark.parametrize("how", ["softmax", "sum", "logsumexp"])
def test_parts_that_nobody_had_reason_to_expect(device, monkeypatch, how):
    """A bound on the lengths that is too low, with room for a list but for no states."""
    scree.kernels.triton._load()
    from scree.kernels.triton import _segment_launch

    monkeypatch.setattr(_segment_launch, "_PLANS", {})
    monkeypatch.setattr(_segment_launch, "_WAYS", {})
    monkeypatch.setattr(_segment_launch, "tiles", lambda *args: _segment_launch.Tiles(4, 4, 1, 64, 8, 2, 16, 32, 4, 8))
    arr = array(device, (5,), lengths=(5, 70, 0, 17))
    x = arr.values.clone().requires_grad_()
    vouched = arr._make(x, arr.offsets, 0, type(arr._structure)(max_length=20))
    y = softmax(vouched) if how == "softmax" else reduce(vouched, how)
    ways = [*_segment_launch._WAYS.values()]
    assert [(way.capacity > 0, way.states) for way in ways] == [(True, 0)]
    reference = {"implementation": "reference"}
    want = (
        kernels.varlen_softmax(arr, **reference).values
        if how == "softmax"
        else kernels.varlen_reduce(arr, how, **reference)
    )
    assert_close(y.detach().cpu(), want.cpu(), "float64", scale=10)
    finite = torch.where(y.isfinite(), y, 0.0)
    (dx,) = torch.autograd.grad((finite * finite).sum(), x)
    assert dx.isfinite().all()


def test_memory_between_kernels_is_kept_with_no_counts_in_it(device, small_tiles, monkeypatch):
    from scree.kernels.triton import _segment_launch

    rooms = {}
    monkeypatch.setattr(_segment_launch, "_ROOMS", rooms)
    arr = array(device)
    first = softmax(arr)
    (kept,) = rooms.values()
    for _ in range(3):
        assert torch.equal(softmax(arr), first)
        reduce(arr, "sum")
        softmax(array(device, (3,), lengths=(2, 9, 60), known=False))
        assert all(not room.entries[:2].any() for room in rooms.values())
    assert any(room.following[:2].any() for room in rooms.values())  # those of the call before are still there
    taken = rooms.pop(kept.key, None)  # as another thread does that is in the middle of a call
    assert taken is not None
    assert torch.equal(softmax(arr), first)
    assert rooms[kept.key].entries.data_ptr() != taken.entries.data_ptr()
