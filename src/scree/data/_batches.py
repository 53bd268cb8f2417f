"""Batches of at most so many tokens: the same on every rank, and resumable within an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .. import _check
from .._array import Array
from .._backends import Dense
from .._backends._protocol import HostInts
from ._planning import at_least_one, host_lengths, one_of

_VERSION = 1


class TokenBatches:
    """The batches of `token_batches`: iterate it, or give it to a DataLoader as its `batch_sampler`.

    Attributes
    ----------
    epoch : int
        The epoch whose batches the next iteration gives. It goes up by itself after each complete pass.
    dropped : array of (K,), int64
        The sequences that are too long and in no batch.
    """

    def __init__(
        self,
        lengths: HostInts,
        max_tokens: int,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
        dropped: HostInts,
    ) -> None:
        self._lengths = lengths
        self._kept = np.flatnonzero(lengths <= max_tokens)
        self._max_tokens = max_tokens
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._planned: tuple[int, list[HostInts]] | None = None
        self._begin_at = 0  # the batch with which the next iteration begins
        self._given = 0
        self.epoch = 0
        self.dropped = dropped

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; naming the one that was resumed keeps its place."""
        number = _check.whole(epoch, "epoch")
        if number < 0:
            raise ValueError(f"epoch: got {number}; needs 0 or more")
        if number != self.epoch:
            self.epoch, self._begin_at, self._given = number, 0, 0

    def __len__(self) -> int:
        """How many batches each rank gets in this epoch, those before a resumed place included."""
        return len(self._batches()) // self._world_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this rank as lists of row numbers."""
        batches = self._batches()[self._rank :: self._world_size]
        begin, self._begin_at = self._begin_at, 0
        for i in range(begin, len(batches)):
            self._given = i + 1
            yield batches[i].tolist()
        self.epoch, self._given = self.epoch + 1, 0

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Say where this epoch is, so that `load_state_dict` goes on there. The same on every rank.

        Parameters
        ----------
        done : int, optional
            How many batches of this epoch, of each rank, were trained on. None: as many as were handed out; a
            DataLoader with workers has asked for some that it has not given yet, so count them yourself there.
        """
        if done is None:
            done = max(self._given, self._begin_at)
        number = _check.whole(done, "done")
        if not 0 <= number <= len(self):
            raise ValueError(f"done: got {number}; needs 0 to {len(self)}, the batches of this epoch")
        return {"version": _VERSION, "epoch": self.epoch, "done": number, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was asked. The lengths, the limit, the seed and the ranks must be the same.

        Raises
        ------
        ValueError
            They are not; the message names the first that differs.
        """
        mine = {"version": _VERSION, **self._identity()}
        for key in (*mine, "epoch", "done"):
            if key not in state:
                raise ValueError(f"state: it has no {key!r}; needs what state_dict() returned")
            if key in mine and state[key] != mine[key]:
                raise ValueError(f"state: {key} is {state[key]!r}, but here it is {mine[key]!r}; they must agree")
        self.set_epoch(state["epoch"])
        done = _check.whole(state["done"], "state: done")
        if not 0 <= done <= len(self):
            raise ValueError(f"state: done is {done}; needs 0 to {len(self)}, the batches of this epoch")
        self._begin_at, self._given = done, 0
        if done == len(self):
            self.epoch, self._begin_at = self.epoch + 1, 0

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(np.ascontiguousarray(self._lengths).astype("<i8").tobytes(), digest_size=8)
        return {
            "lengths": digest.hexdigest(),
            "max_tokens": self._max_tokens,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "world_size": self._world_size,
        }

    def _batches(self) -> list[HostInts]:
        """All batches of this epoch, of every rank; their number is a multiple of the ranks."""
        if self._planned is None or self._planned[0] != self.epoch:
            rows = self._kept
            if self._shuffle:
                rows = rows[np.random.default_rng([self._seed, self.epoch]).permutation(len(rows))]
            self._planned = self.epoch, _even(_filled(rows, self._lengths[rows], self._max_tokens), self._world_size)
        return self._planned[1]

    def __repr__(self) -> str:
        return (
            f"TokenBatches({len(self._kept)} sequences, max_tokens={self._max_tokens}, {len(self)} batches for each of "
            f"{self._world_size} ranks, epoch={self.epoch})"
        )


