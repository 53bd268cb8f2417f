"""Files that were damaged, and writes that failed or were interrupted: named, never half read, the old file intact."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from files import FORMATS, MAPPED, NEEDS_ARROW, corpus, names, same

import scree
from expect import raises
from scree.data import load, save


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("mmap", [False, True])
def test_a_truncated_file_is_named(suffix, mmap, tmp_path):
    mmap = mmap and suffix != ".parquet"  # which is never mapped
    path = tmp_path / f"a{suffix}"
    save(path, corpus())
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with raises(ValueError, f"load: '{path}'"):
            load(path, mmap=mmap)
    path.write_bytes(whole + b"\0" * 9)
    if suffix == ".safetensors":
        with raises(ValueError, f"load: '{path}' is longer than what was written"):
            load(path, mmap=mmap)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_byte_that_was_altered_never_gives_other_data(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    data = {"x": scree.from_lengths(np.arange(20, dtype=np.int32), [4, 0, 16]), "y": np.arange(3.0)}
    save(path, data)
    whole = path.read_bytes()
    found = 0
    for i in np.random.default_rng(0).permutation(len(whole))[:400].tolist():
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x21]) + whole[i + 1 :])
        try:
            same(load(path), data)
        except ValueError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            found += 1
    assert found > 10


@pytest.mark.parametrize("suffix", FORMATS)
def test_bits_that_were_altered_anywhere_are_an_error_of_the_file(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    data = {"x": scree.from_lengths(np.arange(300, dtype=np.int32), [100, 150, 50]), "y": np.ones((3, 2))}
    save(path, data)
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(600):
        i, bits = int(rng.integers(len(whole))), int(rng.choice([0x01, 0x10, 0x80, 0xFF]))
        path.write_bytes(whole[:i] + bytes([whole[i] ^ bits]) + whole[i + 1 :])
        try:
            same(load(path, mmap=suffix in MAPPED, verify=True), data)
        except (TypeError, ValueError) as error:
            assert str(path) in str(error)


@NEEDS_ARROW
def test_two_columns_of_one_name(tmp_path):
    import pyarrow as pa

    table = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with raises(ValueError, "a.arrow' has several columns 'x'; needs one of each name"):
        load(tmp_path / "a.arrow")


@pytest.mark.parametrize("suffix", MAPPED)
def test_mapped_values_are_compared_on_request(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save(path, scree.from_lengths(np.full(500, 7, np.uint8), [100, 400]))
    whole = path.read_bytes()
    at = whole.index(b"\7" * 300) + 50
    path.write_bytes(whole[:at] + b"\6" + whole[at + 1 :])
    assert load(path, mmap=True).values.sum() == 7 * 500 - 1
    with raises(ValueError, f"load: '{path}'", "altered", "values"):
        load(path, mmap=True, verify=True)
    with raises(ValueError, f"load: '{path}'", "values"):
        load(path)


@pytest.mark.parametrize("suffix", MAPPED)
def test_offsets_that_were_altered_are_found_when_mapping(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save(path, scree.Array(np.zeros(500, np.uint8), np.array([0, 111, 222, 500], np.int64)))
    whole = path.read_bytes()
    at = whole.index(np.array([111, 222], np.int64).tobytes())
    path.write_bytes(whole[:at] + b"\x70" + whole[at + 1 :])
    with raises(ValueError, f"load: '{path}'", "offsets"):
        load(path, mmap=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_write_that_fails_leaves_the_old_file(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    save(path, corpus())
    before = path.read_bytes()
    program = f"""
        import resource, signal, numpy as np, scree
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        values = np.random.default_rng(0).integers(0, 1 << 60, 1 << 16)
        big = scree.from_lengths(values, [1 << 16])
        for data in (big, iter([big])):
            try:
                scree.data.save({str(path)!r}, data)
            except OSError as error:
                print(error.errno, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    for line in lines:
        assert line.startswith(f"{errno.EFBIG} ")
        assert f"save: '{path}' could not be written (File too large); the file that was there is unchanged" in line
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises(OSError, "save: ", "a.npz' could not be written (No space left on device); nothing was written"):
        save(tmp_path / "a.npz", corpus())
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, corpus())
    program = f"""
        import os, signal, numpy as np, scree
        from scree.data import _safetensors
        inner = _safetensors.crc32
        def die(array):
            os.kill(os.getpid(), signal.SIGKILL)
        _safetensors.crc32 = die
        scree.data.save({str(path)!r}, scree.from_lengths(np.arange(100), [100]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    same(load(path), corpus())
    save(path, corpus())
    same(load(path), corpus())
