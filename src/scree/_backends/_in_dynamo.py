"""Brings PyTorch's backend where scree is first used in a function that is being compiled: Dynamo imports this untraced."""

from . import bring
from ._protocol import Backend

backend: Backend = bring("torch")
