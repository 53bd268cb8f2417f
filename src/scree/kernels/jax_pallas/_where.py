"""Where a program is compiled for NVIDIA GPUs it computes with kernels, and with what `jax_xla` has elsewhere.

`run` can be differentiated, by differentiating the latter: so that what an op's own derivative is computed with has a
derivative, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

INTERPRET = False  # the tests' switch: Pallas's interpreter, which needs no GPU
_custom_vjp: Any = jax.custom_vjp  # whose types lose those of what it decorates


def by_device(
    interpret: bool, kernels: Callable[..., Any], portable: Callable[..., Any], fixed: Any, *given: Any
) -> Any:
    """Compute ``fn(fixed, *given)``: by kernels on NVIDIA GPUs, and in the interpreter; elsewhere in the other way."""
    if interpret:
        return kernels(fixed, *given)
    return lax.platform_dependent(*given, cuda=partial(kernels, fixed), default=partial(portable, fixed))


@partial(_custom_vjp, nondiff_argnums=(0, 1, 2))
def run(
    kernels: Callable[..., Any], portable: Callable[..., Any], options: Any, arrays: tuple[Any, ...], offsets: Any
) -> Any:
    """Compute ``fn(options, arrays, offsets)``, both ways of which give the same; offsets, integers, may be None."""
    return by_device(INTERPRET, kernels, portable, options, arrays, offsets)


def _forward(kernels: Any, portable: Any, options: Any, arrays: tuple[Any, ...], offsets: Any) -> tuple[Any, Any]:
    return run(kernels, portable, options, arrays, offsets), (arrays, offsets)


def _backward(kernels: Any, portable: Any, options: Any, kept: Any, grad: Any) -> tuple[Any, None]:
    arrays, offsets = kept
    return jax.vjp(lambda x: portable(options, x, offsets), arrays)[1](grad)[0], None


run.defvjp(_forward, _backward)
