"""`scree.hf.collator` beside transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from huggingface_table import COLLATE
from measure import interleaved
from transformers import DataCollatorWithFlattening

import scree

BATCHES = (8, 64, 512)  # sequences
_LONGEST = 2048


def rows(seconds: float, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Measure everything; give one row a contender."""
    for n in BATCHES:
        for kind in ("lists", "NumPy"):
            yield from _collating(n, kind, seconds, clock)


def _collating(n: int, kind: str, seconds: float, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Join sequences of log-normal lengths, labels and offsets included, to tensors."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5, 1, n), 1, _LONGEST).astype(int)
    ids = [random.integers(0, 32_000, length) for length in lengths]
    features = [{"input_ids": row.tolist() if kind == "lists" else row} for row in ids]
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    ours, theirs = scree.hf.collator(**options), DataCollatorWithFlattening(**options)
    _check(ours(features), theirs(features))
    contenders = {"scree.hf.collator": lambda: ours(features), "DataCollatorWithFlattening": lambda: theirs(features)}
    work = f"{n} sequences, {lengths.sum()} tokens, {kind}"
    for name, times in interleaved(contenders, seconds, clock=clock).items():
        yield {"op": COLLATE, "work": work, "impl": name, **times}


def _check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if list(ours) != list(theirs):
        raise AssertionError(f"scree gives {list(ours)}, transformers {list(theirs)}")
    for name, value in theirs.items():
        same = ours[name] == value if isinstance(value, int) else torch.equal(ours[name], value)
        if not same or (not isinstance(value, int) and ours[name].dtype != value.dtype):
            raise AssertionError(f"{name}: scree gives {ours[name]}, transformers {value}")
