"""Offsets: what a wrong one gets, segment ids, positions."""

import numpy as np
import pytest

import oracle
import scree
from cases import EDGES, host_offsets, with_spare
from expect import raises
from test_array import LENGTHS, make


def test_segment_ids(xp):
    ids = scree.segment_ids(make(xp))
    assert xp.is_array(ids)
    assert xp.dtype_of(ids) == "int32"
    assert xp.to_np(ids).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3]


def test_position_ids(xp):
    arr = make(xp)
    ids = scree.position_ids(arr)
    assert xp.dtype_of(ids) == "int32"
    assert xp.to_np(ids).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert xp.to_np(scree.position_ids(arr, start=2)).tolist() == [2, 3, 4, 2, 2, 3, 4, 5, 6]
    assert xp.to_np(scree.position_ids(arr, 1)).tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 5]


def test_position_ids_from_a_start_of_each_row(xp):
    arr = make(xp)
    want = [11, 12, 13, 20, 30, 31, 32, 33, 34]
    rows = [7, 11, 20, 30, 9]
    for start in (xp.array(rows, "int32"), xp.array(rows, "int16"), rows):
        got = scree.position_ids(arr, start=start)
        assert xp.to_np(got).tolist() == want
        assert xp.dtype_of(got) == "int32"
    for bad in (rows[:4], xp.array(rows[:1], "int32"), xp.array([rows], "int32")):
        with raises(ValueError, "start"):
            scree.position_ids(arr, start=bad)
    full = with_spare(xp, arr, 6, 11)
    assert xp.to_np(scree.position_ids(full, [*rows, 5])).tolist() == [*want, 0, 0]
    assert xp.to_np(scree.position_ids(full, 3))[-2:].tolist() == [0, 0]


@pytest.mark.parametrize("edge", EDGES, ids=str)
@pytest.mark.parametrize("offsets_dtype", ["int32", "int16", "uint8"])
def test_ids_of_edges(xp, edge, offsets_dtype):
    lengths = EDGES[edge]
    arr = make(xp, lengths=lengths)
    arr = scree.Array(arr.values, xp.array(host_offsets(xp, arr), offsets_dtype))
    ids = [b for b, n in enumerate(lengths) for _ in range(n)]
    places = [t for n in lengths for t in range(n)]
    assert xp.to_np(scree.segment_ids(arr)).tolist() == ids
    assert xp.to_np(scree.position_ids(arr)).tolist() == places
    assert xp.dtype_of(scree.segment_ids(arr)) == "int32"
    assert xp.dtype_of(scree.position_ids(arr)) == "int32"
    assert xp.to_np(arr.lengths).tolist() == list(lengths)


def test_ids_along_another_axis(xp):
    arr = make(xp, features=(2, 3), ragged_dim=1)
    assert xp.to_np(scree.segment_ids(arr)).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert xp.to_np(scree.position_ids(arr)).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def test_ids_of_a_capacity_array(xp):
    full = with_spare(xp, make(xp), 7, 13)
    assert xp.to_np(scree.segment_ids(full)).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3, 7, 7, 7, 7]
    assert xp.to_np(scree.position_ids(full)).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]
    assert xp.to_np(full.lengths).tolist() == [*LENGTHS, 0, 0]


def test_ids_past_two_to_the_31_are_int64():
    # By the offsets alone: the ids themselves would not fit in memory.
    arr = scree.from_lengths(np.broadcast_to(np.zeros((), np.int8), (2**31,)), np.array([2**31]))
    assert arr.offsets.dtype == np.int64
    assert arr.max_length == 2**31


def test_position_ids_errors(xp):
    arr = make(xp)
    for bad in (0.5, "1", None):
        with raises((TypeError, ValueError), "start"):
            scree.position_ids(arr, start=bad)
    last = 2**31 - 9
    assert xp.to_np(scree.position_ids(arr, start=last))[-1] == last + 4
    for bad in (last + 1, 2**31, -(2**31) - 1, [0, 0, 0, 2**31, 0], [0, 0, 0, 0, 2**31 - 1]):
        with raises(ValueError, "start", last):
            scree.position_ids(arr, start=bad)
    with raises(TypeError, "segment_ids"):
        scree.segment_ids(arr.values)
    with raises(TypeError, "position_ids"):
        scree.position_ids(arr.values)


