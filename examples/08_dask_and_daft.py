"""Pack the same corpus on Dask and on Daft, with the plain function that Ray Data calls too, and get the same bins.

    pip install dask daft "scree[arrow]"
    python examples/08_dask_and_daft.py

`pack_table` takes an Arrow table or record batch and depends on nothing else, so it runs unchanged wherever an engine
hands out Arrow. What `scree.data.ray.pack` adds (files written whole, named by their contents, a run that goes on where it
stopped) is for Ray alone.
"""

import tempfile
from pathlib import Path

import daft
import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scree.data import pack_table, unpack_table

CAPACITY = 256


def write_corpus(folder, n=2000, files=4):
    """Write sequences of uneven length to Parquet files; return them."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3, 1, n), 1, CAPACITY).astype(int)
    rows = [rng.integers(0, 50_000, k, dtype=np.int32) for k in lengths]
    for i in range(files):
        pq.write_table(pa.table({"ids": rows[i::files]}), folder / f"{i}.parquet")
    return rows


def on_dask(paths):
    """One task a file: Dask reads it, packs it and keeps the bins where the next task wants them."""
    packed = [dask.delayed(pack_table)(dask.delayed(pq.read_table)(path), "ids", CAPACITY) for path in paths]
    return dask.compute(*packed, scheduler="processes", num_workers=2)


def on_daft(folder):
    """Daft reads and hands out record batches, one after the other; each is packed as it comes."""
    frame = daft.read_parquet(f"{folder}/*.parquet").select("ids")
    return [pack_table(batch, "ids", CAPACITY) for batch in frame.to_arrow_iter()]


def sequences_in(tables):
    """Return all sequences in packed tables, in an order of their own."""
    return sorted(row.tobytes() for table in tables for row in unpack_table(table, "ids"))


def main():
    """Pack on both, and compare what came out with what went in."""
    with tempfile.TemporaryDirectory() as folder:
        rows = write_corpus(Path(folder))
        for name, tables in (
            ("Dask", on_dask(sorted(Path(folder).glob("*.parquet")))),
            ("Daft", on_daft(folder)),
        ):
            assert sequences_in(tables) == sorted(row.tobytes() for row in rows)
            bins = sum(table.num_rows for table in tables)
            full = sum(map(len, rows)) / (bins * CAPACITY)
            print(f"{name}: {len(rows):,} sequences in {bins:,} bins, {full:.1%} full, in {len(tables)} tables")
            assert full > 0.97


if __name__ == "__main__":
    main()
