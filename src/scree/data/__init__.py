"""From a corpus to packed batches: planning, collating, saving and loading."""

from ._balance import Balance, balance
from ._batches import TokenBatches, token_batches
from ._collate import collate
from ._corpus import Corpus
from ._planning import Plan, plan_bins
from ._saving import load, save

__all__ = [
    "Balance",
    "Corpus",
    "Plan",
    "TokenBatches",
    "balance",
    "collate",
    "load",
    "plan_bins",
    "save",
    "token_batches",
]
