"""Models of transformers, tiny and random, and the batches that they are tried on."""

import functools
import importlib.metadata
import inspect
from typing import NamedTuple

import torch

VOCABULARY = 50
LENGTHS = (7, 1, 13, 4)  # the third is longer than every window
WINDOW = 5

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _COMMON | {"num_key_value_heads": 2, "attention_dropout": 0.0}
_BOTH_KINDS = ["sliding_attention", "full_attention"]
_ENCODER = _COMMON | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


class Kind(NamedTuple):
    """A model class of transformers and the options of its configuration."""

    model: str
    config: str
    options: dict
    positions_start: int = 0


CAUSAL = {
    "llama": Kind("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen3": Kind("Qwen3ForCausalLM", "Qwen3Config", _GROUPED | {"head_dim": 16}),
    "mistral": Kind("MistralForCausalLM", "MistralConfig", _GROUPED | {"sliding_window": WINDOW}),
    "gemma2": Kind(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GROUPED
        | {"head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "layer_types": _BOTH_KINDS,
               "query_pre_attn_scalar": 16},
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _BOTH_KINDS, "query_pre_attn_scalar": 16},
    ),
    "phi3": Kind("Phi3ForCausalLM", "Phi3Config", _GROUPED | {"sliding_window": WINDOW}),
    "gpt_oss": Kind(
        "GptOssForCausalLM",
        "GptOssConfig",
        _GROUPED
        | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": _BOTH_KINDS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}  # fmt: skip
ENCODERS = {
    "bert": Kind("BertModel", "BertConfig", _ENCODER),
    "roberta": Kind("RobertaModel", "RobertaConfig", _ENCODER | {"pad_token_id": 1}, positions_start=2),
    "modernbert": Kind(
        "ModernBertModel",
        "ModernBertConfig",
        _COMMON | {"local_attention": 4, "global_attn_every_n_layers": 2, "attention_dropout": 0.0},
    ),
}
FIVE = int(importlib.metadata.version("transformers").partition(".")[0]) >= 5
"""Transformers 5, where encoders use the attention interface too."""

KINDS = CAUSAL | (ENCODERS if FIVE else {})


@functools.cache
def make(name):
    """Return the model of this name, in evaluation mode: one for all tests, which leave it as they found it."""
    import transformers

    import scree.hf

    scree.hf.register()
    kind = KINDS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind.model)(getattr(transformers, kind.config)(**kind.options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # larger weights than a model begins with: scores must matter
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def cached(cache, begin, end):
    """Return the keywords that give a model tokens `begin` to `end` and a cache of those before."""
    import transformers

    known = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": cache}
    if not FIVE:  # which counts what is in a static cache by its keys that are not 0, and a token of padding has such
        given["cache_position"] = torch.arange(begin, end)
    return given


class Batch(NamedTuple):
    """A padded batch, and where its tokens are: ``inputs["attention_mask"].bool()``."""

    inputs: dict
    tokens: torch.Tensor


def padded(name, side="right", lengths=LENGTHS):
    """Return a padded batch of random tokens, the same ones whichever side the padding is on."""
    kind = KINDS[name]
    torch.manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (n,)) for n in lengths]
    width = max(lengths)
    ids = torch.full((len(rows), width), kind.options["pad_token_id"])
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        if side == "holes":  # every other place, as far as there is room
            place = (
                torch.arange(width)[width % 2 :: 2][-len(row) :]
                if 2 * len(row) < width
                else slice(width - len(row), width)
            )
        ids[i, place] = row
        mask[i, place] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) + kind.positions_start
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name != "modernbert":
        inputs["position_ids"] = positions
    return Batch(inputs, mask.bool())


def packed(name, lengths=LENGTHS):
    """Return the same tokens packed, with every keyword that names the sequences; lengths may be 0."""
    batch = padded(name, "right", [n for n in lengths if n])
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    flat = {key: value[batch.tokens][None] for key, value in batch.inputs.items() if key != "attention_mask"}
    longest = max(lengths)
    return flat | {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest
    }  # fmt: skip


def outputs(model, implementation, inputs, tokens=None, gradients=False):
    """Return what the model gives for each token, (T, M), and the gradients of its parameters."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    with torch.set_grad_enabled(gradients):
        out = model(**inputs, **({"use_cache": False} if gradients and hasattr(model, "lm_head") else {}))[0]
        out = out[0] if tokens is None else out[tokens]
    if not gradients:
        return out, {}
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_rounding(actual, expected, whole=0.0):
    """Fail unless two tensors of float32 differ by no more than sums in another order do.

    `whole` is the largest number in all that was computed together: some gradients are 0 but for rounding.
    """
    atol = 1e-5 * expected.abs().max().item() + 1e-7 * whole
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
