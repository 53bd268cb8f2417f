"""Hugging Face transformers without padding: ``attn_implementation="scree"``.

Importing this imports neither torch nor transformers: its functions do.
"""

from __future__ import annotations

from ._register import register

__all__ = ["register"]
