"""Attention on CUDA against the reference in float64: every option, head dim and dtype, forward and backward."""

import threading

import pytest

import gpu_cases
import scree
from gpu_cases import ATTENTION, Attention, assert_bits, assert_near, attend, batch, check, normal, offsets_of
from scree import kernels
from scree.kernels.triton import varlen_attention_triton

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

HALVES = (torch.float16, torch.bfloat16)
BY_NAME = {case.name: case for case in ATTENTION}


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_every_option(case):
    check(case, torch.float16)


@pytest.mark.parametrize("name", ["grouped", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_dtype(name, dtype):
    check(BY_NAME[name], dtype, factor=4.0)


@pytest.mark.parametrize("dim", [8, 16, 32, 40, 72, 96, 100, 128, 192, 256])
def test_head_dims(dim):
    check(Attention(f"{dim}", heads=2, kv_heads=1, dim=dim, v_dim=dim, options={"causal": True}), torch.bfloat16)


@pytest.mark.parametrize("dim", [1, 5, 33, 255])
def test_odd_head_dims(dim):
    check(Attention(f"{dim}", heads=2, kv_heads=1, dim=dim, v_dim=dim, options={"causal": True}), torch.float16)


@pytest.mark.parametrize("dim", [24, 80, 128, 256])
def test_head_dims_in_single_precision(dim):
    case = Attention(f"{dim}", heads=2, kv_heads=2, dim=dim, v_dim=dim, options={"causal": True})
    check(case, torch.float32, factor=4.0)


@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (64, 256), (40, 8)])
def test_the_values_own_head_dim(dim, v_dim):
    check(Attention("v", heads=2, kv_heads=2, dim=dim, v_dim=v_dim, options={"causal": True}), torch.bfloat16)


@pytest.mark.parametrize("lengths", [(1,), (0,), (0, 0), (), (1, 0, 2), (2049, 1)], ids=str)
def test_edges(lengths):
    check(Attention("edge", heads=2, kv_heads=2, lengths=lengths, key_lengths=lengths), torch.float16)


def test_no_keys_and_no_queries():
    for lengths, key_lengths in (((5, 70), (0, 0)), ((0, 0), (5, 70)), ((0, 3), (4, 0))):
        for sinks in (False, True):
            check(Attention("none", 2, 2, lengths=lengths, key_lengths=key_lengths, sinks=sinks), torch.float16)


def test_many_short_sequences():
    lengths = tuple(1 + (i * 37) % 50 for i in range(1500))
    check(Attention("short", heads=2, kv_heads=2, lengths=lengths, key_lengths=lengths), torch.bfloat16)


def test_more_sequences_than_there_are_lanes():
    lengths = tuple(i % 3 for i in range(70_000))
    q = batch(lengths, (1, 16), torch.float16)
    o, _ = attend(q, q, q, None, {"causal": True}, backward=False)
    first = torch.tensor([s for s, n in zip(q.offsets[:-1].tolist(), lengths, strict=True) if n], device="cuda")
    assert_near(o[first], q.values[first], torch.float16, what="a first query sees one key")


def test_the_front_door_takes_it():
    q, k, v, _ = BY_NAME["causal"].make(torch.float16)
    chosen = kernels.varlen_attention(q, k, v, causal=True)
    assert_bits(chosen.values, kernels.varlen_attention(q, k, v, causal=True, implementation="triton").values)
    wide = q.astype(torch.float64)
    assert kernels.varlen_attention(wide, wide, wide).dtype is torch.float64
    with pytest.raises(NotImplementedError, match=r"triton: .*float64"):
        kernels.varlen_attention(wide, wide, wide, implementation="triton")


