"""The proof that no sequence of a batch sees another."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from ._leaks import first_module, likely_cause
from ._probe import LEAST, NOBODY, OP, Probe


@dataclass(frozen=True)
class Isolation:
    """What `assert_isolated` has shown.

    Attributes
    ----------
    sequences, tokens : int
        How many were tested against each other.
    passes : int
        How often the model was run.
    atol : float
        By how much an output was allowed to change; 0.0: not in one bit.
    response : float
        The least that a sequence's own outputs changed when it was changed: what a leak is measured against.
    outputs : tuple of str
        What was compared.
    attn_implementation : str or None
        Of the model.
    """

    sequences: int
    tokens: int
    passes: int
    atol: float
    response: float
    outputs: tuple[str, ...]
    attn_implementation: str | None


class IsolationError(AssertionError):
    """A sequence changes another.

    Attributes
    ----------
    leaks : list of (int, int, float)
        Which sequence changes which, and by how much; -1 is padding. All that the first source found changes.
    module : str or None
        The module of the model in which the leak begins.
    cause : str
    """

    def __init__(self, message: str, leaks: list[tuple[int, int, float]], module: str | None, cause: str) -> None:
        super().__init__(message)
        self.leaks, self.module, self.cause = leaks, module, cause


def assert_isolated(model: Any, batch: Any, *, atol: float = 0.0) -> Isolation:
    """Prove on a batch that no sequence changes another one's outputs, or say which does.

    Every sequence is changed, token for token, and the outputs of all others must keep every bit. Sequences are changed
    in groups: for each binary digit of their numbers those that have a 0 there, then those that have a 1. Of any two
    sequences each is so changed once while the other is not, in ``2 * ceil(log2(B))`` passes.

    Parameters
    ----------
    model : transformers.PreTrainedModel, or a torch.nn.Module that is called likewise
        As it is: in evaluation mode, or in training mode without dropout. It is left as it was, gradients, buffers and
        random state included.
    batch : Array of (T,) or (T, M), or mapping
        Token ids or embeddings, which `model_kwargs` turns into a packed batch on the model's device. Or the keywords
        themselves: of a packed batch (one row, with `cu_seq_lens_q`, `seq_idx` or `position_ids`), or of a padded one
        (`input_ids` (B, N), `attention_mask`), whose padding must change nothing either. `labels` are left out.
    atol : float
        The change that is tolerated, where an operation is known not to be reproducible.

    Returns
    -------
    Isolation
        What was tested, with what power.

    Raises
    ------
    IsolationError
        An `AssertionError` that names the pair, the size of the change, the module in which it begins, and the likely cause.
    ValueError, TypeError
        Nothing can be shown with this: fewer than two sequences with tokens; no output by token; outputs with NaN; a model
        that gives other outputs when it is run again (dropout); one whose outputs do not change with the sequence itself,
        or in which no token has an effect on another one of its own sequence.

    Notes
    -----
    A head that gives one output a sequence is tested for padded batches, but not against its padding: such heads may find
    the last token by the ids of the padding.

    Examples
    --------
    >>> import scree, torch, transformers
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = transformers.LlamaForCausalLM(config).eval()
    >>> batch = scree.hf.model_kwargs(scree.pack([torch.arange(5), torch.arange(3)]))
    >>> scree.hf.assert_isolated(model, batch).passes
    5
    >>> scree.hf.assert_isolated(model, batch | {"use_cache": True})
    Traceback (most recent call last):
    ...
    scree.hf._isolation.IsolationError: assert_isolated: sequence 0 changes sequence 1 by ... in model.layers.0.self_attn...
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{OP}: model is {type(model).__name__}; needs a torch.nn.Module")
    if not atol >= 0:
        raise ValueError(f"atol: got {atol!r}; needs 0 or more")
    with torch.no_grad(), _left_as_it_was(model):
        return _Test(Probe(model, batch), float(atol)).run()


