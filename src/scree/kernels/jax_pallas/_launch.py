"""How every kernel of this room is launched."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

_home: Any = jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")  # before JAX 0.8


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def numbers_of_32_bits() -> Any:
    """Where kernels are launched: what they make has 32 bits, whether JAX's 64-bit types are on or off."""
    return _home.enable_x64(False)


def launch(
    kernel: Callable[..., None],
    name: str,
    out: Any,
    programs: int,
    *given: Any,
    warps: int,
    stages: int,
    interpret: bool,
) -> Any:
    """Run so many programs of a kernel, which gets references to what is given and to `out`.

    Nothing given may have more than 32 bits.
    """
    with numbers_of_32_bits():
        return pl.pallas_call(
            kernel,
            out_shape=out,
            grid=(programs,),
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=interpret,
            name=f"scree_{name}",
        )(*given)