@pytest.mark.parametrize("name", ["grouped", "cross causal"])
def test_on_tensors(name):
    case = BY_NAME[name]
    q, k, v, _ = case.make(torch.bfloat16)
    want = attend(q, k, v, None, case.options)
    leaves = [x.values.detach().requires_grad_() for x in (q, k, v)]
    more = {} if k.offsets is q.offsets else {"cu_seqlens_k": k.offsets}
    o, lse = varlen_attention_triton(*leaves, q.offsets, True, return_lse=True, **more)
    assert lse.shape == want[1].shape and lse.dtype is torch.float32
    assert_bits(o, want[0], "o")
    assert_bits(lse, want[1], "lse")
    weights = normal(*o.shape, dtype=torch.bfloat16, seed=20)
    lse_weights = normal(*lse.shape, seed=21)
    loss = (o * weights).sum() + torch.where(lse.isfinite(), lse * lse_weights, 0.0).sum()
    for name, a, b in zip(("dq", "dk", "dv"), torch.autograd.grad(loss, leaves), want[2:], strict=True):
        assert_bits(a, b, name)


def test_the_lse_alone_has_gradients():
    q, k, v, _ = BY_NAME["grouped"].make(torch.float32)
    grads = []
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.values.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        arrays = [a.with_values(x) for a, x in zip((q, k, v), leaves, strict=True)]
        _, lse = kernels.varlen_attention(*arrays, causal=True, return_lse=True, implementation=implementation)
        weights = normal(*lse.values.shape, seed=1)
        grads.append(torch.autograd.grad((lse.values * weights).sum(), leaves[:2]))
    for a, b in zip(*grads, strict=True):
        assert_near(a, b, torch.float32, 4)


@pytest.mark.parametrize("layout", ["joint", "heads first", "every other", "reversed features"])
@pytest.mark.parametrize("dim", [64, 100])
def test_strided_views(layout, dim):
    total, heads = sum(gpu_cases.LENGTHS), 4
    if layout == "joint":
        views = normal(total, 3, heads, dim, dtype=torch.float16).unbind(1)
    elif layout == "heads first":
        views = [normal(heads, total, dim, dtype=torch.float16, seed=i).transpose(0, 1) for i in range(3)]
    elif layout == "every other":
        views = [normal(2 * total, heads, dim + 8, dtype=torch.float16, seed=i)[::2, :, 4 : dim + 4] for i in range(3)]
    else:
        views = [normal(total, dim, heads, dtype=torch.float16, seed=i).transpose(1, 2) for i in range(3)]
    offsets = offsets_of(gpu_cases.LENGTHS)
    strided = attend(*(scree.Array(x, offsets) for x in views), None, {"causal": True})
    dense = attend(*(scree.Array(x.contiguous(), offsets) for x in views), None, {"causal": True})
    for a, b in zip(strided, dense, strict=True):
        # 8 bytes beside a multiple of 16: on Hopper the portable kernel serves it, and its own kernel the dense tensors
        if layout == "every other" and dim == 64 and torch.cuda.get_device_capability() == (9, 0):
            assert_near(a, b, torch.float16, 4)
        else:
            assert_bits(a.contiguous(), b.contiguous())


def test_a_joint_tensor_is_not_copied():
    qkv = normal(4096, 3, 8, 128, dtype=torch.bfloat16)
    offsets = offsets_of((1024,) * 4)
    q, k, v = (scree.Array(x, offsets) for x in qkv.unbind(1))
    kernels.varlen_attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = kernels.varlen_attention(q, k, v, causal=True)
    used = torch.cuda.max_memory_allocated() - before
    assert used < out.values.numel() * 2 + 4096 * 8 * 4 + 2**20, f"{used} bytes were needed"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_offsets_of_any_integer(dtype):
    q, k, v, _ = BY_NAME["causal"].make(torch.float16)
    other = [scree.Array(x.values, x.offsets.to(dtype)) for x in (q, k, v)]
    for a, b in zip(attend(*other, None, {}), attend(q, k, v, None, {}), strict=True):
        assert_bits(a, b)


def test_spare_values_get_nothing_and_give_nothing():
    q, k, v, _ = BY_NAME["causal"].make(torch.float16)
    used, batch_size = q.total_length, q.batch_size
    full = [scree.with_capacity(x, batch_size + 5, used + 200) for x in (q, k, v)]
    for arr in full:
        arr.values[used:] = float("nan")
    got, want = attend(*full, None, {"causal": True}), attend(q, k, v, None, {"causal": True})
    for name, a, b in zip(gpu_cases.NAMES, got, want, strict=False):
        if name != "lse":
            assert not a[used:].abs().sum().item(), name
        if name in ("o", "lse"):
            assert_bits(a[:used], b, name)


