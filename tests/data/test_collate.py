"""Collating samples: every kind of field, on every framework, in worker processes, and for compilers."""

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import pytest

import scree
from expect import raises
from scree.data import Corpus, collate, save, token_batches

HAS_TORCH = importlib.util.find_spec("torch") is not None


class Pair(NamedTuple):
    """A sample of two fields."""

    left: Any
    right: Any


def rows_of(arr, xp):
    return [xp.to_np(row).tolist() for row in arr]


def test_nested_fields_of_every_kind(xp):
    samples = [
        {"ids": [5, 6, 7], "meta": {"w": xp.array(np.ones((3, 2)), "float32"), "name": "a"}, "label": 1, "on": True},
        {"ids": [], "meta": {"w": xp.array(np.ones((0, 2)), "float32"), "name": "b"}, "label": 2, "on": False},
        {"ids": [8], "meta": {"w": xp.array(np.ones((1, 2)), "float32"), "name": "c"}, "label": 3, "on": True},
    ]
    batch = collate(samples, xp.name)
    assert rows_of(batch["ids"], xp) == [[5, 6, 7], [], [8]]
    assert batch["meta"]["w"].feature_shape == (2,)
    assert batch["meta"]["w"].offsets is batch["ids"].offsets
    assert batch["meta"]["name"] == ["a", "b", "c"]
    for name, expected in (("label", [1, 2, 3]), ("on", [True, False, True])):
        assert xp.is_array(batch[name])
        assert xp.to_np(batch[name]).tolist() == expected
    wide = "int32" if xp.name in ("jax", "mlx") else "int64"
    assert xp.dtype_of(batch["ids"].values) == xp.dtype_of(batch["label"]) == wide


def test_numpy_rows_become_any_framework(xp, any_dtype):
    numpy = [np.array([1, 0, 1]), np.array([0])]
    rows = [xp.to_np(xp.array(row, any_dtype)) for row in numpy] if any_dtype != "bfloat16" else numpy
    rows = (
        [row.astype(any_dtype) for row in rows] if any_dtype != "bfloat16" else [np.asarray(r, "float32") for r in rows]
    )
    batch = collate(rows, xp.name)
    assert rows_of(batch, xp) == [[1, 0, 1], [0]]
    assert xp.dtype_of(batch.values) == ("float32" if any_dtype == "bfloat16" else any_dtype).replace("bool_", "bool")


def test_rows_of_the_framework(xp, any_dtype):
    batch = collate([xp.array([1, 0, 1], any_dtype), xp.array([0], any_dtype)], xp.name)
    assert rows_of(batch, xp) == [[1, 0, 1], [0]]
    assert xp.dtype_of(batch.values) == any_dtype


def test_tuples_named_tuples_and_bare_rows(xp):
    both = collate([([1, 2], 0.5), ([3], 1.5)], xp.name)
    assert rows_of(both[0], xp) == [[1, 2], [3]]
    assert xp.to_np(both[1]).tolist() == [0.5, 1.5]
    named = collate([Pair([1], {"x": [2]}), Pair([3], {"x": []})], xp.name)
    assert type(named) is Pair
    assert rows_of(named.right["x"], xp) == [[2], []]
    assert rows_of(collate([[1, 2], []], xp.name), xp) == [[1, 2], []]


def test_dense_fields_and_scalars(xp):
    samples = [
        {"image": xp.array(np.full((2, 3), i), "float32"), "s": xp.array(i, "int32"), "n": np.int16(i), "v": [i, i]}
        for i in range(3)
    ]
    batch = collate(samples, xp.name, dense=["image", "v"])
    assert tuple(batch["image"].shape) == (3, 2, 3)
    assert xp.to_np(batch["image"])[:, 1, 2].tolist() == [0, 1, 2]
    assert xp.to_np(batch["s"]).tolist() == xp.to_np(batch["n"]).tolist() == [0, 1, 2]
    assert xp.dtype_of(batch["s"]) == "int32"
    assert xp.dtype_of(batch["n"]) == "int16"
    assert tuple(batch["v"].shape) == (3, 2)


