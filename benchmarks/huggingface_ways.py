"""The ways to run the same sequences through a model of transformers: what each batch holds, and what attends.

Every way gets batches of at most as many places as the others, padding included. They are collated beforehand, as workers
of a DataLoader do; what a way makes of them on the device, it makes anew every time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DataCollatorWithFlattening
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import is_flash_attn_2_available

import scree

FA2 = "fa2_torch_varlen"
IGNORED = -100

Rows = Sequence[Sequence[int]]
Batch = dict[str, Any]


def moved(batch: Batch, model: Any, device: str) -> Batch:
    """The tensors of a batch on the device, each by itself, as transformers' Trainer moves them."""
    return {name: x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


class Way(NamedTuple):
    """How sequences become batches, and what attends.

    Attributes
    ----------
    implementation : str
        `attn_implementation`.
    collate : function
        From token ids, and whether labels are wanted, to a batch on the host.
    packed : bool
    in_order : bool
        False: sorted by length first.
    place : function
        From that batch, the model and a device to the keywords of its forward, in memory of their own.
    """

    implementation: str
    collate: Callable[[Rows, bool], Batch]
    packed: bool
    in_order: bool = True
    place: Callable[[Batch, Any, str], Batch] = moved

    def batches(self, lengths: Sequence[int], places: int) -> Iterator[list[int]]:
        """Which sequences are batched together: as many, one after the other, as fill at most `places`."""
        order = range(len(lengths)) if self.in_order else sorted(range(len(lengths)), key=lengths.__getitem__)
        batch: list[int] = []
        for i in order:
            members = [lengths[j] for j in (*batch, i)]
            if batch and (sum(members) if self.packed else max(members) * len(members)) > places:
                yield batch
                batch = []
            batch.append(i)
        yield batch


def ways(device: str) -> dict[str, Way]:
    """Every way that can run here, ours first."""
    scree.hf.register()
    found = {
        "scree packed, collator": Way("scree", _collated, packed=True),
        "scree packed, model_kwargs": Way("scree", _arrays, packed=True, place=_by_model_kwargs),
        "scree on padded batches": Way("scree", _padded, packed=False),
        "padded sdpa": Way("sdpa", _padded, packed=False),
        "padded eager": Way("eager", _padded, packed=False),
        "padded sdpa, sorted": Way("sdpa", _padded, packed=False, in_order=False),
        "packed sdpa, position_ids": Way("sdpa", _flattened, packed=True),
    }
    if device != "cuda":
        return found
    if is_flash_attn_2_available():
        found["packed flash_attention_2"] = Way("flash_attention_2", _flattened_with_lengths, packed=True)
        found["padded flash_attention_2"] = Way("flash_attention_2", _padded, packed=False)
    AttentionInterface.register(FA2, torch_varlen)
    AttentionMaskInterface.register(FA2, flash_attention_mask)
    found["packed FlashAttention-2 (torch varlen_attn)"] = Way(FA2, _flattened_with_lengths, packed=True)
    return found


def torch_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' flash path does with a packed batch, by the FlashAttention-2 that PyTorch carries."""
    from torch.nn.attention.varlen import varlen_attn

    tokens = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (T, H, D)
    known = inspect.signature(varlen_attn).parameters
    options: Batch = {"scale": scaling} if "scale" in known else {}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    if "window_size" in known:
        options["window_size"] = (-1, 0 if module.is_causal else -1)
    else:
        options["is_causal"] = bool(module.is_causal)
    out = varlen_attn(*tokens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options)
    return out[None], None


def _collated(rows: Rows, training: bool) -> Batch:
    return _labelled(scree.hf.collator()([{"input_ids": row} for row in rows]), training)


def _arrays(rows: Rows, training: bool) -> Batch:
    return {"arr": scree.pack([torch.tensor(row) for row in rows]), "training": training}


def _by_model_kwargs(batch: Batch, model: Any, device: str) -> Batch:
    host = batch["arr"]
    arr = scree.from_lengths(host.values.clone(), host.lengths).to(device)
    return scree.hf.model_kwargs(arr, model=model, labels=arr if batch["training"] else None)


def _padded(rows: Rows, training: bool) -> Batch:
    tensors = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in tensors]
    batch = {
        "input_ids": pad_sequence(tensors, batch_first=True),
        "attention_mask": pad_sequence(ones, batch_first=True),
    }
    if training:
        batch["labels"] = pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
    return batch


def _flattened(rows: Rows, training: bool) -> Batch:
    return _labelled(DataCollatorWithFlattening()([{"input_ids": row} for row in rows]), training)


def _flattened_with_lengths(rows: Rows, training: bool) -> Batch:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return _labelled(collate([{"input_ids": row} for row in rows]), training)


def _labelled(batch: Any, training: bool) -> Batch:
    """Both collators make labels of the tokens where there are none."""
    return {name: value for name, value in batch.items() if training or name != "labels"}