def test_scores_beyond_half_precision():
    eye = torch.eye(64, device="cuda", dtype=torch.float16)[:, None] * 600.0
    arr = scree.Array(eye, offsets_of((64,)))
    v = arr.with_values(normal(64, 1, 64, dtype=torch.float16))
    assert_near(kernels.varlen_attention(arr, arr, v, implementation="triton").values, v.values, torch.float16)


def test_autocast():
    q, k, v, _ = BY_NAME["causal"].make(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        got = kernels.varlen_attention(q, k, v, causal=True)
    assert got.dtype is torch.bfloat16
    halves = [x.astype(torch.bfloat16) for x in (q, k, v)]
    assert_bits(got.values, kernels.varlen_attention(*halves, causal=True).values)


def test_it_waits_for_nothing():
    q, k, v, sinks = BY_NAME["everything"].make(torch.float16)
    options = BY_NAME["everything"].options
    attend(q, k, v, sinks, options, lse_too=False)
    fresh = [scree.from_cu_seqlens(x.values, x.offsets.clone()) for x in (q, k)]
    given = [fresh[0], fresh[1], fresh[1].with_values(v.values)]
    leaves = [x.values.detach().requires_grad_() for x in given]
    arrays = [a.with_values(x) for a, x in zip(given, leaves, strict=True)]
    weights = normal(*leaves[0].shape, dtype=torch.float16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = kernels.varlen_attention(*arrays, sinks=sinks, **options)
        torch.autograd.grad(out.values, leaves, weights)
        varlen_attention_triton(leaves[0], leaves[1], leaves[2], fresh[0].offsets, cu_seqlens_k=fresh[1].offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_from_another_thread_and_another_stream():
    q, k, v, _ = BY_NAME["grouped"].make(torch.float16)
    want = attend(q, k, v, None, {"causal": True})
    torch.cuda.synchronize()
    found = []

    def work():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found.append(attend(q, k, v, None, {"causal": True}))
        stream.synchronize()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for got in found:
        for a, b in zip(got, want, strict=True):
            assert_bits(a, b)


def test_more_than_2_to_the_31_elements():
    # A joint tensor of 2.5e9 elements, of which the last sequences are not zero.
    total, heads, dim, tail = 400_000, 16, 128, (700, 1, 299)
    qkv = torch.zeros(total, 3, heads, dim, dtype=torch.float16, device="cuda")
    qkv[-1000:].normal_()
    lengths = (100,) * ((total - 1000) // 100) + tail
    q, k, v = (scree.Array(x, offsets_of(lengths)) for x in qkv.unbind(1))
    q, k, v = q, q.with_values(k.values), q.with_values(v.values)
    few = [scree.Array(x.values[-1000:].contiguous(), offsets_of(tail)) for x in (q, k, v)]
    leaves = [x.values.detach().requires_grad_() for x in (q, k, v)]
    weights = torch.zeros(total, heads, dim, dtype=torch.float16, device="cuda")
    weights[-1000:] = normal(1000, heads, dim, dtype=torch.float16, seed=20)
    out = kernels.varlen_attention(*(q.with_values(x) for x in leaves), causal=True, implementation="triton").values
    grads = torch.autograd.grad(out, leaves, weights)
    few_leaves = [x.values.detach().requires_grad_() for x in few]
    few_out = kernels.varlen_attention(
        *(few[0].with_values(x) for x in few_leaves), causal=True, implementation="triton"
    ).values
    few_grads = torch.autograd.grad(few_out, few_leaves, weights[-1000:])
    for a, b in zip((out, *grads), (few_out, *few_grads), strict=True):
        assert_bits(a[-1000:], b)
        assert not a[:-1000].abs().max().item()


def test_memcheck():
    # Few and small: compute-sanitizer makes everything slow. Odd sizes, so that a row too many would be outside.
    lengths, key_lengths = (0, 17, 1, 70), (3, 65, 0, 33)
    for dim, dtype, options in ((40, torch.float16, {"causal": True}), (64, torch.bfloat16, {"window_size": (20, 3)})):
        case = Attention("memcheck", 2, 1, dim, dim, lengths, key_lengths, options)
        check(case, dtype)
