"""pack, unpack, from_cu_seqlens, from_lengths."""

import numpy as np
import pytest

import oracle
import scree
from cases import EDGES, host_offsets, normal
from expect import assert_same_bits, raises
from test_array import LENGTHS, assert_rows, make, rows_of

SIDES = ("right", "left")


def rows_in(xp, lengths=LENGTHS, features=(2,), dtype="float32", ragged_dim=0):
    """Return rows as NumPy and as the framework's arrays."""
    rows = rows_of(xp, make(xp, dtype, lengths, features, ragged_dim))
    return rows, [xp.array(r, dtype) for r in rows]


# pack and unpack


def test_pack(xp, any_dtype):
    rows, given = rows_in(xp, dtype=any_dtype)
    arr = scree.pack(given)
    assert isinstance(arr, scree.Array)
    assert xp.is_array(arr.values)
    assert xp.is_array(arr.offsets)
    assert xp.dtype_of(arr.values) == any_dtype
    assert xp.dtype_of(arr.offsets) == "int32"
    assert host_offsets(xp, arr) == oracle.offsets_of(LENGTHS)
    assert_rows(xp, arr, rows)
    assert (arr.max_length, arr.min_length) == (5, 0)


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_pack_edges(xp, edge):
    lengths = EDGES[edge]
    rows, given = rows_in(xp, lengths)
    if not lengths:
        with raises(ValueError, "pack", "empty"):
            scree.pack(given)
        return
    arr = scree.pack(given)
    assert arr.feature_shape == (2,)
    assert_rows(xp, arr, rows)
    back = scree.unpack(arr)
    assert len(back) == len(rows)
    for row, want in zip(back, rows, strict=True):
        assert tuple(row.shape) == want.shape
        np.testing.assert_array_equal(xp.to_np(row), want)


def test_pack_takes_any_iterable(xp):
    rows, given = rows_in(xp)
    for form in (tuple(given), iter(given), (r for r in given), dict(enumerate(given)).values()):
        assert_rows(xp, scree.pack(form), rows)
    assert_rows(xp, scree.pack(iter(scree.pack(given))), rows)


@pytest.mark.parametrize("ragged_dim", [1, 2, -1, -2, -3])
def test_pack_along_another_axis(xp, ragged_dim):
    rows, given = rows_in(xp, features=(2, 3), ragged_dim=ragged_dim % 3)
    arr = scree.pack(given, ragged_dim=ragged_dim)
    assert arr.ragged_dim == ragged_dim % 3
    assert arr.feature_shape == (2, 3)
    assert_rows(xp, arr, rows)
    for row, want in zip(scree.unpack(arr), rows, strict=True):
        np.testing.assert_array_equal(xp.to_np(row), want)


def test_pack_of_one_row_copies_nothing_out_of_order(xp):
    row = xp.array(normal((4, 3), 0))
    arr = scree.pack([row])
    assert_same_bits(xp.to_np(arr.values), xp.to_np(row))


def test_pack_of_strided_rows(xp):
    if not xp.has_views:
        return
    wide = xp.array(np.arange(40.0).reshape(10, 4))
    given = [wide[:3, ::2], wide[3:8, 1:3], wide[8:8, :2]]
    assert_rows(xp, scree.pack(given), [xp.to_np(r) for r in given])


def test_pack_refuses_mixed_rows(xp):
    good = xp.array(np.zeros((2, 3)))
    for odd, error in [
        (xp.array(np.zeros((2, 4))), ValueError),
        (xp.array(np.zeros((2,))), ValueError),
        (xp.array(np.zeros((2, 3, 1))), ValueError),
        (xp.array(np.zeros((2, 3)), "float16"), (TypeError, ValueError)),
        (xp.array(np.zeros((2, 3)), "int32"), (TypeError, ValueError)),
        ([[1.0, 2.0, 3.0]], TypeError),
        (None, TypeError),
        (1.0, TypeError),
    ]:
        for place in (1, 2):
            given = [good, good, good]
            given[place] = odd
            with raises(error, "pack", f"[{place}]"):
                scree.pack(given)
    with raises((TypeError, ValueError), "[0]"):
        scree.pack([xp.array(1.0)])
    with raises(TypeError, "pack", "[0]"):
        scree.pack([[1.0, 2.0]])


