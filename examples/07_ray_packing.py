"""Tokenise a corpus and pack it into bins on Ray, interrupted once, and read the bins for training.

    pip install "scree[ray]"
    python examples/07_ray_packing.py

With a cluster nothing changes but the address in `ray.init`. `pack_table` is a plain function of one Arrow table: what maps
over Arrow tables in another engine can call it as it is.
"""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from scree.data import pack_table, unpack_table
from scree.data.ray import pack

CAPACITY = 256


def write_corpus(folder, n=4000, files=4):
    """Write texts of uneven length to Parquet files, as a crawl leaves them."""
    rng = np.random.default_rng(0)
    words = np.array(["sand", "gravel", "scree", "boulder", "talus", "moraine"])
    lengths = np.clip(rng.lognormal(3, 1, n), 1, 400).astype(int)
    texts = [" ".join(words[rng.integers(0, len(words), k)]) for k in lengths]
    for i in range(files):
        pq.write_table(pa.table({"text": texts[i::files]}), folder / f"{i}.parquet")
    return texts


def tokenize(texts):
    """Number the bytes; a real tokenizer goes here, and is called once a block."""
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32)[:CAPACITY] for text in texts]


def main():
    """Pack twice: the first run is cut short, the second goes on."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "corpus", Path(folder) / "packed"
        source.mkdir()
        texts = write_corpus(source)
        # Spares Ray 2.60 the 32 processes that it starts to look at footers, on a cluster of many machines worth it.
        ray.data.DataContext.get_current().use_datasource_v2 = False
        dataset = ray.data.read_parquet(str(source))

        def cut_short(batch):
            if len(list(target.glob("part-*"))) >= 2:
                raise ValueError("the power is gone")
            return tokenize(batch)

        cut_short.__qualname__ = tokenize.__qualname__
        options = {"too_long": "split", "batch_size": 500}
        try:
            pack(dataset, "text", CAPACITY, target, tokenize=cut_short, **options)
        except ValueError as error:
            print("the first run stopped:", error)

        packed = pack(dataset, "text", CAPACITY, target, tokenize=tokenize, **options)
        print(
            f"{packed.rows:,} texts, {packed.tokens:,} tokens in {packed.bins:,} bins, {packed.efficiency:.1%} full; "
            f"{len(packed.parts)} files, {packed.reused} of them from the first run"
        )
        assert packed.reused >= 2
        assert packed.rows == len(texts)
        assert packed.efficiency > 0.97

        # Nothing is lost, and nothing comes twice.
        found = []
        for part in packed.parts:
            sequences = unpack_table(pq.read_table(target / part))  # an Array: its offsets are the cu_seqlens
            found += [row.tobytes() for row in sequences]
        assert sorted(found) == sorted(row.tobytes() for row in tokenize(texts))

        # The same function without Ray, in a plain loop over record batches.
        batches = pq.ParquetFile(source / "0.parquet").iter_batches(batch_size=500)
        alone = [pack_table(batch, "text", CAPACITY, tokenize=tokenize) for batch in batches]
        print(f"the same without Ray: {sum(map(len, alone)):,} bins of the first file")
    ray.shutdown()


if __name__ == "__main__":
    main()
