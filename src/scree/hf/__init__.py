"""Hugging Face transformers without padding: ``attn_implementation="scree"``, packed batches, and a proof of isolation.

Importing this imports neither torch nor transformers: its functions do.
"""

from __future__ import annotations

from ._collator import collator
from ._isolation import assert_isolated
from ._model_kwargs import model_kwargs
from ._outputs import pool, unflatten
from ._register import register

__all__ = ["assert_isolated", "collator", "model_kwargs", "pool", "register", "unflatten"]