def test_capacity_gives_one_shape(xp):
    def batch(lengths):
        samples = [{"ids": list(range(n)), "x": {"w": np.ones((2 * n, 3), np.float32)}, "y": n} for n in lengths]
        return collate(samples, xp.name, capacity=(4, {"ids": 16, "x.w": 32}))

    for lengths in ([1, 2, 3], [16], [0, 0, 0, 0]):
        made = batch(lengths)
        assert tuple(made["ids"].values.shape) == (16,)
        assert tuple(made["x"]["w"].values.shape) == (32, 3)
        assert tuple(made["ids"].offsets.shape) == tuple(made["x"]["w"].offsets.shape) == (5,)
        assert rows_of(made["ids"], xp)[: len(lengths)] == [list(range(n)) for n in lengths]
        assert xp.to_np(made["y"]).tolist() == lengths + [0] * (4 - len(lengths))


def test_one_compilation_for_all_batches_of_jax():
    jax = pytest.importorskip("jax")
    traces = []

    @jax.jit
    def step(batch):
        traces.append(1)
        sums = jax.ops.segment_sum(batch["x"].values, scree.segment_ids(batch["x"]), batch["x"].batch_size)
        return sums.sum() + batch["y"].sum()

    lengths = np.random.default_rng(0).integers(0, 9, 60).tolist()
    total = 0.0
    for rows in token_batches(lengths, 24):
        samples = [{"x": np.ones(lengths[i], np.float32), "y": float(i)} for i in rows]
        total += float(step(collate(samples, "jax", capacity=(60, 24))))
    assert total == sum(lengths) + sum(range(60))
    assert len(traces) == 1


def test_lists_are_joined_at_once_and_nested_lists_are_rows_of_features(xp):
    assert rows_of(collate([[[1, 2], [3, 4]], [[5, 6]]], xp.name), xp) == [[[1, 2], [3, 4]], [[5, 6]]]
    assert rows_of(collate([[1, 2], [0.5]], xp.name), xp) == [[1, 2], [0.5]]
    assert rows_of(collate([[], []], xp.name), xp) == [[], []]


