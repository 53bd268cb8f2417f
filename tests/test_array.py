"""The type: fields, properties, row access, arithmetic, copies, text."""

import copy
import pickle

import numpy as np
import pytest

import scree
from cases import batch, host_offsets, normal, with_spare
from expect import assert_same_bits, raises

LENGTHS = (0, 3, 1, 5, 0)


def make(xp, dtype="float32", lengths=LENGTHS, features=(2,), ragged_dim=0):
    """Make an Array of small whole numbers, all of them exact in every dtype."""
    total = sum(lengths)
    shape = list(features)
    shape.insert(ragged_dim, total)
    data = np.arange(1, 1 + int(np.prod(shape))).reshape(shape) % 100
    values = xp.array(data.astype(bool) if dtype == "bool" else data, dtype)
    return scree.Array(values, xp.array(np.concatenate([[0], np.cumsum(lengths)]), "int32"), ragged_dim)


def rows_of(xp, arr):
    """Return the rows as NumPy, cut by hand."""
    offsets = host_offsets(xp, arr)
    values = np.moveaxis(xp.to_np(arr.values), arr.ragged_dim, 0)
    return [np.moveaxis(values[a:b], 0, arr.ragged_dim) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def assert_rows(xp, arr, expected):
    """Require these rows, in order."""
    assert len(arr) == len(expected)
    for row, want in zip(rows_of(xp, arr), expected, strict=True):
        np.testing.assert_array_equal(row, want)


# Fields and properties


def test_fields_are_the_objects_given(xp):
    values, offsets = xp.array(normal((4, 2), 0)), xp.array([0, 1, 4], "int32")
    arr = scree.Array(values, offsets)
    assert arr.values is values
    assert arr.offsets is offsets
    assert arr.ragged_dim == 0


def test_properties(xp, any_dtype):
    arr = make(xp, any_dtype)
    assert arr.batch_size == len(arr) == 5
    assert arr.total_length == 9
    assert arr.feature_shape == (2,)
    assert type(arr.feature_shape) is tuple
    assert arr.dtype == arr.values.dtype
    assert xp.to_np(arr.lengths).tolist() == list(LENGTHS)
    assert xp.is_array(arr.lengths)
    assert (arr.max_length, arr.min_length) == (5, 0)
    assert type(arr.max_length) is int
    assert type(arr.min_length) is int
    assert arr.nbytes == 18 * arr.values.itemsize + 6 * 4
    assert type(arr.nbytes) is int


def test_device_is_that_of_the_values(xp):
    arr = make(xp)
    assert arr.device is not None
    if hasattr(arr.values, "device"):
        assert arr.device == arr.values.device


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (4, 4), (2, 7)])
def test_longest_and_shortest(xp, lengths):
    arr = make(xp, lengths=lengths)
    assert arr.max_length == max(lengths, default=0)
    assert arr.min_length == min(lengths, default=0)
    assert arr.batch_size == len(lengths)
    assert list(arr.lengths.shape) == [len(lengths)]
    assert len(scree.unpack(arr)) == len(lengths)


@pytest.mark.parametrize(("given", "kept"), [(0, 0), (1, 1), (2, 2), (-1, 2), (-2, 1), (-3, 0)])
def test_ragged_dim_counts_from_the_end(xp, given, kept):
    values = xp.array(np.zeros((4, 4, 4)))
    arr = scree.Array(values, xp.array([0, 1, 4], "int32"), given)
    assert arr.ragged_dim == kept
    assert arr.feature_shape == (4, 4)
    assert arr.total_length == 4


@pytest.mark.parametrize("offsets_dtype", ["int8", "int16", "int32", "int64", "uint8"])
def test_integer_offsets_are_kept(xp, offsets_dtype):
    if offsets_dtype not in xp.integers:
        assert xp.name == "jax"  # JAX without 64-bit types has no int64 to keep
        return
    offsets = xp.array([0, 2, 2, 5], offsets_dtype)
    arr = scree.Array(xp.array(normal((5,), 0)), offsets)
    assert arr.offsets is offsets
    assert xp.dtype_of(arr.offsets) == offsets_dtype
    assert [len(xp.to_np(r)) for r in arr] == [2, 0, 3]
    assert arr.max_length == 3


def test_offsets_past_two_to_the_31():
    total = 2**31 + 10
    values = np.broadcast_to(np.zeros((), np.int8), (total,))
    arr = scree.Array(values, np.array([0, 2**31, 2**31, total]))
    assert arr.max_length == 2**31
    assert arr.total_length == total
    assert arr.lengths.tolist() == [2**31, 0, 10]
    assert arr[0].shape == (2**31,)
    assert [r.shape[0] for r in scree.unpack(arr)] == [2**31, 0, 10]
    assert arr.max_length == 2**31
    made = scree.from_lengths(values, np.array([2**31, 0, 10]))
    assert made.offsets.dtype == np.int64
    assert made.offsets.tolist() == [0, 2**31, 2**31, total]
    small = scree.from_lengths(values, np.array([2**31, 0, 10], np.int64))[1:]
    assert [r.shape[0] for r in small] == [0, 10]


