"""Inputs and comparisons of the tests that need a GPU: larger than the suite's, so that tiles are full, and on CUDA."""

import dataclasses

import pytest

import oracle
import scree
from scree import kernels

torch = pytest.importorskip("torch")

# A tile's edge is at 16, 32, 64 or 128 rows: lengths below, at and beyond each; empty first, last and in between.
LENGTHS = (0, 65, 1, 300, 128, 0, 31, 17, 0)
# Against LENGTHS: keys without queries, queries without keys, more and fewer keys.
KEY_LENGTHS = (3, 130, 1, 64, 0, 0, 200, 17, 0)

SPACING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}


def need_cuda():
    """Skip a module where there is no device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)


def offsets_of(lengths, dtype=torch.int32):
    """Return cu_seqlens on the device."""
    return torch.tensor(oracle.offsets_of(lengths), dtype=dtype, device="cuda")


def normal(*shape, dtype=torch.float32, seed=0):
    """Draw normals on the device."""
    random = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=random, device="cuda").to(dtype)


def batch(lengths, features, dtype=torch.float32, seed=0):
    """Make an Array of normals on the device."""
    return scree.Array(normal(sum(lengths), *features, dtype=dtype, seed=seed), offsets_of(lengths))


def assert_near(got, want, dtype, factor=1.0, what=""):
    """Require |got - want| <= factor spacings of the dtype, of the largest value that is right; inf where inf is."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), f"{what}: finite in other places"
    assert torch.equal(got[~finite], want[~finite]), f"{what}: other infinities"
    if not finite.any():
        return
    off = (got - want)[finite].abs().max().item()
    bound = factor * SPACING[dtype] * max(1e-3, want[finite].abs().max().item())
    assert off <= bound, f"{what}: off by {off:.2e}, allowed {bound:.2e}"


@dataclasses.dataclass(frozen=True)
class Attention:
    """One way to call varlen_attention on the device."""

    name: str
    heads: int = 4
    kv_heads: int = 4
    dim: int = 64
    v_dim: int = 64
    lengths: tuple = LENGTHS
    key_lengths: tuple = LENGTHS
    options: dict = dataclasses.field(default_factory=dict)
    sinks: bool = False

    def __str__(self):
        return self.name

    def make(self, dtype, seed=0):
        """Return q, k, v as Arrays and sinks as a tensor or None; k and v share their offsets."""
        q = batch(self.lengths, (self.heads, self.dim), dtype, seed)
        k = batch(self.key_lengths, (self.kv_heads, self.dim), dtype, seed + 1)
        if self.key_lengths == self.lengths:
            k = q.with_values(k.values)
        v = k.with_values(normal(sum(self.key_lengths), self.kv_heads, self.v_dim, dtype=dtype, seed=seed + 2))
        sinks = normal(self.heads, seed=seed + 3) if self.sinks else None
        return q, k, v, sinks


CAUSAL = {"causal": True}
ATTENTION = (
    Attention("full"),
    Attention("causal", options=CAUSAL),
    Attention("grouped", heads=8, kv_heads=2, options=CAUSAL),
    Attention("one key head", kv_heads=1),
    Attention("cross", key_lengths=KEY_LENGTHS),
    Attention("cross causal", key_lengths=KEY_LENGTHS, options=CAUSAL),
    Attention("window", options={"window_size": (70, 40)}),
    Attention("window left causal", options={"causal": True, "window_size": (50, None)}),
    Attention("window right", options={"window_size": (None, 3)}),
    Attention("window itself", options={"window_size": (0, 0)}),
    Attention("window cross", key_lengths=KEY_LENGTHS, options={"window_size": (33, 5)}),
    Attention("softcap", options={"softcap": 1.5}),
    Attention("sinks", sinks=True, options=CAUSAL),
    Attention("sinks cross causal", key_lengths=KEY_LENGTHS, options=CAUSAL, sinks=True),
    Attention("scale", options={"scale": 0.3}),
    Attention("negative scale", options={"scale": -0.2}),
    Attention("zero scale", options={"scale": 0.0}),
    Attention("value dim above", dim=64, v_dim=128),
    Attention("value dim below", dim=96, v_dim=40),
    Attention(
        "everything",
        heads=8,
        kv_heads=2,
        key_lengths=KEY_LENGTHS,
        options={"causal": True, "scale": 0.2, "window_size": (90, 20), "softcap": 2.0},
        sinks=True,
    ),
)


def attend(q, k, v, sinks, options, leaves_dtype=None, implementation="triton", backward=True, lse_too=True):
    """Return o, lse and, with backward, dq, dk, dv (and dsinks) for weights that a seed gives."""
    cast = (lambda x: x) if leaves_dtype is None else (lambda x: x.to(leaves_dtype))
    given = [cast(x).detach().requires_grad_(backward) for x in (q.values, k.values, v.values)]
    extra = [] if sinks is None else [cast(sinks).detach().requires_grad_(backward)]
    arrays = [arr.with_values(x) for arr, x in zip((q, k, v), given, strict=True)]
    more = {"sinks": extra[0]} if extra else {}
    o, lse = kernels.varlen_attention(*arrays, return_lse=True, implementation=implementation, **options, **more)
    o, lse = o.values, lse.values
    if not backward:
        return o, lse
    weights = normal(*o.shape, dtype=q.dtype, seed=20).to(o.dtype)
    loss = (o * weights).sum()
    if lse_too:
        lse_weights = normal(*lse.shape, seed=21)
        loss = loss + torch.where(lse.isfinite(), lse * lse_weights, 0.0).sum()
    return o.detach(), lse.detach(), *torch.autograd.grad(loss, [*given, *extra])


NAMES = ("o", "lse", "dq", "dk", "dv", "dsinks")


def check(case, dtype, factor=2.0):
    """Compare outputs and gradients with the reference's in float64."""
    q, k, v, sinks = case.make(dtype)
    got = attend(q, k, v, sinks, case.options)
    want = attend(q, k, v, sinks, case.options, torch.float64, "reference")
    for name, a, b in zip(NAMES[: len(want)], got, want, strict=True):
        assert a.dtype is (torch.float32 if name in ("lse", "dsinks") else dtype)
        assert_near(a, b, torch.float32 if name == "lse" else dtype, 4 if name == "lse" else factor, f"{case}: {name}")


def assert_bits(a, b, what=""):
    """Require the same bits, NaN included."""
    assert a.shape == b.shape and a.dtype is b.dtype
    if not a.numel():
        return
    a, b = (x.detach().contiguous().view(torch.uint8) for x in (a, b))
    assert torch.equal(a, b), f"{what}: bits differ"
