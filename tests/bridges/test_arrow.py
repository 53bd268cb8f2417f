"""to_arrow, from_arrow, against pyarrow."""

import numpy as np
import pytest

import scree
from expect import assert_same_bits, raises
from frameworks import np_dtype

pa = pytest.importorskip("pyarrow")
bridges = scree.bridges

LISTED = [[1, 2, 3], [], [4], [5, 6]]


def make(xp, dtype="float32", features=(2,), offsets="int32"):
    shape = (9, *features)
    values = (np.arange(np.prod(shape)) % (2 if dtype == "bool" else 23)).reshape(shape).astype(np_dtype(dtype))
    return scree.Array(xp.array(values, dtype), xp.array(np.array([0, 0, 3, 4, 9, 9]), offsets))


def assert_rows(arr, rows):
    assert [row.tolist() for row in arr] == rows


@pytest.mark.parametrize("features", [(), (2,), (2, 3), (1,)])
def test_round_trip(xp, any_dtype, features):
    arr = make(xp, any_dtype, features)
    if any_dtype == "bfloat16":
        with raises(TypeError, "to_arrow", "bfloat16", "astype"):
            bridges.to_arrow(arr)
        return
    column = bridges.to_arrow(arr)
    column.validate(full=True)
    assert pa.types.is_list(column.type)
    assert column.to_pylist() == [xp.to_np(row).tolist() for row in scree.unpack(arr)]
    back = bridges.from_arrow(column)
    assert_same_bits(back.values, xp.to_np(arr.values))
    np.testing.assert_array_equal(back.offsets, xp.to_np(arr.offsets))
    assert back.offsets.dtype == np.int32


def test_numpy_memory_is_shared():
    arr = scree.Array(np.arange(9.0), np.array([0, 3, 9], np.int64))
    column = bridges.to_arrow(arr)
    assert pa.types.is_large_list(column.type)
    assert np.shares_memory(column.values.to_numpy(), arr.values)
    back = bridges.from_arrow(column)
    assert np.shares_memory(back.values, arr.values)
    assert back.offsets.dtype == np.int64
    assert not back.values.flags.writeable


def test_large_lists_for_totals_beyond_int32():
    one = np.broadcast_to(np.uint8(7), 2**31 + 3)
    arr = scree.from_lengths(one, [2**31, 3])
    assert arr.offsets.tolist() == [0, 2**31, 2**31 + 3]
    assert arr.offsets.dtype == np.int64
    assert pa.types.is_large_list(bridges.to_arrow(scree.Array(np.ones(3), np.array([0, 3], np.int64))).type)


@pytest.mark.parametrize("kind", ["list_", "large_list", "list_view", "large_list_view"])
def test_kinds_slices_and_chunks(kind):
    column = pa.array(LISTED, getattr(pa, kind)(pa.int16()))
    assert_rows(bridges.from_arrow(column), LISTED)
    for start, length in ((0, 2), (1, 3), (2, 1), (4, 0), (1, 0)):
        assert_rows(bridges.from_arrow(column.slice(start, length)), LISTED[start : start + length])
    chunked = pa.chunked_array([column.slice(2), column.slice(0, 0), column.slice(1, 2), column])
    assert_rows(bridges.from_arrow(chunked), LISTED[2:] + LISTED[1:3] + LISTED)
    assert bridges.from_arrow(chunked).dtype == np.int16
    assert_rows(bridges.from_arrow(pa.chunked_array([], column.type)), [])


def test_features_are_fixed_size_lists():
    pairs = pa.array([[[1, 2], [3, 4]], [], [[5, 6]]], pa.list_(pa.list_(pa.float32(), 2)))
    arr = bridges.from_arrow(pairs)
    assert arr.feature_shape == (2,)
    assert_rows(arr, [[[1, 2], [3, 4]], [], [[5, 6]]])
    assert_rows(bridges.from_arrow(pairs.slice(1, 2)), [[], [[5, 6]]])
    tensors = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2, 2]), pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], pa.list_(pa.int32(), 4))
    )
    arr = bridges.from_arrow(pa.ListArray.from_arrays([0, 2, 2], tensors))
    assert_rows(arr, [[[[1, 2], [3, 4]], [[5, 6], [7, 8]]], []])


def test_nulls():
    column = pa.array([[1, 2], None, [], [3]])
    with raises(ValueError, "row 1", "null", "nulls='empty'"):
        bridges.from_arrow(column)
    assert_rows(bridges.from_arrow(column, nulls="empty"), [[1, 2], [], [], [3]])
    with raises(ValueError, "row 3", "null"):
        bridges.from_arrow(pa.chunked_array([[[1, 2]], [[3]], [[], None]], pa.list_(pa.int64())))
    hidden = pa.ListArray.from_arrays([0, 2, 4, 6], pa.array(range(6)), mask=pa.array([False, True, False]))
    assert_rows(bridges.from_arrow(hidden, nulls="empty"), [[0, 1], [], [4, 5]])
    with raises(ValueError, "null", "within"):
        bridges.from_arrow(pa.array([[1, None], [3]]), nulls="empty")
    with raises(ValueError, "nulls", "drop"):
        bridges.from_arrow(column, nulls="drop")