def token_batches(
    lengths: Sequence[int] | Dense | Array,
    max_tokens: int,
    shuffle: bool = True,
    seed: int = 0,
    *,
    rank: int = 0,
    world_size: int = 1,
    too_long: Literal["error", "drop"] = "error",
) -> TokenBatches:
    """Batch sequences by their tokens: as many in a batch as fit into `max_tokens`, in random order.

    Every rank works out the same batches from the same arguments and takes every `world_size`-th of them. All get
    equally many: where the number does not divide, the batches with the most sequences are halved, so that no sequence
    is dropped and none comes twice. Only where all batches are of one sequence do the first ones come again at the end.

    Parameters
    ----------
    lengths : list of int, array of (N,), integer, or Array
        The lengths of the sequences; of an Array, those of its rows.
    max_tokens : int
        The most tokens of a batch, padding not counted: there is none.
    shuffle : bool
        Whether each epoch has an order of its own; otherwise all have that of the sequences.
    seed : int
        Draws the orders.
    rank, world_size : int
        Which of how many processes this is.
    too_long : "error" or "drop"
        What is done with a sequence above `max_tokens`; those dropped are listed in the result.

    Returns
    -------
    TokenBatches
        Yields lists of row numbers; has `set_epoch`, `state_dict` and `load_state_dict`.

    Raises
    ------
    TypeError, ValueError
        An argument is not as described, a sequence is too long, or there are fewer sequences than ranks.

    Examples
    --------
    >>> import scree
    >>> batches = scree.data.token_batches([5, 3, 4, 2, 6], max_tokens=8, shuffle=False)
    >>> list(batches)
    [[0, 1], [2, 3], [4]]
    >>> batches.epoch
    1
    """
    sizes = host_lengths("token_batches", lengths)
    limit, ranks = at_least_one("max_tokens", max_tokens), at_least_one("world_size", world_size)
    number, drawn = _check.whole(rank, "rank"), _check.whole(seed, "seed")
    if not 0 <= number < ranks:
        raise ValueError(f"rank: got {number}; needs 0 <= rank < {ranks}, the world_size")
    if drawn < 0:
        raise ValueError(f"seed: got {drawn}; needs 0 or more")
    one_of("too_long", too_long, ("error", "drop"))
    above = sizes > limit
    if above.any() and too_long == "error":
        i = int(above.argmax())
        raise ValueError(
            f"lengths[{i}]: got {sizes[i]}, above max_tokens={limit}; {int(above.sum())} of {len(sizes)} are; "
            "too_long='drop' leaves them out"
        )
    n_kept = len(sizes) - int(above.sum())
    if 0 < n_kept < ranks:
        raise ValueError(f"world_size: got {ranks}; needs at most {n_kept}, the number of sequences")
    return TokenBatches(sizes, limit, bool(shuffle), drawn, number, ranks, np.flatnonzero(above))


def _filled(rows: HostInts, lengths: HostInts, limit: int) -> list[HostInts]:
    """Cut the rows, in their order, into runs of at most `limit` tokens, each as long as it can be."""
    ends = np.cumsum(lengths)
    batches: list[HostInts] = []
    begin, before = 0, 0
    while begin < len(rows):
        end = int(np.searchsorted(ends, before + limit, side="right"))
        batches.append(rows[begin:end])
        begin, before = end, int(ends[end - 1])
    return batches


def _even(batches: list[HostInts], ranks: int) -> list[HostInts]:
    """Halve the batches with the most rows until their number is a multiple of the ranks; repeat the first otherwise."""
    repeated = 0
    for _ in range(-len(batches) % ranks):
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[largest]
        if len(batch) == 1:
            batches.append(batches[repeated])
            repeated += 1
            continue
        middle = (len(batch) + 1) // 2
        batches[largest : largest + 1] = [batch[:middle], batch[middle:]]
    return batches
