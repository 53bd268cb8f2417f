"""The collator: beside transformers' own where the options are both's, and by itself where they are not."""

import importlib.util
import pickle
import sys

import numpy as np
import pytest

import scree
from expect import raises
from scree.hf import collator

HAS_TORCH = importlib.util.find_spec("torch") is not None
ROWS = [[5, 6, 7], [8], [9, 10, 11, 12]]
FEATURES = [{"input_ids": row} for row in ROWS]


def collate(features, **options):
    return collator(return_tensors="np", **options)(features)


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with raises(ImportError, "scree.hf.collator: needs torch, which cannot be imported", 'pip install "scree[hf]"'):
        collator()(FEATURES)
    assert collate(FEATURES)["input_ids"].shape == (1, 8)


def assert_same(ours, theirs):
    """Require the same keys in the same order, types, dtypes and values."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert type(ours[name]) is type(value)
        if not isinstance(value, int):
            assert ours[name].dtype == value.dtype
            assert ours[name].shape == value.shape
            assert ours[name].tolist() == value.tolist(), name
        else:
            assert ours[name] == value, name


@pytest.mark.hf
@pytest.mark.parametrize("tensors", ["pt", "np"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_position_ids": False},
        {"return_seq_idx": True, "return_flash_attn_kwargs": True, "separator_id": -7},
    ],
    ids=repr,
)
@pytest.mark.parametrize("labels", [False, True])
def test_as_transformers_does(tensors, options, labels):
    from transformers import DataCollatorWithFlattening

    features = [f | ({"labels": [x + 1 for x in f["input_ids"]]} if labels else {}) for f in FEATURES]
    theirs = DataCollatorWithFlattening(return_tensors=tensors, **options)(features)
    ours = collator(**{"return_flash_attn_kwargs": False, "return_tensors": tensors, **options})(features)
    assert_same(ours, theirs)


@pytest.mark.hf
def test_as_transformers_5_does():
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("4.57 numbers positions from 0, and does not leave empty sequences out")
    features = [{"input_ids": []}, *FEATURES, {"input_ids": np.array([3, 4])}]
    options = {"position_ids_start": 2, "return_flash_attn_kwargs": True, "return_seq_idx": True}
    theirs = transformers.DataCollatorWithFlattening(**options)(features)
    assert_same(collator(**options)(features), theirs)
    with pytest.raises(ValueError, match="empty"):
        transformers.DataCollatorWithFlattening()([{"input_ids": []}])


def test_the_batch():
    batch = collate(FEATURES, return_seq_idx=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 10, 11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]
    assert batch["cu_seq_lens_k"] is batch["cu_seq_lens_q"]
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert "attention_mask" not in batch


@pytest.mark.skipif(not HAS_TORCH, reason="no torch")
def test_the_batch_is_the_callers_own():
    rows = [np.array(row) for row in ROWS]
    batch = collator()(rows)
    batch["input_ids"].zero_()
    batch["labels"].zero_()
    assert rows[0].tolist() == ROWS[0]
    arr = scree.pack(rows)
    batch = collator()(arr)
    batch["input_ids"].zero_()
    assert arr.values.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]


def test_features_of_every_kind(xp):
    expected = collate(FEATURES)
    for dtype in ("int32", "uint8"):
        rows = [xp.array(np.array(row), dtype) for row in ROWS]
        assert_same(collate(rows), expected)
        assert_same(collate([{"input_ids": row} for row in rows]), expected)
        assert_same(collate([rows[0], *ROWS[1:]]), expected)
        assert_same(collate(scree.pack(rows)), expected)
        assert_same(collate({"input_ids": scree.pack(rows)}), expected)
        assert_same(collate({"input_ids": scree.pack(rows), "labels": scree.pack(rows)}), expected)
        assert_same(collate(scree.with_capacity(scree.pack(rows), 3, 20)), expected)
    assert_same(collate(iter(tuple(row) for row in ROWS)), expected)


def test_labels():
    features = [{"input_ids": row, "labels": [x * 2 for x in row]} for row in ROWS]
    assert collate(features)["labels"].tolist() == [[-100, 12, 14, -100, -100, 20, 22, 24]]
    again = collator(return_tensors="np")(features, separator_id=-1)
    assert again["labels"].tolist() == [[-1, 12, 14, -1, -1, 20, 22, 24]]
    assert features[0]["labels"] == [10, 12, 14]


def test_empty_sequences():
    rows = [[], *ROWS[:2], [], ROWS[2], []]
    assert_same(collate(rows, return_seq_idx=True), collate(ROWS, return_seq_idx=True))
    kept = collate(rows, return_seq_idx=True, keep_empty=True)
    assert kept["cu_seq_lens_q"].tolist() == [0, 0, 3, 4, 4, 8, 8]
    assert kept["seq_idx"].tolist() == [[1, 1, 1, 2, 4, 4, 4, 4]]
    assert kept["labels"].tolist() == collate(ROWS)["labels"].tolist()
    assert collate([[], []], keep_empty=True)["input_ids"].shape == (1, 0)


def test_fields():
    features = [{"input_ids": row, "token_type_ids": [0] * (len(row) - 1) + [1]} for row in ROWS]
    batch = collate(features, fields=["token_type_ids"], total_length=10)
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0, 0, 1, 0, 0]]
    assert batch["token_type_ids"].dtype == np.int64
    assert "token_type_ids" not in collate([f | {"token_type_ids": [0] * len(f["input_ids"])} for f in features])


def test_multiple():
    batch = collate(FEATURES, pad_to_multiple_of=5, pad_token_id=9, position_ids_start=2, return_seq_idx=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 9, 9]]
    assert batch["labels"].tolist()[0][-2:] == [-100, -100]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 2, 3, 4, 5, 2, 2]]
    assert batch["seq_idx"].tolist()[0][-3:] == [2, 3, 3]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]
    assert batch["max_length_q"] == 4
    assert collate(FEATURES, pad_to_multiple_of=4)["input_ids"].shape == (1, 8)


def test_capacity():
    fixed = collator(return_tensors="np", total_length=12, batch_size=5, return_seq_idx=True, separator_id=-1)
    batches = [fixed(FEATURES), fixed([[1] * 12]), fixed([[1], [2], [3], [4], [5]])]
    shapes = [{name: getattr(x, "shape", x) for name, x in batch.items()} for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2]
    first = batches[0]
    assert first["cu_seq_lens_q"].tolist() == [0, 3, 4, 8, 8, 8]
    assert first["max_length_q"] == 12
    assert first["labels"].tolist() == [[-1, 6, 7, -1, -1, 10, 11, 12, -100, -100, -100, -100]]
    assert first["seq_idx"].tolist()[0][8:] == [5] * 4
    assert collate(FEATURES, total_length=12, max_length=6)["max_length_k"] == 6


def test_a_capacity_is_the_layout_of_with_capacity():
    batch = collate(FEATURES, total_length=12, batch_size=5)
    arr = scree.with_capacity(scree.pack([np.array(row) for row in ROWS]), 5, 12)
    assert batch["input_ids"][0].tolist() == arr.values.tolist()
    assert batch["cu_seq_lens_q"].tolist() == arr.offsets.tolist()


@pytest.mark.hf
def test_a_capacity_is_compiled_once():
    import torch
    import transformers

    scree.hf.register()
    options = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, attn_implementation="scree"))
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    fixed, plain = collator(total_length=20, batch_size=4), collator()
    for features in (FEATURES, ROWS[::-1], [[1] * 9, [], [2, 3]], [[7, 8]]):
        loss = compiled(**fixed(features), use_cache=False).loss
        torch.testing.assert_close(loss, model(**plain(features), use_cache=False).loss)
    assert len(graphs) == 1


def test_it_can_be_pickled():
    made = collator(return_tensors="np", fields=["token_type_ids"], total_length=20)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    features = [f | {"token_type_ids": f["input_ids"]} for f in FEATURES]
    assert_same(again(features), made(features))


def test_large_ids_are_kept():
    ids = [2**62, 2**31, 0, -1]
    assert collate([ids])["input_ids"].tolist() == [ids]


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        ([], ValueError, ["no features"]),
        ([[], []], ValueError, ["every sequence", "empty"]),
        ([{"labels": [1]}], ValueError, ["features[0]", "input_ids", "labels"]),
        ([{"input_ids": [1]}, {"labels": [1]}], ValueError, ["features[1]", "input_ids"]),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], ValueError, ["features[1]", "'labels'"]),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], ValueError, ["features[0]", "'labels'"]),
        ([{"input_ids": [1, 2], "labels": [1]}], ValueError, ["features[0]['labels']", "1 values", "has 2"]),
        ([{"input_ids": [1], "labels": 3}], TypeError, ["features[0]['labels']", "int"]),
        ([{"input_ids": [1], "labels": None}], TypeError, ["features[0]['labels']", "None"]),
        ([{"input_ids": [1, 2.5]}], TypeError, ["features[0]['input_ids']", "integers"]),
        ([{"input_ids": [1]}, {"input_ids": [2, None]}], TypeError, ["features[1]['input_ids']", "None", "integers"]),
        ([{"input_ids": [2**64]}], TypeError, ["features[0]['input_ids']", "integers"]),
        ([{"input_ids": [[1, 2]]}], ValueError, ["features[0]['input_ids']", "(1, 2)", "row 0"]),
        ([{"input_ids": np.ones((2, 3), int)}], ValueError, ["(2, 3)"]),
        ([{"input_ids": np.ones(3)}], TypeError, ["float64", "integers"]),
        ([{"input_ids": np.ones(3, np.uint64)}], TypeError, ["uint64", "int64"]),
        (scree.Array(np.ones(3, np.uint64), [0, 3]), TypeError, ["uint64", "int64"]),
        (scree.Array(np.ones(3), [0, 3]), TypeError, ["float64", "integers"]),
        (scree.Array(np.ones((3, 2), int), [0, 3]), ValueError, ["(3, 2)"]),
        ([{"input_ids": np.ones(3, bool)}], TypeError, ["bool", "integers"]),
        ([{"input_ids": "text"}], TypeError, ["features[0]['input_ids']", "str"]),
        ([{"input_ids": [1]}, [2]], TypeError, ["features[1]", "list"]),
        (3, TypeError, ["int", "list of features"]),
        ("text", TypeError, ["str"]),
        (np.ones((2, 3), int), TypeError, ["ndarray", "list of features"]),
        ({"input_ids": [[1], [2]]}, TypeError, ["one mapping", "list"]),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], ValueError, ["features[0]['attention_mask']", "padded"]),
        ([{"input_ids": [1], "attention_mask": [1]}, {"input_ids": [1], "attention_mask": np.array([0])}], ValueError,
         ["features[1]['attention_mask']"]),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], ValueError, ["features[0]['attention_mask']", "1 values"]),
        ([{"input_ids": [1, 2], "token_type_ids": [0, 1]}], ValueError, ["features[0]['token_type_ids']", "fields"]),
        ([{"input_ids": [1, 2], "seq_lengths": [1, 1]}], ValueError, ["seq_lengths", "several sequences"]),
    ],
)  # fmt: skip
def test_bad_features(features, error, words):
    with raises(error, *words):
        collate(features)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"return_tensors": "tf"}, ValueError, ["return_tensors", "tf", "pt"]),
        ({"return_tensors": "np", "total_length": -1}, ValueError, ["total_length", "-1"]),
        ({"return_tensors": "np", "total_length": 2.0}, TypeError, ["total_length", "2.0"]),
        ({"return_tensors": "np", "pad_to_multiple_of": 0}, ValueError, ["pad_to_multiple_of", "1 or more"]),
        ({"return_tensors": "np", "pad_to_multiple_of": 8, "total_length": 64}, ValueError, ["pad_to_multiple_of"]),
        ({"return_tensors": "np", "fields": "token_type_ids"}, TypeError, ["fields", "list"]),
        ({"return_tensors": "np", "position_ids_start": -1}, ValueError, ["position_ids_start"]),
    ],
)  # fmt: skip
def test_bad_options(options, error, words):
    with raises(error, *words):
        collator(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"total_length": 7}, ["8 tokens", "total_length is 7"]),
        ({"batch_size": 2}, ["3 sequences", "batch_size is 2"]),
        ({"max_length": 3}, ["features[2]", "4 tokens", "max_length is 3"]),
        ({"fields": ["token_type_ids"]}, ["features[0]", "token_type_ids", "input_ids"]),
    ],
)  # fmt: skip
def test_above_capacity(options, words):
    with raises(ValueError, *words):
        collate(FEATURES, **options)


def test_the_feature_that_is_too_long_is_counted_as_it_came():
    with raises(ValueError, "features[3]", "max_length is 3"):
        collate([[], [1], [], [1, 2, 3, 4]], max_length=3)
