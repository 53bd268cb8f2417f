"""Ray, the real one, on a local cluster of two workers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from expect import raises
from scree.data import pack_table, unpack_table
from scree.data.ray import pack

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def cluster():
    """A local Ray cluster of two workers."""
    import ray

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # so that the workers can import this module
    os.environ["RAY_worker_niceness"] = "0"  # at Ray's own 15 they would wait for whatever else runs here
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False  # which starts 32 processes for every reading of Parquet
    yield ray
    ray.shutdown()


@pytest.fixture
def footers(cluster):
    """Parquet is read as Ray does unless told."""
    context = cluster.data.DataContext.get_current()
    context.use_datasource_v2 = True
    yield
    context.use_datasource_v2 = False


def texts(n):
    """Make texts of very uneven lengths, some of them equal."""
    rng = np.random.default_rng(0)
    return [" ".join(str(int(x)) for x in rng.integers(0, 50, k)) for k in rng.integers(0, 30, n)] + ["7 7"] * 3


def tokenize(batch):
    """Give each number as a token."""
    return [[int(word) for word in text.split()] for text in batch]


def corpus(ray, tmp_path, n=600, files=6):
    """Write texts to Parquet files; return the dataset over them and the token lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    folder.mkdir()
    every = texts(n)
    step = -(-len(every) // files)
    for i in range(files):
        pq.write_table(pa.table({"text": every[i * step : (i + 1) * step], "id": [1] * len(every[i * step : (i + 1) * step])}),
                       folder / f"{i}.parquet")  # fmt: skip
    return ray.data.read_parquet(str(folder)), tokenize(every)


def sequences(folder):
    """Read every sequence of a packed folder."""
    import pyarrow.parquet as pq

    found = []
    for path in sorted(Path(folder).glob("part-*.parquet")):
        table = pq.read_table(path, partitioning=None)
        assert all(len(bin_) <= 64 for bin_ in table["input_ids"].to_pylist())
        found += [row.tolist() for row in unpack_table(table)]
    return found


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def test_a_corpus_is_packed(cluster, footers, tmp_path):
    before = cluster.data.DataContext.get_current().execution_options.preserve_order
    dataset, tokens = corpus(cluster, tmp_path)
    done = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=100)
    assert sorted(sequences(done.path)) == sorted(tokens)
    assert (done.rows, done.tokens, done.reused) == (len(tokens), sum(map(len, tokens)), 0)
    assert done.efficiency > 0.95
    assert len(done.parts) >= 6
    assert dataset.context.execution_options.preserve_order == before
    assert names(done.path) == sorted([*done.parts, "_scree.json"])
    told = json.loads((done.path / "_scree.json").read_text())
    assert (told["complete"], told["rows"], told["parts"]) == (True, len(tokens), list(done.parts))
    packed = cluster.data.read_parquet(str(done.path))
    assert packed.count() == done.bins

    again = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=100)
    assert again.reused == len(done.parts)
    assert (again.parts, again.rows, again.bins) == (done.parts, done.rows, done.bins)

    other = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=50)  # other blocks, the same data
    assert other.parts != done.parts
    assert sorted(sequences(done.path)) == sorted(tokens)


def test_blocks_that_are_equal_are_all_kept(cluster, tmp_path):
    rows = [{"text": "1 2 3"}, {"text": "4"}]
    dataset = cluster.data.from_arrow(_table(rows * 3))
    for reused in (0, 3):
        done = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=2)
        assert len(done.parts) == 3
        assert done.reused >= reused
        assert sorted(sequences(done.path)) == sorted([[1, 2, 3], [4]] * 3)


def _table(rows):
    import pyarrow as pa

    return pa.Table.from_pylist(rows)


