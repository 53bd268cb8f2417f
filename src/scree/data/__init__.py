"""From a corpus to packed batches: planning, collating, saving and loading, and Arrow's engines.

`scree.data.ray` packs a corpus that does not fit in memory, on Ray.
"""

from . import ray
from ._balance import Balance, balance
from ._batches import TokenBatches, token_batches
from ._collate import collate
from ._corpus import Corpus
from ._frames import from_datasets, from_polars, to_datasets, to_polars
from ._planning import Plan, plan_bins
from ._saving import load, save
from ._tables import pack_table, unpack_table

__all__ = [
    "Balance",
    "Corpus",
    "Plan",
    "TokenBatches",
    "balance",
    "collate",
    "from_datasets",
    "from_polars",
    "load",
    "pack_table",
    "plan_bins",
    "ray",
    "save",
    "to_datasets",
    "to_polars",
    "token_batches",
    "unpack_table",
]