class _Test:
    def __init__(self, probe: Probe, atol: float) -> None:
        self.probe, self.atol = probe, atol
        self.before = probe.run()

    def run(self) -> Isolation:
        probe = self.probe
        self._expect_numbers(self.before, "")
        self._expect_repeatable()
        self._expect_effect_within()
        response = float("inf")
        digits = (len(probe.sequences) - 1).bit_length()
        for digit in range(digits):
            for side in (0, 1):
                sources = [i for place, i in enumerate(probe.sequences) if place >> digit & 1 == side]
                changes = self._changes(sources)
                self._expect_no_leak(sources, changes)
                response = min(response, *self._own(sources, changes))
        if probe.has_spare and any(probe.by_token(name, value) for name, value in self.before.items()):
            self._expect_no_leak([NOBODY], self._changes([NOBODY], tokens_only=True))
        config = getattr(probe.model, "config", None)
        return Isolation(
            len(probe.sequences),
            sum(probe.counts),
            probe.passes,
            self.atol,
            response,
            tuple(self.before),
            getattr(config, "_attn_implementation", None),
        )

    def _changes(self, sources: list[int], tokens_only: bool = False) -> list[float]:
        return self.probe.differences(self.before, self.probe.run(self.probe.changed(sources)), tokens_only)

    # What must hold for the test to say anything.

    def _expect_numbers(self, outputs: dict[str, Any], when: str) -> None:
        bad = self.probe.not_a_number(outputs)
        if bad:
            raise ValueError(
                f"{OP}: the outputs of sequence {bad[0]} have NaN{when}; nothing can be compared with them"
            )

    def _expect_repeatable(self) -> None:
        noise = max(self.probe.differences(self.before, self.probe.run()))
        if noise <= self.atol:
            return
        names = _dropouts(self.probe.model)
        if self.probe.model.training and names:
            raise ValueError(
                f"{OP}: two runs of the same batch differ by {noise:.3g}: the model is in training mode and has dropout "
                f"({names[0]}, say); call model.eval(), or set dropout to 0"
            )
        raise ValueError(
            f"{OP}: two runs of the same batch differ by {noise:.3g}, so that nothing can be said of a smaller leak; make the "
            "model deterministic (torch.use_deterministic_algorithms), or give an atol above that"
        )

    def _expect_effect_within(self) -> None:
        """Change the first token of each sequence: later ones of the same must change, or nothing mixes tokens at all."""
        probe = self.probe
        if max(probe.counts) == 1 or not any(probe.by_token(name, value) for name, value in self.before.items()):
            return
        inputs = probe.changed(probe.sequences, first_only=True)
        touched = inputs != probe.inputs
        touched = touched if probe.name == "input_ids" else touched.any(-1)
        owners = probe.owners
        probe.owners = owners.where(~touched, NOBODY)
        try:
            effects = probe.differences(self.before, probe.run(inputs), tokens_only=True)
        finally:
            probe.owners = owners
        if not max(effects) > max(self.atol, LEAST):
            raise ValueError(
                f"{OP}: no token changes another one of its own sequence (by {max(effects):.3g} at most), so that a leak would "
                "not be seen either; the model mixes no tokens, or its attention has no effect yet"
            )

    def _own(self, sources: list[int], changes: list[float]) -> list[float]:
        for i in sources:
            if not changes[i] > max(self.atol, LEAST):
                raise ValueError(
                    f"{OP}: sequence {i} was changed, and its own outputs changed by {changes[i]:.3g} only, within atol="
                    f"{self.atol:.3g}; the test has no power: the model ignores its input, or atol is too large"
                )
            if changes[i] == float("inf"):
                raise ValueError(f"{OP}: the outputs of sequence {i} have NaN or infinity once it is changed")
        return [changes[i] for i in sources]

    # A leak.

    def _leaking(self, sources: list[int], changes: list[float]) -> list[tuple[int, float]]:
        return [(j, changes[j]) for j in self.probe.sequences if j not in sources and changes[j] > self.atol]

    def _expect_no_leak(self, sources: list[int], changes: list[float]) -> None:
        leaking = self._leaking(sources, changes)
        if not leaking:
            return
        sources, leaking = self._narrowed(sources, leaking)
        victim, amount = max(leaking, key=lambda pair: pair[1])
        found = first_module(self.probe, sources, victim)
        back = (i for i, _ in self._leaking([victim], self._changes([victim])))
        both_ways = sources[0] > victim or any(i < victim for i in back)
        cause = likely_cause(self.probe, sources[0], both_ways, found)
        who = "padding" if sources == [NOBODY] else f"sequence {sources[0]}"
        if len(sources) > 1:
            who = "the sequences " + ", ".join(map(str, sources)) + " together"
        more = len(leaking) - 1
        where = f", first in {found[0]} ({type(found[1]).__name__})" if found is not None else ""
        raise IsolationError(
            f"{OP}: {who} {'changes' if len(sources) == 1 else 'change'} sequence {victim} by {amount:.3g}"
            f"{f' (and {more} more)' if more else ''}{where}. Likely cause: {cause}",
            [(i, j, size) for i in sources for j, size in leaking],
            found[0] if found is not None else None,
            cause,
        )

    def _narrowed(
        self, sources: list[int], leaking: list[tuple[int, float]]
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """Find one source of the leak by halves; a group of which none can be left out, where no half of it leaks alone."""
        while len(sources) > 1:
            middle = len(sources) // 2
            for half in (sources[:middle], sources[middle:]):
                found = self._leaking(half, self._changes(half))
                if found:
                    sources, leaking = half, found
                    break
            else:
                return self._thinned(sources, leaking)
        return sources, leaking

    def _thinned(
        self, sources: list[int], leaking: list[tuple[int, float]]
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """Leave out of a group, one by one, the sources without which it still leaks."""
        for i in tuple(sources):
            others = [j for j in sources if j != i]
            found = self._leaking(others, self._changes(others)) if others else []
            if found:
                sources, leaking = others, found
        return sources, leaking


def _dropouts(model: Any) -> list[str]:
    named = [
        f"{name}.p={module.p}"
        for name, module in model.named_modules()
        if type(module).__name__.startswith("Dropout") and module.p
    ]
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return named + [f"config.{name}={p}" for name, p in values.items() if "drop" in name and isinstance(p, float) and p]


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Generator[None, None, None]:
    """Put buffers back that a model in training mode writes, and the random state."""
    import torch

    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if model.training else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for buffer, kept in buffers:
            buffer.copy_(kept)
