"""to_torch_nested, from_torch_nested: the same memory under the other type."""

import numpy as np
import pytest

import scree
from expect import raises

torch = pytest.importorskip("torch")
bridges = scree.bridges


def make(dtype=torch.float32, ragged_dim=0, **kwargs):
    shape = (9, 4) if ragged_dim == 0 else (4, 9)
    values = torch.arange(36, dtype=torch.float32).reshape(shape).to(dtype)
    if kwargs:
        values.requires_grad_(**kwargs)
    return scree.Array(values, torch.tensor([0, 0, 3, 4, 9, 9], dtype=torch.int32), ragged_dim)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_round_trip_shares_everything(dtype, ragged_dim):
    arr = make(dtype, ragged_dim)
    nested = bridges.to_torch_nested(arr)
    assert nested.is_nested
    assert nested.layout is torch.jagged
    assert nested.dtype is dtype
    assert nested.values().data_ptr() == arr.values.data_ptr()
    assert nested.offsets() is arr.offsets
    for got, want in zip(nested.unbind(), scree.unpack(arr), strict=True):
        assert torch.equal(got, want)
    back = bridges.from_torch_nested(nested)
    assert back.values.data_ptr() == arr.values.data_ptr()
    assert back.offsets is arr.offsets
    assert back.ragged_dim == ragged_dim
    assert torch.equal(back.values, arr.values)


def test_lengths_are_passed_on():
    arr = make()
    nested = bridges.to_torch_nested(arr)
    assert (nested._maybe_min_seqlen, nested._maybe_max_seqlen) == (0, 5)
    assert torch.nested.to_padded_tensor(nested, 0.0).shape == (5, 5, 4)
    bounded = scree.from_cu_seqlens(arr.values, arr.offsets, max_length=7)
    assert bridges.from_torch_nested(bridges.to_torch_nested(bounded)).max_length == 7


def test_arrays_that_share_offsets_add_up():
    arr = make()
    total = bridges.to_torch_nested(arr) + bridges.to_torch_nested(arr * 2)
    assert torch.equal(bridges.from_torch_nested(total).values, arr.values * 3)


def test_gradients_flow_both_ways():
    arr = make(requires_grad=True)
    back = bridges.from_torch_nested(bridges.to_torch_nested(arr) * 3)
    back.values.sum().backward()
    assert torch.equal(arr.values.grad, torch.full((9, 4), 3.0))
    leaf = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged, requires_grad=True)
    (bridges.from_torch_nested(leaf) * 2).values.sum().backward()
    assert torch.equal(leaf.grad.values(), torch.full((6, 3), 2.0))


def test_spare_values_stay_behind():
    nested = bridges.to_torch_nested(scree.with_capacity(make(), 7, 20))
    assert nested.values().shape == (9, 4)
    assert len(nested.unbind()) == 7


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
def test_from_torchs_own(offsets_dtype):
    values, offsets = torch.randn(6, 3), torch.tensor([0, 2, 6], dtype=offsets_dtype)
    arr = bridges.from_torch_nested(torch.nested.nested_tensor_from_jagged(values, offsets))
    assert arr.values.data_ptr() == values.data_ptr()
    assert arr.offsets is offsets
    assert arr.max_length == 4


def test_what_is_refused():
    with raises(TypeError, "to_torch_nested", "numpy", "to_torch"):
        bridges.to_torch_nested(scree.Array(np.ones(3), np.array([0, 3])))
    with raises(TypeError, "from_torch_nested", "Tensor", "nested"):
        bridges.from_torch_nested(torch.ones(3))
    with pytest.warns(UserWarning, match="prototype"):
        strided = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with raises(ValueError, "from_torch_nested", "layout", "jagged"):
        bridges.from_torch_nested(strided)
    holes = torch.nested.nested_tensor_from_jagged(
        torch.ones(9, 2), torch.tensor([0, 4, 9]), lengths=torch.tensor([2, 5])
    )
    with raises(ValueError, "from_torch_nested", "holes", "contiguous"):
        bridges.from_torch_nested(holes)
    falling = torch.nested.nested_tensor_from_jagged(torch.ones(6, 2), torch.tensor([0, 4, 2, 6]))
    with raises(ValueError, "offsets[2]", 2, 4):
        bridges.from_torch_nested(falling)
    beyond = torch.nested.nested_tensor_from_jagged(torch.ones(6, 2), torch.tensor([0, 3, 9]))
    with raises(ValueError, "offsets[-1]", 9, 6):
        bridges.from_torch_nested(beyond)


@pytest.mark.parametrize("edge", [(), (0,), (0, 0), (1,), (0, 3), (3, 0)], ids=str)
def test_ordinary_values(edge):
    arr = scree.from_lengths(torch.ones(sum(edge), 2), list(edge))
    nested = bridges.to_torch_nested(arr)
    assert [row.shape[0] for row in nested.unbind()] == list(edge)
    back = bridges.from_torch_nested(nested)
    assert (back.batch_size, back.max_length) == (len(edge), max(edge, default=0))


def test_there_and_back_and_there_go_together():
    arr = make()
    there = bridges.to_torch_nested(arr)
    again = bridges.to_torch_nested(bridges.from_torch_nested(there))
    assert torch.equal((there + again).values(), arr.values * 2)


def test_a_transposed_nested_tensor():
    values = torch.arange(54.0).reshape(9, 2, 3)
    nested = bridges.to_torch_nested(scree.Array(values, make().offsets)).transpose(1, 2)
    back = bridges.from_torch_nested(nested)
    assert back.ragged_dim == 1
    for row, wanted in zip(back, nested.unbind(), strict=True):
        assert torch.equal(row, wanted)


def test_a_noted_longest_length_that_is_too_small():
    arr = make()
    wrong = torch.nested.nested_tensor_from_jagged(arr.values, arr.offsets, max_seqlen=4)
    with raises(ValueError, "max_length", 4, 5):
        bridges.from_torch_nested(wrong)


def test_holes_can_be_closed():
    base = torch.arange(20.0).reshape(4, 5)
    holed = torch.nested.narrow(base, 1, torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 3, 1]), layout=torch.jagged)
    closed = bridges.from_torch_nested(holed.contiguous())
    assert [row.tolist() for row in closed] == [[0, 1], [6, 7], [12, 13, 14], [15]]
