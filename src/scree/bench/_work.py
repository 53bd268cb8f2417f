"""The workloads, in NumPy: every framework makes its own arrays of them."""

from __future__ import annotations

from typing import Any

import numpy as np

TOKENS = (96, 12_160, 1024)  # rows, tokens, features
HEADS = ((16, 124, 4, 32), (16, 512, 8, 64))  # sequences, mean length, heads, head dim
BATCHES, DRAWN = 8, 500  # with lengths of their own, where every call gets new ones: those of so many that are drawn


def lengths_of(rows: int, mean: int, total: int | None = None, seed: int = 0) -> Any:
    """Log-normal lengths of sigma 1, scaled to a total where one is given."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, rows).astype(np.int64))
    if total is not None:
        lengths = np.maximum(1, lengths * total // lengths.sum())
        lengths[lengths.argmax()] += total - lengths.sum()
    return lengths


class Heads:
    """One batch for causal attention: q, k, v (T, heads, dim), a gradient of the output, and lengths.

    ``others`` has lengths of as many tokens in all, as a training loop brings them at the next calls. Of many that are
    drawn they are those whose pairs of a query and a key are nearest in number to those of ``lengths``: what calls with
    new lengths take longer is then what new lengths cost, and not that there is more to compute.
    """

    def __init__(
        self, sequences: int, mean: int, heads: int, dim: int, lengths: list[int] | None = None, dtype: str = "float32"
    ) -> None:
        self.lengths: list[int] = lengths_of(sequences, mean).tolist() if lengths is None else lengths
        self.dtype = dtype  # that they are cast to
        total = sum(self.lengths)
        self.offsets = _offsets(self.lengths)
        self.q, self.k, self.v, self.grad = np.random.default_rng(1).standard_normal((4, total, heads, dim), np.float32)
        self.name = f"{sequences} x ~{mean} x {heads} x {dim}"
        if dtype != "float32":
            self.name = f"{self.name} {dtype}"
        pairs = _pairs(self.lengths)
        self.flops = 4.0 * pairs * heads * dim
        drawn = [lengths_of(sequences, mean, total, seed).tolist() for seed in range(1, DRAWN + 1)]
        self.others: list[list[int]] = sorted(drawn, key=lambda lengths: abs(_pairs(lengths) - pairs))[:BATCHES]
        self.other_offsets = [_offsets(lengths) for lengths in self.others]
        self.other_flops = 4.0 * float(np.median([_pairs(lengths) for lengths in self.others])) * heads * dim


class Tokens:
    """Tokens of many features in rows, for what runs along rows and along tokens."""

    def __init__(self, rows: int, tokens: int, features: int, dtype: str = "float32") -> None:
        self.rows, self.features, self.dtype = rows, features, dtype
        self.lengths: list[int] = lengths_of(rows, tokens // rows, tokens).tolist()
        self.offsets = _offsets(self.lengths)
        rng = np.random.default_rng(2)
        self.x, self.grad = rng.standard_normal((2, tokens, features), np.float32)
        self.weight, self.bias = rng.standard_normal((2, features), np.float32)
        self.name = f"{tokens} x {features}, {rows} rows"
        if dtype != "float32":
            self.name = f"{self.name} {dtype}"
        angles = np.arange(max(self.lengths))[:, None] / 10_000 ** (np.arange(0, 64, 2) / 64)
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)  # heads of 64


def _pairs(lengths: list[int]) -> float:
    """How many keys all causal queries see."""
    return sum(n * (n + 1) / 2 for n in lengths)


def _offsets(lengths: list[int]) -> Any:
    return np.cumsum([0, *lengths], dtype=np.int32)


def heads(dtype: str = "float32") -> list[Heads]:
    """The batches for attention, the small one first."""
    return [Heads(*shape, dtype=dtype) for shape in HEADS]


def tokens(dtype: str = "float32") -> Tokens:
    """The tokens for everything else."""
    return Tokens(*TOKENS, dtype=dtype)


def gpu_heads() -> list[Heads]:
    """The batches for attention on halves, which a GPU needs more of."""
    mixed = [512, 1024, 768, 256, 2048, 384, 896, 640, 1536, 320, 1152, 480, 704, 192, 832, 416]
    return [
        Heads(16, sum(mixed) // 16, 16, 64, mixed, "float16"),
        Heads(4, 8192, 16, 128, [8192] * 4, "bfloat16"),
    ]
