"""pack, unpack, to_padded, from_padded, from_cu_seqlens, from_lengths, concat, with_capacity."""

import numpy as np
import pytest

import oracle
import scree
from cases import EDGES, host_offsets, normal, with_spare
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
    # Where the lengths are not looked at, validate() sees the offset that falls.
    bad([5, -1, 5], *((-1,) if xp.checks_at_construction else ("offsets[2]", 4)))
    with raises(ValueError, "lengths", "(1, 1)"):
        scree.from_lengths(values, xp.array([[9]], "int32"))
    for dtype in ("float32", "bool"):
        with raises((TypeError, ValueError), "lengths", dtype):
            scree.from_lengths(values, xp.array([1, 1], dtype))


# concat


def two(xp, ragged_dim=0):
    """Return two Arrays of five rows."""
    a = make(xp, features=(2, 3), ragged_dim=ragged_dim)
    b = make(xp, lengths=(2, 0, 1, 1, 0), features=(2, 3), ragged_dim=ragged_dim) * -1
    return a, b


@pytest.mark.parametrize("ragged_dim", [0, 1, 2])
def test_concat_by_rows(xp, ragged_dim):
    a, b = two(xp, ragged_dim)
    c = make(xp, lengths=(), features=(2, 3), ragged_dim=ragged_dim)
    for given in ([a, b], (a, b), iter([a, b]), [c, a, c, b]):
        got = scree.concat(given)
        assert_rows(xp, got, rows_of(xp, a) + rows_of(xp, b))
        assert got.ragged_dim == ragged_dim
        assert got.max_length == 5
    assert_rows(xp, scree.concat([a, b], dim="batch"), rows_of(xp, a) + rows_of(xp, b))
    assert_rows(xp, scree.concat([a]), rows_of(xp, a))
    assert xp.dtype_of(scree.concat([a, b]).offsets) == "int32"


@pytest.mark.parametrize("ragged_dim", [0, 1, 2])
def test_concat_row_by_row(xp, ragged_dim):
    a, b = two(xp, ragged_dim)
    got = scree.concat([a, b, a], dim="ragged")
    want = [np.concatenate([x, y, x], ragged_dim) for x, y in zip(rows_of(xp, a), rows_of(xp, b), strict=True)]
    assert_rows(xp, got, want)
    assert got.max_length == max(r.shape[ragged_dim] for r in want)
    assert_rows(xp, scree.concat([a], dim="ragged"), rows_of(xp, a))
    none = make(xp, lengths=(), features=(2, 3), ragged_dim=ragged_dim)
    assert len(scree.concat([none, none], dim="ragged")) == 0


def test_concat_keeps_the_dtype(xp, any_dtype):
    a = make(xp, any_dtype)
    for dim in ("batch", "ragged"):
        assert xp.dtype_of(scree.concat([a, a], dim=dim).values) == any_dtype


def test_concat_of_capacity_arrays_leaves_the_spare_out(xp):
    a, b = make(xp), make(xp, lengths=(2, 0, 1, 1, 0))
    full = with_spare(xp, a, 5, 13)
    assert_rows(xp, scree.concat([full, b]), rows_of(xp, a) + rows_of(xp, b))
    assert_rows(xp, scree.concat([b, full]), rows_of(xp, b) + rows_of(xp, a))
    want = [np.concatenate([x, y]) for x, y in zip(rows_of(xp, a), rows_of(xp, b), strict=True)]
    assert_rows(xp, scree.concat([full, b], dim="ragged"), want)


def test_concat_errors(xp):
    a, _ = two(xp)
    for dim in ("batch", "ragged"):
        with raises(ValueError, "concat", "empty"):
            scree.concat([], dim=dim)
        with raises((TypeError, ValueError), "concat", "[1]", "float16", "float32"):
            scree.concat([a, a.astype("float16")], dim=dim)
        with raises(ValueError, "concat", "[1]"):
            scree.concat([a, make(xp, features=(2, 4))], dim=dim)
        with raises(ValueError, "concat", "[2]", "ragged_dim"):
            scree.concat([a, a, two(xp, 1)[0]], dim=dim)
        with raises(TypeError, "concat", "[1]"):
            scree.concat([a, a.values], dim=dim)
    with raises(ValueError, "concat", "[1]", 4, 5):
        scree.concat([a, make(xp, lengths=(1, 1, 1, 1), features=(2, 3))], dim="ragged")
    for dim in ("rows", 0, None):
        with raises((ValueError, TypeError), "concat", "dim", "batch", "ragged"):
            scree.concat([a, a], dim=dim)


