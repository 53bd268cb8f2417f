"""Saving and loading: what comes back, from files of scree and of others, and what bad input gets."""

import gc
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from files import FORMATS, MAPPED, NEEDS_ARROW, PLAIN, corpus, names, same

import scree
from expect import assert_same_bits, raises
from scree.data import Corpus, load, save


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_round_trip_is_exact(suffix, tmp_path):
    path = tmp_path / f"corpus{suffix}"
    save(path, corpus())
    same(load(path), corpus())
    same(load(str(path), verify=False), corpus())
    same(load(path, fields=["label", "ids"]), {name: corpus()[name] for name in ("label", "ids")})
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_dtype(suffix, any_dtype, xp, tmp_path):
    path = tmp_path / f"a{suffix}"
    arr = scree.from_lengths(xp.array([1, 0, 1, 1], any_dtype), [3, 0, 1])
    if any_dtype == "bfloat16" and suffix in (".arrow", ".parquet"):
        with raises(TypeError, "save: field ''", "bfloat16"):
            save(path, arr)
        assert names(tmp_path) == []
        return
    save(path, arr)
    back = load(path)
    assert back.dtype.name == any_dtype
    same(back, scree.bridges.to_numpy(arr))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [3], [0, 2, 0]])
def test_empty_rows_and_no_rows(suffix, lengths, tmp_path):
    arr = scree.from_lengths(np.arange(2 * sum(lengths), dtype=np.int16).reshape(-1, 2), lengths)
    save(tmp_path / f"a{suffix}", arr)
    same(load(tmp_path / f"a{suffix}"), arr)
    if suffix != ".parquet":
        same(load(tmp_path / f"a{suffix}", mmap=True), arr)


@pytest.mark.parametrize("suffix", PLAIN)
def test_another_ragged_dim_and_wide_offsets(suffix, tmp_path):
    arr = scree.Array(np.arange(12.0).reshape(2, 6), np.array([0, 2, 6]), ragged_dim=1)
    assert arr.offsets.dtype == np.int64
    save(tmp_path / f"a{suffix}", arr)
    same(load(tmp_path / f"a{suffix}"), arr)


@pytest.mark.parametrize("suffix", FORMATS)
def test_spare_values_are_left_out(suffix, tmp_path):
    arr = scree.from_lengths(np.arange(4), [1, 3])
    save(tmp_path / f"a{suffix}", scree.with_capacity(arr, 3, 10))
    same(load(tmp_path / f"a{suffix}"), scree.from_lengths(np.arange(4), [1, 3, 0]))