def test_pack_says_what_the_odd_row_is(xp):
    good = xp.array(np.zeros((2, 3)))
    with raises((TypeError, ValueError), "float16", "float32"):
        scree.pack([good, xp.array(np.zeros((2, 3)), "float16")])
    with raises(ValueError, "(4,)", "(3,)"):
        scree.pack([good, xp.array(np.zeros((2, 4)))])


def test_pack_rows_of_two_byte_orders():
    arr = scree.pack([np.ones(2, "<f4"), np.ones(1, ">f4")])
    assert arr.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(arr.values, [1, 1, 1])


@pytest.mark.parametrize("ragged_dim", [2, -3, 5])
def test_pack_refuses_an_axis_that_is_not_there(xp, ragged_dim):
    with raises(ValueError, "ragged_dim", ragged_dim):
        scree.pack([xp.array(np.zeros((2, 3)))], ragged_dim=ragged_dim)


def test_gradients_through_pack_and_unpack(grad_xp):
    xp = grad_xp

    def through(a, b):
        arr = scree.pack([a, b, a])
        rows = scree.unpack(arr)
        return (rows[0] * 2).sum() + (rows[1] * 3).sum() + (rows[2] * 5).sum()

    a, b = xp.eager_grad(through, xp.array(np.ones((3, 2))), xp.array(np.ones((1, 2))))
    np.testing.assert_array_equal(a, np.full((3, 2), 7))
    np.testing.assert_array_equal(b, np.full((1, 2), 3))


def test_unpack_copies_from_the_device_once(xp, monkeypatch):
    from scree import _backends

    backend = _backends.load(xp.name)
    real, calls = backend.to_host, []

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(backend, "to_host", counted)
    arr = make(xp)
    assert len(scree.unpack(arr)) == 5
    scree.unpack(arr)
    list(arr)
    assert len(calls) <= 1


def test_unpack_wants_an_array(xp):
    with raises(TypeError, "unpack"):
        scree.unpack(xp.array(np.zeros((3, 2))))


# from_cu_seqlens and from_lengths


def test_from_cu_seqlens_copies_nothing(xp):
    values, cu_seqlens = xp.array(normal((9, 2), 0)), xp.array([0, 4, 4, 9], "int32")
    for arr in (scree.from_cu_seqlens(values, cu_seqlens), scree.from_cu_seqlens(values, cu_seqlens, max_length=5)):
        assert arr.values is values
        assert arr.offsets is cu_seqlens
        assert arr.max_length == 5
        assert arr.ragged_dim == 0


def test_a_max_length_that_is_known_costs_no_copy(xp, monkeypatch):
    from scree import _backends

    if xp.checks_at_construction:
        return

    def refuse(*args, **kwargs):
        raise AssertionError("a copy from the device")

    monkeypatch.setattr(_backends.load(xp.name), "to_host", refuse)
    arr = scree.from_cu_seqlens(xp.array(normal((9, 2), 0)), xp.array([0, 4, 4, 9], "int32"), max_length=5)
    assert arr.max_length == 5
    assert (arr + 1).max_length == 5


def test_from_cu_seqlens_errors(xp):
    values, cu_seqlens = xp.array(normal((9, 2), 0)), xp.array([0, 4, 4, 9], "int32")
    if xp.checks_at_construction:
        with raises(ValueError, "max_length", 4, 5):
            scree.from_cu_seqlens(values, cu_seqlens, max_length=4)
        with raises(ValueError, "[-1]", 8, 9):
            scree.from_cu_seqlens(values, xp.array([0, 8], "int32"))
    for bad in (-1, 2.0, "5", True):
        with raises((TypeError, ValueError), "max_length"):
            scree.from_cu_seqlens(values, cu_seqlens, max_length=bad)


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_from_lengths(xp, edge):
    lengths = EDGES[edge]
    values = make(xp, lengths=lengths).values
    for dtype in ("int32", "int8"):
        arr = scree.from_lengths(values, xp.array(np.array(lengths, np.int32), dtype))
        assert arr.values is values
        assert xp.dtype_of(arr.offsets) == "int32"
        assert host_offsets(xp, arr) == oracle.offsets_of(lengths)
        assert xp.to_np(arr.lengths).tolist() == list(lengths)