def test_lengths_of_int32_that_sum_past_two_to_the_31():
    values = np.broadcast_to(np.zeros((), np.int8), (3 * 2**30,))
    made = scree.from_lengths(values, np.array([2**30, 2**30, 2**30], np.int32))
    assert made.offsets.tolist() == [0, 2**30, 2**31, 3 * 2**30]


def test_read_only_and_negatively_strided_numpy():
    base = np.arange(12.0).reshape(6, 2)
    backwards = base[::-1]
    arr = scree.Array(backwards, np.array([6, 6, 2, 0])[::-1])
    np.testing.assert_array_equal(arr[0], backwards[:2])
    np.testing.assert_array_equal(scree.to_padded(arr)[0][1], backwards[2:6])
    locked = base.copy()
    locked.flags.writeable = False
    offsets = np.array([0, 2, 6])
    offsets.flags.writeable = False
    arr = scree.Array(locked, offsets)
    np.testing.assert_array_equal(arr[1], locked[2:])
    np.testing.assert_array_equal(scree.concat([arr, arr]).values, np.concatenate([locked, locked]))
    assert (arr + 1).values.flags.writeable
    across = scree.Array(base.T[:, ::-1], np.array([0, 1, 6]), ragged_dim=1)
    np.testing.assert_array_equal(across[1], base.T[:, ::-1][:, 1:])


