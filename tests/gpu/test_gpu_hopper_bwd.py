"""The attention backward for Hopper, beside the portable one; dQ added up in a fixed order, and in none."""

import dataclasses

import pytest

import gpu_cases
from gpu_cases import ATTENTION, CAUSAL, Attention, assert_bits, assert_near, batch, normal, offsets_of

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)

import scree  # noqa: E402
from scree.kernels._options import AttentionOptions  # noqa: E402
from scree.kernels.triton import _attention_launch, _hopper_bwd, varlen_attention_triton  # noqa: E402

pytestmark = pytest.mark.gpu

# Tiles of 128 keys and steps of 64 queries: below, at and beyond each.
EDGES = (127, 0, 128, 129, 63, 1, 64, 65, 513, 0)
KEY_EDGES = (3, 130, 257, 129, 0, 512, 128, 700, 384, 0)
CASES = tuple(
    dataclasses.replace(case, dim=128, v_dim=128, lengths=EDGES, key_lengths=keys)
    for case in ATTENTION
    if case.dim == case.v_dim and not case.options.get("softcap")
    and case.options.get("window_size", (None, None))[0] is None
    for keys in [EDGES if case.key_lengths == case.lengths else KEY_EDGES]
)  # fmt: skip
GROUPED = next(case for case in CASES if case.name == "grouped")
DTYPES = [(case, torch.bfloat16) for case in CASES] + [(GROUPED, torch.float16)]
NAMES = ("dq", "dk", "dv", "dsinks")


def options_of(case, deterministic):
    window = case.options.get("window_size", (None, None))
    scale, causal = case.options.get("scale", case.dim**-0.5), case.options.get("causal", False)
    return AttentionOptions(scale, causal, window, deterministic=deterministic).flat()


def gradients(tensors, offsets, options, sinks=None):
    """Compute dq, dk, dv and dsinks; and see to it that the kernel under test does."""
    q, k, v, do, dlse = tensors
    cu_q, cu_k = offsets
    o, lse = _attention_launch.forward(q, k, v, sinks, cu_q, cu_k, options, None)
    against = _hopper_bwd.why_not(q, k, v, do, options, cu_q.shape[0] - 1)
    assert against is None, against
    found = _attention_launch.backward(do, dlse, q, k, v, sinks, cu_q, cu_k, o, lse, options, None, None)
    return found[: 4 if sinks is not None else 3]


