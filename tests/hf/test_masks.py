"""What the mask and the positions of a batch mean, and what is refused instead of guessed."""

import pytest

pytest.importorskip("transformers")

import torch
import zoo

from expect import raises
from scree.hf import _attention, _layouts, _mask_tensor, _positions

pytestmark = pytest.mark.hf
five = pytest.mark.skipif(not zoo.FIVE, reason="encoders of transformers 4 do not use the attention interface")


def logits(name, implementation="scree", **inputs):
    model = zoo.make(name)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs)[0]


def without_offsets(batch):
    return {key: batch[key] for key in ("input_ids", "position_ids")}


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=five)])
def test_a_mask_with_holes_keeps_what_it_says(name):
    batch = zoo.padded(name, "holes")
    assert (batch.inputs["attention_mask"].diff() > 0).sum() > len(zoo.LENGTHS)
    zoo.assert_rounding(logits(name, **batch.inputs)[batch.tokens], logits(name, "eager", **batch.inputs)[batch.tokens])


def test_padding_gets_nothing():
    model = zoo.make("llama")
    model.set_attn_implementation("scree")
    seen = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, given, out: seen.append(given[0]))
    batch = zoo.padded("llama", "left")
    model(**batch.inputs)
    hook.remove()
    assert (seen[0][~batch.tokens] == 0).all()
    assert (seen[0][batch.tokens] != 0).all()


