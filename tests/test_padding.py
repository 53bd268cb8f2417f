"""to_padded, from_padded."""

import numpy as np
import pytest

import oracle
import scree
from cases import EDGES, host_offsets, normal, with_spare
from expect import raises
from scree import _layout
from test_array import LENGTHS, assert_rows, make, rows_of

SIDES = ("right", "left")


def rows_in(xp, lengths=LENGTHS, features=(2,), dtype="float32", ragged_dim=0):
    """Return rows as NumPy and as the framework's arrays."""
    rows = rows_of(xp, make(xp, dtype, lengths, features, ragged_dim))
    return rows, [xp.array(r, dtype) for r in rows]


# to_padded


@pytest.mark.parametrize("side", SIDES)
def test_to_padded(xp, any_dtype, side):
    arr = make(xp, any_dtype)
    fill = 1 if any_dtype == "bool" else 7
    padded, mask = scree.to_padded(arr, side=side, fill_value=fill)
    want, want_mask = oracle.to_padded(rows_of(xp, arr), (2,), np.float64, side, fill)
    assert xp.dtype_of(padded) == any_dtype
    assert xp.dtype_of(mask) in ("bool", "bool_")
    assert xp.is_array(padded)
    assert xp.is_array(mask)
    np.testing.assert_array_equal(xp.to_np(padded).astype(np.float64), want)
    np.testing.assert_array_equal(xp.to_np(mask), want_mask)