def portable(tensors, offsets, options, sinks=None):
    """Compute the same by the kernels for every GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hopper_bwd, "why_not", lambda *_: "a test")
        q, k, v, do, dlse = tensors
        o, lse = _attention_launch.forward(q, k, v, sinks, *offsets, options, None)
        found = _attention_launch.backward(do, dlse, q, k, v, sinks, *offsets, o, lse, options, None, None)
        return found[: 4 if sinks is not None else 3]


def given(case, dtype):
    q, k, v, sinks = case.make(dtype)
    do = normal(*q.values.shape, dtype=dtype, seed=20)
    dlse = normal(case.heads, q.values.shape[0], seed=21)
    return (q.values, k.values, v.values, do, dlse), (q.offsets, k.offsets), sinks


def both(case, tensors, offsets, fixed, sinks=None):
    """The gradients that the kernel under test gives, and those of the portable ones."""
    options = options_of(case, fixed)
    return gradients(tensors, offsets, options, sinks), portable(tensors, offsets, options, sinks)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
@pytest.mark.parametrize(("case", "dtype"), DTYPES, ids=str)
def test_gradients(case, dtype, fixed):
    tensors, offsets, sinks = given(case, dtype)
    got, want = both(case, tensors, offsets, fixed, sinks)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert_near(a, b, dtype, 2.0, name)
    for name, a, b in zip(NAMES, gradients(tensors, offsets, options_of(case, fixed), sinks), got, strict=False):
        (assert_bits(a, b, name) if fixed or name != "dq" else assert_near(a, b, dtype, 2.0, name))


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_sums_that_nobody_set_to_zero(monkeypatch, fixed):
    """Tiles of queries that see no key, too: nothing is added to their dQ."""
    cross = next(case for case in CASES if case.name == "cross causal")
    tensors, offsets, _ = given(cross, torch.bfloat16)
    want = gradients(tensors, offsets, options_of(cross, fixed))

    def filled(x, shape, dtype=None):
        dtype = dtype or x.dtype
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=x.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    for name, a, b in zip(NAMES, gradients(tensors, offsets, options_of(cross, fixed)), want, strict=False):
        (assert_bits(a, b, name) if fixed or name != "dq" else assert_near(a, b, torch.bfloat16, 2.0, name))


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_views_of_a_joint_tensor(fixed):
    joint = normal(sum(EDGES), 8, 128, dtype=torch.float16)
    q, k, v = joint.split([4, 2, 2], 1)
    offsets = offsets_of(EDGES)
    tensors = (q, k, v, normal(*q.shape, dtype=torch.float16, seed=1), None)
    got, want = both(Attention("", dim=128, options=CAUSAL), tensors, (offsets, offsets), fixed)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert_near(a, b, torch.float16, 2.0, name)


def test_neighbours_that_are_not_numbers():
    case = Attention("", heads=4, kv_heads=2, dim=128, v_dim=128, lengths=EDGES, key_lengths=EDGES, options=CAUSAL)
    (*tensors, _), offsets, _ = given(case, torch.float16)
    want = portable((*tensors, None), offsets, options_of(case, True))
    bounds = offsets[0].tolist()
    for bad in (2, 5, 8):
        spoilt = [x.clone() for x in tensors]
        for x in spoilt:
            x[bounds[bad] : bounds[bad + 1]] = float("nan")
        got = gradients((*spoilt, None), offsets, options_of(case, True))
        for name, a, b in zip(NAMES, got, want, strict=False):
            for i in set(range(len(EDGES))) - {bad}:
                rows = slice(bounds[i], bounds[i + 1])
                assert_near(a[rows], b[rows], torch.float16, 2.0, name)


@pytest.mark.parametrize(
    "offsets", [[0, 300, 200, 400], [5, 100, 200, 400], [0, 100, 200, 10**9], [0, -5, 3, 400]], ids=str
)
def test_offsets_that_are_wrong(offsets):
    q = normal(400, 2, 128, dtype=torch.float16)
    bad = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    for fixed in (True, False):
        options = options_of(Attention("", dim=128, options=CAUSAL), fixed)
        for got in gradients((q, q, q, q, None), (bad, bad), options):
            assert not got.any()


def test_rows_beyond_the_last_sequence():
    q = normal(400, 2, 128, dtype=torch.float16)
    offsets = offsets_of((100, 0, 200))
    for got in gradients((q, q, q, q, None), (offsets, offsets), options_of(Attention("", dim=128), True)):
        assert not got[300:].any()
        assert got[:300].any()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_long_sequences_in_many_programs(causal, kv_heads):
    arr = batch((3000, 1, 2500), (4, 128), torch.bfloat16)
    k = batch((3000, 1, 2500), (kv_heads, 128), torch.bfloat16, seed=1).values
    do = normal(*arr.values.shape, dtype=torch.bfloat16, seed=3)
    case = Attention("", kv_heads=kv_heads, dim=128, options={"causal": causal})
    tensors, offsets = (arr.values, k, k, do, None), (arr.offsets, arr.offsets)
    for fixed in (True, False):
        got, want = both(case, tensors, offsets, fixed)
        for name, a, b in zip(NAMES, got, want, strict=False):
            assert_near(a, b, torch.bfloat16, 2.0, name)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_programs_that_stay_for_many_tiles(fixed):
    """Each takes several, long and short ones, keys without queries between them, and rows that belong to no sequence."""
    lengths = (300, 0, 1, 129, 64, 0, 700, 128) * 12
    key_lengths = (300, 130, 1, 257, 0, 3, 700, 64) * 12
    q = normal(sum(lengths) + 200, 4, 128, dtype=torch.bfloat16)
    k, v = (normal(sum(key_lengths) + 300, 2, 128, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    do = normal(*q.shape, dtype=torch.bfloat16, seed=3)
    case = Attention("", heads=4, kv_heads=2, dim=128, options=CAUSAL)
    tensors, offsets = (q, k, v, do, None), (offsets_of(lengths), offsets_of(key_lengths))
    got, want = both(case, tensors, offsets, fixed)
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert_near(a, b, torch.bfloat16, 2.0, name)
    for _ in range(50):
        for name, a, b in zip(NAMES, gradients(tensors, offsets, options_of(case, fixed)), got, strict=False):
            (assert_bits(a, b, name) if fixed or name != "dq" else assert_near(a, b, torch.bfloat16, 2.0, name))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_many_runs_give_the_same_bits(causal):
    lengths = (700, 1900, 130, 1024, 64, 333, 1)
    q = batch(lengths, (8, 128), torch.bfloat16)
    k = batch(lengths, (2, 128), torch.bfloat16, seed=1)
    do = normal(*q.values.shape, dtype=torch.bfloat16, seed=3)
    tensors, offsets = (q.values, k.values, k.values, do, None), (q.offsets, k.offsets)
    options = options_of(Attention("", heads=8, kv_heads=2, dim=128, options={"causal": causal}), True)
    want = gradients(tensors, offsets, options)
    for _ in range(200):
        for name, a, b in zip(NAMES, gradients(tensors, offsets, options), want, strict=False):
            assert_bits(a, b, name)


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed", "free"])
def test_what_is_rounded_beside_the_rest_is_complete(monkeypatch, fixed):
    """More programs than run at once: some heads are done long before the last program starts, some are not."""
    lengths = (2500, 300, 3000, 1200)
    q = batch(lengths, (16, 128), torch.bfloat16)
    do = normal(*q.values.shape, dtype=torch.bfloat16, seed=3)
    tensors, offsets = (q.values, q.values, q.values, do, None), (q.offsets, q.offsets)
    options = options_of(Attention("", heads=16, dim=128), fixed)
    want = gradients(tensors, offsets, options)

    def filled(x, shape, dtype=None):
        dtype = dtype or x.dtype
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype, device=x.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    for _ in range(50):
        got = gradients(tensors, offsets, options)
        for name, a, b in zip(NAMES, got, want, strict=False):
            (assert_bits(a, b, name) if fixed or name != "dq" else assert_near(a, b, torch.bfloat16, 2.0, name))


def test_a_graph_replays_with_other_offsets():
    lengths = [(700, 324), (100, 924)]
    q = batch(lengths[0], (4, 128), torch.bfloat16)
    do = normal(*q.values.shape, dtype=torch.bfloat16, seed=3)
    options = options_of(Attention("", dim=128, options=CAUSAL), True)
    each = [offsets_of(n) for n in lengths]
    want = [gradients((q.values, q.values, q.values, do, None), (cu, cu), options) for cu in each]
    cu = each[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients((q.values, q.values, q.values, do, None), (cu, cu), options)
    for offsets, gradient in [*zip(each, want, strict=True), (each[0], want[0])]:
        cu.copy_(offsets)
        graph.replay()
        for name, a, b in zip(NAMES, got, gradient, strict=False):
            assert_bits(a, b, name)


@pytest.mark.parametrize("how", ["tensors", "front door", "compiled"])
def test_is_reached_from_the_public_functions(monkeypatch, how):
    arr = batch((300, 0, 77), (2, 128), torch.bfloat16)
    calls = []
    original = _hopper_bwd.plan  # once for each kind of call
    monkeypatch.setattr(_hopper_bwd, "plan", lambda *given: calls.append(given[8].deterministic) or original(*given))

    def attend(x, deterministic):
        if how == "tensors":
            return varlen_attention_triton(x, x, x, arr.offsets, True, deterministic=deterministic)
        rows = scree.Array(x, arr.offsets)
        return scree.kernels.varlen_attention(rows, rows, rows, True, deterministic=deterministic).values

    if how == "compiled":
        attend = torch.compile(attend, fullgraph=True, dynamic=False)

    def gradient(deterministic):
        x = arr.values.detach().clone().requires_grad_()
        attend(x, deterministic).float().square().sum().backward()
        return x.grad

    want = gradient(True)
    assert calls and all(calls)
    calls.clear()
    assert_near(gradient(False), want, torch.bfloat16, 4.0)
    assert calls and not any(calls)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(3):
            assert_bits(gradient(False), want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_memcheck():
    """A few launches for compute-sanitizer: hostile offsets, spare rows, grouped heads, keys without queries."""
    arr = batch((65, 0, 1, 130), (4, 128), torch.bfloat16)
    keys = batch((3, 70, 0, 200), (2, 128), torch.bfloat16, seed=1)
    case = Attention("", heads=4, kv_heads=2, dim=128, v_dim=128, options=CAUSAL)
    hostile = torch.tensor([0, 150, 20, 10**9, 5], dtype=torch.int32, device="cuda")
    short = torch.tensor([0, 9, 30, 30, 100], dtype=torch.int32, device="cuda")
    for cu_q, cu_k in ((arr.offsets, keys.offsets), (hostile, keys.offsets), (arr.offsets, hostile), (short, short)):
        tensors = (arr.values, keys.values, keys.values, arr.values, None)
        for fixed in (True, False):
            gradients(tensors, (cu_q, cu_k), options_of(case, fixed))
    torch.cuda.synchronize()
