"""Outputs as Arrays, and one vector a sequence."""

import numpy as np
import pytest

import scree
from expect import assert_close, raises
from scree.hf import pool

LENGTHS = (3, 0, 1, 4)


def tokens(xp, dtype="float32", lengths=LENGTHS, features=(2,)):
    values = np.random.default_rng(0).standard_normal((sum(lengths), *features))
    return scree.Array(xp.array(values, dtype), xp.array(np.cumsum([0, *lengths]), "int32"))


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("features", [(), (2,), (2, 3)])
def test_pooling(xp, floating, how, features):
    arr = tokens(xp, floating, features=features)
    pooled = pool(arr, how)
    assert xp.dtype_of(pooled) == floating
    rows = [np.asarray(xp.to_np(row), np.float64) for row in arr]
    expected = np.full((4, *features), np.nan)
    for i, row in enumerate(rows):
        if len(row):
            expected[i] = {"mean": row.mean(0), "first": row[0], "last": row[-1]}[how]
    assert_close(np.asarray(xp.to_np(pooled), np.float64), expected, floating)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_what_an_empty_sequence_is(xp, how):
    arr = tokens(xp)
    pooled = xp.to_np(pool(arr, how, empty=0.5))
    assert pooled[1].tolist() == [0.5, 0.5]
    assert np.isfinite(pooled).all()
    for lengths in ((0, 0), ()):
        empty = xp.to_np(pool(tokens(xp, lengths=lengths), how))
        assert empty.shape == (len(lengths), 2)
        assert np.isnan(empty).all()
    ends = xp.to_np(pool(tokens(xp, lengths=(0, 3, 0)), how, empty=0.0))
    assert ends[0].tolist() == ends[2].tolist() == [0, 0]


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_spare_rows_and_tokens(xp, how):
    arr = tokens(xp)
    fixed = scree.with_capacity(arr, 6, 12)
    expected = xp.to_np(pool(arr, how, empty=0.0))
    pooled = xp.to_np(pool(fixed, how, empty=0.0))
    assert pooled[:4].tolist() == expected.tolist()
    assert pooled[4:].tolist() == [[0, 0], [0, 0]]


def test_gradients_of_pooling():
    torch = pytest.importorskip("torch")
    offsets = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    for how, share in (("mean", [1 / 3, 1 / 3, 1 / 3, 1]), ("first", [1, 0, 0, 1]), ("last", [0, 0, 1, 1])):
        values = torch.ones(4, 2, requires_grad=True)
        pool(scree.Array(values, offsets), how, empty=0.0).sum().backward()
        torch.testing.assert_close(values.grad, torch.tensor(share, dtype=torch.float32)[:, None].expand(4, 2))


def test_bad_pooling():
    arr = scree.Array(np.ones((3, 2)), [0, 3])
    with raises(ValueError, "how", "'max'", "'mean'"):
        pool(arr, "max")
    with raises(TypeError, "int64", "floating"):
        pool(arr.astype("int64"))
    with raises(ValueError, "ragged_dim", "1"):
        pool(scree.Array(np.ones((3, 2)), [0, 2], ragged_dim=1))
    with raises(TypeError, "list", "Array"):
        pool([1, 2])
    with raises(ValueError, "arr="):
        pool(np.ones((1, 3, 2)))
    with raises(ValueError, "last_hidden_state"):
        pool({"logits": arr})
    assert pool(np.ones((1, 3, 2)), arr=arr).tolist() == [[1, 1]]
    assert pool({"last_hidden_state": arr}).tolist() == [[1, 1]]


def outputs(total, hidden=4):
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

    state = torch.arange(total * hidden, dtype=torch.float32).reshape(1, total, hidden)
    return BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=state,
        pooler_output=torch.ones(1, total),  # as wide as there are tokens
        hidden_states=(state, state + 1),
        attentions=(torch.ones(1, total, total, total),),  # as many heads
    )


@pytest.mark.hf
def test_unflatten():
    import torch

    arr = scree.pack([torch.arange(n) for n in (3, 0, 2)])
    out = outputs(5)
    made = scree.hf.unflatten(out, arr)
    assert type(made) is type(out)
    assert made.last_hidden_state.values.data_ptr() == out.last_hidden_state.data_ptr()
    assert made.last_hidden_state.offsets is arr.offsets
    assert made["last_hidden_state"] is made.last_hidden_state is made[0]
    assert [state.feature_shape for state in made.hidden_states] == [(4,), (4,)]
    assert made.hidden_states[1][2].tolist() == out.hidden_states[1][0, 3:].tolist()
    assert made.attentions is out.attentions or made.attentions[0] is out.attentions[0]
    assert made.pooler_output is None
    assert isinstance(out.last_hidden_state, torch.Tensor)
    one = scree.pack([torch.arange(5)])
    assert scree.hf.unflatten(out, one).pooler_output is out.pooler_output
    assert pool(out, "last", arr=arr)[2].tolist() == out.last_hidden_state[0, 4].tolist()
    assert pool(made, "last")[2].tolist() == out.last_hidden_state[0, 4].tolist()


@pytest.mark.hf
def test_unflatten_tensors_tuples_and_mappings():
    import torch

    arr = scree.pack([torch.arange(n) for n in (3, 2)])
    state, loss = torch.ones(1, 5, 4), torch.tensor(1.0)
    assert scree.hf.unflatten(state, arr).feature_shape == (4,)
    assert scree.hf.unflatten(torch.ones(1, 5), arr).feature_shape == ()
    made = scree.hf.unflatten((loss, state, (state, state)), arr)
    assert made[0] is loss
    assert made[1].offsets is made[2][1].offsets is arr.offsets
    made = scree.hf.unflatten({"loss": loss, "start_logits": torch.ones(1, 5), "x": torch.ones(1, 5)}, arr)
    assert made["start_logits"].feature_shape == ()
    assert made["x"].shape == (1, 5)
    fixed = scree.with_capacity(arr, 4, 8)
    assert scree.hf.unflatten(torch.ones(1, 8, 2), fixed).batch_size == 4
    empty = scree.Array(torch.zeros(0, dtype=torch.int64), [0, 0])
    assert scree.hf.unflatten(torch.ones(1, 0, 2), empty).feature_shape == (2,)


@pytest.mark.hf
def test_bad_outputs():
    import torch

    arr = scree.pack([torch.arange(n) for n in (3, 2)])
    with raises(ValueError, "(1, 4, 2)", "(1, 5, ...)"):
        scree.hf.unflatten(torch.ones(1, 4, 2), arr)
    with raises(ValueError, "last_hidden_state", "(1, 6, 4)", "(1, 5, ...)"):
        scree.hf.unflatten(outputs(6), arr)
    with raises(ValueError, "logits", "(1, 3)", "one token of the whole batch"):
        scree.hf.unflatten({"logits": torch.ones(1, 3)}, arr)
    with raises(ValueError, "none of the outputs", "loss", "(1, 5, ...)"):
        scree.hf.unflatten({"loss": torch.tensor(1.0)}, arr)
    with raises(ValueError, "none of the outputs"):
        scree.hf.unflatten((torch.tensor(1.0),), arr)
    with raises(TypeError, "str"):
        scree.hf.unflatten("outputs", arr)
    with raises(TypeError, "Tensor", "scree.Array"):
        scree.hf.unflatten(torch.ones(1, 5, 2), torch.ones(5))
