"""Which implementation computes an op: one table, and the reasons against each entry.

Coarse facts (framework, device, dtype) are data. Where they fit, the module is asked ``why_not(op, *args,
**options)``, which looks at metadata only. The first that has nothing against the call computes it; the reference is
always the last resort. Candidates are never timed here.

A module is imported as soon as one of its frameworks is in use, and not at the call: a compiler that traces the call
cannot import.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, NamedTuple

from .. import _backends
from .._array import Array
from .._backends import Backend


class Impl(NamedTuple):
    """One way to compute an op.

    Attributes
    ----------
    name : str
        What ``implementation=`` calls it.
    module : str
        Relative to `scree.kernels`; holds ``why_not``, and the function of the op (`function_of`).
    backends, devices, dtypes : tuple of str, or None
        The frameworks, kinds of device and dtypes it serves; None serves all.
    requires : str, optional
        A package beyond the framework, without which it is not here.
    install : str, optional
        What pip installs that package with, where it is an extra of scree.
    on_request : bool
        It is never chosen, and serves only where it is asked for by name.
    not_run : tuple of str
        Kinds of device that it is meant for, and on which nobody has run it yet.
    """

    name: str
    module: str
    backends: tuple[str, ...] | None = None
    devices: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    requires: str | None = None
    install: str | None = None
    on_request: bool = False
    not_run: tuple[str, ...] = ()


_TORCH_NATIVE = Impl(
    "torch_native", ".torch_native", backends=("torch",), devices=("cpu", "mps", "xpu"), not_run=("mps", "xpu")
)
_NUMPY_BLAS = Impl("numpy_blas", ".numpy_blas", backends=("numpy",))
_NUMBA = Impl(
    "numba",
    ".numba_loops",
    backends=("numpy",),
    dtypes=("float16", "float32", "float64"),
    requires="numba",
    install="scree[numba]",
)
_JAX_XLA = Impl("jax_xla", ".jax_xla", backends=("jax",), not_run=("tpu",))
_JAX_PALLAS = Impl(
    "jax_pallas", ".jax_pallas", ("jax",), ("gpu", "cuda", "unknown"), ("float16", "bfloat16", "float32")
)
_MLX_FAST = Impl("mlx_fast", ".mlx_fast", backends=("mlx",), not_run=("gpu",))
_MLX_FAST_NORM = _MLX_FAST._replace(dtypes=("float16", "bfloat16", "float32"))  # mx.fast narrows float64
_MLX_METAL = Impl(
    "mlx_metal",
    ".mlx_metal",
    ("mlx",),
    dtypes=("float16", "bfloat16", "float32"),
    on_request=True,
    not_run=("gpu",),
)
_REFERENCE = Impl("reference", ".reference")


def _triton(*dtypes: str) -> Impl:
    return Impl("triton", ".triton", backends=("torch",), devices=("cuda",), dtypes=dtypes)


def _flash(name: str, requires: str | None = None) -> Impl:
    dtypes = ("float16", "bfloat16")
    return Impl(name, f".flash.{name}", ("torch",), ("cuda",), dtypes, requires=requires, on_request=True)


_FLASH = (_flash("torch_varlen"), _flash("fa3", "flash_attn_interface"), _flash("fa4", "flash_attn"))
_HALVES_AND_SINGLE = ("float16", "bfloat16", "float32")
_FLOATING = (*_HALVES_AND_SINGLE, "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")

# op -> implementations, the best one first
_NORMS = (
    _triton(*_FLOATING),
    _TORCH_NATIVE,
    _NUMBA,
    _NUMPY_BLAS,
    _JAX_PALLAS,
    _JAX_XLA,
    _MLX_FAST_NORM,
    _REFERENCE,
)
TABLE: dict[str, tuple[Impl, ...]] = {
    "varlen_attention": (
        _triton(*_HALVES_AND_SINGLE),
        *_FLASH,
        _TORCH_NATIVE,
        _NUMBA._replace(dtypes=("float16", "float32")),
        _NUMPY_BLAS,
        _JAX_PALLAS,
        _JAX_XLA,
        _MLX_METAL,
        _MLX_FAST,
        _REFERENCE,
    ),
    "varlen_layernorm": _NORMS,
    "varlen_reduce": (
        _triton(*_FLOATING, *_INTEGERS, "bool"),
        _TORCH_NATIVE,
        _NUMBA._replace(dtypes=("float32", "float64", *_INTEGERS, "bool")),
        _NUMPY_BLAS,
        _JAX_PALLAS,
        _JAX_XLA,
        _MLX_FAST,
        _REFERENCE,
    ),
    "varlen_rmsnorm": _NORMS,
    "varlen_rope": (_triton(*_FLOATING), _TORCH_NATIVE, _NUMBA, _NUMPY_BLAS, _JAX_PALLAS, _JAX_XLA, _REFERENCE),
    "varlen_softmax": (_triton(*_FLOATING), _TORCH_NATIVE, _NUMPY_BLAS, _JAX_PALLAS, _JAX_XLA, _MLX_FAST, _REFERENCE),
}


_MODULES: dict[str, Any] = {}
_INSTALLED: dict[str, bool] = {}  # of the packages that implementations require; looked for but once


def _import_modules(backend: Backend) -> None:
    for impl in {impl for implementations in TABLE.values() for impl in implementations}:
        if impl.backends is not None and backend.NAME not in impl.backends:
            continue
        if impl.requires is not None and impl.requires not in _INSTALLED:
            _INSTALLED[impl.requires] = importlib.util.find_spec(impl.requires) is not None
        if impl.module not in _MODULES:
            _MODULES[impl.module] = importlib.import_module(impl.module, __package__)


_backends.on_load(_import_modules)


def choose(op: str, implementation: str | None, arr: Array, *args: Any, **options: Any) -> Any:
    """Return the module of the first implementation that can serve the call, or of the one that is asked for.

    It has the function that `function_of` finds. It may have ``bind(op, arrays, options)``, too, which returns a function
    of arrays like these alone: for calls that are made again, outside of compilers and transformations.

    Raises
    ------
    ValueError
        `implementation` is no name in the table of this op.
    NotImplementedError
        None can serve the call, or not the one that was asked for; the message has every reason.
    """
    reasons: list[tuple[Impl, str | None]] = []
    for impl in TABLE[op]:
        if impl.on_request if implementation is None else impl.name != implementation:
            continue
        against = None
        if _fits(impl, arr) and (impl.requires is None or _INSTALLED[impl.requires]):
            module = _MODULES[impl.module]
            against = module.why_not(op, arr, *args, **options)
            if against is None:
                return module
        reasons.append((impl, against))
    if not reasons:
        known = ", ".join(repr(impl.name) for impl in TABLE[op])
        raise ValueError(f"{op}: implementation is {implementation!r}; needs one of {known}, or None for the best")
    # What is wrong is put into words here alone: an op on short rows takes no longer than the words do.
    against = "; ".join(f"{impl.name}: {reason or mismatch(impl, arr)}" for impl, reason in reasons)
    raise NotImplementedError(f"{op}: no implementation can serve this call: {against}")


def function_of(module: Any, op: str) -> Any:
    """The function of a module that computes an op: of its name, but ``attend(q, k, v, sinks, options)`` for attention.

    That takes `AttentionOptions` in place of all that `varlen_attention` takes, whose name is public in some modules.
    """
    return module.attend if op == "varlen_attention" else getattr(module, op)


def _fits(impl: Impl, arr: Array) -> bool:
    """Whether no coarse fact about the Array speaks against an implementation."""
    xp = arr._xp
    return (
        (impl.backends is None or xp.NAME in impl.backends)
        and (impl.devices is None or device_kind(arr) in impl.devices)
        and (impl.dtypes is None or xp.dtype_name(arr._values) in impl.dtypes)
    )


def mismatch(impl: Impl, arr: Array) -> str | None:
    """Say which coarse facts about the Array, or what is not installed, speak against an implementation."""
    xp = arr._xp
    facts = (
        ("framework", xp.NAME, impl.backends),
        ("device", device_kind(arr) if impl.devices is not None else "", impl.devices),
        ("dtype", xp.dtype_name(arr.values), impl.dtypes),
    )
    against = [
        f"serves {what} {', '.join(served)}, got {got}"
        for what, got, served in facts
        if served is not None and got not in served
    ]
    if not against and impl.requires is not None and not _INSTALLED[impl.requires]:
        how = f': pip install "{impl.install}"' if impl.install else ""
        against.append(f"needs {impl.requires}, which is not installed{how}")
    return " and ".join(against) or None


def device_kind(arr: Array) -> str:
    """The kind of an Array's device without its number: "cpu", "cuda", "gpu", "mps"; "unknown" under a trace of JAX."""
    device = arr.device
    kind = getattr(device, "type", None)
    if type(kind) is str:  # PyTorch's
        return kind
    kind = kind or getattr(device, "platform", None) or device
    return "unknown" if device is None else str(kind).rpartition(".")[2]