def test_a_worker_that_is_killed_midway_loses_and_doubles_nothing(cluster, tmp_path):
    dataset, tokens = corpus(cluster, tmp_path)
    marker = tmp_path / "killed"

    def deadly(batch):
        if not marker.exists() and "49" in " ".join(batch):
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenize(batch)

    done = pack(dataset, "text", 64, tmp_path / "out", tokenize=deadly, batch_size=100)
    assert marker.exists()
    assert sorted(sequences(done.path)) == sorted(tokens)
    assert done.rows == len(tokens)
    assert names(done.path) == sorted([*done.parts, "_scree.json"])


def test_a_run_that_fails_twice_is_resumed(cluster, tmp_path):
    dataset, tokens = corpus(cluster, tmp_path)
    out = tmp_path / "out"

    def failing(allowed):
        def inner(batch):
            if len(list(out.glob("part-*"))) >= allowed:
                raise ValueError(f"stopped after {allowed}")
            return tokenize(batch)

        inner.__qualname__ = "tokenize"
        return inner

    for allowed in (1, 3):
        with raises(ValueError, f"stopped after {allowed}"):
            pack(dataset, "text", 64, out, tokenize=failing(allowed), batch_size=100)
        assert json.loads((out / "_scree.json").read_text())["complete"] is False
        (out / ".part-left.0.tmp").write_text("half")
    done = pack(dataset, "text", 64, out, tokenize=tokenize, batch_size=100)
    assert done.reused >= 3
    assert sorted(sequences(out)) == sorted(tokens)
    assert names(out) == sorted([*done.parts, "_scree.json"])


def test_a_driver_that_is_killed_is_resumed(tmp_path):
    program = f"""
        import os, signal, sys, threading, time, ray
        from pathlib import Path
        import test_engines as here
        from scree.data.ray import pack
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        folder = Path({str(tmp_path)!r})
        dataset, tokens = here.corpus(ray, folder) if not (folder / "corpus").exists() else (
            ray.data.read_parquet(str(folder / "corpus")), here.tokenize(here.texts(600)))
        out = folder / "out"
        def die():
            while len(list(out.glob("part-*"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        def slow(batch):
            time.sleep(0.5)
            return here.tokenize(batch)
        if sys.argv[1] == "die":
            threading.Thread(target=die, daemon=True).start()
        done = pack(dataset, "text", 64, out, tokenize=slow, batch_size=100)
        print("reused", done.reused, sorted(here.sequences(out)) == sorted(tokens))
        ray.shutdown()
    """
    code = textwrap.dedent(program)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    first = subprocess.run([sys.executable, "-c", code, "die"], capture_output=True, text=True, timeout=180)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second = subprocess.run([sys.executable, "-c", code, "live"], capture_output=True, text=True, timeout=180)
    assert second.returncode == 0, second.stderr
    reused, same = second.stdout.split()[-2:]
    assert int(reused) >= 1
    assert same == "True"


def test_a_task_that_holds_every_cpu_is_told_so(cluster, tmp_path):
    def inner(folder):
        import ray

        dataset = ray.data.from_items([{"ids": [1, 2]}, {"ids": [3]}])
        try:
            return pack(dataset, "ids", 4, folder).bins
        except RuntimeError as told:
            return str(told)

    told = cluster.get(cluster.remote(num_cpus=2)(inner).remote(tmp_path / "a"))
    assert "pack: the Ray task that calls it holds 2 of the 2 CPUs" in told
    assert "needs num_cpus=0 for that task" in told
    assert cluster.get(cluster.remote(num_cpus=0)(inner).remote(tmp_path / "b")) == 1


