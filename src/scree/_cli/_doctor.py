"""`scree doctor`: what is here, what computes each op on it, and why the rest does not.

Nothing is guessed: each framework is imported, and each implementation of each op is called on a tiny Array on each
device.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

import scree
from scree import kernels
from scree._backends import FRAMEWORKS
from scree.kernels import triton
from scree.kernels._dispatch import TABLE, device_kind

# What importing a framework, or asking for its devices, raises where it is broken: ImportError; OSError, a shared
# library that is missing; RuntimeError, parts that do not fit together or a driver that does not answer.
_BROKEN = (ImportError, OSError, RuntimeError)
_NOT_RUN = "its authors have not run it on this kind of device"


class Place(NamedTuple):
    """A device of a framework, and an array of shape (2, 2, 8) on it."""

    name: str
    array: Any


def _numpy() -> Iterator[Place]:
    import numpy as np

    yield Place("cpu", np.ones((2, 2, 8), np.float32))


def _torch() -> Iterator[Place]:
    import torch

    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    for name in names:
        yield Place(name, torch.ones(2, 2, 8, device=name))


def _jax() -> Iterator[Place]:
    import jax
    import jax.numpy as jnp

    for device in jax.devices():
        yield Place(f"{device.platform}:{device.id}", jax.device_put(jnp.ones((2, 2, 8)), device))


def _mlx() -> Iterator[Place]:
    import mlx.core as mx

    yield Place(str(mx.default_device().type).rpartition(".")[2], mx.ones((2, 2, 8)))


def _cupy() -> Iterator[Place]:
    import cupy

    for i in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(i):
            yield Place(f"cuda:{i}", cupy.ones((2, 2, 8), "float32"))


_PLACES: dict[str, Callable[[], Iterator[Place]]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "mlx": _mlx,
    "cupy": _cupy,
}

# op -> a call of it on an Array of (2, 2, 8)
_CALLS: dict[str, Callable[[scree.Array, str], Any]] = {
    "varlen_attention": lambda x, name: kernels.varlen_attention(x, x, x, implementation=name),
    "varlen_layernorm": lambda x, name: kernels.varlen_layernorm(x, implementation=name),
    "varlen_reduce": lambda x, name: kernels.varlen_reduce(x, "sum", implementation=name),
    "varlen_rmsnorm": lambda x, name: kernels.varlen_rmsnorm(x, implementation=name),
    "varlen_rope": lambda x, name: kernels.varlen_rope(x, *_tables(x), implementation=name),
    "varlen_softmax": lambda x, name: kernels.varlen_softmax(x, implementation=name),
}


class Answer(NamedTuple):
    """Which implementation computes an op, or None, and what speaks against those of its framework that stand before it."""

    implementation: str | None
    against: tuple[tuple[str, str], ...]
    not_run: bool = False  # by anybody on a device of this kind, before now


class Framework(NamedTuple):
    """What is known of one framework: its version and places, or why it cannot be used."""

    name: str
    version: str
    places: tuple[Place, ...]
    problem: str | None


def run() -> None:
    """Print what is here."""
    console = Console()
    console.print(Text(f"scree {scree.__version__}, Python {platform.python_version()}, {platform.platform()}"))
    with console.status("importing the frameworks"):
        found = [examine(name) for name in FRAMEWORKS]
    console.print(_frameworks(found))
    console.print(Text(f"triton, the kernels for CUDA and ROCm: {fast_kernels(found)}"))
    with console.status("trying the implementations"):
        table = _implementations(found)
    console.print(table)


def examine(name: str) -> Framework:
    """Import a framework and ask it for its devices."""
    module = FRAMEWORKS[name][0]
    top = module.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return Framework(name, "", (), f'not installed: pip install "scree[{name}]"')
    try:
        version = _version(top, importlib.import_module(module))
        places = tuple(_PLACES[name]())
    except _BROKEN as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Framework(name, "", (), f'installed, but broken: {reason}; to repair it: pip install "scree[{name}]"')
    return Framework(name, version, places, None if places else "has no device here")


def why_not(op: str, implementation: str, array: Any) -> str | None:
    """Call one implementation of an op on an array; return why it cannot serve, or None where it did."""
    try:
        _CALLS[op](scree.Array(array, [0, 1, 2]), implementation)
    except NotImplementedError as refused:  # its message: what was called, then "name: reason" of each implementation
        return str(refused).partition(f": {implementation}: ")[2] or str(refused)
    except _failures() as failed:
        return f"failed: {' '.join(str(failed).split())}"
    return None


def answer(op: str, array: Any) -> Answer:
    """Find which implementation computes an op on an array: the first of the table that can."""
    arr = scree.Array(array, [0, 1, 2])
    against: list[tuple[str, str]] = []
    for implementation in TABLE[op]:
        if implementation.backends is not None and arr._xp.NAME not in implementation.backends:
            continue  # for the arrays of others
        not_run = device_kind(arr) in implementation.not_run
        reason = why_not(op, implementation.name, array)
        if reason is None and implementation.on_request:
            reason = "serves on request alone" + (f"; {_NOT_RUN}" if not_run else "")
        if reason is None:
            return Answer(implementation.name, tuple(against), not_run)
        against.append((implementation.name, reason))
    return Answer(None, tuple(against))


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not run raises: RuntimeError, and Triton's own where that is in use."""
    own = getattr(getattr(sys.modules.get("triton"), "errors", None), "TritonError", None)
    return (RuntimeError,) if own is None else (RuntimeError, own)


def fast_kernels(found: list[Framework]) -> str:
    """Say whether the Triton kernels can run here, and if not, what is missing."""
    missing = triton._missing()
    if missing is not None:
        return missing
    version = importlib.metadata.version("triton")
    places = [place.name for framework in found if framework.name == "torch" for place in framework.places]
    cuda = [name for name in places if name.startswith("cuda")]
    return f"Triton {version} on {', '.join(cuda) if cuda else 'no device: PyTorch sees no GPU here'}"


def _version(top: str, module: Any) -> str:
    found = getattr(module, "__version__", None)
    return str(found) if found is not None else importlib.metadata.version(top)


def _tables(x: scree.Array) -> tuple[Any, Any]:
    """cos and sin of the angle 0 for two places, taken from the ones in the values themselves."""
    ones = x.values[:, 0, :4]
    return ones, ones - ones


def _frameworks(found: list[Framework]) -> Table:
    table = Table(title="Frameworks", title_justify="left", title_style="bold")
    for heading in ("framework", "version", "devices"):
        table.add_column(heading, overflow="fold")
    for framework in found:
        devices = ", ".join(place.name for place in framework.places)
        state = Text(devices) if framework.problem is None else Text(framework.problem, style="yellow")
        table.add_row(framework.name, framework.version, state)
    return table


def _implementations(found: list[Framework]) -> Table:
    table = Table(title="Who computes what", title_justify="left", title_style="bold")
    for heading in ("on", "ops", "computed by", "not by"):
        table.add_column(heading, overflow="fold")
    for name, array in ((f"{f.name} {place.name}", place.array) for f in found for place in f.places):
        answers: dict[Answer, list[str]] = {}
        for op in TABLE:
            answers.setdefault(answer(op, array), []).append(op)
        for i, (given, ops) in enumerate(answers.items()):
            reasons = "\n".join(f"{name}: {reason}" for name, reason in given.against)
            chosen = Text("none", style="yellow") if given.implementation is None else Text(given.implementation)
            if given.not_run:
                chosen.append(f": {_NOT_RUN}", style="yellow")
            table.add_row("" if i else name, Text("\n".join(ops)), chosen, Text(reasons))
        table.add_section()
    return table
