"""Packing and padding on NumPy and PyTorch, beside what people write by hand and what other libraries offer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import awkward as ak
import numba
import numpy as np
import pyarrow as pa
import torch
from measure import interleaved
from torch.nn.utils.rnn import pad_sequence

import scree

PACKAGES = ("numpy", "torch", "awkward", "pyarrow", "numba", "scree")
SEQUENCES = (16, 1_000, 100_000)
FEATURES = (0, 64)  # 0: one-dimensional int64; 64: float32
COMPILED = ("numba rows", "pyarrow array")
MOST_BYTES = 4e9  # a padded batch beyond this is not made

Contenders = dict[str, Callable[[], Any]]


@numba.njit(parallel=True)
def _numba_pad(values: Any, offsets: Any, padded: Any) -> Any:
    for row in numba.prange(len(offsets) - 1):
        for t in range(offsets[row + 1] - offsets[row]):
            padded[row, t] = values[offsets[row] + t]


@numba.njit(parallel=True)
def _numba_unpad(padded: Any, offsets: Any, values: Any) -> Any:
    for row in numba.prange(len(offsets) - 1):
        for t in range(offsets[row + 1] - offsets[row]):
            values[offsets[row] + t] = padded[row, t]


class Work:
    """One batch: log-normal lengths of mean 64 and sigma 1, in every form that a contender starts from."""

    def __init__(self, sequences: int, features: int) -> None:
        rng = np.random.default_rng(0)
        self.lengths = np.maximum(1, rng.lognormal(np.log(64) - 0.5, 1.0, sequences).astype(np.int64))
        if features:
            self.rows = [rng.standard_normal((n, features), np.float32) for n in self.lengths]
        else:
            self.rows = [rng.integers(0, 30_000, n) for n in self.lengths]
        self.tensors = [torch.from_numpy(row) for row in self.rows]
        self.name = f"{sequences} x ~64" + (f" x {features} float32" if features else " int64")
        self.packed = scree.pack(self.rows)
        self.packed_torch = scree.pack(self.tensors)
        self.longest = int(self.lengths.max())
        self.padded_bytes = sequences * self.longest * self.rows[0].itemsize * max(features, 1)

    @property
    def fits(self) -> bool:
        return self.padded_bytes <= MOST_BYTES


def _offsets_of(lengths: Any) -> Any:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    offsets[1:] = np.cumsum(lengths)
    return offsets


def _torch_offsets_of(lengths: Any) -> Any:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    offsets[1:] = torch.cumsum(lengths, 0)
    return offsets


def pack_numpy(work: Work) -> Contenders:
    rows = work.rows
    contenders: Contenders = {
        "scree": lambda: scree.pack(rows),
        "concatenate, cumsum": lambda: (np.concatenate(rows), _offsets_of([len(row) for row in rows])),
        "awkward unflatten": lambda: ak.unflatten(np.concatenate(rows), [len(row) for row in rows]),
    }
    if rows[0].ndim == 1:
        contenders["pyarrow array"] = lambda: pa.array(rows)
    return contenders


def pack_torch(work: Work) -> Contenders:
    rows = work.tensors
    return {
        "scree": lambda: scree.pack(rows),
        "cat, cumsum": lambda: (torch.cat(rows), _torch_offsets_of(torch.tensor([len(row) for row in rows]))),
        "torch.nested": lambda: torch.nested.nested_tensor(rows, layout=torch.jagged),
    }


def unpack_numpy(work: Work) -> Contenders:
    values, offsets = work.packed.values, work.packed.offsets

    def slices() -> Any:
        cuts = offsets.tolist()
        return [values[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

    return {"scree": lambda: scree.unpack(work.packed), "slices": slices}


def unpack_torch(work: Work) -> Contenders:
    values, offsets = work.packed_torch.values, work.packed_torch.offsets
    nested = scree.bridges.to_torch_nested(work.packed_torch)
    return {
        "scree": lambda: scree.unpack(work.packed_torch),
        "split": lambda: values.split(offsets.diff().tolist()),
        "torch.nested": nested.unbind,
    }


def _numpy_pad(values: Any, offsets: Any, longest: int) -> Any:
    lengths = np.diff(offsets)
    mask = np.arange(longest) < lengths[:, None]
    padded = np.zeros((len(lengths), longest, *values.shape[1:]), values.dtype)
    padded[mask] = values
    return padded, mask


def _numpy_pad_rows(values: Any, offsets: Any, longest: int) -> Any:
    cuts = offsets.tolist()
    padded = np.zeros((len(cuts) - 1, longest, *values.shape[1:]), values.dtype)
    for row, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
        padded[row, : b - a] = values[a:b]
    return padded, np.arange(longest) < np.diff(offsets)[:, None]


def _numba_pad_and_mask(values: Any, offsets: Any, longest: int) -> Any:
    padded = np.zeros((len(offsets) - 1, longest, *values.shape[1:]), values.dtype)
    _numba_pad(values, offsets, padded)
    return padded, np.arange(longest) < np.diff(offsets)[:, None]


def _torch_pad(values: Any, offsets: Any, longest: int) -> Any:
    mask = torch.arange(longest) < offsets.diff()[:, None]
    padded = torch.zeros((len(mask), longest, *values.shape[1:]), dtype=values.dtype)
    padded[mask] = values
    return padded, mask


def to_padded_numpy(work: Work) -> Contenders:
    values, offsets, longest = work.packed.values, work.packed.offsets, work.longest
    listed = scree.bridges.to_awkward(work.packed)
    contenders: Contenders = {
        "scree": lambda: scree.to_padded(work.packed),
        "boolean mask": lambda: _numpy_pad(values, offsets, longest),
        "row loop": lambda: _numpy_pad_rows(values, offsets, longest),
        "numba rows": lambda: _numba_pad_and_mask(values, offsets, longest),
    }
    if values.ndim == 1:
        contenders["awkward pad_none"] = lambda: ak.to_numpy(ak.pad_none(listed, longest, clip=True))
    return contenders


def to_padded_torch(work: Work) -> Contenders:
    values, offsets, longest = work.packed_torch.values, work.packed_torch.offsets, work.longest
    nested = scree.bridges.to_torch_nested(work.packed_torch)

    def mask() -> Any:
        return torch.arange(longest) < offsets.diff()[:, None]

    contenders: Contenders = {
        "scree": lambda: scree.to_padded(work.packed_torch),
        "pad_sequence": lambda: (pad_sequence(work.tensors, batch_first=True), mask()),
        "boolean mask": lambda: _torch_pad(values, offsets, longest),
    }
    if values.is_floating_point():
        contenders["torch.nested"] = lambda: (nested.to_padded_tensor(0.0), mask())
    return contenders


def from_padded_numpy(work: Work) -> Contenders:
    padded, mask = scree.to_padded(work.packed)

    def compiled() -> Any:
        offsets = _offsets_of(mask.sum(1))
        values = np.empty((offsets[-1], *padded.shape[2:]), padded.dtype)
        _numba_unpad(padded, offsets, values)
        return values, offsets

    return {
        "scree": lambda: scree.from_padded(padded, mask),
        "boolean mask": lambda: (padded[mask], _offsets_of(mask.sum(1))),
        "numba rows": compiled,
    }


def from_padded_torch(work: Work) -> Contenders:
    padded, mask = scree.to_padded(work.packed_torch)
    return {
        "scree": lambda: scree.from_padded(padded, mask),
        "boolean mask": lambda: (padded[mask], _torch_offsets_of(mask.sum(1))),
    }


def hf_round_trip_numpy(work: Work) -> Contenders:
    values, offsets, longest = work.packed.values, work.packed.offsets, work.longest

    def ours() -> Any:
        return scree.bridges.from_hf_padded(*scree.bridges.to_hf_padded(work.packed))

    def by_hand() -> Any:
        padded, mask = _numpy_pad(values, offsets, longest)
        attention_mask = mask.astype(np.int64)
        mask = attention_mask.astype(bool)
        return padded[mask], _offsets_of(mask.sum(1))

    return {"scree": ours, "boolean mask": by_hand}


def hf_round_trip_torch(work: Work) -> Contenders:
    values, offsets, longest = work.packed_torch.values, work.packed_torch.offsets, work.longest

    def ours() -> Any:
        return scree.bridges.from_hf_padded(*scree.bridges.to_hf_padded(work.packed_torch))

    def by_hand() -> Any:
        padded, mask = _torch_pad(values, offsets, longest)
        mask = mask.long().bool()
        return padded[mask], _torch_offsets_of(mask.sum(1))

    return {"scree": ours, "boolean mask": by_hand}


PACKED = (pack_numpy, pack_torch, unpack_numpy, unpack_torch)
PADDED = (
    to_padded_numpy,
    to_padded_torch,
    from_padded_numpy,
    from_padded_torch,
    hf_round_trip_numpy,
    hf_round_trip_torch,
)


def _parts(result: Any) -> list[np.ndarray]:
    """What a contender made, as NumPy arrays that can be compared."""
    if isinstance(result, scree.Array):
        return [np.asarray(result.values), np.asarray(result.offsets)]
    if isinstance(result, (list, tuple)):
        return [np.asarray(part) for part in result]
    if isinstance(result, torch.Tensor) and result.is_nested:
        return [np.asarray(result.values()), np.asarray(result.offsets())]
    if isinstance(result, (ak.Array, pa.Array)):
        made = scree.bridges.from_awkward(result) if isinstance(result, ak.Array) else scree.bridges.from_arrow(result)
        return _parts(made)
    return [np.ma.filled(result, 0)]


def check(contenders: Contenders) -> None:
    """Refuse to time a contender that makes something else than ours."""
    want = _parts(contenders["scree"]())
    for name, run in contenders.items():
        for a, b in zip(want, _parts(run()), strict=False):
            np.testing.assert_array_equal(a, b, err_msg=name)


def _copy_floor(contenders: Contenders) -> float:
    """The milliseconds to copy as many bytes as the result holds, in memory that is warm: no result is made faster."""
    size = sum(part.nbytes for part in _parts(contenders["scree"]()))
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return interleaved({"copy": lambda: np.copyto(target, source)}, seconds=0.2)["copy"]["ms"]


def rows(sequences: tuple[int, ...] = SEQUENCES, seconds: float = 4.0) -> Iterator[dict[str, Any]]:
    """Time every contender of every op and workload; a dictionary each."""
    for n in sequences:
        for features in FEATURES:
            work = Work(n, features)
            for make in (*PACKED, *(PADDED if work.fits else ())):
                contenders = make(work)
                check(contenders)
                op, _, framework = make.__name__.rpartition("_")
                row = {"op": op, "framework": framework, "work": work.name}
                views = op == "unpack"  # makes no memory
                yield {**row, "impl": "copy floor", "ms": 0.0 if views else _copy_floor(contenders)}
                for name, times in interleaved(contenders, seconds).items():
                    yield {**row, "impl": name, "compiled": name in COMPILED, **times}
            if not work.fits:
                size = work.padded_bytes / 1e9
                yield {"op": "to_padded", "framework": "", "work": work.name, "left_out": f"{size:.0f} GB once padded"}
