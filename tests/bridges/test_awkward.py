"""to_awkward, from_awkward, against Awkward Array."""

import numpy as np
import pytest

import scree
from expect import assert_same_bits, raises
from frameworks import np_dtype

ak = pytest.importorskip("awkward")
bridges = scree.bridges

LISTED = [[1, 2, 3], [], [4], [5, 6]]


def make(xp, dtype="float32", features=(2,), offsets="int32"):
    shape = (9, *features)
    values = (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(np_dtype(dtype))
    return scree.Array(xp.array(values, dtype), xp.array(np.array([0, 0, 3, 4, 9, 9]), offsets))


def assert_rows(arr, rows):
    assert [row.tolist() for row in arr] == rows


@pytest.mark.parametrize("features", [(), (2,), (2, 3)])
def test_round_trip(xp, any_dtype, features):
    arr = make(xp, any_dtype, features)
    if any_dtype == "bfloat16":
        with raises(TypeError, "to_awkward", "bfloat16", "astype"):
            bridges.to_awkward(arr)
        return
    listed = bridges.to_awkward(arr)
    assert listed.to_list() == [xp.to_np(row).tolist() for row in scree.unpack(arr)]
    back = bridges.from_awkward(listed)
    assert_same_bits(back.values, xp.to_np(arr.values))
    np.testing.assert_array_equal(back.offsets, xp.to_np(arr.offsets))
    assert back.offsets.dtype == np.int32


@pytest.mark.parametrize("offsets", [np.int32, np.int64])
def test_memory_is_shared_both_ways(offsets):
    arr = scree.Array(np.arange(9.0), np.array([0, 3, 9], offsets))
    listed = bridges.to_awkward(arr)
    back = bridges.from_awkward(listed)
    assert np.shares_memory(np.asarray(listed.layout.content.data), arr.values)
    assert np.shares_memory(back.values, arr.values)
    assert back.offsets.dtype == offsets


def test_other_layouts():
    listed = ak.Array(LISTED)
    assert_rows(bridges.from_awkward(listed), LISTED)
    assert_rows(bridges.from_awkward(listed[1:]), LISTED[1:])
    assert_rows(bridges.from_awkward(listed[[3, 0, 0]]), [LISTED[3], LISTED[0], LISTED[0]])
    assert_rows(bridges.from_awkward(listed[::-1]), LISTED[::-1])
    assert_rows(bridges.from_awkward(ak.Array(np.arange(6).reshape(2, 3))), [[0, 1, 2], [3, 4, 5]])
    assert_rows(bridges.from_awkward(ak.to_regular(ak.Array([[1, 2], [3, 4]]))), [[1, 2], [3, 4]])
    assert_rows(bridges.from_awkward(ak.Array([[], []])), [[], []])
    assert_rows(bridges.from_awkward(listed[:0]), [])
    indexed = ak.Array(ak.contents.IndexedArray(ak.index.Index64(np.array([2, 0])), listed.layout))
    assert_rows(bridges.from_awkward(indexed), [LISTED[2], LISTED[0]])


@pytest.mark.parametrize(
    "rows",
    [
        [[1, None], [2]], [[1], None], ["a", "b"], [["a"], []], [[[1], [2, 3]], []], [{"x": 1}], [[{"x": 1}]], [1, 2],
        [[1, "a"]],
    ],
    ids=str,
)  # fmt: skip
def test_types_that_are_refused(rows):
    with raises(TypeError, "from_awkward"):
        bridges.from_awkward(ak.Array(rows))


def test_arguments_that_are_refused(xp):
    with raises(TypeError, "from_awkward", "list"):
        bridges.from_awkward(LISTED)
    with raises(ValueError, "ragged_dim", 1):
        bridges.to_awkward(scree.Array(xp.array(np.ones((2, 3))), xp.array([0, 3], "int32"), 1))


def test_spare_values_stay_behind(xp):
    listed = bridges.to_awkward(scree.with_capacity(make(xp, features=()), 7, 20))
    assert len(listed) == 7
    assert ak.count(listed) == 9


def test_other_offsets_and_layouts_of_numpy():
    values = np.arange(9, dtype=">f4")[::-1]
    for dtype, kept in (("uint32", "uint32"), ("uint8", "int64"), (">i4", "int32")):
        listed = bridges.to_awkward(scree.Array(values, np.array([0, 4, 9]).astype(dtype)))
        back = bridges.from_awkward(listed)
        assert back.offsets.dtype == kept
        assert_rows(back, [values[:4].tolist(), values[4:].tolist()])


@pytest.mark.parametrize("edge", [(), (0,), (0, 0), (2, 0)], ids=str)
def test_ordinary_values(edge):
    arr = scree.from_lengths(np.ones((sum(edge), 3), np.float16), list(edge))
    back = bridges.from_awkward(bridges.to_awkward(arr))
    assert back.lengths.tolist() == list(edge)
    assert_same_bits(back.values, arr.values)


def test_features_as_regular_lists():
    nested = ak.to_regular(ak.Array([[[1, 2], [3, 4]], [], [[5, 6]]]), axis=2)
    assert_rows(bridges.from_awkward(nested), [[[1, 2], [3, 4]], [], [[5, 6]]])
    assert_rows(bridges.from_awkward(nested[1:]), [[], [[5, 6]]])


def test_invalid_offsets():
    for offsets, words in (([0, 4, 2, 6], ("offsets[2]",)), ([0, 3, 9], ("offsets[-1]", 9, 6))):
        layout = ak.contents.ListOffsetArray(ak.index.Index64(np.array(offsets)), ak.contents.NumpyArray(np.zeros(6)))
        with raises(ValueError, *words):
            bridges.from_awkward(ak.Array(layout))
