"""Every kernel compiled for GPUs that are not here, and what the compiler made of it."""

import pytest

import scree
from cases import normal
from scree import kernels
from scree.kernels._dispatch import TABLE

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
_launch = pytest.importorskip("scree.kernels.triton._launch")
if _launch.INTERPRETED:
    pytest.skip("Triton's interpreter is on", allow_module_level=True)
offline = pytest.importorskip("offline")

pytestmark = pytest.mark.triton

SERVED = {op for op, impls in TABLE.items() if any(impl.name == "triton" for impl in impls)}
HALVES = (torch.float16, torch.bfloat16)
FORWARD, DQ, DKV = "_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkv_kernel"
ATTENTION = (FORWARD, DQ, DKV)
PAIR_DQ, PAIR_DKV = "_hopper_pair_dq_kernel", "_hopper_pair_dkv_kernel"
HOPPER = {  # instead of which, where they serve
    "_hopper_fwd_kernel": {FORWARD}, "_hopper_bwd_kernel": {DQ, DKV}, "_hopper_bwd_stay_kernel": {DQ, DKV},
    PAIR_DQ: {DQ}, PAIR_DKV: {DKV},
}  # fmt: skip

# Where attention does not fit in the registers, for which widest head dim, and how much of it at most: measured, this
# was the fastest. What is not here must not spill at all.
SPILLS = {
    ("sm_90", DKV): {128: 16},
    ("sm_90", "_hopper_bwd_kernel"): {128: 70},
    ("sm_90", "_hopper_bwd_stay_kernel"): {128: 70},
    ("sm_90", PAIR_DQ): {64: 16},
    ("sm_90", PAIR_DKV): {64: 34},  # around the loops, of programs that take several heads whole
}
# Masks: AMD keeps them in scalar registers, and where there are too few of those, in lanes of vector registers.
SCALARS = {("gfx942", "_rows_kernel"): 24, ("gfx942", "_list_kernel"): 2}


def spills_allowed(target, name, dim):
    """Return how many spills are known for halves of a head dim."""
    return max((most for widest, most in SPILLS.get((target, name), {}).items() if dim <= widest), default=0)


def array(dtype, *features, tokens=300):
    values = torch.from_numpy(normal((tokens, *features), 0)).to(dtype).requires_grad_()
    return scree.Array(values, torch.tensor([0, 100, tokens], dtype=torch.int32))


def attention(dtype, dim, **options):
    """Forward and backward; what is recorded reads no result."""
    q = array(dtype, 2, dim)
    sinks = torch.ones(2).requires_grad_() if options.pop("sinks", False) else None
    o, lse = kernels.varlen_attention(q, q, q, sinks=sinks, return_lse=True, implementation="triton", **options)
    loss = o.values.sum()
    (loss + lse.values.sum() if sinks is not None else loss).backward()


@pytest.mark.parametrize("dim", [32, 64, 128], ids=["portable", "pair", "single pass"])
def test_a_backward_is_planned_once_for_each_kind_of_call(monkeypatch, dim):
    from scree.kernels.triton import _attention_launch

    planned = []
    plan = _attention_launch._plan_backward
    with offline.recording(monkeypatch, "sm_90") as found, monkeypatch.context() as patch:
        patch.setattr(_attention_launch, "_plan_backward", lambda *given: planned.append(1) or plan(*given))
        q = array(torch.float16, 2, dim)

        def backward(grad, q=q, **options):
            kernels.varlen_attention(q, q, q, implementation="triton", **options).values.backward(grad)
            return len(planned)

        grad = torch.ones(300, 2, dim, dtype=torch.float16)
        assert [backward(grad), backward(grad.clone()), backward(grad)] == [1, 1, 1]
        assert backward(grad.transpose(0, 1).contiguous().transpose(0, 1)) == 2  # in another order in memory
        assert backward(grad, causal=True) == 3
        assert backward(grad, deterministic=False) == 4
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert backward(grad, deterministic=False) == 5
        patch.undo()
        patch.setattr(_attention_launch, "_plan_backward", lambda *given: planned.append(1) or plan(*given))
        assert backward(grad) == 5
        assert backward(grad, array(torch.float16, 2, dim)) == 6  # of other offsets
        q.offsets[1] = 50
        assert backward(grad) == 7
    assert found