@pytest.mark.parametrize("edge", EDGES, ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("max_length", [None, 7])
def test_to_padded_edges(xp, edge, side, max_length):
    arr = make(xp, lengths=EDGES[edge])
    padded, mask = scree.to_padded(arr, side, 0.5, max_length)
    want, want_mask = oracle.to_padded(rows_of(xp, arr), (2,), np.float32, side, 0.5, max_length)
    assert tuple(padded.shape) == want.shape
    np.testing.assert_array_equal(xp.to_np(padded), want)
    np.testing.assert_array_equal(xp.to_np(mask), want_mask)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ragged_dim", [1, 2])
def test_to_padded_along_another_axis(xp, side, ragged_dim):
    arr = make(xp, features=(2, 3), ragged_dim=ragged_dim)
    padded, mask = scree.to_padded(arr, side, -1.0)
    rows = [np.moveaxis(r, ragged_dim, 0) for r in rows_of(xp, arr)]
    want, want_mask = oracle.to_padded(rows, (2, 3), np.float32, side, -1.0)
    np.testing.assert_array_equal(xp.to_np(padded), want)
    np.testing.assert_array_equal(xp.to_np(mask), want_mask)


def test_to_padded_without_features(xp):
    arr = make(xp, "int32", features=())
    padded, _ = scree.to_padded(arr, fill_value=-100)
    np.testing.assert_array_equal(
        xp.to_np(padded), oracle.to_padded(rows_of(xp, arr), (), np.int32, fill_value=-100)[0]
    )


def test_to_padded_of_a_capacity_array(xp):
    full = with_spare(xp, make(xp), 7, 13)
    padded, mask = scree.to_padded(full)
    want, want_mask = oracle.to_padded(rows_of(xp, full), (2,), np.float32)
    np.testing.assert_array_equal(xp.to_np(padded), want)
    np.testing.assert_array_equal(xp.to_np(mask), want_mask)
    left, _ = scree.to_padded(full, "left", max_length=6)
    np.testing.assert_array_equal(
        xp.to_np(left), oracle.to_padded(rows_of(xp, full), (2,), np.float32, "left", max_length=6)[0]
    )


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("float16", -65504.0), ("float16", float("inf")), ("float16", float("nan")), ("bfloat16", 3e38),
        ("float32", -float("inf")), ("float32", float("nan")), ("float32", 0.1), ("int8", -128), ("uint8", 255),
        ("int64", 2**53 + 1), ("int64", -(2**63)), ("int32", -100.0), ("bool", True), ("bool", 0),
        ("int32", np.int64(3)), ("float32", np.float64(0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_fill_values_that_fit(xp, dtype, fill):
    if dtype not in xp.dtypes:
        return
    padded, mask = scree.to_padded(make(xp, dtype, lengths=(0, 3), features=()), fill_value=fill)
    assert xp.dtype_of(padded) == dtype
    got = xp.to_np(padded)[~xp.to_np(mask)]
    assert len(got) == 3
    want = np.array([fill] * 3)
    if dtype in ("float16", "bfloat16", "float32"):
        want = xp.to_np(xp.array(want.astype(np.float64), dtype))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("uint8", 300), ("int8", 300), ("int8", -129), ("uint8", -1), ("int32", 0.5), ("int32", float("nan")),
        ("int32", float("inf")), ("int16", 2**15), ("int32", 2**31), ("int64", 2**63), ("float16", 1e6),
        ("float16", -65536.0), ("bfloat16", 3.4e38), ("float32", 1e39), ("bool", 2), ("bool", 0.5),
        ("bool", float("nan")), ("float32", 10**400), ("int64", 1e300),
    ],
    ids=lambda x: str(x)[:12],
)  # fmt: skip
def test_fill_values_that_do_not_fit(xp, dtype, fill):
    if dtype not in xp.dtypes:
        return
    with raises((ValueError, TypeError), "fill_value", dtype):
        scree.to_padded(make(xp, dtype), fill_value=fill)


@pytest.mark.parametrize("fill", ["a", None, [1.0], 1j])
def test_fill_values_that_are_no_numbers(xp, fill):
    with raises((ValueError, TypeError), "fill_value"):
        scree.to_padded(make(xp), fill_value=fill)


def test_to_padded_errors(xp):
    arr = make(xp)
    with raises(ValueError, "side", "middle", "left", "right"):
        scree.to_padded(arr, side="middle")
    assert arr.max_length == 5  # known to the host from here on, wherever the Array is
    with raises(ValueError, "max_length", 4, 5):
        scree.to_padded(arr, max_length=4)
    with raises(ValueError, "max_length", -1):
        scree.to_padded(arr, max_length=-1)
    for bad in (2.5, "5", True, xp.array(np.zeros((2,)))):
        with raises((TypeError, ValueError), "max_length"):
            scree.to_padded(arr, max_length=bad)
    with raises(TypeError, "to_padded"):
        scree.to_padded(arr.values)


def test_gradients_through_padding(grad_xp):
    xp = grad_xp
    weights = normal((4, 5, 2), 3)
    lengths = (0, 3, 1, 5)
    offsets = xp.array(oracle.offsets_of(lengths), "int32")
    for side in SIDES:
        _, mask = oracle.to_padded([np.zeros((n, 2)) for n in lengths], (2,), np.float32, side)

        def out(values, side=side):
            padded, _ = scree.to_padded(scree.Array(values, offsets), side, 2.0)
            return (padded * xp.array(weights)).sum()

        def back(padded, mask=mask):
            arr = scree.from_padded(padded, xp.array(mask))
            return (arr.values * xp.array(weights[mask])).sum()

        np.testing.assert_allclose(xp.eager_grad(out, xp.array(normal((9, 2), 0)))[0], weights[mask], rtol=1e-6)
        (grad,) = xp.eager_grad(back, xp.array(normal((4, 5, 2), 0)))
        np.testing.assert_allclose(grad, np.where(mask[..., None], weights, 0), rtol=1e-6)


# from_padded


MASKS = {
    "right": [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "left": [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]],
    "none": [[0, 0, 0, 0]] * 4,
    "all": [[1, 1, 1, 1]] * 4,
}


@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("mask_dtype", ["bool", "int32", "int64", "uint8", "float32", "float16"])
def test_from_padded(xp, pattern, mask_dtype):
    data, bits = normal((4, 4, 2), 0).astype(np.float32), np.array(MASKS[pattern])
    arr = scree.from_padded(xp.array(data), xp.array(bits, mask_dtype))
    assert xp.dtype_of(arr.values) == "float32"
    assert xp.dtype_of(arr.offsets) == "int32"
    assert arr.ragged_dim == 0
    assert_rows(xp, arr, oracle.from_padded(data, bits))
    assert arr.max_length == bits.sum(1).max()


def test_from_padded_keeps_the_dtype(xp, any_dtype):
    arr = make(xp, any_dtype)
    for side in SIDES:
        back = scree.from_padded(*scree.to_padded(arr, side))
        assert xp.dtype_of(back.values) == any_dtype
        assert_rows(xp, back, rows_of(xp, arr))
        assert host_offsets(xp, back) == host_offsets(xp, arr)


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("features", [(), (2,), (2, 3)])
def test_from_padded_edges(xp, shape, features):
    arr = scree.from_padded(xp.array(np.ones((*shape, *features))), xp.array(np.ones(shape, bool)))
    assert arr.batch_size == shape[0]
    assert arr.feature_shape == features
    assert arr.total_length == shape[0] * shape[1]


def test_from_padded_errors(xp):
    padded = xp.array(np.zeros((3, 4, 2)))
    for shape in [(3, 5), (2, 4), (4, 4), (3,), (3, 4, 1), (12,), (3, 4, 2), (1, 4), (4, 3)]:
        with raises(ValueError, "mask", shape, "(3, 4)"):
            scree.from_padded(padded, xp.array(np.ones(shape), "bool"))
    for bad, dtype in [
        (2, "int32"),
        (-1, "int32"),
        (0.5, "float32"),
        (np.nan, "float32"),
        (255, "uint8"),
        (np.inf, "float32"),
    ]:
        mask = np.ones((3, 4))
        mask[1, 2] = bad
        with raises(ValueError, "mask", "0", "1"):
            scree.from_padded(padded, xp.array(mask, dtype))
    with raises(ValueError, "padded", "(3,)"):
        scree.from_padded(xp.array(np.zeros((3,))), xp.array(np.ones((3,)), "bool"))
    with raises(TypeError, "padded"):
        scree.from_padded([[1.0]], [[True]])
    with raises(TypeError, "mask"):
        scree.from_padded(padded, [[True] * 4] * 3)


# from_padded with lengths


@pytest.mark.parametrize("edge", EDGES, ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_from_padded_with_lengths(xp, edge, side):
    arr = make(xp, lengths=EDGES[edge])
    padded, _ = scree.to_padded(arr, side, 0.5, 7)
    lengths = np.diff(host_offsets(xp, arr))
    for given in (arr, lengths.tolist(), lengths, xp.array(lengths, "int32")):
        back = scree.from_padded(padded, lengths=given, side=side)
        assert xp.dtype_of(back.values) == xp.dtype_of(arr.values)
        assert_rows(xp, back, rows_of(xp, arr))
        assert host_offsets(xp, back) == host_offsets(xp, arr)
        assert (back.offsets is arr.offsets) == (given is arr)


@pytest.mark.parametrize("side", SIDES)
def test_from_padded_with_lengths_nobody_knows(xp, side):
    arr = make(xp)
    padded, _ = scree.to_padded(arr, side, 0.5)
    unknown = with_spare(xp, arr, arr.batch_size, arr.total_length + 4)
    assert unknown.total_length > arr.total_length
    back = scree.from_padded(padded, lengths=unknown, side=side)
    assert back.offsets is unknown.offsets
    values = xp.to_np(back.values)
    np.testing.assert_array_equal(values[: arr.total_length], xp.to_np(arr.values))
    assert not values[arr.total_length :].any()


@pytest.mark.parametrize("offsets_dtype", ["int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("side", SIDES)
def test_to_padded_with_offsets_of_any_integer_dtype(xp, offsets_dtype, side):
    arr = make(xp)
    host = xp.to_np(arr.offsets).astype(offsets_dtype)
    try:
        same = scree.Array(arr.values, xp.array(host, offsets_dtype))
    except TypeError as refused:
        assert xp.name == "torch"
        assert offsets_dtype.startswith("uint"), refused
        return
    for width in (None, 6, 300):
        if width is not None or xp.name != "jax":
            run = xp.run if xp.name == "jax" else lambda fn, arr: fn(arr)
            got = run(lambda arr, width=width: scree.to_padded(arr, side=side, max_length=width), same)
            for mine, want in zip(got, scree.to_padded(arr, side=side, max_length=width), strict=True):
                np.testing.assert_array_equal(xp.to_np(mine), xp.to_np(want))


@pytest.mark.parametrize("side", SIDES)
def test_a_row_that_is_too_long_for_traced_offsets_is_not_a_number(xp, side):
    arr = make(xp, lengths=(1, 3, 2))
    padded = xp.array(normal((3, 2, 2), 0), "float32")
    got = xp.to_np(_layout.unpad_device(arr._xp, padded, arr.offsets, 6, side))
    host = xp.to_np(padded)
    first = host[0, :1] if side == "right" else host[0, 1:]
    np.testing.assert_array_equal(got[:1], first)
    assert np.isnan(got[1:4] if side == "left" else got[3:4]).all()
    np.testing.assert_array_equal(got[4:], host[2])


def test_from_padded_with_lengths_errors(xp):
    padded = xp.array(np.zeros((3, 4, 2)))
    mask = xp.array(np.ones((3, 4), bool))
    with raises(TypeError, "from_padded", "neither mask nor lengths"):
        scree.from_padded(padded)
    with raises(TypeError, "from_padded", "mask and lengths"):
        scree.from_padded(padded, mask, lengths=[1, 2, 3])
    with raises(ValueError, "side", "'left'", "lengths"):
        scree.from_padded(padded, mask, side="left")
    with raises(ValueError, "side", "'up'"):
        scree.from_padded(padded, lengths=[1, 2, 3], side="up")
    with raises(ValueError, "lengths", "got 2", "needs 3"):
        scree.from_padded(padded, lengths=[1, 2])
    for bad in (-1, 5):
        with raises(ValueError, "lengths[1]", f"got {bad}", "0 to 4"):
            scree.from_padded(padded, lengths=[1, bad, 3])
    with raises(TypeError, "lengths", "integers"):
        scree.from_padded(padded, lengths=[1.0, 2.0, 3.0])
    with raises(ValueError, "lengths", "2 sequences", "needs 3"):
        scree.from_padded(padded, lengths=make(xp, lengths=(1, 2)))
    with raises(ValueError, "lengths", "longest is 6", "at most 4"):
        scree.from_padded(padded, lengths=make(xp, lengths=(1, 6, 2)))
