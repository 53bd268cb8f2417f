"""From features, as a dataset has them, to one packed batch for a model of transformers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from .. import _check, _offsets
from .._array import Array
from .._backends import find_backend
from .._backends._protocol import HostArray, HostInts
from ..bridges._handover import library

_OP = "scree.hf.collator"
_IGNORED = -100  # the label that transformers' losses leave out


def collator(
    *,
    return_tensors: Literal["pt", "np"] = "pt",
    return_position_ids: bool = True,
    separator_id: int = -100,
    return_flash_attn_kwargs: bool = True,
    return_seq_idx: bool = False,
    position_ids_start: int = 0,
    fields: Sequence[str] = (),
    keep_empty: bool = False,
    pad_to_multiple_of: int | None = None,
    total_length: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    pad_token_id: int = 0,
) -> Collator:
    """Make a `data_collator` that joins sequences end to end instead of padding them.

    It does what transformers' `DataCollatorWithFlattening` does, key for key and dtype for dtype for the options that
    both have, and more: fixed shapes, further inputs, and errors where that one would go on with something wrong.

    Parameters
    ----------
    return_tensors : "pt" or "np"
    return_position_ids : bool
        Give `position_ids`, which begin at `position_ids_start` in every sequence.
    separator_id : int
        The label of the first token of every sequence, which no token before it may learn to predict.
    return_flash_attn_kwargs : bool
        Give `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`. transformers' collator leaves them out
        unless asked; without them every layer has to find the sequences by itself, and not every one does.
    return_seq_idx : bool
        Give `seq_idx`, which state-space and convolution layers read.
    position_ids_start : int
        The position of the first token: ``padding_idx + 1`` for RoBERTa and its relatives, 0 for all others.
    fields : list of str
        Further fields with one integer a token that are joined likewise: ``["token_type_ids"]``.
    keep_empty : bool
        Keep empty sequences as empty rows, so that row i of the batch is feature i. Otherwise they are left out.
    pad_to_multiple_of : int, optional
        Append spare tokens up to the next multiple.
    total_length, batch_size : int, optional
        Append spare tokens up to `total_length`, and empty rows up to `batch_size`: one shape for every batch, as
        `torch.compile` and CUDA graphs want it.
    max_length : int, optional
        The longest sequence that may come: what `max_length_q` and `max_length_k` then say of every batch. Where
        `total_length` is given and this is not, they say `total_length`; otherwise the longest of the batch.
    pad_token_id : int
        What spare tokens are.

    Returns
    -------
    Collator
        ``collate(features, return_tensors=None, separator_id=None)``. `features` is a list with one mapping a sequence
        (`input_ids`, and `labels` if there are any: lists, or arrays of any framework), or with one row of token ids a
        sequence; or a `scree.Array` of token ids; or a mapping whose fields are Arrays. It gives a dict of

        - `input_ids`, `labels`, `position_ids` and `fields`: (1, T), int64; `seq_idx`: (1, T), int32;
        - `cu_seq_lens_q`, `cu_seq_lens_k`: (B + 1,), int32, one array for both; `max_length_q`, `max_length_k`: int.

        Spare tokens lie beyond the last of `cu_seq_lens_q`: they belong to no sequence, nobody attends to them, and
        their label is -100.

    Raises
    ------
    TypeError, ValueError
        When it is made: an option that is none. When it is called: `input_ids` are missing, `labels` have another length,
        there is no token at all, the batch is above its capacity, an `attention_mask` marks padding, a field that the
        model would need is not in `fields`. The message names the feature.

    Notes
    -----
    ``attn_implementation="scree"`` writes 0 for spare tokens. FlashAttention's own kernels leave there what the memory
    held, so give those no spare tokens.

    Examples
    --------
    >>> import scree
    >>> collate = scree.hf.collator(return_tensors="np")
    >>> batch = collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}])
    >>> batch["input_ids"], batch["labels"]
    (array([[5, 6, 7, 8, 9]]), array([[-100,    6,    7, -100,    9]]))
    >>> batch["position_ids"], batch["cu_seq_lens_q"], batch["max_length_q"]
    (array([[0, 1, 2, 0, 1]]), array([0, 3, 5], dtype=int32), 3)
    """
    _tensors(return_tensors)
    if isinstance(fields, str):
        raise TypeError(f"fields: got {fields!r}; needs a list of names")
    for name, value, least in (
        ("separator_id", separator_id, None),
        ("position_ids_start", position_ids_start, 0),
        ("pad_to_multiple_of", pad_to_multiple_of, 1),
        ("total_length", total_length, 0),
        ("batch_size", batch_size, 0),
        ("max_length", max_length, 0),
        ("pad_token_id", pad_token_id, 0),
    ):
        if value is not None and _check.whole(value, name) < (value if least is None else least):
            raise ValueError(f"{name}: got {value}; needs {least} or more")
    if pad_to_multiple_of is not None and total_length is not None:
        raise ValueError("pad_to_multiple_of: total_length already says how long every batch is; give one of the two")
    return Collator(
        return_tensors,
        return_position_ids,
        separator_id,
        return_flash_attn_kwargs,
        return_seq_idx,
        position_ids_start,
        tuple(fields),
        keep_empty,
        pad_to_multiple_of,
        total_length,
        batch_size,
        max_length,
        pad_token_id,
    )


@dataclass(frozen=True)
class Collator:
    """What `scree.hf.collator` makes; its options are fields, and it can be pickled for the workers of a DataLoader."""

    return_tensors: str
    return_position_ids: bool
    separator_id: int
    return_flash_attn_kwargs: bool
    return_seq_idx: bool
    position_ids_start: int
    fields: tuple[str, ...]
    keep_empty: bool
    pad_to_multiple_of: int | None
    total_length: int | None
    batch_size: int | None
    max_length: int | None
    pad_token_id: int

    def __call__(
        self, features: Any, return_tensors: str | None = None, separator_id: int | None = None
    ) -> dict[str, Any]:
        """Join the features of one batch; see `scree.hf.collator`."""
        tensors = _tensors(self.return_tensors if return_tensors is None else return_tensors)
        columns = _columns(features, self.fields)
        ids, lengths = _joined("input_ids", columns.pop("input_ids"))
        for name, take_out in _DROPPED.items():
            if name in columns and name not in self.fields:
                take_out(columns, lengths)
        joined = {name: _beside(name, column, lengths) for name, column in columns.items()}
        longest = self._longest(lengths)
        if not self.keep_empty:
            lengths = lengths[lengths > 0]
            if not lengths.size:
                raise ValueError(f"{_OP}: every sequence of the batch is empty; needs at least one token")
        offsets = _offsets.from_lengths(lengths)
        total, rows = self._capacity(lengths)
        labels = joined.pop("labels", None)
        labels = ids.copy() if labels is None else labels
        labels[offsets[:-1][lengths > 0]] = self.separator_id if separator_id is None else separator_id

        per_token: dict[str, HostArray] = {
            "input_ids": _extended(ids, total, self.pad_token_id),
            "labels": _extended(labels, total, _IGNORED),
        }
        if self.return_position_ids:
            positions = np.arange(self.position_ids_start, self.position_ids_start + len(ids), dtype=np.int64)
            positions -= np.repeat(offsets[:-1], lengths)
            per_token["position_ids"] = _extended(positions, total, self.position_ids_start)
        if self.return_seq_idx:
            numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            per_token["seq_idx"] = _extended(numbers, total, rows)
        per_token |= {name: _extended(values, total, 0) for name, values in joined.items()}

        batch: dict[str, Any] = {name: tensors(values[None]) for name, values in per_token.items()}
        if self.return_flash_attn_kwargs:
            offsets = _extended(offsets.astype(np.int32, copy=False), rows + 1, int(offsets[-1]))
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = tensors(offsets)
            batch["max_length_q"] = batch["max_length_k"] = longest
        return batch

    def _capacity(self, lengths: HostInts) -> tuple[int, int]:
        """The tokens and the rows of the batch, spare ones included."""
        used, rows = int(lengths.sum()), len(lengths)
        total = used if self.total_length is None else self.total_length
        if self.pad_to_multiple_of is not None:
            total = -(-used // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if used > total:
            raise ValueError(f"{_OP}: the batch has {used} tokens; total_length is {total}")
        if self.batch_size is not None and rows > self.batch_size:
            raise ValueError(f"{_OP}: the batch has {rows} sequences; batch_size is {self.batch_size}")
        if total >= 2**31:
            raise ValueError(f"{_OP}: the batch has {total} tokens; cu_seq_lens are int32, which ends at {2**31 - 1}")
        return total, rows if self.batch_size is None else self.batch_size

    def _longest(self, lengths: HostInts) -> int:
        longest = int(lengths.max(initial=0))
        if self.max_length is None:
            return longest if self.total_length is None else self.total_length
        if longest > self.max_length:
            i = int(lengths.argmax())
            raise ValueError(f"{_OP}: features[{i}] has {longest} tokens; max_length is {self.max_length}")
        return self.max_length


def _tensors(kind: str) -> Any:
    """The function that makes a host array what the caller wants."""
    if kind == "pt":
        return library(_OP, "torch", "hf").from_numpy
    if kind == "np":
        return np.asarray
    raise ValueError(f"return_tensors: got {kind!r}; needs 'pt' or 'np'")


Column = list[Any] | Array  # one row a sequence

_REFUSED = {
    "seq_lengths": "each row is several sequences; split them, or they would see each other",
    "packed": "each row is several sequences; split them, or they would see each other",
}


def _columns(features: Any, fields: tuple[str, ...]) -> dict[str, Column]:
    """What is joined or looked at: the columns by their names, `input_ids` first."""
    if isinstance(features, Array):
        features = {"input_ids": features}
    elif not isinstance(features, Mapping):
        features = _features(features)
    batch = [features] if isinstance(features, Mapping) else features
    for name, why in _REFUSED.items():
        if name in batch[0]:
            raise ValueError(f"{_OP}: the features have {name!r}: {why}")
    optional = [name for name in ("labels", "attention_mask", "token_type_ids") if any(name in one for one in batch)]
    columns: dict[str, Column] = {}
    for name in dict.fromkeys(("input_ids", *optional, *fields)):
        for i, one in enumerate(batch):
            if name not in one:
                raise ValueError(
                    f"{_OP}: features[{i}] has no {name!r}; it has {', '.join(map(repr, one)) or 'nothing'}"
                )
        columns[name] = batch[0][name] if batch is not features else [one[name] for one in batch]
        if batch is not features and not isinstance(columns[name], Array):
            raise TypeError(
                f"{_OP}: got one mapping whose {name!r} is {type(columns[name]).__name__}; needs a list of them, or Arrays"
            )
    return columns


def _features(features: Any) -> list[Mapping[str, Any]]:
    if isinstance(features, (str, bytes)) or not isinstance(features, Iterable) or find_backend(features) is not None:
        raise TypeError(f"{_OP}: got {type(features).__name__}; needs a list of features, or a scree.Array")
    listed = list(features)
    if not listed:
        raise ValueError(f"{_OP}: got no features; needs at least one")
    if not isinstance(listed[0], Mapping):
        return [{"input_ids": row} for row in listed]
    for i, one in enumerate(listed):
        if not isinstance(one, Mapping):
            raise TypeError(f"{_OP}: features[{i}] is {type(one).__name__}; features[0] is a mapping")
    return listed


def _joined(name: str, column: Column) -> tuple[HostInts, HostInts]:
    """All values of a column, int64 and fresh memory, and the lengths of its rows."""
    if isinstance(column, Array):
        if column.values.ndim != 1:
            raise ValueError(f"{_OP}: {name!r} has values of shape {tuple(column.values.shape)}; needs one axis")
        host = column._host_offsets(_OP)
        values = _row(name, None, column.values)[: int(host[-1])]
        return values.astype(np.int64), np.diff(host).astype(np.int64)
    if all(type(row) is list for row in column):
        lengths = np.fromiter(map(len, column), np.int64, len(column))
        values = np.empty(int(lengths.sum()), np.int64)
        try:
            struct.pack_into(f"{len(values)}q", values.data, 0, *chain.from_iterable(column))
        except struct.error:
            pass  # something else than integers, which the next lines name
        else:
            return values, lengths
    rows = [row if type(row) is np.ndarray else _row(name, i, row) for i, row in enumerate(column)]
    for i, row in enumerate(rows):
        if row.ndim != 1:
            hint = "; take row 0" if row.ndim == 2 and row.shape[0] == 1 else ""
            raise ValueError(f"{_OP}: {_place(name, i)} has shape {row.shape}; needs one axis{hint}")
        if row.dtype.kind not in "iu" or row.dtype == np.uint64:
            raise TypeError(f"{_OP}: {_place(name, i)} is {row.dtype.name}; needs integers that fit into int64")
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.concatenate(rows, dtype=np.int64, casting="same_kind"), lengths


def _row(name: str, i: int | None, row: Any) -> HostArray:
    """One row on the host."""
    xp = find_backend(row)
    if xp is not None:
        if not _check.is_integer(xp.dtype_name(row)) or xp.dtype_name(row) == "uint64":
            raise TypeError(f"{_OP}: {_place(name, i)} is {xp.dtype_name(row)}; needs integers that fit into int64")
        return xp.to_host(row)
    if not isinstance(row, (list, tuple)):
        got = "None" if row is None else type(row).__name__
        raise TypeError(f"{_OP}: {_place(name, i)} is {got}; needs a list or an array, one integer a token")
    try:
        made = np.asarray(row if row else np.zeros(0, np.int64))
    except ValueError:
        made = np.zeros(0, object)
    if made.dtype.kind == "O":
        odd = next((x for x in row if not isinstance(x, (int, np.integer))), row)
        raise TypeError(f"{_OP}: {_place(name, i)} has {odd!r} among its numbers; needs integers of 64 bits")
    return made


def _place(name: str, i: int | None) -> str:
    return f"{name!r}" if i is None else f"features[{i}][{name!r}]"


def _beside(name: str, column: Column, lengths: HostInts) -> HostInts:
    """All values of a column that has one a token."""
    values, got = _joined(name, column)
    if len(got) != len(lengths):
        raise ValueError(f"{_OP}: {name!r} has {len(got)} sequences, 'input_ids' has {len(lengths)}")
    if (got != lengths).any():
        i = int((got != lengths).argmax())
        raise ValueError(f"{_OP}: {_place(name, i)} has {got[i]} values; features[{i}]['input_ids'] has {lengths[i]}")
    return values


def _expect_unpadded(columns: dict[str, Column], lengths: HostInts) -> None:
    """Take `attention_mask` out of the columns, after looking whether it is 1 at every token."""
    column = columns.pop("attention_mask")
    if all(type(row) is list and row.count(1) == n for row, n in zip(column, lengths.tolist(), strict=False)):
        return
    values = _beside("attention_mask", column, lengths)
    if not (values == 1).all():
        raise ValueError(
            f"{_OP}: {_place('attention_mask', _row_of(values != 1, lengths))} is not 1 everywhere: the feature is padded; "
            "tokenize without padding, or keep what the mask keeps"
        )


def _expect_one_type(columns: dict[str, Column], lengths: HostInts) -> None:
    """Take `token_type_ids` out of the columns, after looking whether the model would make the same ones by itself."""
    values = _beside("token_type_ids", columns.pop("token_type_ids"), lengths)
    if values.any():
        raise ValueError(
            f"{_OP}: {_place('token_type_ids', _row_of(values != 0, lengths))} is not 0 everywhere; "
            "fields=['token_type_ids'] hands them on to the model"
        )


def _row_of(found: HostArray, lengths: HostInts) -> int:
    """The row of the first true value."""
    return int(np.searchsorted(np.cumsum(lengths), found.argmax(), side="right"))


_DROPPED = {"attention_mask": _expect_unpadded, "token_type_ids": _expect_one_type}


def _extended(values: HostArray, size: int, fill: int) -> HostArray:
    """The values, then `fill` up to `size` of them."""
    if len(values) == size:
        return values
    extended = np.full(size, fill, values.dtype)
    extended[: len(values)] = values
    return extended