def test_gradients_through_concat(grad_xp):
    xp = grad_xp
    wa, wb = normal((9, 2), 1), normal((4, 2), 2)
    left, right = xp.array(oracle.offsets_of(LENGTHS), "int32"), xp.array(oracle.offsets_of((2, 0, 1, 1, 0)), "int32")
    for dim in ("batch", "ragged"):
        weights = scree.concat([scree.Array(xp.array(wa), left), scree.Array(xp.array(wb), right)], dim=dim).values

        def through(a, b, dim=dim, weights=weights):
            return (scree.concat([scree.Array(a, left), scree.Array(b, right)], dim=dim).values * weights).sum()

        ga, gb = xp.eager_grad(through, xp.array(wa), xp.array(wb))
        np.testing.assert_allclose(ga, wa, rtol=1e-6)
        np.testing.assert_allclose(gb, wb, rtol=1e-6)


# with_capacity


@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_with_capacity(xp, any_dtype, ragged_dim):
    arr = make(xp, any_dtype, ragged_dim=ragged_dim)
    full = scree.with_capacity(arr, 7, 13)
    assert full.batch_size == 7
    assert full.total_length == 13
    assert full.ragged_dim == ragged_dim
    assert host_offsets(xp, full) == [*host_offsets(xp, arr), 9, 9]
    assert xp.dtype_of(full.values) == any_dtype
    assert xp.dtype_of(full.offsets) == "int32"
    assert_rows(xp, full[:5], rows_of(xp, arr))
    spare = np.moveaxis(xp.to_np(full.values), ragged_dim, 0)[9:]
    np.testing.assert_array_equal(spare, np.zeros((4, 2)))


def test_with_capacity_of_what_fits_exactly(xp):
    arr = make(xp)
    full = scree.with_capacity(arr, 5, 9)
    assert_rows(xp, full, rows_of(xp, arr))
    assert (full.batch_size, full.total_length) == (5, 9)


def test_with_capacity_twice(xp):
    arr = make(xp)
    twice = scree.with_capacity(with_spare(xp, arr, 6, 11), 8, 16)
    assert (twice.batch_size, twice.total_length) == (8, 16)
    assert host_offsets(xp, twice) == [*host_offsets(xp, arr), 9, 9, 9]
    assert_rows(xp, twice[:5], rows_of(xp, arr))


def test_with_capacity_of_nothing(xp):
    full = scree.with_capacity(make(xp, lengths=()), 3, 4)
    assert host_offsets(xp, full) == [0, 0, 0, 0]
    assert full.total_length == 4
    assert scree.with_capacity(make(xp, lengths=()), 0, 0).batch_size == 0


def test_with_capacity_errors(xp):
    arr = make(xp)
    with raises(ValueError, "batch_size", 4, 5):
        scree.with_capacity(arr, 4, 20)
    with raises(ValueError, "total_length", 8, 9):
        scree.with_capacity(arr, 7, 8)
    for bad in (-1, 2.5, "7", None):
        with raises((TypeError, ValueError), "batch_size"):
            scree.with_capacity(arr, bad, 13)
        with raises((TypeError, ValueError), "total_length"):
            scree.with_capacity(arr, 7, bad)


def test_only_with_capacity_leaves_values_over(xp):
    full = scree.with_capacity(make(xp), 7, 13)
    with raises(ValueError, "offsets[-1]", 9, 13):
        scree.Array(full.values, full.offsets).validate()


def test_gradients_through_with_capacity(grad_xp):
    xp = grad_xp
    weights = normal((13, 2), 1)
    offsets = xp.array(oracle.offsets_of(LENGTHS), "int32")

    def through(values):
        return (scree.with_capacity(scree.Array(values, offsets), 7, 13).values * xp.array(weights)).sum()

    np.testing.assert_allclose(xp.eager_grad(through, xp.array(normal((9, 2), 0)))[0], weights[:9], rtol=1e-6)


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
