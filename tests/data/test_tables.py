"""Packing blocks of Arrow tables: nothing lost, counted, the same for every layout of the block, and bad input."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scree
from expect import raises
from scree.data import pack_table, unpack_table

pa = pytest.importorskip("pyarrow")

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def counts(packed):
    return json.loads(packed.schema.metadata[b"scree.pack"])


def rows_of(packed, column="input_ids"):
    return [row.tolist() for row in unpack_table(packed, column)]


@PROPERTY
@given(
    rows=st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=30),
    capacity=st.integers(9, 20),
    algo=st.sampled_from(["bfd", "ffd", "split"]),
    seed=st.none() | st.integers(0, 2),
)
def test_every_sequence_comes_once(rows, capacity, algo, seed):
    table = pa.table({"ids": pa.array(rows, pa.list_(pa.int32())), "other": list(range(len(rows)))})
    packed = pack_table(table, "ids", capacity, algo=algo, seed=seed)
    assert sorted(rows_of(packed, "ids")) == sorted(rows)
    assert packed.column_names == ["ids", "lengths"]
    assert all(len(bin_) <= capacity for bin_ in packed["ids"].to_pylist())
    told = counts(packed)
    assert told == {
        "rows": len(rows), "tokens": sum(map(len, rows)), "bins": len(packed), "split": 0, "dropped": 0, "nulls": 0
    }  # fmt: skip


def test_the_layout_of_the_block_does_not_matter():
    rows = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    plain = pa.table({"ids": rows})
    expected = pack_table(plain, "ids", 5)
    chunked = pa.concat_tables([plain[:1], plain[1:3], plain[3:]])
    sliced = pa.table({"ids": [[0], *rows, [0]]})[1:5]
    large = plain.cast(pa.schema([("ids", pa.large_list(pa.int64()))]))
    for table in (chunked, sliced, large, plain.to_batches()[0]):
        assert pack_table(table, "ids", 5).to_pydict() == expected.to_pydict()


@pytest.mark.parametrize("kind", [list, np.array, tuple])
def test_texts_are_tokenised_all_at_once(kind):
    calls = []

    def tokenize(texts):
        calls.append(texts)
        return [kind([len(word) for word in text.split()]) for text in texts]

    packed = pack_table(pa.table({"text": ["a bb", "", "ccc é d"]}), "text", 8, tokenize=tokenize)
    assert calls == [["a bb", "", "ccc é d"]]
    assert sorted(rows_of(packed)) == [[], [1, 2], [3, 1, 1]]
    as_array = pack_table(
        pa.table({"text": ["a", "b"]}), "text", 8, tokenize=lambda t: scree.pack([np.ones(2, int)] * 2)
    )
    assert rows_of(as_array) == [[1, 1], [1, 1]]


def test_what_is_too_long_or_null_is_counted():
    table = pa.table({"ids": [[1] * 9, None, [2], [3] * 4]})
    with raises(ValueError, "pack_table: row 1 of 'ids' is null; needs a value, or nulls='drop'"):
        pack_table(table, "ids", 4)
    with raises(ValueError, "lengths[0]: got 9, above the capacity of 4"):
        pack_table(table, "ids", 4, nulls="drop")
    split = pack_table(table, "ids", 4, nulls="drop", too_long="split")
    assert {name: counts(split)[name] for name in ("rows", "split", "nulls", "tokens")} == {
        "rows": 4, "split": 1, "nulls": 1, "tokens": 14
    }  # fmt: skip
    dropped = pack_table(table, "ids", 4, nulls="drop", too_long="drop")
    assert counts(dropped)["dropped"] == 1
    assert sorted(rows_of(dropped, "ids")) == [[2], [3, 3, 3, 3]]


@pytest.mark.parametrize("n", [0, 3])
def test_a_block_without_one_value(n):
    table = pa.table({"ids": pa.nulls(n)})
    for options, output in (({}, "ids"), ({"tokenize": lambda texts: [[1] for _ in texts]}, "input_ids")):
        packed = pack_table(table, "ids", 4, nulls="drop", **options)
        assert packed.to_pydict() == {output: [], "lengths": []}
        assert (counts(packed)["rows"], counts(packed)["nulls"]) == (n, n)


def test_column_names_that_are_taken():
    twice = pa.Table.from_arrays([pa.array([[1]]), pa.array([[2]])], names=["ids", "ids"])
    with raises(ValueError, "pack_table: the table has several columns 'ids'; needs one"):
        pack_table(twice, "ids", 4)
    with raises(ValueError, "pack_table: got column 'lengths', the name of what it adds; needs another name"):
        pack_table(pa.table({"lengths": [[1]]}), "lengths", 4)
    assert pack_table(pa.table({"lengths": ["a"]}), "lengths", 4, tokenize=lambda texts: [[7]]).to_pydict() == {
        "input_ids": [[7]], "lengths": [[1]]
    }  # fmt: skip


def test_no_rows():
    for tokenize in (None, lambda texts: pytest.fail("called without texts")):
        kind = pa.string() if tokenize else pa.list_(pa.int32())
        packed = pack_table(pa.table({"x": pa.array([], kind)}), "x", 8, tokenize=tokenize)
        assert (len(packed), counts(packed)["bins"]) == (0, 0)
        assert unpack_table(packed, "input_ids" if tokenize else "x").batch_size == 0


def test_unpacked_values_are_viewed():
    packed = pack_table(pa.table({"ids": [[1, 2], [3]]}), "ids", 8)
    arr = unpack_table(packed, "ids")
    assert not arr.values.flags.owndata
    assert arr.offsets.tolist() == [0, 2, 3]
    assert [row.tolist() for row in unpack_table(packed.slice(0, 1), "ids")] == [[1, 2], [3]]
    two = pack_table(pa.table({"ids": [[1] * 8, [2, 2], [3]]}), "ids", 8)
    assert [row.tolist() for row in unpack_table(two[1:], "ids")] == [[2, 2], [3]]


def test_bad_tables():
    table = pa.table({"ids": [[1]], "text": ["a"], "x": [1.5], "nested": [[[1]]], "f": [[1.5]]})
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])

    def give(made):
        return lambda texts: made

    for arguments, error, words in (
        (({"ids": [[1]]}, "ids", 4), TypeError, ("pack_table: table is dict; needs a pyarrow Table",)),
        ((table, "idz", 4), ValueError, ("pack_table: got column 'idz'; the table has 'ids', 'text'",)),
        ((table, "text", 4), TypeError, ("pack_table: column 'text': got type string", "texts need tokenize=")),
        ((table, "x", 4), TypeError, ("pack_table: column 'x': got type double",)),
        ((table, "nested", 4), TypeError, ("pack_table: column 'nested': got type list",)),
        ((table, "f", 4), TypeError, ("pack_table: column 'f' holds float64 (); needs lists of integers",)),
        ((table, "ids", 0), ValueError, ("capacity: got 0",)),
        ((table, "ids", 4, list), TypeError, ("pack_table: column 'ids' is of type list", "tokenize needs texts")),
        ((table, "text", 4, give([])), ValueError, ("tokenize gave 0 sequences for 1 texts; needs one each",)),
        ((table, "text", 4, give([[0.5]])), TypeError, ("tokenize gave float64 (1,) for text 0",)),
        (
            (table, "text", 4, give([[2**31]])),
            ValueError,
            ("tokenize gave tokens from 2147483648 to 2147483648; needs what int32 holds",),
        ),
        ((table, "text", 4, give("ab")), TypeError, ("tokenize gave str; needs a list of lists",)),
        ((table, "text", 4, give({"input_ids": [[1]]})), TypeError, ("tokenize gave dict; needs a list of lists",)),
        ((pa.table({"t": bad}), "t", 4, list), ValueError, ("pack_table: column 't' holds a text that is not UTF-8",)),
    ):
        *positional, tokenize = arguments if len(arguments) == 4 else (*arguments, None)
        with raises(error, *words):
            pack_table(*positional, tokenize=tokenize)
    with raises(ValueError, "nulls: got 'empty'; needs one of 'error', 'drop'"):
        pack_table(table, "ids", 4, nulls="empty")
    with raises(ValueError, "unpack_table: got column 'lengths'; the table has 'ids'"):
        unpack_table(table, "ids")
    with raises(ValueError, "unpack_table: the lengths of bin 1 do not add up to its 2 tokens"):
        unpack_table(pa.table({"ids": [[1], [2, 3]], "lengths": [[1], [3]]}), "ids")
