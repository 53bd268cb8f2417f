"""From a corpus to packed batches: planning, collating, saving and loading."""

from ._balance import Balance, balance
from ._batches import TokenBatches, token_batches
from ._planning import Plan, plan_bins

__all__ = ["Balance", "Plan", "TokenBatches", "balance", "plan_bins", "token_batches"]
