"""Attention on CUDA: the same bits in every run and in every batch, whatever the neighbours hold."""

import pytest

import gpu_cases
import scree
from gpu_cases import ATTENTION, NAMES, assert_bits, attend, normal, offsets_of
from scree import kernels
from scree.kernels.triton import varlen_attention_triton

torch = pytest.importorskip("torch")
gpu_cases.need_cuda()

pytestmark = pytest.mark.gpu

BY_NAME = {case.name: case for case in ATTENTION}
HARD = ("grouped", "everything")
PER_ROW = NAMES[:5]


def rows(arrays, order):
    """Return q, k and v with their rows in another order, on new offsets."""
    q, k, v = (arr[order] for arr in arrays)
    return q, k, k.with_values(v.values)


def run(case, arrays, sinks, weights, lse_weights):
    """Return o, lse, dq, dk, dv for given cotangents."""
    leaves = [x.values.detach().clone().requires_grad_() for x in arrays]
    given = [a.with_values(x) for a, x in zip(arrays, leaves, strict=True)]
    more = {} if sinks is None else {"sinks": sinks}
    o, lse = kernels.varlen_attention(*given, return_lse=True, implementation="triton", **case.options, **more)
    grads = torch.autograd.grad((o.values, lse.values), leaves, (weights, lse_weights))
    return o.values.detach(), lse.values.detach(), *grads


def cut(arrays, results):
    """Cut the results into rows: o, lse, dq by q's offsets, dk, dv by k's."""
    lengths = [arr.lengths.tolist() for arr in (arrays[0], arrays[0], arrays[0], arrays[1], arrays[1])]
    return list(zip(*(x.split(n) for x, n in zip(results, lengths, strict=True)), strict=True))


def cotangents(case, seed=20):
    total = sum(case.lengths)
    return normal(total, case.heads, case.v_dim, dtype=torch.float16, seed=seed), normal(
        total, case.heads, seed=seed + 1
    )


def split(x, arr):
    return x.split(arr.lengths.tolist())


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_two_runs_give_the_same_bits(case):
    given = case.make(torch.float16)
    first = attend(*given, case.options)
    for _ in range(3):
        for name, a, b in zip(NAMES, attend(*given, case.options), first, strict=False):
            assert_bits(a, b, name)


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_row_alone_is_the_row_in_the_batch(name, dtype):
    case = BY_NAME[name]
    q, k, v, sinks = case.make(dtype)
    weights, lse_weights = cotangents(case)
    weights = weights.to(dtype)
    together = cut((q, k, v), run(case, (q, k, v), sinks, weights, lse_weights))
    for row in range(len(case.lengths)):
        alone = rows((q, k, v), [row])
        w, lw = split(weights, q)[row], split(lse_weights, q)[row]
        for what, a, b in zip(PER_ROW, run(case, alone, sinks, w, lw), together[row], strict=True):
            assert_bits(a, b, f"row {row}: {what}")


@pytest.mark.parametrize("name", HARD)
def test_rows_in_another_order_and_among_others(name):
    case = BY_NAME[name]
    q, k, v, sinks = case.make(torch.float16)
    weights, lse_weights = cotangents(case)
    together = cut((q, k, v), run(case, (q, k, v), sinks, weights, lse_weights))
    order = [3, 8, 1, 5, 7, 7, 0, 2, 4, 6, 3]
    other = rows((q, k, v), order)
    w = torch.cat([split(weights, q)[i] for i in order])
    lw = torch.cat([split(lse_weights, q)[i] for i in order])
    for place, results in enumerate(cut(other, run(case, other, sinks, w, lw))):
        for what, a, b in zip(PER_ROW, results, together[order[place]], strict=True):
            assert_bits(a, b, f"row {order[place]} at {place}: {what}")


@pytest.mark.parametrize("name", ["grouped", "cross causal", "everything"])
@pytest.mark.parametrize("bad", [7.0, float("nan"), float("inf")])
def test_no_sequence_sees_another(name, bad):
    case = BY_NAME[name]
    q, k, v, sinks = case.make(torch.float16)
    weights, lse_weights = cotangents(case)
    before = cut((q, k, v), run(case, (q, k, v), sinks, weights, lse_weights))
    for row in (1, 3, 4):
        changed = []
        for arr in (q, k, v):
            values = arr.values.clone()
            start, stop = arr.offsets[row : row + 2].tolist()
            values[start:stop] = bad
            changed.append(arr.with_values(values))
        other = weights.clone()
        start, stop = q.offsets[row : row + 2].tolist()
        other[start:stop] = bad
        after = cut((q, k, v), run(case, changed, sinks, other, lse_weights))
        for i in range(len(case.lengths)):
            if i != row:
                for what, a, b in zip(PER_ROW, after[i], before[i], strict=True):
                    assert_bits(a, b, f"row {i}, {row} changed: {what}")


@pytest.mark.parametrize("dim", [40, 128, 256])
def test_the_bits_of_other_head_dims(dim):
    lengths = (130, 1, 0, 65, 300)
    q = gpu_cases.batch(lengths, (2, dim), torch.bfloat16)
    weights = normal(sum(lengths), 2, dim, dtype=torch.bfloat16, seed=1)
    lse_weights = normal(sum(lengths), 2, seed=2)
    case = gpu_cases.Attention("dim", options={"causal": True})
    together = cut((q, q, q), run(case, (q, q, q), None, weights, lse_weights))
    for row in (0, 3, 4):
        alone = (q[[row]],) * 3
        w, lw = split(weights, q)[row], split(lse_weights, q)[row]
        for what, a, b in zip(PER_ROW, run(case, alone, None, w, lw), together[row], strict=True):
            assert_bits(a, b, f"row {row}: {what}")


def test_more_spare_capacity_changes_no_bits():
    case = BY_NAME["causal"]
    q, k, v, _ = case.make(torch.float16)
    used = q.total_length
    small = attend(q, k, v, None, case.options, backward=False)
    for rows_more, values_more in ((0, 1), (3, 63), (100, 1000)):
        full = [scree.with_capacity(x, q.batch_size + rows_more, used + values_more) for x in (q, k, v)]
        for a, b in zip(attend(*full, None, case.options, backward=False), small, strict=True):
            assert_bits(a[:used], b)


def test_other_offsets_after_a_map_was_kept():
    # The maps of tiles are kept with the offsets: writing to the offsets has to be noticed.
    values = normal(300, 2, 64, dtype=torch.float16)
    offsets = offsets_of((100, 200))
    other = offsets_of((250, 50))
    want = [varlen_attention_triton(values, values, values, o.clone(), True) for o in (offsets, other)]
    assert_bits(varlen_attention_triton(values, values, values, offsets, True), want[0])
    offsets.copy_(other)
    assert_bits(varlen_attention_triton(values, values, values, offsets, True), want[1])
