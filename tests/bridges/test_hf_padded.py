"""to_hf_padded, from_hf_padded: the masks of Hugging Face, of either side and with holes."""

import numpy as np
import pytest

import scree
from expect import assert_same_bits, raises
from frameworks import np_dtype

LENGTHS = (0, 3, 1, 5, 0)
OFFSETS = np.array([0, 0, 3, 4, 9, 9])


def make(xp, dtype="float32", features=(2,)):
    shape = (9, *features)
    values = (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(np_dtype(dtype))
    return scree.Array(xp.array(values, dtype), xp.array(OFFSETS, "int32"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_round_trip(xp, any_dtype, side):
    arr = make(xp, any_dtype)
    hidden_states, attention_mask = scree.bridges.to_hf_padded(arr, side)
    assert tuple(hidden_states.shape) == (5, 5, 2)
    assert xp.dtype_of(hidden_states) == any_dtype
    assert xp.dtype_of(attention_mask) == ("int64" if "int64" in xp.dtypes else "int32")
    places = np.arange(5)
    kept = places < np.array(LENGTHS)[:, None] if side == "right" else places >= 5 - np.array(LENGTHS)[:, None]
    np.testing.assert_array_equal(xp.to_np(attention_mask), kept)
    assert not xp.to_np(hidden_states)[~kept].any()
    back = scree.bridges.from_hf_padded(hidden_states, attention_mask)
    assert_same_bits(xp.to_np(back.values), xp.to_np(arr.values))
    np.testing.assert_array_equal(xp.to_np(back.offsets), OFFSETS)


@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_masks_with_holes(xp, kind):
    mask = np.array([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    tokens = np.arange(12).reshape(3, 4)
    arr = scree.bridges.from_hf_padded(xp.array(tokens, "int32"), xp.array(mask.astype(np_dtype(kind)), kind))
    np.testing.assert_array_equal(xp.to_np(arr.values), [1, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(xp.to_np(arr.offsets), [0, 2, 6, 6])


def test_masks_that_are_refused(xp):
    hidden_states = xp.array(np.ones((3, 4, 2), np.float32), "float32")
    for shape in ((4, 4), (3, 3), (12,), (3, 4, 2), (1, 4)):
        with raises(ValueError, "mask", str(shape), "(3, 4)"):
            scree.bridges.from_hf_padded(hidden_states, xp.array(np.ones(shape, np.int32), "int32"))
    for bad in (2, -1, 255):
        mask = np.ones((3, 4), np.int32)
        mask[2, 1] = bad
        with raises(ValueError, "mask", bad, "[2, 1]", "0 and 1"):
            scree.bridges.from_hf_padded(hidden_states, xp.array(mask, "int32"))
    additive = np.zeros((3, 4), np.float32)
    additive[0, 3] = np.finfo(np.float32).min
    with raises(ValueError, "mask", "[0, 3]"):
        scree.bridges.from_hf_padded(hidden_states, xp.array(additive, "float32"))


def test_gradients(grad_xp):
    xp = grad_xp
    arr = make(xp)
    weights = np.random.default_rng(0).standard_normal((5, 5, 2)).astype(np.float32)

    def loss(values):
        hidden_states, _ = scree.bridges.to_hf_padded(arr.with_values(values), "left")
        return (hidden_states * xp.array(weights, "float32")).sum()

    (grad,) = xp.eager_grad(loss, arr.values)
    _, mask = scree.bridges.to_hf_padded(arr, "left")
    np.testing.assert_array_equal(grad, weights[xp.to_np(mask).astype(bool)])


def test_spare_values_do_not_leave(xp):
    full = scree.with_capacity(make(xp), 7, 12)
    hidden_states, attention_mask = scree.bridges.to_hf_padded(full)
    assert tuple(hidden_states.shape) == (7, 5, 2)
    assert int(xp.to_np(attention_mask).sum()) == 9


def test_what_the_tokenizer_of_transformers_pads():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    del torch
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"])}
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for side in ("left", "right"):
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", padding_side=side)
        batch = fast(["a b c", "b", "c a"], padding=True, return_tensors="pt")
        arr = scree.bridges.from_hf_padded(batch["input_ids"], batch["attention_mask"])
        assert [row.tolist() for row in arr] == [[5, 6, 7], [6], [7, 5]]
        hidden_states, attention_mask = scree.bridges.to_hf_padded(arr, side)
        assert (hidden_states == batch["input_ids"]).all()
        assert (attention_mask == batch["attention_mask"]).all()
        assert attention_mask.dtype == batch["attention_mask"].dtype


def test_gradients_of_the_way_back(grad_xp):
    xp = grad_xp
    mask = xp.array(np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1]], np.int32), "int32")
    padded = np.arange(18.0, dtype=np.float32).reshape(3, 3, 2)

    def loss(hidden_states):
        packed = scree.bridges.from_hf_padded(hidden_states, mask).values
        return (packed * packed).sum()

    (grad,) = xp.eager_grad(loss, xp.array(padded))
    np.testing.assert_array_equal(grad, 2 * padded * xp.to_np(mask)[:, :, None])


def test_arguments_that_are_refused(xp):
    with raises(ValueError, "side", "'middle'"):
        scree.bridges.to_hf_padded(make(xp), "middle")
    with raises(ValueError, "to_hf_padded", "ragged_dim", 1):
        scree.bridges.to_hf_padded(scree.Array(xp.array(np.ones((2, 3))), xp.array([0, 3], "int32"), 1))
    with raises(TypeError, "to_hf_padded", "scree.Array"):
        scree.bridges.to_hf_padded(xp.array(np.ones((2, 3))))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_model_of_transformers_agrees(side):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    unpadding = pytest.importorskip("transformers.modeling_flash_attention_utils")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    tokens = scree.pack([torch.tensor([3, 4, 5]), torch.tensor([6]), torch.tensor([7, 8])])
    input_ids, attention_mask = scree.bridges.to_hf_padded(tokens, side)
    positions = scree.to_padded(tokens.with_values(scree.position_ids(tokens).long()), side)[0]
    with torch.no_grad():
        padded = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).last_hidden_state
        rows = [model(input_ids=row[None]).last_hidden_state[0] for row in tokens]
    packed = scree.bridges.from_hf_padded(padded, attention_mask)
    for got, alone in zip(packed, rows, strict=True):
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
    indices, cu_seqlens, longest = unpadding._get_unpad_data(attention_mask)
    assert torch.equal(cu_seqlens, packed.offsets)
    assert int(longest) == packed.max_length
    assert torch.equal(padded.flatten(0, 1)[indices], packed.values)
