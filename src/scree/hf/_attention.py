"""The attention function, which transformers calls in every layer of a model with ``attn_implementation="scree"``."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from . import _layouts, _masks, _pattern, _positions
from ._layouts import Layout, Rows
from ._pattern import Pattern, refusal

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_REFUSED = {
    "head_mask": "a head_mask",
    "position_bias": "a bias of the positions on the scores",
    "relative_position_bias": "a bias of the positions on the scores",
    "alibi": "ALiBi, a bias of the positions on the scores,",
    "block_table": "a paged cache",
    "indices": "attention to chosen keys",
}
_IGNORED = {
    "cache", "cache_position", "deterministic", "is_cross_attention", "layer_idx", "logits_to_keep", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_value", "past_key_values",
    "position_embeddings", "return_dict", "seq_idx", "use_cache",
}  # fmt: skip
_warned: set[str] = set()


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence of a batch, and never to padding.

    Parameters
    ----------
    module : torch.nn.Module
        The layer; its `is_causal` counts where nothing else says it.
    query : tensor of (B, H, S, D)
    key : tensor of (B, H_k, K, D)
        H is a multiple of H_k; nothing is repeated.
    value : tensor of (B, H_k, K, D_v)
    attention_mask : tensor, optional
        What `mask` made; or (B, K) or (B, 1, 1, K), bool or of 0 and 1, true at tokens.
    scaling, softcap, s_aux
        `scale`, `softcap` and `sinks` of `scree.kernels.varlen_attention`.
    dropout : float
        0 only.
    sliding_window : int, optional
        The keys that a query sees, itself included; counts where the mask does not tell it.
    position_ids : tensor of (B, S) or (1, S), integer, optional
        Compared with the sequences of the batch.
    cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        The sequences of a packed batch, B = 1. Either all four are given or none.
    **others
        What else a model or its caller hands on.

    Returns
    -------
    tensor of (B, S, H, D_v)
        0 where there is no token; and None, in place of the weights.

    Raises
    ------
    NotImplementedError
        Something that cannot be served; the message says what to do.
    ValueError
        The sequences, the positions and the mask contradict each other.
    """
    if dropout:
        raise refusal(
            f"attention dropout ({dropout} in {type(module).__name__})",
            "set the config's attention_dropout (BERT: attention_probs_dropout_prob; GPT-2: attn_pdrop) to 0, or call model.eval()",
        )
    _look_at(module, others)
    packed = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if any(given is not None for given in packed):
        pattern, (q, k) = _packed(module, query, key, packed, attention_mask, position_ids, causal, sliding_window)
        if others.get("use_cache") and module.training:
            _warn("use_cache", "a packed batch in training fills a cache that nothing can read; pass use_cache=False")
    else:
        layout = _padded(module, query, key, attention_mask, position_ids, causal, sliding_window)
        pattern, (q, k) = layout.pattern, layout.rows
    query, key, value = _one_dtype(query, key, value)
    out = kernels.varlen_attention(
        q.gather(query),
        k.gather(key),
        k.gather(value),
        pattern.causal,
        scale=scaling,
        window_size=(pattern.left, pattern.right),
        softcap=softcap,
        sinks=s_aux,
    )
    return q.scatter(out, query.shape[0]), None


def _look_at(module: torch.nn.Module, others: dict[str, Any]) -> None:
    """Refuse the keywords that would change the result, and warn of those that nobody here has heard of."""
    if others.get("output_attentions"):
        raise refusal("output_attentions=True", 'the weights are never made; use attn_implementation="eager"')
    for name, given in others.items():
        if given is None or name in _IGNORED:
            continue
        if name in _REFUSED:
            raise refusal(f"{_REFUSED[name]} ({name} of {type(module).__name__})")
        _warn(
            name,
            f"the keyword {name!r} of {type(module).__name__} is unknown here and has no effect; compare a batch with "
            'attn_implementation="eager", and leave it out if it is not for the attention',
        )