def per_token(op, dtype, size):
    arr, weight = array(dtype, size), torch.ones(size, dtype=dtype).requires_grad_()
    given = {
        "varlen_rmsnorm": (weight,),
        "varlen_layernorm": (weight, weight),
        "varlen_rope": (torch.ones(300, size // 2), torch.ones(300, size // 2)),
    }.get(op, ())
    getattr(kernels, op)(arr, *given, implementation="triton").values.sum().backward()


def reduce(dtype, size):
    for how in ("sum", "max", "logsumexp"):
        kernels.varlen_reduce(array(dtype, size), how, implementation="triton").sum().backward()


def moves(dtype, size):
    """Padding, back from it, and taking rows. A size that a kernel would find is made up."""
    from scree.kernels.triton import _move_launch

    arr = array(dtype, size)
    padded, mask = scree.to_padded(arr)
    padded.sum().backward()
    scree.from_padded(padded, lengths=arr)
    arr[[1, 0]].values.sum().backward()
    for kind in (torch.bool, torch.int64):
        offsets, firsts, _, _ = _move_launch.count(mask.to(kind))
        _move_launch.unpad(padded, offsets, firsts, 300, "firsts")
    places = _move_launch.places(mask, offsets, 300)
    _move_launch.put_places(_move_launch.take_places(padded, places), places, padded.shape)


def codes(monkeypatch, target, call, *args, **options):
    """Record what a call launches, compile it, and require at least one kernel."""
    with offline.recording(monkeypatch, target) as launches:
        call(*args, **options)
    assert launches, "nothing was launched"
    return [offline.compiled(launch, target) for launch in launches]


# Which dtypes and head dims are worth the time of compiling them for a target.
COMPILED = [
    *(("sm_90", dtype, dim) for dtype in HALVES for dim in (32, 64, 96, 128, 256)),
    *(("sm_80", torch.float16, dim) for dim in (32, 64, 96, 128, 256)),
    *((target, torch.bfloat16, 128) for target in ("sm_80", "sm_100", "gfx942")),
    *((target, torch.float32, 64) for target in ("sm_90", "gfx942")),
]


@pytest.mark.parametrize(("target", "dtype", "dim"), COMPILED, ids=str)
def test_attention(monkeypatch, target, dtype, dim):
    found = codes(monkeypatch, target, attention, dtype, dim, causal=True)
    main = [code for code in found if code.launch.name in (*ATTENTION, *HOPPER)]
    assert set().union(*(HOPPER.get(code.launch.name, {code.launch.name}) for code in main)) == set(ATTENTION)
    for code in main:
        if dtype in HALVES:
            assert code.uses_tensor_cores, code.launch
        assert code.loads_wide, code.launch
        assert code.shared <= offline.SHARED[target], code.launch
        if dtype in HALVES and dim <= 128:
            assert code.spills <= spills_allowed(target, code.launch.name, dim), f"{code.launch}: {code.spills}"
    for code in found:
        if code not in main:
            assert not code.spills, code.launch


def test_attention_with_every_option(monkeypatch):
    options = {"causal": True, "window_size": (40, 9), "softcap": 2.0, "sinks": True}
    for code in codes(monkeypatch, "sm_90", attention, torch.float16, 64, **options):
        assert code.uses_tensor_cores or code.launch.name not in ATTENTION
        assert not code.spills, code.launch


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("op", sorted(SERVED & {"varlen_rmsnorm", "varlen_layernorm", "varlen_softmax", "varlen_rope"}))
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 4096), (torch.float16, 768)], ids=str)
def test_ops_that_move_memory(monkeypatch, target, op, dtype, size):
    if target in ("sm_80", "sm_100") and size != 768:
        return
    found = codes(monkeypatch, target, per_token, op, dtype, size)
    for code in found:
        assert not code.spills, f"{code.launch} spills: {code.spills}"
    assert any(code.loads_wide for code in found), [str(code.launch) for code in found]


@pytest.mark.skipif("varlen_reduce" not in SERVED, reason="no kernel yet")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_reduce(monkeypatch, target):
    for code in codes(monkeypatch, target, reduce, torch.float32, 64):
        assert code.spills <= SCALARS.get((target, code.launch.name), 0), f"{code.launch} spills: {code.spills}"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1), (torch.float16, 16)], ids=str)
def test_softmax_and_reductions_of_unknown_lengths(monkeypatch, target, dtype, size):
    from scree.kernels.triton import _segment_launch, _segments

    monkeypatch.setattr(_segment_launch, "_together", lambda *args: 16)
    monkeypatch.setattr(_segment_launch, "_WAYS", {})
    monkeypatch.setattr(_segments, "known", lambda arr: _segment_launch.Known())  # as of offsets on a device

    def call():
        arr = array(dtype, size, tokens=70_000)
        kernels.varlen_softmax(arr, implementation="triton").values.sum().backward()
        kernels.varlen_reduce(arr, "sum", implementation="triton").sum().backward()

    found = codes(monkeypatch, target, call)
    kinds = [(code.launch.name, dict(code.launch.constants).get("LAST")) for code in found]
    assert {("_rows_kernel", None), ("_list_kernel", False), ("_list_kernel", True)} <= set(kinds)
    for code in found:
        assert code.spills <= SCALARS.get((target, code.launch.name), 0), f"{code.launch} spills: {code.spills}"


@pytest.mark.parametrize("target", offline.TARGETS)
def test_moves(monkeypatch, target):
    found = codes(monkeypatch, target, moves, torch.bfloat16, 4096)
    assert len({code.launch.name for code in found}) >= 8, {code.launch.name for code in found}
    for code in found:
        assert not code.spills, f"{code.launch} spills: {code.spills}"
    assert any(code.loads_wide for code in found), [str(code.launch) for code in found]


# The harness itself: it must be able to fail.


def test_a_kernel_that_spills_and_reads_narrowly_is_seen(monkeypatch):
    import triton
    import triton.language as tl

    @triton.jit
    def greedy_kernel(x_ptr, y_ptr, stride, N: tl.constexpr):
        at = tl.arange(0, N)
        x = tl.load(x_ptr + at[:, None] * stride + at[None, :] * 3)
        y = x / tl.sum(x, 1)[:, None]
        tl.store(y_ptr + at[:, None] * N + at[None, :], y / tl.sum(y, 0)[None, :])

    x = torch.zeros(4)
    launcher = _launch.Launcher(greedy_kernel, -1, {"N": 64}, num_warps=1, num_stages=1, maxnreg=32)
    (code,) = codes(monkeypatch, "sm_90", lambda: launcher((1, 1, 1), (x, x), (5,)))
    assert code.spills
    assert not code.uses_tensor_cores
    assert not code.loads_wide
