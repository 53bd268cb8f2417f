"""The attention backward for Hopper at head dim 64, beside the portable one and the reference."""

import dataclasses

import pytest

import gpu_cases
from gpu_cases import ATTENTION, CAUSAL, Attention, assert_bits, assert_near, batch, normal, offsets_of

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

from scree.kernels._options import AttentionOptions  # noqa: E402
from scree.kernels.triton import _attention_launch, _hopper_pair  # noqa: E402

pytestmark = pytest.mark.gpu

# Tiles and steps of 64: below, at and beyond each.
EDGES = (127, 0, 128, 129, 63, 1, 64, 65, 513, 0)
KEY_EDGES = (3, 130, 257, 129, 0, 512, 128, 700, 384, 0)
CASES = tuple(
    dataclasses.replace(case, lengths=EDGES, key_lengths=keys)
    for case in ATTENTION
    if case.dim == case.v_dim == 64 and not case.options.get("softcap")
    and case.options.get("window_size", (None, None))[0] is None
    for keys in [EDGES if case.key_lengths == case.lengths else KEY_EDGES]
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
DTYPES = [(case, torch.bfloat16) for case in CASES] + [(BY_NAME["grouped"], torch.float16)]
NAMES = ("dq", "dk", "dv", "dsinks")


def options_of(case):
    window = case.options.get("window_size", (None, None))
    scale = case.options.get("scale", case.dim**-0.5)
    return AttentionOptions(scale, case.options.get("causal", False), window).flat()


def gradients(tensors, offsets, options, sinks=None, serves=True):
    """Compute dq, dk, dv and dsinks, by the kernels under test or, with `serves` False, by the portable ones."""
    q, k, v, do, dlse = tensors
    cu_q, cu_k = offsets
    o, lse = _attention_launch.forward(q, k, v, sinks, cu_q, cu_k, options, None)
    against = _hopper_pair.why_not(q, k, v, o, do, options)
    assert (against is None) is serves, against
    found = _attention_launch.backward(do, dlse, q, k, v, sinks, cu_q, cu_k, o, lse, options, None, None)
    return found[: 4 if sinks is not None else 3]


def portable(tensors, offsets, options, sinks=None):
    """Compute the same by the kernels for every GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hopper_pair, "why_not", lambda *_: "a test")
        return gradients(tensors, offsets, options, sinks, serves=False)


def given(case, dtype):
    q, k, v, sinks = case.make(dtype)
    do = normal(*q.values.shape, dtype=dtype, seed=20)
    dlse = normal(case.heads, q.values.shape[0], seed=21)
    return (q.values, k.values, v.values, do, dlse), (q.offsets, k.offsets), sinks


def assert_all_near(got, want, dtype):
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert_near(a, b, dtype, 2.0, name)


@pytest.mark.parametrize(("case", "dtype"), DTYPES, ids=str)
def test_gradients(case, dtype):
    gpu_cases.check(case, dtype)
    tensors, offsets, sinks = given(case, dtype)
    got = gradients(tensors, offsets, options_of(case), sinks)
    assert_all_near(got, portable(tensors, offsets, options_of(case), sinks), dtype)
    for name, a, b in zip(NAMES, gradients(tensors, offsets, options_of(case), sinks), got, strict=False):
        assert_bits(a, b, name)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("name", ["full", "causal", "cross", "cross causal", "window right"])
def test_sequences_taken_whole_have_the_same_bits(monkeypatch, name, heads):
    case = dataclasses.replace(BY_NAME[name], heads=heads, kv_heads=heads)
    tensors, offsets, _ = given(case, torch.bfloat16)
    options = options_of(case)
    asked = []  # which sequences the maps are of; the forward's do not say
    tiles = _hopper_pair._tiles.of
    monkeypatch.setattr(_hopper_pair._tiles, "of", lambda *args: asked.extend(args[8:]) or tiles(*args))
    whole = [gradients(tensors, offsets, options) for _ in range(5)]
    assert set(asked) == {-128, 128}
    monkeypatch.setattr(_hopper_pair, "_SMALL", 0)
    want = gradients(tensors, offsets, options)
    assert asked[-2:] == [0, 0]
    for got in whole:
        for what, a, b in zip(NAMES, got, want, strict=False):
            assert_bits(a, b, what)


@pytest.mark.parametrize("wide", [64, 72], ids=["aligned", "odd strides"])
def test_views_of_a_joint_tensor(wide):
    joint = normal(sum(EDGES), 8, wide, dtype=torch.float16)[:, :, :64]
    q, k, v = joint.split([4, 2, 2], 1)
    offsets = (offsets_of(EDGES),) * 2
    tensors = (q, k, v, normal(*q.shape, dtype=torch.float16, seed=1), None)
    options = options_of(Attention("", options=CAUSAL))
    got = gradients(tensors, offsets, options, serves=wide == 64)
    assert_all_near(got, portable(tensors, offsets, options), torch.float16)


@pytest.mark.parametrize("name", ["full", "grouped", "cross", "causal"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_does_not_depend_on_its_neighbours(name, bad):
    case = BY_NAME[name]
    tensors, offsets, _ = given(case, torch.float16)
    *tensors, dlse = tensors
    options = options_of(case)
    want = gradients((*tensors, dlse), offsets, options)
    bounds = [x.tolist() for x in offsets]
    sides = (0, 1, 1, 0)  # q, k, v, do
    for row in (2, 5, 8):
        spoilt = [x.clone() for x in tensors]
        for x, side in zip(spoilt, sides, strict=True):
            x[bounds[side][row] : bounds[side][row + 1]] = bad
        got = gradients((*spoilt, dlse), offsets, options)
        for what, a, b, side in zip(NAMES, got, want, (0, 1, 1), strict=False):
            for i in set(range(len(EDGES))) - {row}:
                rows = slice(bounds[side][i], bounds[side][i + 1])
                assert_bits(a[rows], b[rows], f"{what} of row {i}, {row} changed")
        alone = [x[bounds[side][row] : bounds[side][row + 1]] for x, side in zip(tensors, sides, strict=True)]
        lengths = [bounds[side][row + 1] - bounds[side][row] for side in (0, 1)]
        if min(lengths) > 0:
            lone = dlse[:, bounds[0][row] : bounds[0][row + 1]]
            got = gradients((*alone, lone), tuple(offsets_of((n,)) for n in lengths), options)
            for what, a, b, side in zip(NAMES, got, want, (0, 1, 1), strict=False):
                assert_bits(a, b[bounds[side][row] : bounds[side][row + 1]], f"{what} of row {row} alone")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "offsets", [[0, 300, 200, 400], [5, 100, 200, 400], [0, 100, 200, 10**9], [0, -5, 3, 400]], ids=str
)
def test_offsets_that_are_wrong(offsets, causal):
    q = normal(400, 2, 64, dtype=torch.float16)
    bad = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    options = options_of(Attention("", options={"causal": causal}))
    for got in gradients((q, q, q, q, None), (bad, bad), options):
        assert not got.any()


def test_rows_beyond_the_last_sequence():
    q = normal(400, 2, 64, dtype=torch.float16)
    offsets = offsets_of((100, 0, 200))
    for got in gradients((q, q, q, q, None), (offsets, offsets), options_of(Attention(""))):
        assert not got[300:].any()
        assert got[:300].any()


@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_many_runs_of_many_programs(causal, kv_heads):
    lengths = (700, 1900, 130, 1024, 64, 333, 1, *range(2, 260, 7))
    q, k = batch(lengths, (8, 64), torch.bfloat16), batch(lengths, (kv_heads, 64), torch.bfloat16, seed=1)
    do = normal(*q.values.shape, dtype=torch.bfloat16, seed=3)
    tensors, offsets = (q.values, k.values, k.values, do, None), (q.offsets, k.offsets)
    options = options_of(Attention("", options={"causal": causal}))
    want = gradients(tensors, offsets, options)
    assert_all_near(want, portable(tensors, offsets, options), torch.bfloat16)
    for _ in range(50):
        for name, a, b in zip(NAMES, gradients(tensors, offsets, options), want, strict=False):
            assert_bits(a, b, name)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths", [[(700, 324), (100, 924)], [(*[200] * 5, 24), (100, 124, 300, 400, 1, 99)]], ids=str
)
def test_a_graph_replays_with_other_offsets(lengths, causal):
    q = batch(lengths[0], (4, 64), torch.bfloat16)
    do = normal(*q.values.shape, dtype=torch.bfloat16, seed=3)
    tensors = (q.values, q.values, q.values, do, None)
    options = options_of(Attention("", options={"causal": causal}))
    each = [offsets_of(n) for n in lengths]
    want = [gradients(tensors, (cu, cu), options) for cu in each]
    cu = each[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(tensors, (cu, cu), options)
    for offsets, gradient in [*zip(each, want, strict=True), (each[0], want[0])]:
        cu.copy_(offsets)
        graph.replay()
        for name, a, b in zip(NAMES, got, gradient, strict=False):
            assert_bits(a, b, name)


def test_memcheck():
    """A few launches for compute-sanitizer: hostile offsets, spare rows, grouped heads, keys without queries."""
    arr = batch((65, 0, 1, 130), (4, 64), torch.bfloat16)
    keys = batch((3, 70, 0, 200), (2, 64), torch.bfloat16, seed=1)
    hostile = torch.tensor([0, 150, 20, 10**9, 5], dtype=torch.int32, device="cuda")
    short = torch.tensor([0, 9, 30, 30, 100], dtype=torch.int32, device="cuda")
    for cu_q, cu_k in ((arr.offsets, keys.offsets), (hostile, keys.offsets), (arr.offsets, hostile), (short, short)):
        for causal in (True, False):
            options = options_of(Attention("", heads=4, kv_heads=2, options={"causal": causal}))
            gradients((arr.values, keys.values, keys.values, arr.values, None), (cu_q, cu_k), options)
            each = keys.values.repeat_interleave(2, 1)
            gradients((arr.values, each, each, arr.values, None), (cu_q, cu_k), options)
    torch.cuda.synchronize()