def test_immutable(xp):
    arr = make(xp)
    for name in ("values", "offsets", "ragged_dim", "batch_size", "new"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(arr, name, 1)
    for name in ("values", "offsets", "ragged_dim"):
        with pytest.raises((AttributeError, TypeError)):
            delattr(arr, name)
    with pytest.raises(TypeError):
        arr[0] = arr[0]
    before = arr
    arr += 1  # makes a new Array
    assert arr is not before
    assert_rows(xp, before, rows_of(xp, make(xp)))


# Text


def test_repr(xp, any_dtype):
    arr = make(xp, any_dtype, lengths=(5, 0, 8), features=(8,))
    assert repr(arr) == f"scree.Array(batch_size=3, total_length=13, feature_shape=(8,), dtype={any_dtype})"


def test_repr_of_edges(xp):
    assert repr(make(xp, lengths=(), features=())) == (
        "scree.Array(batch_size=0, total_length=0, feature_shape=(), dtype=float32)"
    )
    assert "feature_shape=(2, 3)" in repr(make(xp, features=(2, 3)))
    assert "ragged_dim=1" in repr(make(xp, features=(2, 3), ragged_dim=1))


def test_repr_and_metadata_wait_for_no_device(xp, monkeypatch):
    from scree import _backends

    backend = _backends.load(xp.name)

    def refuse(*args, **kwargs):
        raise AssertionError("a copy from the device")

    values, offsets = xp.array(normal((9, 2), 0)), xp.array([0, 4, 9], "int32")
    if not xp.checks_at_construction:
        monkeypatch.setattr(backend, "to_host", refuse)
    arr = scree.Array(values, offsets)
    monkeypatch.setattr(backend, "to_host", refuse)
    assert "batch_size=2" in repr(arr)
    assert (len(arr), arr.total_length, arr.feature_shape) == (2, 9, (2,))
    assert arr.lengths is not None
    assert (arr * 2).nbytes
    assert arr.map(lambda v: v + 1).offsets is offsets


def test_what_no_host_can_read_is_not_read(grad_xp):
    if grad_xp.name != "torch":
        return
    torch = grad_xp.module
    values = torch.zeros((13, 8), device="meta")
    arr = scree.Array(values, torch.zeros(4, dtype=torch.int32, device="meta"))
    assert repr(arr) == "scree.Array(batch_size=3, total_length=13, feature_shape=(8,), dtype=float32)"
    assert (arr + 1).values.device.type == "meta"


def test_html_draws_the_raggedness(xp):
    html = make(xp)._repr_html_()
    assert isinstance(html, str)
    assert "<" in html
    assert "float32" in html
    for edge in ((), (0,), (0, 0), tuple(range(500))):
        text = make(xp, lengths=edge)._repr_html_()
        assert isinstance(text, str)
        assert len(text) < 200_000


# Conversion, copies, pickles


def test_astype(xp, any_dtype):
    arr = make(xp, "int32")
    got = arr.astype(any_dtype)
    assert xp.dtype_of(got.values) == any_dtype
    assert got.offsets is arr.offsets
    want = xp.to_np(arr.values)
    np.testing.assert_array_equal(xp.to_np(got.values), want.astype(bool) if any_dtype == "bool" else want)
    assert xp.dtype_of(make(xp, "int32").astype(got.dtype).values) == any_dtype


def test_astype_refuses_what_is_no_dtype(xp):
    with pytest.raises((TypeError, ValueError)):
        make(xp).astype("no such dtype")


def test_to_its_own_device(xp):
    arr = make(xp)
    got = arr.to(arr.device)
    assert_rows(xp, got, rows_of(xp, arr))
    assert got.device == arr.device


@pytest.mark.parametrize("ragged_dim", [0, 1])
def test_pickle(xp, any_dtype, ragged_dim):
    arr = make(xp, any_dtype, features=(2,), ragged_dim=ragged_dim)
    got = pickle.loads(pickle.dumps(arr))
    assert xp.dtype_of(got.values) == any_dtype
    assert xp.dtype_of(got.offsets) == "int32"
    assert got.ragged_dim == ragged_dim
    assert_rows(xp, got, rows_of(xp, arr))


def test_pickle_of_a_capacity_array(xp):
    full = with_spare(xp, make(xp), 7, 13, spare=50)
    for got in (pickle.loads(pickle.dumps(full)), copy.copy(full), copy.deepcopy(full), full.copy()):
        assert got.validate().total_length == 13
        assert host_offsets(xp, got)[-1] == 9
        assert_rows(xp, got, rows_of(xp, full))
        assert_rows(xp, got + 1, [r + 1 for r in rows_of(xp, full)])


def test_copies(xp):
    arr = make(xp)
    for got in (copy.copy(arr), copy.deepcopy(arr), arr.copy()):
        assert got is not arr or not hasattr(arr.values, "__setitem__")
        assert_rows(xp, got, rows_of(xp, arr))
    if xp.has_views:
        assert not xp.shares_memory(copy.deepcopy(arr).values, arr.values)
        assert not xp.shares_memory(arr.copy().values, arr.values)
        assert not xp.shares_memory(copy.deepcopy(arr).offsets, arr.offsets)


def test_validate(xp):
    arr = make(xp)
    assert arr.validate() is arr
    full = with_spare(xp, arr, 7, 13)
    assert full.validate() is full


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([1, 3, 9], ("offsets[0]", 1)),
        ([0, 5, 3, 9], ("offsets[2]", 3, 5)),
        ([0, 5, 8], ("offsets[-1]", 8, 9)),
        ([0, 5, 10], ("offsets[-1]", 10, 9)),
        ([0, -2, 9], ("offsets", -2)),
        ([0, 10, 9], ("offsets", 10, 9)),
    ],
    ids=str,
)
def test_validate_finds_what_construction_could_not_look_at(xp, offsets, words):
    values, bad = xp.array(np.zeros((9, 2))), xp.array(offsets, "int32")
    if xp.checks_at_construction:
        with raises(ValueError, *words):
            scree.Array(values, bad)
    else:
        arr = scree.Array(values, bad)
        with raises(ValueError, *words):
            arr.validate()


def test_pin_memory(xp):
    arr = make(xp)
    if xp.name == "torch" and not xp.module.cuda.is_available():
        try:
            got = arr.pin_memory()
        except RuntimeError as error:  # torch's own words where no accelerator is
            assert "pin" in str(error) or "accelerator" in str(error)
            return
        assert_rows(xp, got, rows_of(xp, arr))
    elif xp.name == "torch":
        assert arr.pin_memory().values.is_pinned()
    else:
        with raises((TypeError, NotImplementedError), "pin_memory"):
            arr.pin_memory()


def test_gradients_flow_through_rows_and_arithmetic(grad_xp):
    xp = grad_xp
    weights = normal((9, 2), 1)

    def through(values):
        arr = scree.Array(values, xp.array([0, 0, 3, 4, 9, 9], "int32"))
        twice = (arr * 2 + arr).map(lambda v: v * xp.array(weights))
        return twice[3].sum() + twice[[1]].values.sum() + twice[2:3].values.sum()

    (grad,) = xp.eager_grad(through, xp.array(normal((9, 2), 0)))
    np.testing.assert_allclose(grad, 3 * weights, rtol=1e-6)


def test_the_same_bits_from_every_way_in(xp):
    arr = batch(xp, LENGTHS, (3,))
    again = scree.pack(scree.unpack(arr)) if len(arr) else arr
    assert_same_bits(xp.to_np(again.values), xp.to_np(arr.values))
    assert host_offsets(xp, again) == host_offsets(xp, arr)
