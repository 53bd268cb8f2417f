"""Hugging Face datasets and Polars, each with the real library."""

import numpy as np
import pytest

import scree
from expect import assert_same_bits, raises
from scree.data import from_datasets, from_polars, pack_table, to_datasets, to_polars, unpack_table

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]

DTYPES = ("int8", "int32", "int64", "uint16", "float32", "float64", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_datasets_in_and_out(dtype):
    arr = scree.from_lengths(np.array([1, 0, 1, 1]).astype(dtype), [3, 0, 1])
    dataset = to_datasets({"ids": arr, "label": np.array([5, 6, 7])})
    assert dataset["label"][:] == [5, 6, 7]
    assert [list(row) for row in dataset["ids"]] == [row.tolist() for row in arr]
    back = from_datasets(dataset, "ids")
    assert_same_bits(back.values, arr.values)
    assert back.lengths.tolist() == [3, 0, 1]
    assert [row.tolist() for row in from_datasets(dataset.select([2, 0]), "ids")] == [arr[2].tolist(), arr[0].tolist()]


def test_a_saved_dataset_is_read_by_the_report(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from scree._cli._commands import app

    datasets = pytest.importorskip("datasets")
    dataset = to_datasets({"ids": scree.from_lengths(np.arange(40), [10] * 4)})
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "many"))
    monkeypatch.chdir(tmp_path)
    assert "4 sequences, 40 tokens" in CliRunner().invoke(app, ["report", "one"]).output
    assert "4 sequences, 40 tokens" in CliRunner().invoke(app, ["report", "many/train"]).output
    assert "has several splits" in CliRunner().invoke(app, ["report", "many"]).output


def test_pack_table_runs_within_datasets_unchanged():
    dataset = to_datasets({"ids": scree.from_lengths(np.arange(10, dtype=np.int32), [4, 3, 2, 1])})
    packed = dataset.with_format("arrow").map(
        pack_table, batched=True, fn_kwargs={"column": "ids", "capacity": 5}, remove_columns=["ids"]
    )
    rows = [row.tolist() for row in unpack_table(packed.with_format("arrow")[:], "ids")]
    assert sorted(rows) == [[0, 1, 2, 3], [4, 5, 6], [7, 8], [9]]


def test_what_is_no_dataset():
    import datasets

    with raises(TypeError, "from_datasets: got list; needs a datasets.Dataset"):
        from_datasets([1], "ids")
    dataset = datasets.Dataset.from_dict({"ids": [[1], None], "text": ["a", "b"]})
    with raises(TypeError, "from_datasets: got DatasetDict", "name one split"):
        from_datasets(datasets.DatasetDict({"train": dataset}), "ids")
    with raises(ValueError, "from_datasets: got column 'idz'; needs one of 'ids', 'text'"):
        from_datasets(dataset, "idz")
    with raises(TypeError, "got type string"):
        from_datasets(dataset, "text")
    with raises(ValueError, "row 1 is null"):
        from_datasets(dataset, "ids")
    assert from_datasets(dataset, "ids", nulls="empty").lengths.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_polars_in_and_out(dtype):
    import polars as pl

    arr = scree.from_lengths(np.array([1, 0, 1, 1]).astype(dtype), [3, 0, 1])
    frame = to_polars({"ids": arr, "label": np.array([5, 6, 7])})
    assert frame["label"].to_list() == [5, 6, 7]
    for back in (from_polars(frame, "ids"), from_polars(frame["ids"])):
        assert_same_bits(back.values, arr.values)
        assert back.lengths.tolist() == [3, 0, 1]
    assert from_polars(frame.filter(pl.col("label") > 5), "ids").lengths.tolist() == [0, 1]


def test_what_is_no_frame():
    import polars as pl

    with raises(TypeError, "from_polars: got list; needs a polars.Series"):
        from_polars([1])
    frame = pl.DataFrame({"ids": [[1], None], "text": ["a", "b"]})
    with raises(ValueError, "column: not given; needs one of 'ids', 'text'"):
        from_polars(frame)
    with raises(ValueError, "from_polars: got column 'idz'"):
        from_polars(frame, "idz")
    with raises(ValueError, "row 1 is null"):
        from_polars(frame, "ids")
    with raises(TypeError, "to_polars: got dict; needs a dictionary of one Array"):
        to_polars({})
    with raises(ValueError, "to_datasets: the fields have different numbers of rows ('a' 1, 'b' 2)"):
        to_datasets({"a": scree.from_lengths(np.arange(2), [2]), "b": np.arange(2)})
