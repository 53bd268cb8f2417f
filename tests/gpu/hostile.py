"""Calls every kernel on offsets that lie. Run apart: an illegal address would end all later work of the process.

Prints the name of each case before it, so that the last one is known, and ``done`` at the end.
"""

import sys

import torch

import scree
from scree import kernels
from scree.kernels import triton as fast
from scree.kernels._dispatch import TABLE

TOTAL, ROWS = 300, 4
HUGE = 2**31 - 1
OFFSETS = {
    "falling": [0, 200, 100, 300, 300],
    "overlong": [0, 100, 200, 300, 1_000_000],
    "huge": [0, HUGE, HUGE, HUGE, HUGE],
    "negative": [0, -5, -HUGE, 20, 300],
    "all negative": [-HUGE, -HUGE, -5, -4, -1],
    "not from 0": [50, 100, 200, 250, 300],
    "short of the end": [0, 10, 20, 30, 40],
    "jumping": [0, HUGE, -HUGE, HUGE, 300],
    "far": [0, 2**40, 2**50, -(2**60), 300],
    "overflowing": [0, 2**62, -(2**62), 2**63 - 1, -(2**63)],
}
OPS = [op for op, impls in TABLE.items() if any(impl.name == "triton" for impl in impls)]
FINITE = ("varlen_attention", "varlen_rmsnorm", "varlen_layernorm")


def arrays(values, offsets):
    """Make an Array whose host knows nothing of its offsets."""
    return scree.from_cu_seqlens(values, offsets)


def calls(op, x, offsets):
    """Give the calls of an op on values of (T, 2, 64)."""
    arr = arrays(x, offsets)
    if op == "varlen_attention":
        options = {"return_lse": True, "implementation": "triton"}
        good = arrays(x, torch.tensor([0, 70, 70, 200, 300], dtype=offsets.dtype, device="cuda"))
        yield lambda: kernels.varlen_attention(arr, arr, arr, causal=True, **options)[0].values
        yield lambda: kernels.varlen_attention(arr, good, good, window_size=(9, 4), **options)[0].values
        yield lambda: kernels.varlen_attention(good, arr, arr, **options)[0].values
        yield lambda: fast.varlen_attention_triton(x, x, x, offsets, True)
    elif op == "varlen_reduce":
        for how in ("sum", "mean", "max", "logsumexp"):
            yield lambda how=how: kernels.varlen_reduce(arr, how, implementation="triton")
    elif op == "varlen_rope":
        table = torch.ones(TOTAL, 32, device="cuda")
        start = torch.tensor([0, HUGE, 5, HUGE - 1], dtype=torch.int32, device="cuda")
        yield lambda: kernels.varlen_rope(arr, table, table, implementation="triton").values
        yield lambda: kernels.varlen_rope(arr, table, table, start=start, implementation="triton").values
    else:
        yield lambda: getattr(kernels, op)(arr, implementation="triton").values


def moves(x, offsets):
    """Give the calls that pad, and that take rows."""
    arr = arrays(x, offsets)
    for side in ("right", "left"):
        yield lambda side=side: scree.to_padded(arr, side=side, max_length=128)[0]


def main():
    for dtype in (torch.int32, torch.int64):
        for name, cuts in OFFSETS.items():
            if dtype is torch.int32 and max(map(abs, cuts)) > HUGE:
                continue
            offsets = torch.tensor(cuts, dtype=dtype, device="cuda")
            for op in [*OPS, "moves"]:
                print(f"{op}, {name} offsets, {dtype}", flush=True)
                x = torch.randn(TOTAL, 2, 64, device="cuda").half().requires_grad_()
                for call in moves(x, offsets) if op == "moves" else calls(op, x, offsets):
                    out = call()
                    (grad,) = torch.autograd.grad(out.float().nan_to_num(0.0, 0.0, 0.0).sum(), x)
                    torch.cuda.synchronize()
                    if op in FINITE:
                        assert out.isfinite().all() and grad.isfinite().all(), "not finite"
                    if op == "varlen_attention" and name in ("falling", "overlong", "not from 0"):
                        assert not out.any() and not grad.any(), "not zero"
    print("done")


if __name__ == "__main__":
    sys.exit(main())