def _look_at_layers(module: torch.nn.Module) -> None:
    """Warn where a packed batch passes layers that are no attention, and may carry a sequence into the next."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = {kind for kind in kinds if "attention" not in kind or "linear" in kind}
    if others:
        _warn(
            f"layers of {type(config).__name__}",
            f"this model has layers of the kind {', '.join(sorted(map(repr, others)))}, which keep packed sequences apart "
            "with kernels of their own or not at all; compare each sequence with itself alone, or pad",
        )


def _warn(about: str, message: str) -> None:
    """Warn, once about each thing."""
    if about not in _warned and not torch.compiler.is_compiling():
        _warned.add(about)
        warnings.warn(f"scree attention: {message}", UserWarning, stacklevel=4)


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to what autocast wants, as `scaled_dot_product_attention` is."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    given: tuple[Any, ...],
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    causal: bool,
    sliding_window: int | None,
) -> tuple[Pattern, tuple[Rows, Rows]]:
    """The layout of a packed batch, worked out in the first layer and kept with its offsets."""
    for name, value in zip(_PACKED, given, strict=True):
        if value is None:
            raise ValueError(f"scree attention: {name} is missing; a packed batch needs {', '.join(_PACKED)}")
    config = getattr(module, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refusal(f"a packed batch in a model with cross-attention ({type(module).__name__})", "pad it")
    offsets_q, offsets_k = given[:2]
    batch_size, _, length, _ = query.shape
    if batch_size != 1:
        raise ValueError(
            f"scree attention: the batch has {batch_size} rows beside cu_seq_lens_q; needs 1, all sequences end to end"
        )
    if key.shape[2] != length:
        raise ValueError(
            f"scree attention: {key.shape[2]} keys for {length} packed queries: a cache holds more than this batch; pass "
            "a packed batch with use_cache=False and without a cache"
        )
    pattern = _pattern.of_keywords(causal, sliding_window)
    if attention_mask is not None:
        layout = _layout_of(attention_mask, length, length, pattern)
        _expect_no_padding(layout)
        pattern = layout.pattern
    _look_at_layers(module)
    return pattern, _packed_rows(offsets_q, offsets_k, length, position_ids)


def _expect_no_padding(layout: Layout) -> None:
    if not layout.given:
        return
    if layout.rows[1].whole:
        _warn("mask", "attention_mask beside cu_seq_lens_q is all ones, and not needed; leave it out of a packed batch")
        return
    raise ValueError(
        "scree attention: attention_mask says that a packed batch has padding, cu_seq_lens_q that it has none; leave "
        "attention_mask out (scree.hf.collator does), or leave cu_seq_lens_q out of a padded batch"
    )


def _packed_rows(offsets_q: Tensor, offsets_k: Tensor, length: int, position_ids: Tensor | None) -> tuple[Rows, Rows]:
    """Where the tokens of a packed batch are; kept with its offsets, where it is checked once."""
    traced = torch.compiler.is_compiling()
    known: _Checked | None = None if traced else _layouts.attached(offsets_q)
    if known is not None and known.fits(offsets_k, length, position_ids):
        return known.rows
    q = _layouts.of_offsets("cu_seq_lens_q", offsets_q, length)
    same = offsets_k is offsets_q or _equal_on_host(offsets_q, offsets_k)
    k = q if same else _layouts.of_offsets("cu_seq_lens_k", offsets_k, length)
    if not traced:
        if position_ids is not None:
            _positions.expect_packed(position_ids, q.places)
        _layouts.attach(offsets_q, _Checked(offsets_k, length, position_ids, (q, k)))
    return q, k


class _Checked(NamedTuple):
    """The rows of a packed batch, and beside what its offsets were checked."""

    offsets_k: Tensor
    length: int
    position_ids: Tensor | None
    rows: tuple[Rows, Rows]

    def fits(self, offsets_k: Tensor, length: int, position_ids: Tensor | None) -> bool:
        return self.offsets_k is offsets_k and self.length == length and self.position_ids is position_ids


def _equal_on_host(a: Tensor, b: Tensor) -> bool:
    on_host = not torch.compiler.is_compiling() and a.device.type == b.device.type == "cpu"
    return on_host and a.shape == b.shape and bool((a == b).all())


def _padded(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    causal: bool,
    sliding_window: int | None,
) -> Layout:
    """The layout of a padded batch, worked out by the mask function, or here where a model has its own masks."""
    batch_size, _, length, _ = query.shape
    kv_length = key.shape[2]
    pattern = _pattern.of_keywords(causal, sliding_window)
    if attention_mask is None:
        layout = _masks.full(batch_size, length, kv_length, pattern, query)
        layout.to_itself = _masks.is_to_itself(causal, length, kv_length, getattr(module, "config", None))
    else:
        layout = _layout_of(attention_mask, length, kv_length, pattern)
    if position_ids is not None and layout.to_itself and layout.vetted is not position_ids:
        if _positions.compare(layout, position_ids, batch_size, length, kv_length):
            _look_at_layers(module)
        layout.vetted = position_ids
    return layout


def _layout_of(mask: Tensor, length: int, kv_length: int, pattern: Pattern) -> Layout:
    """The layout that a mask carries, or that can be read in it."""
    layout: Layout | None = _layouts.attached(mask)
    if layout is None:
        layout = _masks.of_copy(mask, length, pattern) or _masks.of_foreign(mask, length, kv_length, pattern)
        _layouts.attach(mask, layout)
    return layout
