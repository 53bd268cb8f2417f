"""Where in a model a leak begins, and what is likely to cause it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .._backends import Dense
from ._probe import NOBODY, Probe, distance

_STATE = re.compile(r"mamba|ssm|conv|delta|recurrent|rwkv|retention|lru|linearattn|linearattention", re.IGNORECASE)
_EXPERTS = re.compile(r"moe|expert|router|sparse", re.IGNORECASE)
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)

_ADVICE = "scree.hf.register() and attn_implementation='scree' keep sequences apart by cu_seq_lens"

Call = tuple[str, list[Dense], list[Dense]]  # the module's name, and what of one sequence went in and came out


def first_module(probe: Probe, sources: list[int], victim: int) -> tuple[str, Any] | None:
    """Find the innermost module that gets the same for the victim and gives something else when the sources are changed.

    Returns
    -------
    (str, torch.nn.Module) or None
        Its name in the model. None where no module shows it: compiled code runs no hooks.
    """
    root = getattr(probe.model, "_orig_mod", probe.model)
    before = _recorded(probe, root, victim, None)
    after = _recorded(probe, root, victim, probe.changed(sources))
    for (name, ins, outs), (other, other_ins, other_outs) in zip(before, after, strict=False):
        if name != other:
            return None
        if _same(ins, other_ins) and not _same(outs, other_outs):
            return name, root.get_submodule(name)
    return None


def _recorded(probe: Probe, root: Any, victim: int, inputs: Dense | None) -> list[Call]:
    """Run the model; list its modules' calls in the order in which they end."""
    calls: list[Call] = []
    handles: list[Any] = []

    def listen(name: str, module: Any) -> None:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls.append((name, [*_of_victim((args, kwargs))], [*_of_victim(output)]))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    places = (probe.owners.flatten() == victim).nonzero()[:, 0]

    def _of_victim(value: Any) -> Iterator[Dense]:
        for tensor in _tensors(value):
            axes = _place_axes(tuple(tensor.shape), tuple(probe.owners.shape))
            if axes is not None:
                start, stop = axes
                flat = tensor.detach().reshape(*tensor.shape[:start], -1, *tensor.shape[stop:])
                yield flat.index_select(start, places.to(flat.device))

    for name, module in root.named_modules():
        if name:
            listen(name, module)
    model, probe.model = probe.model, root
    try:
        probe.run(inputs)
    finally:
        probe.model = model
        for handle in handles:
            handle.remove()
    return calls


def _place_axes(shape: tuple[int, ...], places: tuple[int, int]) -> tuple[int, int] | None:
    """The axes of a tensor that count the places of the batch: as they are, flat, or behind the heads of a packed one."""
    if shape[:2] == places:
        return 0, 2
    if shape and shape[0] == places[0] * places[1]:
        return 0, 1
    if places[0] == 1 and len(shape) == 4 and shape[0] == 1 and shape[2] == places[1]:
        return 2, 3
    return None


def _tensors(value: Any) -> Iterator[Dense]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif _is_plain(value) and value.is_floating_point():
        yield value


def _is_plain(value: Dense) -> bool:
    """Whether a tensor is of no class of its own, as the masks of some implementations are, which let nobody look."""
    import torch

    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _same(left: list[Dense], right: list[Dense]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and not bool(distance(a, b).any()) for a, b in zip(left, right, strict=True)
    )


def likely_cause(probe: Probe, source: int, both_ways: bool, found: tuple[str, Any] | None) -> str:
    """Say in a sentence what to look at. `both_ways`: later sequences leak into earlier ones too."""
    chosen = getattr(getattr(probe.model, "config", None), "_attn_implementation", None)
    if source == NOBODY and probe.packed:
        return f"what lies beyond the last of cu_seq_lens_q is attended to; {_ADVICE}"
    if source == NOBODY:
        named = "" if chosen is None else f" (attn_implementation={chosen!r})"
        return (
            f"the attention_mask does not reach the attention{named}: an implementation needs its mask function registered "
            "beside it, as scree.hf.register() does"
        )
    kind = type(found[1]).__name__ if found is not None else ""
    if "BatchNorm" in kind:
        return "batch normalisation in training mode takes its statistics over the whole batch; call model.eval()"
    if _STATE.search(kind):
        return (
            "a layer with a state or a convolution runs on over the end of a sequence; it needs seq_idx or cu_seq_lens "
            "(scree.hf.model_kwargs(arr, seq_idx=True)), and a model that reads them"
        )
    if _EXPERTS.search(kind):
        return (
            "which tokens an expert gets depends on all sequences: an expert with a capacity drops others then, and one "
            "without rounds its sums in another order, which is of the size of float rounding and what atol is for"
        )
    if found is None and chosen is None:
        return "no module shows where it happens: it is in the forward of the model itself, or in compiled code"
    if found is None or _ATTENTION.search(kind):
        return _cause_in_attention(probe, both_ways)
    return "this module mixes tokens of different sequences (normalises, quantises or sorts over all of them, say)"


def _cause_in_attention(probe: Probe, both_ways: bool) -> str:
    config = getattr(probe.model, "config", None)
    chosen = getattr(config, "_attn_implementation", None)
    if not probe.packed:
        return f"the attention (attn_implementation={chosen!r}) mixes the rows of the batch"
    given = probe.kwargs
    if chosen in ("sdpa", "eager", "flex_attention"):
        if given.get("attention_mask") is not None:
            why = "beside an attention_mask, transformers masks padding and nothing else"
        elif given.get("position_ids") is None:
            why = "without position_ids, transformers takes the row for one sequence"
        elif both_ways:
            why = "transformers' masks for bidirectional models know of no packed sequences"
        elif given.get("use_cache", getattr(config, "use_cache", False)):
            why = "with a cache, transformers does not look for packed sequences; use_cache=False makes causal models do so"
        else:
            why = "this model does not hand position_ids on to transformers' masks"
        return f"attn_implementation={chosen!r} reads no cu_seq_lens, and {why}; {_ADVICE}"
    if given.get("cu_seq_lens_q") is None:
        return f"attn_implementation={chosen!r} got no cu_seq_lens and had to infer the sequences; give scree.hf.model_kwargs(arr)"
    return f"attn_implementation={chosen!r} does not keep to cu_seq_lens; {_ADVICE}"
