"""Round trips for anything that hypothesis draws, against plain lists of rows."""

import numpy as np
from hypothesis import strategies as st

import oracle
import scree
import strategies
from strategies import check
from test_array import assert_rows

SOME = ("float32", "int32", "bool", "float16")


def pack(xp, drawn):
    """Return the Array and its rows as NumPy."""
    rows, dtype, ragged_dim = drawn
    arr = scree.pack([xp.array(r, dtype) for r in rows], ragged_dim)
    return arr, [xp.to_np(xp.array(r, dtype)) for r in rows], dtype, ragged_dim


def dtypes_of(xp):
    """Draw from a few dtypes where each costs a compilation."""
    return SOME if xp.compiles_per_shape else xp.dtypes


def test_pack_and_unpack(xp):
    def prop(drawn):
        arr, rows, dtype, ragged_dim = pack(xp, drawn)
        assert xp.dtype_of(arr.values) == dtype
        assert arr.max_length == max(r.shape[ragged_dim] for r in rows)
        assert arr.min_length == min(r.shape[ragged_dim] for r in rows)
        back = scree.unpack(arr)
        assert len(back) == len(rows)
        for row, want in zip(back, rows, strict=True):
            assert tuple(row.shape) == want.shape
            assert xp.dtype_of(row) == dtype
            np.testing.assert_array_equal(xp.to_np(row), want)

    check(xp, prop, drawn=strategies.batches(dtypes_of(xp)))


def test_padding_there_and_back(xp):
    def prop(drawn, side, more):
        arr, rows, dtype, ragged_dim = pack(xp, drawn)
        first = [np.moveaxis(r, ragged_dim, 0) for r in rows]
        longest = arr.max_length + more
        padded, mask = scree.to_padded(arr, side, 1, longest)
        want, want_mask = oracle.to_padded(first, arr.feature_shape, rows[0].dtype, side, 1, longest)
        np.testing.assert_array_equal(xp.to_np(padded), want)
        np.testing.assert_array_equal(xp.to_np(mask), want_mask)
        back = scree.from_padded(padded, mask)
        assert xp.dtype_of(back.values) == dtype
        assert_rows(xp, back, first)

    check(xp, prop, drawn=strategies.batches(dtypes_of(xp)), side=strategies.sides, more=st.integers(0, 3))


def test_any_mask(xp):
    def prop(mask, features):
        data = np.arange(mask.size * int(np.prod(features))).reshape((*mask.shape, *features)).astype(np.float32)
        arr = scree.from_padded(xp.array(data), xp.array(mask))
        assert arr.feature_shape == features
        assert_rows(xp, arr, oracle.from_padded(data, mask))

    check(xp, prop, mask=strategies.masks(), features=strategies.features)


def test_concat(xp):
    def prop(drawn, cut):
        arr, rows, _, ragged_dim = pack(xp, drawn)
        cut = min(cut, len(rows))
        parts = [arr[:cut], arr[cut:]]
        assert_rows(xp, scree.concat(parts), rows)
        joined = scree.concat([arr, arr[::-1], arr], dim="ragged")
        want = [np.concatenate([a, b, a], ragged_dim) for a, b in zip(rows, rows[::-1], strict=True)]
        assert_rows(xp, joined, want)

    check(xp, prop, drawn=strategies.batches(dtypes_of(xp)), cut=st.integers(0, 6))


def test_rows(xp):
    def prop(drawn, data):
        arr, rows, _, _ = pack(xp, drawn)
        count = len(rows)
        i = data.draw(st.integers(-count, count - 1))
        np.testing.assert_array_equal(xp.to_np(arr[i]), rows[i])
        cut = data.draw(st.slices(count))
        assert_rows(xp, arr[cut], rows[cut])
        picks = data.draw(st.lists(st.integers(-count, count - 1), max_size=6))
        assert_rows(xp, arr[picks], [rows[p] for p in picks])
        keep = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
        assert_rows(xp, arr[np.array(keep)], [r for r, k in zip(rows, keep, strict=True) if k])
        assert_rows(xp, arr, list(rows))

    check(xp, prop, drawn=strategies.batches(dtypes_of(xp)), data=st.data())


def test_ids(xp):
    def prop(lengths, start, spare):
        values = xp.array(np.zeros((sum(lengths),)))
        arr = scree.Array(values, xp.array(oracle.offsets_of(lengths), "int32"))
        ids = [b for b, n in enumerate(lengths) for _ in range(n)]
        places = [start + t for n in lengths for t in range(n)]
        assert xp.to_np(scree.segment_ids(arr)).tolist() == ids
        assert xp.to_np(scree.position_ids(arr, start)).tolist() == places
        full = scree.with_capacity(arr, len(lengths) + spare, sum(lengths) + spare)
        assert xp.to_np(scree.segment_ids(full)).tolist() == ids + [len(lengths) + spare] * spare
        assert_rows(xp, full[: len(lengths)], [np.zeros((n,)) for n in lengths])

    check(xp, prop, lengths=strategies.lengths, start=st.integers(0, 3), spare=st.integers(0, 3))


def test_offsets_are_right_or_refused(xp):
    """Whatever integers are given: either every row is cut as told, or the error is ours."""

    def prop(offsets, total):
        values = np.arange(total, dtype=np.float32)
        good = (
            offsets[0] == 0 and offsets[-1] == total and all(a <= b for a, b in zip(offsets, offsets[1:], strict=False))
        )
        try:
            arr = scree.Array(xp.array(values), xp.array(offsets, "int32")).validate()
        except ValueError as error:
            assert not good, offsets
            assert "offsets" in str(error)
        else:
            assert good, offsets
            assert_rows(xp, arr, [values[a:b] for a, b in zip(offsets, offsets[1:], strict=False)])

    near = st.lists(st.integers(-1, 6), min_size=1, max_size=5)
    sound = st.lists(st.integers(0, 6), max_size=4).map(lambda x: [0, *sorted(x)])
    check(xp, prop, offsets=st.one_of(near, sound), total=st.integers(0, 6))
