"""Making `attn_implementation="scree"` known to transformers."""

from __future__ import annotations

import re
import warnings
from typing import Any

from .._backends import load
from ..bridges._handover import library

OLDEST, NEWEST = (4, 57), (5, 24)
"""The minor versions of transformers that the tests pass on: from the first to the last, the ends included."""

_warned: set[str] = set()


def register(name: str = "scree") -> None:
    """Make ``attn_implementation=name`` work in every transformers model that uses its attention interface.

    Registers two functions: the attention, and the one that makes its mask. Without the second transformers drops a
    padding mask without a word. Call it once in a program, before a model is made; more calls change nothing.

    Parameters
    ----------
    name : str
        What `attn_implementation` and `model.set_attn_implementation` will take.

    Raises
    ------
    ImportError
        PyTorch or transformers is missing, or has no attention interface; the message has the command that installs it.
    TypeError, ValueError
        `name` is no name, or belongs to an implementation of transformers' own.

    Warns
    -----
    UserWarning
        Once, where transformers' version is outside of the range that is tested.

    Notes
    -----
    What the attention serves, and what it refuses, is told in the guide, "Hugging Face".
    """
    library("register", "torch", "hf")
    transformers = library("register", "transformers", "hf")
    masking = _interface("transformers.masking_utils")
    modeling = _interface("transformers.modeling_utils")
    from ._attention import attention
    from ._masks import mask

    load("torch")  # a compiler that traces the first call cannot import
    _expect_name(name)
    _check_version(transformers.__version__)
    registries: tuple[tuple[Any, Any], ...] = (
        (modeling.AttentionInterface, attention),
        (masking.AttentionMaskInterface, mask),
    )
    for interface, function in registries:
        known = interface._global_mapping.get(name, function)
        if known is not function:
            raise ValueError(
                f"register: name is {name!r}, which is {known.__module__}.{known.__name__} already; needs another one"
            )
    for interface, function in registries:
        interface.register(name, function)


def _interface(module: str) -> Any:
    try:
        return library("register", module, "hf")
    except ImportError as missing:
        raise ImportError(
            f"register: this transformers has no attention interface ({missing}); needs {_dotted(OLDEST)} or newer: "
            'pip install --upgrade "scree[hf]"'
        ) from missing


def _expect_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"register: name is {type(name).__name__}; needs a str, for attn_implementation")
    if not name or re.search(r"[|/:\s]", name):
        raise ValueError(f"register: name is {name!r}; needs letters and digits: transformers reads |, / and : itself")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _check_version(version: str) -> None:
    """Warn, once, of a version outside of the tested range."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return
    if version not in _warned:
        _warned.add(version)
        warnings.warn(
            f"scree.hf is tested with transformers {_dotted(OLDEST)} to {_dotted(NEWEST)}, and this is {version}; compare "
            'a batch with attn_implementation="eager" before you rely on it',
            UserWarning,
            stacklevel=3,
        )