FALLING = [
    ([1, 3, 9], "offsets[0]", 1),
    ([-1, 3, 9], "offsets[0]", -1),
    ([9, 9], "offsets[0]", 9),
    ([0, 5, 3, 9], "offsets[2]", 3),
    ([0, 9, 0], "offsets[2]", 0),
    ([0, 10, 9], "offsets[2]", 9),
    ([0, 5, 8], "offsets[-1]", 8),
    ([0, 5, 10], "offsets[-1]", 10),
    ([0], "offsets[-1]", 0),
]


@pytest.mark.parametrize(("offsets", "field", "got"), FALLING, ids=lambda x: str(x))
@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "int8"])
def test_wrong_offsets(xp, offsets, field, got, dtype):
    if min(offsets) < 0 and dtype == "uint8":
        return
    values, bad = xp.array(np.zeros((9, 2))), xp.array(offsets, dtype)
    with raises(ValueError, field, got):
        scree.Array(values, bad).validate()
    with raises(ValueError, field, got):
        scree.from_cu_seqlens(values, bad).validate()
    if xp.checks_at_construction:
        with raises(ValueError, field, got):
            scree.Array(values, bad)
        with raises(ValueError, field, got):
            scree.from_cu_seqlens(values, bad)


def test_the_error_names_the_first_fall_and_the_need(xp):
    with raises(ValueError, "offsets[2]", 3, 5):
        scree.Array(xp.array(np.zeros((9,))), xp.array([0, 5, 3, 2, 9], "int32")).validate()
    with raises(ValueError, "offsets[-1]", 8, 9):
        scree.Array(xp.array(np.zeros((2, 9))), xp.array([0, 5, 8], "int32"), 1).validate()


