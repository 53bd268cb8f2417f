"""The attention kernel for Hopper: that it serves what it should, and does so right, alone and in any company."""

import dataclasses

import pytest

import gpu_cases
import scree
from gpu_cases import ATTENTION, CAUSAL, SPACING, Attention, assert_bits, assert_near, attend, batch, normal, offsets_of

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from scree.kernels.triton import _hopper, varlen_attention_triton  # noqa: E402

pytestmark = pytest.mark.gpu

HALF = (torch.float16, torch.bfloat16)
# Tiles of 128 rows and steps of 128 keys: below, at and beyond each, and more tiles than there are multiprocessors.
# Half a block of keys is enough, or not, where 64 or 65 are left.
EDGES = (127, 0, 128, 129, 255, 1, 256, 257, 513, 0, 64, 65, 191, 192, 193)
KEY_EDGES = (3, 130, 257, 129, 0, 512, 128, 700, 384, 0, 65, 192, 320, 193, 64)
MANY = tuple(37 * i % 900 for i in range(150))
WIDE = tuple(
    dataclasses.replace(case, dim=width, v_dim=width, lengths=EDGES, key_lengths=keys)
    for case in ATTENTION
    if case.dim == case.v_dim
    # of a softcap and a window with a limit to the left it has one at a time
    and not (case.options.get("softcap") and case.options.get("window_size", (None, None))[0] is not None)
    for width in (64, 128)
    for keys in [EDGES if case.key_lengths == case.lengths else KEY_EDGES]
)


def named(case):
    return f"{case.name} {case.dim}"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Count the calls that the kernel for Hopper serves; a test that it serves none of proves nothing."""
    served = []
    plan = _hopper.plan

    def counted(*args):
        found = plan(*args)
        served.append(found is not None)
        return found

    monkeypatch.setattr(_hopper, "plan", counted)
    yield served
    assert all(served)
    assert served


def reference(case, given):
    return attend(*given, case.options, torch.float64, "reference", backward=False)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", WIDE, ids=named)
def test_against_the_reference(case, dtype):
    given = case.make(dtype)
    want_o, want_lse = reference(case, given)
    first = attend(*given, case.options, backward=False)
    assert_near(first[0], want_o, dtype, 2.0, "o")
    assert_near(first[1], want_lse, torch.float32, 4.0, "lse")
    for _ in range(3):  # the tiles are counted anew each time
        for what, a, b in zip("ol", attend(*given, case.options, backward=False), first, strict=True):
            assert_bits(a, b, what)


@pytest.mark.parametrize("width", [64, 128])
def test_gradients_from_its_lse(width):
    gpu_cases.check(
        Attention("", heads=8, kv_heads=2, dim=width, v_dim=width, lengths=EDGES, key_lengths=EDGES, options=CAUSAL),
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        CAUSAL,
        {"window_size": (None, 200)},
        {"causal": True, "window_size": (200, None)},
        {"window_size": (150, 70)},
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [64, 128])
def test_rows_do_not_see_their_company(width, options):
    case = Attention("", heads=4, kv_heads=2, dim=width, v_dim=width, lengths=MANY, key_lengths=MANY, options=options)
    q, k, v, _ = case.make(torch.bfloat16)
    together = attend(q, k, v, None, options, backward=False)
    assert_near(together[0], reference(case, (q, k, v, None))[0], torch.bfloat16, 2.0)
    for row in (3, 24, 73, 149):
        start, stop = q.offsets[row].item(), q.offsets[row + 1].item()
        alone = [arr[[row]] for arr in (q, k, v)]
        alone[2] = alone[1].with_values(alone[2].values)
        poisoned = []
        for arr in (q, k, v):
            values = torch.full_like(arr.values, float("nan"))
            values[start:stop] = arr.values[start:stop]
            poisoned.append(arr.with_values(values))
        for what, whole, a, b in zip(
            "ol",
            together,
            attend(*alone, None, options, backward=False),
            attend(*poisoned, None, options, backward=False),
            strict=True,
        ):
            assert_bits(a, whole[start:stop], f"row {row} alone: {what}")
            assert_bits(b[start:stop], whole[start:stop], f"row {row} among NaN: {what}")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_strided_views_and_wide_offsets(dtype):
    qkv = normal(sum(EDGES), 8, 128, dtype=torch.float16)
    cu = offsets_of(EDGES, dtype)
    views = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    got = varlen_attention_triton(*views, cu, True, return_lse=True)
    want = varlen_attention_triton(*(x.contiguous() for x in views), cu, True, return_lse=True)
    for a, b in zip(got, want, strict=True):
        assert_bits(a, b)


def test_heads_before_tokens():
    q = normal(4, sum(EDGES), 64, dtype=torch.float16).transpose(0, 1)
    cu = offsets_of(EDGES)
    assert_bits(varlen_attention_triton(q, q, q, cu), varlen_attention_triton(*[q.contiguous()] * 3, cu))


def test_spare_rows_get_zeros():
    arr = batch(EDGES, (2, 128), torch.bfloat16)
    roomy = scree.with_capacity(arr, len(EDGES) + 2, sum(EDGES) + 300)
    values = roomy.values.clone()
    values[sum(EDGES) :] = float("nan")
    roomy = roomy.with_values(values)
    o, lse = attend(roomy, roomy, roomy, None, CAUSAL, backward=False)
    tight = attend(arr, arr, arr, None, CAUSAL, backward=False)
    for got, want in zip((o, lse), tight, strict=True):
        assert_bits(got[: sum(EDGES)], want)
        assert (got[sum(EDGES) :] == 0).all()


@pytest.mark.parametrize(
    "bad", [[0, 400, 100, 600], [5, 100, 600, 600], [0, 100, 10**6, 600], [0, -(2**30), 2**30, 600]]
)
def test_offsets_that_lie_give_zeros(bad):
    q = torch.full((600, 2, 128), float("nan"), dtype=torch.bfloat16, device="cuda")
    o, lse = varlen_attention_triton(q, q, q, torch.tensor(bad, dtype=torch.int32, device="cuda"), return_lse=True)
    assert (o == 0).all()
    assert (lse == 0).all()


def test_a_graph_replays_it_on_other_offsets():
    q, k, v = (normal(1000, 4, 128, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    cu = torch.tensor([0, 300, 1000], dtype=torch.int32, device="cuda")
    varlen_attention_triton(q, k, v, cu, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = varlen_attention_triton(q, k, v, cu, True)
    for offsets in ([0, 700, 1000], [0, 0, 1000], [0, 1, 999]):
        cu.copy_(torch.tensor(offsets))
        graph.replay()
        assert_bits(o, varlen_attention_triton(q, k, v, cu.clone(), True), str(offsets))


def test_large_scores_and_few_spacings():
    q, k, v, _ = Attention("", dim=128, v_dim=128, lengths=(300,), key_lengths=(300,)).make(torch.float16)
    q = q.with_values(q.values * 100)
    got = attend(q, k, v, None, {}, backward=False)[0]
    want = attend(q, k, v, None, {}, torch.float64, "reference", backward=False)[0]
    assert (got.double() - want).abs().max() <= 4 * SPACING[torch.float16] * want.abs().max()
