"""The contests of each framework, whose module is imported only where they are asked for."""

from __future__ import annotations

import importlib

from ._contest import Contest

FRAMEWORKS = ("numpy", "torch", "jax", "mlx")


def contests(framework: str) -> list[Contest]:
    """Give the contests of one of `FRAMEWORKS`, which has to be installed. Nothing is computed yet.

    Raises
    ------
    ValueError
        There is no such framework here.
    ImportError
        The framework is not installed, or broken.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"contests: framework is {framework!r}; needs one of {', '.join(FRAMEWORKS)}")
    return importlib.import_module(f"._{framework}", __package__).contests()