def test_a_big_fall_deep_inside_is_found(xp):
    lengths = np.ones(5000, np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    offsets[4321] = 17
    with raises(ValueError, "offsets[4321]", 17):
        scree.Array(xp.array(np.zeros((5000,))), xp.array(offsets, "int32")).validate()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool"])
def test_offsets_that_are_no_integers(xp, dtype):
    with raises(TypeError, "offsets", dtype, "integer"):
        scree.Array(xp.array(np.zeros((1, 2))), xp.array([0, 1], dtype))


@pytest.mark.parametrize("shape", [(), (2, 2), (1, 2), (0,)])
def test_offsets_of_a_wrong_shape(xp, shape):
    words = ("offsets", str(shape)) if shape else ("offsets",)
    with raises(ValueError, *words):
        scree.Array(xp.array(np.zeros((0, 2))), xp.array(np.zeros(shape, np.int32)))


def test_lists_become_int32(xp):
    values = xp.array(np.zeros((9, 2)))
    for arr in (
        scree.Array(values, oracle.offsets_of(LENGTHS)),
        scree.Array(values, tuple(oracle.offsets_of(LENGTHS))),
        scree.from_lengths(values, list(LENGTHS)),
        scree.from_lengths(values, np.array(LENGTHS)),
    ):
        assert xp.is_array(arr.offsets)
        assert xp.dtype_of(arr.offsets) == "int32"
        assert host_offsets(xp, arr) == oracle.offsets_of(LENGTHS)
        assert arr.values is values
    with raises(ValueError, "offsets[-1]", 8, 9):
        scree.Array(values, [0, 8]).validate()
    for bad in ([0.0, 9.0], [False, True], [[0, 9]], []):
        with raises((TypeError, ValueError), "offsets"):
            scree.Array(values, bad)
    for bad, word in ([4, 4], 8), ([10, -1], -1), ([9.0], "float"), ([[9]], "(1, 1)"):
        with raises((TypeError, ValueError), "lengths", word):
            scree.from_lengths(values, bad)


def test_fields_that_are_no_arrays(xp):
    values, offsets = xp.array(np.zeros((9, 2))), xp.array([0, 9], "int32")
    for bad in (None, 3, "abc", {}, object(), [0, "a"]):
        with raises(TypeError, "values"):
            scree.Array(bad, offsets)
        with raises(TypeError, "offsets"):
            scree.Array(values, bad)
    with raises(TypeError, "values"):
        scree.Array(scree.Array(values, offsets), offsets)


def test_wrong_ragged_dim(xp):
    values, offsets = xp.array(np.zeros((9, 2))), xp.array([0, 9], "int32")
    for bad in (2, -3, 10):
        with raises(ValueError, "ragged_dim", bad, 2):
            scree.Array(values, offsets, bad)
    for bad in (0.0, "0", None, True, [0]):
        with raises(TypeError, "ragged_dim"):
            scree.Array(values, offsets, bad)
    with raises(ValueError, "values"):
        scree.Array(xp.array(1.0), offsets)


def test_numpy_arrays_that_would_be_read_wrongly():
    offsets = np.array([0, 3])
    with raises(TypeError, "values", "mask"):
        scree.Array(np.ma.masked_array(np.arange(3.0), [True, False, False]), offsets)
    with raises(TypeError, "values", "object"):
        scree.Array(np.array([1, None, "a"], object), offsets)
    with raises((TypeError, ValueError), "offsets"):
        scree.Array(np.arange(3.0), np.ma.masked_array(offsets, [False, True]))
    with raises((TypeError, ValueError), "offsets"):
        scree.Array(np.arange(3.0), np.array([0, 3], object))
    with raises(TypeError, "pack", "[1]"):
        scree.pack([np.arange(3.0), np.ma.masked_array(np.arange(3.0), [True, False, False])])
    with raises(TypeError, "pack", "[0]", "object"):
        scree.pack([np.array([1, None], object)])
    with raises(TypeError, "pack", "[1]"):
        scree.pack([np.arange(3), np.array([1, None], object)])
    with raises(TypeError, "from_padded", "mask"):
        scree.from_padded(np.zeros((1, 3)), np.ma.masked_array(np.ones((1, 3), bool), [[True, False, False]]))


def test_oracle_offsets_are_ours(xp):
    assert host_offsets(xp, make(xp)) == oracle.offsets_of(LENGTHS)


def test_offsets_that_the_library_makes_are_int32(xp):
    if "int64" not in xp.integers:
        return
    arr = make(xp)
    arr = scree.Array(arr.values, xp.array(host_offsets(xp, arr), "int64"))
    assert xp.dtype_of((arr + 1).offsets) == "int64"  # given, so kept
    made = {
        "slice": arr[1:4],
        "strided slice": arr[::2],
        "list": arr[[0, 3]],
        "mask": arr[np.array([True, False, True, False, True])],
        "concat batch": scree.concat([arr, arr]),
        "concat ragged": scree.concat([arr, arr], dim="ragged"),
        "with_capacity": scree.with_capacity(arr, 7, 13),
        "from_padded": scree.from_padded(*scree.to_padded(arr)),
        "pack": scree.pack(scree.unpack(arr)),
        "from_lengths": scree.from_lengths(arr.values, arr.lengths),
    }
    assert {name: xp.dtype_of(a.offsets) for name, a in made.items()} == dict.fromkeys(made, "int32")


def test_narrow_offsets_do_not_wrap(xp):
    arr = scree.Array(xp.array(np.zeros((100,))), xp.array([0, 60, 100], "int8"))
    assert host_offsets(xp, scree.concat([arr, arr])) == [0, 60, 100, 160, 200]
    assert host_offsets(xp, scree.concat([arr, arr], dim="ragged")) == [0, 120, 200]
    assert host_offsets(xp, scree.with_capacity(arr, 3, 300)) == [0, 60, 100, 100]
    assert xp.to_np(scree.position_ids(arr, start=100))[[59, 60, 99]].tolist() == [159, 100, 139]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_unsigned_offsets_work_or_are_refused_at_once(xp, dtype):
    if xp.name == "jax" and dtype == "uint64":
        return
    try:
        arr = scree.Array(xp.array(np.zeros((9, 2))), xp.array([0, 0, 3, 4, 9, 9], dtype))
    except TypeError as error:
        assert "offsets" in str(error)
        assert dtype in str(error)
        return
    assert xp.to_np(arr.lengths).tolist() == list(LENGTHS)
    assert xp.to_np(scree.segment_ids(arr)).tolist() == [1, 1, 1, 2, 3, 3, 3, 3, 3]
    assert xp.to_np(scree.position_ids(arr, start=1)).tolist() == [1, 2, 3, 1, 1, 2, 3, 4, 5]
    assert host_offsets(xp, arr[::-1]) == [0, 0, 5, 6, 9, 9]
    assert host_offsets(xp, scree.concat([arr, arr]))[-2:] == [18, 18]
    assert host_offsets(xp, scree.with_capacity(arr, 6, 10)) == [0, 0, 3, 4, 9, 9, 9]


def test_values_that_are_not_dense(xp):
    if xp.name != "torch":
        return
    with raises(TypeError, "values", "dense"):
        scree.Array(xp.module.eye(9).to_sparse(), xp.array([0, 9], "int32"))