def test_a_row_without_tokens():
    batch = zoo.padded("llama")
    batch.inputs["attention_mask"][1] = 0
    tokens = batch.inputs["attention_mask"].bool()
    zoo.assert_rounding(logits("llama", **batch.inputs)[tokens], logits("llama", "eager", **batch.inputs)[tokens])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_packing_is_found_in_positions_that_begin_anew(name, options):
    batch = zoo.packed(name)
    zoo.assert_rounding(logits(name, **without_offsets(batch), **options), logits(name, **batch))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_packing_is_found_in_every_row(options):
    ids = torch.randint(3, zoo.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    out = logits("llama", input_ids=ids, position_ids=positions, **options)
    for row, cut in ((0, 3), (1, 1)):
        for part in (slice(0, cut), slice(cut, 6)):
            zoo.assert_rounding(out[row, part], logits("llama", input_ids=ids[row : row + 1, part])[0])


@pytest.mark.parametrize(
    "positions", [[0, 1, 2, 5, 6], [5, 6, 7, 0, 1], [0, 1, 1, 2, 3]], ids=["a jump", "a lower start", "a repeat"]
)
def test_positions_that_could_mean_two_things(positions):
    for options in ({}, {"use_cache": False}):
        with raises(ValueError, "position_ids jump in the middle of a row", "pass cu_seq_lens_q"):
            logits("llama", input_ids=torch.arange(3, 8)[None], position_ids=torch.tensor([positions]), **options)


def test_positions_that_begin_anew_in_a_row_of_a_mask():
    batch = without_offsets(zoo.packed("llama"))
    with raises(ValueError, "position_ids begin anew within a row", "leave attention_mask out"):
        logits("llama", **batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_positions_that_begin_anew_after_a_cache():
    import transformers

    ids = torch.arange(3, 9)[None]
    past = transformers.DynamicCache(config=zoo.make("llama").config)
    logits("llama", input_ids=ids[:, :2], **zoo.cached(past, 0, 2))
    with raises(ValueError, "position_ids jump"):
        logits("llama", input_ids=ids[:, 2:], position_ids=torch.tensor([[2, 3, 0, 1]]), **zoo.cached(past, 2, 6))


@five
def test_a_mask_that_forgets_the_cache():
    import transformers

    ids = torch.arange(3, 9)[None]
    past = transformers.DynamicCache(config=zoo.make("llama").config)
    logits("llama", input_ids=ids[:, :4], **zoo.cached(past, 0, 4))
    with raises(
        ValueError, "attention_mask has 2 columns; needs 6: 4 of the tokens in the cache, and 2 of the new ones"
    ):
        logits("llama", input_ids=ids[:, 4:], attention_mask=torch.ones(1, 2), **zoo.cached(past, 4, 6))


def test_positions_that_contradict_the_offsets():
    batch = zoo.packed("llama")
    total = batch["input_ids"].shape[1]
    wrong = batch["position_ids"].clone()
    wrong[0, 9] = 0
    with raises(
        ValueError, "position_ids contradict cu_seq_lens_q: within sequence 2 (8 to 21) position 0 is followed by 0"
    ):
        logits("llama", **batch | {"position_ids": wrong})
    with raises(ValueError, "they run on through all 4 sequences; they have to begin anew in each"):
        logits("llama", **batch | {"position_ids": torch.arange(total)[None]})
    with raises(ValueError, "position_ids has shape (1, 3) for 25 packed tokens"):
        _positions.expect_packed(torch.zeros(1, 3), _layouts.of_offsets("x", batch["cu_seq_lens_q"], total).places)


def test_offsets_that_are_wrong():
    batch = zoo.packed("llama")
    for offsets, error, words in (
        ([0, 7, 8, 21, 26], ValueError, "cu_seq_lens_q of a packed batch of 25 tokens: offsets[-1]: got 26"),
        ([1, 7, 8, 21, 25], ValueError, "offsets[0]: got 1"),
        ([0, 8, 7, 21, 25], ValueError, "offsets must never fall"),
        ([0.0, 25.0], TypeError, "cu_seq_lens_q of a packed batch of 25 tokens: cu_seq_lens_q: got dtype float32"),
    ):
        given = torch.tensor(offsets)
        with raises(error, words):
            logits("llama", **batch | {"cu_seq_lens_q": given, "cu_seq_lens_k": given})
    with raises(ValueError, "max_length_k is missing; a packed batch needs cu_seq_lens_q"):
        logits("llama", **{key: value for key, value in batch.items() if key != "max_length_k"})
    twice = {key: value.expand(2, -1) for key, value in without_offsets(batch).items()}
    with raises(ValueError, "the batch has 2 rows beside cu_seq_lens_q; needs 1"):
        logits("llama", **batch | twice)


def test_offsets_that_are_written_to_are_looked_at_again():
    batch = zoo.packed("llama")
    offsets = batch["cu_seq_lens_q"].clone()
    batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "position_ids": batch["position_ids"].clone()}
    before = logits("llama", **batch)
    offsets.copy_(torch.tensor([0, 5, 10, 20, 25]))
    batch["position_ids"].copy_(torch.cat([torch.arange(n) for n in (5, 5, 10, 5)]))
    after = logits("llama", **batch)
    assert (before[0, 5:] != after[0, 5:]).any()
    fresh = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    zoo.assert_rounding(after, logits("llama", **fresh))


@pytest.mark.parametrize("spare", [1, 6])
def test_spare_tokens_belong_to_no_sequence(spare):
    batch = zoo.packed("gemma2")
    padded = {key: torch.nn.functional.pad(batch[key], (0, spare)) for key in ("input_ids", "position_ids")}
    out = logits("gemma2", **batch | padded)
    zoo.assert_rounding(out[:, :-spare], logits("gemma2", **batch))


def test_a_mask_beside_a_packed_batch():
    batch = zoo.packed("llama")
    ones = torch.ones_like(batch["input_ids"])
    _attention._warned.discard("mask")
    with pytest.warns(UserWarning, match="attention_mask beside cu_seq_lens_q is all ones, and not needed"):
        out = logits("llama", **batch, attention_mask=ones)
    zoo.assert_rounding(out, logits("llama", **batch))
    ones[0, 3] = 0
    with raises(ValueError, "attention_mask says that a packed batch has padding", "leave attention_mask out"):
        logits("llama", **batch, attention_mask=ones)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_mask_of_one_s_own(side):
    batch = zoo.padded("llama", side)
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    square = torch.ones(4, 1, 13, 13, dtype=torch.bool).tril() & batch.tokens[:, None, None]
    expected = logits("llama", "eager", **batch.inputs)[batch.tokens]
    for mask in (square, torch.zeros(4, 1, 13, 13).masked_fill(~square, -torch.inf)):
        zoo.assert_rounding(
            logits("llama", input_ids=ids, position_ids=positions, attention_mask=mask)[batch.tokens], expected
        )
    prefix = square.clone()
    prefix[2, 0, :4, :4] = True
    with raises(
        NotImplementedError, "a 4-D attention mask that is neither padding nor causal cannot be served", '"sdpa"'
    ):
        logits("llama", input_ids=ids, position_ids=positions, attention_mask=prefix)


@five
def test_a_model_s_own_mask_of_padding_is_served():
    batch = zoo.padded("bert")
    ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
    expected = logits("bert", "eager", **batch.inputs)[batch.tokens]
    keys = batch.tokens[:, None, None]
    for mask in (
        keys,
        keys.expand(-1, 1, 13, -1),
        torch.zeros(4, 1, 1, 13).masked_fill(~keys, torch.finfo(torch.float32).min),
    ):
        out = logits("bert", input_ids=ids, position_ids=positions, attention_mask=mask)[batch.tokens]
        zoo.assert_rounding(out, expected)
    biased = torch.zeros(4, 1, 1, 13).masked_fill(~keys, -1.0)
    with raises(NotImplementedError, "a 4-D attention mask that adds a bias to the scores"):
        logits("bert", input_ids=ids, position_ids=positions, attention_mask=biased)
    with raises(NotImplementedError, "an attention mask of shape (4, 1, 1, 12) for 13 queries and 13 keys"):
        logits("bert", input_ids=ids, position_ids=positions, attention_mask=keys[..., 1:])


@pytest.mark.parametrize("name", ["mistral", pytest.param("bert", marks=five)])
def test_a_copy_of_the_mask_says_the_same(name):
    batch = zoo.padded(name, "left")
    model = zoo.make(name)
    model.set_attn_implementation("scree")
    expected = logits(name, **batch.inputs)[batch.tokens]
    layers = [
        module for module in model.modules() if hasattr(module, "config") and "Attention" in type(module).__name__
    ]

    def copy(module, args, kwargs):
        args = tuple(x.clone() if isinstance(x, _mask_tensor.Mask) else x for x in args)
        return args, {k: x.clone() if isinstance(x, _mask_tensor.Mask) else x for k, x in kwargs.items()}

    hooks = [layer.register_forward_pre_hook(copy, with_kwargs=True) for layer in layers]
    out = logits(name, **batch.inputs)[batch.tokens]
    for hook in hooks:
        hook.remove()
    assert hooks
    zoo.assert_rounding(out, expected)


@pytest.mark.parametrize(("name", "kinds_of_layer"), [("llama", 1), ("gemma3", 2)])
def test_where_the_tokens_are_is_found_once_a_forward_pass(name, kinds_of_layer, monkeypatch):
    found = []

    def spied(make):
        def spy(*given):
            found.append(make.__name__)
            return make(*given)

        return spy

    for maker in (_layouts.of_mask, _layouts.of_offsets, _layouts.of_segments, _layouts.uniform):
        monkeypatch.setattr(_layouts, maker.__name__, spied(maker))
    logits(name, **zoo.padded(name).inputs)
    assert found == ["of_mask"] * kinds_of_layer
    found.clear()
    logits(name, **zoo.packed(name), use_cache=False)
    assert found == ["of_offsets"]


def test_a_packed_batch_is_viewed_and_not_copied(monkeypatch):
    joint = torch.randn(1, 25, 4, 3 * 8)
    q, k, v = (part.transpose(1, 2) for part in joint.split(8, -1))
    seen = []

    def spy(*arrays, **options):
        seen.extend(arr.values for arr in arrays[:3])
        return arrays[0]

    monkeypatch.setattr(_attention.kernels, "varlen_attention", spy)
    module = torch.nn.Module()
    packed = {key: value for key, value in zoo.packed("llama").items() if key != "input_ids"}
    _attention.attention(module, q, k, v, None, **packed)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]
    assert {tuple(x.shape) for x in seen} == {(25, 4, 8)}