def test_a_cluster_of_one_cpu(tmp_path):
    program = f"""
        import ray
        import test_engines as here
        from scree.data.ray import pack
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        class Same:
            def __call__(self, batch):
                return batch
        text = here._table([{{"text": text}} for text in here.texts(300)])
        dataset = ray.data.from_arrow(text).map_batches(Same, concurrency=1, batch_format="pyarrow").repartition(4)
        done = pack(dataset, "text", 64, {str(tmp_path / "out")!r}, tokenize=here.tokenize, batch_size=50)
        print(done.rows, sorted(here.sequences(done.path)) == sorted(here.tokenize(here.texts(300))))
        ray.shutdown()
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["303", "True"]


def test_token_lists_nulls_and_what_is_too_long(cluster, tmp_path):
    dataset = cluster.data.from_arrow(_table([{"ids": [1] * 9}, {"ids": None}, {"ids": [2]}]))
    with raises(ValueError, "pack_table: row 1 of 'ids' is null"):
        pack(dataset, "ids", 4, tmp_path / "a")
    with raises(ValueError, "lengths[0]: got 9, above the capacity of 4"):
        pack(dataset, "ids", 4, tmp_path / "b", nulls="drop")
    done = pack(dataset, "ids", 4, tmp_path / "c", nulls="drop", too_long="split")
    assert (done.rows, done.tokens, done.split, done.nulls, done.bins) == (3, 10, 1, 1, 3)
    done = pack(dataset, "ids", 4, tmp_path / "d", nulls="drop", too_long="drop")
    assert (done.tokens, done.dropped) == (1, 1)


def test_an_error_of_the_tokenizer_is_told(cluster, tmp_path):
    def broken(batch):
        return {}["vocabulary"]

    dataset = cluster.data.from_arrow(_table([{"text": "a"}]))
    with raises(RuntimeError, "pack: a worker failed: KeyError: 'vocabulary'"):
        pack(dataset, "text", 4, tmp_path / "a", tokenize=broken)


def test_a_full_disk_is_told_with_the_file_and_the_run_is_resumed(cluster, tmp_path):
    dataset, tokens = corpus(cluster, tmp_path)
    out = tmp_path / "out"

    def filling(batch):
        import resource

        if len(list(out.glob("part-*"))) >= 2:  # the process may write no more, as on a disk without room
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return tokenize(batch)

    filling.__qualname__ = "tokenize"
    with raises(OSError, "pack: '", ".parquet' could not be written (File too large); nothing was written"):
        pack(dataset, "text", 64, out, tokenize=filling, batch_size=100)
    assert json.loads((out / "_scree.json").read_text())["complete"] is False
    done = pack(dataset, "text", 64, out, tokenize=tokenize, batch_size=100)
    assert done.reused >= 2
    assert sorted(sequences(out)) == sorted(tokens)


def test_a_dataset_without_rows(cluster, tmp_path):
    import pyarrow as pa

    for i, empty in enumerate((cluster.data.from_arrow(pa.table({"ids": pa.array([], pa.list_(pa.int32()))})),
                               cluster.data.from_items([]))):  # fmt: skip
        done = pack(empty, "ids", 4, tmp_path / str(i))
        assert (done.rows, done.bins, done.parts, done.efficiency) == (0, 0, (), 1.0)


def test_a_schema_that_only_a_run_would_tell_is_not_run_for(cluster, tmp_path):
    calls = tmp_path / "calls"
    calls.touch()

    def mapped(row):
        with calls.open("a") as file:
            file.write(".")
        return {"ids": row["ids"], "other": 1}

    dataset = cluster.data.from_items([{"ids": [1, 2]}, {"ids": [3]}]).map(mapped)
    assert pack(dataset, "ids", 4, tmp_path / "a").tokens == 3
    assert len(calls.read_text()) == 2
    with raises(ValueError, "column: got 'idz'; the dataset has 'ids', 'other'"):
        pack(dataset, "idz", 4, tmp_path / "b")
    assert pack(dataset, "ids", 8, tmp_path / "b").bins == 1  # nothing was written there before
    nothing = dataset.filter(lambda row: False)
    assert pack(nothing, "ids", 4, tmp_path / "c").parts == ()


def test_packed_in_the_task_that_reads(cluster, tmp_path, monkeypatch):
    from scree.data import ray as module

    monkeypatch.setattr(module, "ROWS", 40)
    _, tokens = corpus(cluster, tmp_path)
    dataset = cluster.data.read_parquet(str(tmp_path / "corpus"), override_num_blocks=6)
    done = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=None)
    assert len(done.parts) == 18  # 3 of each file of 101 rows
    assert sorted(sequences(done.path)) == sorted(tokens)
    again = pack(dataset, "text", 64, tmp_path / "out", tokenize=tokenize, batch_size=None)
    assert (again.parts, again.reused, again.rows) == (done.parts, 18, len(tokens))


@pytest.mark.parametrize("nulls", [False, True])
def test_a_block_has_one_name_however_it_is_held(nulls):
    import pyarrow as pa

    from scree.data.ray import _digest

    rows = [None if nulls and i % 3 == 0 else str(i) for i in range(100)]
    whole = pa.table({"text": rows})
    held = [
        whole[13:50],
        pa.table({"text": rows[13:50]}),
        pa.concat_tables([whole[13:30], whole[30:50]]),
        whole[5:][8:45],
    ]
    assert len({_digest(pa, table, {"column": "text"}) for table in held}) == 1
    assert _digest(pa, whole[14:50], {"column": "text"}) != _digest(pa, held[0], {"column": "text"})


def test_what_one_task_reads_is_packed_by_several(cluster, footers, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["7 " * 2000] * 12_000}), tmp_path / "corpus.parquet")
    dataset = cluster.data.read_parquet(str(tmp_path / "corpus.parquet"))
    before = dataset.context.target_max_block_size
    tasks = tmp_path / "tasks"
    tasks.mkdir()

    def lengths(batch):
        import ray

        (tasks / ray.get_runtime_context().get_task_id()).touch()
        return [[len(text)] for text in batch]

    done = pack(dataset, "text", 1000, tmp_path / "out", tokenize=lengths, batch_size=1000)
    assert (done.rows, done.tokens) == (12_000, 12_000)
    assert len(names(tasks)) > 1  # of the 48 MB
    assert dataset.context.target_max_block_size == before


def test_bad_arguments_of_pack(cluster, tmp_path):
    dataset = cluster.data.from_items([{"ids": [1, 2]}])
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for arguments, error, words in (
        (([1], "ids", 4, tmp_path / "x"), TypeError, ("pack: dataset is list; needs a ray.data.Dataset",)),
        ((dataset, "idz", 4, tmp_path / "x"), ValueError, ("column: got 'idz'; the dataset has 'ids'",)),
        ((dataset, "ids", 0, tmp_path / "x"), ValueError, ("capacity: got 0",)),
        ((dataset, "ids", 4, tmp_path / "file"), ValueError, ("path: ", "is a file; needs a folder")),
        (
            (dataset, "ids", 4, tmp_path / "full"),
            ValueError,
            ("path: ", "holds 'thesis.tex'; needs a folder that is empty"),
        ),
    ):
        with raises(error, *words):
            pack(*arguments)
    with raises(ValueError, "batch_size: got 0"):
        pack(dataset, "ids", 4, tmp_path / "x", batch_size=0)
    with raises(ValueError, "algo: got 'best'"):
        pack(dataset, "ids", 4, tmp_path / "x", algo="best")
    assert not (tmp_path / "x").exists()
    pack(dataset, "ids", 4, tmp_path / "y")
    with raises(ValueError, "was packed with capacity=4, and now it is 8; needs another folder"):
        pack(dataset, "ids", 8, tmp_path / "y")
    with raises(ValueError, "was packed with version='', and now it is '2'"):
        pack(dataset, "ids", 4, tmp_path / "y", version="2")


def test_pack_table_and_collate_run_within_ray_unchanged(cluster):
    dataset = cluster.data.from_arrow(_table([{"ids": [1, 2]}, {"ids": [3]}, {"ids": [4, 5, 6]}]))
    packed = dataset.map_batches(pack_table, batch_format="pyarrow", fn_kwargs={"column": "ids", "capacity": 6})
    rows = [row.tolist() for batch in packed.iter_batches(batch_format="pyarrow") for row in unpack_table(batch, "ids")]
    assert sorted(rows) == [[1, 2], [3], [4, 5, 6]]
