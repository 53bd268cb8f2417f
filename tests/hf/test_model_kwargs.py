"""The keywords of a packed batch."""

import numpy as np
import pytest

import scree
from expect import raises
from scree.hf import collator, model_kwargs

torch = pytest.importorskip("torch")

ROWS = [[5, 6, 7], [], [9, 10]]


def ids(dtype=torch.int64):
    return scree.pack([torch.tensor(row, dtype=dtype) for row in ROWS])


def test_token_ids():
    arr = ids()
    batch = model_kwargs(arr)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 10]]
    assert batch["input_ids"].data_ptr() == arr.values.data_ptr()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["position_ids"].dtype == torch.int64
    assert batch["cu_seq_lens_q"] is batch["cu_seq_lens_k"]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 3, 5]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["use_cache"] is False
    assert "attention_mask" not in batch
    assert model_kwargs(ids(torch.int32))["input_ids"].dtype == torch.int64


def test_embeddings_are_differentiable():
    values = torch.ones(5, 4, dtype=torch.bfloat16, requires_grad=True)
    batch = model_kwargs(scree.from_lengths(values, [3, 0, 2]))
    assert batch["inputs_embeds"].shape == (1, 5, 4)
    assert batch["inputs_embeds"].dtype == torch.bfloat16
    assert "input_ids" not in batch
    batch["inputs_embeds"].float().sum().backward()
    assert values.grad is not None


def test_of_any_framework(xp):
    arr = scree.pack([xp.array(np.array(row), "int32") for row in ROWS])
    assert model_kwargs(arr)["input_ids"].tolist() == [[5, 6, 7, 9, 10]]


def test_as_the_collator_gives_it():
    arr = ids()
    ours = model_kwargs(arr, labels=arr, seq_idx=True)
    theirs = collator(return_seq_idx=True, keep_empty=True)(arr)
    assert ours.keys() - theirs.keys() == {"use_cache"}
    for name, value in theirs.items():
        if isinstance(value, int):
            assert ours[name] == value
        else:
            assert torch.equal(ours[name], value)
            assert ours[name].dtype == value.dtype


def test_capacity():
    fixed = scree.with_capacity(ids(), 5, 8)
    batch = model_kwargs(fixed, labels=fixed.map(lambda x: x + 1), seq_idx=True, max_length=8)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 10, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8, -100, 11, -100, -100, -100]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 3, 5, 5, 5]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 2, 2, 5, 5, 5]]
    assert batch["max_length_q"] == 8
    assert model_kwargs(fixed)["max_length_q"] == 3


def test_wide_offsets_become_int32():
    arr = scree.Array(torch.arange(5), torch.tensor([0, 3, 5]))
    assert arr.offsets.dtype == torch.int64
    assert model_kwargs(arr)["cu_seq_lens_q"].dtype == torch.int32


def test_a_known_length_is_not_looked_for():
    """The offsets on another device are not copied where somebody has said how long the longest sequence is."""
    arr = scree.from_cu_seqlens(torch.arange(5, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta"), 4)
    assert model_kwargs(arr)["max_length_q"] == 4
    bare = scree.Array(torch.arange(5, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta"))
    assert model_kwargs(bare, max_length=7)["max_length_q"] == 7
    with pytest.raises(NotImplementedError):  # meta tensors have nothing to copy
        model_kwargs(bare)


def test_under_a_compiler():
    def longest(arr):
        batch = model_kwargs(arr)
        return batch["max_length_q"], batch["position_ids"] + batch["input_ids"]

    compiled = torch.compile(longest, fullgraph=True, backend="eager")
    bound, places = compiled(ids())
    assert bound >= 3
    assert places.tolist() == [[5, 7, 9, 9, 11]]


def test_positions_start():
    assert model_kwargs(ids(), position_ids_start=2)["position_ids"].tolist() == [[2, 3, 4, 2, 3]]


@pytest.mark.hf
def test_what_a_model_says():
    import transformers

    small = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 20,
    }
    if int(transformers.__version__.split(".")[0]) >= 5:
        roberta = transformers.RobertaModel(transformers.RobertaConfig(**small, pad_token_id=1))
        bert = transformers.BertModel(transformers.BertConfig(**small))
        assert model_kwargs(ids(), model=roberta)["position_ids"].tolist() == [[2, 3, 4, 2, 3]]
        assert model_kwargs(ids(), model=bert)["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    else:
        bert = transformers.BertModel(transformers.BertConfig(**small))
        with raises(ValueError, "BertModel", "cu_seq_lens_q", "newer transformers"):
            model_kwargs(ids(), model=bert)
    llama = transformers.LlamaModel(transformers.LlamaConfig(**small))
    assert model_kwargs(ids(), model=llama)["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    t5 = transformers.T5Model(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=20))
    with raises(ValueError, "T5Model", "encoder and a decoder"):
        model_kwargs(ids(), model=t5)


def test_bad_arguments():
    arr = ids()
    with raises(TypeError, "model_kwargs", "Tensor", "scree.Array"):
        model_kwargs(torch.arange(3))
    with raises(TypeError, "(5,)", "float32", "token ids"):
        model_kwargs(arr.map(torch.Tensor.float))
    with raises(TypeError, "(5, 2)", "int64"):
        model_kwargs(arr.map(lambda x: torch.stack([x, x], 1)))
    with raises(TypeError, "ragged_dim=1"):
        model_kwargs(scree.Array(torch.ones(2, 3), [0, 3], ragged_dim=1))
    with raises(ValueError, "max_length", "2", "3"):
        model_kwargs(arr, max_length=2)
    with raises(ValueError, "labels", "structure"):
        model_kwargs(arr, labels=scree.from_lengths(torch.arange(5), [2, 1, 2]))
    with raises(ValueError, "labels", "structure"):
        model_kwargs(arr, labels=scree.from_lengths(torch.arange(4), [2, 0, 2]))
    with raises(TypeError, "labels", "integer"):
        model_kwargs(arr, labels=arr.map(torch.Tensor.float))
    with raises(TypeError, "labels", "Tensor"):
        model_kwargs(arr, labels=arr.values)
