"""What attention in the room torch_native promises of keys and values that are not finite, beyond the suite."""

import importlib
import os

import pytest

from cases import batch, normal
from expect import assert_close
from scree import kernels
from test_compilers import need

pytestmark = [
    pytest.mark.skipif(os.environ.get("SCREE_TORCH_DEVICE", "cpu") != "cpu", reason="the room is for the CPU"),
    pytest.mark.no_poison,
]
NAME = "torch_native"


@pytest.fixture
def th():
    """PyTorch."""
    return need("torch")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": True, "softcap": 2.0},
        {"causal": True, "window_size": (9, 0)},
        {"window_size": (20, 3)},
    ],
    ids=["causal", "softcap", "causal window", "window"],
)
def test_what_is_not_finite_reaches_no_gradient_that_it_is_hidden_from(th, options, dtype, which, bad):
    torch = th.module
    q, k, v = (batch(th, (4, 200, 3), (heads, 8), seed=seed) for seed, heads in enumerate((4, 2, 2)))
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    place, first = 150, 4
    left, right = options.get("window_size", (10**6, 0))
    i = torch.arange(207)[:, None] - first  # queries, and j keys: how far each is into the row of `place`
    j = torch.arange(207)[None] - first
    mine = (i >= 0) & (i < 200)
    seen = mine & mine.T & (j <= i + right) & (j >= i - left)
    tainted = seen[:, first + place]
    reached = seen[tainted].any(0)  # keys that a tainted query sees, too

    def grads(*given):
        leaves = [x.detach().requires_grad_() for x in given]
        arrays = [q.with_values(x) for x in leaves]
        out = kernels.varlen_attention(*arrays, implementation=NAME, **options).values
        return torch.autograd.grad(out, leaves, th.array(normal((207, 4, 8), 7), dtype))

    want = grads(q.values, k.values, v.values)
    x = (k if which == "key" else v).values.clone()
    x[first + place, 1, 3] = bad
    got = grads(q.values, x, v.values) if which == "key" else grads(q.values, k.values, x)
    assert not got[0][tainted].isfinite().all()
    for some, right_ones, touched in zip(got, want, (tainted, reached, reached), strict=True):
        assert (~touched).sum() > 20 or (touched is reached and options.get("window_size") is None)
        assert_close(th.to_np(some[~touched]), th.to_np(right_ones[~touched]), dtype, scale=8.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("place", [0, 31, 33, 300, 700, 1099])
@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (20, 3)}], ids=["causal", "window"])
def test_a_large_result_shows_at_a_few_queries_what_was_hidden(th, options, place, which, bad, monkeypatch):
    torch = th.module
    hidden = importlib.import_module("scree.kernels.torch_native._hidden")
    monkeypatch.setattr(hidden, "_LARGE", 0)
    looked: list[int] = []
    real = hidden.is_finite
    monkeypatch.setattr(hidden, "is_finite", lambda x: looked.append(len(x)) or real(x))
    lengths, first = (7, 1100, 130), 7
    given = [batch(th, lengths, (2, 8), seed=seed) for seed in range(3)]
    grad = th.array(normal((sum(lengths), 2, 8), 7))

    def run(*arrays):
        leaves = [x.values.detach().requires_grad_() for x in arrays]
        out = kernels.varlen_attention(*map(given[0].with_values, leaves), implementation=NAME, **options).values
        return out.detach(), torch.autograd.grad(out, leaves, grad)[0]

    want = run(*given)
    assert len(looked) == 2  # the output and the gradient of q
    assert max(looked) < sum(lengths) // 8
    at = 1 if which == "key" else 2
    values = given[at].values.clone()
    values[first + place, 1, 3] = bad
    given[at] = given[at].with_values(values)
    left, right = options.get("window_size", (2000, 0))
    i = torch.arange(sum(lengths)) - first
    seen = (i >= max(0, place - right)) & (i < 1100) & (i <= place + left)
    for got, right_one in zip(run(*given), want, strict=True):
        assert not got[seen].isfinite().all()
        assert_close(th.to_np(got[~seen]), th.to_np(right_one[~seen]), "float32", scale=8.0)