def test_small_integer_lengths_do_not_wrap(xp):
    arr = scree.from_lengths(xp.array(np.zeros((400,))), xp.array([100, 100, 100, 100], "int8"))
    assert host_offsets(xp, arr) == [0, 100, 200, 300, 400]


def test_from_lengths_errors(xp):
    values = xp.array(normal((9, 2), 0))

    def bad(lengths, *words, dtype="int32", error=ValueError):
        with raises(error, *words):
            scree.from_lengths(values, xp.array(lengths, dtype)).validate()

    bad([4, 4], 8, 9)
    bad([5, 5], 10, 9)
    with raises(ValueError, "lengths", 2**64 + 9, 9):  # which is 9 where int64 begins anew
        scree.from_lengths(values, np.array([2**63 - 1, 2**63 - 1, 11]))
    # Where the lengths are not looked at, validate() sees the offset that falls.
    bad([5, -1, 5], *((-1,) if xp.checks_at_construction else ("offsets[2]", 4)))
    with raises(ValueError, "lengths", "(1, 1)"):
        scree.from_lengths(values, xp.array([[9]], "int32"))
    for dtype in ("float32", "bool"):
        with raises((TypeError, ValueError), "lengths", dtype):
            scree.from_lengths(values, xp.array([1, 1], dtype))


# Several frameworks


def test_frameworks_do_not_mix(xp):
    if xp.name == "numpy":
        return
    ours, theirs = xp.array(np.zeros((2, 3))), np.zeros((2, 3), np.float32)
    with raises(TypeError, "pack", "[1]", "numpy", xp.name):
        scree.pack([ours, theirs])
    with raises(TypeError, "pack", "[2]", "numpy", xp.name):
        scree.pack([theirs, theirs, ours])
    with raises(TypeError, "offsets", "numpy", xp.name):
        scree.Array(ours, np.array([0, 2]))
    with raises(TypeError, "offsets", "numpy", xp.name):
        scree.Array(theirs, xp.array([0, 2], "int32"))
    with raises(TypeError, "mask", "numpy", xp.name):
        scree.from_padded(ours, np.ones((2, 3), bool))
    mine, other = scree.pack([ours]), scree.pack([theirs])
    with raises(TypeError, "concat", "[1]", "numpy", xp.name):
        scree.concat([mine, other])
    with raises(TypeError, "numpy", xp.name):
        mine + other


def test_devices_do_not_mix(grad_xp):
    if grad_xp.name != "torch":
        return
    torch = grad_xp.module
    here, there = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
    with raises(ValueError, "pack", "[1]", "meta", "cpu"):
        scree.pack([here, there])
    with raises(ValueError, "offsets", "meta", "cpu"):
        scree.Array(here, torch.zeros(2, dtype=torch.int32, device="meta"))
    with raises(ValueError, "mask", "meta", "cpu"):
        scree.from_padded(here, torch.ones(2, 3, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("dtype", [">f4", ">i4", "complex64", "datetime64[s]", "U3", "f8,i4", "longdouble"])
def test_numpy_dtypes_beyond_the_shared_ones(dtype):
    values = np.arange(10).astype(dtype).reshape(5, 2) if dtype != "f8,i4" else np.zeros((5, 2), dtype)
    arr = scree.Array(values, np.array([0, 2, 2, 5]))
    for got in (
        scree.from_padded(*scree.to_padded(arr, fill_value=0)),
        scree.from_padded(*scree.to_padded(arr, "left", fill_value=0)),
        scree.pack(scree.unpack(arr)),
        scree.concat([arr[:1], arr[1:]]),
        arr[[0, 1, 2]],
        arr.copy(),
    ):
        np.testing.assert_array_equal(got.values, values)
        assert got.dtype == values.dtype
