"""`scree report`: the numbers against loops, every kind of file, the page, and what bad input gets."""

import codecs
import gzip
import importlib.util
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scree
from scree.data import _waste

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from scree._cli._commands import app
from scree.data._page import page, short, size

HAS_ARROW = importlib.util.find_spec("pyarrow") is not None
NEEDS_ARROW = pytest.mark.skipif(not HAS_ARROW, reason="pyarrow not installed")
LENGTHS = [3, 10, 1, 0, 7, 7]
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.chdir(tmp_path)


def report(*arguments, stdin=None):
    """Run `scree report` in this process."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)], input=stdin)


def padded(lengths, batch_size):
    """Count the places and the pairs of padded batches, one by one."""
    places = pairs = 0
    for i in range(0, len(lengths), batch_size):
        batch = lengths[i : i + batch_size]
        for _ in batch:
            places += max(batch)
            pairs += max(batch) ** 2
    return places, pairs


@PROPERTY
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=300), batch_size=st.integers(1, 5))
def test_the_numbers_are_those_of_loops(lengths, batch_size):
    waste = _waste.measure(np.array(lengths), batch_size)
    found = {s.name: (s.places, s.pairs) for s in waste.strategies}
    shuffled = np.random.default_rng(0).permutation(lengths).tolist()
    window = 50 * batch_size
    bucketed = [n for i in range(0, len(lengths), window) for n in sorted(shuffled[i : i + window])]
    squares = sum(n * n for n in lengths)
    assert found["random"] == padded(shuffled, batch_size)
    assert found["bucketed"] == padded(bucketed, batch_size)
    assert found["sorted"] == padded(sorted(lengths), batch_size)
    assert found["packed"] == (sum(lengths), squares)
    assert found["bins"] == (waste.plan.n_bins * max(*lengths, 1), squares)
    for strategy in waste.strategies:
        assert waste.wasted(strategy) == strategy.places - sum(lengths)
        if found["random"][0]:
            assert waste.saved_places(strategy) == pytest.approx(1 - strategy.places / found["random"][0])
            assert waste.saved_pairs(strategy) == pytest.approx(1 - strategy.pairs / found["random"][1])


def write(kind, folder):
    """Write the lengths as one kind of data; return what to call the command with."""
    rows = [list(range(n)) for n in LENGTHS]
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"ids": row, "y": 1}) + "\n\n" for row in rows))
        return [path]
    if kind in ("npz", "safetensors"):
        scree.data.save(path, {"ids": scree.pack([np.array(row, np.int16) for row in rows]), "y": np.arange(3)})
        return [path]
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"ids": pa.array(rows, pa.list_(pa.int16())), "y": LENGTHS, "text": ["é" * n for n in LENGTHS]})
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=4)
    elif kind == "folder":
        path.mkdir()
        pq.write_table(table[:2], path / "a.parquet")
        pq.write_table(table[2:], path / "b.parquet")
    else:
        make = pa.ipc.new_stream if kind == "feather" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    return [path, "--column", "ids"] if kind == "folder" else [path]


COLUMNS = [pytest.param(kind, marks=NEEDS_ARROW) for kind in ("parquet", "arrow", "feather", "folder")]


@pytest.mark.parametrize("kind", ["jsonl", "npz", "safetensors", *COLUMNS])
def test_every_kind_of_file(kind, tmp_path):
    done = report(*write(kind, tmp_path), "--batch-size", 2, "--seed", 3)
    assert done.exit_code == 0, done.output
    assert "6 sequences, 28 tokens; lengths 0 to 10, median 5, mean 5" in done.output
    places, pairs = padded(np.random.default_rng(3).permutation(LENGTHS).tolist(), 2)
    (line,) = [line for line in done.output.splitlines() if line.startswith("│ random")]
    wide = 8 if kind == "jsonl" else 2
    assert f" {places} " in line
    assert f" {places - 28} " in line
    assert f" {(places - 28) * wide} bytes " in line
    assert f" {pairs} " in line
    text = (tmp_path / "scree-report.html").read_text(encoding="utf-8")
    assert f"{places:,}" in text
    assert f"{pairs:,}" in text


def test_a_token_has_the_bytes_of_all_its_features(tmp_path):
    arr = scree.from_lengths(np.zeros((3, 5, 2), np.float32), [1, 2])
    suffixes = [".safetensors", ".npz", *([".arrow", ".parquet"] if importlib.util.find_spec("pyarrow") else [])]
    for suffix in suffixes:
        scree.data.save(tmp_path / f"a{suffix}", {"x": arr})
        assert "padding, 40 each, as the data has them" in report(tmp_path / f"a{suffix}").output


def test_lengths_on_standard_input(tmp_path):
    done = report("-", "--capacity", 8, "--bytes", 1000, "--output", "a.html", stdin="3 10\n1 0 7\n7\n")
    assert done.exit_code == 0, done.output
    assert "What padding wastes in standard input" in done.output
    assert "6 sequences, 28 tokens" in done.output
    assert "1 sequences are above 8 and were cut" in done.output
    assert "1000 each, as --bytes says" in done.output
    assert (tmp_path / "a.html").exists()


@NEEDS_ARROW
def test_texts_and_lengths_in_columns(tmp_path):
    path, *_ = write("parquet", tmp_path)
    done = report(path, "--column", "text")
    assert "28 characters" in done.output
    assert "The column holds texts" in done.output
    assert "28 tokens" in report(path, "--column", "y").output


def test_the_column_of_jsonl_that_holds_lists_is_found_and_texts_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "aé", "id": 3}\n{"text": "", "id": 4}\n', encoding="utf-8")
    assert "2 sequences, 2 characters" in report(path).output


@NEEDS_ARROW
def test_null_rows_can_be_dropped(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"ids": [[1], None, [2, 3], None]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"ids": [1]}\n{"ids": null}\n{"ids": [2, 3]}\n{"ids": null}\n')
    for name, where in (("a.parquet", "row 1"), ("a.jsonl", "line 2")):
        done = report(tmp_path / name, "--column", "ids")
        assert done.exit_code == 1
        assert f"{name}', {where}: 'ids' is null; --nulls drop leaves such rows out" in done.output
        done = report(tmp_path / name, "--column", "ids", "--nulls", "drop")
        assert "2 sequences, 3 tokens" in done.output
        assert "2 null rows were left out" in done.output


def test_compressed_jsonl_and_the_mark_of_utf8(tmp_path):
    text = "".join(json.dumps({"ids": [1] * n}) + "\r\n" for n in LENGTHS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + text)
    for name in ("a.jsonl.gz", "b.jsonl"):
        assert "6 sequences, 28 tokens" in report(tmp_path / name).output
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    (tmp_path / "no.jsonl.gz").write_bytes(text)
    for name in ("cut.jsonl.gz", "no.jsonl.gz"):
        done = report(tmp_path / name)
        assert done.exit_code == 1
        assert f"{name}' is truncated, damaged, or not compressed by gzip (" in done.output


@NEEDS_ARROW
def test_views_and_dictionaries_of_texts(tmp_path):
    import pyarrow as pa

    texts = ["é" * n for n in LENGTHS]
    columns = {"large": pa.array(texts, pa.large_string()), "words": pa.array(texts).dictionary_encode()}
    if hasattr(pa, "string_view"):
        columns["views"] = pa.array(texts, pa.string_view())
    table = pa.table(columns)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    for name in columns:
        assert "6 sequences, 28 characters; lengths 0 to 10" in report("a.arrow", "--column", name).output


@NEEDS_ARROW
def test_a_folder_of_folders_and_what_is_hidden_in_it(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"n": LENGTHS})
    for name in ("lang=de/a", "lang=en/b", "_temporary/c", "lang=de/.d"):
        path = tmp_path / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    assert "12 sequences, 56 tokens" in report("data", "--column", "n").output
    pq.write_table(pa.table({"n": [[1]]}), tmp_path / "data" / "lang=en" / "z.parquet")
    done = report("data", "--column", "n")
    assert done.exit_code == 1
    assert "z.parquet': 'n' is of type list<element: int64>, in the files before int64; needs one type" in done.output


def test_lengths_that_64_bits_do_not_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text(f'{{"n": {2**62}}}\n{{"n": {2**62}}}\n')
    for done in (report("-", stdin=f"5 {10**30}"), report("a.jsonl", "--column", "n")):
        assert done.exit_code == 1
        assert "needs such that sum to less than 2**63" in done.output
    done = report("-", stdin=f"5 {10**12}")
    assert "2 sequences, 1,000,000,000,005 tokens" in done.output
    assert "e+" not in done.output


class Checker(HTMLParser):
    """Sees that tags are closed in order, and that nothing is fetched."""

    VOID = ("meta", "rect", "line")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("lengths", [[0], [1], [5] * 7, [0, 0], LENGTHS, [1] * 999 + [100_000]])
def test_the_page_is_whole_and_needs_nothing_else(lengths):
    waste = _waste.measure(np.array(lengths), 4)
    text = page(waste, "a <b> & c", "tokens", 4, ["note <i>"])
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.seen.count("svg") == 3
    assert "<script" not in text
    assert "url(" not in text
    assert "http" not in text
    assert "nan" not in text.lower()
    assert "a &lt;b&gt; &amp; c" in text
    assert "note &lt;i&gt;" in text
    assert "prefers-color-scheme: dark" in text
    for strategy in waste.strategies:
        assert f">{strategy.places:,}<" in text


def test_numbers_for_people():
    numbers = {0: "0", 999: "999", 1234: "1.23k", 999_400: "999k", 999_600: "1M", 12_655_096: "12.7M", 2e22: "20,000E"}
    assert {n: short(n) for n in numbers} == numbers
    assert [size(n) for n in (0, 999, 1500, 2e15)] == ["0 bytes", "999 bytes", "1.5 kB", "2,000.0 TB"]


@pytest.mark.parametrize(
    ("name", "content", "options", "says"),
    [
        (
            "a.jsonl",
            b'{"ids": [1]}\n{"ids": "x"}\n',
            [],
            "line 2: 'ids' is str, in the lines before list; needs one type",
        ),
        ("a.jsonl", b'{"ids": [1]}\n{"x": [1]}\n', [], "line 2: no field 'ids'; it has 'x'"),
        ("a.jsonl", b'{"ids": [1], "b": [1]}\n', [], "has 'ids', 'b'; name one with --column"),
        ("a.jsonl", b'{"ids": [1]}\n', ["--column", "idz"], "line 1: no field 'idz'; it has 'ids'"),
        (
            "a.jsonl",
            b'{"ids": {"a": 1}}\n',
            ["--column", "ids"],
            "line 1: 'ids' is dict; needs a list, a text or a length",
        ),
        ("a.jsonl", b'{"ids": -1}\n', ["--column", "ids"], "line 1: 'ids' is -1; needs a length of 0 or more"),
        ("a.jsonl", b'{"ids": [1]}\n{"ids": "\xff"}\n', [], "line 2: byte 9 is 0xff, which is not UTF-8"),
        ("a.jsonl", b'{"ids": [1]}\n{"ids": [1\n', [], "line 2: no JSON ("),
        ("a.jsonl", b"[1]\n", [], "line 1: list; needs an object a line"),
        ("a.jsonl", b"", [], "a.jsonl has no sequences"),
        ("a.txt", b"1 2", [], "is of no format that is known; needs a name that ends in .parquet"),
        ("a.npz", b"1 2", [], "a.npz' is truncated or no .npz file"),
    ],
)
def test_bad_files(name, content, options, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    done = report(tmp_path / name, *options)
    assert done.exit_code == 1
    assert done.output.startswith("scree report: ")
    assert says in done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "scree-report.html").exists()


@NEEDS_ARROW
def test_bad_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"x": [1.5], "a": [[1]], "b": [[1]], "n": [-1], "bad": bad}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (["a.parquet"], "'a.parquet' has 'x', 'a', 'b', 'n', 'bad'; name one with --column"),
        (["a.parquet", "--column", "c"], "'a.parquet' has no column 'c'; it has 'x', 'a', 'b', 'n', 'bad'"),
        (["a.parquet", "--column", "x"], "'a.parquet': 'x' is of type double; needs lists, texts or integers"),
        (["a.parquet", "--column", "n"], "'a.parquet': 'n' has -1; needs lengths of 0 or more"),
        (["a.parquet", "--column", "bad"], "'a.parquet' is truncated, damaged, or of another format"),
        (["b.parquet"], "'b.parquet' is truncated, damaged"),
        (["empty"], "'empty' has no .parquet and no .arrow files"),
        (["gone.parquet"], "'gone.parquet' is not there"),
    ):
        done = report(*arguments)
        assert done.exit_code == 1
        assert says in done.output
        assert len(done.output.splitlines()) == 1


def test_a_folder_of_several_splits_is_told(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    done = report(tmp_path)
    assert f"has several splits; name one of {tmp_path / 'train'}, {tmp_path / 'test'}" in done.output.replace("\n", "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--batch-size", 0], "--batch-size"),
        (["--capacity", 0], "--capacity"),
        (["--nulls", "keep"], "--nulls: got 'keep'; needs one of error, drop"),
        (["--column", "n"], "--column: got 'n'; needs a file"),
        (["--output", "a.pdf"], "--output: got 'a.pdf'; needs a name that ends in .html"),
    ],
)
def test_bad_options(options, says):
    done = report("-", *options, stdin="1")
    assert done.exit_code == 2
    assert says in done.output


def test_standard_input_that_is_no_lengths_and_a_page_that_cannot_be_saved():
    assert "standard input, line 2: got '-3'; needs lengths" in report("-", stdin="1\n2 -3\n").output
    done = report("-", "--output", "no/such/a.html", stdin="1")
    assert done.exit_code == 1
    assert "scree report: 'no/such/a.html' cannot be written: the folder 'no/such' is not there" in done.output
