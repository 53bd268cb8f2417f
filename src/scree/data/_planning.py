"""Which sequences share a bin of fixed capacity.

The work of best fit and first fit is in `_fitting`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .. import _check, _layout, _offsets
from .._array import Array, expect_array, from_host_offsets
from .._backends import Dense, find_backend, load
from .._backends._protocol import HostInts
from .._rows import numbers
from ._fitting import fit_decreasing

ALGORITHMS = ("bfd", "ffd", "wrapped", "split")
TOO_LONG = ("error", "split", "drop")
IMPLEMENTATIONS = ("numpy", "numba")

_RUN = 16  # tokens a piece, from which copying whole pieces is quicker than an index of every token


@dataclass(frozen=True)
class Plan:
    """Bins of sequences, as `plan_bins` makes them.

    Attributes
    ----------
    bins : Array of (P,), integer, NumPy
        Row b lists the sequences of bin b. A sequence that was cut is listed once for each of its P pieces.
    starts, lengths : array of (P,), int64
        Where each piece begins in its sequence, and how long it is, in the order of ``bins.values``.
    capacity : int
        The tokens that a bin holds at most.
    dropped : array of (K,), int64
        The sequences that were too long and are in no bin.
    algo : str
        What made it.
    """

    bins: Array
    starts: HostInts
    lengths: HostInts
    capacity: int
    dropped: HostInts
    algo: str

    @property
    def n_bins(self) -> int:
        """How many bins there are."""
        return self.bins.batch_size

    @property
    def n_tokens(self) -> int:
        """How many tokens are in the bins."""
        return int(self.lengths.sum())

    @property
    def n_split(self) -> int:
        """How many sequences were cut."""
        return int((np.bincount(self.bins.values) > 1).sum()) if len(self.lengths) else 0

    @property
    def fills(self) -> HostInts:
        """(n_bins,), int64: the tokens in each bin."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])
        return np.diff(ends[self.bins.offsets])

    @property
    def efficiency(self) -> float:
        """Tokens in the bins by places in the bins, 0 to 1; 1 where there is no bin."""
        return self.n_tokens / (self.n_bins * self.capacity) if self.n_bins else 1.0

    def __len__(self) -> int:
        return self.n_bins

    def __getitem__(self, key: Any) -> Any:
        """The sequences of bin `key`, (k,); or, for a slice, list or mask, an Array of those of several bins."""
        return self.bins[key]

    def __iter__(self) -> Iterator[HostInts]:
        return iter(self.bins)

    def __repr__(self) -> str:
        cut, dropped = self.n_split, len(self.dropped)
        notes = f"{f', {cut} cut' if cut else ''}{f', {dropped} dropped' if dropped else ''}"
        return f"Plan({self.algo}, capacity={self.capacity}, n_bins={self.n_bins}, efficiency={self.efficiency:.4f}{notes})"

    def gather(self, arr: Array, bins: Any = None) -> Array:
        """Collect the sequences of some bins, bin after bin: what one step trains on.

        Parameters
        ----------
        arr : Array
            The sequences that were planned, of any framework; may be mapped from a file.
        bins : int, slice, list of int, or mask of (n_bins,), optional
            Which bins; all unless said.

        Returns
        -------
        Array
            One row a piece, with fresh values, differentiable. Isolation of the sequences is in its offsets.

        Raises
        ------
        ValueError
            `arr` has too few rows, or one too short, for this plan.

        Examples
        --------
        >>> import numpy as np, scree
        >>> arr = scree.from_lengths(np.arange(6), [3, 1, 2])
        >>> plan = scree.data.plan_bins(arr.lengths, capacity=4)
        >>> [row.tolist() for row in plan.gather(arr, 0)]
        [[0, 1, 2], [3]]
        """
        expect_array("gather", arr)
        host, offsets = arr._host_offsets("gather"), self.bins.offsets
        if bins is None:
            chosen = np.arange(self.n_bins)
        elif isinstance(bins, slice):
            chosen = np.arange(self.n_bins)[bins]
        else:
            chosen = numbers([bins] if isinstance(bins, (int, np.integer)) else bins, self.n_bins)
        pieces = _offsets.gather_index(offsets[chosen], _offsets.from_lengths(np.diff(offsets)[chosen]))
        rows, starts, lengths = self.bins.values[pieces], self.starts[pieces], self.lengths[pieces]
        if len(rows) and rows.max() >= arr.batch_size:
            raise ValueError(
                f"gather: arr has {arr.batch_size} rows, but the plan has sequence {rows.max()}; needs the Array that was "
                "planned"
            )
        over = starts + lengths > np.diff(host)[rows]
        if over.any():
            raise ValueError(
                f"gather: row {rows[over.argmax()]} of arr is shorter than it was planned; needs the Array that was planned"
            )
        moved = _offsets.from_lengths(lengths)
        values = _taken(arr, host[rows] + starts, moved)
        return from_host_offsets(arr._xp, values, moved, arr.ragged_dim, like=arr.offsets)


