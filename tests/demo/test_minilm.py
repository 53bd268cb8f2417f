"""The model: packed, padded, and as `transformers` computes it, on every framework."""

import functools

import numpy as np
import pytest
from demo_model import QUESTION, TEXTS, each_framework, expected, model_on, tokens, weights

import scree
from scree.demo import compare, minilm, padded, picture, pretrained


@functools.cache
def both_ways(framework):
    """(padded, packed) of `TEXTS` on a framework."""
    return tuple(way(tokens(), *model_on(framework)) for way in (compare.run_padded, compare.run_packed))


@each_framework
def test_equal_to_transformers(framework):
    for way in both_ways(framework):
        assert way.embeddings.dtype == np.float32
        np.testing.assert_allclose(way.embeddings, expected(), rtol=0, atol=1e-5)


@each_framework
def test_packed_equals_padded(framework):
    assert compare.largest_difference(*both_ways(framework)) < 1e-6


@each_framework
def test_every_framework_gives_the_same_answers(framework):
    def answers(name):
        model, native = model_on(name)
        asked = compare.run_packed(scree.pack(pretrained.tokenize([QUESTION])), model, native)
        return compare.nearest(asked.embeddings[0], both_ways(name)[1].embeddings, 5)

    want, got = answers("numpy"), answers(framework)
    assert [i for i, _ in got] == [i for i, _ in want]
    np.testing.assert_allclose([score for _, score in got], [score for _, score in want], atol=1e-5)
    assert got[0][0] == 0  # the docstring of os.path.join


def test_an_embedding_does_not_depend_on_its_batch():
    model, native = model_on("numpy")
    whole = minilm.embed(tokens(), model, native)
    for i in range(len(tokens())):
        # A product over other many rows may be summed in another order.
        np.testing.assert_allclose(minilm.embed(tokens()[i : i + 1], model, native)[0], whole[i], rtol=0, atol=1e-6)


def test_spare_tokens_change_nothing():
    model, native = model_on("numpy")
    spare = scree.with_capacity(tokens(), len(tokens()) + 3, tokens().total_length + 50)
    with np.errstate(invalid="ignore"):  # the mean of nothing
        got = minilm.embed(spare, model, native)[: len(tokens())]
    np.testing.assert_allclose(got, minilm.embed(tokens(), model, native), rtol=0, atol=1e-6)


@each_framework
def test_activations_are_counted(framework):
    with_padding, without = both_ways(framework)
    assert (
        with_padding.places == compare.padded_places(np.asarray(tokens().lengths)) == len(TEXTS) * tokens().max_length
    )
    # q, k, v, attention, its product, sum and norm; 4 wide and 4 behind GELU; product, sum and norm.
    a_token = (2 + len(weights().layers) * (7 + 8 + 3)) * 384 * 4
    assert with_padding.activations == with_padding.places * a_token
    # The packed way also carries offsets.
    assert 0 <= without.activations - without.places * a_token < 200 * 4 * (len(TEXTS) + 1)


def test_batches_are_cut_at_the_number_of_tokens(monkeypatch):
    model, native = model_on("numpy")
    monkeypatch.setattr(compare, "TOKENS_A_BATCH", 8)
    lengths = [3, 5, 1, 2, 8, 4]
    assert list(compare._cuts(lengths)) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    rows = [np.arange(1000, 1000 + n, dtype=np.int32) for n in lengths]
    batches, texts = [], []
    got = compare.run_packed(scree.pack(rows), model, native, batches.append)
    monkeypatch.setattr(compare, "TEXTS_A_BATCH", 4)
    want = compare.run_padded(scree.pack(rows), model, native, texts.append)
    assert (batches, texts) == ([2, 2, 1, 1], [4, 2])
    assert compare.largest_difference(got, want) < 1e-6


def test_padding_is_zeros_behind_the_tokens():
    ids, mask = padded.pad([np.array([5, 6, 7], np.int32), np.array([8], np.int32)])
    np.testing.assert_array_equal(ids, [[5, 6, 7], [8, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [1, 0, 0]])


def test_a_difference_that_is_no_number_is_infinite():
    one, bad = (compare.Way(np.array([[x]], np.float32), 1, 1, 1.0) for x in (1, np.nan))
    assert compare.largest_difference(one, bad) == float("inf")
    assert compare.largest_difference(one, one) == 0


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_a_picture_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture{suffix}"
    lengths = np.random.default_rng(0).integers(2, 257, 70)
    picture.draw(lengths, compare.padded_places(lengths), path)
    assert path.stat().st_size > 5000


def test_a_picture_of_one_text(tmp_path):
    pytest.importorskip("matplotlib")
    picture.draw(np.array([3]), 3, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
