"""Embed the same texts padded and packed, and measure both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import scree

from . import minilm, padded
from .native import Native

TEXTS_A_BATCH = 32
"""Rows of a padded batch: what most libraries take unless told otherwise."""

TOKENS_A_BATCH = 2048
"""Tokens of a packed batch, at most."""

LARGEST_DIFFERENCE = 1e-5
"""What two embeddings of length 1 may differ by: some ten times what float32 rounds away in six layers."""


class Way(NamedTuple):
    """What one way of embedding gave, and what it took.

    Attributes
    ----------
    embeddings : array of (texts, M), float32
    places : int
        Tokens that went through the model, padding included.
    activations : int
        Bytes: the sum over everything that the operations of the model returned, in all batches. What an operation
        makes inside itself (the scores of an attention) is not in it.
    seconds : float
        From token numbers in NumPy to embeddings in NumPy.
    """

    embeddings: NDArray[np.float32]
    places: int
    activations: int
    seconds: float


class _Meter:
    """Adds up the bytes of the arrays that are passed through it."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def __call__(self, x: Any) -> Any:
        self.n_bytes += x.nbytes
        return x


def run_padded(
    tokens: scree.Array,
    model: Any,
    native: Native,
    on_batch: Callable[[int], None] | None = None,
    embed: Callable[..., Any] = padded.embed,
) -> Way:
    """Embed texts in padded batches, `TEXTS_A_BATCH` at a time in the order in which they come.

    Parameters
    ----------
    tokens : Array of (T,), int32, NumPy
    model : Model
        Weights of the framework of `native`; or whatever `embed` takes.
    native : Native
    on_batch : callable, optional
        Called after every batch with the number of texts in it.
    embed : callable
        `padded.embed`, or another with its parameters.
    """
    rows = scree.unpack(tokens)
    meter, places, embeddings = _Meter(), 0, list[NDArray[np.float32]]()
    began = time.perf_counter()
    for start in range(0, len(rows), TEXTS_A_BATCH):
        ids, mask = padded.pad(rows[start : start + TEXTS_A_BATCH])
        embedded = embed(native.asarray(ids), native.asarray(mask), model, native, meter)
        embeddings.append(np.asarray(embedded))  # waits for the device
        places += ids.size
        if on_batch is not None:
            on_batch(len(ids))
    return Way(np.concatenate(embeddings), places, meter.n_bytes, time.perf_counter() - began)


def run_packed(
    tokens: scree.Array,
    model: Any,
    native: Native,
    on_batch: Callable[[int], None] | None = None,
    embed: Callable[..., Any] = minilm.embed,
) -> Way:
    """Embed texts in packed batches, as many at a time as have `TOKENS_A_BATCH` tokens.

    Parameters as `run_padded`; `embed` is `minilm.embed`, or another with its parameters.

    Notes
    -----
    A framework that compiles a program for each shape gets all batches in one shape (`scree.with_capacity`).
    """
    meter, places, embeddings = _Meter(), 0, list[NDArray[np.float32]]()
    began = time.perf_counter()
    cuts = list(_cuts(tokens.lengths.tolist()))
    most_rows = max(stop - start for start, stop in cuts)
    for start, stop in cuts:
        batch = tokens[start:stop]
        packed = scree.from_lengths(native.asarray(batch.values), batch.lengths)
        if native.compiles_shapes:
            packed = scree.with_capacity(packed, most_rows, TOKENS_A_BATCH)
        embedded = embed(packed, model, native, meter)
        embeddings.append(np.asarray(embedded)[: stop - start])  # waits for the device
        places += packed.total_length
        if on_batch is not None:
            on_batch(stop - start)
    return Way(np.concatenate(embeddings), places, meter.n_bytes, time.perf_counter() - began)


def _cuts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut texts of these lengths into batches of at most `TOKENS_A_BATCH` tokens: (start, stop) of each."""
    start, n_tokens = 0, 0
    for i, length in enumerate(lengths):
        if n_tokens + length > TOKENS_A_BATCH and i > start:
            yield start, i
            start, n_tokens = i, 0
        n_tokens += length
    yield start, len(lengths)


def padded_places(lengths: NDArray[np.integer[Any]]) -> int:
    """Count the tokens of padded batches of texts of these lengths, padding included."""
    starts = range(0, len(lengths), TEXTS_A_BATCH)
    batches = (lengths[start : start + TEXTS_A_BATCH] for start in starts)
    return sum(int(batch.max()) * len(batch) for batch in batches)


def largest_difference(a: Way, b: Way) -> float:
    """Return the largest difference between any two numbers of the embeddings; infinity where one is no number."""
    difference = np.abs(a.embeddings - b.embeddings).max()
    return float(difference) if np.isfinite(difference) else float("inf")


def nearest(embedding: NDArray[np.float32], embeddings: NDArray[np.float32], n: int) -> list[tuple[int, float]]:
    """Find the texts whose embeddings point most nearly in the same direction.

    Returns
    -------
    list of (int, float)
        Number of the text and cosine of the angle, the nearest first.
    """
    cosines = embeddings @ embedding
    return [(int(i), float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:n]]
