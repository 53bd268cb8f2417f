"""The model through transformers: both ways equal the demo's own code, and packed it is scree that attends."""

import functools

import numpy as np
import pytest
from demo_model import QUESTION, TEXTS, model_on, need_model, tokens

import scree
from scree.demo import compare, huggingface, pretrained

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OLD = int(transformers.__version__.partition(".")[0]) < 5

pytestmark = pytest.mark.hf
packs = pytest.mark.skipif(OLD, reason="BERT of transformers 4 cannot be told where a packed text ends")


@functools.cache
def model():
    need_model()
    return huggingface.load()


def both_ways(model):
    """(padded, packed) of `TEXTS` through transformers."""
    _, native = model_on("torch")
    return (
        compare.run_padded(tokens(), model, native, embed=huggingface.embed_padded),
        compare.run_packed(tokens(), model, native, embed=huggingface.embed_packed),
    )


@packs
def test_equal_to_the_demos_own_code():
    own = compare.run_packed(tokens(), *model_on("torch"))
    for way in both_ways(model()):
        assert way.embeddings.dtype == np.float32
        np.testing.assert_allclose(way.embeddings, own.embeddings, rtol=0, atol=1e-6)


@packs
def test_packed_it_is_scree_that_attends(monkeypatch):
    from scree import kernels

    real, calls = kernels.varlen_attention, []

    def counted(q, *arguments, **options):
        calls.append(q.lengths.tolist())
        return real(q, *arguments, **options)

    monkeypatch.setattr(kernels, "varlen_attention", counted)
    _, native = model_on("torch")
    compare.run_padded(tokens(), model(), native, embed=huggingface.embed_padded)
    assert calls == []
    compare.run_packed(tokens(), model(), native, embed=huggingface.embed_packed)
    assert calls == [tokens().lengths.tolist()] * 6


@packs
def test_the_same_answers():
    own_model, native = model_on("torch")
    question = scree.pack(pretrained.tokenize([QUESTION]))
    own = compare.run_packed(tokens(), own_model, native)
    asked = compare.run_packed(question, model(), native, embed=huggingface.embed_packed)
    want = compare.nearest(compare.run_packed(question, own_model, native).embeddings[0], own.embeddings, 5)
    got = compare.nearest(asked.embeddings[0], both_ways(model())[1].embeddings, 5)
    assert [i for i, _ in got] == [i for i, _ in want]
    np.testing.assert_allclose([score for _, score in got], [score for _, score in want], atol=1e-5)


@packs
def test_activations_are_counted():
    with_padding, without = both_ways(model())
    # Three embeddings and a norm; q, k, v, attention, its product and norm; 4 wide and 4 behind GELU; product and norm.
    a_token = (4 + 6 * (6 + 8 + 2)) * 384 * 4
    assert without.activations == without.places * a_token
    longest = tokens().max_length  # the places of a padded batch are looked up once for all its rows
    assert with_padding.activations == with_padding.places * a_token - (len(TEXTS) - 1) * longest * 384 * 4


@packs
def test_nothing_is_left_on_the_model():
    both_ways(model())
    assert not any(module._forward_hooks for module in model().modules())


@pytest.mark.skipif(not OLD, reason="needs transformers 4")
def test_an_older_transformers_is_told_what_it_lacks():
    need_model()
    with pytest.raises(ImportError, match=r"transformers 4\..* cannot run BERT on packed texts; needs 5 or newer"):
        huggingface.load()
