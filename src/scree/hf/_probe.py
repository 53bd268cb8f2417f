"""A batch whose sequences can be changed one by one, and the outputs of a model by sequence.

Every place of the batch, (1, T) packed or (B, N) padded, has an owner: the number of its sequence, or `NOBODY` for
padding and for what lies beyond the last packed sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .._array import Array
from .._backends import Dense, find_backend
from ._model_kwargs import in_torch, model_kwargs, positions_start
from ._outputs import per_token

OP = "assert_isolated"
NOBODY = -1
# Ids of these kinds stand for something else than a word: changing them changes what the batch is made of.
_PLACEHOLDERS = ("pad", "image", "video", "audio", "vision")
_CHUNK = 1 << 22  # values that are compared at a time
LEAST = (
    1e-30  # what two zeros of different sign count as: bits that differ, and no change that anything could be told by
)


class Probe:
    """A model with one batch.

    Attributes
    ----------
    kwargs : dict
        What the model is called with.
    owners : tensor of (1, T) or (B, N), int64
    packed : bool
    sequences : list of int
        The sequences that have a token.
    passes : int
        How often the model was run.
    """

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.passes = model, 0
        if isinstance(batch, Array):
            self.kwargs = _from_array(model, batch)
        elif isinstance(batch, Mapping):
            self.kwargs = {name: value for name, value in batch.items() if name != "labels"}
        else:
            raise TypeError(
                f"{OP}: batch is {type(batch).__name__}; needs a scree.Array, or the keywords of a model's forward"
            )
        names = [name for name in ("input_ids", "inputs_embeds") if self.kwargs.get(name) is not None]
        if len(names) != 1:
            raise ValueError(f"{OP}: batch needs one of input_ids and inputs_embeds; it has {', '.join(self.kwargs)}")
        self.name = names[0]
        self.inputs = self.kwargs[self.name]
        found = find_backend(self.inputs)
        wanted = 2 if self.name == "input_ids" else 3
        if found is None or found.NAME != "torch" or self.inputs.ndim != wanted:
            shape = tuple(getattr(self.inputs, "shape", ()))
            raise ValueError(
                f"{OP}: {self.name} needs a tensor of {wanted} axes; got {type(self.inputs).__name__} {shape}"
            )
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{OP}: {type(model).__name__} is an encoder and a decoder; test each of them by itself")
        self.packed = self.inputs.shape[0] == 1
        self.owners = self._packed_owners() if self.packed else self._padded_owners()
        self.n = int(self.owners.max()) + 1 if self.owners.numel() else 0
        spare, *self.counts = _counts(self.owners + 1, self.n + 1)
        self.sequences = [i for i, count in enumerate(self.counts) if count]
        self.has_spare = spare > 0
        if len(self.sequences) < 2:
            raise ValueError(
                f"{OP}: batch has {len(self.sequences)} sequence with tokens; needs two, so that one can leak into the other"
            )
        if not self.packed and self.name == "input_ids" and self.kwargs.get("position_ids") is None:
            self._fix_positions()
        self.others = self._other_inputs()

    def _fix_positions(self) -> None:
        """Give the positions that a model would work out from its padding ids, which are about to be changed."""
        start = positions_start(self.model)
        if start:
            used = self.inputs != start - 1
            self.kwargs["position_ids"] = used.cumsum(1) * used + start - 1

    # Who owns which place.

    def _packed_owners(self) -> Dense:
        import torch

        total = self.inputs.shape[1]
        places = torch.arange(total, device=self.inputs.device)
        offsets = self.kwargs.get("cu_seq_lens_q")
        if offsets is not None:
            owners = torch.searchsorted(offsets[1:].to(places), places, right=True)
            return torch.where(owners == len(offsets) - 1, NOBODY, owners)[None]
        for name, step in (("seq_idx", 0), ("position_ids", 1)):
            marks = self.kwargs.get(name)
            if marks is not None and tuple(marks.shape) == (1, total):
                return torch.cat([torch.zeros_like(marks[:, :1]), (marks.diff() != step).cumsum(1)], 1).to(torch.int64)
        raise ValueError(
            f"{OP}: batch is one row, and nothing says where its sequences end; give cu_seq_lens_q or position_ids, or an Array"
        )

    def _padded_owners(self) -> Dense:
        import torch

        batch_size, n = self.inputs.shape[:2]
        rows = torch.arange(batch_size, device=self.inputs.device)[:, None].expand(batch_size, n)
        mask = self.kwargs.get("attention_mask")
        if mask is not None and tuple(mask.shape) != (batch_size, n):
            raise ValueError(f"{OP}: attention_mask has shape {tuple(mask.shape)}; needs {(batch_size, n)}")
        owners = rows if mask is None else torch.where(mask.to(torch.bool), rows, NOBODY)
        positions = self.kwargs.get("position_ids")
        if positions is not None and tuple(positions.shape) == (batch_size, n):
            begins = (positions.diff() < 0) & (owners[:, 1:] != NOBODY) & (owners[:, :-1] != NOBODY)
            if bool(begins.any()):
                row = int(begins.any(1).nonzero()[0])
                raise ValueError(
                    f"{OP}: position_ids begin anew within row {row} of {batch_size}: rows of several sequences each cannot "
                    "be told apart; test them as one packed row"
                )
        return owners

    # Changing them.

    def _other_inputs(self) -> Dense:
        """What takes the place of every input: another embedding, or another id."""
        import torch

        if self.name == "inputs_embeds":
            random = torch.Generator().manual_seed(0)
            noise = torch.randn(self.inputs.shape, generator=random).to(self.inputs)
            spread = self.inputs.detach().float().std().item()
            return (self.inputs + (noise * spread if spread > 0 else noise)).detach()
        special = self._special_ids()
        size = self._vocabulary()
        ids = torch.arange(size)
        usable = torch.tensor([i for i in range(size) if i not in special])
        if len(usable) < 2:
            raise ValueError(f"{OP}: a vocabulary of {size} ids leaves no two to take each other's place")
        ids = torch.full_like(ids, int(usable[0])).scatter(0, usable, usable.roll(-(len(usable) // 2)))
        others = ids.to(self.inputs.device)[self.inputs.long()]
        keep = torch.zeros_like(others, dtype=torch.bool)
        for i in (i for i, name in special.items() if any(word in name for word in _PLACEHOLDERS)):
            keep |= self.inputs == i
        keep &= self.owners != NOBODY
        kept = _counts(self.owners[keep], self.n)
        for i in self.sequences:
            if kept[i] == self.counts[i]:  # a sequence of nothing else
                keep &= self.owners != i
        return torch.where(keep, self.inputs.long(), others).to(self.inputs.dtype)

    def _special_ids(self) -> dict[int, str]:
        config: Any = getattr(self.model, "config", None)
        named = config.to_dict() if hasattr(config, "to_dict") else {}
        return {
            i: name
            for name, value in named.items()
            if name.endswith(("_token_id", "_token_index"))
            for i in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(i, int)
        }

    def _vocabulary(self) -> int:
        embedding = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        size = getattr(embedding, "num_embeddings", None) or getattr(
            getattr(self.model, "config", None), "vocab_size", None
        )
        return size or int(self.inputs.max()) + 1

    def changed(self, sources: Collection[int], first_only: bool = False) -> Dense:
        """The inputs with those of `sources` changed (`first_only`: of each, the first token that can be)."""
        import torch

        chosen = torch.isin(self.owners, torch.tensor(sorted(sources), device=self.owners.device))
        if self.name == "input_ids":
            chosen &= self.others != self.inputs
        if first_only:
            for i in sources:
                mine = (chosen & (self.owners == i)).flatten().nonzero()[1:, 0]
                chosen.view(-1)[mine] = False
        wide = chosen if self.name == "input_ids" else chosen[..., None]
        return torch.where(wide, self.others, self.inputs)

    # Running the model.

    def run(self, inputs: Dense | None = None) -> dict[str, Dense]:
        """The outputs that have a value for each place, or (padded only) for each sequence."""
        self.passes += 1
        outputs = self.model(**{**self.kwargs, self.name: self.inputs if inputs is None else inputs})
        shape = tuple(self.owners.shape)
        kept = {
            name: value
            for name, value in _named(outputs)
            if value.is_floating_point()
            and (
                per_token(name, value, shape)
                or (name == "output" and tuple(value.shape[:2]) == shape)
                or (not self.packed and value.ndim == 2 and value.shape[0] == shape[0])
            )
        }
        if not kept:
            raise ValueError(
                f"{OP}: no output of {type(self.model).__name__} has a value for each of {shape} tokens; "
                "test the model without its head (model.base_model)"
            )
        return kept

    def by_token(self, name: str, value: Dense) -> bool:
        """Whether an output that `run` gave has values for each place, rather than for each sequence."""
        shape = tuple(self.owners.shape)
        return per_token(name, value, shape) or (name == "output" and tuple(value.shape[:2]) == shape)

    def differences(self, before: dict[str, Dense], after: dict[str, Dense], tokens_only: bool = False) -> list[float]:
        """By how much the outputs of each sequence differ: 0.0 where every bit is the same, and never 0.0 otherwise."""
        import torch

        most = torch.zeros(self.n + 1, dtype=wide(self.owners), device=self.owners.device)
        for name, value in before.items():
            by_token = self.by_token(name, value)
            if tokens_only and not by_token:
                continue
            owners = self.owners if by_token else torch.arange(self.n, device=most.device)
            owners = torch.where(owners == NOBODY, self.n, owners).flatten()
            left, right = (x.detach().reshape(len(owners), -1) for x in (value, after[name]))
            step = max(1, _CHUNK // max(1, left.shape[1]))
            for start in range(0, len(owners), step):
                part = slice(start, start + step)
                apart = distance(left[part], right[part]).amax(1).to(most)
                most.scatter_reduce_(0, owners[part], apart, "amax")
        return most[: self.n].tolist()

    def not_a_number(self, outputs: dict[str, Dense]) -> list[int]:
        """The sequences with NaN among their outputs."""
        import torch

        found: set[int] = set()
        for name, value in outputs.items():
            bad = value.isnan().flatten(2 if self.by_token(name, value) else 1).any(-1)
            owners = self.owners if self.by_token(name, value) else torch.arange(self.n, device=bad.device)
            found |= set(owners[bad].tolist())
        return sorted(found - {NOBODY})


def distance(a: Dense, b: Dense) -> Dense:
    """|a - b|, in `wide`: 0 where the bits agree, infinite where one is no number, and never 0 where the bits differ."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(bits) == b.contiguous().view(bits)
    apart = (a.to(wide(a)) - b.to(wide(a))).abs().nan_to_num(nan=float("inf"))
    return torch.where(same, 0.0, apart.clamp(min=LEAST))


def wide(x: Dense) -> Any:
    """The widest floating dtype on the device of x."""
    import torch

    return torch.float32 if x.device.type == "mps" else torch.float64


def _counts(owners: Dense, n: int) -> list[int]:
    import torch

    return torch.bincount(owners.flatten(), minlength=n).tolist()


def _named(outputs: Any) -> Iterator[tuple[str, Dense]]:
    """The tensors among a model's outputs, with names."""
    if find_backend(outputs) is not None:
        yield "output", outputs
        return
    fields = (
        outputs.items() if isinstance(outputs, Mapping) else ((f"output[{i}]", part) for i, part in enumerate(outputs))
    )
    for name, value in fields:
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)] if type(value) is tuple else [(name, value)]
        yield from ((part_name, part) for part_name, part in parts if find_backend(part) is not None)


def _from_array(model: Any, arr: Array) -> dict[str, Any]:
    arr = in_torch(arr)
    parameter = next(model.parameters(), None)
    return model_kwargs(arr if parameter is None else arr.to(parameter.device), model=model)
