"""The same model through Hugging Face transformers: padded with its own attention, and packed with scree's.

transformers' own BERT gets the same weights; all that has to be said to it is ``attn_implementation="scree"``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import scree

from .native import Dense, Native
from .pretrained import model_folder

PADDED, PACKED = "sdpa", "scree"
"""What `attn_implementation` is: transformers' own default, and ours."""


def load() -> Any:
    """Read the model from the files of the package, and nothing from a hub.

    Returns
    -------
    transformers.BertModel
        In float32, without its pooler: a text's embedding is the mean of its tokens.

    Raises
    ------
    ImportError
        PyTorch or transformers is missing or too old: BERT of transformers 4 cannot be told where a packed text ends.
    """
    scree.hf.register()
    import torch
    import transformers
    from transformers.utils import logging

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"transformers {transformers.__version__} cannot run BERT on packed texts; needs 5 or newer: "
            'pip install "transformers>=5"'
        )
    logging.disable_progress_bar()  # the demo has bars of its own
    model = transformers.BertModel.from_pretrained(model_folder(), local_files_only=True, dtype=torch.float32)
    model.pooler = None
    return model.eval()


def embed_packed(
    tokens: scree.Array,
    model: Any,
    native: Native,  # noqa: ARG001
    seen: Callable[[Any], Any] = lambda x: x,
) -> Dense:
    """Embed a packed batch of texts, with ``attn_implementation="scree"``; as `minilm.embed` does.

    Parameters
    ----------
    tokens : Array of (T,), int32, torch
    model : transformers.BertModel
    native : Native
        Not used.
    seen : callable, optional
        Called with what each module of the model returns.

    Returns
    -------
    tensor of (B, M), float32
        One vector of length 1 a text.
    """
    import torch

    _attend(model, PACKED)
    with torch.no_grad(), _watched(model, seen):
        outputs = model(**scree.hf.model_kwargs(tokens, model=model))
        pooled = scree.hf.pool(outputs, arr=tokens)
        return torch.nn.functional.normalize(pooled)


def embed_padded(
    ids: Dense,
    mask: Dense,
    model: Any,
    native: Native,  # noqa: ARG001
    seen: Callable[[Any], Any] = lambda x: x,
) -> Dense:
    """Embed a padded batch of texts, with transformers' own attention; as `padded.embed` does.

    Parameters
    ----------
    ids : tensor of (B, N), int32
        Tokens, with anything behind the last one of a text.
    mask : tensor of (B, N), float32
        1 at the tokens, 0 behind them.
    model, native, seen
        As for `embed_packed`.

    Returns
    -------
    tensor of (B, M), float32
    """
    import torch

    _attend(model, PADDED)
    with torch.no_grad(), _watched(model, seen):
        x = model(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        return torch.nn.functional.normalize(pooled)


def _attend(model: Any, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


@contextmanager
def _watched(model: Any, seen: Callable[[Any], Any]) -> Generator[None, None, None]:
    """Call `seen` with what each module without parts of its own returns, and with what attention does."""

    def hook(_module: Any, given: Any, made: Any) -> None:
        made = made[0] if isinstance(made, tuple) else made
        if not any(made is one for one in given):  # a dropout that is off
            seen(made)

    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if not any(module.children()) or hasattr(module, "is_causal")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