@pytest.mark.parametrize("suffix", MAPPED)
def test_mapped_values_are_not_read(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    arr = scree.from_lengths(np.arange(1 << 20), np.full(1 << 10, 1 << 10))
    save(path, {"x": arr, "y": np.arange(1 << 10)})
    mapped = load(path, mmap=True)
    same(mapped, {"x": arr, "y": np.arange(1 << 10)})
    values = mapped["x"].values
    assert type(values) is np.ndarray
    assert not values.flags.writeable
    assert values.flags.aligned
    assert not values.flags.owndata


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc")
@pytest.mark.parametrize("suffix", MAPPED)
def test_opening_takes_no_memory(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save(path, scree.from_lengths(np.ones(1 << 25, np.uint8), np.full(1 << 5, 1 << 20)))
    program = f"""
        import resource, scree
        {"import pyarrow" if suffix == ".arrow" else ""}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        arr = scree.data.load({str(path)!r}, mmap=True)
        assert arr[3].sum() == 1 << 20
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24 * 1024  # KiB; the file has 32 MiB


@pytest.mark.parametrize("suffix", FORMATS)
def test_batches_of_an_iterator_become_one(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    rows = [np.arange(n, dtype=np.int32) for n in (3, 0, 4, 1)]
    save(path, (scree.pack(rows[i : i + 2]) for i in (0, 2)))
    same(load(path), scree.pack(rows))
    save(path, ({"x": scree.pack(rows[i : i + 2]), "y": np.full(2, i)} for i in (0, 2)))
    same(load(path), {"x": scree.pack(rows), "y": np.array([0, 0, 2, 2])})
    assert names(tmp_path) == [path.name]


def test_batches_that_do_not_fit_together(tmp_path):
    path = tmp_path / "a.npz"
    ints, floats = scree.from_lengths(np.arange(3), [3]), scree.from_lengths(np.arange(3.0), [3])
    for batches, error, words in (
        ([ints, floats], ValueError, ("save: batch 1: field '' has dtype float64", "needs int64")),
        ([{"x": ints}, {"y": ints}], ValueError, ("save: batch 1 has the fields ['y']; needs ['x']",)),
        ([{"x": ints}, {"x": np.arange(3)}], TypeError, ("save: batch 1: field 'x' is an Array in some",)),
        ([[1, 2]], TypeError, ("save: batch 0 is list",)),
        ([], ValueError, ("save: got no batches",)),
    ):
        with raises(error, *words):
            save(path, iter(batches))
        assert names(tmp_path) == []


def test_the_safetensors_package_reads_and_writes_the_same(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    save(tmp_path / "a.safetensors", corpus())
    found = numpy.load_file(tmp_path / "a.safetensors")
    assert set(found) == {"ids.values", "ids.offsets", "frames.values", "frames.offsets", "label", "image"}
    assert_same_bits(found["frames.values"], corpus()["frames"].values)
    numpy.save_file(found, tmp_path / "b.safetensors")
    for mmap in (False, True):
        same({name: load(tmp_path / "b.safetensors", mmap=mmap)[name] for name in corpus()}, corpus())


def test_numpy_reads_and_writes_the_same(tmp_path):
    save(tmp_path / "a.npz", corpus())
    with np.load(tmp_path / "a.npz") as found:
        assert_same_bits(found["ids.values"], corpus()["ids"].values)
        arrays = {name: found[name] for name in found.files if name != "scree.json"}
    np.savez(tmp_path / "b.npz", **arrays)
    for mmap in (False, True):
        same({name: load(tmp_path / "b.npz", mmap=mmap)[name] for name in corpus()}, corpus())
    np.savez_compressed(tmp_path / "c.npz", **arrays)
    assert load(tmp_path / "c.npz").keys() == corpus().keys()
    with raises(ValueError, "c.npz", "compressed", "mmap=False"):
        load(tmp_path / "c.npz", mmap=True)
    np.savez(tmp_path / "d.npz", x=np.array([{}], object))
    with raises(ValueError, "d.npz", "'x' cannot be read"):
        load(tmp_path / "d.npz")


@NEEDS_ARROW
def test_files_of_arrow_that_scree_did_not_write(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"ids": [[1, 2], [], [3]], "label": [1, 2, 3], "text": ["a", "b", "c"], "hole": [1, None, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for suffix in (".parquet", ".arrow"):
        found = load(tmp_path / f"a{suffix}", fields=["ids", "label"])
        assert found["ids"].lengths.tolist() == [2, 0, 1]
        assert found["label"].tolist() == [1, 2, 3]
        with raises(TypeError, f"a{suffix}", "column 'text'", "string", "fields=[...] chooses"):
            load(tmp_path / f"a{suffix}")
        with raises(ValueError, f"a{suffix}", "column 'hole'", "row 1 is null"):
            load(tmp_path / f"a{suffix}", fields=["hole"])


@NEEDS_ARROW
def test_what_columns_cannot_hold(tmp_path):
    two, three = scree.from_lengths(np.arange(3), [1, 2]), scree.from_lengths(np.arange(3), [1, 1, 1])
    for suffix in (".arrow", ".parquet"):
        with raises(ValueError, "save: the fields have different numbers of rows ('a' 2, 'b' 3)"):
            save(tmp_path / f"a{suffix}", {"a": two, "b": three})
        with raises(ValueError, "save: field 'a' has ragged_dim 1"):
            save(tmp_path / f"a{suffix}", {"a": scree.Array(np.zeros((2, 3)), [0, 3], ragged_dim=1)})
        with (
            raises(ValueError, "mmap: ", "is Parquet", "needs mmap=False")
            if suffix == ".parquet"
            else raises(FileNotFoundError, "is not there")
        ):
            (tmp_path / "a.parquet").touch()
            load(tmp_path / f"a{suffix}", mmap=True)


@pytest.mark.parametrize(
    ("path", "data", "error", "words"),
    [
        ("a.bin", "arr", ValueError, ("save: path is", "needs a name that ends in .safetensors, .npz",)),
        (3, "arr", TypeError, ("save: path is int; needs a path",)),
        ("no/such/a.npz", "arr", FileNotFoundError, ("a.npz' cannot be written: the folder", "is not there")),
        ("a.npz", [1, 2], TypeError, ("save: data is list; needs an Array, a dictionary",)),
        ("a.npz", {}, ValueError, ("save: data is an empty dictionary",)),
        ("a.npz", {"": np.arange(3)}, ValueError, ("save: a field has an empty name",)),
        ("a.npz", {3: np.arange(3)}, TypeError, ("save: field 3 is named by int",)),
        ("a.npz", {"x": [1, 2]}, TypeError, ("save: field 'x' is list; needs an Array or an array",)),
        ("a.npz", {"x": np.array(3)}, ValueError, ("save: field 'x' is a scalar",)),
        ("a.npz", {"x": np.array(["a"])}, TypeError, ("save: field 'x' has dtype str32; needs numbers or bools",)),
        ("a.safetensors", {"x": np.array([1j])}, TypeError, ("save: 'x' has dtype complex128",)),
        ("a.npz", {"x": "arr", "x.values": np.arange(3)}, ValueError, ("'x.values', which another field is",)),
    ],
)  # fmt: skip
def test_bad_arguments_of_save(path, data, error, words, tmp_path):
    arr = scree.from_lengths(np.arange(3), [3])
    data = arr if isinstance(data, str) else data
    if isinstance(data, dict):
        data = {name: arr if isinstance(value, str) else value for name, value in data.items()}
    with raises(error, *words):
        save(tmp_path / path if isinstance(path, str) else path, data)
    assert names(tmp_path) == []


def test_bad_arguments_of_load(tmp_path):
    with raises(FileNotFoundError, "load: ", "a.npz' is not there; needs a file"):
        load(tmp_path / "a.npz")
    (tmp_path / "b.npz").mkdir()
    with raises(FileNotFoundError, "b.npz' is a folder; needs a file"):
        load(tmp_path / "b.npz")
    with raises(ValueError, "load: path is", "needs a name that ends in"):
        load(tmp_path / "c.txt")
    save(tmp_path / "d.npz", corpus())
    with raises(ValueError, "fields: got 'idz', which", "it has 'ids', 'frames', 'label', 'image'"):
        load(tmp_path / "d.npz", fields=["ids", "idz"])
    with raises(TypeError, "fields: got 'ids'; needs a list of names"):
        load(tmp_path / "d.npz", fields="ids")


def test_a_file_of_a_later_version_is_refused(tmp_path, monkeypatch):
    from scree.data import _fields

    monkeypatch.setattr(_fields, "VERSION", 2)
    save(tmp_path / "a.npz", corpus())
    monkeypatch.undo()
    with raises(ValueError, "has a layout of version 2; this scree reads version 1"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", MAPPED)
def test_a_corpus_gives_rows(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save(path, corpus())
    rows = Corpus(path)
    assert len(rows) == len(list(rows)) == 4
    assert rows.lengths("ids").tolist() == [10, 0, 25, 25]
    for i in (0, 1, 3, -1):
        same(rows[i], {name: field[i] for name, field in corpus().items()})
    same(dict(enumerate(rows.__getitems__([2, 0]))), {0: rows[2], 1: rows[0]})
    assert repr(rows) == f"Corpus('a{suffix}', 4 rows, fields=['ids', 'frames', 'label', 'image'])"
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    same(pickle.loads(pickled)[2], rows[2])
    with raises(IndexError, "row 4 of a corpus of 4"):
        rows[4]
    with raises(ValueError, "field: got None; needs one of 'ids', 'frames'"):
        rows.lengths()


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv here")
@pytest.mark.parametrize("suffix", PLAIN)
def test_a_corpus_reads_a_row_with_one_call_for_what_it_holds(suffix, tmp_path, monkeypatch):
    lengths = np.array([10_000, 0, 3, 5_000])
    arr = scree.from_lengths(np.arange(2 * lengths.sum()).reshape(-1, 2), lengths)
    save(tmp_path / f"a{suffix}", {"first": np.arange(4), "x": arr})
    rows = Corpus(tmp_path / f"a{suffix}")
    calls = []
    real = os.preadv

    def recording(file, buffers, at):
        calls.append(sum(map(len, buffers)))
        return real(file, [buffer[:50_000] for buffer in buffers], at)  # as a system that gives less than was asked for

    monkeypatch.setattr(os, "preadv", recording)
    for i in range(4):
        row = rows[i]["x"]
        assert_same_bits(row, arr[i])
        row += 1  # its own, and so writeable
        assert_same_bits(rows[i]["x"], arr[i])
    for i in (2, 3):
        calls.clear()
        assert rows[i]["x"].shape == (lengths[i], 2)
        assert calls == [48] if i == 2 else [80_000, 30_000]


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv here")
@pytest.mark.parametrize("suffix", PLAIN)
def test_a_corpus_that_is_cut_short_or_replaced_while_it_is_open(suffix, tmp_path, monkeypatch):
    from scree.data import _corpus

    path = tmp_path / f"a{suffix}"
    arr = scree.from_lengths(np.arange(60_000), [20_000, 40_000])
    save(path, arr)
    rows = Corpus(path)
    save(
        path, scree.from_lengths(np.zeros(3, int), [1, 2])
    )  # takes the place of the file, which lives on while it is open
    assert_same_bits(rows[1], arr[1])
    save(path, arr)
    rows = Corpus(path)
    os.truncate(path, 100_000)
    with raises(ValueError, "Corpus: ", "was truncated after it was opened: row 1 is not in it any more"):
        rows[1]
    save(path, arr)

    def replacing(*given, **options):
        found = load(*given, **options)
        save(path, arr)
        return found

    monkeypatch.setattr(_corpus, "load", replacing)
    with raises(ValueError, "was replaced while it was opened; open it again"):
        Corpus(path)


def test_a_corpus_is_no_parquet(tmp_path):
    with raises(ValueError, "Corpus: ", "a.parquet' is Parquet", "needs one of .safetensors, .npz and .arrow"):
        Corpus(tmp_path / "a.parquet")


def test_an_open_corpus_holds_one_file(tmp_path):
    here = Path("/proc/self/fd")
    if not here.is_dir():
        pytest.skip("no /proc")
    save(tmp_path / "a.npz", scree.from_lengths(np.arange(5), [2, 3]))
    gc.collect()
    before = len(list(here.iterdir()))
    rows = [Corpus(tmp_path / "a.npz") for _ in range(20)]
    assert rows[0][1].tolist() == [2, 3, 4]
    del rows
    gc.collect()
    assert len(list(here.iterdir())) == before


def test_a_corpus_of_one_array(tmp_path):
    arr = scree.from_lengths(np.arange(5), [2, 3])
    save(tmp_path / "a.npz", arr)
    rows = Corpus(tmp_path / "a.npz")
    assert [row.tolist() for row in rows] == [[0, 1], [2, 3, 4]]
    assert rows.lengths().tolist() == [2, 3]
    save(tmp_path / "b.npz", {"x": arr, "y": np.arange(3)})
    with raises(ValueError, "different numbers of rows ('x' 2, 'y' 3)"):
        Corpus(tmp_path / "b.npz")
    assert len(Corpus(tmp_path / "b.npz", fields=["x"])) == 2