class Samples:
    """A dataset of all kinds of rows."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        import torch

        row = {"t": torch.arange(i), "n": np.arange(2 * i).reshape(i, 2), "l": list(range(i)), "y": i}
        return {**row, "nested": {"f": np.full(i + 1, 0.5)}}


def checked_collate(samples):
    """Collate in a worker, and see that what is sent lies in shared memory already."""
    batch = collate(samples)
    for arr in (batch["t"], batch["n"], batch["l"], batch["nested"]["f"]):
        assert arr.values.is_shared()
    return batch


@pytest.mark.skipif(not HAS_TORCH, reason="torch not installed")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("context", [None, "spawn"])
def test_workers_of_the_dataloader_share_memory(context):
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Samples(), batch_size=6, num_workers=2, collate_fn=checked_collate, multiprocessing_context=context
    )
    seen = []
    for batch in loader:
        assert batch["t"].values.is_shared()
        assert [row.tolist() for row in batch["l"]] == [list(range(i)) for i in batch["y"].tolist()]
        assert batch["n"].feature_shape == (2,)
        assert batch["n"].offsets.tolist() == batch["t"].offsets.tolist()
        assert [len(row) for row in batch["nested"]["f"]] == [i + 1 for i in batch["y"].tolist()]
        seen += batch["y"].tolist()
    assert seen == list(range(24))


@pytest.mark.skipif(not HAS_TORCH, reason="torch not installed")
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
def test_a_mapped_corpus_in_workers_by_token_batches(tmp_path):
    import torch
    from torch.utils.data import DataLoader

    lengths = np.random.default_rng(0).integers(0, 30, 80)
    ids = scree.from_lengths(np.arange(lengths.sum()), lengths)
    save(tmp_path / "a.safetensors", {"ids": ids, "label": np.arange(80)})
    rows = Corpus(tmp_path / "a.safetensors")
    batches = token_batches(rows.lengths("ids"), 100)
    seen = {}
    for batch in DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=2):
        assert batch["ids"].total_length <= 100
        for label, row in zip(batch["label"].tolist(), batch["ids"], strict=True):
            seen[label] = row
    assert sorted(seen) == list(range(80))
    assert all(torch.equal(seen[i], torch.from_numpy(ids[i])) for i in seen)


@pytest.mark.skipif(not HAS_TORCH, reason="torch not installed")
def test_gradients_go_through():
    import torch

    rows = [torch.ones(n, requires_grad=True) for n in (2, 3)]
    scree.kernels.varlen_reduce(collate(rows), "sum").sum().backward()
    assert [row.grad.tolist() for row in rows] == [[1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("samples", "options", "error", "words"),
    [
        ([], {}, ValueError, ("collate: got no samples",)),
        ("abc", {}, TypeError, ("collate: got str; needs a list of samples",)),
        (iter([]), {}, TypeError, ("collate: got list_iterator",)),
        ([{"a": [1]}, {"a": [1], "b": 2}], {}, ValueError, ("collate: sample 1 has the field 'b', which sample 0 lacks",)),
        ([{"x": {"a": 1}}, {"x": {}}], {}, ValueError, ("collate: sample 1 lacks the field 'x.a', which sample 0 has",)),
        ([{"a": [1]}, [1]], {}, TypeError, ("collate: sample 1 is list, sample 0 has a dictionary",)),
        ([{"a": [1]}, {"a": None}], {}, ValueError, ("collate: sample 1, field 'a', is null",)),
        ([{"a": [1]}, {"a": [1, None]}], {}, TypeError, ("collate: sample 1, field 'a', has null among its numbers",)),
        ([{"a": [1]}, {"a": ["x"]}], {}, TypeError, ("collate: sample 1, field 'a', has str among its numbers",)),
        ([{"a": [1]}, {"a": [[1, 2]]}], {}, ((TypeError, ValueError)), ("sample", "'a'")),
        ([{"a": [[1], [1, 2]]}], {}, TypeError, ("collate: sample 0, field 'a', has list among its numbers",)),
        ([{"a": [1]}, {"a": 1}], {}, TypeError, ("collate: sample 1, field 'a', is int, sample 0 has a list",)),
        ([{"a": 1}, {"a": [1]}], {}, TypeError, ("collate: sample 1, field 'a', is list, sample 0 has int",)),
        ([{"a": 1}, {"a": 1.5}], {}, TypeError, ("collate: sample 1, field 'a', is float, sample 0 has int",)),
        ([{"a": "x"}, {"a": 1}], {}, TypeError, ("collate: sample 1, field 'a', is int, sample 0 has a text",)),
        ([{"a": object()}], {}, TypeError, ("collate: sample 0, field 'a', is object; needs an array, a list",)),
        ([([1], 2), ([1],)], {}, TypeError, ("collate: sample 1 is tuple, sample 0 has a tuple of 2",)),
        ([{"a": np.ones(2)}, {"a": np.ones(2, "f4")}], {}, TypeError, ("the field 'a'", "sample[1] has dtype float32")),
        ([{"a": np.ones((2, 3))}, {"a": np.ones((2, 4))}], {}, ValueError, ("the field 'a'", "sample[1]", "(4,)")),
        ([{"a": np.ones(2)}, {"a": np.ones(3)}], {"dense": ["a"]}, ValueError,
         ("collate: sample 1, field 'a', has shape (3,), sample 0 has (2,); a dense field needs one",)),
        ([np.ones(2), np.ones(2, "f4")], {}, TypeError, ("collate: sample[1] has dtype float32, sample[0] has float64",)),
        ([[1, 2, 3]], {"capacity": (1, 2)}, ValueError, ("collate: the batch is above the capacity",)),
        ([{"a": [1]}], {"dense": ["b"]}, ValueError, ("dense: got 'b', which the samples do not have; they have 'a'",)),
        ([{"a": [1]}], {"dense": "a"}, TypeError, ("dense: got 'a'; needs a list of names",)),
        ([{"a": [1, 2, 3]}], {"capacity": (1, 2)}, ValueError, ("the field 'a' is above the capacity", "got 2")),
        ([{"a": 1}, {"a": 1}], {"capacity": (1, 2)}, ValueError, ("capacity[0] is 1, but there are 2 samples",)),
        ([{"a": [1]}], {"capacity": 8}, TypeError, ("capacity: got 8; needs a pair, (rows, tokens)",)),
        ([{"a": [1]}], {"capacity": (0, 8)}, ValueError, ("capacity[0]: got 0; needs 1 or more",)),
        ([{"a": [1]}], {"capacity": (1, {"b": 8})}, ValueError, ("capacity: it has no number of tokens for the field 'a'",)),
        ([{"a": [1]}], {"framework": "numpi"}, ValueError, ("framework: got 'numpi'; needs one of 'numpy', 'torch'",)),
    ],
)  # fmt: skip
def test_bad_samples(samples, options, error, words):
    with raises(error, *words):
        collate(samples, **{"framework": "numpy", **options})