def test_offsets_that_arrow_does_not_check():
    for offsets, words in (
        ([0, 4, 2, 6], ("offsets[2]",)),
        ([0, 9, 6], ("offsets[2]", 9, 6)),
    ):
        buffers = [None, pa.py_buffer(np.array(offsets, np.int32))]
        column = pa.Array.from_buffers(pa.list_(pa.int64()), len(offsets) - 1, buffers, children=[pa.array(range(6))])
        with raises(ValueError, *words):
            bridges.from_arrow(column)
    for start, size in ((5, 2), (-1, 2), (0, -1)):
        starts, sizes = (pa.py_buffer(np.array([0, n], np.int32)) for n in (start, size))
        kind = pa.list_view(pa.int64())
        column = pa.Array.from_buffers(kind, 2, [None, starts, sizes], children=[pa.array(range(6))])
        with raises(ValueError, "from_arrow", "row 1", start, size, 6):
            bridges.from_arrow(column)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", "b"]), pa.array(["a", "b"]).dictionary_encode(), pa.array([["a"], []]), pa.array([1, 2]), pa.array([[[1], [2, 3]], []]),
        pa.array([{"a": [1]}]),
    ],
    ids=lambda c: str(c.type)[:12],
)  # fmt: skip
def test_types_that_are_refused(column):
    with raises(TypeError, "from_arrow"):
        bridges.from_arrow(column)


def test_other_libraries_columns_come_through_the_c_interface():
    class Column:
        def __arrow_c_array__(self, requested_schema=None):
            return pa.array(LISTED).__arrow_c_array__(requested_schema)

    assert_rows(bridges.from_arrow(Column()), LISTED)
    with raises(TypeError, "from_arrow", "list"):
        bridges.from_arrow([[1], [2]])


def test_spare_values_stay_behind(xp):
    column = bridges.to_arrow(scree.with_capacity(make(xp, features=()), 7, 20))
    assert len(column) == 7
    assert len(column.flatten()) == 9
    with raises(ValueError, "ragged_dim", 1):
        bridges.to_arrow(scree.Array(xp.array(np.ones((2, 3))), xp.array([0, 3], "int32"), 1))


def test_totals_beyond_int32_both_ways():
    offsets = np.array([0, 5, 2**31 + 5], np.uint64)
    arr = scree.Array(np.zeros((2**31 + 5, 0), np.float32), offsets)  # no memory
    column = bridges.to_arrow(arr)
    assert pa.types.is_large_list(column.type)
    back = bridges.from_arrow(column)
    assert back.offsets.tolist() == offsets.tolist()
    assert back.values.shape == arr.values.shape
    both = bridges.from_arrow(pa.chunked_array([column.slice(1), column]))
    assert both.lengths.tolist() == [2**31, 5, 2**31]


@pytest.mark.parametrize("edge", [(), (0,), (0, 0), (2, 0)], ids=str)
def test_ordinary_values(edge):
    arr = scree.from_lengths(np.ones((sum(edge), 3), np.float16), list(edge))
    back = bridges.from_arrow(bridges.to_arrow(arr))
    assert back.lengths.tolist() == list(edge)
    assert_same_bits(back.values, arr.values)


def test_nan_is_no_null():
    arr = scree.Array(np.array([np.nan, 1.0]), [0, 2])
    assert bridges.to_arrow(arr).values.null_count == 0


def test_numpy_values_of_every_layout():
    values = np.arange(18, dtype=">i4").reshape(2, 9).T[::-1]
    column = bridges.to_arrow(scree.Array(values, np.array([0, 0, 9], ">i4")))
    assert_rows(bridges.from_arrow(column), [[], values.tolist()])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_permutation_of_tensors(order):
    kind = pa.fixed_shape_tensor(pa.int32(), [2, 3], permutation=order)
    tensors = pa.ExtensionArray.from_storage(kind, pa.array([range(6), range(6, 12)], pa.list_(pa.int32(), 6)))
    arr = bridges.from_arrow(pa.ListArray.from_arrays([0, 2], tensors))
    wanted = np.arange(12, dtype=np.int32).reshape(2, 2, 3).transpose(0, *(axis + 1 for axis in order))
    np.testing.assert_array_equal(arr.values, wanted)


def test_rows_of_one_length_and_null_features():
    assert_rows(bridges.from_arrow(pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2))), [[1, 2], [3, 4]])
    features = pa.array([[[1, 2], None]], pa.list_(pa.list_(pa.int8(), 2)))
    with raises(ValueError, "from_arrow", "1 value", "null"):
        bridges.from_arrow(features)
    inner = pa.array([[[1, None]]], pa.list_(pa.list_(pa.int8(), 2)))
    with raises(ValueError, "from_arrow", "1 value", "null"):
        bridges.from_arrow(inner)
    beside = pa.array([[None], [1, 2]]).slice(1)
    assert_rows(bridges.from_arrow(beside), [[1, 2]])


def test_streams_and_tables():
    class Stream:
        def __init__(self, table):
            self.table = table

        def __arrow_c_stream__(self, requested_schema=None):
            return self.table.__arrow_c_stream__(requested_schema)

    chunked = pa.chunked_array([LISTED, LISTED[:1]])
    assert_rows(bridges.from_arrow(Stream(chunked)), LISTED + LISTED[:1])
    with raises(TypeError, "from_arrow", "struct"):
        bridges.from_arrow(pa.table({"a": chunked}))


@pytest.mark.parametrize("values", [np.zeros(2, complex), np.zeros(2, "datetime64[s]"), np.zeros(2, "U1")])
def test_dtypes_that_are_refused(values):
    with raises(TypeError, "to_arrow", values.dtype.name, "astype"):
        bridges.to_arrow(scree.Array(values, [0, 2]))