def _taken(arr: Array, starts: HostInts, offsets: HostInts) -> Dense:
    """The values of pieces that begin at these tokens of an Array, end to end."""
    xp, axis = arr._xp, arr.ragged_dim
    host = xp.host_view(arr.values)
    if host is None or offsets[-1] < _RUN * (len(offsets) - 1):
        return _layout.take_tokens(xp, arr.values, _offsets.gather_index(starts, offsets), axis)
    front = np.moveaxis(host, axis, 0)
    ends = starts + np.diff(offsets)
    parts = [front[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    joined = np.moveaxis(np.concatenate([front[:0], *parts]), 0, axis)
    return xp.adopt(np.ascontiguousarray(joined), arr.values)


def plan_bins(
    lengths: Sequence[int] | Dense | Array,
    capacity: int,
    algo: Literal["bfd", "ffd", "wrapped", "split"] = "bfd",
    seed: int | None = None,
    *,
    too_long: Literal["error", "split", "drop"] | None = None,
    implementation: Literal["numpy", "numba"] | None = None,
) -> Plan:
    """Plan which sequences share a bin of `capacity` tokens.

    Parameters
    ----------
    lengths : list of int, array of (N,), integer, or Array
        The lengths of the sequences; of an Array, those of its rows. An empty sequence takes no room, and is planned.
    capacity : int
        The tokens that a bin holds.
    algo : str
        ``"bfd"``, best fit decreasing: the longest first, each into the bin that it fills best.
        ``"ffd"``, first fit decreasing: the longest first, each into the first bin that has room.
        ``"split"``: sequences above the capacity are cut into pieces of `capacity`, then best fit decreasing.
        ``"wrapped"``: all sequences end to end in their order, cut at every multiple of `capacity`: only the last bin
        has room left, and up to one sequence a bin is cut.
    seed : int, optional
        Draws the order of the bins and which of equal lengths goes where (``"wrapped"``: the order of the sequences).
        None keeps the order: bins as they were opened, sequences by number.
    too_long : str, optional
        What is done with a sequence above the capacity: ``"error"`` (as ``"bfd"`` and ``"ffd"`` do unless said),
        ``"split"`` (as the other two do) or ``"drop"``. What was cut or dropped is counted in the `Plan`.
    implementation : "numpy" or "numba", optional
        Both give the same bins; compiled, a plan of thousands takes a fraction of the time. Unless said, NumPy plans until
        this process has planned ten million sequences, and then numba does where it is installed, or at once where
        something asked for it before: one plan never waits for the compiler. That takes seconds once on a machine, and less
        than one in later processes, which find on disk what it left.

    Returns
    -------
    Plan
        The same for the same arguments, on every machine.

    Raises
    ------
    TypeError, ValueError
        An argument is not as described, or a sequence is too long.
    ImportError
        numba is asked for, and is missing.

    Notes
    -----
    O(N) for sorting by digits, and O(S log S) beyond it for S steps, each a run of sequences into one bin, or of one
    length into bins that are alike. Lengths on a device are copied to the host once.

    Examples
    --------
    >>> import scree
    >>> plan = scree.data.plan_bins([5, 3, 8, 2, 6], capacity=8)
    >>> plan
    Plan(bfd, capacity=8, n_bins=3, efficiency=1.0000)
    >>> [row.tolist() for row in plan]
    [[2], [4, 3], [0, 1]]
    """
    sizes = host_lengths("plan_bins", lengths)
    room = at_least_one("capacity", capacity)
    one_of("algo", algo, ALGORITHMS)
    if too_long is None:
        too_long = "split" if algo in ("split", "wrapped") else "error"
    one_of("too_long", too_long, TOO_LONG)
    if implementation is not None:
        one_of("implementation", implementation, IMPLEMENTATIONS)
    rows = None if seed is None else generator(seed).permutation(len(sizes))  # None: all, as they come
    dropped = np.zeros(0, np.int64)
    longest = int(sizes.max(initial=0))
    if longest * len(sizes) >= 1 << 63 and sum(sizes.tolist()) >= 1 << 63:
        raise ValueError(f"lengths: got lengths up to {longest}; needs such that sum to less than 2**63")
    if longest > room and too_long != "split":
        above = sizes > room
        if too_long == "error":
            i = int(above.argmax())
            raise ValueError(
                f"lengths[{i}]: got {sizes[i]}, above the capacity of {room}; {int(above.sum())} of {len(sizes)} are; "
                "too_long='split' cuts them, too_long='drop' leaves them out"
            )
        dropped, longest = np.flatnonzero(above), room
        rows = np.flatnonzero(~above) if rows is None else rows[~above[rows]]
    parts, starts = sizes if rows is None else sizes[rows], None  # None: each from its beginning
    if algo == "wrapped":
        rows, starts, parts, bins = _cut(rows, parts, room, joined=True)
        members, offsets = np.arange(len(rows)), _offsets.from_lengths(np.bincount(bins))
    else:
        if longest > room:
            rows, starts, parts, _ = _cut(rows, parts, room, joined=False)
        members, offsets = fit_decreasing(parts, min(longest, room), room, algo != "ffd", implementation)
    offsets = _offsets.narrow(offsets)
    if seed is not None:
        fill = np.diff(offsets)
        chosen = np.argsort(generator(seed + 1).permutation(len(fill)))
        begins, offsets = offsets[chosen], _offsets.from_lengths(fill[chosen])
        members = members[_offsets.gather_index(begins, offsets)]
    bins = from_host_offsets(load("numpy"), members if rows is None else rows[members], offsets, 0)
    starts = np.zeros(len(members), np.int64) if starts is None else starts[members]
    return Plan(bins, starts, parts[members], room, dropped, algo)


def _cut(
    rows: HostInts | None, lengths: HostInts, room: int, joined: bool
) -> tuple[HostInts, HostInts, HostInts, HostInts]:
    """Cut at the multiples of `room` of each sequence, or of all of them joined.

    Returns for each piece: its sequence, where it begins there, its length, and the multiple that it lies behind.
    """
    ends = np.cumsum(lengths) if joined else lengths
    begins = ends - lengths
    last = max(-(-int(ends[-1]) // room) - 1, 0) if joined and len(ends) else np.iinfo(np.int64).max
    first_bin = np.minimum(begins // room, last)
    counts = np.maximum((ends - 1) // room, first_bin) - first_bin + 1
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    bins = np.repeat(first_bin, counts) + places
    begin, end = np.repeat(begins, counts), np.repeat(ends, counts)
    start = np.maximum(begin, bins * room)
    return (
        np.repeat(np.arange(len(lengths)) if rows is None else rows, counts),
        start - begin,
        np.minimum(end, (bins + 1) * room) - start,
        bins,
    )


def host_lengths(op: str, lengths: Any) -> HostInts:
    """Lengths from a list, an array of any framework or an Array, checked, as int64 on the host."""
    if isinstance(lengths, Array):
        return np.diff(lengths._host_offsets(op)).astype(np.int64, copy=False)
    xp = None if isinstance(lengths, np.ndarray) else find_backend(lengths)
    if xp is not None:
        _check.integers(xp, lengths, "lengths")
        lengths = xp.to_host(lengths)
    elif isinstance(lengths, (str, bytes)) or not hasattr(lengths, "__len__"):
        raise TypeError(
            f"lengths: got {type(lengths).__name__}; needs a list of integers, an integer array or an Array"
        )
    sizes = _check.host_lengths(_check.host_ints(lengths, "lengths"), None)
    if sizes.dtype == np.uint64 and sizes.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"lengths[{int(sizes.argmax())}]: got {sizes.max()}; needs less than 2**63")
    return sizes.astype(np.int64, copy=False)


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a word that is not among those known."""
    if value not in known:
        raise ValueError(f"{name}: got {value!r}; needs one of {', '.join(map(repr, known))}")


def at_least_one(name: str, value: Any) -> int:
    """Return an integer argument of 1 or more."""
    number = _check.whole(value, name)
    if number < 1:
        raise ValueError(f"{name}: got {number}; needs 1 or more")
    return number


def generator(seed: Any) -> np.random.Generator:
    """The random numbers of a seed, the same on every machine."""
    number = _check.whole(seed, "seed")
    if number < 0:
        raise ValueError(f"seed: got {number}; needs 0 or more")
    return np.random.default_rng(number)
